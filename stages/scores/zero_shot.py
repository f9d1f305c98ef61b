"""Zero-shot recognition: per class, samples that are right and samples there are, of seen and of unseen classes."""

import numpy as np
import pandas as pd

from stages.scores import ratio

CALIBRATED = "calibrated_harmonic_mean"


def statistics(samples: pd.DataFrame, metric: str) -> pd.DataFrame:
    """hits, then samples of seen, then samples of unseen classes, each by class: 0 or 1 in a row, by id.

    Classes of which there is no sample have no columns: they count in no figure.

    Args:
        metric: `harmonic_mean`, `seen`, `unseen`, `unseen_only` or `calibrated_harmonic_mean`.
    """
    table = samples.set_index("id")
    labels, is_seen = table["label"].to_numpy(), table["seen"].to_numpy() == 1
    if metric == "unseen_only":
        right = ~is_seen & (table["unseen_prediction"].to_numpy() == labels)
    else:
        right = table["calibrated" if metric == CALIBRATED else "correct"].to_numpy() == 1
    classes = np.unique(labels)
    own = labels[:, None] == classes
    found = np.concatenate([own & kind[:, None] for kind in (right, is_seen, ~is_seen)], axis=1)
    columns = [f"{kind}_{label}" for kind in ("hits", "seen", "unseen") for label in classes]
    return pd.DataFrame(found.astype(np.float64), index=table.index, columns=columns)


def figure(totals: np.ndarray, metric: str) -> np.ndarray:
    """(..., 3 C) to the metric (...); a class that a resample lost is left out of its mean.

    The harmonic mean is NaN where all of the seen or all of the unseen classes are lost, and 0 where both are never
    found.
    """
    hits, seen, unseen = np.split(totals, 3, axis=-1)
    if metric == "seen":
        return _mean(hits, seen)
    if metric in ("unseen", "unseen_only"):
        return _mean(hits, unseen)
    both = _mean(hits, seen), _mean(hits, unseen)
    total = both[0] + both[1]
    return np.where(total == 0, 0.0, ratio(2 * both[0] * both[1], total))


def _mean(hits: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """(..., C) each to the mean share (...) over the classes that have samples."""
    present = samples > 0
    shares = np.divide(hits, samples, out=np.zeros(samples.shape), where=present)
    return ratio(shares.sum(axis=-1), present.sum(axis=-1))
