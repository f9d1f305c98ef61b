"""Text: the data set's own metric, accuracy, F1, correlations, figures by class, calibration."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from data import text as data
from models.artifacts import Description
from stages.evaluate import classification
from stages.evaluate.calibration import expected_calibration_error
from stages.evaluate.result import Result
from stages.parameters.text import Task


def evaluate(network: nn.Module, description: Description, prepared: Path, split: str, settings: Task) -> Result:
    """All figures of one model on one split; the data set's own metric stands first.

    A text with a score has the nearest whole score as its class: the predicted score is then the expectation of the
    class index under the model's probabilities.

    Args:
        network: in eval mode.
    """
    ids, tokens, labels = data.load(prepared, split)
    log_probabilities = classify(network, tokens, description.interface["pad"], settings.batch).double().log_softmax(1)
    probabilities = log_probabilities.exp()
    confidence, prediction = probabilities.max(1)
    correct = prediction == labels
    names = description.interface["classes"]
    found: dict[str, Any] = {
        "split": split,
        "id": ids,
        "label": labels.numpy(),
        "prediction": prediction.numpy(),
        "confidence": confidence.round(decimals=6).numpy(),
        "correct": correct.int().numpy(),
    }
    totals = classification.counts(found["label"], found["prediction"], len(names)).sum(axis=0)
    metrics: dict[str, Any] = {"accuracy": classification.accuracy(totals), "macro_f1": classification.macro_f1(totals)}
    if len(names) == 2:
        metrics["f1"] = classification.f1(totals)
    metrics["matthews"] = classification.matthews(totals)
    scores = _scores(prepared, ids)
    if scores is not None:
        expected = (probabilities * torch.arange(len(names))).sum(1).round(decimals=6).numpy()
        found |= {"predicted_score": expected, "score": scores}
        metrics["spearman"] = classification.spearman(classification.rank_sums(expected, scores).sum(axis=0))
    classes = _classes(split, names, totals)
    metrics |= {
        "worst_class": classes["recall"].min(),
        "calibration_error": expected_calibration_error(confidence, correct),
        "cross_entropy": -log_probabilities.gather(1, labels[:, None]).mean().item(),
    }
    own = data.describe(prepared)["metric"]
    metrics = {own: metrics[own], **metrics}
    return Result({name: round(float(value), 6) for name, value in metrics.items()}, pd.DataFrame(found), classes)


def classify(network: nn.Module, tokens: Tensor, pad: int, batch: int) -> Tensor:
    """(N, classes) float32 logits on the CPU. Texts of similar length share a batch, without common padding at its end.

    Args:
        tokens: (N, L) int64. pad: the token of padding.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device)
    # Padding comes last; what looks like it within a text is part of that text.
    lengths = ((tokens != pad) * torch.arange(1, tokens.shape[1] + 1)).amax(1)
    order = lengths.argsort(stable=True)
    found = []
    with torch.inference_mode():
        for rows in order.split(batch):
            part = tokens[rows, : max(int(lengths[rows[-1]]), 1)]
            found.append(network(part.to(device)).logits.float().cpu())
    logits = torch.cat(found)
    return logits[order.argsort()]


def _scores(prepared: Path, ids: list[str]) -> np.ndarray | None:
    """(N,) the scores that texts were given; None where they have none."""
    manifest = pd.read_csv(prepared / "manifest.csv", dtype={"id": str}, keep_default_na=False, na_values=[""])
    return manifest.set_index("id").loc[ids, "score"].to_numpy(dtype=np.float64) if "score" in manifest else None


def _classes(split: str, names: list[str], totals: np.ndarray) -> pd.DataFrame:
    """A row per class; no recall where there are no samples of it, no precision where it is never predicted."""
    hits, predicted, actual = np.split(totals, 3)
    with np.errstate(invalid="ignore"):
        recall, precision = hits / actual, hits / predicted
    return pd.DataFrame(
        {
            "split": split,
            "class": names,
            "label": range(len(names)),
            "samples": actual.astype(int),
            "recall": recall.round(6),
            "precision": precision.round(6),
            "f1": classification.f1_by_class(totals).round(6),
        }
    )
