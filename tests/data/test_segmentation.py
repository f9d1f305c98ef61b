"""Images with a class per pixel: read as the formats say, brought to one size, prepared to the same bytes, checked."""

import csv
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.errors import UserError
from data.expectations import validate
from data.files import tree_digest
from data.segmentation import (
    CITYSCAPES,
    IGNORE,
    SPLITS,
    UNKNOWN,
    VOC,
    File,
    Row,
    describe,
    expectations,
    load,
    prepare,
    read,
    read_labels,
    tables,
    to_unit,
)
from stages.parameters.segmentation import Dataset

PROVENANCE = {"name": "toy", "licence": "none", "credit": "random numbers", "redistributable": True}
CLASSES = ["road", "sky", "tree"]
PALETTE = np.random.default_rng(0).integers(0, 256, 768).tolist()


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def targets(height: int, width: int, values: list[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array(values, np.uint8), (height, width))


def save(path: Path, pixels: np.ndarray, palette: bool = False, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(PALETTE)
    image.save(path, **options)
    return path


def dataset(form: str, **changes: Any) -> Dataset:
    entry: dict[str, Any] = {"task": "segmentation", "source": "toy", "format": form, "size": [16, 20]}
    return Dataset.model_validate(
        {**entry, **({"validation": 0.3} if form in ("cityscapes", "voc") else {}), **changes}
    )


def folders(**changes: Any) -> Dataset:
    return dataset("folders", **{"classes": CLASSES, "ignore": 11, **changes})


def prepared(raw: Path, entry: Dataset, output: Path) -> Path:
    output.mkdir()
    prepare(raw, entry, output, PROVENANCE)
    return output


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


COUNTS = {"train": 4, "validation": 2, "test": 3}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A source in folders, in a path with a space; 11 marks pixels without a label."""
    folder = tmp_path / "raw data"
    for number, (name, count) in enumerate({"train": 4, "val": 2, "test": 3}.items()):
        for index in range(count):
            seed = 10 * number + index
            save(folder / name / "images" / f"frame {index}.png", picture(16, 20, seed))
            save(folder / name / "labels" / f"frame {index}.png", targets(16, 20, [0, 1, 2, 11], seed))
    (folder / "README.md").write_text("about")
    return folder


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
    np.testing.assert_allclose(description["mean"], small.mean(axis=(0, 1)) / 255, atol=1e-6)
    np.testing.assert_allclose(description["std"], small.std(axis=(0, 1)) / 255, atol=1e-6)
    assert description["pixels"] == {"road": 0, "sky": 80, "tree": 0}
    (row,) = [row for row in rows_of(folder) if row["split"] == "train"]
    assert (row["height"], row["width"], float(row["ignored"])) == ("8", "10", 0.75)
    assert float(row["mean"]) == pytest.approx(small.mean() / 255, abs=1e-6)
    assert float(row["spread"]) == pytest.approx(small.std() / 255, abs=1e-6)


# Mistakes in files


def mistake(raw: Path, entry: Dataset, output: Path) -> str:
    output.mkdir(exist_ok=True)
    with pytest.raises(UserError) as caught:
        prepare(raw, entry, output, PROVENANCE)
    return str(caught.value)


BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (lambda raw: (raw / "val/labels/frame 1.png").unlink(), "val/images/frame 1.png has no labels in"),
    (lambda raw: (raw / "val/images/frame 1.png").unlink(), "val/labels/frame 1.png has no image in"),
    (lambda raw: (raw / "test/images/frame 2.png").write_bytes(b"no"), "test/images/frame 2.png is no complete image"),
    (lambda raw: (raw / "test/labels/frame 2.png").write_bytes(b"no"), "test/labels/frame 2.png is no complete image"),
    (
        lambda raw: save(raw / "train/labels/frame 3.png", targets(16, 20, [0, 3, 12])),
        "train/labels/frame 3.png holds the labels 3, 12; known are 0-2, 11",
    ),
    (
        lambda raw: save(raw / "train/labels/frame 3.png", targets(16, 20, [255])),
        "train/labels/frame 3.png holds the label 255; known are 0-2, 11",
    ),
    (
        lambda raw: save(raw / "train/labels/frame 3.png", targets(20, 16, [0])),
        "frame 3.png is 16 x 20 pixels, but its labels ",
    ),
    (lambda raw: save(raw / "train/labels/frame 3.png", picture(16, 20)), "train/labels/frame 3.png has mode RGB"),
    (
        lambda raw: save(raw / "train/labels/frame 3.png", np.ones((16, 20), np.uint16)),
        "train/labels/frame 3.png has mode I;16",
    ),
    (
        lambda raw: save(raw / "train/images/frame 3.png", np.ones((16, 20), np.uint16)),
        "train/images/frame 3.png has more than 8 bits per channel (mode I;16)",
    ),
    (
        lambda raw: save(raw / "train/images/frame 3.jpg", picture(16, 20)),
        "frame 3.png have one name, 'frame 3'",
    ),
    (lambda raw: shutil.rmtree(raw / "test/labels"), "test/labels is missing"),
    (lambda raw: shutil.rmtree(raw / "val"), "must hold one folder validation or val, but holds README.md"),
    (lambda raw: shutil.copytree(raw / "val", raw / "validation"), "must hold one folder validation or val, but holds"),
    (
        lambda raw: [path.unlink() for path in (raw / "test").rglob("*.png")],
        "has no sample for the split 'test' (found: {'train': 4, 'validation': 2, 'test': 0})",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[message[-40:] for _, message in BROKEN])
def test_a_mistake_in_a_source_is_named_with_its_file(
    raw: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(raw)
    found = mistake(raw, folders(), tmp_path / "out")
    assert message in found
    assert str(raw) in found
    assert " · " in found


def test_a_label_that_is_class_and_ignored_is_refused(raw: Path, tmp_path: Path) -> None:
    found = mistake(raw, folders(ignore=2), tmp_path / "out")
    assert "`ignore` 2 is also the label of the class 'tree' (of 3 classes)" in found


def test_a_picture_that_is_stored_turned_is_refused(raw: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (raw / "train/images/frame 0.png").unlink()
    path = save(raw / "train/images/frame 0.jpg", picture(16, 20), exif=exif)
    assert f"{path} is stored turned (Exif orientation 6)" in mistake(raw, folders(), tmp_path / "out")


def test_labels_are_grey_values_or_indices_of_a_palette(tmp_path: Path) -> None:
    labels = targets(9, 7, [0, 1, 2, 255])
    values = np.full(256, UNKNOWN, dtype=np.int16)
    values[[0, 1, 2, 255]] = [2, 0, 1, 255]
    grey, indices = save(tmp_path / "grey.png", labels), save(tmp_path / "indices.png", labels, palette=True)
    assert Image.open(indices).mode == "P"
    expected = np.choose(np.minimum(labels, 3), [2, 0, 1, 255])
    np.testing.assert_array_equal(read_labels(grey, values), expected)
    np.testing.assert_array_equal(read_labels(indices, values), expected)


# The formats


def test_folders_pair_by_name_whatever_the_endings(raw: Path, tmp_path: Path) -> None:
    """Also in folders below, with jpg beside png, and `validation` for `val`; hidden files are no images."""
    (raw / "val").rename(raw / "validation")
    save(raw / "train/images/a drive/0.jpg", picture(16, 20, 5), quality=95)
    save(raw / "train/labels/a drive/0.png", targets(16, 20, [2]))
    (raw / "train/images/._frame 0.png").write_bytes(b"\0")
    folder = prepared(raw, folders(), tmp_path / "out")
    assert [row["id"] for row in rows_of(folder)] == [
        *("train/a drive/0", "train/frame 0", "train/frame 1", "train/frame 2", "train/frame 3"),
        *("validation/frame 0", "validation/frame 1", "test/frame 0", "test/frame 1", "test/frame 2"),
    ]
    _, images, labels = load(folder, "train")
    assert (labels[0] == 2).all()
    for index in range(4):
        np.testing.assert_array_equal(images[1 + index], picture(16, 20, index).transpose(2, 0, 1))
        stored = targets(16, 20, [0, 1, 2, 11], index)
        np.testing.assert_array_equal(labels[1 + index], np.where(stored == 11, IGNORE, stored))


CITIES = {"train": {"aachen": 5, "bochum": 3, "bremen": 4, "köln": 8}, "val": {"ulm": 2, "lindau": 1}}


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    folder = tmp_path / "cityscapes"
    for part, cities in CITIES.items():
        for city, count in cities.items():
            for index in range(count):
                name, seed = f"{city}_{index:06d}_000019", hash_of(city) + index
                save(folder / "leftImg8bit" / part / city / f"{name}_leftImg8bit.png", picture(32, 40, seed))
                labels = targets(32, 40, list(range(34)), seed)
                save(folder / "gtFine" / part / city / f"{name}_gtFine_labelIds.png", labels)
                save(folder / "gtFine" / part / city / f"{name}_gtFine_color.png", picture(2, 2))
    save(folder / "leftImg8bit" / "test" / "berlin" / "berlin_0_0_leftImg8bit.png", picture(2, 2))
    return folder


def hash_of(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:6], 16)


def test_cityscapes_label_ids_become_the_19_classes(cityscapes: Path, tmp_path: Path) -> None:
    folder = prepared(cityscapes, dataset("cityscapes", size=[32, 40]), tmp_path / "out")
    assert describe(folder)["classes"] == list(CITYSCAPES)
    assert len(CITYSCAPES) == 19
    # From the definition of the data set: label ids in the order of the train ids 0-18.
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    names, images, labels = load(folder, "test")
    assert names == ["lindau/lindau_000000_000019", "ulm/ulm_000000_000019", "ulm/ulm_000001_000019"]
    for position, (city, index) in enumerate([("lindau", 0), ("ulm", 0), ("ulm", 1)]):
        np.testing.assert_array_equal(images[position], picture(32, 40, hash_of(city) + index).transpose(2, 0, 1))
        stored = targets(32, 40, list(range(34)), hash_of(city) + index)
        for value in range(34):
            expected = ids.index(value) if value in ids else IGNORE
            assert (labels[position].numpy()[stored == value] == expected).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.95])
def test_whole_cities_are_held_out_as_near_to_the_share_as_their_order_allows(
    cityscapes: Path, tmp_path: Path, seed: int, share: float
) -> None:
    folder = prepared(cityscapes, dataset("cityscapes", validation=share, split_seed=seed), tmp_path / "out")
    found = {split: {row["id"].split("/")[0] for row in rows_of(folder) if row["split"] == split} for split in SPLITS}
    assert found["test"] == {"ulm", "lindau"}
    assert found["train"]
    assert found["validation"]
    assert not found["train"] & found["validation"]
    assert found["train"] | found["validation"] == CITIES["train"].keys()
    counts = CITIES["train"]
    held = sum(counts[city] for city in found["validation"])
    assert describe(folder)["samples"] == {"train": 20 - held, "validation": held, "test": 3}
    # One city more or less of the chosen ones is no nearer in the worst case than the largest city.
    assert abs(held - 20 * share) <= max(counts.values())


def test_other_seeds_hold_other_cities_out(cityscapes: Path, tmp_path: Path) -> None:
    chosen = set()
    for seed in range(8):
        folder = prepared(cityscapes, dataset("cityscapes", split_seed=seed), tmp_path / str(seed))
        chosen.add(frozenset(row["id"].split("/")[0] for row in rows_of(folder) if row["split"] == "validation"))
    assert len(chosen) > 2


def test_cityscapes_train_ids_serve_where_label_ids_are_absent(cityscapes: Path, tmp_path: Path) -> None:
    ulm = cityscapes / "gtFine" / "val" / "ulm"
    (ulm / "ulm_000000_000019_gtFine_labelIds.png").unlink()
    expected = targets(32, 40, [*range(19), 255])
    save(ulm / "ulm_000000_000019_gtFine_labelTrainIds.png", expected)
    folder = prepared(cityscapes, dataset("cityscapes", size=[32, 40]), tmp_path / "out")
    ids, _, labels = load(folder, "test")
    np.testing.assert_array_equal(labels[ids.index("ulm/ulm_000000_000019")], expected)
    save(ulm / "ulm_000000_000019_gtFine_labelTrainIds.png", targets(32, 40, [0, 19]))
    message = mistake(cityscapes, dataset("cityscapes"), tmp_path / "two")
    assert "ulm_000000_000019_gtFine_labelTrainIds.png holds the label 19; known are 0-18, 255" in message
    (ulm / "ulm_000000_000019_gtFine_labelTrainIds.png").unlink()
    message = mistake(cityscapes, dataset("cityscapes"), tmp_path / "three")
    assert "ulm_000000_000019_leftImg8bit.png has no labels in" in message
    assert str(cityscapes / "gtFine" / "val") in message


def test_one_city_cannot_be_split(cityscapes: Path, tmp_path: Path) -> None:
    for city in ("bochum", "bremen", "köln"):
        shutil.rmtree(cityscapes / "leftImg8bit" / "train" / city)
        shutil.rmtree(cityscapes / "gtFine" / "train" / city)
    message = mistake(cityscapes, dataset("cityscapes"), tmp_path / "out")
    assert "`validation` holds whole cities out of the training split, which has 1" in message
    shutil.rmtree(cityscapes / "gtFine")
    assert f"the folder {cityscapes / 'gtFine' / 'train'} is missing" in mistake(
        cityscapes, dataset("cityscapes"), tmp_path / "out"
    )


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    folder = tmp_path / "VOC2012"
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for part, stems in {"train": [f"2007_{index:06d}" for index in range(10)], "val": ["2008_1", "2008_2"]}.items():
        (lists / f"{part}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        for stem in stems:
            save(folder / "JPEGImages" / f"{stem}.jpg", picture(20, 30, hash_of(stem)))
            labels = targets(20, 30, [0, 15, 20, 255], hash_of(stem))
            save(folder / "SegmentationClass" / f"{stem}.png", labels, palette=True)
    save(folder / "JPEGImages" / "of another task.jpg", picture(5, 5))
    return folder


def test_voc_reads_palettes_by_its_lists(voc: Path, tmp_path: Path) -> None:
    folder = prepared(voc, dataset("voc", size=[24, 32], fit="pad"), tmp_path / "out")
    assert describe(folder)["classes"] == VOC
    assert len(VOC) == 21
    assert describe(folder)["samples"] == {"train": 7, "validation": 3, "test": 2}
    ids, _, labels = load(folder, "test")
    assert ids == ["2008_1", "2008_2"]
    for stem, found in zip(ids, labels.numpy(), strict=True):
        np.testing.assert_array_equal(found[:20, :30], targets(20, 30, [0, 15, 20, 255], hash_of(stem)))
        assert (found[20:] == IGNORE).all()
        assert (found[:, 30:] == IGNORE).all()
    train, _, _ = load(folder, "train")
    validation, _, _ = load(folder, "validation")
    assert sorted(train + validation) == [f"2007_{index:06d}" for index in range(10)]


def test_what_voc_lists_has_to_be_there(voc: Path, tmp_path: Path) -> None:
    (voc / "SegmentationClass" / "2008_2.png").unlink()
    message = mistake(voc, dataset("voc"), tmp_path / "out")
    assert f"{voc / 'SegmentationClass' / '2008_2.png'} is missing, but" in message
    assert "val.txt lists '2008_2'" in message
    save(voc / "SegmentationClass" / "2008_2.png", targets(20, 30, [21]), palette=True)
    assert "2008_2.png holds the label 21; known are 0-20, 255" in mistake(voc, dataset("voc"), tmp_path / "out")
    (voc / "ImageSets" / "Segmentation" / "train.txt").unlink()
    assert "train.txt cannot be read" in mistake(voc, dataset("voc"), tmp_path / "out")


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
    assert list(description) == ["classes", "size", "channels", "mean", "std", "samples", "pixels", "source"]
    assert (description["classes"], description["size"], description["channels"]) == (CLASSES, [16, 20], 3)
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
    entry = folders(size=[180, 240], classes=meta["classes"][:-1], expect={"samples": 701, "ignored": 0.05})
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
