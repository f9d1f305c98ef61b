"""Recognition as a training task: images at two resolutions; cross-entropy of classes, or triplets of embeddings."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from data import recognition as data
from data.errors import UserError
from data.files import expand_path
from models import recognition as models
from models.artifacts import Description, read_outside_state
from models.layers import unit
from stages.neighbours import recall, same_class_rank
from stages.parameters.recognition import AnyStudent, Initial, Learning, Network, Outside, Teacher
from stages.training import ClassStream, Context, Run, Stream, Task, Views, derive_seed
from stages.training.existing import begin_with, load_weights, normalisation, require_same_question

HEAD = ("classifier.",)  # what depends on the classes
LAST = ("embedding.", *HEAD)  # what follows the pooled features
NEAREST, FURTHEST = 0.5, 1.4  # distances between which negatives are weighed; there are none beyond
RESIZE = "bicubic with antialiasing, clamped to [0, 1]"
Taught = tuple[nn.Module, Description]


class Recognition(Task):
    """Images with one label each. Teacher and student see the same shifted and mirrored image, each in its size.

    Args:
        prepared: the prepared data set. network: of the student. resolution: side of its images, in pixels.
        learning: objective and training. A network that learns no classes has none in its interface.
        teacher: a trained network and its description, or None.
        normalise: mean and std per channel, if not the data set's own. trains: whether batches will be drawn.

    Raises:
        UserError: teacher and data set differ in classes or channels, or there are too few samples or classes for a
            batch.
    """

    def __init__(
        self,
        prepared: Path,
        network: Network,
        resolution: int,
        learning: Learning,
        run: Run,
        teacher: Taught | None = None,
        normalise: tuple[list[float], list[float]] | None = None,
        trains: bool = True,
    ) -> None:
        description = data.describe(prepared)
        training = learning.training
        mean, std = normalise or (description["mean"], description["std"])
        self.network = network.model_dump(mode="json")
        self.interface = {
            "classes": description["classes"] if learning.learns == "classes" else [],
            "channels": description["channels"],
            "resolution": resolution,
            "mean": mean,
            "std": std,
            "resize": RESIZE,
        }
        self.source = description["source"]
        self.seed, self.clip = training.seed, training.clip
        self.resolution = resolution
        self._learning, self._training = learning, training
        self._run = run
        self._train = data.load(prepared, "train")[1:]
        self._validation = data.load(prepared, "validation")[1:]
        # Of classes that are held out nobody can be right about one.
        self._asks_classes = bool(self.interface["classes"]) and not description["held_out"]
        torch.manual_seed(derive_seed(training.seed, "weights"))
        self.student = self._place(models.build({"network": self.network, "interface": self.interface}))
        self.teacher, self.teacher_resolution = None, resolution
        if teacher is not None:
            self.teacher = self._place(teacher[0])
            self.teacher_resolution = _compatible(teacher[1], self.interface["classes"], description, prepared)
        self.steps = self.steps_per_epoch = 0
        if trains:
            try:
                self.steps_per_epoch = self._stream().batches(run.world)
            except ValueError as error:
                raise UserError(f"{error} ({prepared}, training split) · lower training.batch") from None
            self.steps = training.epochs * self.steps_per_epoch

    def _place(self, network: nn.Module) -> nn.Module:
        return network.to(self._run.device, self._run.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _stream(self) -> Stream:
        settings = self._training
        if settings.per_class is None:
            return Stream(self._train, settings.batch)
        return ClassStream(self._train, settings.batch, self._train[1], settings.per_class)

    def streams(self) -> dict[str, Stream]:
        return {"train": self._stream()}

    def views(self, context: Context) -> Views:
        images, labels = context.draw("train")
        augment = self._training.augment
        full = data.augment(data.to_unit(images), augment.shift, augment.flip, context.generator("augment"))
        theirs = None if self.teacher is None else self._resize(full, self.teacher_resolution)
        return Views(self._resize(full, self.resolution), theirs, labels)

    def _resize(self, images: Tensor, resolution: int) -> Tensor:
        resized = data.downsample(images, resolution).to(self._run.dtype)
        return resized.contiguous(memory_format=torch.channels_last)

    def objective(self, output: models.Output, target: Tensor) -> Tensor:
        if self._learning.learns == "triplets":
            gather = self._run.gather
            # All processes mine the same triplets of the global batch.
            seed = gather(torch.randint(2**31, (1,)).to(target.device))[0].item()
            return triplet_objective(gather(output.embedding), gather(target), self._learning.margin, int(seed))
        logits = output.logits
        return F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, target)

    def logits(self, output: models.Output) -> Tensor:
        return output.logits

    def features(self, network: nn.Module) -> Mapping[str, int]:
        return cast(models.Network, network).features

    def optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        settings = self._training
        if settings.optimizer == "adam":
            return Adam(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        return SGD(
            parameters,
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.momentum > 0,
        )

    def schedule(self, steps: int, learning_rate: float | None = None) -> Callable[[int], float]:
        peak, rise = learning_rate or self._training.learning_rate, max(1, round(self._training.warmup * steps))

        def rate(count: int) -> float:
            if count < rise:
                return peak * (count + 1) / rise
            return peak * 0.5 * (1 + math.cos(math.pi * (count - rise) / max(1, steps - rise)))

        return rate

    def monitor(self, network: nn.Module) -> Mapping[str, float]:
        images, labels = self._validation
        right, embeddings = 0, []
        with torch.inference_mode():
            for part, truth in zip(images.split(500), labels.split(500), strict=True):
                output = network(self._resize(data.to_unit(part.to(self._run.device)), self.resolution))
                if self._asks_classes:
                    right += int((output.logits.argmax(1).cpu() == truth).sum())
                else:
                    embeddings.append(output.embedding)
            if self._asks_classes:
                return {"top_1": right / len(labels)}
            ranks = same_class_rank(torch.cat(embeddings), labels.to(self._run.device))
            return {"recall_at_1": recall(ranks) or 0.0}


def triplet_objective(embeddings: Tensor, labels: Tensor, margin: float, seed: int) -> Tensor:
    """Mean of max(d(a, p) - d(a, n) + margin, 0) over mined triplets of an anchor a, an image p of its class and one n
    of another; d is the Euclidean distance of embeddings scaled to length 1. A scalar in float32 or wider.

    Source: Wu et al. 2017, "Sampling matters in deep embedding learning", section 4: a negative is drawn with the
    inverse density of its distance, between the cut-offs 0.5 and 1.4, which are RKD's (HORKD card 3.5). An anchor whose
    negatives are all further than 1.4, where the loss is 0, makes no triplet; without any the loss is 0, attached to
    the graph.

    Args:
        embeddings: (B, D). labels: (B,) int64. seed: of what is drawn.
    """
    from pytorch_metric_learning.utils.loss_and_miner_utils import get_random_triplet_indices

    points = unit(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)))
    if not points.isfinite().all():
        return points.sum()  # nothing can be drawn, and the loop says which term it was
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed accelerators, too. Drawing is for a processor: a loop over classes.
        torch.default_generator.manual_seed(seed)
        weights = negative_weights(points.detach().cpu(), labels.cpu())
        found = get_random_triplet_indices(labels.cpu(), weights=weights)
    anchor, positive, negative = (rows.to(points.device) for rows in found)
    if not len(anchor):
        return points.sum() * 0
    return F.triplet_margin_loss(points[anchor], points[positive], points[negative], margin=margin)


def negative_weights(points: Tensor, labels: Tensor) -> Tensor:
    """(B, B): how likely, in row a, each image is drawn as the negative of anchor a. A row sums to 1, or to 0 where no
    image of another class is nearer than 1.4.

    The inverse of q(d) ~ d^(D - 2) (1 - d^2 / 4)^((D - 3) / 2), how often points on the unit sphere are d apart; nearer
    ones than 0.5 count as 0.5 apart. In logarithms, row by row: with a thousand dimensions weights of one batch range
    over more than floats do.

    Args:
        points: (B, D) of length 1. labels: (B,).

    Source: Wu et al. 2017, section 4.
    """
    width, distance = points.shape[1], torch.cdist(points.double(), points.double())
    counted = distance.clamp_min(NEAREST)
    log = (2 - width) * counted.log() - (width - 3) / 2 * torch.log1p(-counted.square() / 4)
    left_out = (labels[:, None] == labels) | (distance >= FURTHEST)
    return log.masked_fill(left_out, -math.inf).softmax(1).nan_to_num(0)


def _compatible(teacher: Description, classes: list[str], dataset: dict[str, Any], prepared: Path) -> int:
    """The resolution that a teacher wants, once it is clear that it answers the same question.

    Args:
        classes: of the student. Where either knows none, embeddings are all that the two have in common.
    """
    interface = teacher.interface
    both = bool(classes and interface["classes"])
    require_same_question(teacher, dataset, prepared, ("classes", "channels") if both else ("channels",))
    _refuse_knowledge(teacher, dataset, prepared)
    if interface["resolution"] > dataset["size"]:
        raise UserError(
            f"teacher {teacher.name!r} wants images of {interface['resolution']} pixels, those of {prepared.name!r} "
            f"have {dataset['size']}"
        )
    resolution: int = interface["resolution"]
    return resolution


def _refuse_knowledge(model: Description, dataset: dict[str, Any], prepared: Path) -> None:
    """What has learnt the classes that a data set holds out would tell of them."""
    if known := sorted(set(model.interface["classes"]) & set(dataset["held_out"])):
        more = f" and {len(known) - 3} more" if len(known) > 3 else ""
        raise UserError(
            f"{model.name!r} has learnt classes that the data set {prepared.name!r} holds out: {', '.join(known[:3])}"
            f"{more} · choose a model that was trained without them"
        )


def adopt(task: Recognition, outside: Outside) -> None:
    """Give the task's network the weights of an existing model.

    Raises:
        UserError: no such file, another sha256, or weights that do not fit the network (both shapes are named).
    """
    state = _own_names(task, read_outside_state(expand_path(outside.file, "from.file"), outside.sha256))
    what = (
        f"{outside.file} does not fit the network {outside.network.model_dump()} with "
        f"{len(task.interface['classes'])} classes"
    )
    load_weights(task.student, state, what)


def begin(task: Recognition, initial: Initial) -> None:
    """Give the task's network existing weights, all but those of embedding and classifier.

    Raises:
        UserError: no such file, another sha256, or weights that do not fit the network (both shapes are named).
    """
    state = _own_names(task, read_outside_state(expand_path(initial.file, "initial.file"), initial.sha256))
    fresh = {key: value for key, value in task.student.state_dict().items() if key.startswith(LAST)}
    given = {key: value for key, value in state.items() if not key.startswith(LAST)}
    load_weights(task.student, fresh | given, f"{initial.file} does not fit the network {task.network}")


def _own_names(task: Recognition, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Existing weights by the names that the task's network has for them."""
    if isinstance(task.student, models.EfficientNetLite | models.TorchvisionNetwork):
        return {task.student.own_key(key): value for key, value in state.items()}
    return state


def for_teacher(entry: Teacher, prepared: Path, run: Run, start: Taught | None = None) -> Recognition:
    """The task as a teacher meets it: full resolution, and the weights of another or existing model if one is named."""
    description = data.describe(prepared)
    size, outside = description["size"], entry.outside
    if outside is not None:
        normalise = normalisation(outside, description, prepared)
        task = Recognition(prepared, outside.network, size, entry, run, normalise=normalise, trains=False)
        adopt(task, outside)
        return task
    task = _beginning(entry, prepared, cast(Network, entry.network), size, run)
    if start is not None:
        _refuse_knowledge(start[1], description, prepared)
        begin_with(task.student, start, task.interface["classes"], HEAD)
    return task


def for_student(entry: AnyStudent, prepared: Path, run: Run, teacher: Taught | None) -> Recognition:
    """The task as a student meets it, with the teacher it names and the weights it begins with."""
    return _beginning(entry, prepared, entry.network, entry.resolution, run, teacher)


def _beginning(
    entry: Learning, prepared: Path, network: Network, resolution: int, run: Run, teacher: Taught | None = None
) -> Recognition:
    """A task whose network begins with the weights that `initial` names, or with random ones."""
    initial = entry.initial
    normalise = normalisation(initial, data.describe(prepared), prepared, "initial") if initial else None
    task = Recognition(prepared, network, resolution, entry, run, teacher, normalise)
    if initial is not None:
        begin(task, initial)
    return task
