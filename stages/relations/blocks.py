"""Relations in torch, on any device; triplets as all pairs of a few vertices at a time."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from stages.relations import NEAR, Geometry, Walk

NUMBERS = 2**17  # of pairs at a time, so that they stay in a processor's cache
NUMBERS_OF_GPU = 2**24


def geometry(centred: Tensor) -> Geometry:
    """Of (B, D) float64 embeddings with mean 0."""
    squares = centred @ centred.T
    lengths = squares.diagonal().clone()
    total = lengths[:, None] + lengths
    squares.mul_(-2).add_(total).clamp_min_(0)
    near = (squares <= total.mul_(NEAR)).triu(1).nonzero()
    if len(near):
        first, second = near.T
        squares[first, second] = squares[second, first] = (centred[first] - centred[second]).square().sum(1)
    squares.fill_diagonal_(0)
    smallest = torch.where(squares == 0, torch.inf, squares).amin().item()
    return Geometry(squares, squares.rsqrt().masked_fill_(squares == 0, 0), smallest, squares.amax().item())


def pairs(ours: Geometry, theirs: Geometry) -> tuple[Tensor, Tensor]:
    """L2, and S of it."""
    count = len(ours.squares)
    (own, mean), (other, their_mean) = (_distances(side.squares) for side in (ours, theirs))
    differ = (own / mean).sub_(other.div_(their_mean))
    clipped = differ.clamp(-1, 1)
    value = (_sum(clipped, differ) - _sum(clipped, clipped) / 2) / count**2
    by_mean = _sum(clipped, own) / mean**2 / (count * (count - 1))
    return value, clipped.div_(mean).sub_(by_mean).mul_(ours.inverse).div_(2 * count**2)


def _distances(squares: Tensor) -> tuple[Tensor, Tensor]:
    """d, and mu; 1 where that is 0."""
    distances = squares.sqrt()
    mean = distances.sum() / (len(squares) * (len(squares) - 1))
    return distances, torch.where(mean == 0, 1, mean)


def _sum(left: Tensor, right: Tensor) -> Tensor:
    """Of products, without an array of them."""
    return torch.dot(left.flatten(), right.flatten())


def walk(ours: Geometry, theirs: Geometry, vertices: Tensor, fused: bool) -> Walk:
    """See `Walk`."""
    count = len(ours.squares)
    slope = torch.zeros_like(ours.squares, dtype=torch.float64)
    total = slope.new_zeros(())
    limit = NUMBERS if ours.squares.device.type == "cpu" else NUMBERS_OF_GPU
    block = _fused() if fused else _block
    for rows in vertices.split(max(1, limit // count**2)):
        loss, edges, opposite = block(*ours[:2], *theirs[:2], rows)
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
