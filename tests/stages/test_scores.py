"""Figures from sums, and their errors: against enumeration, formulas, and loops that put resampled samples together."""

import itertools
import math
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn

from stages.scores import Scores, bootstrap, comparable, influence, recognition, scores, segmentation, standard_error
from stages.scores import zero_shot as zero_shot_scores

CLASSES = 4


def means(values: list[int] | list[float] | np.ndarray) -> Scores:
    """Scores whose figure is a mean."""
    table = pd.DataFrame({"value": np.asarray(values, dtype=float), "one": 1.0})
    table.index = pd.Index([f"id-{row}" for row in range(len(table))])
    return Scores(table, partial(recognition.figure, metric="top_1"))


def pixels(
    seed: int, images: int, worse: float, size: tuple[int, int] = (6, 7), classes: int = CLASSES
) -> tuple[np.ndarray, np.ndarray]:
    """Truth, with pixels without a label and with classes that most images lack; and a prediction."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 2, (images, *size)) + generator.integers(0, classes - 1, (images, 1, 1))
    truth[generator.random(truth.shape) < 0.1] = 255
    wrong = generator.random(truth.shape) < worse
    return truth, np.where(wrong, generator.integers(0, classes - 1, truth.shape), truth % classes)


def table(truth: np.ndarray, prediction: np.ndarray, classes: int = CLASSES) -> pd.DataFrame:
    """A row per image, as reports/evaluation has it."""
    rows = []
    for index, (one, other) in enumerate(zip(truth, prediction, strict=True)):
        known = one != 255
        row: dict[str, object] = {"id": f"id-{index}"}
        for label in range(classes):
            row[f"intersection_{label}"] = int((known & (one == label) & (other == label)).sum())
            row[f"union_{label}"] = int((known & ((one == label) | (other == label))).sum())
        rows.append(row)
    return pd.DataFrame(rows)


def miou(truth: np.ndarray, prediction: np.ndarray, classes: int = CLASSES) -> float:
    """By pixels, from the definition."""
    found = []
    for label in range(classes):
        ours, theirs = (truth == label), (prediction == label) & (truth != 255)
        if (ours | theirs).any():
            found.append((ours & theirs).sum() / (ours | theirs).sum())
    return float(np.mean(found))


# Figures


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 6), st.floats(0, 1))
def test_figures_of_segmentation_are_those_of_all_pixels_together(
    seed: int, images: int, classes: int, worse: float
) -> None:
    truth, prediction = pixels(seed, images, worse, classes=classes)
    samples = table(truth, prediction, classes)
    known = truth != 255
    assert scores("segmentation", samples, "miou").value == pytest.approx(miou(truth, prediction, classes))
    wanted = (truth[known] == prediction[known]).mean()
    assert scores("segmentation", samples, "pixel_accuracy").value == pytest.approx(wanted)


def test_absent_classes_are_left_out_of_the_mean() -> None:
    intersection, union = np.array([[3, 0, 0], [0, 0, 0]]), np.array([[4, 0, 2], [0, 0, 0]])
    found = segmentation.figure(np.concatenate([intersection, union], axis=1), "miou")
    assert found[0] == pytest.approx((3 / 4 + 0) / 2)
    assert math.isnan(found[1])


def test_columns_are_in_the_order_of_classes() -> None:
    samples = pd.DataFrame({f"{kind}_{label}": [label] for label in range(12) for kind in ("union", "intersection")})
    found = segmentation.statistics(samples.assign(id="x", miou=0.5), "miou")
    assert found.to_numpy().tolist()[0] == [*range(12), *range(12)]


def test_scores_of_recognition() -> None:
    samples = pd.DataFrame({"id": ["x", "y", "z"], "correct": [1, 0, 1], "same_class_rank": [0, 1, 2]})
    top = recognition.statistics(samples, "top_1")
    assert top["hits"].to_dict() == {"x": 1.0, "y": 0.0, "z": 1.0}
    assert recognition.statistics(samples, "recall_at_1")["hits"].to_dict() == {"y": 1.0, "z": 0.0}
    assert scores("recognition", samples, "top_1").value == pytest.approx(2 / 3)
    assert scores("recognition", samples, "recall_at_1").value == pytest.approx(1 / 2)
    assert math.isnan(scores("recognition", samples[:0], "top_1").value)


def test_samples_are_compared_by_name() -> None:
    ours = means([1, 2, 3])
    shuffled = Scores(ours.statistics.iloc[::-1], ours.figure)
    assert comparable(ours, shuffled)
    pd.testing.assert_frame_equal(shuffled.in_order_of(ours).statistics, ours.statistics)
    assert not comparable(ours, means([1, 2]))
    assert not comparable(ours, Scores(ours.statistics.rename({"id-0": "x"}), ours.figure))
    assert not comparable(ours, Scores(ours.statistics.iloc[[0, 1, 1]], ours.figure))


# Figures of text


def answers(seed: int, count: int, classes: int) -> pd.DataFrame:
    """Labels and predictions, as reports/evaluation has them; some classes may be nowhere."""
    generator = np.random.default_rng(seed)
    labels, others = generator.integers(0, classes, (2, count))
    prediction = np.where(generator.random(count) < generator.random(), labels, others)
    right = (labels == prediction).astype(int)
    ids = [f"id-{row}" for row in range(count)]
    return pd.DataFrame({"id": ids, "label": labels, "prediction": prediction, "correct": right})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 7))
@pytest.mark.filterwarnings("ignore:A single label")
def test_figures_of_classes_are_those_of_scikit_learn(seed: int, count: int, classes: int) -> None:
    samples = answers(seed, count, classes)
    pair = (samples["label"], samples["prediction"])
    assert scores("text", samples, "accuracy").value == pytest.approx(sklearn.accuracy_score(*pair))
    macro = sklearn.f1_score(*pair, average="macro", zero_division=0)
    assert scores("text", samples, "macro_f1").value == pytest.approx(macro)
    assert scores("text", samples, "matthews").value == pytest.approx(sklearn.matthews_corrcoef(*pair), abs=1e-12)
    second = sklearn.f1_score(samples["label"] == 1, samples["prediction"] == 1, zero_division=0)
    assert scores("text", samples, "f1").value == pytest.approx(second)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 9))
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_spearman_is_that_of_scipy(seed: int, count: int, values: int) -> None:
    """Of coarse numbers, so that many are equal; 0 where scipy knows none, as all of one side are equal."""
    predicted, actual = np.random.default_rng(seed).integers(0, values, (2, count)) / 3
    samples = pd.DataFrame({"id": range(count), "predicted_score": predicted, "score": actual})
    found, wanted = scores("text", samples, "spearman").value, stats.spearmanr(predicted, actual).statistic
    assert found == pytest.approx(0 if math.isnan(wanted) else wanted, abs=1e-12)


def test_conventions_where_a_figure_of_text_has_no_value() -> None:
    one = pd.DataFrame({"id": ["x", "y"], "label": 0, "prediction": 0, "correct": 1})
    assert scores("text", one, "f1").value == 0  # the second class is nowhere
    assert scores("text", one, "matthews").value == 0  # nothing is told apart
    assert scores("text", one, "macro_f1").value == 1  # over the only class that there is
    assert scores("text", one, "accuracy").value == 1
    none = one[:0].assign(predicted_score=0.0, score=0.0)
    for metric in ("accuracy", "macro_f1", "f1", "matthews", "spearman"):
        assert math.isnan(scores("text", none, metric).value)
    # A class that is a label but never predicted counts as 0, as does one that is predicted but never a label.
    two = pd.DataFrame({"id": ["x", "y"], "label": [0, 1], "prediction": [0, 2], "correct": [1, 0]})
    assert scores("text", two, "macro_f1").value == pytest.approx(1 / 3)


@pytest.mark.parametrize("metric", ["macro_f1", "f1", "matthews"])
def test_the_bootstrap_of_text_puts_samples_together(metric: str) -> None:
    """The very same draws, and scikit-learn on every heap; models need not know the same number of classes."""
    classes = 2 if metric == "f1" else 4
    ours, theirs = answers(5, 25, classes), answers(6, 25, classes)
    theirs["label"] = ours["label"]
    if metric != "f1":
        theirs["prediction"] = theirs["prediction"].clip(upper=2)
    found = bootstrap([scores("text", one, metric) for one in (ours, theirs)], 40, seed=3)
    drawn = np.random.default_rng(3).integers(25, size=(40, 25))
    figure = {
        "f1": partial(sklearn.f1_score, zero_division=0),
        "macro_f1": partial(sklearn.f1_score, average="macro", zero_division=0),
        "matthews": sklearn.matthews_corrcoef,
    }[metric]
    wanted = [[figure(one["label"][rows], one["prediction"][rows]) for rows in drawn] for one in (ours, theirs)]
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "f1", "matthews"])
def test_errors_of_text_are_those_of_the_bootstrap(metric: str) -> None:
    found = scores("text", answers(2, 400, 2 if metric == "f1" else 3), metric)
    (resampled,) = bootstrap([found], 5_000, 0)
    assert found.error == pytest.approx(resampled.std(), rel=0.06)


def test_the_error_of_spearman_is_nearly_that_of_ranking_anew() -> None:
    """Ranks are held: what that costs is seen against scipy on every resample."""
    generator = np.random.default_rng(1)
    actual = generator.normal(size=300)
    predicted, actual = (0.8 * actual + 0.6 * generator.normal(size=300)).round(1), actual.round(1)
    found = scores("text", pd.DataFrame({"id": range(300), "predicted_score": predicted, "score": actual}), "spearman")
    again = [
        stats.spearmanr(predicted[rows], actual[rows]).statistic for rows in generator.integers(300, size=(600, 300))
    ]
    assert found.error == pytest.approx(np.std(again), rel=0.15)


# Figures of zero-shot recognition

ZERO_SHOT = ["harmonic_mean", "seen", "unseen", "unseen_only", "calibrated_harmonic_mean"]


def zero_shot(seed: int, count: int, classes: int) -> pd.DataFrame:
    """As reports/evaluation has it: unbalanced classes, some without a sample; the odd ones are unseen."""
    generator = np.random.default_rng(seed)
    labels = (classes * generator.random(count) ** 2).astype(int)
    right, calibrated = (generator.random((2, count)) < generator.random((2, 1))).astype(int)
    columns = {"correct": right, "calibrated": calibrated, "seen": (labels % 2 == 0).astype(int)}
    unseen_prediction = np.where(generator.random(count) < 0.6, labels, labels + 2)
    ids = [f"id-{row}" for row in range(count)]
    return pd.DataFrame({"id": ids, "label": labels, "unseen_prediction": unseen_prediction, **columns})


def by_class(samples: pd.DataFrame, metric: str) -> float:
    """From the definition: means over classes of means over their samples; NaN where there is no class of a kind."""
    hit = "calibrated" if metric == "calibrated_harmonic_mean" else "correct"
    if metric == "unseen_only":
        samples, hit = samples.assign(hit=samples["unseen_prediction"] == samples["label"]), "hit"
    found = []
    for kind in (1, 0):
        part = samples[samples["seen"] == kind]
        found.append(
            float(np.mean([group[hit].mean() for _, group in part.groupby("label")])) if len(part) else math.nan
        )
    seen, unseen = found
    if metric in ("seen", "unseen", "unseen_only"):
        return seen if metric == "seen" else unseen
    return stats.hmean([seen, unseen]) if not math.isnan(seen + unseen) else math.nan


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 9), st.sampled_from(ZERO_SHOT))
def test_figures_of_zero_shot_are_means_over_classes(seed: int, count: int, classes: int, metric: str) -> None:
    samples = zero_shot(seed, count, classes)
    assert scores("zero_shot", samples, metric).value == pytest.approx(by_class(samples, metric), nan_ok=True)


def test_a_resample_without_a_class_leaves_it_out_of_the_mean() -> None:
    """Hits, samples of seen, samples of unseen classes; of the last class of each kind nothing is left."""
    totals = np.array([[3, 0, 1, 0], [4, 0, 0, 0], [0, 0, 2, 0]]).ravel()
    figures = {metric: zero_shot_scores.figure(totals, metric) for metric in ZERO_SHOT}
    assert [figures["seen"], figures["unseen"]] == [3 / 4, 1 / 2]
    assert figures["harmonic_mean"] == pytest.approx(0.6)
    assert zero_shot_scores.figure(np.array([0, 0, 5, 0, 0, 5]), "harmonic_mean") == 0
    for lost in ([3, 0, 4, 0, 0, 0], [0, 1, 0, 0, 0, 2], [0] * 6):
        assert math.isnan(zero_shot_scores.figure(np.array(lost), "harmonic_mean"))


@pytest.mark.parametrize("metric", ZERO_SHOT)
def test_the_bootstrap_of_zero_shot_puts_samples_together(metric: str) -> None:
    """The very same draws, which lose classes now and then, and the definition on every heap."""
    ours, theirs = zero_shot(5, 25, 6), zero_shot(6, 25, 6)
    theirs[["label", "seen"]] = ours[["label", "seen"]]
    found = bootstrap([scores("zero_shot", one, metric) for one in (ours, theirs)], 60, seed=3)
    drawn = np.random.default_rng(3).integers(25, size=(60, 25))
    assert any(ours["label"][rows].nunique() < ours["label"].nunique() for rows in drawn)
    wanted = [[by_class(one.iloc[rows], metric) for rows in drawn] for one in (ours, theirs)]
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("metric", ZERO_SHOT)
def test_errors_of_zero_shot_are_those_of_the_bootstrap(metric: str) -> None:
    found = scores("zero_shot", zero_shot(2, 600, 6), metric)
    (resampled,) = bootstrap([found], 5_000, 0)
    assert found.error == pytest.approx(resampled.std(), rel=0.06)


# Standard errors


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40))
def test_the_error_of_a_mean_is_the_usual_one(values: list[float]) -> None:
    assert means(values).error == pytest.approx(np.std(values) / math.sqrt(len(values)), rel=1e-5, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_influences_are_the_gradient(seed: int, images: int) -> None:
    """d mIoU / d weight of an image = mean over classes of (intersection_i - IoU union_i) / union."""
    found = scores("segmentation", table(*pixels(seed, images, 0.4)), "miou")
    intersection, union = np.split(found.rows, 2, axis=1)
    present = union.sum(axis=0) > 0
    whole = union.sum(axis=0)[present]
    iou = intersection.sum(axis=0)[present] / whole
    wanted = ((intersection[:, present] - iou * union[:, present]) / whole).mean(axis=1)
    np.testing.assert_allclose(influence(found.rows, found.figure), wanted, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_errors_are_those_of_the_bootstrap(seed: int) -> None:
    truth, ours = pixels(seed, 120, 0.3)
    other = np.where(np.random.default_rng(seed).random(ours.shape) < 0.05, 0, ours)
    models = [scores("segmentation", table(truth, one), "miou") for one in (ours, other)]
    resampled = bootstrap(models, 20_000, seed)
    for model, found in zip(models, resampled, strict=True):
        assert model.error == pytest.approx(found.std(), rel=0.05)
    gap = influence(models[0].rows, models[0].figure) - influence(models[1].rows, models[1].figure)
    assert standard_error(gap) == pytest.approx((resampled[0] - resampled[1]).std(), rel=0.05)


# Bootstrap


def exact_distribution(values: list[int]) -> dict[float, float]:
    """Every mean that resampling can give, and its probability, by enumeration of all resamples."""
    found: dict[float, float] = {}
    for drawn in itertools.product(values, repeat=len(values)):
        mean = round(sum(drawn) / len(values), 9)
        found[mean] = found.get(mean, 0.0) + len(values) ** -len(values)
    return found


@pytest.fixture(params=[0, 10**9], ids=["rows counted at once", "samples drawn"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.scores.FEW", request.param)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("values", [[1, 0, -1, 0, 0], [1, 1, 0, -1, -1, 0], [0, 0, 0], [1, 1, -1, 0, 1, 1]])
def test_the_bootstrap_has_the_distribution_of_all_resamples(values: list[int]) -> None:
    resamples = 200_000
    (found,) = bootstrap([means(values)], resamples, seed=1)
    assert found.shape == (resamples,)
    exact = exact_distribution(values)
    seen, counts = np.unique(found.round(9), return_counts=True)
    assert set(seen) <= set(exact)
    for value, share in exact.items():
        drawn = counts[seen == value].sum() / resamples
        assert abs(drawn - share) < 5 * math.sqrt(share * (1 - share) / resamples) + 1e-9


@pytest.mark.usefixtures("_both_ways")
def test_the_bootstrap_of_a_mean_equals_a_loop() -> None:
    values = np.random.default_rng(0).normal(0.1, 1, 300)
    generator = np.random.default_rng(1)
    slow = np.array([values[generator.integers(300, size=300)].mean() for _ in range(20_000)])
    (fast,) = bootstrap([means(values)], 20_000, seed=2)
    error = values.std() / math.sqrt(300)
    for quantile in (0.05, 0.5, 0.95):
        assert np.quantile(fast, quantile) == pytest.approx(np.quantile(slow, quantile), abs=0.08 * error)
    assert fast.std() == pytest.approx(error, rel=0.02)


def test_the_bootstrap_of_miou_puts_images_together() -> None:
    """The very same draws: pixels of the drawn images in one heap, for both models, and the definition on the heap."""
    images, resamples = 9, 60
    truth, ours = pixels(4, images, 0.3)
    _, theirs = pixels(4, images, 0.6)
    models = [scores("segmentation", table(truth, one), "miou") for one in (ours, theirs)]
    found = bootstrap(models, resamples, seed=3)
    drawn = np.random.default_rng(3).integers(images, size=(resamples, images))
    wanted = [[miou(truth[rows], one[rows]) for rows in drawn] for one in (ours, theirs)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.usefixtures("_both_ways")
def test_pairs_stay_together() -> None:
    """Two models that complement each other on every sample: their figures add up to 1 in every resample."""
    ours = np.random.default_rng(0).integers(0, 2, 40)
    found = bootstrap([means(ours), means(1 - ours)], 500, 0)
    np.testing.assert_allclose(found.sum(axis=0), 1)
    assert len(np.unique(found[0])) > 5


@pytest.mark.usefixtures("_both_ways")
def test_equal_models_differ_in_no_resample() -> None:
    values = np.random.default_rng(0).random(1001)
    ours, theirs = bootstrap([means(values), means(values.copy())], 2000, 0)
    np.testing.assert_array_equal(ours, theirs)


def test_samples_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and of 2 samples"):
        bootstrap([means([1, 2, 3]), means([1, 2])], 10, 0)
    shuffled = Scores(means([1, 2]).statistics.iloc[::-1], means([]).figure)
    with pytest.raises(ValueError, match="not the same"):
        bootstrap([means([1, 2]), shuffled], 10, 0)


def test_draws_are_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = means(np.random.default_rng(0).random(50))
    (found,) = bootstrap([model], 101, 0)
    np.testing.assert_array_equal(found, bootstrap([model], 101, 0)[0])
    assert not np.array_equal(found, bootstrap([model], 101, 1)[0])
    monkeypatch.setattr("stages.scores.CHUNK", 120)  # in pieces of 2 resamples: the same draws
    np.testing.assert_allclose(found, bootstrap([model], 101, 0)[0], rtol=1e-12)


def test_it_is_fast() -> None:
    """0.4 s for scores that all differ, 0.05 s for hits and misses; the limits leave room for a machine under load."""
    generator = np.random.default_rng(0)
    for pair, limit in (
        ([means(generator.random(1000)) for _ in range(2)], 4),
        ([means(generator.integers(0, 2, 50_000)) for _ in range(2)], 2),
    ):
        began = time.process_time()
        bootstrap(pair, 20_000, 0)
        assert time.process_time() - began < limit
