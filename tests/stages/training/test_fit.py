"""What a training leaves on disk: the model, what was trained beside it, and where it all came from."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from data.files import sha256, tree_digest
from models.artifacts import Description, load_model, read_description, save_model
from stages import paths
from stages.distill import alone, kd
from stages.parameters import text as schema
from stages.teach.text import for_student, for_teacher
from stages.training import Companion, Context, Method, Run, Stopped
from stages.training.fit import describe, fit

sys.path.insert(0, str(Path(__file__).parents[1]))
import text_project as project

Taught = tuple[nn.Module, Description]


class Together(Method):
    """A student and its teacher, which both learn from labels; the teacher is kept, and how often each row was seen."""

    stop: int | None = None

    def __init__(self, task: Any, entry: Any, run: Run) -> None:
        super().__init__()
        self.task = task
        self.modules = {"student": task.student, "teacher": task.taught_by()}
        self.streams = task.streams()
        for name, module in self.modules.items():
            task.optimize(self, name, module.parameters())
        self.seen = torch.zeros(90, dtype=torch.int64)

    @property
    def companions(self) -> Mapping[str, Companion]:
        return {"teacher": Companion(self.modules["teacher"])}

    def tables(self) -> Mapping[str, pd.DataFrame]:
        return {"seen": pd.DataFrame({"row": range(90), "times": self.seen.numpy()})}

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]

    def step(self, context: Context) -> Mapping[str, Tensor]:
        if context.step == self.stop:
            raise Stopped(1)
        views = self.task.views(context)
        self.task.held_out(context)
        self.seen[views.rows] += 1
        losses = {}
        for name, module in self.modules.items():
            losses[name] = self.task.objective(module(views.student), views.target)
            context.update(name, {"task": losses[name]})
        return losses


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project.write(tmp_path_factory.mktemp("text"))


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(tmp_path / "project", data, monkeypatch)
    monkeypatch.setenv("DISTILLERY_CHECKPOINT_SECONDS", "0")


def here(folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    monkeypatch.chdir(folder)
    place = paths.prepared("text", "prepared")
    place.parent.mkdir(parents=True)
    place.symlink_to(data)


@pytest.fixture
def run() -> Run:
    return Run(schema.Training.model_validate(project.TRAINING))


def big(data: Path) -> Taught:
    """A teacher as it lies on disk, with sources and a beginning of its own."""
    network, description = project.trained(data, layers=1)
    folder = paths.trained("text", "big")
    folder.mkdir(parents=True, exist_ok=True)
    sources = [{"name": "elsewhere", "licence": "x", "credit": "y", "redistributable": False}]
    start = {"name": "pretrained", "weights_sha256": "1" * 64}
    changes = {"sources": sources, "recipe": {"objective": "task"}, "start": start}
    save_model(folder, network, Description(**{**vars(description), **changes}))
    return load_model(folder)


def together(data: Path, run: Run, stop: int | None = None) -> Together:
    entry = project.student("lgtm")
    teacher = big(data)
    task = for_student(entry, paths.prepared("text", "prepared"), run, teacher)
    learner = Together(task, entry, run)
    learner.stop = stop
    fit("distill", describe("small", entry, task, teacher[1]), task, learner, run, before=teacher[1])
    return learner


def test_a_teacher_that_learnt_is_kept_with_the_recipe_of_its_student(data: Path, run: Run) -> None:
    learner = together(data, run)
    folder = paths.companions("text", "small")
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == [
        "contents.json",
        "seen.csv",
        "teacher",
        "teacher/model.json",
        "teacher/weights.safetensors",
    ]
    network, found = load_model(folder / "teacher")
    for key, value in network.state_dict().items():
        assert torch.equal(value, learner.modules["teacher"].state_dict()[key])
    before, small = read_description(paths.trained("text", "big")), read_description(paths.trained("text", "small"))
    assert (found.name, found.kind, found.task) == ("small.teacher", "companion", "text")
    assert found.start == {"name": "big", "weights_sha256": before.weights_sha256}
    assert found.teacher is None
    assert found.recipe == small.recipe == project.student("lgtm").model_dump(mode="json", by_alias=True)
    assert (found.network, found.interface) == (before.network, before.interface)
    assert found.network != small.network
    assert found.sources == small.sources == [project.PROVENANCE, *before.sources]
    assert found.rows == small.rows == {"train": 50, "held_out": 16}
    assert found.dataset == {"name": "prepared", "digest": sha256(data / "manifest.csv")}
    assert found.weights_sha256 not in (before.weights_sha256, small.weights_sha256)
    assert small.teacher == {"name": "big", "weights_sha256": before.weights_sha256}
    assert small.start is None
    assert paths.models("text", ["big", "small"])["small.teacher"] == folder / "teacher"
    table = pd.read_csv(folder / "seen.csv")
    assert table["times"].tolist() == learner.seen.tolist()
    assert table["times"].sum() == 8 * 2 * (50 // 8)


def test_an_interrupted_training_leaves_the_same_files(
    data: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together(data, run)
    folders = (paths.companions("text", "small"), paths.trained("text", "small"))
    whole = [tree_digest(folder) for folder in folders]
    here(tmp_path / "resumed", data, monkeypatch)
    with pytest.raises(Stopped):
        together(data, run, stop=7)
    assert not paths.companions("text", "small").exists()
    assert not paths.trained("text", "small").exists()
    resumed = together(data, run)
    assert int(resumed.seen.sum()) == 8 * 2 * (50 // 8), "it went on, and what it had seen came back"
    assert whole == [
        tree_digest(folder) for folder in (paths.companions("text", "small"), paths.trained("text", "small"))
    ]
    assert not list(paths.checkpoints("distill", "small").glob("*"))


@pytest.mark.parametrize("method", ["alone", "kd"])
def test_most_methods_train_nothing_beside_the_student(data: Path, run: Run, method: str) -> None:
    """The folder is there all the same, and empty: DVC asks for it. What an older method left is gone."""
    old = paths.companions("text", "small") / "teacher"
    old.mkdir(parents=True)
    entry = project.student(method)
    teacher = big(data) if method == "kd" else None
    task = for_student(entry, paths.prepared("text", "prepared"), run, teacher)
    learner = (kd if method == "kd" else alone).Learner(task, entry, run)
    assert learner.companions == {}
    assert learner.tables() == {}
    before = teacher[1] if teacher else None
    fit("distill", describe("small", entry, task, before), task, learner, run, before=before)
    beside = paths.companions("text", "small")
    assert [path.name for path in beside.iterdir()] == ["contents.json"]
    assert json.loads((beside / "contents.json").read_text()) == {"models": [], "evaluated": [], "tables": []}
    assert list(paths.models("text", ["small"])) == ["small"]
    assert read_description(paths.trained("text", "small")).rows == {"train": 66}


def test_a_teacher_says_what_it_began_with(data: Path, run: Run) -> None:
    first = big(data)
    network = {**project.NETWORK, "layers": 1}
    entry = project.teacher(start="big", network=network)
    task = for_teacher(entry, paths.prepared("text", "prepared"), run, first)
    fit(
        "teach",
        describe("next", entry, task, start=first[1]),
        task,
        alone.Learner(task, entry, run),
        run,
        before=first[1],
    )
    found = read_description(paths.trained("text", "next"))
    assert found.start == {"name": "big", "weights_sha256": first[1].weights_sha256}
    assert (found.teacher, found.kind, found.name) == (None, "teacher", "next")
    assert found.sources == [project.PROVENANCE, *first[1].sources]
    assert found.rows == {"train": 66}
    assert [path.name for path in paths.companions("text", "next").iterdir()] == ["contents.json"], "a teacher has none"
