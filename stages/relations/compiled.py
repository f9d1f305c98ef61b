"""Triplets on processors: one compiled loop over vertex and pair, vertices shared out between threads."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import repeat

import numba
import numpy as np
import torch
from torch import Tensor

from stages.relations import Geometry, Walk

SMALLEST = 2**21  # triplets for which another thread is worth its start


def walk(ours: Geometry, theirs: Geometry, vertices: Tensor, fused: bool) -> Walk:
    """See `Walk`. What is summed up by itself depends on torch's number of threads and on the shapes alone."""
    count = len(ours.squares)
    parts = max(1, min(torch.get_num_threads(), len(vertices) * count**2 // SMALLEST))
    arrays = [array.numpy() for array in (*ours, *theirs)]
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


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads of our own: those of a second OpenMP would spin against torch's."""
    return ThreadPoolExecutor(count, "relations")


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
