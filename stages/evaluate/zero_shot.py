"""Zero-shot recognition: accuracy on seen and unseen classes, the trade-off between them, telling the two apart.

All accuracies are means over classes (D3GZSL card 3.10). What is known of a sample stands in a table, the columns of
`answers` and its label: the best seen class, the best of all others, and the best of the unseen classes of its split,
each with its logit. Answers under any handicap of the seen classes follow from it, without the logits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from data import zero_shot as data
from models.artifacts import Description, load_model
from stages import paths
from stages.evaluate.result import Result
from stages.parameters.zero_shot import Task

SEEN, ADDED = "seen", "added"
# The role of the classes that are unseen in a split.
UNSEEN = {"validation": "validation", "test": "unseen"}
# Where there is no such class.
NONE = -1
COLUMNS = [
    *("split", "id", "label", "prediction", "confidence", "correct", "calibrated", "seen"),
    *("seen_prediction", "seen_score", "unseen_prediction", "unseen_score", "rival_prediction", "rival_score"),
]
# Harmonic means that differ by less are equal: they are sums in another order.
DECIMALS = 12


def class_accuracy(correct: np.ndarray, labels: np.ndarray, classes: Iterable[int]) -> float:
    """Mean over classes of the share of their samples that is right.

    Args:
        correct: (N,) 0 or 1. labels: (N,) integers. classes: over which the mean is taken; other samples do not count.

    Raises:
        ValueError: there is no class, or one has no sample.

    Source: Xian et al. 2019, "Zero-shot learning: a comprehensive evaluation"; D3GZSL card 3.10.
    """
    wanted = np.asarray(list(classes))
    if missing := sorted(set(wanted.tolist()) - set(labels.tolist())):
        raise ValueError(f"an accuracy over classes needs samples of each, and there are none of {missing}")
    if not len(wanted):
        raise ValueError("an accuracy over classes needs a class")
    return float(np.mean([correct[labels == label].mean() for label in wanted]))


def harmonic_mean(seen: float, unseen: float) -> float:
    """2 S U / (S + U); 0 where both are 0."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen > 0 else 0.0


def answers(logits: np.ndarray, seen: Sequence[int], unseen: Sequence[int]) -> pd.DataFrame:
    """What every sample is taken for, among all classes and among some. Of equal logits the first class wins.

    Classes that are in neither list compete as well: they are rivals of the seen ones, but `unseen_prediction` is
    never one of them. Where there is no class of a kind, the prediction is -1 and the score NaN.

    Args:
        logits: (N, C). seen, unseen: columns.

    Returns:
        prediction, and prediction and score by the names seen, unseen, and rival (any class that is not seen).
    """
    rivals = [label for label in range(logits.shape[1]) if label not in set(seen)]
    found = {"prediction": logits.argmax(1)}
    for name, classes in (("seen", seen), ("unseen", unseen), ("rival", rivals)):
        chosen = np.sort(np.asarray(classes, dtype=np.int64))
        if len(chosen):
            best = chosen[logits[:, chosen].argmax(1)]
            score = logits[np.arange(len(logits)), best].astype(np.float64)
        else:
            best, score = np.full(len(logits), NONE), np.full(len(logits), np.nan)
        found |= {f"{name}_prediction": best, f"{name}_score": score}
    return pd.DataFrame(found)


def handicapped(samples: pd.DataFrame, handicap: float) -> np.ndarray:
    """(N,) predictions after the handicap is subtracted from the logits of all seen classes; as plain argmax would.

    Args:
        samples: columns of `answers`; without rivals nothing changes.

    Source: calibrated stacking, Chao et al. 2016, "An empirical study and analysis of generalized zero-shot learning
    for object recognition in the wild".
    """
    ours, theirs = samples["seen_prediction"].to_numpy(), samples["rival_prediction"].to_numpy()
    lead = _lead(samples)
    return np.where((lead > handicap) | ((lead == handicap) & (ours < theirs)) | (theirs == NONE), ours, theirs)


@dataclass(frozen=True)
class TradeOff:
    """Accuracy on seen against accuracy on unseen classes, as the handicap of the seen ones grows.

    The curve has a point per interval of handicaps within which no answer changes. At its ends, which are leads of
    samples, two logits are equal; `handicapped` knows what wins there.

    Attributes:
        handicaps: (K,) ascending: the middle of each interval, and what lies 1 beyond the outermost leads.
        seen: (K,) never rising. unseen: (K,) never falling.
    """

    handicaps: np.ndarray
    seen: np.ndarray
    unseen: np.ndarray

    @property
    def area(self) -> float:
        """AUSUC: area under the points (unseen, seen) joined by lines, between the two axes.

        Samples with the same lead change at once, and the line between is straight, as in a ROC curve.

        Source: Chao et al. 2016, as of `handicapped`.
        """
        return float((np.diff(self.unseen) * (self.seen[1:] + self.seen[:-1]) / 2).sum())


def trade_off(samples: pd.DataFrame) -> TradeOff:
    """Every pair of accuracies that a handicap of the seen classes can give.

    Args:
        samples: of seen and of unseen classes; columns of `answers`, label, and seen (1 if its class is seen).
    """
    labels, is_seen = samples["label"].to_numpy(), samples["seen"].to_numpy() == 1
    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    classes = [len(np.unique(labels[kind])) for kind in (is_seen, ~is_seen)]
    # What a sample adds to the accuracy of its kind: each class weighs the same.
    share = 1.0 / (counts[place] * np.where(is_seen, *classes))
    lead, at = np.unique(_lead(samples), return_inverse=True)
    lost, won = (
        np.bincount(at, share * right, minlength=len(lead))
        for right in (
            is_seen & (samples["seen_prediction"].to_numpy() == labels),
            ~is_seen & (samples["rival_prediction"].to_numpy() == labels),
        )
    )
    middle = (lead[1:] + lead[:-1]) / 2
    return TradeOff(
        handicaps=np.concatenate([lead[:1] - 1, middle, lead[-1:] + 1]),
        # Summed from its own 0, so that it is 0 exactly.
        seen=np.append(lost[::-1].cumsum()[::-1], 0.0),
        unseen=np.append(0.0, won.cumsum()),
    )


def calibrate(samples: pd.DataFrame) -> float:
    """The handicap with the highest harmonic mean; of several the one nearest to 0, and 0 where there is nothing to
    weigh: no samples of seen or none of unseen classes, or a model without any class but the seen ones.

    It lies in the middle of its interval: at an end, rounding would decide.

    Args:
        samples: as of `trade_off`; of the validation split.
    """
    if samples["seen"].nunique() < 2 or (samples["rival_prediction"] == NONE).any():
        return 0.0
    curve = trade_off(samples)
    handicaps = np.append(0.0, curve.handicaps)
    plain = [_accuracy(samples, handicapped(samples, 0.0), kind) for kind in (1, 0)]
    pairs = zip(np.append(plain[0], curve.seen), np.append(plain[1], curve.unseen), strict=True)
    found = np.array([harmonic_mean(*pair) for pair in pairs]).round(DECIMALS)
    best = np.flatnonzero(found == found.max())
    return float(handicaps[best[np.abs(handicaps[best]).argmin()]])


def detection(inside: np.ndarray, outside: np.ndarray) -> float:
    """Area under the ROC curve: the share of pairs in which the sample inside scores higher, equals counting half.

    Args:
        inside, outside: scores (N,) and (M,), of which neither is empty.
    """
    ranks = pd.Series(np.concatenate([inside, outside])).rank().to_numpy()
    first = len(inside)
    return float((ranks[:first].sum() - first * (first + 1) / 2) / (first * len(outside)))


def evaluate(network: nn.Module, description: Description, prepared: Path, split: str, settings: Task) -> Result:
    """All figures of one model on one split.

    Of a model that knows the seen classes only, there are accuracies and detection; others have the trade-off as well,
    with the handicap that is best on the validation split. What needs samples that a split lacks is left out, and
    classes without a sample in it count nowhere. A student whose epochs are kept beside it has
    `test_best_harmonic_mean` on the test split: the best of them there, which no selection may use.

    Args:
        network: in eval mode; it is fed images if it is an encoder, else features.
    """
    dataset = data.describe(prepared)
    known, answered = dataset["classes"], description.interface["classes"]
    names = [*known, *(name for name in answered if name not in known)]
    roles = [*dataset["roles"], *[ADDED] * (len(names) - len(known))]
    kind = Kind([names.index(name) for name in answered], roles)
    what = "images" if description.network["name"] == "encoder" else "features"
    ids, inputs, labels = data.load(prepared, split, what)
    samples = _samples(_logits(network, inputs, settings.batch), labels, kind, split)
    selected = samples
    if split != "validation":
        _, others, theirs = data.load(prepared, "validation", what)
        selected = _samples(_logits(network, others, settings.batch), theirs, kind, "validation")
    handicap = calibrate(selected)
    samples = samples.assign(
        split=split, id=ids, calibrated=(handicapped(samples, handicap) == samples["label"]).astype(int)
    )
    metrics = _metrics(samples, handicap)
    kept = paths.companions(description.task, description.name) / "snapshots"
    if split == "test" and description.kind == "student" and "harmonic_mean" in metrics and kept.is_dir():
        students, _ = load_model(kept)
        found = (_logits(student, inputs, settings.batch) for student in cast(nn.ModuleList, students))
        tables = [_samples(logits, labels, kind, split) for logits in found]
        metrics["test_best_harmonic_mean"] = max(_metrics(table, 0.0)["harmonic_mean"] for table in tables)
    metrics = {name: round(value, 6) for name, value in metrics.items()}
    return Result(metrics, samples[COLUMNS], _classes(split, names, samples, roles))


@dataclass(frozen=True)
class Kind:
    """How a model's classes relate to the data set's.

    Attributes:
        numbers: of every class that it answers with, its number in the data set, ascending; new ones come last.
        roles: by that number.
    """

    numbers: list[int]
    roles: list[str]

    def columns(self, role: str) -> list[int]:
        """The model's columns of the classes that have a role."""
        return [column for column, number in enumerate(self.numbers) if self.roles[number] == role]


def _samples(logits: Tensor, labels: Tensor, kind: Kind, split: str) -> pd.DataFrame:
    """What follows from logits (N, C) and labels (N,): classes by the data set's numbers, and how familiar each sample
    is, the largest log-probability among the seen classes alone.
    """
    seen = kind.columns(SEEN)
    table = answers(logits.numpy(), seen, kind.columns(UNSEEN[split]))
    numbers, label = np.array([*kind.numbers, NONE]), labels.numpy()
    for column in [name for name in table.columns if name.endswith("prediction")]:
        table[column] = numbers[table[column]]
    return table.assign(
        label=label,
        confidence=logits.double().softmax(1).amax(1).round(decimals=6).numpy(),
        correct=(table["prediction"] == label).astype(int),
        seen=np.isin(label, np.flatnonzero(np.array(kind.roles) == SEEN)).astype(int),
        familiar=logits[:, seen].double().log_softmax(1).amax(1).numpy(),
    )


def _logits(network: nn.Module, inputs: Tensor, batch: int) -> Tensor:
    """(N, C) float32 on the CPU.

    Args:
        inputs: (N, D) float32 features, or (N, C, s, s) uint8 images.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device)
    with torch.inference_mode():
        parts = (part.to(device) for part in inputs.split(batch))
        found = [network(data.to_unit(part) if part.dim() == 4 else part).logits.float().cpu() for part in parts]
    return torch.cat(found)


def _lead(samples: pd.DataFrame) -> np.ndarray:
    """(N,) by how much the best seen class is above the best of all others: the handicap that makes them equal."""
    return samples["seen_score"].to_numpy(dtype=np.float64) - samples["rival_score"].to_numpy(dtype=np.float64)


def _accuracy(samples: pd.DataFrame, predictions: np.ndarray, seen: int) -> float:
    """Class-averaged, over the classes of one kind that have a sample."""
    labels = samples["label"].to_numpy()
    return class_accuracy(predictions == labels, labels, np.unique(labels[samples["seen"] == seen]))


def _metrics(samples: pd.DataFrame, handicap: float) -> dict[str, float]:
    """Figures of one split, the main one first."""
    there = {name: kind for name, kind in (("seen", 1), ("unseen", 0)) if (samples["seen"] == kind).any()}
    plain = {name: _accuracy(samples, samples["prediction"].to_numpy(), kind) for name, kind in there.items()}
    if len(there) < 2:
        return plain
    familiar, is_seen = samples["familiar"].to_numpy(), samples["seen"].to_numpy() == 1
    metrics = {"harmonic_mean": harmonic_mean(plain["seen"], plain["unseen"]), **plain}
    if (samples["rival_prediction"] != NONE).all():
        predictions = handicapped(samples, handicap)
        calibrated = [_accuracy(samples, predictions, kind) for kind in (1, 0)]
        metrics |= {
            "unseen_only": _accuracy(samples, samples["unseen_prediction"].to_numpy(), 0),
            "area": trade_off(samples).area,
            "calibrated_harmonic_mean": harmonic_mean(*calibrated),
            "calibrated_seen": calibrated[0],
            "calibrated_unseen": calibrated[1],
            "handicap": handicap,
        }
    return {**metrics, "detection": detection(familiar[is_seen], familiar[~is_seen])}


def _classes(split: str, names: list[str], samples: pd.DataFrame, roles: list[str]) -> pd.DataFrame:
    """A row per class of the data set and of the model; no accuracy where the split has no sample of it."""
    grouped = samples.groupby("label")["correct"]
    every = range(len(names))
    return pd.DataFrame(
        {
            "split": split,
            "class": names,
            "label": every,
            "role": roles,
            "samples": grouped.size().reindex(every, fill_value=0),
            "accuracy": grouped.mean().round(6).reindex(every),
        }
    )
