"""Samples of the test split: which of them are shown, and what every model says of one."""

from typing import Any

import pandas as pd

from data.files import digest
from stages.report.page import Html, tag
from stages.report.results import Model


def of_test(model: Model) -> pd.DataFrame:
    """Its test samples by id; none where no file tells."""
    table = model.samples if model.samples is not None else pd.DataFrame(columns=["split", "id"])
    return table[table["split"] == "test"].set_index("id")


def choose(tables: dict[str, pd.DataFrame], disagreed: int, others: int) -> tuple[list[str], int]:
    """Ids to show: first where some models are right and some wrong, then others; and the number of the former.

    The order is that of a digest of the id: it looks random and is the same for ever.

    Args:
        tables: of each model, a row per test sample, by id, with the column `correct`.
        disagreed: how many of the former at most. others: how many more.
    """
    correct = pd.concat([found["correct"] for found in tables.values()], axis=1, join="inner")
    mixed = correct.nunique(axis=1) > 1
    order = sorted((str(name) for name in correct.index), key=digest)
    first = [name for name in order if mixed[name]]
    rest = [name for name in order if not mixed[name]]
    shown = first[:disagreed]
    return shown + rest[: disagreed + others - len(shown)], len(first)


def opinion(model: str, row: Any, answer: str) -> Html:
    """One line: right or wrong, who, what it takes the sample for, and how sure it is, if it says so.

    Args:
        row: of its samples.
    """
    right = bool(row["correct"])
    mark = tag("span", "\N{CHECK MARK}" if right else "\N{BALLOT X}", title="right" if right else "wrong")
    sure = None if pd.isna(row["confidence"]) else f" {100 * row['confidence']:.0f} %"
    said = tag("span", tag("b", answer), sure)
    return tag("li", mark, tag("span", model), said, class_="right" if right else "wrong")
