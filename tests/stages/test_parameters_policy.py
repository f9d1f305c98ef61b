"""Mistakes in entries of the task policy: each is found, named by its path, and answered with what is right."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.errors import UserError
from stages.parameters import Parameters, load
from stages.parameters.policy import BESO, DDPM, EM, VDD, Alone, Dataset, Steps, Task, Teacher

DIGEST = "0123456789abcdef" * 4
ABSENT = object()
RIGHTS = "licence: none, credit: nobody, redistributable: true"

# Every kind of entry, and every key that there is.
FULL = f"""
sources:
  nothing: {{kind: none, {RIGHTS}}}
  humans: {{kind: folder, {RIGHTS}, path: $DATA/humans, tree_digest: {DIGEST}}}
datasets:
  made:
    {{task: policy, source: nothing, encoder: none, format: generated, environment: avoiding,
      demonstrations: {{episodes: 2, noise: 0.01, seed: 1}}, split: {{validation: 0.1, test: 0.2, seed: 1}},
      expect: {{episodes: 48, modes: 24, shortest: 30, longest: 250, largest_action: 0.1, largest_change: 0.1}}}}
  arrays:
    {{task: policy, source: humans, encoder: none, format: arrays, environment: none, file: avoiding.npz,
      keys: {{observation: state, action: velocity, episode_ends: ends, mode: way}}}}
  buffer:
    {{task: policy, source: humans, encoder: none, format: zarr, environment: pusht, folder: pusht.zarr, keys: {{}}}}
teachers:
  steps:
    task: policy
    dataset: made
    start: none
    network:
      {{name: ddpm, window: 5, goals: 0, steps: 8,
        backbone: {{name: transformer, layers: 2, heads: 2, width: 8, attention_dropout: 0.1, dropout: 0.1,
                    init_std: null}}}}
    outside: null
    training: {{iterations: 9, batch: 8, learning_rate: 0.1, weight_decay: 0.1, decay: linear, look_every: 3, clip: 1.0,
                seed: 1, threads: 1, accelerator: cpu, devices: 1, precision: 64-true, ema: 0.9}}
  sigmas:
    task: policy
    dataset: made
    start: none
    network:
      {{name: beso, window: 4, goals: 1, sigma_min: 0.1, sigma_max: 1.0, sigma_data: 0.5, spread: 0.5, sampler: ddim,
        steps: 3, rho: 5.0, backbone: {{name: mlp, width: 8, layers: 2, residual: true, dropout: 0.1}}}}
students:
  single:
    {{task: policy, dataset: made, method: alone, teacher: none,
      network: &small {{name: mixture, backbone: {{name: mlp, layers: 0}}}}}}
  em:
    {{task: policy, dataset: made, method: em, teacher: none, network: *small, expert_steps: 1, gate_steps: 1,
      reduction: mean, lr_total: iterations}}
  wide:
    task: policy
    dataset: made
    method: vdd
    teacher: steps
    network:
      {{name: mixture, window: 5, goals: 0, experts: 4, covariance: diagonal, gate: learned,
        heads: {{width: 8, layers: 1, residual: false, activation: prelu}}, gate_head: {{width: 8, layers: 2, residual: true}}, gain: 0.1,
        bias: 0.5, init_std: 1.0, min_std: 1.0e-4, backbone: {{name: transformer, layers: 1, heads: 2, width: 8}}}}
    levels: {{kind: steps, low: 0, high: 7}}
    samples: 1
    vp_input: scaled
    weight: none
    lag: 2
    expert_steps: 2
    gate_steps: 1
    reduction: sum
    lr_total: updates
    training: {{iterations: 9, decay: none}}
  levels:
    {{task: policy, dataset: made, method: vdd, teacher: sigmas, levels: {{kind: uniform, low: 0.1, high: 1.0}},
      network: {{name: mixture, window: 4, goals: 1, gate: uniform, backbone: {{name: mlp, width: 8}}}}}}
exports:
  wide: {{task: policy, dataset: made, tolerance: 0.001, threads: 2}}
tasks:
  policy: {{rollouts: 10, steps: 50, greedy: true, fewer_calls: [1, 2], seed: 1, threads: 1}}
gates:
  policy:
    {{metric: entropy, dataset: made, baseline: em, delta: 0.01, confidence: 0.95, resamples: 10000, seed: 1,
      teacher_share: 0.9, latency: {{batch: 1, percentile: p95, budget_ms: 2.0}},
      parity: {{outputs: 0.0001, metric: 0.001}}}}
"""
RAW = yaml.safe_load(FULL)


def edited(*edits: tuple[str, Any]) -> dict[str, Any]:
    """The parameters with some values set (or removed) by their path, as in `a.b[0].c`."""
    raw: dict[str, Any] = copy.deepcopy(RAW)
    for path, value in edits:
        *above, last = [int(step) if step.isdigit() else step for step in re.findall(r"[^.\[\]]+", path)]
        place: Any = raw
        for key in above:
            place = place[key] if isinstance(place, list) else place.setdefault(key, {})
        if value is ABSENT:
            del place[last]
        else:
            place[last] = value
    return raw


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parameters") / "params.yaml"


def read(file: Path, raw: dict[str, Any]) -> Parameters:
    file.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return load(file)


def mistakes(file: Path, *edits: tuple[str, Any]) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(file, edited(*edits))
    return [line.removeprefix("  ") for line in str(caught.value).splitlines()[1:]]


def test_the_base_of_these_edits_is_right(file: Path) -> None:
    parameters = read(file, edited())
    wide, sigmas = parameters.students["wide"], parameters.teachers["sigmas"]
    assert isinstance(wide, VDD)
    assert isinstance(wide.levels, Steps)
    assert isinstance(sigmas, Teacher)
    assert isinstance(sigmas.network, BESO)
    assert list(parameters.models("policy")) == ["steps", "sigmas", "single", "em", "wide", "levels"]
    needs = {name: student.needs_teacher for name, student in parameters.students.items()}
    assert needs == {"single": False, "em": False, "wide": True, "levels": True}


def test_defaults_are_those_of_the_card(file: Path) -> None:
    """VDD card 3.5 to 3.7, 5, and the decisions of its section 4."""
    bare: dict[str, Any] = {
        "name": "mixture",
        "backbone": {"name": "transformer", "layers": 4, "heads": 4, "width": 72},
    }
    gone = ["samples", "vp_input", "weight", "lag", "expert_steps", "gate_steps", "reduction", "lr_total", "training"]
    parameters = read(
        file,
        edited(
            ("students.wide.network", bare),
            *((f"students.wide.{name}", ABSENT) for name in gone),
            ("teachers.steps.training", ABSENT),
            ("teachers.steps.network", {"name": "ddpm", "backbone": bare["backbone"]}),
            ("students.em.expert_steps", ABSENT),
            ("tasks.policy", {}),
        ),
    )
    wide, steps, sigmas = parameters.students["wide"], parameters.teachers["steps"], parameters.teachers["sigmas"]
    assert isinstance(wide, VDD)
    assert (wide.samples, wide.vp_input, wide.weight, wide.lag) == (2, "raw", "gate", 0)
    assert (wide.expert_steps, wide.gate_steps, wide.reduction, wide.lr_total) == (2, 1, "sum", "updates")
    network, training = wide.network, wide.training
    assert (network.experts, network.covariance, network.gate, network.heads.activation) == (8, "full", "learned", "mish")
    assert (network.init_std, network.min_std, network.bias, network.gain, network.window) == (1, 1e-4, 1, 0.01, 5)
    assert (network.gate_head.width, network.gate_head.layers, network.gate_head.residual) == (64, 2, True)
    assert (training.iterations, training.batch, training.learning_rate, training.decay) == (
        40_000,
        1024,
        1e-4,
        "linear",
    )
    assert isinstance(steps, Teacher)
    assert isinstance(steps.network, DDPM)
    assert (steps.network.steps, steps.training.learning_rate, steps.training.decay, steps.ema) == (
        8,
        5e-4,
        "none",
        0.995,
    )
    assert isinstance(sigmas, Teacher)
    assert sigmas.ema == 0.999
    em, task, made = parameters.students["em"], parameters.tasks["policy"], parameters.datasets["made"]
    assert isinstance(em, EM)
    assert em.expert_steps == 1
    assert isinstance(parameters.students["single"], Alone)
    assert isinstance(task, Task)
    assert (task.rollouts, task.steps, task.greedy, task.fewer_calls) == (480, None, False, [1])
    assert isinstance(made, Dataset)


NETWORK = "students.wide.network"
MISTAKES: list[tuple[str, Any, str]] = [
    # Data.
    ("datasets.made.format", "genrated", "input should be 'generated', 'arrays' or 'zarr', got 'genrated'"),
    ("datasets.made.environment", "avoid", "input should be 'avoiding', 'pusht' or 'none', got 'avoid'"),
    ("datasets.made.source", "nothign", "unknown source 'nothign'; did you mean 'nothing'?"),
    ("datasets.made.encoder", "steps", "input should be 'none', got 'steps'"),
    ("datasets.made.demonstrations.episodes", 0, "must be > 0, got 0"),
    ("datasets.made.demonstrations.noise", -1, "must be >= 0, got -1"),
    ("datasets.made.split.validation", 0, "must be > 0, got 0"),
    ("datasets.made.split.test", 1, "must be < 1, got 1"),
    ("datasets.made.expect.shortest", 1, "must be >= 2, got 1"),
    ("datasets.made.expect.largest_action", 0, "must be > 0, got 0"),
    ("datasets.arrays.keys.episode_end", "x", "unknown key; did you mean 'episode_ends'?"),
    # Networks: a covariance of zero, and others that cannot be.
    (f"{NETWORK}.min_std", 0, "must be > 0, got 0"),
    (f"{NETWORK}.init_std", 0, "must be > 0, got 0"),
    (f"{NETWORK}.experts", 0, "must be > 0, got 0"),
    (f"{NETWORK}.window", 0, "must be > 0, got 0"),
    (f"{NETWORK}.goals", -1, "must be >= 0, got -1"),
    (f"{NETWORK}.gain", 0, "must be > 0, got 0"),
    (f"{NETWORK}.bias", -1, "must be >= 0, got -1"),
    (f"{NETWORK}.covariance", "diag", "input should be 'full' or 'diagonal', got 'diag'"),
    (f"{NETWORK}.gate", "fixed", "input should be 'learned' or 'uniform', got 'fixed'"),
    (f"{NETWORK}.heads.activation", "relu", "input should be 'mish', 'prelu' or 'silu', got 'relu'"),
    (f"{NETWORK}.name", "ddpm", "input should be 'mixture', got 'ddpm'"),
    (f"{NETWORK}.backbone.name", "gpt", "unknown name 'gpt'; known: mlp, transformer"),
    (f"{NETWORK}.backbone.dropout", 1, "must be < 1, got 1"),
    ("teachers.steps.network.name", "ddmp", "unknown name 'ddmp'; did you mean 'ddpm'?"),
    ("teachers.steps.network.steps", 0, "must be > 0, got 0"),
    ("teachers.steps.network.sigma_min", 0.1, "unknown key; known: backbone, goals, name, steps, window"),
    ("teachers.sigmas.network.sigma_min", 0, "must be > 0, got 0"),
    ("teachers.sigmas.network.sampler", "heun", "input should be 'euler_ancestral' or 'ddim', got 'heun'"),
    ("teachers.steps.training.ema", 1, "must be < 1, got 1"),
    ("teachers.steps.training.decay", "cosine", "input should be 'linear' or 'none', got 'cosine'"),
    ("teachers.steps.start", "sigmas", "input should be 'none', got 'sigmas'"),
    # Methods.
    ("students.wide.method", "vd", "unknown method 'vd'; did you mean 'vdd'?"),
    ("students.wide.teacher", "none", "method 'vdd' needs a teacher"),
    ("students.wide.teacher", "stepps", "unknown model 'stepps' of task policy; did you mean 'steps'?"),
    ("students.wide.levels", ABSENT, "is missing"),
    ("students.wide.levels.kind", "step", "unknown kind 'step'; did you mean 'steps'?"),
    ("students.wide.levels.low", -1, "must be >= 0, got -1"),
    ("students.levels.levels.low", 0, "must be > 0, got 0"),
    ("students.wide.samples", 0, "must be > 0, got 0"),
    ("students.wide.expert_steps", 0, "must be > 0, got 0"),
    ("students.wide.gate_steps", 0, "must be > 0, got 0"),
    ("students.wide.lag", -1, "must be >= 0, got -1"),
    ("students.wide.vp_input", "clean", "input should be 'raw' or 'scaled', got 'clean'"),
    ("students.wide.weight", "pi", "input should be 'gate' or 'none', got 'pi'"),
    ("students.wide.reduction", "max", "input should be 'sum' or 'mean', got 'max'"),
    ("students.wide.lr_total", "steps", "input should be 'updates' or 'iterations', got 'steps'"),
    ("students.em.teacher", "steps", "input should be 'none', got 'steps'"),
    ("students.em.samples", 2, "unknown key; known: "),
    ("gates.policy.metric", "top_1", "input should be 'success', 'entropy' or 'reward', got 'top_1'"),
    ("tasks.policy.rollouts", 0, "must be > 0, got 0"),
    ("tasks.policy.fewer_calls", [0], "[0]: must be > 0, got 0"),
    ("exports.wide.tolerance", 0, "must be > 0, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "message"), MISTAKES, ids=[f"{path}={str(value)[:12]}" for path, value, _ in MISTAKES]
)
def test_one_mistake_is_answered_in_one_line(file: Path, path: str, value: Any, message: str) -> None:
    (line,) = mistakes(file, (path, value))
    if message.startswith("["):
        path, message = path + message.partition(":")[0], message.partition(": ")[2]
    assert line.startswith(f"{path}: {message}")


ANNEAL = {"kind": "anneal", "low": 0.05, "high": 1, "iterations": 5}
SIGMAS = "what 'sigmas' was trained with, 0.1 to 1.0"
RULES: list[tuple[list[tuple[str, Any]], str]] = [
    *(
        ([(f"datasets.{name}.{field}", ABSENT)], f"datasets.{name}: format {kind!r} needs {field!r}")
        for name, kind, fields in [
            ("made", "generated", ("demonstrations",)),
            ("arrays", "arrays", ("file", "keys")),
            ("buffer", "zarr", ("folder", "keys")),
        ]
        for field in fields
    ),
    *(
        ([(f"datasets.{name}.{field}", value)], f"datasets.{name}: format {kind!r} takes no {field!r}")
        for name, kind, fields in [
            ("made", "generated", {"file": "x", "folder": "x", "keys": {}}),
            ("arrays", "arrays", {"folder": "x", "demonstrations": {"episodes": 1}}),
            ("buffer", "zarr", {"file": "x", "demonstrations": {"episodes": 1}}),
        ]
        for field, value in fields.items()
    ),
    ([("datasets.made.environment", "pusht")], "datasets.made: format 'generated' knows one environment, 'avoiding'"),
    ([("datasets.made.split.validation", 0.8)], "datasets.made: 'split.validation' and 'split.test' leave nothing to"),
    ([(f"{NETWORK}.min_std", 1.0)], f"{NETWORK}: 'init_std' = 1.0 has to be above 'min_std' = 1.0"),
    ([(f"{NETWORK}.backbone.heads", 3)], f"{NETWORK}.backbone: 'heads' = 3 has to divide 'width' = 8"),
    ([(f"{NETWORK}.gate_head.layers", 3)], f"{NETWORK}.gate_head: 'residual' needs an even number of 'layers'"),
    ([("teachers.sigmas.network.sigma_max", 0.1)],
     "teachers.sigmas.network: 'sigma_min' = 0.1 has to be below 'sigma_max' = 0.1"),
    ([("teachers.sigmas.network.backbone", {"name": "mlp", "layers": 0})],
     "teachers.sigmas: 0 'layers' in 'network.backbone' are for students, whose heads have layers of their own"),
    ([("students.wide.levels.low", 5), ("students.wide.levels.high", 4)],
     "students.wide.levels: 'low' = 5 is above 'high' = 4"),
    ([("students.levels.levels", {"kind": "anneal", "low": 0.5, "high": 0.4, "iterations": 5})],
     "students.levels.levels: 'low' = 0.5 is above 'high' = 0.4"),
    # The teacher's schedule, window and goals.
    ([("students.wide.levels.high", 8)],
     "students.wide.levels: 0 to 8 goes beyond what 'steps' was trained with, 0 to 7"),
    ([("students.levels.levels.low", 0.05)], f"students.levels.levels: 0.05 to 1.0 goes beyond {SIGMAS}"),
    ([("students.levels.levels.high", 1.5)], f"students.levels.levels: 0.1 to 1.5 goes beyond {SIGMAS}"),
    ([("students.levels.levels", ANNEAL)], f"students.levels.levels: 0.05 to 1.0 goes beyond {SIGMAS}"),
    ([("students.wide.levels", {"kind": "last"})],
     "students.wide.levels.kind: 'steps' is a 'ddpm', which has levels of kind 'steps'"),
    ([("students.levels.levels", {"kind": "steps", "low": 0, "high": 1})],
     "students.levels.levels.kind: 'sigmas' is a 'beso', which has levels of kind 'uniform', 'last' or 'anneal'"),
    ([("students.levels.vp_input", "scaled")],
     "students.levels.vp_input: 'scaled' is for a 'ddpm', and 'sigmas' is a 'beso'"),
    ([(f"{NETWORK}.window", 6)], f"{NETWORK}.window: 6 is longer than that of the teacher 'steps', 5"),
    ([(f"{NETWORK}.goals", 1)], f"{NETWORK}.goals: 1, and the teacher 'steps' has 0"),
    ([("students.wide.teacher", "em")],
     "students.wide.teacher: 'em' is no diffusion policy, and has no score to learn from"),
]  # fmt: skip


@pytest.mark.parametrize(("edits", "message"), RULES, ids=[message[:70] for _, message in RULES])
def test_what_does_not_go_together_is_answered_for_the_whole_entry(
    file: Path, edits: list[tuple[str, Any]], message: str
) -> None:
    (line,) = mistakes(file, *edits)
    assert line.startswith(message)
