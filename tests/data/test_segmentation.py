"""Images with a class per pixel: brought to one size, prepared to the same bytes, checked against what is expected."""

import hashlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from data.expectations import validate
from data.files import tree_digest
from data.segmentation import (
    IGNORE,
    UNKNOWN,
    File,
    Row,
    describe,
    expectations,
    load,
    prepare,
    read,
    tables,
    to_unit,
)
from stages.parameters.segmentation import Dataset

sys.path.insert(0, str(Path(__file__).parent))
from segmentation_files import CLASSES, PROVENANCE, folders, picture, prepared, rows_of, save, targets, write_folders

COUNTS = {"train": 4, "validation": 2, "test": 3}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A source in folders, in a path with a space."""
    write_folders(tmp_path / "raw data")
    return tmp_path / "raw data"


# One image and its labels


def one(tmp_path: Path, image: np.ndarray, labels: np.ndarray) -> File:
    values = np.full(256, UNKNOWN, dtype=np.int16)
    values[:200] = np.arange(200)
    values[IGNORE] = IGNORE
    paths = save(tmp_path / "image.png", image), save(tmp_path / "labels.png", labels)
    return File("x", "train", *paths, values)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(16, 30), st.integers(16, 30), st.integers(0, 99))
def test_labels_take_the_nearest_pixel_and_are_never_mixed(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, tall: int, wide: int, seed: int
) -> None:
    labels = targets(height, width, [0, 7, 199, 255], seed)
    row = read(one(tmp_path_factory.mktemp("one"), picture(height, width, seed), labels), (tall, wide), "resize")
    assert (row.image.shape, row.labels.shape, row.original) == ((tall, wide, 3), (tall, wide), (height, width))
    for y in range(tall):
        for x in range(wide):
            above, left = (y + 0.5) * height / tall, (x + 0.5) * width / wide
            # On the border between two pixels either is the nearest one.
            near = {
                int(labels[min(int(i), height - 1), min(int(j), width - 1)])
                for i in (above - 1e-6, above + 1e-6)
                for j in (left - 1e-6, left + 1e-6)
            }
            assert int(row.labels[y, x]) in near


def test_a_reduced_image_is_smoothed_and_stays_where_it_is(tmp_path: Path) -> None:
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    image = np.dstack([board, np.repeat(np.arange(64)[:, None] * 4, 64, 1), np.repeat([np.arange(64) * 4], 64, 0)])
    row = read(one(tmp_path, image.astype(np.uint8), np.zeros((64, 64), np.uint8)), (16, 16), "resize")
    inner = row.image[2:-2, 2:-2].astype(float)
    np.testing.assert_allclose(inner[..., 0], 127.5, atol=3)  # without a wide filter: 0 or 255
    centres = (np.arange(2, 14) + 0.5) * 4 - 0.5
    np.testing.assert_allclose(inner[..., 1], np.repeat(centres[:, None] * 4, 12, 1), atol=2)
    np.testing.assert_allclose(inner[..., 2], np.repeat(centres[None] * 4, 12, 0), atol=2)


@pytest.mark.parametrize("fit", ["resize", "pad"])
def test_images_of_the_right_size_are_kept_to_the_bit(tmp_path: Path, fit: str) -> None:
    image, labels = picture(16, 20), targets(16, 20, [0, 5, 255])
    row = read(one(tmp_path, image, labels), (16, 20), fit)
    np.testing.assert_array_equal(row.image, image)
    np.testing.assert_array_equal(row.labels, labels)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(16, 20, (16, 20)), (8, 6, (8, 6)), (32, 40, (16, 20)), (32, 20, (16, 10)), (16, 40, (8, 20)), (64, 1, (16, 1))],
)
def test_pad_reduces_with_proportions_and_enlarges_nothing(
    tmp_path: Path, height: int, width: int, expected: tuple[int, int]
) -> None:
    row = read(one(tmp_path, picture(height, width), targets(height, width, [3])), (16, 20), "pad")
    assert row.labels.shape == row.image.shape[:2] == expected
    assert row.original == (height, width)


def test_what_is_filled_up_is_black_without_a_label_and_outside_of_all_statistics(tmp_path: Path, raw: Path) -> None:
    small = picture(8, 10, 77)
    save(raw / "train" / "images" / "frame 0.png", small)
    save(raw / "train" / "labels" / "frame 0.png", targets(8, 10, [1]))
    for index in range(1, 4):
        (raw / "train" / "images" / f"frame {index}.png").unlink()
        (raw / "train" / "labels" / f"frame {index}.png").unlink()
    folder = prepared(raw, folders(fit="pad"), tmp_path / "out")
    ids, images, labels = load(folder, "train")
    assert ids == ["train/frame 0"]
    np.testing.assert_array_equal(images[0, :, :8, :10], small.transpose(2, 0, 1))
    assert images[0].sum() == small.sum()
    assert (labels[0, :8, :10] == 1).all()
    assert (labels == IGNORE).sum() == 16 * 20 - 80
    description = describe(folder)
    assert description["fit"] == "pad"
    np.testing.assert_allclose(description["mean"], small.mean(axis=(0, 1)) / 255, atol=1e-6)
    np.testing.assert_allclose(description["std"], small.std(axis=(0, 1)) / 255, atol=1e-6)
    assert description["pixels"] == {"road": 0, "sky": 80, "tree": 0}
    (row,) = [row for row in rows_of(folder) if row["split"] == "train"]
    assert (row["height"], row["width"], float(row["ignored"])) == ("8", "10", 0.75)
    assert float(row["mean"]) == pytest.approx(small.mean() / 255, abs=1e-6)
    assert float(row["spread"]) == pytest.approx(small.std() / 255, abs=1e-6)


# What is prepared


def test_preparing_twice_gives_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    one_folder, two = (prepared(raw, folders(), tmp_path / name) for name in ("one", "two"))
    assert sorted(path.name for path in one_folder.iterdir()) == [
        *("dataset.json", "images.npy", "labels.npy", "manifest.csv"),
    ]
    assert tree_digest(one_folder) == tree_digest(two)


def test_manifest_and_description_say_what_the_arrays_are(raw: Path, tmp_path: Path) -> None:
    folder = prepared(raw, folders(), tmp_path / "out")
    images, labels = np.load(folder / "images.npy"), np.load(folder / "labels.npy")
    assert (images.shape, labels.shape) == ((9, 3, 16, 20), (9, 16, 20))
    rows = rows_of(folder)
    assert [row["split"] for row in rows] == ["train"] * 4 + ["validation"] * 2 + ["test"] * 3
    for row, image, target in zip(rows, images, labels, strict=True):
        pixels = [value / 255 for value in image.ravel().tolist()]
        mean = math.fsum(pixels) / len(pixels)
        assert row["sha256"] == hashlib.sha256(bytes(image.ravel().tolist())).hexdigest()
        assert row["labels_sha256"] == hashlib.sha256(bytes(target.ravel().tolist())).hexdigest()
        assert float(row["mean"]) == pytest.approx(mean, abs=1e-6)
        assert float(row["spread"]) ** 2 == pytest.approx(
            math.fsum((value - mean) ** 2 for value in pixels) / len(pixels), abs=1e-5
        )
        assert float(row["ignored"]) == pytest.approx((target == 255).sum() / 320, abs=1e-6)
    description = json.loads((folder / "dataset.json").read_text())
    assert list(description) == ["classes", "size", "fit", "channels", "mean", "std", "samples", "pixels", "source"]
    assert (description["classes"], description["size"], description["channels"]) == (CLASSES, [16, 20], 3)
    assert description["fit"] == "resize"
    np.testing.assert_allclose(description["mean"], images[:4].mean(axis=(0, 2, 3)) / 255, atol=1e-6)
    np.testing.assert_allclose(description["std"], images[:4].std(axis=(0, 2, 3)) / 255, atol=1e-6)
    assert description["samples"] == COUNTS
    assert description["pixels"] == {name: int((labels[:4] == index).sum()) for index, name in enumerate(CLASSES)}
    assert description["source"] == PROVENANCE


def test_load_gives_every_sample_to_one_split_and_leaves_the_files_alone(raw: Path, tmp_path: Path) -> None:
    folder = prepared(raw, folders(), tmp_path / "out")
    before = tree_digest(folder)
    images, labels = np.load(folder / "images.npy"), np.load(folder / "labels.npy")
    start = 0
    for split, count in COUNTS.items():
        ids, found, target = load(folder, split)
        assert (len(ids), found.dtype, target.dtype) == (count, torch.uint8, torch.uint8)
        np.testing.assert_array_equal(found, images[start : start + count])
        np.testing.assert_array_equal(target, labels[start : start + count])
        np.testing.assert_array_equal(found[torch.tensor([count - 1, 0])], images[[start + count - 1, start]])
        found.zero_()
        target.zero_()
        start += count
    assert tree_digest(folder) == before
    assert load(folder, "test")[1].any()


def test_to_unit_scales_every_value() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(values)
    assert unit.dtype == torch.float32
    np.testing.assert_allclose(unit.double(), np.arange(256) / 255, atol=1e-7)


def test_rows_of_another_size_never_reach_a_file(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrays are written row by row: a row of another size would shift all that follow."""
    from data import segmentation

    wrong = Row("x", "train", (40, 40), picture(40, 40), targets(40, 40, [0]))
    monkeypatch.setattr(segmentation, "read", lambda *_: wrong)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="shape"):
        prepare(raw, folders(), tmp_path / "out", PROVENANCE)


# What is expected


def failures(folder: Path, entry: Dataset, docs: Path) -> list[str]:
    docs.mkdir(exist_ok=True)
    found = validate("toy", tables(folder), expectations(entry, describe(folder)), docs)
    assert all(finding.error is None for finding in found)
    return [finding.sentence for finding in found if not finding.success]


def poke(folder: Path, name: str, *edits: tuple[tuple[int, ...], int]) -> None:
    array = np.load(folder / name)
    for place, value in edits:
        array[place] = value
    np.save(folder / name, array)


def test_sound_data_meet_what_is_expected(raw: Path, tmp_path: Path) -> None:
    entry = folders(expect={"samples": 9, "ignored": 0.4, "smallest_class": 0.2, "largest_class": 0.5})
    folder = prepared(raw, entry, tmp_path / "out")
    assert failures(folder, entry, tmp_path / "docs") == []
    found = tables(folder)
    balance = found["balance"]
    assert balance["id"].tolist()[:4] == ["train/road", "train/sky", "train/tree", "validation/road"]
    labels = np.load(folder / "labels.npy")
    np.testing.assert_allclose(
        balance["share"][:3], np.bincount(labels[:4].ravel())[:3] / (labels[:4] != IGNORE).sum(), atol=1e-6
    )
    np.testing.assert_allclose(found["splits"]["ignored"][2], (labels[6:] == IGNORE).mean(), atol=1e-6)
    strict = folders(expect={"samples": 8, "ignored": 0.1, "smallest_class": 0.33, "largest_class": 0.34})
    broken = failures(folder, strict, tmp_path / "docs")
    assert [text.split(":")[0] for text in broken] == ["manifest", "splits", "balance"]


def test_damage_of_the_arrays_is_found(raw: Path, tmp_path: Path) -> None:
    folder = prepared(raw, folders(), tmp_path / "out")
    labels = np.load(folder / "labels.npy")
    labels[5] = IGNORE
    labels[3, 2, 2] = 3
    np.save(folder / "labels.npy", labels)
    images = np.load(folder / "images.npy")
    poke(folder, "images.npy", ((1, 0, 0, 0), int(images[1, 0, 0, 0]) ^ 1))
    broken = failures(folder, folders(), tmp_path / "docs")
    expected = (
        "every label is a class, or marks a pixel without one; 1 row is not so: train/frame 3",
        "every image has a pixel with a label; 1 row is not so: validation/frame 1",
        "sha256 must equal stored_sha256; 1 row is not so: train/frame 1",
        "labels_sha256 must equal stored_labels_sha256; 2 rows are not so: train/frame 3",
        "ignored must equal stored_ignored; ",
    )
    for sentence in expected:
        assert any(sentence in text for text in broken), (sentence, broken)


def test_one_image_in_two_splits_and_a_class_that_training_lacks_are_found(raw: Path, tmp_path: Path) -> None:
    shutil.copy(raw / "train/images/frame 2.png", raw / "test/images/frame 1.png")
    for index in range(4):
        save(raw / "train/labels" / f"frame {index}.png", targets(16, 20, [0, 1, 11], index))
    folder = prepared(raw, folders(), tmp_path / "out")
    leak, lost = failures(folder, folders(), tmp_path / "docs")
    assert "the same image never stands in two splits; 2 rows are not so: train/frame 2" in leak
    assert "every class occurs in the training split; 1 row is not so: train/tree (0)" in lost
    twins = tables(folder)["manifest"].set_index("id")["twin"]
    assert (twins["train/frame 2"], twins["test/frame 1"]) == ("test/frame 1", "train/frame 2")


def test_arrays_that_do_not_fit_the_manifest_are_refused(raw: Path, tmp_path: Path) -> None:
    folder = prepared(raw, folders(), tmp_path / "out")
    np.save(folder / "labels.npy", np.zeros((9, 16, 19), np.uint8))
    with pytest.raises(UserError, match=re.escape("uint8 of shape (9, 16, 19); manifest and dataset.json say uint8")):
        tables(folder)
    (folder / "labels.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"labels\.npy cannot be read"):
        tables(folder)
    lines = (folder / "manifest.csv").read_text().splitlines()
    (folder / "manifest.csv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    with pytest.raises(UserError, match="is not in the order train, validation, test"):
        tables(folder)


# Real data


@pytest.mark.bench
@pytest.mark.skipif(not os.environ.get("DISTILLERY_DATA"), reason="DISTILLERY_DATA names no folder with real data")
def test_camvid_is_prepared_and_meets_what_its_description_says(tmp_path: Path) -> None:
    source = Path(os.environ["DISTILLERY_DATA"]) / "camvid-small"
    meta = json.loads((source / "meta.json").read_text())
    entry = folders(image_size=[180, 240], classes=meta["classes"][:-1], expect={"samples": 701, "ignored": 0.05})
    folder = prepared(source, entry, tmp_path / "out")
    assert failures(folder, entry, tmp_path / "docs") == []
    found = tables(folder)
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        shares = meta["splits"][name]["pixel_share"]
        rows = found["balance"][found["balance"]["split"] == split]
        total = meta["splits"][name]["n"] * 180 * 240
        assert (rows["pixels"] / total).to_numpy() == pytest.approx(list(shares.values())[:-1], abs=1e-5)
        ignored = found["splits"].set_index("id")["ignored"][split]
        assert ignored == pytest.approx(shares["unlabelled"], abs=1e-5)
