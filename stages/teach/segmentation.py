"""Segmentation as a training task: images with a class per pixel, cross-entropy, SGD with polynomial decay."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from data import segmentation as data
from data.errors import UserError
from data.files import expand_path
from models import segmentation as models
from models.artifacts import Description, read_outside_state
from stages.parameters.segmentation import AnyStudent, Network, Outside, ResNet, Teacher, Training
from stages.training import Context, Run, Stream, Task, Views, derive_seed
from stages.training.existing import begin_with, load_weights, normalisation, require_same_question

Taught = tuple[nn.Module, Description]

# Mean and spread per channel that torchvision's weights were trained behind (its documentation of every ResNet).
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
RESIZE = "bilinear with antialiasing"
# What depends on the classes.
HEAD = ("head.", "auxiliary.")
# While a model is watched, this many pixels go through it at once.
PIXELS = 2**18


class Segmentation(Task):
    """Images with a class per pixel. Teacher and student see the same augmented images.

    Args:
        prepared: the prepared data set. network: of the student.
        teacher: a trained network and its description, or None.
        normalise: mean and std per channel, if not the data set's own. trains: whether batches will be drawn.

    Raises:
        UserError: teacher and data set differ in classes or channels, there are too few samples for a batch, a crop is
            larger than the images, or the encoder's weights do not fit.
    """

    def __init__(
        self,
        prepared: Path,
        network: Network,
        training: Training,
        run: Run,
        teacher: Taught | None = None,
        normalise: tuple[list[float], list[float]] | None = None,
        trains: bool = True,
    ) -> None:
        description = data.describe(prepared)
        own = IMAGENET if network.encoder.weights else (description["mean"], description["std"])
        mean, std = normalise or own
        self.network = network.model_dump(mode="json")
        self.interface = {
            "classes": description["classes"],
            "channels": description["channels"],
            "size": description["size"],
            "mean": mean,
            "std": std,
            "fit": description["fit"],
            "resize": RESIZE,
        }
        self.source = description["source"]
        self.seed, self.clip = training.seed, training.clip
        self._training = training
        self._run = run
        self._train = data.load(prepared, "train")[1:]
        self._validation = data.load(prepared, "validation")[1:]
        torch.manual_seed(derive_seed(training.seed, "weights"))
        student = models.build({"network": self.network, "interface": self.interface})
        if network.encoder.weights:
            adopt_encoder(student, network.encoder)
        self.student = self._place(student)
        self.teacher = None
        if teacher is not None:
            require_same_question(teacher[1], description, prepared)
            self.teacher = self._place(teacher[0])
        self.steps = self.steps_per_epoch = 0
        if trains:
            try:
                self.steps_per_epoch = self._stream().batches(run.world)
            except ValueError as error:
                raise UserError(f"{error} ({prepared}, training split) · lower training.batch") from None
            self.steps = training.epochs * self.steps_per_epoch

    def _place(self, network: nn.Module) -> nn.Module:
        return network.to(self._run.device, self._run.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _fit(self, images: Tensor) -> Tensor:
        return images.to(self._run.dtype).contiguous(memory_format=torch.channels_last)

    def _stream(self) -> Stream:
        return Stream(self._train, self._training.batch)

    def streams(self) -> dict[str, Stream]:
        return {"train": self._stream()}

    def views(self, context: Context) -> Views:
        pixels, classes = context.draw("train")
        images, labels = data.augment(
            data.to_unit(pixels), classes.long(), self._training.augment, context.generator("augment")
        )
        images = self._fit(images)
        return Views(images, None if self.teacher is None else images, labels)

    def objective(self, output: models.Output, target: Tensor) -> Tensor:
        loss = pixel_cross_entropy(output.logits, target)
        if output.auxiliary is not None and self._training.auxiliary:
            loss = loss + self._training.auxiliary * pixel_cross_entropy(output.auxiliary, target)
        return loss

    def logits(self, output: models.Output) -> Tensor:
        return output.logits

    def features(self, network: nn.Module) -> Mapping[str, int]:
        return cast(models.Segmenter, network).features

    def optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        settings = self._training
        return SGD(
            parameters, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )

    def schedule(self, steps: int, learning_rate: float | None = None) -> Callable[[int], float]:
        peak, floor = learning_rate or self._training.learning_rate, self._training.floor
        power = self._training.power

        def rate(count: int) -> float:
            return floor + (peak - floor) * (1 - count / steps) ** power

        return rate

    def monitor(self, network: nn.Module) -> Mapping[str, float]:
        images, labels = self._validation
        classes = len(self.interface["classes"])
        counts = torch.zeros(classes, classes, dtype=torch.int64)
        some = max(1, PIXELS // (images.shape[-2] * images.shape[-1]))
        with torch.inference_mode():
            for part, truth in zip(images.split(some), labels.split(some), strict=True):
                found = models.classify(network, self._fit(data.to_unit(part.to(self._run.device)))).cpu()
                counts += models.confusion(truth, found, classes, data.IGNORE).sum(0)
        right = counts.diagonal().sum() / counts.sum()
        return {"miou": models.mean_iou(counts).item(), "pixel_accuracy": right.item()}


def pixel_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits, enlarged to the size of the labels, as a mean over pixels that have a label.

    Shapes: logits (B, classes, h, w), target (B, H, W) integers below `classes`, or IGNORE. A scalar, 0 where no pixel
    has a label. Computed in float32, or wider if the logits are. With several processes each takes the mean over its
    own pixels.
    Source: GDD card 3.5.
    Raises: ValueError if the batches differ, are empty, or (on the CPU, where looking costs nothing) a label is outside
    the range.
    """
    shapes = f"(logits {tuple(logits.shape)}, labels {tuple(target.shape)})"
    if logits.dim() != 4 or target.dim() != 3 or len(logits) != len(target) or not logits.numel():
        raise ValueError(f"logits (B, classes, h, w) and labels (B, H, W) of one batch are needed {shapes}")
    labelled = target != data.IGNORE
    if target.device.type == "cpu" and bool((labelled & ((target < 0) | (target >= logits.shape[1]))).any()):
        raise ValueError(
            f"labels must be below the number of classes or {data.IGNORE}, found {int(target.min())} to "
            f"{int(target[labelled].max())} {shapes}"
        )
    enlarged = models.upsample(logits.to(torch.promote_types(logits.dtype, torch.float32)), target.shape[-2:])
    total = F.cross_entropy(enlarged, target, ignore_index=data.IGNORE, reduction="sum")
    return total / labelled.sum().clamp(min=1)


def adopt(task: Segmentation, outside: Outside) -> None:
    """Give the task's network the weights of an existing model, which has this project's own names.

    Raises:
        UserError: no such file, another sha256, or weights that do not fit the network (both shapes are named).
    """
    state = read_outside_state(expand_path(outside.file, "from.file"), outside.sha256)
    what = (
        f"{outside.file} does not fit the network {outside.network.model_dump()} with "
        f"{len(task.interface['classes'])} classes"
    )
    load_weights(task.student, state, what)


def adopt_encoder(network: models.Segmenter, encoder: ResNet) -> None:
    """Give an encoder the weights of a ResNet of torchvision, but for its classifier.

    Raises:
        UserError: no such file, another sha256, or weights that do not fit the encoder (both shapes are named).
    """
    file = expand_path(str(encoder.weights), "network.encoder.weights")
    state = {models.Encoder.own_key(key): value for key, value in read_outside_state(file, str(encoder.sha256)).items()}
    what = f"{encoder.weights} does not fit network.encoder = {encoder.model_dump()}"
    load_weights(network.encoder, {key: value for key, value in state.items() if key is not None}, what)


def for_teacher(entry: Teacher, prepared: Path, run: Run, start: Taught | None = None) -> Segmentation:
    """The task as a teacher meets it, with the weights of another or an existing model where one is named."""
    outside = entry.outside
    if outside is None:
        task = Segmentation(prepared, cast(Network, entry.network), entry.training, run)
        if start is not None:
            begin_with(task.student, start, data.describe(prepared)["classes"], HEAD)
        return task
    normalise = normalisation(outside, data.describe(prepared), prepared)
    task = Segmentation(prepared, outside.network, entry.training, run, normalise=normalise, trains=False)
    adopt(task, outside)
    return task


def for_student(entry: AnyStudent, prepared: Path, run: Run, teacher: Taught | None) -> Segmentation:
    """The task as a student meets it, with the teacher it names."""
    return Segmentation(prepared, entry.network, entry.training, run, teacher)
