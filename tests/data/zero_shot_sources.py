"""Small data sets of zero-shot recognition in published formats, and their entries in params.yaml."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from data import zero_shot
from stages.parameters.zero_shot import Dataset

PROVENANCE = {"name": "toy", "licence": "none", "credit": "invented", "redistributable": True}
ALL = [f"{digit}-{rendering}" for digit in range(10) for rendering in zero_shot.RENDERINGS]

# Bars of seven-segment digits as (top, bottom, left, right), a square of which is (0, 2).
SEGMENTS = {"a": (0, 0, 0, 1), "b": (0, 1, 1, 1), "c": (1, 2, 1, 1), "d": (2, 2, 0, 1), "e": (1, 2, 0, 0),
            "f": (0, 1, 0, 0), "g": (1, 1, 0, 1)}  # fmt: skip
DIGITS = ["abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg"]


def draw(digit: int, top: int = 6, left: int = 10, step: int = 7, pen: int = 2) -> np.ndarray:
    """(28, 28) uint8: a digit of seven segments."""
    image = np.zeros((28, 28), dtype=np.uint8)
    for segment in DIGITS[digit]:
        first, last, west, east = (place * step for place in SEGMENTS[segment])
        image[top + first : top + last + pen, left + west : left + east + pen] = 255
    return image


def some_digits(each: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Different digits, `each` of every kind: (N, 28, 28) uint8 and (N,) int64."""
    generator = np.random.default_rng(seed)
    kinds = generator.permutation(np.repeat(np.arange(10), each))
    images = np.stack(
        [draw(kind, *generator.integers((4, 8), (8, 12)), pen=generator.integers(2, 4)) for kind in kinds]
    )
    shades = generator.integers(200, 256, images.shape)
    return np.minimum(images, shades).astype(np.uint8), kinds


def write_digits(file: Path, images: np.ndarray, kinds: np.ndarray) -> None:
    rows = np.column_stack([images.reshape(len(images), -1), kinds]).tolist()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress("".join(",".join(map(str, row)) + "\n" for row in rows).encode(), 1, mtime=0))


def dataset(**fields: Any) -> Dataset:
    return Dataset.model_validate({"task": "zero_shot", "source": "toy", "encoder": "none", **fields})


def renderings(**fields: Any) -> Dataset:
    """Four classes are unseen, three of validation."""
    entry = {
        "format": "renderings",
        "file": "digits.csv.gz",
        "unseen": ["0-plain", "1-outline", "2-dotted", "3-thick"],
        "split": {
            "validation": 0.2,
            "test": 0.25,
            "validation_classes": ["4-sheared-left", "5-sheared-right", "0-thick"],
        },
    }
    return dataset(**{**entry, **fields})


def benchmark(
    seen: int = 4, unseen: int = 2, each: int = 10, features: int = 5, attributes: int = 3, seed: int = 0
) -> dict[str, np.ndarray]:
    """Arrays as in `arrays`: a row per sample and class, counted from 0; a fifth of seen samples is tested."""
    generator = np.random.default_rng(seed)
    classes = seen + unseen
    labels = generator.permutation(np.repeat(np.arange(classes), each))
    unknown = generator.permutation(classes)[:unseen]
    known = generator.permutation(np.flatnonzero(~np.isin(labels, unknown)))
    tested = [row for label in set(range(classes)) - set(unknown.tolist())
              for row in known[labels[known] == label][: max(each // 5, 1)]]  # fmt: skip
    att = generator.random((classes, attributes)) + 0.1
    return {
        "features": generator.random((len(labels), features)).astype(np.float32),
        "labels": labels.astype(np.int16),
        "att": (att / np.linalg.norm(att, axis=1, keepdims=True)).astype(np.float32),
        "allclasses_names": np.array([f"class.{label}" for label in range(classes)]),
        "attribute_names": np.array([f"has::{number}" for number in range(attributes)]),
        "trainval_loc": np.setdiff1d(known, tested).astype(np.int32),
        "test_seen_loc": np.array(tested, dtype=np.int32),
        "test_unseen_loc": generator.permutation(np.flatnonzero(np.isin(labels, unknown))).astype(np.int32),
    }


LOCATIONS = ("trainval_loc", "test_seen_loc", "test_unseen_loc")


def cells(names: Any) -> np.ndarray:
    """Names as MATLAB's cells, (n, 1) objects."""
    column = np.empty((len(names), 1), dtype=object)
    column[:, 0] = [str(name) for name in names]
    return column


def as_matlab(arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same as in res101.mat and att_splits.mat: columns are samples and classes, counted from 1, and uint16."""
    left = {
        "features": arrays["features"].T.astype(np.float64),
        "labels": (arrays["labels"][:, None] + 1).astype(np.float64),
        "image_files": cells(["/a/b.jpg"] * len(arrays["labels"])),
    }
    right = {
        "att": arrays["att"].T.astype(np.float64),
        "original_att": arrays["att"].T * 100.0,
        "allclasses_names": cells(arrays["allclasses_names"]),
        **{name: (arrays[name][:, None] + 1).astype(np.uint16) for name in LOCATIONS},
    }
    if "attribute_names" in arrays:
        right["attribute_names"] = cells(arrays["attribute_names"])
    return left, right


def write_matlab(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(("res101.mat", "att_splits.mat"), as_matlab(arrays), strict=True):
        savemat(folder / name, content, do_compression=True)


def write_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **arrays)


def published(kind: str, **split: Any) -> Dataset:
    place = {"folder": "SET"} if kind == "xlsa17" else {"file": "set.npz"}
    return dataset(format=kind, split=split, **place)


def write(kind: str, raw: Path, arrays: dict[str, np.ndarray]) -> None:
    if kind == "xlsa17":
        write_matlab(raw / "SET", arrays)
    else:
        write_arrays(raw / "set.npz", arrays)


def prepared(raw: Path, entry: Dataset, output: Path) -> Path:
    output.mkdir(parents=True)
    zero_shot.prepare(raw, entry, output, PROVENANCE)
    return output
