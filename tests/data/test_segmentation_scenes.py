"""Handwritten scenes: the same for the same seed, and no split sees another's digits or photographs."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.errors import UserError
from data.expectations import validate
from data.files import tree_digest
from data.segmentation import (
    IGNORE,
    SPLITS,
    STROKE,
    deal,
    describe,
    draw,
    expectations,
    load,
    make_scenes,
    prepare,
    read_digits,
    tables,
)
from stages.parameters.segmentation import Dataset

SIDE, EACH = 12, 8
COUNTS = {"train": 12, "validation": 4, "test": 5}


def strokes(seed: int = 0) -> np.ndarray:
    """Digits as recognition's tables hold them: one bright line per row, at another place in each."""
    generator = np.random.default_rng(seed)
    rows = []
    for kind in np.tile(np.arange(10), EACH):
        digit = np.zeros((SIDE, SIDE), dtype=np.int64)
        digit[2:10, generator.integers(2, 9)] = 255
        digit[generator.integers(2, 9), 2:10] = generator.integers(130, 256)
        rows.append([*digit.ravel(), kind])
    return np.array(rows)


def write(path: Path, rows: np.ndarray) -> None:
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows.tolist()))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    write(folder / "digits.csv", strokes())
    for name, (height, width) in {"a b.png": (60, 200), "c.jpg": (90, 240)}.items():
        pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def dataset(**scenes: Any) -> Dataset:
    return Dataset.model_validate(
        {
            "task": "segmentation",
            "source": "toy",
            "encoder": "none",
            "format": "scenes",
            "image_size": [32, 36],
            "digits": "digits.csv",
            "backgrounds": ["a b.png", "c.jpg"],
            "scenes": {**COUNTS, "digits": [1, 3], "height": [12, 16], **scenes},
        }
    )


def prepared(raw: Path, entry: Dataset, output: Path) -> Path:
    output.mkdir()
    prepare(raw, entry, output, {})
    return output


def test_the_seed_alone_decides(raw: Path, tmp_path: Path) -> None:
    one, two, other = (
        prepared(raw, dataset(seed=seed), tmp_path / name) for name, seed in [("one", 0), ("two", 0), ("other", 1)]
    )
    assert tree_digest(one) == tree_digest(two)
    assert not (np.load(one / "images.npy") == np.load(other / "images.npy")).all(axis=(1, 2, 3)).any()


def test_scenes_are_what_was_asked_for(raw: Path, tmp_path: Path) -> None:
    folder = prepared(raw, dataset().model_copy(update={"fit": "pad"}), tmp_path / "out")
    description = describe(folder)
    assert description["fit"] == "resize", "a scene has its size from the start"
    assert description["classes"] == ["background", *"0123456789"]
    assert (description["samples"], description["size"]) == (COUNTS, [32, 36])
    for split, count in COUNTS.items():
        ids, images, labels = load(folder, split)
        assert ids == [f"{split}/{index:05d}" for index in range(count)]
        assert (tuple(images.shape), tuple(labels.shape)) == ((count, 3, 32, 36), (count, 32, 36))
        assert int(labels.max()) <= 10
        assert len({image.numpy().tobytes() for image in images}) == count


def test_labels_are_the_digits_that_the_manifest_names(raw: Path) -> None:
    _, kinds = read_digits(raw / "digits.csv")
    amounts, hidden = Counter[int](), 0
    for row in make_scenes(raw, dataset(train=150, validation=50, test=50)):
        shown = {int(kinds[int(digit)]) + 1 for digit in row.columns["digits"].split()}
        found = set(np.unique(row.labels).tolist()) - {0}
        assert found <= shown
        hidden += len(shown - found)
        amounts[len(row.columns["digits"].split())] += 1
    assert set(amounts) == {1, 2, 3}
    assert min(amounts.values()) > 25
    assert hidden == 0, "a digit was covered completely"


@pytest.mark.parametrize("seed", range(3))
def test_no_digit_and_no_pixel_of_a_photograph_is_in_two_splits(raw: Path, seed: int) -> None:
    digits: dict[str, set[str]] = {split: set() for split in SPLITS}
    columns: dict[tuple[str, str], set[int]] = {}
    for row in make_scenes(raw, dataset(seed=seed, train=60, validation=30, test=30)):
        digits[row.split] |= set(row.columns["digits"].split())
        name, top, left, bottom, right = row.columns["region"].rsplit(" ", 4)
        width, height = Image.open(raw / name).size
        assert 0 <= int(top) < int(bottom) <= height
        assert 0 <= int(left) < int(right) <= width
        columns.setdefault((name, row.split), set()).update(range(int(left), int(right)))
    assert not digits["train"] & digits["validation"]
    assert not digits["train"] & digits["test"]
    assert not digits["validation"] & digits["test"]
    assert set(columns) == {(name, split) for name in ("a b.png", "c.jpg") for split in SPLITS}
    for name in ("a b.png", "c.jpg"):
        for one, two in [("train", "validation"), ("train", "test"), ("validation", "test")]:
            distance = min(abs(left - right) for left in columns[name, one] for right in columns[name, two])
            assert distance > 3, "there is no margin between the regions"


def test_a_scene_shows_the_window_that_the_manifest_names(raw: Path) -> None:
    """A photograph whose columns have a colour of their own; only brightness and noise come between."""
    ramp = np.zeros((60, 200, 3), dtype=np.uint8)
    ramp[..., 0] = np.arange(200)
    ramp[..., 1] = 100
    Image.fromarray(ramp).save(raw / "a b.png")
    entry = dataset(digits=[1, 1], height=[12, 12]).model_copy(update={"backgrounds": ["a b.png"]})
    for row in make_scenes(raw, entry):
        _, _, left, _, right = row.columns["region"].rsplit(" ", 4)
        means = np.ma.masked_array(row.image[..., 0], row.labels > 0).mean(axis=0)
        expected = int(left) + (np.arange(36) + 0.5) * (int(right) - int(left)) / 36
        assert abs(np.corrcoef(means, expected)[0, 1]) > 0.9


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=3, max_size=3),
    st.lists(st.integers(60, 90), min_size=10, max_size=10),
    st.integers(0, 99),
)
def test_digits_are_dealt_completely_and_in_proportion(scenes: list[int], amounts: list[int], seed: int) -> None:
    kinds = np.random.default_rng(seed).permutation(np.repeat(np.arange(10), amounts))
    try:
        parts = deal(scenes, kinds, seed, Path("x.csv"))
    except UserError:
        assert min(scenes) / sum(scenes) * min(amounts) < 1
        return
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(kinds)))
    for part, count in zip(parts, scenes, strict=True):
        for kind, amount in enumerate(amounts):
            assert abs((kinds[part] == kind).sum() - amount * count / sum(scenes)) <= 1


def test_a_digit_comes_again_only_after_all_others(raw: Path) -> None:
    amount = Counter[str]()
    for row in make_scenes(raw, dataset(train=60, validation=20, test=20)):
        if row.split == "train":
            amount.update(row.columns["digits"].split())
    assert max(amount.values()) - min(amount.values()) <= 1
    assert max(amount.values()) > 1


class Plain(np.random.Generator):
    """Draws what changes nothing: no stretch, no turn, no shear."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def uniform(self, low: Any = 0, high: Any = 1, size: Any = None) -> Any:
        return 0.0 if low == -high else 1.0


def test_a_digit_that_is_not_turned_is_its_bold_box_at_the_height_asked_for() -> None:
    digit = np.zeros((28, 28), np.uint8)
    digit[4:24, 6:16] = np.random.default_rng(0).integers(150, 256, (20, 10))
    inner = np.asarray(Image.fromarray(digit[4:24, 6:16]).resize((9, 18), Image.Resampling.BICUBIC)) / 255
    padded = np.pad(inner, 2)
    expected = [[padded[y : y + 3, x : x + 3].max() for x in range(11)] for y in range(20)]
    np.testing.assert_allclose(draw(digit, 20, Plain()), expected, atol=1e-9)
    assert draw(digit, 30, Plain()).shape == (30, 16)


@settings(deadline=None, max_examples=100)
@given(st.integers(8, 48), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31))
def test_a_drawn_digit_fits_its_bounds_and_has_no_empty_margin(height: int, tall: int, wide: int, seed: int) -> None:
    digit = np.zeros((28, 28), np.uint8)
    digit[4 : 4 + tall, 4 : 4 + wide] = 255
    stroke = draw(digit, height, np.random.default_rng(seed))
    assert 0 <= stroke.min() <= stroke.max() <= 1
    assert max(stroke.shape) <= 2 * height, "it would not fit a scene that the schema accepts"
    for edge in (stroke[0], stroke[-1], stroke[:, 0], stroke[:, -1]):
        assert edge.max() >= STROKE


# What is wrong


def rows_with(change: Callable[[np.ndarray], Any]) -> np.ndarray:
    rows = strokes()
    return rows if (changed := change(rows)) is None else changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:, 1:], "has 144 columns, but a square of pixels and a digit are expected"),
        (lambda rows: rows.__setitem__((2, 5), 256), "holds a pixel outside 0-255 in row 3"),
        (lambda rows: rows.__setitem__((4, -1), 10), "holds a label outside 0-9 in row 5"),
        (lambda rows: rows.__setitem__((6, slice(0, -1)), 0), "shows nothing in row 7"),
        (lambda rows: rows[rows[:, -1] != 3], "has 0 samples of the digit 3: none is left for the split 'train'"),
        (lambda rows: rows[:20], "has 2 samples of the digit 0: none is left for the split"),
    ],
)
def test_a_table_that_does_not_serve_is_named(raw: Path, change: Callable[[np.ndarray], Any], message: str) -> None:
    write(raw / "digits.csv", rows_with(change))
    with pytest.raises(UserError, match=re.escape(f"{raw / 'digits.csv'} {message}")):
        list(make_scenes(raw, dataset()))


def test_missing_and_broken_files_are_named(raw: Path) -> None:
    (raw / "c.jpg").write_bytes((raw / "c.jpg").read_bytes()[:200])
    with pytest.raises(UserError, match=re.escape(f"{raw / 'c.jpg'} is no complete image")):
        list(make_scenes(raw, dataset()))
    (raw / "digits.csv").unlink()
    with pytest.raises(UserError, match=re.escape(f"{raw / 'digits.csv'} is no table of whole numbers")):
        list(make_scenes(raw, dataset()))


@pytest.mark.parametrize(("height", "width"), [(20, 200), (60, 100)])
def test_a_photograph_that_is_too_small_is_named_with_what_is_needed(raw: Path, height: int, width: int) -> None:
    Image.new("RGB", (width, height)).save(raw / "a b.png")
    with pytest.raises(UserError) as caught:
        list(make_scenes(raw, dataset()))
    message = str(caught.value)
    assert f"{raw / 'a b.png'} is {height} x {width} pixels, but scenes of 32 x 36 need a photograph of" in message
    found = re.search(r"of about (\d+) x (\d+)", message)
    assert found is not None
    Image.new("RGB", (int(found[2]), int(found[1]))).save(raw / "a b.png")
    assert len(list(make_scenes(raw, dataset()))) == sum(COUNTS.values())


@pytest.mark.parametrize(
    ("scenes", "message"),
    [
        ({"digits": [3, 2]}, "digits must be [lowest, highest], got [3, 2]"),
        ({"height": [14, 12]}, "height must be [lowest, highest], got [14, 12]"),
        ({"height": [12, 17]}, "may reach half of the smaller side of 'image_size' [32, 36], got [12, 17]"),
    ],
)
def test_contradictions_are_refused(scenes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dataset(**scenes)


# What is expected


def test_a_leak_of_digits_or_photographs_is_found(raw: Path, tmp_path: Path) -> None:
    folder = prepared(raw, dataset(), tmp_path / "out")
    (tmp_path / "docs").mkdir()

    def failures() -> list[str]:
        expected = expectations(dataset(), describe(folder))
        found = validate("toy", tables(folder), expected, tmp_path / "docs")
        return [finding.sentence for finding in found if not finding.success]

    assert failures() == []
    lines = (folder / "manifest.csv").read_text().splitlines()
    first, last = (line.rsplit(",", 2) for line in (lines[1], lines[-1]))
    lines[-1] = ",".join([last[0], last[1] + " " + first[1].split()[0], last[2]])
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    (digits,) = failures()
    assert "no digit of a scene stands in another split; " in digits
    assert "train/00000 (2)" in digits
    name, top, _, bottom, right = first[2].rsplit(" ", 4)
    corner = f"{name} {int(bottom) - 1} {int(right) - 1} {int(bottom) + 9} {int(right) + 9}"
    lines[-1] = ",".join([*last[:2], corner])
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    (region,) = failures()
    assert "no part of a scene's photograph is seen in another split; " in region
    assert "train/00000 (2)" in region
    assert "test/00004 (2)" in region
    beside = f"{name} {int(top)} {-99} {int(bottom)} {0}"
    lines[-1] = ",".join([*last[:2], beside])
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    assert failures() == []
    assert IGNORE not in np.load(folder / "labels.npy")
