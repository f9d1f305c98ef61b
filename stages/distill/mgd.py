"""MGD: a student's feature map, with most positions masked, through a small generator, has to give the teacher's.

Source: Yang, Li, Shao, Shi, Yuan, Yuan 2022, "Masked Generative Distillation" (ECCV), and its official code, in the
form of the GDD method card, section 3.7: lambda = `masked`, alpha = `weight`. Align layer and generator stand in
`stages/training/features.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.parameters.segmentation import MGD
from stages.training import Context, FeatureMethod, Generator, Run, Task, widen


def keep(uniform: Tensor, masked: float) -> Tensor:
    """The mask m of numbers uniform on [0, 1), of any shape: 0 with probability `masked`, else 1.

    Raises: ValueError if `masked` is no share.
    """
    if not 0 <= masked <= 1:
        raise ValueError(f"the masked share must be from 0 to 1 ({masked}) · 0.75 is usual for segmentation")
    return (uniform < 1 - masked).to(uniform.dtype)


def generation_loss(generated: Tensor, teacher: Tensor) -> Tensor:
    """Squared error between what was generated and the teacher's map (card 3.7, without alpha).

    Shapes: (N, C, H, W), both alike. Reduction: sum over C, H and W, mean over N; a scalar. Since it grows with the
    map, alpha does not carry over between widths and resolutions: alpha * C * H * W does.
    Computed and returned in float32, or in float64 if either input is, also under autocast; no gradient reaches the
    teacher. Raises: ValueError if the shapes differ, or for an empty batch.
    """
    shapes = f"(student {tuple(generated.shape)}, teacher {tuple(teacher.shape)})"
    if generated.shape != teacher.shape:
        raise ValueError(f"maps differ in shape {shapes} · compare equal channels, heights and widths")
    if generated.numel() == 0:
        raise ValueError(f"maps are empty {shapes} · leave empty batches out")
    generated, teacher = widen(generated, teacher)
    return F.mse_loss(generated, teacher, reduction="sum") / len(generated)


class Learner(FeatureMethod):
    """The task's own objective + weight * squared error of maps generated from masked ones, summed over places."""

    def __init__(self, task: Task, parameters: MGD, run: Run) -> None:
        self._parameters = parameters
        super().__init__(task, run, parameters.places, parameters.weight)

    def adapter(self, student: int, teacher: int) -> nn.Module:
        return Generator(student, teacher)

    def compare(self, adapter: Generator, student: Tensor, teacher: Tensor, context: Context) -> Tensor:
        aligned, masked = adapter.align(student), self._parameters.masked
        if masked:
            shape = (len(aligned), 1, *aligned.shape[2:])
            uniform = torch.rand(shape, dtype=torch.float32, device=aligned.device, generator=context.generator("mask"))
            aligned = aligned * keep(uniform, masked).to(aligned.dtype)
        return generation_loss(adapter(aligned), teacher)
