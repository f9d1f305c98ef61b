"""Recognition as a training task: images at two resolutions, cross-entropy, SGD."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from data import recognition as data
from data.errors import UserError
from data.files import expand_path
from models import recognition as models
from models.artifacts import Description, read_outside_state
from stages.parameters.recognition import AnyStudent, Network, Outside, Teacher, Training
from stages.training import Context, Run, Stream, Task, Views, derive_seed
from stages.training.existing import begin_with, load_weights, normalisation, require_same_question

HEAD = ("classifier.",)  # what depends on the classes
RESIZE = "bicubic with antialiasing, clamped to [0, 1]"
Taught = tuple[nn.Module, Description]


class Recognition(Task):
    """Images with one label each. Teacher and student see the same shifted and mirrored image, each in its size.

    Args:
        prepared: the prepared data set. network: of the student. resolution: side of its images, in pixels.
        teacher: a trained network and its description, or None.
        normalise: mean and std per channel, if not the data set's own. trains: whether batches will be drawn.

    Raises:
        UserError: teacher and data set differ in classes or channels, or there are too few samples for a batch.
    """

    def __init__(
        self,
        prepared: Path,
        network: Network,
        resolution: int,
        training: Training,
        run: Run,
        teacher: Taught | None = None,
        normalise: tuple[list[float], list[float]] | None = None,
        trains: bool = True,
    ) -> None:
        description = data.describe(prepared)
        mean, std = normalise or (description["mean"], description["std"])
        self.network = network.model_dump(mode="json")
        self.interface = {
            "classes": description["classes"],
            "channels": description["channels"],
            "resolution": resolution,
            "mean": mean,
            "std": std,
            "resize": RESIZE,
        }
        self.source = description["source"]
        self.seed, self.clip = training.seed, training.clip
        self.resolution = resolution
        self._training = training
        self._run = run
        self._train = data.load(prepared, "train")[1:]
        self._validation = data.load(prepared, "validation")[1:]
        torch.manual_seed(derive_seed(training.seed, "weights"))
        self.student = self._place(models.build({"network": self.network, "interface": self.interface}))
        self.teacher, self.teacher_resolution = None, resolution
        if teacher is not None:
            self.teacher = self._place(teacher[0])
            self.teacher_resolution = _compatible(teacher[1], description, prepared)
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
        return Stream(self._train, self._training.batch)

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
        logits = output.logits
        return F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, target)

    def logits(self, output: models.Output) -> Tensor:
        return output.logits

    def features(self, network: nn.Module) -> Mapping[str, int]:
        return cast(models.ResNet | models.TorchvisionNetwork, network).features

    def optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        settings = self._training
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
        right = 0
        with torch.inference_mode():
            for part, truth in zip(images.split(500), labels.split(500), strict=True):
                small = self._resize(data.to_unit(part.to(self._run.device)), self.resolution)
                right += int((network(small).logits.argmax(1).cpu() == truth).sum())
        return {"top_1": right / len(labels)}


def _compatible(teacher: Description, dataset: dict[str, Any], prepared: Path) -> int:
    """The resolution that a teacher wants, once it is clear that it answers the same question."""
    require_same_question(teacher, dataset, prepared)
    interface = teacher.interface
    if interface["resolution"] > dataset["size"]:
        raise UserError(
            f"teacher {teacher.name!r} wants images of {interface['resolution']} pixels, those of {prepared.name!r} "
            f"have {dataset['size']}"
        )
    resolution: int = interface["resolution"]
    return resolution


def adopt(task: Recognition, outside: Outside) -> None:
    """Give the task's network the weights of an existing model.

    Raises:
        UserError: no such file, another sha256, or weights that do not fit the network (both shapes are named).
    """
    state = read_outside_state(expand_path(outside.file, "from.file"), outside.sha256)
    if isinstance(task.student, models.TorchvisionNetwork):
        state = {task.student.own_key(key): value for key, value in state.items()}
    what = (
        f"{outside.file} does not fit the network {outside.network.model_dump()} with "
        f"{len(task.interface['classes'])} classes"
    )
    load_weights(task.student, state, what)


def for_teacher(entry: Teacher, prepared: Path, run: Run, start: Taught | None = None) -> Recognition:
    """The task as a teacher meets it: full resolution, and the weights of another or existing model if one is named."""
    description = data.describe(prepared)
    outside = entry.outside
    if outside is None:
        task = Recognition(prepared, cast(Network, entry.network), description["size"], entry.training, run)
        if start is not None:
            begin_with(task.student, start, description["classes"], HEAD)
        return task
    normalise = normalisation(outside, description, prepared)
    task = Recognition(
        prepared, outside.network, description["size"], entry.training, run, normalise=normalise, trains=False
    )
    adopt(task, outside)
    return task


def for_student(entry: AnyStudent, prepared: Path, run: Run, teacher: Taught | None) -> Recognition:
    """The task as a student meets it, with the teacher it names."""
    return Recognition(prepared, entry.network, entry.resolution, entry.training, run, teacher)
