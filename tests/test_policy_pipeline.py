"""The task policy through the real command line: from nothing to a champion that acts."""

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from clones import ROOT, Project, copy_tree, refusal

pytestmark = pytest.mark.slow
TASK = "policy"
TEACHERS, STUDENTS = ("ddpm", "beso"), ("alone", "em", "vdd", "beso-vdd")
EXPORTED = ("vdd", "beso-vdd")
ABSOLUTE = {"untampered", "validated", "evaluated", "parity", "signature", "redistributable", "clean"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project on which `dvc repro` has run once. Tests leave it as they found it, but for the last one."""
    project = copy_tree(tmp_path_factory.mktemp("a clone that acts", numbered=False) / "my project", "policy.yaml")
    project.run("dvc", "repro")
    project.commit("made")
    return project


@pytest.fixture
def project(made: Project) -> Iterator[Project]:
    """The made project; whatever a test did to its parameters and results is undone."""
    yield made
    made.restore()


def described(project: Project, path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(project.path(path).read_text())
    return found


def last_decision(project: Project) -> dict[str, Any]:
    files = sorted(project.path("decisions", TASK).glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    found: dict[str, Any] = json.loads(files[-1].read_text())
    return found


def test_every_model_acted_in_the_same_rollouts(project: Project) -> None:
    assert project.stale() == set()
    tables = {}
    for name in (*TEACHERS, *STUDENTS):
        figures = described(project, f"reports/metrics/{TASK}/{TASK}-{name}.json")
        assert next(iter(figures["validation"])) == "success"
        assert figures["test"].keys() >= {"success", "entropy", "reward", "calls"}
        assert ("nll" in figures["test"]) == (name in STUDENTS)
        assert ("one_step_success" in figures["test"]) == (name in TEACHERS)
        tables[name] = pd.read_csv(project.path(f"reports/evaluation/{TASK}/{TASK}-{name}.samples.csv"))
        assert tables[name]["split"].value_counts().to_dict() == {"validation": 24, "test": 24}
        assert tables[name]["seed"].is_unique
    assert all((table["seed"] == tables["vdd"]["seed"]).all() for table in tables.values())


def test_demonstrations_need_nothing_from_outside(project: Project) -> None:
    """And are those of the rules: every way in every split."""
    told = described(project, "data/prepared/policy/avoiding/dataset.json")
    assert told["environment"]["name"] == "avoiding"
    manifest = pd.read_csv(project.path("data/prepared/policy/avoiding/manifest.csv"))
    assert (manifest.groupby("split")["mode"].nunique() == 24).all()


@pytest.mark.parametrize("name", EXPORTED)
def test_a_graph_acts_alone(project: Project, name: str) -> None:
    """Without torch, and as evaluation lets the network act: the likeliest expert is not asked for here."""
    folder = project.path(f"models/exported/{TASK}/{TASK}-{name}")
    told = json.loads((folder / "model.json").read_text())
    assert told["parity"]["largest_difference"]["expert"] == 0
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    samples = pd.read_csv(project.path(f"reports/evaluation/{TASK}/{TASK}-{name}.samples.csv"))
    samples = samples[samples["split"] == "test"]
    from data.avoiding import Avoiding

    place, window = Avoiding(), told["network"]["window"]
    streams = [np.random.default_rng([0, seed]) for seed in samples["seed"]]
    seen = [place.reset(samples["seed"].tolist())]
    everyone = np.ones((len(samples), told["network"]["experts"]), bool)
    for _ in range(100):
        draw = np.array([stream.random() for stream in streams], np.float32)
        fed = {"observations": np.stack(seen[-window:], 1), "draw": draw, "allowed": everyone}
        seen.append(place.step(session.run(["action"], fed)[0]))
    outcome = place.outcome()
    # A few steps of training go anywhere: rounding may turn one or two.
    assert (outcome.success == samples["success"].to_numpy()).mean() > 0.9
    assert (outcome.steps == samples["steps"].to_numpy()).mean() > 0.7


# Wrong inputs


def student(name: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    """Values of one student's entry by the names on the way to them, two underscores between."""

    def change(raw: dict[str, Any]) -> None:
        raw["students"][name] = copy.deepcopy(raw["students"][name])  # others may share parts of it
        for path, value in changes.items():
            *way, last = path.split("__")
            entry = raw["students"][name]
            for part in way:
                entry = entry[part]
            entry[last] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("policy-vdd", student("policy-vdd", levels__high=4), r"levels: 1 to 4 goes beyond .*, 0 to 3"),
        ("policy-beso-vdd", student("policy-beso-vdd", levels__low=0.05), r"levels: 0.05 to 1.0 goes beyond"),
        ("policy-vdd", student("policy-vdd", network__window=4), r"network.window: 4 is longer than .*, 3"),
        ("policy-vdd", student("policy-vdd", network__min_std=0.0), r"network.*min_std: must be > 0"),
        ("policy-vdd", student("policy-vdd", network__init_std=0.0), r"network.*init_std: must be > 0"),
        ("policy-alone", student("policy-alone", network__window=500), r"but a window has 500 \(`network.window`\)"),
    ],
    ids=["steps", "levels", "window", "no floor", "no covariance", "short episodes"],
)
def test_a_student_that_does_not_fit_is_refused(
    project: Project, name: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    before = project.path(f"models/trained/{TASK}/{name}/model.json").read_bytes()
    project.edit(change)
    said = refusal(project.stage("stages.distill", name, code=None))
    assert re.search(message, said), said
    assert project.path(f"models/trained/{TASK}/{name}/model.json").read_bytes() == before


def test_a_teacher_of_other_actions_teaches_nobody(project: Project) -> None:
    """And an episode of one step is no demonstration."""
    raw = project.path("data/raw/other")
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    source = {"kind": "folder", "path": ".", "tree_digest": "0" * 64, "licence": "-", "credit": "-"}
    entry = {"task": TASK, "source": "other", "encoder": "none", "format": "arrays", "file": "x.npz", "keys": {}}
    project.edit(lambda p: p["sources"].update(other={**source, "redistributable": False}))
    project.edit(lambda p: p["datasets"].update(other={**entry, "environment": "none"}))
    project.edit(
        lambda p: [one["students"].update(more={**p["students"]["policy-vdd"], "dataset": "other"}) for one in [p]]
    )
    arrays = {"observation": generator.normal(size=(60, 4)), "action": generator.normal(size=(60, 3))}
    np.savez(raw / "x.npz", **arrays, episode_ends=np.arange(6, 61, 6))
    project.stage("stages.prepare", "other")
    project.stage("stages.validate", "other")
    said = refusal(project.stage("stages.distill", "more", code=None))
    assert re.search(r"actions|action", said), said
    np.savez(raw / "x.npz", **arrays, episode_ends=np.array([1, *range(6, 61, 6)]))
    project.stage("stages.prepare", "other")
    said = refusal(project.stage("stages.validate", "other", code=None))
    assert re.search(r"length", said), said


# Deployed


def test_from_a_champion_to_one_in_other_rollouts(made: Project) -> None:
    """Registered, promoted, in the README's loop; then other rollouts count, and the champion acts once more."""
    made.stage("stages.latency", TASK)
    made.stage("pipelines.registry", "register", TASK)
    promoted = made.stage("pipelines.registry", "promote", TASK, code=None)
    assert promoted.stdout.startswith("promoted: version "), promoted.stdout
    gates = last_decision(made)["gates"]
    assert {name: gates[name]["verdict"] for name in ABSOLUTE} == dict.fromkeys(ABSOLUTE, "passed")
    (text,) = [
        block
        for block in re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
        if "models:/policy@champion" in block
    ]
    said = made.run(sys.executable, "-c", text).stdout
    assert re.search(r"^\d+ of 100 succeed, in \d+ of 24 ways; experts decided \[", said, re.MULTILINE), said

    made.edit(lambda raw: raw["tasks"]["policy"].update(rollouts=30, seed=5))
    made.run("dvc", "repro")
    made.commit("other rollouts")
    # The same weights are the same version: what stands against them is themselves.
    again = made.stage("pipelines.registry", "register", TASK)
    assert "registered before" in again.stdout
    for name in EXPORTED:
        made.edit(lambda raw, entry=f"{TASK}-{name}": student(entry, training__seed=1)(raw))
    made.run("dvc", "repro")
    made.commit("trained again")
    made.stage("stages.latency", TASK)
    made.stage("pipelines.registry", "register", TASK)
    promoted = made.stage("pipelines.registry", "promote", TASK, code=None)
    assert promoted.stdout.startswith("promoted: version "), promoted.stdout
    gates = last_decision(made)["gates"]
    assert {name: gates[name]["verdict"] for name in ABSOLUTE} == dict.fromkeys(ABSOLUTE, "passed")
    assert gates["champion"]["figures"]["evaluated_again"]
    assert gates["champion"]["figures"]["samples"] == 30
