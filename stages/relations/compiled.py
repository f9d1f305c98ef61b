"""Relations on processors: compiled loops over pairs and triplets; vertices of triplets are shared between threads."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import repeat

import numba
import numpy as np
import torch
from torch import Tensor

from stages.relations import NEAR, Geometry, Walk

SMALLEST = 2**21  # triplets for which another thread is worth its start


def geometry(centred: Tensor) -> Geometry:
    """Of (B, D) float64 embeddings with mean 0."""
    squares = centred @ centred.T
    inverse = torch.zeros_like(squares)
    return Geometry(squares, inverse, *_geometry(squares.numpy(), centred.numpy(), inverse.numpy()))


def pairs(ours: Geometry, theirs: Geometry) -> tuple[Tensor, Tensor]:
    """L2, and S of it."""
    slope = torch.zeros_like(ours.squares)
    value = _pairs(*_arrays(ours, theirs), slope.numpy())
    return slope.new_tensor(value), slope


def walk(ours: Geometry, theirs: Geometry, vertices: Tensor, fused: bool) -> Walk:
    """See `Walk`. What is summed up by itself depends on torch's number of threads and on the shapes alone."""
    count = len(ours.squares)
    parts = max(1, min(torch.get_num_threads(), len(vertices) * count**2 // SMALLEST))
    arrays = _arrays(ours, theirs)
    slope = np.zeros((count, count))
    opposite = np.zeros((parts, count, count), arrays[0].dtype)
    totals = np.zeros(count)
    shares = [vertices.numpy()[part::parts] for part in range(parts)]
    results = slope, opposite, totals
    if parts == 1:
        _walk(*arrays, shares[0], *results, 0)
    else:
        list(_threads(parts).map(_walk, *map(repeat, arrays), shares, *map(repeat, results), range(parts)))
    for of_part in opposite:
        slope -= of_part
    return torch.as_tensor(totals.sum()), torch.as_tensor(slope)


def _arrays(ours: Geometry, theirs: Geometry) -> list[np.ndarray]:
    return [array.numpy() for array in (*ours[:2], *theirs[:2])]


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads of our own: those of a second OpenMP would spin against torch's."""
    return ThreadPoolExecutor(count, "relations")


@numba.njit(cache=True)
def _geometry(squares, points, inverse):  # type: ignore[no-untyped-def]
    """From the Gram matrix in the place of squared distances."""
    count = len(squares)
    lengths = np.diag(squares).copy()
    smallest, largest = np.inf, 0.0
    for a in range(count):
        squares[a, a] = 0
        for b in range(a):
            total = lengths[a] + lengths[b]
            square = total - 2 * squares[a, b]
            if square <= NEAR * total:
                square = np.square(points[a] - points[b]).sum()
            squares[a, b] = squares[b, a] = square
            if square != 0:
                inverse[a, b] = inverse[b, a] = 1 / np.sqrt(square)
                smallest, largest = min(smallest, square), max(largest, square)
    return smallest, largest


@numba.njit(cache=True)
def _pairs(squares, inverse, theirs, their_inverse, slope):  # type: ignore[no-untyped-def]
    count = len(squares)
    ordered = count * (count - 1)
    mean, their_mean = (squares * inverse).sum() / ordered, (theirs * their_inverse).sum() / ordered
    per, their_per = (1 / mean if mean != 0 else 1.0), (1 / their_mean if their_mean != 0 else 1.0)
    loss = along = 0.0
    for a in range(count):
        for b in range(count):
            distance = squares[a, b] * inverse[a, b]
            differ = distance * per - theirs[a, b] * their_inverse[a, b] * their_per
            clipped = min(max(differ, -1.0), 1.0)
            loss += clipped * (differ - clipped / 2)
            along += clipped * distance
            slope[a, b] = clipped
    scale, by_mean = per / (2 * count**2), along * per / ordered
    for a in range(count):
        for b in range(count):
            slope[a, b] = (slope[a, b] - by_mean) * inverse[a, b] * scale
    return loss / count**2


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _walk(squares, inverse, theirs, their_inverse, vertices, slope, opposite, totals, part):  # type: ignore[no-untyped-def]
    count = len(squares)
    half, one, zero = squares.dtype.type(0.5), squares.dtype.type(1), squares.dtype.type(0)
    for a in vertices:
        # Rows of their own, from 0: an index that might be negative keeps the inner loop from using vectors.
        of_a, inverse_of_a, theirs_of_a, their_inverse_of_a = squares[a], inverse[a], theirs[a], their_inverse[a]
        total = 0.0
        for b in range(count):
            of_b, theirs_of_b, across = squares[b], theirs[b], opposite[part, b]
            d, r, their_d, their_r = of_a[b], half * inverse_of_a[b], theirs_of_a[b], half * their_inverse_of_a[b]
            loss = edge = side = zero
            for c in range(count):
                scale = r * inverse_of_a[c]
                cosine = (d + of_a[c] - of_b[c]) * scale
                differ = cosine - (their_d + theirs_of_a[c] - theirs_of_b[c]) * (their_r * their_inverse_of_a[c])
                clipped = one if differ > one else (-one if differ < -one else differ)
                loss += clipped * (differ - half * clipped)
                weight = clipped * scale  # half of w r r, as scale is
                edge += weight
                side += clipped * cosine
                across[c] += weight
            slope[a, b] = 2 * edge - inverse_of_a[b] ** 2 * side
            total += loss
        totals[a] = total
