"""Who lies nearest to whom: ranks of neighbours among embeddings, for training, evaluation and export.

Neighbours are those of the Euclidean distance between embeddings as they are. Among equals whatever is wrong comes
first, so that embeddings that collapsed, or are no numbers, find nothing.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Rows of a table of distances that are made at once.
CHUNK = 1024


def distances(embeddings: Tensor, chunk: int = CHUNK) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time: their distances (rows, N) to all samples; infinite to themselves and to what is no number.

    Args:
        embeddings: (N, D).
    """
    for start in range(0, len(embeddings), chunk):
        rows = slice(start, start + chunk)
        # Without a matrix product: what it rounds away would decide between near neighbours.
        distance = torch.cdist(embeddings[rows], embeddings, compute_mode="donot_use_mm_for_euclid_dist")
        distance = distance.nan_to_num(nan=float("inf"), posinf=float("inf"))
        distance.diagonal(start).fill_(float("inf"))
        yield rows, distance


def same_class_rank(embeddings: Tensor, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """(N,) int64: the place, from 1, of the nearest other sample of the same class among all other samples.

    0 where the class has no other sample. Leave-one-out; among equals the other classes come first.

    Args:
        embeddings: (N, D). labels: (N,).
    """
    ranks = []
    for rows, distance in distances(embeddings, chunk):
        same = labels[rows, None] == labels[None, :]
        same.diagonal(rows.start).fill_(False)
        nearest = distance.masked_fill(~same, float("inf")).amin(1, keepdim=True)
        closer = (distance <= nearest) & ~same
        closer.diagonal(rows.start).fill_(False)
        ranks.append(torch.where(same.any(1), closer.sum(1) + 1, 0))
    return torch.cat(ranks)


def recall(ranks: Tensor, at: int = 1) -> float | None:
    """Recall@K: the share of ranks <= K among samples whose class has another; None where no class has two.

    Args:
        ranks: (N,), see `same_class_rank`.
    """
    asked = ranks[ranks > 0]
    return (asked <= at).double().mean().item() if len(asked) else None
