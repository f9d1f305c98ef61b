"""Policies as a training task: windows, goals, what is watched, and diffusion policies that learn two modes."""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from data import policy as data
from data.errors import UserError
from models import policy as models
from stages.distill import alone
from stages.teach.policy import Denoising, Policy, for_student, for_teacher
from stages.training import Context, Run

sys.path.insert(0, str(Path(__file__).parent))
import policy_project as project

WIDER = {**project.TRANSFORMER, "width": 32}
FAR = {"sigma_min": 0.05, "sigma_max": 3.0, "sigma_data": 1.0}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project.write(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    before = torch.get_num_threads()
    yield Run(project.teacher().training)
    torch.set_num_threads(before)


def steps(learner: Any, run: Run, count: int) -> list[dict[str, float]]:
    context, found = Context(learner, run, 0), []
    for name, module in learner.modules.items():
        module.train(name not in learner.frozen)
        module.requires_grad_(name not in learner.frozen)
    for step in range(count):
        context.begin(step)
        found.append({name: value.item() for name, value in learner.step(context).items()})
    return found


def episodes(prepared: Path, part: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Observations and actions of every episode of a split, read without the code that is tested."""
    manifest = pd.read_csv(prepared / "manifest.csv")
    arrays = [np.load(prepared / f"{name}.npy") for name in ("observations", "actions")]
    return [
        (arrays[0][start : start + length], arrays[1][start : start + length])
        for start, length in manifest.loc[manifest["split"] == part, ["start", "length"]].itertuples(index=False)
    ]


# Windows.


@pytest.mark.parametrize("goals", [0, 2])
def test_an_epoch_holds_every_window_of_the_training_split_with_its_goals(prepared: Path, run: Run, goals: int) -> None:
    network = {**project.MIXTURE, "goals": goals}
    task = for_student(project.student(network=network, training={"batch": 2}), prepared, run, None)
    learner = alone.Learner(task, task, run)  # type: ignore[arg-type]
    scaling = data.describe(prepared)["scaling"]["action"]
    wanted = []
    for observations, actions in episodes(prepared, "train"):
        for start in range(len(actions) - 2):
            shown = np.concatenate([observations[len(observations) - goals :], observations[start : start + 3]])
            scaled = (actions[start : start + 3] - np.array(scaling["mean"])) / np.array(scaling["std"])
            wanted.append([*shown.ravel(), *scaled.ravel()])
    assert task.streams()["train"].size == len(wanted)
    context, found = Context(learner, run, 0), []
    context.begin(0)
    for _ in range(len(wanted) // 2):
        views = task.views(context)
        assert views.student is views.teacher
        found += torch.cat([views.student.flatten(1), views.target.flatten(1)], 1).tolist()
    nearest = np.abs(np.array(found)[:, None] - np.array(wanted)).max(2)
    assert nearest.min(1).max() < 1e-5
    assert len(set(nearest.argmin(1))) == len(found)


@pytest.mark.parametrize(
    ("method", "names"), [("alone", {"train"}), ("em", {"train", "gate"}), ("vdd", {"train", "gate"})]
)
def test_a_gate_that_learns_by_turns_has_windows_of_its_own(
    prepared: Path, run: Run, method: str, names: set[str]
) -> None:
    teacher = project.trained(for_teacher(project.teacher(), prepared, run)) if method == "vdd" else None
    task = for_student(project.student(method), prepared, run, teacher)
    assert set(task.streams()) == names
    assert task.student.gate_trains_trunk == (method == "alone")  # type: ignore[union-attr]
    assert (task.teacher is None) == (teacher is None)
    if "gate" in names:
        learner = alone.Learner(task, task, run)  # type: ignore[arg-type]
        context = Context(learner, run, 0)
        context.begin(0)
        first, other = task.views(context), task.views(context, "gate")
        assert not torch.equal(first.target, other.target)
        assert [learner.streams[name].position for name in ("train", "gate")] == [1, 1]


def test_the_interface_says_what_goes_in(prepared: Path, run: Run) -> None:
    task, description = for_teacher(project.teacher(), prepared, run), data.describe(prepared)
    assert task.interface == {
        "observations": 2, "actions": 2, "scaling": description["scaling"], "environment": None
    }  # fmt: skip
    assert task.source == project.PROVENANCE
    assert (task.steps, task.steps_per_epoch) == (20, 10)
    short = for_teacher(project.teacher(training={"iterations": 4}), prepared, run)
    assert (short.steps, short.steps_per_epoch) == (4, 4)
    with pytest.raises(UserError, match="compares class scores"):
        task.logits(None)  # type: ignore[arg-type]


# Optimisers and objective.


def test_rates_fall_in_a_line_to_nothing_or_stay(prepared: Path, run: Run) -> None:
    task = for_student(project.student(training={"learning_rate": 0.5}), prepared, run, None)
    rate = task.schedule(4)
    assert [rate(count) for count in range(7)] == [0.5, 0.375, 0.25, 0.125, 0, 0, 0]
    assert task.schedule(4, 1.0)(2) == 0.5
    assert isinstance(task.optimizer([torch.zeros(1)]), torch.optim.Adam)
    task = for_teacher(project.teacher(training={"weight_decay": 0.1, "learning_rate": 0.5}), prepared, run)
    assert {task.schedule(4)(count) for count in range(7)} == {0.5}
    optimizer = task.optimizer([torch.zeros(1)])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["weight_decay"] == 0.1


@pytest.mark.parametrize("network", [{}, {"covariance": "diagonal"}, {"goals": 1}])
def test_a_student_is_watched_by_every_step_of_the_validation_split_once(
    prepared: Path, run: Run, network: dict[str, Any]
) -> None:
    entry = project.student(network={**project.MIXTURE, "gain": 1.0, **network})
    task = for_student(entry, prepared, run, None)
    student, goals = task.student.eval(), network.get("goals", 0)
    assert isinstance(student, models.Mixture)
    found = []
    for observations, actions in episodes(prepared, "validation"):
        for step in range(len(actions)):
            window = slice(max(0, step - 2), step + 1)
            shown = np.concatenate([observations[len(observations) - goals :], observations[window]])
            density = student.log_density(torch.from_numpy(shown)[None], torch.from_numpy(actions[window])[None])
            found.append(-density[0, -1].item())
    ((name, value),) = task.monitor(student).items()
    assert name == "negative_log_likelihood"
    assert value == pytest.approx(np.mean(found), rel=1e-5)
    views = task.views(_context(task, run))
    objective = task.objective(student(views.student), views.target)
    raw = -student.log_density(views.student, student.scaling.raw(views.target)).mean()
    assert objective.item() == pytest.approx((raw - student.scaling.action_std.log().sum()).item(), rel=1e-5)


def _context(task: Policy, run: Run) -> Context:
    context = Context(alone.Learner(task, task, run), run, 0)  # type: ignore[arg-type]
    context.begin(0)
    return context


@pytest.mark.parametrize("name", ["ddpm", "beso"])
def test_a_teacher_is_watched_with_the_same_noise_every_time(prepared: Path, run: Run, name: str) -> None:
    task = for_teacher(project.teacher(name=name), prepared, run)
    task.student.eval()
    first = task.monitor(task.student)
    torch.manual_seed(1)
    assert task.monitor(task.student) == first
    assert list(first) == ["denoising_loss"]
    with torch.no_grad():
        for parameter in task.student.parameters():
            parameter.add_(0.1)
    assert task.monitor(task.student) != first


# Diffusion policies.


@pytest.mark.parametrize("ema", [0.3, 0.0, None])
def test_the_kept_weights_are_a_moving_average(prepared: Path, run: Run, ema: float | None) -> None:
    entry = project.teacher(training={} if ema is None else {"ema": ema})
    task = for_teacher(entry, prepared, run)
    learner = task.pretraining()
    assert isinstance(learner, Denoising)
    average = copy.deepcopy(learner.student.state_dict())
    context = Context(learner, run, 0)
    for update in range(1, 12):
        context.begin(update)
        learner.step(context)
        stays = min(0.995 if ema is None else ema, (1 + update) / (10 + update))
        now = learner.modules["student"].state_dict()
        average = {key: stays * value + (1 - stays) * now[key] for key, value in average.items()}
        for key, value in learner.student.state_dict().items():
            torch.testing.assert_close(value, average[key], atol=1e-6, rtol=1e-5)
    assert learner.student is learner.watched is learner.modules["average"]
    assert learner.student is not learner.modules["student"]
    assert project.teacher(name="beso").ema == 0.999


@pytest.mark.parametrize("name", ["ddpm", "beso"])
def test_a_loss_is_the_error_of_the_network_at_the_noise_that_was_drawn(prepared: Path, run: Run, name: str) -> None:
    """Written out from the definitions, with the streams that the step draws from."""
    task = for_teacher(project.teacher(name=name), prepared, run)
    learner = task.pretraining()
    assert learner is not None
    before = copy.deepcopy(task.student).double()
    (found,) = steps(learner, run, 1)
    context = _context(task, run)
    views, generator = task.views(context), context.generator("noise")
    noise = torch.randn(8, 3, 2, generator=generator).double()
    uniform = torch.rand(8, generator=generator).double()
    shown, actions, total = views.student.double(), views.target.double(), 0.0
    for row in range(8):
        if name == "ddpm":
            level = (uniform[row] * 8).long()[None]
            kept = models.cosine_schedule(8)[1][level]
            noisy = kept.sqrt() * actions[row] + (1 - kept).sqrt() * noise[row]
            error = before(noisy[None], shown[row][None], level) - noise[row]
        else:
            level = before.level_at(uniform[row])[None]
            skip, out, into = (x.item() for x in models.karras(level, 0.5))
            noisy = actions[row] + level * noise[row]
            error = (
                before.network(before.scaling.observations(shown[row][None]), into * noisy[None], level)
                - (actions[row] - skip * noisy) / out
            )
        total += error.square().mean().item() / 8
    assert found["loss/task"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    ("network", "iterations"),
    [
        ({"name": "ddpm", "steps": 16, "backbone": WIDER}, 300),
        ({"name": "beso", **FAR, "backbone": WIDER}, 300),
        ({"name": "beso", **FAR, "sampler": "ddim", "backbone": {"name": "mlp", "width": 64, "layers": 3}}, 300),
    ],
    ids=["ddpm", "beso", "ddim"],
)  # fmt: skip
def test_a_small_diffusion_policy_goes_both_ways(
    prepared: Path, run: Run, network: dict[str, Any], iterations: int
) -> None:
    training = {"iterations": iterations, "batch": 128, "learning_rate": 5e-3, "decay": "linear", "ema": 0.98}
    task = for_teacher(project.teacher(training=training, window=1, **network), prepared, run)
    learner = task.pretraining()
    assert learner is not None
    steps(learner, run, iterations)
    policy = learner.student.eval()
    assert isinstance(policy, models.Diffusion)
    observations = torch.rand(500, 1, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        found = (policy.act(observations, torch.Generator().manual_seed(2)) - 3) / 10
    side = found[:, 0].sign()
    assert 0.35 < (side > 0).float().mean() < 0.65
    for way in (-1, 1):
        own = found[side == way]
        assert own[:, 0].mean().item() == pytest.approx(way, abs=0.2)
        assert own[:, 0].std().item() < 0.3
    assert (found[:, 1] - observations[:, 0, 0]).abs().mean() < 0.2


# Mistakes.


def test_a_teacher_of_other_actions_is_refused(prepared: Path, run: Run, tmp_path: Path) -> None:
    other = project.trained(for_teacher(project.teacher(), project.write(tmp_path, actions=3), run))
    with pytest.raises(UserError, match="teacher 'big' and the data set 'prepared' differ in actions: 3 and 2"):
        for_student(project.student("vdd"), prepared, run, other)


def test_a_student_scales_actions_as_its_teacher_does(prepared: Path, run: Run, tmp_path: Path) -> None:
    other = project.trained(for_teacher(project.teacher(), project.write(tmp_path, scale=2.0), run))
    task = for_student(project.student("vdd"), prepared, run, other)
    assert task.interface["scaling"] == other[1].interface["scaling"] != data.describe(prepared)["scaling"]
    views = task.views(_context(task, run))
    assert 3 < views.target[..., 0].abs().mean() < 7, "five times as far as the teacher's own"


def test_a_window_longer_than_an_episode_is_refused(run: Run, tmp_path: Path) -> None:
    prepared = project.write(tmp_path, [4] * 10)
    with pytest.raises(UserError, match=r"has 4 steps, but a window has 5 \(`network.window`\)"):
        for_teacher(project.teacher(window=5), prepared, run)
    with pytest.raises(UserError, match=r"network.goals = 5, but the shortest episode of 'prepared' has 4 steps"):
        for_teacher(project.teacher(goals=5), prepared, run)


def test_too_few_windows_for_a_batch_are_refused(prepared: Path, run: Run) -> None:
    with pytest.raises(UserError, match=r"samples do not fill a batch of 5000 .*windows of the training split"):
        for_teacher(project.teacher(training={"batch": 5000}), prepared, run)
