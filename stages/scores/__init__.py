"""Figures that are made from sums over samples, and how sure they are: for the gates and for the report.

Accuracy is a sum of hits over a sum of ones; mIoU is a mean over classes of summed intersections over summed unions.
One module per task, `stages/scores/<task>.py`, says which sums, in two functions:

    statistics(samples, metric)     rows of reports/evaluation to a row per sample, by id, of columns that add up
    figure(totals, metric)          sums (..., K) of the columns to the metric (...); NaN where nothing is to be counted

Whatever is drawn, weighed or left out of a test set then needs only sums of rows. torch is not imported here.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

Figure = Callable[[np.ndarray], np.ndarray]

# Counts that are made at once. More fall out of the processor's cache and take longer.
CHUNK = 250_000
# By how much a sample is weighed up and down for its influence; the error of that is the square of it, relative.
STEP = 1e-3
# So many times as many samples as different rows: as much longer takes the count of a row than the draw of a sample.
FEW = 10


@dataclass(frozen=True)
class Scores:
    """What one model did on every sample of a split.

    Attributes:
        statistics: a row per sample, by id. figure: sums (..., K) of its columns to the metric (...).
    """

    statistics: pd.DataFrame
    figure: Figure

    @property
    def rows(self) -> np.ndarray:
        """(N, K) float64."""
        return self.statistics.to_numpy(dtype=np.float64)

    @property
    def value(self) -> float:
        """The metric on all samples; NaN where nothing is to be counted."""
        return float(self.figure(self.rows.sum(axis=0)))

    @property
    def error(self) -> float:
        """Standard error of the metric over the choice of samples."""
        return standard_error(influence(self.rows, self.figure))

    def in_order_of(self, other: "Scores") -> "Scores":
        """The same samples in the order of another model's."""
        return Scores(self.statistics.reindex(other.statistics.index), self.figure)


def scores(task: str, samples: pd.DataFrame, metric: str) -> Scores:
    """A model's scores from its rows of reports/evaluation, of one split."""
    module = importlib.import_module(f"stages.scores.{task}")
    return Scores(module.statistics(samples, metric), partial(module.figure, metric=metric))


def comparable(ours: Scores, theirs: Scores) -> bool:
    """Whether both are about the same samples, each once, in whatever order."""
    one, other = ours.statistics.index, theirs.statistics.index
    return len(one) == len(other) == len(set(one)) and set(one) == set(other)


def influence(rows: np.ndarray, figure: Figure) -> np.ndarray:
    """(N,) how much the figure changes per unit of weight that each sample gets more, all others having weight 1.

    Args:
        rows: (N, K).
    """
    totals, step = rows.sum(axis=0), STEP * rows
    return (figure(totals + step) - figure(totals - step)) / (2 * STEP)


def standard_error(influences: np.ndarray) -> float:
    """Standard error of a figure from the (N,) influences of independent samples: the root of their squared sum.

    For a mean this is its usual standard error, s / sqrt(N) with s over N; for the difference of two figures on the
    same samples, the influences are subtracted first, which takes out what makes a sample hard for both.

    Source: Jaeckel 1972, "The infinitesimal jackknife"; Efron 1982, "The jackknife, the bootstrap and other resampling
    plans", chapter 6.
    """
    return math.sqrt(float((influences**2).sum()))


def bootstrap(models: Sequence[Scores], resamples: int, seed: int) -> np.ndarray:
    """(models, resamples) figures of all models on the same samples, drawn with replacement.

    A resample is how often each row was drawn; its sums are these counts times the rows. Where most rows repeat, as
    hits and misses do, the counts of the different ones are drawn at once (multinomial: the same distribution), which
    takes no longer for a large test set. Memory is bounded.

    Args:
        models: their rows stand for the same N samples in the same order.

    Raises:
        ValueError: they do not.
    """
    ids = models[0].statistics.index
    for other in models[1:]:
        if not ids.equals(other.statistics.index):
            raise ValueError(f"rows of {len(ids)} and of {len(other.statistics)} samples that are not the same")
    tables, size = [model.rows for model in models], len(ids)
    _, first, copies = np.unique(np.concatenate(tables, axis=1), axis=0, return_index=True, return_counts=True)
    few = FEW * len(first) <= size
    if few:
        tables = [table[first] for table in tables]
    generator = np.random.default_rng(seed)
    found = np.empty((len(models), resamples))
    most = max(1, CHUNK // len(tables[0]))
    for start in range(0, resamples, most):
        count = min(most, resamples - start)
        if few:
            counts = generator.multinomial(size, copies / size, size=count)
        else:
            drawn = generator.integers(size, size=(count, size)) + size * np.arange(count)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)
        for model, table, into in zip(models, tables, found, strict=True):
            into[start : start + count] = model.figure(counts.astype(np.float64) @ table)
    return found


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)
