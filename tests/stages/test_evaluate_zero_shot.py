"""Figures of zero-shot recognition against loops over classes, samples and handicaps, in float64."""

import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import itertools

from zero_shot_files import CLASSES, ROLES, SEEN, Lookup, describe, write_prepared

from models.artifacts import save_model
from models.zero_shot import build
from stages.evaluate.zero_shot import (
    COLUMNS,
    answers,
    calibrate,
    class_accuracy,
    detection,
    evaluate,
    handicapped,
    harmonic_mean,
    trade_off,
)
from stages.parameters.zero_shot import Task
from stages.scores import scores

SEEDS = st.integers(0, 10_000)
SPLITS = {"validation": "validation", "test": "unseen"}


def random_case(seed: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
    """Logits, labels, seen and unseen classes; some classes may be neither, and of each labelled one there are some."""
    generator = np.random.default_rng(seed)
    every = generator.permutation(int(generator.integers(2, 10)))
    first = int(generator.integers(1, len(every)))
    second = int(generator.integers(first + 1, len(every) + 1))
    seen, unseen = sorted(every[:first].tolist()), sorted(every[first:second].tolist())
    labels = generator.permutation(np.repeat([*seen, *unseen], generator.integers(1, 6, second)))
    logits = generator.normal(size=(len(labels), len(every)))
    logits[np.arange(len(labels)), labels] += 0.7
    logits[:, seen] += generator.normal()
    if ties:  # in halves: sums and differences are exact, and many are equal
        logits = (2 * logits).round() / 2
    return logits, labels, seen, unseen


def table(logits: np.ndarray, labels: np.ndarray, seen: list[int], unseen: list[int]) -> pd.DataFrame:
    found = answers(logits, seen, unseen)
    return found.assign(label=labels, seen=np.isin(labels, seen).astype(int), id=[f"{n}" for n in range(len(labels))])


def plain_accuracy(predictions: list[int], labels: np.ndarray, classes: list[int]) -> float:
    """From the definition."""
    shares = []
    for label in classes:
        of_class = [guess == label for guess, truth in zip(predictions, labels, strict=True) if truth == label]
        shares.append(sum(of_class) / len(of_class))
    return sum(shares) / len(shares)


def plain_predictions(
    logits: np.ndarray, seen: list[int], handicap: float, allowed: list[int] | None = None
) -> list[int]:
    """The first of the largest logits, after the handicap."""
    chosen = []
    for row in logits:
        lowered = [value - handicap if label in seen else value for label, value in enumerate(row)]
        candidates = range(len(row)) if allowed is None else sorted(allowed)
        chosen.append(max(candidates, key=lambda label, lowered=lowered: (lowered[label], -label)))
    return chosen


def plain_harmonic(seen: float, unseen: float) -> float:
    return 0.0 if seen == 0 or unseen == 0 else 2 / (1 / seen + 1 / unseen)


# Accuracy and harmonic mean


def test_classes_weigh_the_same() -> None:
    labels, predictions = np.array([0, 0, 0, 0, 1]), np.zeros(5)
    assert class_accuracy(predictions == labels, labels, [0, 1]) == 0.5
    assert (predictions == labels).mean() == 0.8


def test_classes_that_are_not_asked_for_do_not_count() -> None:
    labels = np.array([0, 0, 1, 2, 2, 2])
    assert class_accuracy(np.array([1, 0, 0, 0, 1, 1]), labels, [0, 2]) == pytest.approx((1 / 2 + 2 / 3) / 2)


@pytest.mark.parametrize(("classes", "told"), [([0, 3, 1, 7], r"none of \[3, 7\]"), ([], "needs a class")])
def test_an_accuracy_over_classes_without_samples_is_an_error(classes: list[int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        class_accuracy(np.ones(3), np.array([0, 1, 1]), classes)


def test_harmonic_mean() -> None:
    assert harmonic_mean(0.6, 0.3) == pytest.approx(0.4)
    assert [harmonic_mean(0.0, 0.0), harmonic_mean(0.0, 0.7), harmonic_mean(0.7, 0.0)] == [0, 0, 0]


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_harmonic_mean_is_nearer_to_the_worse(seen: float, unseen: float) -> None:
    found, rounding = harmonic_mean(seen, unseen), 1e-12
    assert min(seen, unseen) - rounding <= found <= max(seen, unseen) + rounding
    assert found <= min(2 * seen, 2 * unseen, (seen + unseen) / 2) + rounding
    assert found == pytest.approx(plain_harmonic(seen, unseen), abs=1e-12)
    if abs(seen - unseen) > 1e-3:
        assert found < (seen + unseen) / 2


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_accuracies_are_invariant(seed: int) -> None:
    """To the order of samples, to doubling a class, to new names of the classes that keep no order."""
    logits, labels, seen, unseen = random_case(seed)
    generator = np.random.default_rng(seed)

    def figures(logits: np.ndarray, labels: np.ndarray, seen: list[int], unseen: list[int]) -> list[float]:
        found = table(logits, labels, seen, unseen)
        handicap = calibrate(found)
        parts = [class_accuracy(found["prediction"] == labels, labels, part) for part in (seen, unseen)]
        return [
            *parts,
            class_accuracy(found["unseen_prediction"] == labels, labels, unseen),
            trade_off(found).area,
            handicap,
        ]

    wanted = figures(logits, labels, seen, unseen)
    order = generator.permutation(len(labels))
    assert figures(logits[order], labels[order], seen, unseen) == pytest.approx(wanted, abs=1e-12)
    doubled = np.append(np.arange(len(labels)), np.flatnonzero(labels == labels[0]))
    assert figures(logits[doubled], labels[doubled], seen, unseen) == pytest.approx(wanted, abs=1e-12)
    names = generator.permutation(logits.shape[1])  # the new name of each class
    renamed = logits[:, names.argsort()]
    new_seen, new_unseen = names[seen].tolist(), names[unseen].tolist()
    assert figures(renamed, names[labels], new_seen, new_unseen) == pytest.approx(wanted, abs=1e-12)


# Handicaps


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.booleans(), st.integers(-8, 8))
def test_answers_under_a_handicap_are_those_of_argmax(seed: int, ties: bool, quarters: int) -> None:
    """Ties included: the first of the classes with the largest logit, whatever the handicap."""
    logits, labels, seen, unseen = random_case(seed, ties)
    found = table(logits, labels, seen, unseen)
    handicap = quarters / 4
    assert handicapped(found, handicap).tolist() == plain_predictions(logits, seen, handicap)
    assert found["prediction"].tolist() == plain_predictions(logits, seen, 0) == handicapped(found, 0).tolist()
    assert found["seen_prediction"].tolist() == plain_predictions(logits, seen, 0, seen)
    assert found["unseen_prediction"].tolist() == plain_predictions(logits, seen, 0, unseen)
    for name in ("seen", "unseen", "rival"):
        kept = found[f"{name}_prediction"] >= 0
        assert kept.all() or name != "seen"
        rows = np.arange(len(labels))
        assert (found[f"{name}_score"] == logits[rows, found[f"{name}_prediction"]])[kept].all()


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.booleans())
def test_the_trade_off_is_that_of_every_handicap(seed: int, ties: bool) -> None:
    logits, labels, seen, unseen = random_case(seed, ties)
    found = table(logits, labels, seen, unseen)
    curve = trade_off(found)
    rivals = [label for label in range(logits.shape[1]) if label not in seen]
    leads = {float(row[seen].max() - row[rivals].max()) for row in logits}
    ends = sorted(leads)
    middles = [(one + other) / 2 for one, other in itertools.pairwise(ends)]
    assert curve.handicaps == pytest.approx([ends[0] - 1, *middles, ends[-1] + 1])
    for handicap, *values in zip(curve.handicaps, curve.seen, curve.unseen, strict=True):
        guesses = plain_predictions(logits, seen, handicap)
        assert values == pytest.approx([plain_accuracy(guesses, labels, part) for part in (seen, unseen)], abs=1e-12)
    # Between two neighbouring leads nothing changes: any handicap but a lead is on the curve.
    for handicap in np.random.default_rng(seed).normal(scale=2, size=20):
        if handicap not in leads:
            guesses = plain_predictions(logits, seen, handicap)
            place = np.searchsorted(ends, handicap)
            pair = curve.seen[place], curve.unseen[place]
            assert pair == pytest.approx([plain_accuracy(guesses, labels, part) for part in (seen, unseen)], abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.booleans())
def test_the_trade_off_is_monotone_and_meets_the_axes(seed: int, ties: bool) -> None:
    logits, labels, seen, unseen = random_case(seed, ties)
    found = table(logits, labels, seen, unseen)
    curve = trade_off(found)
    assert (np.diff(curve.seen) <= 0).all()
    assert (np.diff(curve.unseen) >= 0).all()
    assert curve.seen[-1] == curve.unseen[0] == 0
    assert curve.seen[0] == pytest.approx(plain_accuracy(plain_predictions(logits, seen, 0, seen), labels, seen))
    points = sorted(zip(curve.unseen, curve.seen, strict=True), key=lambda pair: (pair[0], -pair[1]))
    trapezoids = [(b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points)]
    assert curve.area == pytest.approx(sum(trapezoids), abs=1e-12)
    assert 0 <= curve.area <= curve.seen[0] * curve.unseen[-1] + 1e-12
    # Restricted to the unseen classes, none of their samples can be taken for another.
    plain = plain_accuracy(found["prediction"].tolist(), labels, unseen)
    assert plain <= curve.unseen[-1] + 1e-12
    assert curve.unseen[-1] <= plain_accuracy(found["unseen_prediction"].tolist(), labels, unseen) + 1e-12


def test_the_area_of_perfect_and_of_hopeless_answers() -> None:
    labels = np.array([0, 0, 1, 2])
    perfect = np.array([[9, 0, 0], [8, 0, 0], [0, 9, 0], [0, 0, 7]], dtype=float)
    assert trade_off(table(perfect, labels, [0], [1, 2])).area == 1
    assert trade_off(table(-perfect[:, [0, 2, 1]], labels, [0], [1, 2])).area < 0.5
    # All leads equal: the line between the two corners.
    assert trade_off(table(np.zeros((4, 3)), labels, [0], [1, 2])).area == pytest.approx(1 * 0.5 / 2)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.booleans())
def test_no_handicap_is_better_than_the_calibrated_one(seed: int, ties: bool) -> None:
    logits, labels, seen, unseen = random_case(seed, ties)
    found = table(logits, labels, seen, unseen)
    leads = found["seen_score"] - found["rival_score"]

    def harmonic(handicap: float) -> float:
        guesses = plain_predictions(logits, seen, handicap)
        return plain_harmonic(*(plain_accuracy(guesses, labels, part) for part in (seen, unseen)))

    chosen = calibrate(found)
    best = harmonic(chosen)
    middles = trade_off(found).handicaps
    others = [0.0, *middles, *(value for value in np.linspace(-6, 6, 49) + 1 / 3 if value not in set(leads))]
    assert best == pytest.approx(max(harmonic(handicap) for handicap in others), abs=1e-12)
    equal = [abs(handicap) for handicap in [0.0, *middles] if harmonic(handicap) == pytest.approx(best, abs=1e-12)]
    assert abs(chosen) == min(equal)
    assert chosen == 0 or chosen not in set(leads)


def test_nothing_is_calibrated_without_need() -> None:
    labels = np.array([0, 0, 1, 2])
    perfect = np.array([[9, 0, 0], [8, 0, 0], [0, 9, 0], [0, 0, 7]], dtype=float)
    assert calibrate(table(perfect, labels, [0], [1, 2])) == 0
    biased = perfect + np.array([10.0, 0, 0])
    assert calibrate(table(biased, labels, [0], [1, 2])) == pytest.approx((3 + 18) / 2)
    only_seen, only_unseen = (table(perfect, labels, seen, []) for seen in ([0, 1, 2], []))
    assert calibrate(only_seen) == calibrate(only_unseen) == 0


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.booleans())
def test_detection_is_the_area_under_the_roc_curve(seed: int, ties: bool) -> None:
    generator = np.random.default_rng(seed)
    inside, outside = (generator.normal(size=int(size)) for size in generator.integers(1, 30, 2))
    if ties:
        inside, outside = inside.round(), outside.round()
    pairs = [(one > other) + (one == other) / 2 for one in inside for other in outside]
    assert detection(inside, outside) == pytest.approx(np.mean(pairs))
    truth = [1] * len(inside) + [0] * len(outside)
    assert detection(inside, outside) == pytest.approx(sklearn.roc_auc_score(truth, [*inside, *outside]))


# Whole evaluations


def logits_of(manifest: pd.DataFrame, classes: list[int], seed: int = 0) -> np.ndarray:
    """(N, C): right more often than not, and too fond of seen classes."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(len(manifest), len(classes)))
    logits += 1.5 * (manifest["label"].to_numpy()[:, None] == classes)
    return (logits + np.isin(classes, SEEN)).astype(np.float32)


def expected(
    logits: np.ndarray, manifest: pd.DataFrame, split: str, handicap: float, classes: list[int]
) -> dict[str, float]:
    """Figures of one split by loops, of a model that answers with classes of these numbers."""
    rows = np.flatnonzero(manifest["split"] == split)
    labels, part = manifest["label"].to_numpy()[rows], logits[rows].astype(np.float64)
    seen = [column for column, label in enumerate(classes) if label in SEEN]
    theirs = [label for label, role in enumerate(ROLES) if role == SPLITS[split]]
    restricted = [classes.index(label) for label in theirs]

    def accuracies(guesses: list[int]) -> list[float]:
        named = [classes[guess] for guess in guesses]
        return [plain_accuracy(named, labels, part) for part in (SEEN, theirs)]

    plain, calibrated = (accuracies(plain_predictions(part, seen, value)) for value in (0.0, handicap))
    log_seen = part[:, seen] - np.log(np.exp(part[:, seen]).sum(1, keepdims=True))
    return {
        "harmonic_mean": plain_harmonic(*plain),
        "seen": plain[0],
        "unseen": plain[1],
        "unseen_only": accuracies(plain_predictions(part, seen, 0.0, restricted))[1],
        "calibrated_harmonic_mean": plain_harmonic(*calibrated),
        "calibrated_seen": calibrated[0],
        "calibrated_unseen": calibrated[1],
        "handicap": handicap,
        "detection": float(sklearn.roc_auc_score(np.isin(labels, SEEN), log_seen.max(1))),
    }


def best_handicap(logits: np.ndarray, manifest: pd.DataFrame) -> float:
    """On the validation split, over a fine grid: any handicap of the best interval gives the same answers there."""
    rows = np.flatnonzero(manifest["split"] == "validation")
    labels, part = manifest["label"].to_numpy()[rows], logits[rows].astype(np.float64)
    columns = range(logits.shape[1])
    seen = [label for label in columns if label in SEEN]
    theirs = [label for label, role in enumerate(ROLES) if role == "validation"]
    found = {}
    for handicap in np.linspace(-5, 5, 2001):
        guesses = plain_predictions(part, seen, handicap)
        found[handicap] = plain_harmonic(*(plain_accuracy(guesses, labels, group) for group in (SEEN, theirs)))
    return max(found, key=lambda handicap: (round(found[handicap], 9), -abs(handicap)))


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("added", [0, 2])
def test_every_figure_of_a_student_is_that_of_loops(tmp_path: Path, split: str, added: int) -> None:
    manifest = write_prepared(tmp_path, seed=3)
    classes = list(range(len(CLASSES) + added))
    logits = logits_of(manifest, classes)
    student = describe([*CLASSES, *(f"new {number}" for number in range(added))])
    network = Lookup(logits)
    result = evaluate(network, student, tmp_path, split, Task(batch=16))
    assert max(shape[0] for shape in network.shown) == 16

    handicap = result.metrics["handicap"]
    wanted = expected(logits, manifest, split, handicap, classes)
    area = result.metrics.pop("area")
    assert result.metrics == pytest.approx(wanted, abs=2e-6)
    assert list(result.metrics) == list(wanted)
    on_validation = [
        expected(logits, manifest, "validation", value, classes)["calibrated_harmonic_mean"]
        for value in (handicap, best_handicap(logits, manifest), 0.0)
    ]
    assert on_validation[0] == pytest.approx(on_validation[1])
    assert on_validation[0] > on_validation[2]

    samples = result.samples
    assert list(samples) == COLUMNS
    rows = np.flatnonzero(manifest["split"] == split)
    assert samples["id"].tolist() == manifest["id"][rows].tolist()
    assert samples["label"].tolist() == manifest["label"][rows].tolist()
    assert samples["prediction"].tolist() == logits[rows].argmax(1).tolist()
    assert samples["correct"].tolist() == (logits[rows].argmax(1) == samples["label"]).astype(int).tolist()
    assert samples["seen"].tolist() == [int(label in SEEN) for label in samples["label"]]
    exponentials = np.exp(logits[rows].astype(np.float64))
    sure = (exponentials / exponentials.sum(1, keepdims=True)).max(1)
    assert samples["confidence"].to_numpy() == pytest.approx(sure, abs=2e-6)
    guesses = plain_predictions(logits[rows].astype(np.float64), SEEN, handicap)
    assert samples["calibrated"].tolist() == (guesses == samples["label"]).astype(int).tolist()
    theirs = [label for label, role in enumerate(ROLES) if role == SPLITS[split]]
    assert set(samples["unseen_prediction"]) <= set(theirs)
    assert samples["rival_score"].to_numpy() == pytest.approx(np.delete(logits[rows], SEEN, 1).max(1))
    assert (added > 0) == (samples["rival_prediction"] >= len(CLASSES)).any()
    # As whoever reads the file finds it: the curve is the same, and so is the area.
    file = tmp_path / "samples.csv"
    samples.to_csv(file, index=False)
    assert trade_off(pd.read_csv(file)).area == pytest.approx(area, abs=2e-6)

    named = result.classes
    assert list(named) == ["split", "class", "label", "role", "samples", "accuracy"]
    assert named["class"].tolist() == student.interface["classes"]
    assert named["role"].tolist() == [*ROLES, *["added"] * added]
    counts = [(samples["label"] == label).sum() for label in classes]
    assert named["samples"].tolist() == counts
    assert named["accuracy"].isna().tolist() == [count == 0 for count in counts]
    for label, accuracy in zip(named["label"], named["accuracy"], strict=True):
        if not math.isnan(accuracy):
            assert accuracy == pytest.approx(plain_accuracy(samples["prediction"], samples["label"], [label]), abs=2e-6)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_scores_give_the_figures_of_the_evaluation(tmp_path: Path, split: str) -> None:
    manifest = write_prepared(tmp_path, seed=5)
    result = evaluate(Lookup(logits_of(manifest, list(range(9)))), describe(CLASSES), tmp_path, split, Task())
    for metric in ("harmonic_mean", "seen", "unseen", "unseen_only", "calibrated_harmonic_mean"):
        assert scores("zero_shot", result.samples, metric).value == pytest.approx(result.metrics[metric], abs=1e-6)


@pytest.mark.parametrize("images", [False, True])
def test_a_teacher_knows_the_seen_classes_only(tmp_path: Path, images: bool) -> None:
    """Its columns are not the data set's numbers; an encoder is shown images."""
    manifest = write_prepared(tmp_path, seed=1, holds=["images" if images else "features"])
    logits = logits_of(manifest, SEEN)
    network = {"name": "encoder", "widths": [4], "blocks": 1} if images else None
    teacher = describe([CLASSES[label] for label in SEEN], kind="teacher", network=network)
    shown = Lookup(logits)
    result = evaluate(shown, teacher, tmp_path, "test", Task(batch=9))
    assert {len(shape) for shape in shown.shown} == {4 if images else 2}
    rows = np.flatnonzero(manifest["split"] == "test")
    labels, guesses = manifest["label"].to_numpy()[rows], np.array(SEEN)[logits[rows].argmax(1)]
    log_seen = logits[rows] - np.log(np.exp(logits[rows]).sum(1, keepdims=True))
    assert result.metrics == pytest.approx(
        {
            "harmonic_mean": 0.0,
            "seen": plain_accuracy(guesses.tolist(), labels, SEEN),
            "unseen": 0.0,
            "detection": sklearn.roc_auc_score(np.isin(labels, SEEN), log_seen.max(1)),
        },
        abs=2e-6,
    )
    assert result.samples["prediction"].tolist() == result.samples["seen_prediction"].tolist() == guesses.tolist()
    assert (result.samples["unseen_prediction"] == -1).all()
    assert result.samples[["unseen_score", "rival_score"]].isna().all(axis=None)
    assert result.samples["calibrated"].tolist() == result.samples["correct"].tolist()
    assert scores("zero_shot", result.samples, "harmonic_mean").value == 0
    assert result.classes["class"].tolist() == CLASSES


def test_without_unseen_samples_to_validate_with_there_is_no_handicap(tmp_path: Path) -> None:
    manifest = write_prepared(tmp_path, seed=2, without=("validation", "validation"))
    network = Lookup(logits_of(manifest, list(range(9))))
    validation, test = (evaluate(network, describe(CLASSES), tmp_path, split, Task()) for split in SPLITS)
    assert list(validation.metrics) == ["seen"]
    assert test.metrics["handicap"] == 0
    assert test.metrics["calibrated_harmonic_mean"] == test.metrics["harmonic_mean"]
    assert math.isnan(scores("zero_shot", validation.samples, "harmonic_mean").value)


def test_without_seen_samples_only_the_unseen_are_measured(tmp_path: Path) -> None:
    manifest = write_prepared(tmp_path, seed=2, without=("validation", "seen"))
    network = Lookup(logits_of(manifest, list(range(9))))
    validation, test = (evaluate(network, describe(CLASSES), tmp_path, split, Task()) for split in SPLITS)
    assert list(validation.metrics) == ["unseen"]
    assert test.metrics["handicap"] == 0


def test_a_class_without_a_sample_in_the_split_counts_nowhere(tmp_path: Path) -> None:
    manifest = write_prepared(tmp_path, seed=4)
    logits = logits_of(manifest, list(range(9)))
    kept = (manifest["split"] != "test") | ~manifest["label"].isin([SEEN[0], 0])
    pd.read_csv(tmp_path / "manifest.csv", dtype={"id": str}).assign(
        split=np.where(kept, manifest["split"], "train")
    ).to_csv(tmp_path / "manifest.csv", index=False)
    result = evaluate(Lookup(logits), describe(CLASSES), tmp_path, "test", Task())
    rows = np.flatnonzero(kept & (manifest["split"] == "test"))
    labels, guesses = manifest["label"].to_numpy()[rows], logits[rows].argmax(1).tolist()
    assert result.metrics["seen"] == pytest.approx(plain_accuracy(guesses, labels, SEEN[1:]), abs=2e-6)
    assert result.metrics["unseen"] == pytest.approx(plain_accuracy(guesses, labels, [4, 8]), abs=2e-6)


def test_the_test_split_says_nothing_about_the_handicap(tmp_path: Path) -> None:
    """Other test features and labels leave it alone, and other validation samples do not."""
    manifest = write_prepared(tmp_path, seed=6)
    logits = logits_of(manifest, list(range(9)))
    found = []
    for changed in ("", "test", "validation"):
        rows = np.flatnonzero(manifest["split"] == changed)
        other = logits.copy()
        other[rows] = logits[rows[::-1]]
        found.append(evaluate(Lookup(other), describe(CLASSES), tmp_path, "test", Task()).metrics)
    assert found[0]["handicap"] == found[1]["handicap"] != found[2]["handicap"]
    assert found[0]["harmonic_mean"] != found[1]["harmonic_mean"]
    labels = np.load(tmp_path / "labels.npy")
    rows = np.flatnonzero(manifest["split"] == "test")
    labels[rows] = np.roll(labels[rows], 3)
    np.save(tmp_path / "labels.npy", labels)
    moved = evaluate(Lookup(logits), describe(CLASSES), tmp_path, "test", Task()).metrics
    assert moved["handicap"] == found[0]["handicap"]
    assert moved["calibrated_harmonic_mean"] != found[0]["calibrated_harmonic_mean"]


def mlp(seed: int, hidden: int | None = 5) -> nn.Module:
    torch.manual_seed(seed)
    network = build(
        {"network": {"name": "mlp", "hidden": hidden, "encoder": None}, "interface": describe(CLASSES).interface}
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=1.0)
    return network.eval()


def test_epochs_that_were_kept_give_the_best_on_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a student on the test split only; the answers themselves are not those of the best epoch."""
    monkeypatch.chdir(tmp_path)
    prepared = Path("prepared")
    write_prepared(prepared, seed=8)
    epochs = [mlp(seed) for seed in range(5)]
    folder = Path("models/companions/zero_shot/toy/snapshots")
    folder.mkdir(parents=True)
    network = {"name": "snapshots", "hidden": 5, "count": len(epochs)}
    save_model(folder, nn.ModuleList(epochs), describe(CLASSES, "toy.snapshots", "companion", network))
    alone = [evaluate(epoch, describe(CLASSES, "other"), prepared, "test", Task()) for epoch in epochs]
    best = max(result.metrics["harmonic_mean"] for result in alone)
    result = evaluate(epochs[-1], describe(CLASSES), prepared, "test", Task())
    assert result.metrics["test_best_harmonic_mean"] == best > alone[-1].metrics["harmonic_mean"]
    assert {**alone[-1].metrics, "test_best_harmonic_mean": best} == result.metrics
    assert result.samples.equals(alone[-1].samples)
    for description, split in ((describe(CLASSES), "validation"), (describe(CLASSES, kind="companion"), "test")):
        assert "test_best_harmonic_mean" not in evaluate(epochs[-1], description, prepared, split, Task()).metrics


def test_batches_do_not_matter(tmp_path: Path) -> None:
    write_prepared(tmp_path, seed=9)
    results = [evaluate(mlp(0), describe(CLASSES), tmp_path, "test", Task(batch=batch)) for batch in (7, 7, 512)]
    assert results[0].metrics == results[1].metrics
    assert results[0].samples.to_csv() == results[1].samples.to_csv()
    assert results[2].metrics == pytest.approx(results[0].metrics, abs=1e-5)
