"""What the evaluation of one model on one split gives."""

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Result:
    """One model on one split: scalars, a row per sample, a row per class."""

    metrics: dict[str, float]
    samples: pd.DataFrame
    classes: pd.DataFrame
