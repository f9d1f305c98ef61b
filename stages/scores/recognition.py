"""Recognition: a test image counts 1 where it is recognised, else 0; the metric is the mean."""

import numpy as np
import pandas as pd

from stages.scores import ratio


def statistics(samples: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Hits and questions by id.

    Args:
        metric: `top_1` or `recall_at_1`.
    """
    if metric == "top_1":
        hit = samples.set_index("id")["correct"]
    else:
        # As in evaluation: an image whose class has no other image asks no question.
        hit = samples[samples["same_class_rank"] > 0].set_index("id")["same_class_rank"] <= 1
    return pd.DataFrame({"hits": hit.astype(float), "questions": 1.0}, index=hit.index)


def figure(totals: np.ndarray, metric: str) -> np.ndarray:
    """(..., 2) to the share (...) of hits, whatever the metric."""
    return ratio(totals[..., 0], totals[..., 1])
