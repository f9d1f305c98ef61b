"""Classes that are held out, and images out of arrays: each class in one split, arrays read as files are."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.errors import UserError
from data.files import tree_digest
from data.recognition import class_names, describe, load, prepare, read_arrays, read_folder, split_by_classes
from stages.parameters.recognition import Dataset, Keys

PROVENANCE = {"name": "toy", "licence": "none", "credit": "random numbers", "redistributable": True}
KEYS = Keys()


def some_images(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def dataset(**fields: Any) -> Dataset:
    entry = {"task": "recognition", "source": "toy", "encoder": "none", "format": "arrays", "image_size": 6}
    return Dataset.model_validate({**entry, "file": "toy.npz", "channels": 1, **fields})


def by_classes(validation: int, test: int) -> dict[str, Any]:
    return {"by": "classes", "validation": validation, "test": test}


def prepared(folder: Path, images: np.ndarray, labels: np.ndarray, **fields: Any) -> Path:
    """The real `prepare` on a file of arrays."""
    np.savez(folder / "toy.npz", images=images, labels=labels)
    output = folder / f"out {len(list(folder.iterdir()))}"
    output.mkdir()
    prepare(folder, dataset(**fields), output, PROVENANCE)
    return output


# Arrays


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 5), st.integers(1, 20), st.integers(1, 20), st.booleans(), st.sampled_from([1, 3]),
    st.integers(4, 9), st.integers(0, 99),
)  # fmt: skip
def test_arrays_become_what_the_same_images_become_as_files(
    count: int, height: int, width: int, colour: bool, channels: int, size: int, seed: int
) -> None:
    images = some_images(count, height, width, *((3,) if colour else ()), seed=seed)
    labels = np.random.default_rng(seed).integers(0, 3, count).astype(np.int16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "toy.npz", pictures=images, kinds=labels, other=np.zeros(3))
        found = read_arrays(folder / "toy.npz", Keys(images="pictures", labels="kinds"), size, channels, list("abc"))
        for index, image in enumerate(images):
            (folder / "one").mkdir(exist_ok=True)
            Image.fromarray(image).save(folder / "one" / f"{index}.png")
        files = read_folder(folder, size, channels, None)
    np.testing.assert_array_equal(found.images, files.images)
    assert (found.images.dtype, found.labels.dtype) == (np.uint8, np.int64)
    assert found.labels.tolist() == labels.tolist()
    assert found.classes == ["a", "b", "c"]
    assert found.sizes.tolist() == files.sizes.tolist() == [[height, width]] * count
    assert len(set(found.ids)) == count


def test_numbers_name_the_classes_that_have_no_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=some_images(5, 6, 6), labels=np.array([10, -3, 9, 10, 100]))
    samples = read_arrays(tmp_path / "a.npz", KEYS, 6, 1, None)
    assert samples.classes == ["-3", "9", "10", "100"]
    assert [samples.classes[label] for label in samples.labels] == ["10", "-3", "9", "10", "100"]


IMAGES, LABELS = some_images(3, 6, 6), np.arange(3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": LABELS}, "has no array of images ('images'); it has labels · correct `keys`"),
        ({"x": IMAGES}, "has no array of images ('images') and labels ('labels'); it has x"),
        (
            {"images": IMAGES.astype(float), "labels": LABELS},
            "images is float64 of shape (3, 6, 6), but images are uint8",
        ),
        ({"images": IMAGES.astype(np.int8), "labels": LABELS}, "images is int8 of shape (3, 6, 6)"),
        ({"images": IMAGES[0], "labels": LABELS}, "images is uint8 of shape (6, 6)"),
        ({"images": some_images(3, 6, 6, 4), "labels": LABELS}, "images is uint8 of shape (3, 6, 6, 4)"),
        ({"images": some_images(3, 3, 6, 6), "labels": LABELS}, "images is uint8 of shape (3, 3, 6, 6)"),
        ({"images": some_images(3, 2, 6, 6, 3), "labels": LABELS}, "images is uint8 of shape (3, 2, 6, 6, 3)"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "images is uint8 of shape (0, 6, 6)"),
        ({"images": IMAGES[:, :0], "labels": LABELS}, "images is uint8 of shape (3, 0, 6)"),
        ({"images": IMAGES, "labels": LABELS[:2]}, "labels is int64 of shape (2,), but 3 images have whole numbers"),
        ({"images": IMAGES, "labels": LABELS[:, None]}, "labels is int64 of shape (3, 1), but 3 images"),
        ({"images": IMAGES, "labels": LABELS.astype(float)}, "labels is float64 of shape (3,), but 3 images"),
        ({"images": IMAGES, "labels": np.array(["a", "b", "c"])}, "labels is <U1 of shape (3,), but 3 images"),
        ({"images": IMAGES, "labels": np.array([0, 1, None])}, "cannot be read as .npz of plain arrays"),
        ({"images": IMAGES, "labels": LABELS + 1}, "labels holds 3, but `classes` names the labels 0 to 2"),
        ({"images": IMAGES, "labels": LABELS - 1}, "labels holds -1, but `classes` names the labels 0 to 2"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "a.npz")) + ":? " + re.escape(message)):
        read_arrays(tmp_path / "a.npz", KEYS, 6, 1, ["x", "y", "z"])


def test_a_file_that_is_missing_or_damaged_is_refused(tmp_path: Path) -> None:
    message = re.escape(f"{tmp_path / 'a.npz'} cannot be read as .npz of plain arrays")
    with pytest.raises(UserError, match=message):
        read_arrays(tmp_path / "a.npz", KEYS, 6, 1, None)
    np.savez_compressed(tmp_path / "whole.npz", images=some_images(40, 6, 6), labels=np.arange(40))
    content = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "one.npy", LABELS)
    cases = [content[:end] for end in range(0, len(content) - 1, 31)] + [(tmp_path / "one.npy").read_bytes()]
    for place in range(60, len(content) // 2, 31):
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        cases.append(bytes(damaged))
    assert len(cases) > 70
    for case in cases:
        (tmp_path / "a.npz").write_bytes(case)
        with pytest.raises(UserError, match=message):
            read_arrays(tmp_path / "a.npz", KEYS, 6, 1, None)


# A folder inside the source


def test_a_folder_of_the_source_holds_the_classes(tmp_path: Path) -> None:
    for name, count in (("a", 4), ("b", 5)):
        for index in range(count):
            path = tmp_path / "raw" / "set" / "images" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(some_images(1, 6, 6, seed=len(name) + index)[0]).save(path)
    (tmp_path / "raw" / "set" / "other").mkdir()
    fields = {"format": "folder", "file": None, "split": {"validation": 2, "test": 2}}
    (tmp_path / "out").mkdir()
    prepare(tmp_path / "raw", dataset(**fields, folder="set/images"), tmp_path / "out", PROVENANCE)
    assert describe(tmp_path / "out")["classes"] == ["a", "b"]
    ids = [name for part in ("train", "validation", "test") for name in load(tmp_path / "out", part)[0]]
    assert sorted(ids) == [*(f"a/{n}.png" for n in range(4)), *(f"b/{n}.png" for n in range(5))]
    with pytest.raises(UserError, match=re.escape(f"no folder {tmp_path / 'raw' / 'sett'} · correct `folder`")):
        prepare(tmp_path / "raw", dataset(**fields, folder="sett"), tmp_path / "out", PROVENANCE)


# Classes held out


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_whole_classes_are_held_out_from_the_end(trained: int, validation: int, test: int, seed: int) -> None:
    count = trained + validation + test
    labels = np.random.default_rng(seed).integers(0, count, 80)
    part = split_by_classes(labels, count, {"validation": validation, "test": test})
    for label, name in zip(labels, part, strict=True):
        assert name == ("train" if label < trained else "validation" if label < trained + validation else "test")
    with pytest.raises(UserError, match=rf"= {count} classes are held out, but there are only {count},"):
        split_by_classes(labels, count, {"validation": validation, "test": trained + test})


def test_held_out_classes_are_described_after_those_of_training(tmp_path: Path) -> None:
    images, labels = some_images(42, 6, 6), np.random.default_rng(1).permutation(np.arange(42) % 7)
    names = [f"class {letter}" for letter in "gfedcba"]
    folder = prepared(tmp_path, images, labels, classes=names, split=by_classes(1, 2))
    description = describe(folder)
    assert (description["classes"], description["held_out"]) == (names[:4], names[4:])
    assert class_names(description) == names
    assert description["samples"] == {"train": 24, "validation": 6, "test": 12}
    assert description["verification"] is None
    for part, wanted in (("train", [0, 1, 2, 3]), ("validation", [4]), ("test", [5, 6])):
        ids, pixels, found = load(folder, part)
        rows = [int(name.removeprefix("row-")) for name in ids]
        assert rows == np.flatnonzero(np.isin(labels, wanted)).tolist()
        assert found.tolist() == labels[rows].tolist()
        np.testing.assert_array_equal(pixels.numpy()[:, 0], images[rows])
    train = images[labels < 4] / 255
    np.testing.assert_allclose(description["mean"], [train.mean()], atol=1e-6)
    np.testing.assert_allclose(description["std"], [train.std()], atol=1e-6)
    again = prepared(tmp_path, images, labels, classes=names, split=by_classes(1, 2))
    assert tree_digest(again) == tree_digest(folder)


def test_a_split_by_samples_holds_no_class_out(tmp_path: Path) -> None:
    folder = prepared(tmp_path, some_images(30, 6, 6), np.arange(30) % 3, split={"validation": 6, "test": 6})
    description = describe(folder)
    assert (description["classes"], description["held_out"]) == (["0", "1", "2"], [])
    assert class_names(description) == ["0", "1", "2"]
    assert description["verification"] is None
    assert not (folder / "pairs.csv").exists()


@pytest.mark.parametrize(
    ("counts", "split", "message"),
    [
        ([4, 4, 4, 1], by_classes(1, 1), "class '3' has 1 image, and where classes are held out"),
        ([4, 4, 1, 4], by_classes(1, 1), "class '2' has 1 image, and where classes are held out"),
        ([4, 4, 4], by_classes(1, 2), "split.validation + split.test = 3 classes are held out, but there are only 3"),
        ([4, 4, 4], by_classes(9, 2), "split.validation + split.test = 11 classes are held out, but there are only 3"),
        (
            [30, 1, 30],
            {"validation": 10, "test": 10},
            "class '1' has 1 image, and none of them is in validation and test",
        ),
        ([30, 2, 30], {"validation": 10, "test": 10}, "class '1' has 2 images, and none of them is in"),
    ],
)
def test_classes_with_too_few_images_are_named(
    tmp_path: Path, counts: list[int], split: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match="^" + re.escape(message)):
        prepared(tmp_path, some_images(sum(counts), 6, 6), np.repeat(np.arange(len(counts)), counts), split=split)


def test_a_class_that_is_trained_on_may_have_one_image_but_not_none(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2, 3], [1, 3, 2, 2])
    folder = prepared(tmp_path, some_images(8, 6, 6), labels, split=by_classes(1, 1))
    assert json.loads((folder / "dataset.json").read_text())["samples"] == {"train": 4, "validation": 2, "test": 2}
    names = ["none", "one", "three", "two", "two more"]
    with pytest.raises(UserError, match=r"^class 'none' has 0 images, and where classes are held out"):
        prepared(tmp_path, some_images(8, 6, 6), labels + 1, classes=names, split=by_classes(1, 1))
