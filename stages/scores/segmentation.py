"""Segmentation: per image and class, pixels of the intersection and of the union of truth and prediction.

Pixels without a label are in neither. Sums over images give the IoU of the data set, exactly.
"""

import numpy as np
import pandas as pd

from stages.scores import ratio


def statistics(samples: pd.DataFrame, metric: str) -> pd.DataFrame:
    """intersection_0 .. intersection_(C-1), union_0 .. union_(C-1) by id, whatever the metric."""
    classes = sum(str(column).startswith("union_") for column in samples.columns)
    columns = [f"{kind}_{label}" for kind in ("intersection", "union") for label in range(classes)]
    return samples.set_index("id")[columns]


def figure(totals: np.ndarray, metric: str) -> np.ndarray:
    """(..., 2 C) to the metric (...).

    Args:
        metric: `miou`, the mean over the classes that are in truth or prediction, or `pixel_accuracy`.
    """
    intersection, union = np.split(totals, 2, axis=-1)
    if metric == "miou":
        present = union > 0
        shares = np.divide(intersection, union, out=np.zeros(union.shape), where=present)
        return ratio(shares.sum(axis=-1), present.sum(axis=-1))
    # Of the labelled pixels, every right one is in one union and every wrong one in two: twice the labelled pixels are
    # all unions and all intersections together.
    right = intersection.sum(axis=-1)
    return ratio(2 * right, right + union.sum(axis=-1))
