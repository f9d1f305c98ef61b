"""What a method may ask of the task it is applied to, so that one method file serves every task."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from data.errors import UserError
from stages.training.method import Context, Method
from stages.training.streams import Stream


class Views(NamedTuple):
    """One batch as each network sees it: the same samples in the same order, under the same augmentation.

    `rows` are their places in the prepared data, (B,) int64, for methods that keep something per sample.
    """

    student: Any
    teacher: Any
    target: Any
    rows: Tensor | None = None


class Task(ABC):
    """Data, networks and the ordinary objective of one task. Implemented in stages/teach/<task>.py.

    Attributes:
        student: the network that is trained, with fresh weights.
        teacher: the trained network it learns from; None without one.
        network: what the student is built from, for its description.
        interface: what goes into the student and comes out, for its description.
        source: name, licence, credit and redistributable of the data.
        seed: of everything random. clip: largest norm of a gradient, or None.
        steps: outer steps of the whole training.
        steps_per_epoch: outer steps between two looks at the validation split.
    """

    student: nn.Module
    teacher: nn.Module | None
    network: dict[str, Any]
    interface: dict[str, Any]
    source: dict[str, Any]
    seed: int
    clip: float | None
    steps: int
    steps_per_epoch: int

    def taught_by(self) -> nn.Module:
        """The teacher.

        Raises:
            UserError: the student names none.
        """
        if self.teacher is None:
            raise UserError("this method needs a teacher, and the student names none")
        return self.teacher

    def optimize(
        self, method: Method, name: str, parameters: Iterable[Tensor], learning_rate: float | None = None
    ) -> None:
        """Let a method train these parameters under this name: the task's optimiser, schedule and clipping.

        Args:
            learning_rate: the highest of the schedule, instead of the task's own.
        """
        method.optimizers[name] = self.optimizer(parameters)
        method.schedules[name] = self.schedule(self.steps, learning_rate)
        if self.clip is not None:
            method.clip[name] = self.clip

    def pretraining(self) -> Method | None:
        """How the network learns as a teacher where that is not by the task's own objective."""
        return None

    @abstractmethod
    def streams(self) -> dict[str, Stream]:
        """Named data; "train" at least, and "held_out" where the task holds samples out of it."""

    @abstractmethod
    def views(self, context: Context) -> Views:
        """The next training batch."""

    def held_out(self, context: Context) -> Views:
        """The next batch of samples that the task holds out of training.

        Raises:
            UserError: it holds none out.
        """
        raise UserError("this method needs samples that are held out of training, which this task does not offer")

    @abstractmethod
    def objective(self, output: Any, target: Any) -> Tensor:
        """The task's ordinary loss of a network's output, a scalar in float32 or wider."""

    @abstractmethod
    def logits(self, output: Any) -> Tensor:
        """Class scores (N, classes, ...) of a network's output."""

    @abstractmethod
    def features(self, network: nn.Module) -> Mapping[str, int]:
        """The places of a network's output that a method may ask for, with their widths."""

    @abstractmethod
    def optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        """The task's optimiser with its own settings."""

    @abstractmethod
    def schedule(self, steps: int, learning_rate: float | None = None) -> Callable[[int], float]:
        """Learning rate as a function of the number of updates so far, for a training of `steps` updates.

        Args:
            learning_rate: the highest, instead of the task's own.
        """

    @abstractmethod
    def monitor(self, network: nn.Module) -> Mapping[str, float]:
        """Figures on the validation split that a user watches while the network trains."""
