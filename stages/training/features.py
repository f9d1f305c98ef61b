"""What methods that compare feature maps have in common: places, align layers, the generator, the channel-wise KL.

"Card" is the GDD method card. Its letters: S, F = the student's and the teacher's feature map (N, C, H, W), a = the
aligned student map, g = what the generator makes of it, p, q = softmax over positions of F / T and g / T, T = the
temperature.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from data.errors import UserError, suggest
from stages.training.method import Context, Method
from stages.training.run import Run
from stages.training.task import Task


def channel_divergence(student: Tensor, teacher: Tensor, temperature: float = 4.0, closed_form: bool = True) -> Tensor:
    """temperature^2 * KL(p || q) per channel, p and q being distributions over positions (card 3.1, steps 4 and 5).

    p = softmax(teacher / temperature) and q = softmax(student / temperature), each over all positions of one channel of
    one sample (Shu et al. 2021, "Channel-wise Knowledge Distillation for Dense Prediction"; GDD's official code).

    Shapes: (N, C, ...), both alike: any number of positions, which are summed over; mean over N and C; a scalar.
    Computed and returned in float32, or in float64 if either input is, also under autocast; the gradient,
    temperature / (N * C) * (q - p), has the student's dtype and none reaches the teacher. Features in the hundreds stay
    finite; infinity and NaN come out as NaN. The memory format does not matter.
    `closed_form` computes value and gradient in one pass and keeps one tensor for backward, differentiable once;
    without it the definition is left to autograd, which keeps several. Both are equal but for rounding.
    Raises: ValueError if the shapes differ, lack channels or positions or are empty, or if the temperature is not a
    positive finite number.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite ({temperature}) · values from 1 to 10 are usual")
    shapes = f"(student {tuple(student.shape)}, teacher {tuple(teacher.shape)})"
    if student.shape != teacher.shape:
        raise ValueError(f"maps differ in shape {shapes} · compare equal channels, heights and widths")
    if student.dim() < 3 or student.numel() == 0:
        raise ValueError(f"maps must be non-empty (N, C, ...) arrays {shapes} · leave empty batches out")
    student, teacher = widen(student, teacher)
    if closed_form:
        return cast(Tensor, _ChannelDivergence.apply(student, teacher, temperature))
    log_q, log_p = (F.log_softmax(x.flatten(2) / temperature, dim=2) for x in (student, teacher))
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=2)
    return temperature**2 * divergence.mean()


def widen(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, or in float64 if either is; the teacher without its graph."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


class _ChannelDivergence(torch.autograd.Function):
    """`channel_divergence` of checked inputs: sum of p * (F - g) / T, and the difference of the log-normalisers."""

    @staticmethod
    def forward(ctx: FunctionCtx, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        channels = student.shape[0] * student.shape[1]
        # Channels stay where they are in memory: a reduction over the middle dimension costs less than a copy.
        last = student.dim() == 4 and student.is_contiguous(memory_format=torch.channels_last)
        g, f = (x.permute(0, 2, 3, 1).flatten(1, 2) if last else x.flatten(2) for x in (student, teacher))
        positions = 1 if last else 2
        f = f - f.amax(positions, keepdim=True)
        p = (f / temperature).exp_()
        g = g - g.amax(positions, keepdim=True)
        f.sub_(g)
        q = g.div_(temperature).exp_()
        q_sum, p_sum = (x.sum(positions, keepdim=True) for x in (q, p))
        q.div_(q_sum)
        p.div_(p_sum)
        # Large terms cancel: within a channel first.
        expected = f.mul_(p).sum(positions, keepdim=True)
        total = (expected / temperature + (q_sum.log() - p_sum.log())).sum()
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            gradient = q.sub_(p).mul_(temperature / channels)
            if last:
                gradient = gradient.unflatten(1, student.shape[2:]).permute(0, 3, 1, 2)
            ctx.save_for_backward(gradient.reshape(student.shape))
        return total * (temperature**2 / channels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * cotangent, None, None


class Align(nn.Module):
    """A 1x1 convolution to the teacher's width; nothing at all where the widths agree (card 3.1, step 1).

    Training only. Parameters: inputs * outputs + outputs, or none.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.convolution = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, student: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H, W).

        Raises: ValueError if the map does not have the declared channels.
        """
        self.check(student)
        return student if self.convolution is None else cast(Tensor, self.convolution(student))

    def check(self, student: Tensor) -> None:
        """Refuse a map of other channels than those declared."""
        if student.dim() != 4 or student.shape[1] != self.inputs:
            raise ValueError(
                f"the student's map {tuple(student.shape)} does not have the declared channels "
                f"(N, {self.inputs}, H, W) · declare the width of the place that it is taken from"
            )


class Generator(nn.Module):
    """Align layer, then 3x3 convolution, ReLU, 3x3 convolution at the teacher's width (card 3.1, step 3).

    Zero padding, PyTorch's default initialisation. Training only; GDD's and MGD's are the same. What happens between
    `align` and `forward` (noise, a mask) is the method's. Parameters besides the align layer: 2 * (9 * C^2 + C).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.align = Align(inputs, outputs)
        self.first = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, aligned: Tensor) -> Tensor:
        """(N, outputs, H, W), aligned and disturbed, to the same shape."""
        return cast(Tensor, self.second(F.relu(self.first(aligned))))


class Pair(Protocol):
    """The place of two encoders that are compared."""

    @property
    def student(self) -> str: ...

    @property
    def teacher(self) -> str: ...


class FeatureMethod(Method):
    """The task's own objective + `weight` * a loss per pair of feature maps, summed + `logits` * channel-wise KL.

    What the logits' term compares are the class logits of both networks. A term of weight 0 is not computed, and with
    both 0 the teacher is not run: the student then trains exactly as without one. The teacher's heads run only for the
    logits' term; otherwise its encoder is all that is asked.

    Attributes:
        weights: of the terms "task", "features" and "logits".

    Raises:
        UserError: `places` names a place that a network does not have, or a step meets two maps of different size.
    """

    frozen = frozenset({"teacher"})
    temperature: float

    def __init__(
        self, task: Task, run: Run, places: Sequence[Pair], weight: float, logits: float = 0.0, temperature: float = 4.0
    ) -> None:
        super().__init__()
        self._task, self._places = task, places
        self.weights = {"task": 1.0, "features": weight, "logits": logits}
        self.temperature = temperature
        self.modules = {"student": task.student, "teacher": task.taught_by()}
        trained = list(task.student.parameters())
        if weight:
            adapters = nn.ModuleList(self.adapter(*self._widths(index)) for index in range(len(places)))
            self.modules["adapters"] = adapters.to(run.device, run.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
            trained += [parameter for parameter in adapters.parameters() if parameter.requires_grad]
        self.streams = task.streams()
        task.optimize(self, "student", trained)

    @abstractmethod
    def adapter(self, student: int, teacher: int) -> nn.Module:
        """What exists only in training, for one pair of maps of these widths."""

    @abstractmethod
    def compare(self, adapter: Any, student: Tensor, teacher: Tensor, context: Context) -> Tensor:
        """The loss of one pair of maps; runs under autocast."""

    def step(self, context: Context) -> Mapping[str, Tensor]:
        task, weights = self._task, self.weights
        teacher = cast(Any, self.modules["teacher"])
        views = task.views(context)
        with torch.no_grad(), context.run.autocast():
            theirs = teacher(views.teacher) if weights["logits"] else None
            maps = (
                theirs.features if theirs is not None else teacher.encode(views.teacher) if weights["features"] else {}
            )
        with context.run.autocast():
            output = self.modules["student"](views.student)
        terms = {"task": task.objective(output, views.target)}
        if weights["features"]:
            with context.run.autocast():
                losses = [self._compare(index, output.features, maps, context) for index in range(len(self._places))]
            terms["features"] = torch.stack(losses).sum()
        if weights["logits"]:
            terms["logits"] = channel_divergence(task.logits(output), task.logits(theirs), self.temperature)
        context.update("student", {name: weights[name] * term for name, term in terms.items()})
        return {f"loss/{name}": term for name, term in terms.items()}

    def _compare(
        self, index: int, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], context: Context
    ) -> Tensor:
        pair = self._places[index]
        student, teacher = ours[pair.student], theirs[pair.teacher]
        if student.shape[2:] != teacher.shape[2:]:
            raise UserError(
                f"feature maps differ in height and width (student {tuple(student.shape)}, teacher "
                f"{tuple(teacher.shape)}) · places[{index}]: {pair.student!r} of the student, {pair.teacher!r} of the "
                "teacher · name places of the same stride"
            )
        adapters = cast(nn.ModuleList, self.modules["adapters"])
        return self.compare(adapters[index], student, teacher, context)

    def _widths(self, index: int) -> tuple[int, int]:
        """Of the student's and the teacher's map of one pair."""
        pair = self._places[index]

        def width(side: str, network: nn.Module, place: str) -> int:
            known = self._task.features(network)
            if place not in known:
                raise UserError(f"the {side} has no place {place!r} · places[{index}].{side}; {suggest(place, known)}")
            return known[place]

        return (
            width("student", self.modules["student"], pair.student),
            width("teacher", self.modules["teacher"], pair.teacher),
        )
