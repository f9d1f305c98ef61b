"""Sources of images with a class per pixel: read as their formats say, every mistake named with its file."""

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.errors import UserError
from data.segmentation import CITYSCAPES, IGNORE, SPLITS, UNKNOWN, VOC, describe, load, prepare, read_labels
from stages.parameters.segmentation import Dataset

sys.path.insert(0, str(Path(__file__).parent))
from segmentation_files import PROVENANCE, dataset, folders, picture, prepared, rows_of, save, targets, write_folders


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A source in folders, in a path with a space."""
    write_folders(tmp_path / "raw data")
    return tmp_path / "raw data"


# Mistakes in files


def mistake(raw: Path, entry: Dataset, output: Path) -> str:
    output.mkdir(exist_ok=True)
    with pytest.raises(UserError) as caught:
        prepare(raw, entry, output, PROVENANCE)
    return str(caught.value)


def empty_test(raw: Path) -> None:
    for name in ("images", "labels"):
        shutil.rmtree(raw / "test" / name)
        (raw / "test" / name).mkdir()


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
        empty_test,
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
    folder = prepared(cityscapes, dataset("cityscapes", image_size=[32, 40]), tmp_path / "out")
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
    folder = prepared(cityscapes, dataset("cityscapes", image_size=[32, 40]), tmp_path / "out")
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
    folder = prepared(voc, dataset("voc", image_size=[24, 32], fit="pad"), tmp_path / "out")
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
