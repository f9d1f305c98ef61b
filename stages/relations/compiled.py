"""Triplets on processors: one compiled loop over vertex and pair, each pair once, in parallel over vertices."""

import numba
import numpy as np
import torch
from torch import Tensor

from stages.relations import Geometry, Walk


def walk(ours: Geometry, theirs: Geometry, vertices: Tensor, fused: bool) -> Walk:
    """See `Walk`. The parts that threads sum up depend on torch's number of threads, not on numba's."""
    parts = torch.get_num_threads()
    numba.set_num_threads(min(parts, numba.config.NUMBA_NUM_THREADS))
    count = len(ours.squares)
    by_edge, by_side = (np.zeros((count, count), ours.squares.numpy().dtype) for _ in range(2))
    opposite = np.zeros((parts, count, count), by_edge.dtype)
    totals = np.zeros(len(vertices))
    arrays = [array.numpy() for array in (*ours, *theirs, vertices)]
    _walk(*arrays, by_edge, by_side, opposite, totals)
    summed = opposite.sum(0, dtype=np.float64)
    # The cosine of a direction with itself is 1, or 0 where there is no direction.
    itself = (arrays[1] > 0) != (arrays[3] > 0)
    total = totals.sum() + itself[arrays[4]].sum() / 2
    results = (total, by_edge.astype(np.float64), by_side.astype(np.float64), summed + summed.T)
    return tuple(torch.as_tensor(array) for array in results)  # type: ignore[return-value]


@numba.njit(parallel=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _walk(squares, inverse, theirs, their_inverse, vertices, by_edge, by_side, opposite, totals):  # type: ignore[no-untyped-def]
    count, parts = len(squares), len(opposite)
    half = squares.dtype.type(0.5)
    one = squares.dtype.type(1)
    for part in numba.prange(parts):
        for place in range(part, len(vertices), parts):
            a = vertices[place]
            total = 0.0
            for b in range(count - 1):
                d, r, their_d, their_r = squares[a, b], half * inverse[a, b], theirs[a, b], half * their_inverse[a, b]
                loss = edge = side = squares.dtype.type(0)
                for c in range(b + 1, count):
                    scale = r * inverse[a, c]
                    cosine = (d + squares[a, c] - squares[b, c]) * scale
                    their_cosine = (their_d + theirs[a, c] - theirs[b, c]) * (their_r * their_inverse[a, c])
                    differ = cosine - their_cosine
                    clipped = one if differ > one else (-one if differ < -one else differ)
                    loss += clipped * (differ - half * clipped)
                    weight = (clipped + clipped) * scale
                    product = clipped * cosine
                    edge += weight
                    side += product
                    by_edge[a, c] += weight
                    by_side[a, c] += product
                    opposite[part, b, c] += weight
                by_edge[a, b] += edge
                by_side[a, b] += side
                total += 2 * loss
            totals[place] = total
