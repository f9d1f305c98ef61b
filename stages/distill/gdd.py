"""GDD: a student's noisy feature map, through a small generator, has to give the teacher's, channel by channel.

Source: Liu, Xu, Cao, Shen 2024, "Generative Denoise Distillation: Simple Stochastic Noises Induce Efficient Knowledge
Transfer for Dense Prediction" (arXiv 2401.08332), and its official code. Where the two disagree the code is followed
(GDD method card, section 4): one map of plain Gaussian samples for all channels, weight set explicitly.

"Card" is the GDD method card. Its letters: S, F = the student's and the teacher's feature map, a = the aligned student
map, z = noise, u = a + z, g = the generator's output, W1, b1 and W2, b2 = its two convolutions, T = temperature,
alpha = weight, sigma = the noise's spread. The channel-wise KL, align layer and generator stand in
`stages/training/features.py`, where the relatives find them too.
"""

import logging
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.parameters.segmentation import GDD
from stages.training import Context, FeatureMethod, Generator, Run, Task, channel_divergence

log = logging.getLogger("distillery")

ENCODER = "encoder."  # how the names of an encoder's weights begin
# The fused form is chosen where it has less than this share of the plain form's multiply-adds: with less to save,
# benchmarks/speed_gdd.py shows hardly a gain.
PAYS = 0.95


def draw_noise(
    like: Tensor,
    channels: int,
    mode: str = "shared",
    kind: str = "gaussian",
    std: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor | None:
    """Noise z of mean 0 and standard deviation `std`, on the device of `like` (card 3.1, step 2).

    Shapes: like (N, ..., H, W); the result is (N, 1, H, W) for "shared", (N, channels, H, W) for "independent"; samples
    and positions are always independent. Kinds: "gaussian", "uniform" (on +- std * sqrt(3)), "laplace".
    In float32, or float64 if `like` is. `std` 0 draws nothing and returns None.
    Raises: ValueError for a negative or infinite std, or an unknown mode or kind.
    """
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"the standard deviation of noise must be 0 or more and finite ({std}) · 1 is usual")
    if mode not in ("shared", "independent"):
        raise ValueError(f"unknown mode of noise ({mode!r}) · use shared or independent")
    if kind not in ("gaussian", "uniform", "laplace"):
        raise ValueError(f"unknown kind of noise ({kind!r}) · use gaussian, uniform or laplace")
    if std == 0:
        return None
    shape = (like.shape[0], 1 if mode == "shared" else channels, *like.shape[-2:])
    empty = torch.empty(shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    if kind == "gaussian":
        return empty.normal_(0, std, generator=generator)
    if kind == "uniform":
        return empty.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std, generator=generator)
    # The difference of two exponentials is Laplacian; its variance is the sum of theirs.
    first, second = empty.new_empty(2, *shape).exponential_(math.sqrt(2) / std, generator=generator)
    return first - second


def generate(student: Tensor, generator: Generator, noise: Tensor | None = None, fused: bool = False) -> Tensor:
    """g = W2 * relu(W1 * (align(S) + z) + b1) + b2 (card 3.1, steps 1 to 3), in one of two equal forms.

    Shapes: student (N, Cs, H, W), noise (N, 1, H, W) or (N, Ct, H, W) or None; the result is (N, Ct, H, W).
    `fused` runs align layer, shared noise and first convolution as one convolution (card 8.2): its kernel is W1
    composed with [align weights, align bias, 1], its input is [S, a plane of ones, z]. Zero padding of these planes is
    what makes it exact at the borders. Independent noise keeps a convolution of its own. Without an align layer there
    is nothing to fuse.
    Raises: ValueError if the student's map or the noise does not have the declared channels, or for an empty batch.
    """
    align = generator.align
    align.check(student)
    if student.numel() == 0:
        raise ValueError(f"the student's map is empty {tuple(student.shape)} · leave empty batches out")
    if noise is not None and noise.shape not in {
        (student.shape[0], channels, *student.shape[2:]) for channels in (1, align.outputs)
    }:
        raise ValueError(
            f"noise {tuple(noise.shape)} does not fit the student's map {tuple(student.shape)} · "
            f"it has its samples and positions, and 1 or {align.outputs} channels"
        )
    if not fused or align.convolution is None:
        aligned = align(student)
        return cast(Tensor, generator(aligned if noise is None else aligned + noise))
    first = generator.first
    shared = noise is not None and noise.shape[1] == 1
    columns = [align.convolution.weight.flatten(1), align.convolution.bias[:, None]]  # type: ignore[index]
    planes = [student, student.new_ones(1, 1, 1, 1).expand(len(student), 1, *student.shape[2:])]
    if noise is not None and shared:
        columns.append(torch.ones_like(columns[1]))
        planes.append(noise.to(student.dtype))
    with torch.autocast(student.device.type, enabled=False):
        # (Ct, 3, 3, Ct) @ (Ct, Cs + 2): channels last, as the convolution wants it.
        kernel = (first.weight.permute(0, 2, 3, 1) @ torch.cat(columns, 1)).permute(0, 3, 1, 2)
    hidden = F.conv2d(torch.cat(planes, 1), kernel, first.bias, padding=1)
    if noise is not None and not shared:
        hidden = hidden + F.conv2d(noise, first.weight, padding=1)
    return cast(Tensor, generator.second(F.relu_(hidden)))


def fused_share(positions: int, student: int, teacher: int, independent: bool = False) -> float:
    """Multiply-adds of the fused form as a share of the plain form's, forward and backward.

    Backward costs twice forward, but no gradient goes to noise. `positions` are those of the whole batch, `student` and
    `teacher` the widths of the maps. The composite kernel is made once per batch: few positions do not pay for it.
    Without an align layer both forms are the same: 1.
    """
    if student == teacher:
        return 1.0
    square = 9 * teacher**2
    plain = 3 * positions * (student * teacher + 2 * square)
    inputs = student + (1 if independent else 2)
    fused = 3 * (positions * (9 * inputs * teacher + square) + inputs * square)
    return (fused + (2 * positions * square if independent else 0)) / plain


def inherit(student: nn.Module, teacher: nn.Module) -> tuple[list[str], list[str]]:
    """Copy the teacher's weights and buffers outside its encoder into the student, where they fit (card 3.3).

    Returns: the names that were copied, and for every other name outside the encoders why it was not (both shapes).
    """
    own, theirs = student.state_dict(), teacher.state_dict()
    copied, left = [], []
    for name in sorted(own.keys() | theirs.keys()):
        if name.startswith(ENCODER):
            continue
        if name not in own:
            left.append(f"{name}: the student has none")
        elif name not in theirs:
            left.append(f"{name}: the teacher has none")
        elif own[name].shape != theirs[name].shape:
            left.append(f"{name}: {tuple(own[name].shape)} in the student, {tuple(theirs[name].shape)} in the teacher")
        else:
            own[name].copy_(theirs[name])
            copied.append(name)
    return copied, left


class Learner(FeatureMethod):
    """The task's own objective + weight * channel-wise KL of generated maps + logits * that of class logits.

    Noise has its own random numbers per step and process: a weight of 0 gives the training without a teacher, bit for
    bit. The student is the plain network; align layers and generators are trained beside it and left behind.
    """

    def __init__(self, task: Task, parameters: GDD, run: Run) -> None:
        self._parameters = parameters
        if parameters.inherit:
            copied, left = inherit(task.student, task.taught_by())
            log.info("inherited from the teacher: %s", ", ".join(copied) or "nothing")
            log.info("not inherited: %s", "; ".join(left) or "nothing")
        super().__init__(task, run, parameters.places, parameters.weight, parameters.logits, parameters.temperature)

    def adapter(self, student: int, teacher: int) -> nn.Module:
        generator = Generator(student, teacher)
        # A constant added to a channel changes no softmax over positions: this bias has gradient 0 and would follow
        # weight decay alone. It stays in the checkpoint.
        generator.second.bias.requires_grad_(False)  # type: ignore[union-attr]
        return generator

    def compare(self, adapter: Generator, student: Tensor, teacher: Tensor, context: Context) -> Tensor:
        parameters, widths = self._parameters, (adapter.align.inputs, adapter.align.outputs)
        settings = parameters.noise
        noise = draw_noise(student, widths[1], settings.mode, settings.kind, settings.std, context.generator("noise"))
        independent = noise is not None and settings.mode == "independent"
        positions = student.shape[0] * student.shape[2] * student.shape[3]
        fused = parameters.form == "fast" or (
            parameters.form == "auto" and fused_share(positions, *widths, independent) < PAYS
        )
        generated = generate(student, adapter, noise, fused)
        return channel_divergence(generated, teacher, parameters.temperature, closed_form=parameters.form != "plain")
