"""Policies: per rollout whether it succeeds, in which way, and its reward; or the loss on an episode."""

import numpy as np
import pandas as pd

from stages.scores import ratio


def statistics(samples: pd.DataFrame, metric: str) -> pd.DataFrame:
    """What adds up, by id: a sum and how many are in it; of `entropy` the successes of every way, and rollouts.

    Args:
        metric: `success`, `reward`, `entropy` or `loss`.
    """
    table = samples.set_index("id")
    if metric == "loss":
        count = table["count"].astype(float)
        return pd.DataFrame({"loss": table["loss"] * count, "count": count}, index=table.index)
    if metric != "entropy":
        return pd.DataFrame({metric: table[metric].astype(float), "rollouts": 1.0}, index=table.index)
    every = np.arange(table["modes"].max() if len(table) else 0)
    succeeded, mode = table["success"].to_numpy() == 1, table["mode"].to_numpy()
    found = (mode[:, None] == every) & succeeded[:, None]
    columns = [f"mode_{mode}" for mode in every]
    return pd.DataFrame(found.astype(np.float64), index=table.index, columns=columns).assign(rollouts=1.0)


def figure(totals: np.ndarray, metric: str) -> np.ndarray:
    """(..., 2), or of `entropy` (..., ways + 1), to the metric (...).

    The entropy of ways, to the base of their number, is 0 where no rollout succeeds.
    """
    if metric != "entropy":
        return ratio(totals[..., 0], totals[..., 1])
    successes, rollouts = totals[..., :-1], totals[..., -1]
    shares = successes / np.maximum(successes.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    logs = np.log(shares, out=np.zeros(shares.shape), where=shares > 0)
    entropy = -(shares * logs).sum(axis=-1) / np.log(max(successes.shape[-1], 2))
    return np.where(rollouts > 0, entropy + 0.0, np.nan)
