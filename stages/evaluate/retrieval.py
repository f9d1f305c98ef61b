"""How well embeddings tell classes apart that no training has seen: neighbours, pairs of images, a gallery.

Neighbours are those of `stages.neighbours`; pairs and gallery are compared by the cosine. Among equals whatever is
wrong comes first everywhere, so that embeddings that collapsed find nothing.
"""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.neighbours import CHUNK, distances


def nearest(embeddings: Tensor, labels: Tensor, count: int, chunk: int = CHUNK) -> Tensor:
    """(N, count) int64: the rows of the nearest other samples, the nearest first; all others where there are fewer.

    By Euclidean distance. Among equals the other classes come first, as in `same_class_rank`, then the smaller row: a
    sample's first neighbour is of its class exactly where its rank is 1.

    Args:
        embeddings: (N, D); distances are compared as float32. labels: (N,).
    """
    count, found = min(count, len(embeddings) - 1), []
    own = torch.arange(len(embeddings), device=embeddings.device)
    for rows, distance in distances(embeddings, chunk):
        same = labels[rows, None] == labels[None, :]
        # One whole number each, in the order that is wanted: the bits of a float that is not negative have its order.
        order = distance.float().view(torch.int32).long() << 32 | same.long() << 31 | own
        order.diagonal(rows.start).fill_(torch.iinfo(torch.int64).max)
        found.append(order.topk(count, largest=False).indices)
    return torch.cat(found)


def clustering(embeddings: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    """`map_at_r` and `nmi` of a split; nothing where no class has two samples.

    MAP@R is the mean, over samples, of the average precision among the R nearest others, R being how many others its
    class has. NMI compares the classes with as many clusters, found by k-means on one thread: sums of several have no
    fixed order. Both by pytorch-metric-learning.

    Args:
        embeddings: (N, D) float32. labels: (N,). seed: of k-means.

    Source: Musgrave et al. 2020, "A metric learning reality check", section 3.2; HORKD card 6 (unseen classes).
    """
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    if int(labels.bincount().max()) < 2:
        return {}

    def neighbours(query: Tensor, count: int, reference: Tensor, ref_includes_query: bool) -> tuple[None, Tensor]:
        return None, nearest(query, labels, count)

    def clusters(query: Tensor, count: int) -> Tensor:
        with threadpool_limits(1), warnings.catch_warnings():
            # Fewer different points than clusters: what that is worth is what is measured.
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = KMeans(count, n_init=1, random_state=seed).fit_predict(query.double().cpu().numpy())
        return torch.from_numpy(found)

    calculator = AccuracyCalculator(
        include=("mean_average_precision_at_r", "NMI"),
        k="max_bin_count",
        device=embeddings.device,
        knn_func=neighbours,
        kmeans_func=clusters,
    )
    found = calculator.get_accuracy(embeddings, labels)
    return {"map_at_r": float(found["mean_average_precision_at_r"]), "nmi": float(found["NMI"])}


def cosine(embeddings: Tensor) -> Tensor:
    """(N, D) embeddings scaled to length 1, float64; what is 0 stays 0. Their products are cosines."""
    return F.normalize(embeddings.double(), dim=1, eps=torch.finfo(torch.float64).tiny)


def best_threshold(similarity: np.ndarray, same: np.ndarray) -> float:
    """The threshold with the highest accuracy, a pair being of one class where its similarity is no lower.

    It lies in the middle between two pairs, or is infinite where all pairs fall on one side; of several the lowest.

    Args:
        similarity: (P,). same: (P,) bool.
    """
    values, place = np.unique(similarity, return_inverse=True)
    alike = np.bincount(place, same, minlength=len(values))
    apart = np.bincount(place, ~same, minlength=len(values))
    # At threshold i, the first i values are rejected.
    right = np.append(alike[::-1].cumsum()[::-1], 0) + np.append(0, apart.cumsum())
    middle = (values[1:] + values[:-1]) / 2
    return float(np.concatenate([[-np.inf], middle, [np.inf]])[right.argmax()])


def verification(similarity: np.ndarray, same: np.ndarray, fold: np.ndarray) -> tuple[float, float]:
    """Accuracy on pairs, mean and standard error over folds; each with the threshold that is best on the others.

    Args:
        similarity: (P,). same: (P,) bool. fold: (P,) integers, at least two different ones.

    Source: Huang et al. 2007, "Labeled Faces in the Wild", section V (view 2); HORKD card 6.
    """
    found = []
    for one in np.unique(fold):
        inside = fold == one
        threshold = best_threshold(similarity[~inside], same[~inside])
        found.append(np.mean((similarity[inside] >= threshold) == same[inside]))
    return float(np.mean(found)), float(np.std(found, ddof=1)) / math.sqrt(len(found))


def true_accepts(embeddings: Tensor, labels: Tensor, rates: Sequence[float], chunk: int = CHUNK) -> list[float]:
    """For each rate the share of pairs of one class that are accepted at the lowest threshold whose false accepts are
    at most that share of the pairs of two classes. All pairs of the samples, by cosine; nothing where there are none of
    either kind.

    Args:
        embeddings: (N, D). labels: (N,). rates: between 0 and 1.
    """
    unit = cosine(embeddings)
    own = torch.arange(len(unit), device=unit.device)
    alike, apart = [], []
    for rows, part in zip(own.split(chunk), unit.split(chunk), strict=True):
        similarity, later = part @ unit.T, own[None, :] > rows[:, None]
        same = labels[rows, None] == labels[None, :]
        alike.append(similarity[later & same].cpu().numpy())
        apart.append(similarity[later & ~same].cpu().numpy())
    right, wrong = np.concatenate(alike), np.concatenate(apart)
    if not len(right) or not len(wrong):
        return []
    falling, found = np.sort(wrong)[::-1], []
    for rate in rates:
        # Above the first of them that may not be accepted. The share is a product of floats: 0.1 of 30 pairs are 3.
        allowed = math.floor(rate * len(wrong) * (1 + 1e-12))
        limit = falling[allowed] if allowed < len(wrong) else -np.inf
        found.append(float((right > limit).mean()))
    return found


def rank_1(gallery: Tensor, probes: Tensor, labels: Tensor) -> float | None:
    """Share of probes whose nearest in the gallery, by cosine, is of their class; None where there is no probe.

    The gallery holds the first sample of every class, all others are probes; among equals the others come first.

    Args:
        gallery: (N, D) embeddings of all samples, as they look in a gallery. probes: (N, D) of the same samples, as
            they look when they are sought. labels: (N,).
    """
    classes, place = labels.unique(return_inverse=True)
    own = torch.arange(len(labels), device=labels.device)
    first = own.new_full((len(classes),), len(labels)).scatter_reduce(0, place, own, "amin")
    sought = own[own != first[place]]
    if not len(sought):
        return None
    similarity = cosine(probes[sought]) @ cosine(gallery[first]).T
    theirs = similarity.gather(1, place[sought, None])
    others = similarity.scatter(1, place[sought, None], -float("inf"))
    return (theirs[:, 0] > others.amax(1)).double().mean().item()
