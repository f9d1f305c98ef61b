"""Figures of segmentation against loops over pixels: IoU, boundaries, disturbed images, tables."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data.files import write_json
from models.artifacts import Description
from models.segmentation import Output
from stages.evaluate.result import Result
from stages.evaluate.segmentation import add_noise, blur, boundary, boundary_scores, darken, evaluate
from stages.parameters.segmentation import Task

IGNORE = 255
CLASSES = ["road", "car", "sky"]

# Boundaries


def outline_by_hand(classes: np.ndarray) -> set[tuple[int, int, int]]:
    """(class, row, column) of every pixel that has one of its four neighbours in another class."""
    height, width = classes.shape
    found = set()
    for y in range(height):
        for x in range(width):
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= v < height and 0 <= u < width
                if inside and IGNORE not in (classes[y, x], classes[v, u]) and classes[y, x] != classes[v, u]:
                    found.add((int(classes[y, x]), y, x))
    return found


def score_by_hand(truth: np.ndarray, found: np.ndarray, classes: int, tolerance: int) -> float:
    found = np.where(truth == IGNORE, IGNORE, found)
    scores = []
    for label in range(classes):
        ours, theirs = (
            [(y, x) for name, y, x in sorted(outline_by_hand(each)) if name == label] for each in (truth, found)
        )
        if not ours and not theirs:
            continue

        def share(these: list[tuple[int, int]], those: list[tuple[int, int]]) -> float:
            near = [min((math.dist(a, b) for b in those), default=math.inf) <= tolerance for a in these]
            return sum(near) / len(near) if near else 0.0

        precision, recall = share(theirs, ours), share(ours, theirs)
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return sum(scores) / len(scores) if scores else math.nan


def maps(seed: int, count: int, height: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels in patches, some of them without a label, and a prediction that is wrong here and there."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, classes, (count, -(-height // 3), -(-width // 3)))
    truth = coarse.repeat(3, 1).repeat(3, 2)[:, :height, :width]
    truth = np.where(generator.random(truth.shape) < generator.choice([0, 0.1, 0.6]), IGNORE, truth)
    shift = int(generator.integers(0, 3))
    wrong = generator.random(truth.shape) < generator.choice([0, 0.05, 0.5])
    moved = np.roll(np.where(truth == IGNORE, 0, truth), shift, 2)
    return truth, np.where(wrong, generator.integers(0, classes, truth.shape), moved)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(2, 4),
    st.integers(1, 4), st.booleans(),
)  # fmt: skip
def test_boundary_scores_are_those_of_explicit_distances(
    seed: int, count: int, height: int, width: int, classes: int, tolerance: int, narrow: bool
) -> None:
    truth, found = maps(seed, count, height, width, classes)
    labels = torch.from_numpy(truth.astype(np.uint8)) if narrow else torch.from_numpy(truth)
    scores = boundary_scores(labels, torch.from_numpy(found), classes, tolerance)
    for index in range(count):
        expected = score_by_hand(truth[index], found[index], classes, tolerance)
        assert scores[index].item() == pytest.approx(expected, abs=1e-12, nan_ok=True)
        assert {
            (int(label), y, x) for y, row in enumerate(boundary(labels)[index].tolist())
            for x, label in enumerate(row) if label != IGNORE
        } == outline_by_hand(truth[index])  # fmt: skip


def test_the_tolerance_is_a_euclidean_distance() -> None:
    """A corner 2 rows and 2 columns away is 2.8 pixels away."""
    truth = torch.zeros(1, 12, 12).long()
    truth[:, 4:, 4:] = 1
    found = torch.zeros(1, 12, 12).long()
    found[:, 6:, 6:] = 1
    scores = [boundary_scores(truth, found, 2, tolerance).item() for tolerance in (1, 2, 3)]
    assert scores == sorted(scores)
    assert scores[1] < 1
    assert boundary_scores(truth, truth, 2, 1).item() == 1
    assert scores == [pytest.approx(score_by_hand(truth[0].numpy(), found[0].numpy(), 2, n)) for n in (1, 2, 3)]


def test_what_has_no_label_makes_no_boundary() -> None:
    truth = torch.zeros(1, 6, 6).long()
    truth[:, :, 3:] = IGNORE
    found = torch.zeros(1, 6, 6).long()
    found[:, :, 3:] = 1
    assert boundary_scores(truth, found, 2, 2).isnan().all()
    assert boundary(truth).eq(IGNORE).all()


# Disturbed images


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_noise_belongs_to_the_place_in_the_split() -> None:
    x = torch.full((5, 3, 20, 24), 0.5)
    whole = add_noise(x, 0.05, 10)
    assert torch.equal(torch.cat([add_noise(x[:2], 0.05, 10), add_noise(x[2:], 0.05, 12)]), whole)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(add_noise(x, 0.05, 11), whole)
    torch.testing.assert_close((add_noise(x, 0.1, 10) - x), 2 * (whole - x), rtol=1e-4, atol=1e-6)
    assert (whole - x).std().item() == pytest.approx(0.05, rel=0.05)
    assert abs((whole - x).mean().item()) < 0.005
    pattern = np.random.default_rng(10).standard_normal((3, 20, 24), dtype=np.float32)
    np.testing.assert_allclose(whole[0], 0.5 + 0.05 * pattern, atol=1e-6)
    strong = add_noise(x, 5.0, 0)
    assert strong.min() == 0
    assert strong.max() == 1


@pytest.mark.parametrize("std", [0.4, 0.75, 3.0])
def test_blur_is_a_sum_over_mirrored_neighbours(std: float) -> None:
    x = images(2, 3, 13, 17).double()
    found = blur(x, std)
    reach = [min(round(4 * std + 0.5), side - 1) for side in (13, 17)]
    weights = [np.exp(-0.5 * (np.arange(-r, r + 1) / std) ** 2) for r in reach]
    weights = [each / each.sum() for each in weights]

    def mirrored(place: int, side: int) -> int:
        return abs(place) if place < side else 2 * (side - 1) - place

    for y, u in ((0, 0), (6, 9), (12, 16), (3, 1)):
        expected = sum(
            weights[0][i + reach[0]] * weights[1][j + reach[1]] * x[1, 2, mirrored(y + i, 13), mirrored(u + j, 17)]
            for i in range(-reach[0], reach[0] + 1)
            for j in range(-reach[1], reach[1] + 1)
        )
        assert found[1, 2, y, u].item() == pytest.approx(float(expected), rel=1e-9)
    assert torch.allclose(blur(torch.full_like(x, 0.3), std), torch.full_like(x, 0.3))


def test_darkness_multiplies() -> None:
    x = images(2, 3, 4, 4)
    assert torch.equal(darken(x, 0.4), x * 0.4)


# The whole evaluation of one model


class Colours(nn.Module):
    """Takes the strongest channel of a pixel, averaged over 8 x 8 pixels, for the class. Notes what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Output:
        self.shapes.append(tuple(x.shape))
        return Output(F.avg_pool2d(x, 8) * 9, None, {})


SIZE = (24, 32)


@pytest.fixture(params=[0, 1])
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    generator = np.random.default_rng(request.param)
    splits = ["train"] * 3 + ["validation"] * 5 + ["test"] * 7
    labels = generator.integers(0, 3, (15, 3, 4)).repeat(8, 1).repeat(8, 2)
    labels[generator.random(labels.shape) < 0.1] = IGNORE
    noise = generator.integers(0, 160, (15, 3, *SIZE))
    images = noise + 90 * (labels[:, None] == np.arange(3)[:, None, None])
    if request.param:  # sky is nowhere: absent from labels and from predictions
        labels[labels == 2] = 0
        images[:, 2] = 0
    labels[-1] = IGNORE  # an image of the test split without any label
    np.save(tmp_path / "images.npy", images.astype(np.uint8))
    np.save(tmp_path / "labels.npy", labels.astype(np.uint8))
    pd.DataFrame({"id": [f"image {index}" for index in range(15)], "split": splits}).to_csv(
        tmp_path / "manifest.csv", index=False
    )
    return tmp_path


def run(prepared: Path, split: str = "test", **fields: Any) -> tuple[Result, Colours]:
    network = Colours().eval()
    interface = {"classes": CLASSES, "channels": 3, "size": list(SIZE)}
    description = Description("toy", "segmentation", "student", {}, interface, {}, {}, None, None, [])
    return evaluate(network, description, prepared, split, Task(**fields)), network


def answers(pixels: np.ndarray) -> np.ndarray:
    """What `Colours` says of uint8 images, computed apart from the stage."""
    means = (pixels / 255).reshape(-1, 3, 3, 8, 4, 8).mean((3, 5))
    large = F.interpolate(torch.from_numpy(means), SIZE, mode="bilinear", align_corners=False)
    return np.asarray(large.argmax(1))


def iou_by_hand(pairs: list[tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Intersection and union of every class over (label, prediction) of all pixels."""
    return {
        label: (sum(a == b == label for a, b in pairs), sum(label in (a, b) for a, b in pairs)) for label in range(3)
    }


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_figure_is_that_of_a_slow_computation(prepared: Path, split: str) -> None:
    result, _ = run(prepared, split, batch=4)
    rows = slice(3, 8) if split == "validation" else slice(8, 15)
    truth, pixels = (np.load(prepared / f"{name}.npy")[rows] for name in ("labels", "images"))
    found = answers(pixels)
    everything: list[tuple[int, int]] = []
    samples = result.samples
    assert samples["id"].tolist() == [f"image {index}" for index in range(15)[rows]]
    assert set(samples["split"]) == {split}
    for index in range(len(truth)):
        flat = zip(truth[index].ravel().tolist(), found[index].ravel().tolist(), strict=True)
        pairs = [(a, b) for a, b in flat if a != IGNORE]
        everything += pairs
        areas = iou_by_hand(pairs)
        ratios = [a / b for a, b in areas.values() if b]
        row = samples.iloc[index]
        assert row["miou"] == pytest.approx(np.mean(ratios) if ratios else math.nan, abs=1e-6, nan_ok=True)
        right = [a == b for a, b in pairs]
        assert row["pixel_accuracy"] == pytest.approx(np.mean(right) if right else math.nan, abs=1e-6, nan_ok=True)
        for label, (both, either) in areas.items():
            assert (row[f"intersection_{label}"], row[f"union_{label}"]) == (both, either)
    areas = iou_by_hand(everything)
    assert result.metrics["miou"] == pytest.approx(np.mean([a / b for a, b in areas.values() if b]), abs=1e-6)
    assert result.metrics["pixel_accuracy"] == pytest.approx(np.mean([a == b for a, b in everything]), abs=1e-6)
    outlines = [score_by_hand(t, p, 3, 2) for t, p in zip(truth, found, strict=True)]
    assert result.metrics["boundary_f"] == pytest.approx(np.nanmean(outlines), abs=1e-6)
    classes = result.classes
    assert classes["class"].tolist() == CLASSES
    for label, (both, either) in areas.items():
        assert classes["pixels"][label] == sum(a == label for a, _ in everything)
        assert classes["iou"][label] == pytest.approx(both / either if either else math.nan, abs=1e-6, nan_ok=True)


def test_sums_over_images_give_the_figure_of_the_split(prepared: Path) -> None:
    result, _ = run(prepared)
    kinds = [f"{kind}_{label}" for label in range(3) for kind in ("intersection", "union")]
    assert all(pd.api.types.is_integer_dtype(result.samples[name]) for name in kinds)
    both, either = (
        result.samples[[f"{kind}_{label}" for label in range(3)]].sum().to_numpy() for kind in ("intersection", "union")
    )
    assert result.metrics["miou"] == pytest.approx((both[either > 0] / either[either > 0]).mean(), abs=1e-6)


def test_disturbed_images_are_what_the_network_is_shown(prepared: Path) -> None:
    strengths = {"noise": [0.1, 0.3, 0.4], "blur": [2.0, 3.0, 4.0], "darkness": [0.5, 0.2, 0.1]}
    result, network = run(prepared, **strengths, batch=3)
    names = [f"miou_{kind}_{level}" for kind in strengths for level in (1, 2, 3)]
    assert list(result.metrics) == ["miou", "pixel_accuracy", "boundary_f", *names]
    assert network.shapes == [(3, 3, *SIZE)] * 20 + [(1, 3, *SIZE)] * 10
    truth, pixels = (np.load(prepared / f"{name}.npy")[8:] for name in ("labels", "images"))
    unit = torch.from_numpy(pixels).float() / 255
    for name, shown in (("noise_2", add_noise(unit, 0.3, 0)), ("blur_1", blur(unit, 2.0)), ("darkness_3", unit / 10)):
        large = F.interpolate(F.avg_pool2d(shown, 8), SIZE, mode="bilinear", align_corners=False)
        flat = zip(truth.ravel().tolist(), large.argmax(1).numpy().ravel().tolist(), strict=True)
        areas = iou_by_hand([(a, b) for a, b in flat if a != IGNORE])
        expected = np.mean([a / b for a, b in areas.values() if b])
        assert result.metrics[f"miou_{name}"] == pytest.approx(expected, abs=1e-3)


def test_a_batch_changes_no_byte(prepared: Path, tmp_path: Path) -> None:
    texts = []
    for batch in (1, 4, 4, 64):
        result, _ = run(prepared, batch=batch)
        write_json(tmp_path / "metrics.json", result.metrics)
        texts.append((tmp_path / "metrics.json").read_text() + result.samples.to_csv() + result.classes.to_csv())
    assert len(set(texts)) == 1
    json.loads((tmp_path / "metrics.json").read_text())


def test_a_figure_that_does_not_exist_is_left_out(prepared: Path) -> None:
    """One class everywhere: nothing has an outline."""
    np.save(prepared / "labels.npy", np.zeros((15, *SIZE), np.uint8))
    pixels = np.zeros((15, 3, *SIZE), np.uint8)
    pixels[:, 0] = 200
    np.save(prepared / "images.npy", pixels)
    result, _ = run(prepared)
    assert "boundary_f" not in result.metrics
    assert (result.metrics["miou"], result.metrics["pixel_accuracy"]) == (1.0, 1.0)
    assert result.classes["iou"].isna().tolist() == [False, True, True]
