"""Figures of labels and predictions as functions of sums over samples: for evaluation, gates and report alike.

Three numbers per class add up over samples: how often it is predicted rightly, how often it is predicted, and how often
it is the label. F1 and Matthews' correlation follow from them. Spearman's correlation follows from six sums over ranks.
All figures take sums (..., K) and give (...), NaN where there is no sample. torch is not imported here.
"""

import numpy as np
import pandas as pd

# A variance of ranks or labels below this is rounding; ranks and shares are of the order of 1.
NO_VARIANCE = 1e-12


def counts(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """(N, 3 * classes) float64: per sample, 1 at the class that is hit, at the one predicted, and at the label.

    Args:
        labels, predictions: (N,) integers.
    """
    every = np.arange(classes)
    predicted, actual = predictions[:, None] == every, labels[:, None] == every
    return np.concatenate([predicted & actual, predicted, actual], axis=1).astype(np.float64)


def accuracy(totals: np.ndarray) -> np.ndarray:
    """Share of samples that are right, of sums (..., 3 C) of `counts`."""
    hits, _, actual = np.split(totals, 3, axis=-1)
    return _divided(hits.sum(axis=-1), actual.sum(axis=-1), np.nan)


def f1_by_class(totals: np.ndarray) -> np.ndarray:
    """(..., C) harmonic mean of precision and recall, 2 hits / (predicted + actual), of sums (..., 3 C) of `counts`.

    0 for a class that is there but never hit; NaN for one that is neither a label nor predicted.
    """
    hits, predicted, actual = np.split(totals, 3, axis=-1)
    return _divided(2 * hits, predicted + actual, np.nan)


def macro_f1(totals: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that are a label or predicted, as scikit-learn has it; others are left out."""
    found = f1_by_class(totals)
    present = ~np.isnan(found)
    return _divided(np.where(present, found, 0).sum(axis=-1), present.sum(axis=-1), np.nan)


def f1(totals: np.ndarray) -> np.ndarray:
    """F1 of the second of two classes; 0 where it is neither a label nor predicted."""
    _, _, actual = np.split(totals, 3, axis=-1)
    found = np.nan_to_num(f1_by_class(totals)[..., 1])
    return np.where(actual.sum(axis=-1) > 0, found, np.nan)


def matthews(totals: np.ndarray) -> np.ndarray:
    """Correlation of labels and predictions: phi of a table of two classes, R_K of several. From sums of `counts`.

    0 where all labels or all predictions are one class: such a model tells nothing apart.

    Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation coefficient".
    """
    hits, predicted, actual = np.split(totals, 3, axis=-1)
    samples = actual.sum(axis=-1)
    one = np.maximum(samples, np.finfo(np.float64).tiny)[..., None]
    p, t = predicted / one, actual / one
    covariance = hits.sum(axis=-1) / one[..., 0] - (p * t).sum(axis=-1)
    variances = (1 - (p**2).sum(axis=-1)) * (1 - (t**2).sum(axis=-1))
    found = _divided(covariance, np.sqrt(np.maximum(variances, 0)), 0.0, NO_VARIANCE)
    return np.where(samples > 0, found, np.nan)


def rank_sums(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """(N, 6) float64: 1, x, y, x^2, y^2, x y of each sample's ranks x and y, which run from -1 to 1.

    Equal values share the mean of their ranks. A rank is a place among all N samples: it stays what it is whatever
    samples are then weighed, drawn or left out.

    Args:
        predicted, actual: (N,) numbers.
    """
    size = max(len(actual), 1)
    x, y = ((2 * pd.Series(values).rank().to_numpy() - size - 1) / size for values in (predicted, actual))
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def spearman(totals: np.ndarray) -> np.ndarray:
    """Pearson's correlation of ranks, of sums (..., 6) of `rank_sums`; 0 where one of the two has a single value."""
    one, x, y, xx, yy, xy = np.moveaxis(np.asarray(totals, dtype=np.float64), -1, 0)
    samples = np.maximum(one, np.finfo(np.float64).tiny)
    x, y = x / samples, y / samples
    variances = np.maximum(xx / samples - x * x, 0) * np.maximum(yy / samples - y * y, 0)
    found = _divided(xy / samples - x * y, np.sqrt(variances), 0.0, NO_VARIANCE)
    return np.where(one > 0, np.clip(found, -1, 1), np.nan)


def _divided(part: np.ndarray, whole: np.ndarray, otherwise: float, least: float = 0.0) -> np.ndarray:
    """part / whole; `otherwise` where the whole is no more than `least`."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, otherwise), where=whole > least)
