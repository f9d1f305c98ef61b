"""Triplets in torch: all pairs of a few vertices at a time."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from stages.relations import Geometry, Walk

NUMBERS = 2**17  # of pairs at a time, so that they stay in a processor's cache
NUMBERS_OF_GPU = 2**24


def walk(ours: Geometry, theirs: Geometry, vertices: Tensor, fused: bool) -> Walk:
    """See `Walk`."""
    count = len(ours.squares)
    slope = torch.zeros_like(ours.squares, dtype=torch.float64)
    total = slope.new_zeros(())
    limit = NUMBERS if ours.squares.device.type == "cpu" else NUMBERS_OF_GPU
    block = _fused() if fused else _block
    for rows in vertices.split(max(1, limit // count**2)):
        loss, edges, opposite = block(*ours, *theirs, rows)
        total += loss
        slope[rows] += edges
        slope -= opposite
    return total, slope


def _block(
    squares: Tensor, inverse: Tensor, theirs: Tensor, their_inverse: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What some vertices add: sum of h, to their rows of S, and what is taken from all of it."""
    cosines = _cosines(squares, inverse, rows)
    differ = cosines - _cosines(theirs, their_inverse, rows)
    weight = differ.clamp(-1, 1)
    loss = torch.linalg.vecdot(weight, differ).sum() - torch.linalg.vecdot(weight, weight).sum() / 2
    short = inverse[rows]
    edges = short * torch.bmm(weight, short[:, :, None])[:, :, 0]
    edges -= short.square() * torch.linalg.vecdot(weight, cosines)
    opposite = ((weight * short[:, :, None]) * short[:, None]).sum(0) / 2
    return loss.double(), edges.double(), opposite


def _cosines(squares: Tensor, inverse: Tensor, rows: Tensor) -> Tensor:
    """(rows, B, B): at a vertex, of the directions to b and to c."""
    short, own = inverse[rows], squares[rows]
    # d_ab / d_ac + d_ac / d_ab is of rank two.
    left = torch.stack([own * short, short], 2)
    right = torch.stack([short, own * short], 1)
    across = squares * short[:, :, None]
    across *= short[:, None]
    return torch.baddbmm(across, left, right, beta=-0.5, alpha=0.5)


@cache
def _fused() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_block, dynamic=True)
