"""Figures of recognition against slow computations: ranks of neighbours, Recall@K, calibration, tables."""

import csv
import itertools
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data.files import write_json
from models.artifacts import Description
from models.recognition import Output
from stages.evaluate.calibration import BINS, expected_calibration_error
from stages.evaluate.recognition import RECALL_AT, evaluate
from stages.evaluate.result import Result
from stages.neighbours import same_class_rank
from stages.parameters.recognition import Task


def rank_by_hand(embeddings: np.ndarray, labels: np.ndarray) -> list[int]:
    """One sample and one neighbour at a time: 1 + the number of strangers at most as far as the nearest relative."""
    ranks = []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        distance = {j: float(np.sqrt(((embeddings[i] - embeddings[j]) ** 2).sum())) for j in others}
        relatives = [distance[j] for j in others if labels[j] == labels[i]]
        strangers = [distance[j] for j in others if labels[j] != labels[i]]
        ranks.append(1 + sum(each <= min(relatives) for each in strangers) if relatives else 0)
    return ranks


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 6), st.integers(1, 50), st.integers(0, 2**31))
def test_ranks_are_those_of_a_slow_computation(count: int, width: int, classes: int, chunk: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    embeddings, labels = generator.normal(size=(count, width)), generator.integers(0, classes, count)
    ranks = same_class_rank(torch.from_numpy(embeddings), torch.from_numpy(labels), chunk)
    assert ranks.dtype == torch.int64
    assert ranks.tolist() == rank_by_hand(embeddings, labels)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2), st.integers(0, 2)), min_size=1, max_size=20),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(1, 7),
)
def test_among_equally_near_neighbours_the_relative_comes_last(
    points: list[tuple[int, int, int]], dtype: torch.dtype, chunk: int
) -> None:
    """On a grid most distances are shared by several neighbours, and many points coincide."""
    table = np.array(points)
    embeddings, labels = table[:, :2].astype(np.float64), table[:, 2]
    ranks = same_class_rank(torch.from_numpy(embeddings).to(dtype), torch.from_numpy(labels), chunk)
    assert ranks.tolist() == rank_by_hand(embeddings, labels)


def test_a_sample_without_relatives_has_no_rank() -> None:
    embeddings = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert same_class_rank(embeddings, torch.tensor([0, 1, 0, 2])).tolist() == [2, 0, 2, 0]
    assert same_class_rank(embeddings[:1], torch.tensor([5])).tolist() == [0]


def test_a_sample_is_not_its_own_neighbour() -> None:
    """Even where it coincides with others."""
    embeddings = torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    assert same_class_rank(embeddings, torch.tensor([0, 1, 2, 0])).tolist() == [3, 0, 0, 3]
    assert same_class_rank(embeddings, torch.tensor([0, 0, 0, 1])).tolist() == [1, 1, 1, 0]


def test_embeddings_that_collapsed_find_nothing() -> None:
    labels = torch.arange(12) % 3
    assert same_class_rank(torch.full((12, 4), 0.3), labels).tolist() == [9] * 12


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from([-4096, 3, 1000, 8192]))
def test_ranks_do_not_depend_on_the_origin(count: int, width: int, seed: int, offset: int) -> None:
    """Coordinates are multiples of 1/64, so that float32 holds the moved ones exactly."""
    generator = np.random.default_rng(seed)
    embeddings = torch.from_numpy(generator.integers(-512, 512, (count, width)) / 64).float()
    labels = torch.from_numpy(generator.integers(0, 3, count))
    assert torch.equal(embeddings + offset - offset, embeddings)
    assert torch.equal(same_class_rank(embeddings + offset, labels), same_class_rank(embeddings, labels))


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 30), st.integers(0, 2**31))
def test_ranks_follow_the_samples_and_not_the_names_of_classes(count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    embeddings = torch.from_numpy(generator.normal(size=(count, 3)))
    labels, order = torch.from_numpy(generator.integers(0, 3, count)), torch.from_numpy(generator.permutation(count))
    ranks = same_class_rank(embeddings, labels)
    assert torch.equal(same_class_rank(embeddings[order], labels[order]), ranks[order])
    assert torch.equal(same_class_rank(embeddings, torch.tensor([7, 0, 3])[labels]), ranks)
    assert torch.equal(same_class_rank(embeddings * 2, labels), ranks)


# Calibration


def calibration_by_hand(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
    """Guo et al.'s equation 3, bin by bin: ((m - 1) / M, m / M]."""
    result = 0.0
    for number in range(1, bins + 1):
        low, high = (number - 1) / bins, number / bins
        inside = (confidence > low) & (confidence <= high)
        if number == 1:
            inside |= confidence == 0
        if inside.any():
            result += inside.sum() / len(confidence) * abs(correct[inside].mean() - confidence[inside].mean())
    return result


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 200), st.integers(1, 20), st.integers(0, 2**31), st.floats(0, 1), st.booleans())
def test_calibration_error_is_that_of_a_slow_computation(
    count: int, bins: int, seed: int, skill: float, double: bool
) -> None:
    generator = np.random.default_rng(seed)
    confidence = generator.random(count).astype(np.float64 if double else np.float32)
    correct = generator.random(count) < skill
    found = expected_calibration_error(torch.from_numpy(confidence), torch.from_numpy(correct), bins)
    assert found == pytest.approx(calibration_by_hand(confidence.astype(np.float64), correct, bins), abs=1e-12)
    assert 0 <= found <= 1


def test_the_number_of_bins_is_15() -> None:
    confidence, correct = torch.rand(500, generator=torch.Generator().manual_seed(0)), torch.arange(500) % 3 == 0
    expected = calibration_by_hand(confidence.double().numpy(), correct.numpy(), 15)
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-12)
    assert BINS == 15


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        ([1.0] * 5, [True] * 5, 0),
        ([1.0] * 5, [False] * 5, 1),
        ([0.0] * 3, [False] * 3, 0),
        ([0.0] * 3, [True] * 3, 1),
        ([0.75] * 4, [True, True, True, False], 0),
        ([0.5] * 4, [True, True, True, False], 0.25),
        # Two bins of one half each: |0.9 - 1| and |0.6 - 0|.
        ([0.9, 0.9, 0.6, 0.6], [True, True, False, False], 0.5 * 0.1 + 0.5 * 0.6),
        # One bin: errors of two samples cancel; in two bins they do not.
        ([0.95, 0.97], [True, False], abs(0.95 + 0.97 - 1) / 2),
        ([1.0, 0.0], [False, True], 1),
        ([1.0, 0.0], [True, False], 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_calibration_error_of_cases_by_hand(
    confidence: list[float], correct: list[bool], expected: float, dtype: torch.dtype
) -> None:
    found = expected_calibration_error(torch.tensor(confidence, dtype=dtype), torch.tensor(correct))
    assert found == pytest.approx(expected, abs=1e-7)


def test_a_value_on_a_boundary_belongs_to_the_lower_bin() -> None:
    """With two bins, 0.5 is in (0, 0.5]: together with 0.3, apart from 0.7."""
    correct = torch.tensor([True, False])
    assert expected_calibration_error(torch.tensor([0.5, 0.3]), correct, 2) == pytest.approx(0.1)
    assert expected_calibration_error(torch.tensor([0.5, 0.7]), correct, 2) == pytest.approx(0.6)


def test_perfect_calibration_has_no_error() -> None:
    """k of n samples are right where the confidence is k / n, for many k at once."""
    confidence, correct = [], []
    for k in range(1, 16):
        share = Fraction(2 * k - 1, 30)  # the middle of each of the 15 bins
        confidence += [float(share)] * 30
        correct += [index < 2 * k - 1 for index in range(30)]
    found = expected_calibration_error(torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct))
    assert found == pytest.approx(0, abs=1e-12)


# The whole evaluation of one model


class Lookup(nn.Module):
    """Answers from a table: the first pixel of an image is its row. Notes what it is shown."""

    def __init__(self, logits: Tensor, embeddings: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)
        self.register_buffer("embeddings", embeddings)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Output:
        self.shapes.append(tuple(images.shape))
        rows = (images[:, 0, 0, 0] * 255).round().long()
        return Output(self.embeddings[rows] * 0, self.embeddings[rows], self.logits[rows])


CLASSES = ["cat", "dog", "yak"]
SPLIT = np.array(["train", "test", "validation", "test", "test", "test"] * 10)


@pytest.fixture(params=[0, 1, 2])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """60 images of one colour each, so that the resolution does not change what the lookup sees."""
    generator = np.random.default_rng(request.param)
    count = len(SPLIT)
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 1, 8, 8))
    labels = generator.integers(0, 3, count)
    logits = generator.normal(size=(count, 3))
    logits[np.arange(count), labels] += 1
    embeddings = generator.normal(size=(count, 4)) + 2 * np.eye(4)[labels]
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    ids = [f"image {index}" for index in range(count)]
    pd.DataFrame({"id": ids, "split": SPLIT}).to_csv(tmp_path / "manifest.csv", index=False)
    write_json(tmp_path / "dataset.json", {"classes": CLASSES, "held_out": [], "verification": None})
    return {"prepared": tmp_path, "labels": labels, "logits": logits, "embeddings": embeddings}


def description(resolution: int) -> Description:
    interface = {"classes": CLASSES, "resolution": resolution, "channels": 1}
    return Description("toy", "recognition", "student", {}, interface, {}, {}, None, None, [])


def run(case: dict[str, Any], split: str, batch: int, resolution: int = 8) -> tuple[Result, Lookup]:
    network = Lookup(torch.from_numpy(case["logits"]), torch.from_numpy(case["embeddings"])).eval()
    return evaluate(network, description(resolution), case["prepared"], split, Task(batch=batch)), network


@pytest.mark.parametrize("batch", [1, 7, 256])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_figure_is_that_of_a_slow_computation(case: dict[str, Any], split: str, batch: int) -> None:
    result, _ = run(case, split, batch)
    rows = np.flatnonzero(split == SPLIT)
    labels, logits, embeddings = case["labels"][rows], case["logits"][rows], case["embeddings"][rows]
    shares = [[math.exp(value) / sum(map(math.exp, row)) for value in row] for row in logits.tolist()]
    guess = [row.index(max(row)) for row in shares]
    sure = [max(row) for row in shares]
    right = [a == b for a, b in zip(guess, labels, strict=True)]
    per_class = {
        label: [hit for hit, mine in zip(right, labels, strict=True) if mine == label] for label in sorted(set(labels))
    }
    ranks = rank_by_hand(embeddings, labels)
    expected = {
        "top_1": sum(right) / len(right),
        "worst_class": min(sum(hits) / len(hits) for hits in per_class.values()),
        "calibration_error": calibration_by_hand(np.array(sure), np.array(right), 15),
    }
    for k in RECALL_AT:  # a neighbour of the same class among the k nearest, of those that have one at all
        hits = []
        for i, label in enumerate(labels):
            others = sorted(
                (math.dist(embeddings[i], embeddings[j]), labels[j] == label) for j in range(len(labels)) if j != i
            )
            if any(same for _, same in others):
                hits.append(any(same for _, same in others[:k]))
        expected[f"recall_at_{k}"] = sum(hits) / len(hits)
    assert result.metrics == pytest.approx(expected, abs=2e-6)
    samples = result.samples
    assert samples["id"].tolist() == [f"image {row}" for row in rows]
    assert set(samples["split"]) == {split}
    assert samples["label"].tolist() == labels.tolist()
    assert samples["prediction"].tolist() == guess
    assert samples["confidence"].to_numpy() == pytest.approx(sure, abs=2e-6)
    assert samples["correct"].tolist() == [int(hit) for hit in right]
    assert samples["same_class_rank"].tolist() == ranks
    for i, near in enumerate(samples["neighbours"]):
        others = sorted((math.dist(embeddings[i], embeddings[j]), j) for j in range(len(labels)) if j != i)
        assert near == " ".join(str(j) for _, j in others[:5])
    classes = result.classes
    assert classes["class"].tolist() == [CLASSES[label] for label in per_class]
    assert classes["samples"].tolist() == [len(hits) for hits in per_class.values()]
    assert classes["accuracy"].to_numpy() == pytest.approx([np.mean(hits) for hits in per_class.values()], abs=1e-6)


def test_the_network_sees_batches_in_its_own_resolution(case: dict[str, Any]) -> None:
    _, network = run(case, "test", 16, resolution=4)
    assert network.shapes == [(16, 1, 4, 4)] * 2 + [(8, 1, 4, 4)]
    one, other = run(case, "test", 16, resolution=4)[0], run(case, "test", 16)[0]
    assert one.metrics == other.metrics


def test_the_same_model_gives_the_same_files(case: dict[str, Any], tmp_path: Path) -> None:
    for name, batch in (("1", 5), ("2", 5), ("3", 64)):
        result, _ = run(case, "test", batch)
        write_json(tmp_path / f"{name}.json", result.metrics)
        result.samples.to_csv(tmp_path / f"{name}.csv", index=False)
    for one, other in itertools.pairwise("123"):
        assert (tmp_path / f"{one}.json").read_bytes() == (tmp_path / f"{other}.json").read_bytes()
        assert (tmp_path / f"{one}.csv").read_bytes() == (tmp_path / f"{other}.csv").read_bytes()
    with (tmp_path / "1.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 40


def test_a_class_with_one_sample_does_not_count_in_recall(case: dict[str, Any]) -> None:
    """Its rank is 0, which is no hit: recall is a share of the other samples."""
    labels = np.zeros(60, np.int64)
    labels[np.flatnonzero(SPLIT == "test")[0]] = 2
    np.save(case["prepared"] / "labels.npy", labels)
    result, _ = run(case, "test", 256)
    assert result.samples["same_class_rank"].tolist()[0] == 0
    assert result.samples["same_class_rank"].tolist()[1:].count(0) == 0
    ranks = np.array(rank_by_hand(case["embeddings"][SPLIT == "test"], labels[SPLIT == "test"]))[1:]
    assert result.metrics["recall_at_1"] == pytest.approx((ranks == 1).mean(), abs=1e-6)
    assert result.metrics["recall_at_2"] == 1


def test_recall_is_left_out_where_nobody_can_be_found(case: dict[str, Any]) -> None:
    rows = np.flatnonzero(SPLIT == "test")
    three = np.where(np.isin(np.arange(60), rows[:3]), "test", "train")
    pd.DataFrame({"id": [str(row) for row in range(60)], "split": three}).to_csv(
        case["prepared"] / "manifest.csv", index=False
    )
    labels = np.zeros(60, np.int64)
    labels[rows[:3]] = [0, 1, 2]
    np.save(case["prepared"] / "labels.npy", labels)
    result, _ = run(case, "test", 256)
    assert set(result.metrics) == {"top_1", "worst_class", "calibration_error"}
