"""Generalized zero-shot recognition as a training task: samples of seen classes, attributes of all, Adam."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from data import zero_shot as data
from data.errors import UserError
from data.files import sha256
from models import zero_shot as models
from models.artifacts import Description, load_model
from stages import paths
from stages.parameters.zero_shot import D3GZSL, MLP, AnyStudent, Extended, Teacher, Training
from stages.training import Context, Run, Stream, Task, Views, derive_seed

Taught = tuple[nn.Module, Description]
SEEN = "seen"


class Split(NamedTuple):
    """Samples of one split.

    Attributes:
        inputs: (N, D) features as they were prepared, or (N, C, s, s) uint8 images.
        labels: (N,) int64, among all classes of the data set.
    """

    inputs: Tensor
    labels: Tensor


class ZeroShot(Task):
    """Samples of some classes, and attributes of these and others. Labels are those of the data set throughout.

    Args:
        prepared: the prepared data set. network: of the student, as its description has it. classes: what it answers
            with; the seen ones for a teacher. factor: of the objective.

    Attributes:
        attributes: (n, A) float32, a row per class. seen, others: (n_s,) and (n - n_s,) int64: the classes that are
            trained on, and those of which no sample is ever used.
        train: the training split on the run's device, in the data set's order; features are scaled.
        noticed: what is measured on the validation split, and whether unseen classes are part of it.

    Raises:
        UserError: there are too few samples for a batch.
    """

    def __init__(
        self,
        prepared: Path,
        network: dict[str, Any],
        classes: list[str],
        training: Training,
        run: Run,
        teacher: Taught | None = None,
        factor: float = 1.0,
        trains: bool = True,
    ) -> None:
        description = data.describe(prepared)
        roles = description["roles"]
        self.network = network
        self.interface = {
            "classes": classes,
            "seen": [name for name, role in zip(description["classes"], roles, strict=True) if role == SEEN],
            "features": description["features"] or network["widths"][-1],
            "images": description["images"],
        }
        self.source = description["source"]
        self.seed, self.clip = training.seed, training.clip
        self.prepared = prepared
        self.training = training
        self.run = run
        self._factor = factor
        self.attributes = data.attributes(prepared).to(run.device, run.dtype)
        is_seen = torch.tensor([role == SEEN for role in roles], device=run.device)
        self.seen, self.others = is_seen.nonzero().flatten(), (~is_seen).nonzero().flatten()
        torch.manual_seed(derive_seed(training.seed, "weights"))
        self.student = models.build({"network": network, "interface": self.interface}).to(run.device, run.dtype)
        self._images = isinstance(self.student, models.Encoder)
        train, validation = (self._load(name) for name in ("train", "validation"))
        # What a network is shown: it scales by itself.
        self._inputs = train.inputs
        if isinstance(self.student, models.MLP):
            self.student.scale.fit(train.inputs)
            train = train._replace(inputs=self.student.scale(train.inputs))
            models.initialise(self.student.embedding)
        self.train, self._validation = train, validation
        self.teacher = None if teacher is None else teacher[0].to(run.device, run.dtype)
        self.steps = self.steps_per_epoch = 0
        if trains:
            try:
                self.steps_per_epoch = self._stream().batches(run.world)
            except ValueError as error:
                raise UserError(f"{error} ({prepared}, training split) · lower training.batch") from None
            self.steps = training.epochs * self.steps_per_epoch

    def _load(self, split: str) -> Split:
        _, inputs, labels = data.load(self.prepared, split, "images" if self._images else "features")
        inputs = inputs.to(self.run.device)
        return Split(inputs if self._images else inputs.to(self.run.dtype), labels.to(self.run.device))

    def _stream(self) -> Stream:
        rows = torch.arange(len(self.train.labels), device=self.run.device)
        return Stream([self.train.inputs, self.train.labels, rows], self.training.batch)

    def streams(self) -> dict[str, Stream]:
        return {"train": self._stream()}

    def views(self, context: Context) -> Views:
        _, labels, rows = context.draw("train")
        inputs = self._unit(self._inputs[rows])
        return Views(inputs, inputs, labels, rows)

    def objective(self, output: models.Output, target: Tensor) -> Tensor:
        """`factor` times the cross-entropy over the classes that the network answers with (card 3.5)."""
        logits = output.logits
        if logits.shape[1] == len(self.seen) < len(self.attributes):
            target = torch.searchsorted(self.seen, target)
        return self._factor * F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, target)

    def logits(self, output: models.Output) -> Tensor:
        return output.logits

    def features(self, network: nn.Module) -> Mapping[str, int]:
        return {"embedding": cast(nn.Linear, network.classifier).in_features}

    def optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        # An encoder inside a student stays as it is.
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        return Adam(parameters, lr=self.training.learning_rate, betas=self.training.betas, fused=True)

    def schedule(self, steps: int, learning_rate: float | None = None) -> Callable[[int], float]:
        rate = learning_rate or self.training.learning_rate
        return lambda count: rate

    def monitor(self, network: nn.Module) -> Mapping[str, float]:
        """Class-averaged accuracies over all classes that the network answers with; of a teacher, that of seen ones."""
        with torch.inference_mode():
            parts = self._validation.inputs.split(500)
            found = torch.cat([network(self._unit(part)).logits.argmax(1) for part in parts])
        labels = self._validation.labels
        every = len(self.interface["classes"]) >= len(self.attributes)
        prediction = found if every else self.seen[found]
        hits, counts = (
            torch.zeros(len(self.attributes), dtype=torch.float64, device=labels.device).index_add_(0, labels, values)
            for values in ((prediction == labels).double(), torch.ones_like(labels, dtype=torch.float64))
        )
        figures = {}
        for name, classes in (("seen", self.seen), ("unseen", self.others)):
            there = classes[counts[classes] > 0]
            if len(there) and (every or name == "seen"):
                figures[name] = (hits[there] / counts[there]).mean().item()
        if len(figures) == 2:
            total = sum(figures.values())
            harmonic = 2 * figures["seen"] * figures["unseen"] / total if total else 0.0
            figures = {"harmonic_mean": harmonic, **figures}
        return figures

    def _unit(self, inputs: Tensor) -> Tensor:
        return data.to_unit(inputs).to(self.run.dtype) if self._images else inputs


def for_teacher(entry: Teacher, prepared: Path, run: Run, start: Taught | None = None) -> ZeroShot:
    """The task as a teacher meets it: it learns the seen classes only."""
    description = data.describe(prepared)
    pairs = zip(description["classes"], description["roles"], strict=True)
    seen = [name for name, role in pairs if role == SEEN]
    network = entry.network.model_dump(mode="json")
    if isinstance(entry.network, MLP):
        network["encoder"] = None
    task = ZeroShot(prepared, network, seen, entry.training, run, factor=entry.factor)
    if isinstance(task.student, models.MLP):
        models.initialise(task.student.classifier)
    return task


def for_student(entry: AnyStudent, prepared: Path, run: Run, teacher: Taught | None) -> ZeroShot:
    """The task as a student meets it: it answers with every class, and has the encoder of its data set inside."""
    description = data.describe(prepared)
    if isinstance(entry, Extended):
        return _extended(entry, prepared, description, run, cast(Taught, teacher))
    if teacher is not None:
        require_same_features(teacher[1], description, prepared)
    inside = load_model(prepared / "encoder") if description["images"] else None
    network = {
        "name": "mlp",
        "hidden": entry.network.hidden,
        "encoder": inside and {name: inside[1].network[name] for name in ("widths", "blocks")},
    }
    trains = entry.method != "eszsl"
    task = ZeroShot(prepared, network, description["classes"], entry.training, run, teacher, trains=trains)
    if inside:
        give_encoder(task.student, inside[0].state_dict())
    if isinstance(entry, D3GZSL):
        # The official code counts an epoch as so many draws of a batch, the last one included that is not full.
        task.steps_per_epoch = -(-len(task.train.labels) // (entry.training.batch * run.world))
        task.steps = entry.training.epochs * task.steps_per_epoch
        if entry.select_every and "validation" not in description["roles"]:
            raise UserError(
                f"students.*.select_every = {entry.select_every} needs classes to select with, and {prepared.name!r} "
                "has none · set it to 0, or name some as validation_classes of the data set's split"
            )
    elif not trains:
        task.steps = task.steps_per_epoch = 1
    return task


def give_encoder(student: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put the weights of an encoder into a student that has one inside; its classifier is left behind."""
    encoder = cast(models.Encoder, cast(models.MLP, student).encoder)
    encoder.load_state_dict({key: value for key, value in state.items() if not key.startswith("classifier.")})
    encoder.requires_grad_(False)


def require_same_features(teacher: Description, dataset: Mapping[str, Any], prepared: Path) -> None:
    """A teacher has to know the features and the seen classes of a data set.

    Raises:
        UserError: it does not.
    """
    pairs = zip(dataset["classes"], dataset["roles"], strict=True)
    seen = [name for name, role in pairs if role == SEEN]
    for what, theirs, ours in (
        ("features", teacher.interface["features"], dataset["features"]),
        ("seen classes", teacher.interface["seen"], seen),
    ):
        if theirs != ours:
            raise UserError(
                f"teacher {teacher.name!r} and the data set {prepared.name!r} differ in {what}: {theirs} and {ours} · "
                "choose one that was made for this data set"
            )


def _extended(entry: Extended, prepared: Path, description: Mapping[str, Any], run: Run, before: Taught) -> ZeroShot:
    """The task with more classes than the data set has: attributes and network of the student before, and new rows.

    Raises:
        UserError: the student was made from other data, has no generator, or a new class does not fit.
    """
    student, told = before
    path = "students.*.added"
    if told.dataset["digest"] != sha256(prepared / "manifest.csv"):
        raise UserError(
            f"{told.name} was made from {told.dataset['name']!r} as it was before (digest {told.dataset['digest']}), "
            "and the real samples of its seen classes are needed again · run `dvc repro` for it"
        )
    generator, _ = load_model(paths.companions(told.task, told.name) / "generator")
    known = cast(models.Generator, generator).attributes
    for name, numbers in entry.added.items():
        if name in told.interface["classes"]:
            raise UserError(f"{path}: {told.name} knows the class {name!r} already · give the new one another name")
        if len(numbers) != known.shape[1]:
            raise UserError(
                f"{path}: class {name!r} has {len(numbers)} attributes, those of {prepared.name!r} have "
                f"{known.shape[1]} · they are {', '.join(description['attributes'])}"
            )
    classes = [*told.interface["classes"], *entry.added]
    task = ZeroShot(prepared, told.network, classes, entry.training, run, trains=False)
    task.attributes = torch.cat([known, torch.tensor(list(entry.added.values()))]).to(run.device, run.dtype)
    new = torch.arange(len(known), len(classes), device=run.device)
    older = torch.arange(len(description["classes"]), len(known), device=run.device)
    task.others = torch.cat([task.others, older, new])
    kept = {key: value for key, value in student.state_dict().items() if not key.startswith("classifier.")}
    task.student.load_state_dict({**task.student.state_dict(), **kept})
    task.train = task.train._replace(inputs=cast(models.MLP, task.student).scale(task._load("train").inputs))
    task.teacher = generator.to(run.device, run.dtype)
    task.steps = task.steps_per_epoch = 1
    return task
