"""Pairs and triplets of a batch, compared between two networks: exact, with their gradient, in memory of B * B.

"Card" is the HORKD method card. Its letters: v = student, u = teacher, h = Huber penalty with delta 1, d = distances,
mu = their mean, psi = d / mu, C = cosines, w = h' of what differs.

All follows from squared distances, which come from one Gram matrix per network in float64; pairs that nearly coincide
are measured again by their differences. The cosine at a between b and c is

    C_abc = (d_ab^2 + d_ac^2 - d_bc^2) / (2 d_ab d_ac), 0 where a coincides with b or c,

so that a loss depends on embeddings by S_ab = dL / d(d_ab^2) alone, and its gradient is that of a graph's Laplacian:
dL/dv_a = 2 * sum_b (S_ab + S_ba) (v_a - v_b). Loss and gradient are computed together (card 8).

Three forms walk over the B^3 triplets: `compiled` for processors (stages/relations/compiled.py), `blocks` a few
vertices at a time in torch, on any device, `fused` the same through torch.compile, for GPUs. All equal the definitions
in stages/distill/horkd.py.
"""

import importlib
import logging
import math
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

log = logging.getLogger("distillery")

NEAR = 1e-6  # share of the squared lengths below which a squared distance is measured by differences
CLOSE = 1e-4  # share of the largest squared distance down to which float32 holds the digits of cosines
FORMS = ("compiled", "blocks", "fused")


class Geometry(NamedTuple):
    """Of one network's embeddings: squared distances and their inverse roots (0 where they are 0), (B, B) float64; the
    smallest of the former that is not 0 (infinite without any), and the largest.
    """

    squares: Tensor
    inverse: Tensor
    smallest: float
    largest: float


def losses(
    student: Tensor, teacher: Tensor, *, pairs: bool, triplets: bool, form: str, vertices: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """L2 and L3 (card 3.3, 3.4); what is not asked for is 0, and not computed.

    Shapes: (B, D) and (B, D') of the same samples, float32 or float64; two scalars of the student's dtype. No gradient
    reaches the teacher; differentiable once.

    Args:
        form: one of FORMS.
        vertices: (K,) int64, the samples at which angles are compared; None: all. The loss is a mean over these, and
            unbiased if they are drawn evenly.
    """
    found: tuple[Tensor, Tensor] = _Losses.apply(student, teacher, pairs, triplets, form, vertices)
    return found


def choose(device: torch.device) -> str:
    """The fastest form that a device and this installation have."""
    form = "fused" if device.type == "cuda" else "compiled"
    try:
        if form == "fused":
            importlib.import_module("triton")
        _module(form)
    except (ImportError, RuntimeError) as error:  # numba wants a place for what it compiled
        log.warning("relations of triplets are compared more slowly (%s)", error)
        form = "blocks"
        _module(form)
    return form


def _module(form: str) -> ModuleType:
    if form == "compiled":
        return importlib.import_module("stages.relations.compiled")
    return importlib.import_module("stages.relations.blocks")


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, pairs: bool, triplets: bool, form: str, vertices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(student.device.type, enabled=False):
            module, centred = _module(form), _centred(student)
            theirs, ours = module.geometry(_centred(teacher)), module.geometry(centred)
            found, slopes = [], []
            for wanted, compare in (
                (pairs, module.pairs),
                (triplets, partial(_triplets, form, vertices, student.dtype)),
            ):
                if wanted and len(student) > 1:
                    value, slope = compare(ours, theirs)
                    both = slope + slope.T
                    gradient = 2 * (both.sum(1, keepdim=True) * centred - both @ centred)
                else:
                    value, gradient = centred.new_zeros(()), torch.zeros_like(centred)
                found.append(value.to(student))
                slopes.append(gradient.to(student))
        ctx.save_for_backward(*slopes)
        return found[0], found[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_pairs: Tensor, of_triplets: Tensor) -> tuple[Tensor | None, ...]:
        slopes = ctx.saved_tensors
        return (of_pairs * slopes[0] + of_triplets * slopes[1], *(5 * [None]))


def _centred(embeddings: Tensor) -> Tensor:
    # Metal has no float64; what is related to each other is small.
    device = torch.device("cpu") if embeddings.device.type == "mps" else embeddings.device
    wide = embeddings.detach().to(device, torch.float64, copy=True)
    return wide.sub_(wide.mean(0))


def _triplets(
    form: str, vertices: Tensor | None, dtype: torch.dtype, ours: Geometry, theirs: Geometry
) -> tuple[Tensor, Tensor]:
    """L3, and S of it."""
    scale = 1.0
    if dtype == torch.float32 and all(math.inf > side.smallest > CLOSE * side.largest for side in (ours, theirs)):
        (ours, scale), theirs = _narrow(ours), _narrow(theirs)[0]
    count = len(ours.squares)
    device = ours.squares.device
    chosen = torch.arange(count, device=device) if vertices is None else vertices.to(device)
    total, slope = _module(form).walk(ours, theirs, chosen, form == "fused")
    share = 1 / (len(chosen) * count**2)
    return share * total, slope.mul_(share * scale)


def _narrow(side: Geometry) -> tuple[Geometry, float]:
    """In float32, scaled to distances of about 1, which cosines do not see; and by what squares were multiplied."""
    power = 2.0 ** -math.floor(math.log2(side.largest) / 2)  # a power of two changes no digit
    return Geometry((side.squares * power**2).float(), (side.inverse / power).float(), 0, 0), power**2


Walk = tuple[Tensor, Tensor]
"""Over vertices a, and b and c, with r the inverse distances and w r r short for w_abc r_ab r_ac: the sum of h; and
(B, B) S, that is sum_c w r r - r_ab^2 sum_c w C in row a, less half of sum_a w r r; float64.
"""
