"""What the evaluation of one model on one split gives."""

from dataclasses import dataclass, field

import pandas as pd


@dataclass(frozen=True)
class Result:
    """One model on one split: scalars, a row per sample, a row per class, and further tables by their names."""

    metrics: dict[str, float]
    samples: pd.DataFrame
    classes: pd.DataFrame
    further: dict[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """All tables, by the kind that stands in the names of their files."""
        return {"samples": self.samples, "classes": self.classes, **self.further}
