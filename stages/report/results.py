"""What the pipeline left in reports/ and models/, per task and data set, and the errors of its figures."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from data.errors import UserError
from models.artifacts import WEIGHTS, Description, read_description
from stages import paths
from stages.export.onnx_graph import FILE as ONNX
from stages.parameters import Parameters
from stages.parameters.shared import Dataset, Source, Student, Task, Teacher
from stages.scores import Scores, comparable, influence, scores, standard_error

# Roles of teachers; a companion of that name is a teacher too, which learnt with its student.
TEACHER, PRETRAINED, CO_TRAINED = "teacher", "pretrained", "co-trained teacher"
ENCODER, LAST_EPOCH = "encoder", "last epoch"
# Of what was trained beside a student and is evaluated, by name.
COMPANIONS = {TEACHER: CO_TRAINED, "last": LAST_EPOCH}
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Metric:
    """One figure of a model.

    Attributes:
        label: its heading. percent: it is a share, and is shown in per cent.
        meaning: what stands under the table; nothing where another metric says it.
        digits: after the point, of what is no share.
    """

    label: str
    percent: bool
    meaning: str = ""
    digits: int = 4

    def show(self, value: float) -> str:
        """The value as text, without a sign for per cent."""
        return f"{100 * value:.2f}" if self.percent else f"{value:.{self.digits}f}"

    def show_difference(self, value: float) -> str:
        """A difference as text, with its sign."""
        return f"{100 * value:+.2f}" if self.percent else f"{value:+.{self.digits}f}"


@dataclass(frozen=True)
class Difference:
    """Of two models' figures on the same samples: its value, its standard error, and the number of samples."""

    value: float
    error: float
    samples: int

    def beyond(self, errors: float) -> bool:
        """Whether the difference is more than that many standard errors, in either direction."""
        return abs(self.value) > errors * self.error


@dataclass(frozen=True)
class Model:
    """An evaluated model and all that is known of it; None where a file is absent.

    Attributes:
        folder: of its weights.
        role: teacher, assistant, baseline or student; pretrained is a teacher that has not learnt the task, encoder one
            that makes the features of another data set. Co-trained teacher is one that learnt with its student, last
            epoch that student at the end of a training of which another epoch was kept: both are named after the
            student, and follow it.
        method: what the student's is known as, or that of the student a model was trained beside.
        deployed: it has an entry among the exports.
        learnt_from: the model it learnt from, for a co-trained teacher the one it began as; None where that were
            labels alone.
        seeds: models of the same data set that differ in nothing but their seed, this one included.
        metrics: figures by split, from reports/metrics.
        samples, classes: rows by split, from reports/evaluation.
        curve: a row per recorded step of its training.
        exported: model.json of its export. latency: its entry in reports/latency.
    """

    name: str
    task: str
    folder: Path
    role: str
    method: str | None
    learnt_from: str | None
    deployed: bool
    seeds: int
    metrics: dict[str, dict[str, float]]
    description: Description | None
    samples: pd.DataFrame | None
    classes: pd.DataFrame | None
    curve: pd.DataFrame | None
    exported: dict[str, Any] | None
    latency: dict[str, Any] | None
    weights_bytes: int | None
    onnx_bytes: int | None


@dataclass(frozen=True)
class Group:
    """The models of a task on one data set.

    Attributes:
        settings: of the task, from `tasks` in params.yaml.
        sources: licence and credit of the data and of whatever else the models were made from, by name.
        models: those that were evaluated, in the order of params.yaml.
        latency: reports/latency/<task>.json, without regard to the data set.
        findings: findings.json of the validation.
        notes: what is missing or out of date, a sentence each.
    """

    task: str
    dataset: str
    entry: Dataset
    settings: Task
    sources: dict[str, dict[str, Any]]
    models: list[Model]
    latency: dict[str, Any] | None
    findings: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)

    def short(self, name: str) -> str:
        """The name of a model without the name of the task, where all have it."""
        prefix = f"{self.task}-"
        return name.removeprefix(prefix) if all(model.name.startswith(prefix) for model in self.models) else name

    def reference(self, model: Model, method: str) -> Model | None:
        """The model of this data set, trained by `method`, to compare with: of the same network and input if any is."""
        others = [other for other in self.models if other.method == method and other is not model]
        alike = [other for other in others if _shape(other) == _shape(model)]
        return next(iter(alike or others), None)

    def fine_tuned(self, model: Model) -> Model | None:
        """The teacher that learnt the task by itself and has the same network and input as this model."""
        teachers = [other for other in self.models if other.role == TEACHER]
        return next((other for other in teachers if _shape(other) == _shape(model) is not None), None)

    @property
    def encodes(self) -> bool:
        """Whether nothing is to be answered here: another data set is made of this one."""
        return bool(self.models) and all(model.role == ENCODER for model in self.models)

    def test_samples(self) -> int:
        """Samples of the test split; 0 where no file tells."""
        tables = [model.samples for model in self.models if model.samples is not None]
        return int((tables[0]["split"] == "test").sum()) if tables else 0


def scores_of(model: Model, metric: str, split: str) -> Scores | None:
    """What a model did on every sample of a split; None where no file tells."""
    if model.samples is None:
        return None
    return scores(model.task, model.samples[model.samples["split"] == split], metric)


def error_of(model: Model, metric: str, split: str) -> float | None:
    """Standard error of a metric over the choice of samples; None where that is not known."""
    found = scores_of(model, metric, split)
    return None if found is None else found.error


def difference(model: Model, other: Model, metric: str, split: str) -> Difference | None:
    """How much `model` is above `other` on the same samples; None where there are no samples to compare.

    Pairing takes out what makes a sample hard for both, so that the error is smaller than that of two figures.

    Raises:
        UserError: the two were evaluated on different samples.
    """
    ours, theirs = (scores_of(one, metric, split) for one in (model, other))
    if ours is None or theirs is None:
        return None
    if not comparable(ours, theirs):
        raise UserError(
            f"{model.name} ({len(ours.statistics)} samples) and {other.name} ({len(theirs.statistics)} samples) were "
            f"evaluated on different {split} samples · run `dvc repro` so that both are evaluated on the same data"
        )
    theirs = theirs.in_order_of(ours)
    gap = influence(ours.rows, ours.figure) - influence(theirs.rows, theirs.figure)
    return Difference(ours.value - theirs.value, standard_error(gap), len(gap))


def agreement(model: Model, other: Model, answer: str, split: str) -> float | None:
    """Share of samples to which both give the same answer; None where there are none to compare.

    Args:
        answer: column of their samples.
    """
    if model.samples is None or other.samples is None:
        return None
    ours, theirs = (one[one["split"] == split].set_index("id")[answer] for one in (model.samples, other.samples))
    if not len(ours) or set(ours.index) != set(theirs.index):
        return None
    return float((ours == theirs.reindex(ours.index)).mean())


def further(model: Model, kind: str) -> pd.DataFrame | None:
    """A table that only some tasks have, reports/evaluation/<task>/<model>.<kind>.csv; None where it is absent.

    Raises:
        UserError: it is damaged.
    """
    return _table(paths.evaluation(model.task) / f"{model.name}.{kind}.csv")


def read_task(task: str, parameters: Parameters) -> list[Group]:
    """Everything about a task, a group per data set.

    Raises:
        UserError: no model of the task was evaluated, or a file is damaged.
    """
    entries = parameters.models(task)
    if not any((paths.metrics(task) / f"{name}.json").is_file() for name in entries):
        raise UserError(
            f"there are no figures for task {task!r}: {paths.metrics(task)} holds no file of its models · "
            "run `dvc repro` first"
        )
    latency = _json(paths.latency(task))
    stale = _stale(task)
    groups = []
    for dataset in dict.fromkeys(entry.dataset for entry in entries.values()):
        members = {name: entry for name, entry in entries.items() if entry.dataset == dataset}
        folders = paths.models(task, members)
        models = [
            model
            for name, folder in folders.items()
            if (model := _model(name, folder, members, parameters, latency)) is not None
        ]
        entry = parameters.datasets[dataset]
        group = Group(
            task=task,
            dataset=dataset,
            entry=entry,
            settings=parameters.tasks[task],
            sources=_sources(entry.source, parameters.sources[entry.source], models),
            models=models,
            latency=latency,
            findings=_json(paths.validation_report(task, dataset) / "findings.json"),
        )
        if missing := [name for name in folders if name not in {model.name for model in models}]:
            group.notes.append(f"Not evaluated yet: {', '.join(missing)} · run `dvc repro evaluate@{task}`")
        group.notes.extend(stale)
        group.notes.extend(note for model in models for note in _doubts(model, task))
        groups.append(group)
    return groups


def _model(
    name: str,
    folder: Path,
    members: dict[str, Teacher | Student],
    parameters: Parameters,
    latency: dict[str, Any] | None,
) -> Model | None:
    """A model of params.yaml, or the companion of one (STUDENT.COMPANION), if it was evaluated."""
    student, _, companion = name.partition(".")
    entry = members[student]
    task = entry.task
    metrics = _json(paths.metrics(task) / f"{name}.json")
    if metrics is None:
        return None
    if missing := [split for split in SPLITS if split not in metrics]:
        raise UserError(f"the figures of {name} hold no {missing[0]} split · run `dvc repro evaluate@{task}` again")
    exported = paths.exported(task, name)
    return Model(
        name=name,
        task=task,
        folder=folder,
        role=COMPANIONS.get(companion, companion) if companion else _role(name, entry, parameters),
        method=entry.known_as if isinstance(entry, Student) else None,
        learnt_from=_learnt_from(name, entry),
        deployed=name in parameters.exports,
        seeds=sum(_but_seed(other) == _but_seed(entry) for other in members.values()),
        metrics=metrics,
        description=_description(folder),
        samples=_table(paths.evaluation(task) / f"{name}.samples.csv"),
        classes=_table(paths.evaluation(task) / f"{name}.classes.csv"),
        curve=_table(paths.curves(task, name)),
        exported=_json(exported / "model.json"),
        latency=((latency or {}).get("models") or {}).get(name),
        weights_bytes=_size(folder / WEIGHTS),
        onnx_bytes=_size(exported / ONNX),
    )


def _role(name: str, entry: Teacher | Student, parameters: Parameters) -> str:
    if not isinstance(entry, Student):
        if any(dataset.encoder == name for dataset in parameters.datasets.values()):
            return ENCODER
        return PRETRAINED if entry.pretrained else TEACHER
    teaches = any(student.teacher == name for student in parameters.students.values())
    if teaches and name not in parameters.exports:
        return "assistant"
    return "baseline" if entry.teacher == "none" or entry.method == "kd" else "student"


def _learnt_from(name: str, entry: Teacher | Student) -> str | None:
    """A student learnt from the teacher that learnt with it, if there is one; that began as the one of params.yaml."""
    if not isinstance(entry, Student) or entry.teacher == "none":
        return None
    beside = f"{name}.{TEACHER}"
    return beside if beside in paths.models(entry.task, [name]) else entry.teacher


def _but_seed(entry: Teacher | Student) -> dict[str, Any]:
    """An entry of params.yaml without its seed."""
    plain = entry.model_dump()
    plain["training"].pop("seed")
    return plain


def _shape(model: Model) -> tuple[Any, Any] | None:
    return (model.description.network, model.description.interface) if model.description else None


def _sources(name: str, source: Source, models: list[Model]) -> dict[str, dict[str, Any]]:
    """Licence and credit by name: the data set's source first, then what the models name beside it."""
    plain = {"licence": source.licence, "credit": source.credit, "redistributable": source.redistributable}
    found: dict[str, dict[str, Any]] = {name: plain}
    for model in models:
        for other in model.description.sources if model.description else []:
            found.setdefault(other["name"], other)
    return found


def _stale(task: str) -> list[str]:
    """A sentence if the models are no longer those that were evaluated. Of one that is missing, another tells."""
    names = [path.stem for path in sorted(paths.metrics(task).glob("*.json"))]
    evaluated = _json(paths.evaluation(task) / "models.json")
    if evaluated is None:
        return []
    folders = paths.models(task, dict.fromkeys(name.partition(".")[0] for name in names))
    found = {name: _description(folders[name]) for name in names if name in folders}
    if all(evaluated.get(name) == model.weights_sha256 for name, model in found.items() if model):
        return []
    return [f"Models changed since they were evaluated · run `dvc repro evaluate@{task}`"]


def _doubts(model: Model, task: str) -> list[str]:
    """What is missing of one model, or no longer belongs to it."""
    notes = []
    if model.description is None:
        notes.append(f"{model.folder} is missing · run `dvc checkout` or `dvc repro`")
    if model.samples is None:
        notes.append(f"Results per sample of {model.name} are missing: no standard errors · run `dvc checkout`")
    if model.exported is None:
        if model.deployed:
            notes.append(f"{model.name} is not exported yet · run `dvc repro export@{model.name}`")
        return notes
    if model.description and model.exported["weights_sha256"] != model.description.weights_sha256:
        notes.append(f"{model.name} changed since it was exported · run `dvc repro export@{model.name}`")
    if model.latency and model.latency["onnx_sha256"] != model.exported["onnx_sha256"]:
        notes.append(f"{model.name} changed since its latency was measured · run `python -m stages.latency {task}`")
    return notes


def _description(folder: Path) -> Description | None:
    try:
        return read_description(folder)
    except UserError:
        return None


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _json(path: Path) -> dict[str, Any] | None:
    """A file of plain data; None where there is none.

    Raises:
        UserError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}) · remove it and run `dvc repro` again") from None
    return value


def _table(path: Path) -> pd.DataFrame | None:
    """A table; None where there is none. Only an empty field is missing: "nan" and "null" are names like any other.

    Raises:
        UserError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        return pd.read_csv(path, dtype={"id": str, "class": str}, keep_default_na=False, na_values=[""])
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}) · remove it and run `dvc repro` again") from None
