"""Samples of classes with attributes, some of them unseen: making or reading them, what is expected, and batches.

A prepared data set is a folder:

    images.npy      (N, channels, size, size) uint8, where there are images
    features.npy    (N, D) float32 as the source or the encoder gives them, not scaled, where there are features
    labels.npy      (N,) int64, an index into the classes
    attributes.npy  (classes, A) float32
    manifest.csv    a row per sample: id (its place in the source, from 0), split, label, sha256 of its row of features,
                    of its pixels where there are no features, mean and spread (standard deviation) of the same row
                    (pixels in [0, 1]); `image_sha256`, that of its pixels, where features were made of images
    encoder/        the model that made the features, where there are images beside them
    dataset.json    classes, their roles, names of the attributes and their divisors, features (D or null), images
                    (channels, size, mean and std per channel of the training split, or null), samples per split, what
                    was dropped

A class has one role. Of `seen` classes, samples are trained on, and others held out for `validation` and `test`. All
samples of the `validation` classes are for validation, all of the `unseen` ones for test. So a student may know the
attributes of every class, but no sample of any but the seen (the semantic-inductive, instance-inductive setting of
D3GZSL card 7.18).
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from data.errors import UserError, suggest
from data.files import sha256, write_json
from data.splits import TRAIN, split

if TYPE_CHECKING:
    from torch import Tensor, nn

VALIDATION, TEST = "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)
SEEN, UNSEEN = "seen", "unseen"
ROLES = (SEEN, VALIDATION, UNSEEN)
COLUMNS = ("id", "split", "label", "sha256", "mean", "spread")  # of every manifest
BATCH = 500  # images that are encoded at a time


@dataclass(frozen=True)
class Samples:
    """Samples in memory, with their splits.

    Attributes:
        rows: (N, channels, size, size) uint8 images or (N, D) float32 features.
        labels: (N,) int64. places: (N,) int64, where they stand in the source, from 0. parts: (N,) names of splits.
        classes: name of every label. roles: one per class. attributes: (classes, A) float32. names: of A attributes.
        divisors: by which each attribute was divided, before the row of a class was divided by its length.
        dropped: how many samples of the source were left out, by reason.
    """

    rows: np.ndarray
    labels: np.ndarray
    places: np.ndarray
    parts: np.ndarray
    classes: list[str]
    roles: list[str]
    attributes: np.ndarray
    names: list[str]
    divisors: list[float]
    dropped: dict[str, int]


# Digits in renderings


SIDE = 28
RENDERINGS = {
    # outline, dotted, thick, shear: by how many steps it leans to the right
    "plain": (0, 0, 0, 0),
    "outline": (1, 0, 0, 0),
    "dotted": (0, 1, 0, 0),
    "thick": (0, 0, 1, 0),
    "sheared-left": (0, 0, 0, -1),
    "sheared-right": (0, 0, 0, 1),
}
"""What is done to a digit; `plain` is the absence of all."""
STEP = 0.5  # of shear: pixels to the side per pixel of height
PAINTED = ("outline", "dotted", "thick", "shear")

STROKES = (
    "straight strokes", "curved strokes", "loops", "loop above", "loop below", "ends", "junctions", "corners",
    "openings to the left", "openings to the right", "opening above", "bar at the top", "bar in the middle",
    "bar at the bottom", "vertical bar", "symmetry left to right", "symmetry top to bottom", "symmetry of a half turn",
)  # fmt: skip
DIGITS = np.array([
    [0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1],
    [1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1],
    [1, 1, 0, 0, 0, 2, 0, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0],
    [0, 2, 0, 0, 0, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0],
    [3, 0, 0, 0, 0, 4, 1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0],
    [2, 1, 0, 0, 0, 2, 0, 2, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0],
    [0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0],
    [2, 0, 0, 0, 0, 2, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0],
    [0, 2, 2, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1],
    [1, 1, 1, 1, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0],
])  # fmt: skip
"""How the digits 0-9 are written, a row each, in the order of STROKES: numbers of strokes, loops, ends and so on, and 1
where there is a loop, bar or symmetry of a kind. An upright 1 without a foot, an open 4 and a 7 without a bar."""


def describe_renderings() -> tuple[list[str], np.ndarray, list[str], list[float]]:
    """Names of the 60 classes, as in 3-outline and digit by digit; their attributes; names and divisors of these.

    Every attribute is divided by its largest value, so that none dominates; then the row of each class by its length,
    as the attributes of xlsa17 are (D3GZSL card 9.1).

    Returns:
        Attributes are (60, A) float32.
    """
    classes = [f"{digit}-{rendering}" for digit in range(10) for rendering in RENDERINGS]
    painted = np.array(list(RENDERINGS.values()))
    rows = np.hstack([DIGITS.repeat(len(RENDERINGS), axis=0), np.tile(painted, (10, 1))]).astype(np.float64)
    divisors = np.abs(rows).max(axis=0)
    rows /= divisors
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return classes, rows.astype(np.float32), [*STROKES, *PAINTED], divisors.tolist()


def read_digits(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows of 784 pixels (0-255) followed by a digit, as text or gzipped text: (N, 28, 28) uint8 and (N,) int64.

    Raises:
        UserError: no such table, a value out of its range, or a digit that is too rare to be painted in every way.
    """
    try:
        table = pd.read_csv(file, header=None, dtype=np.int64).to_numpy()
    except (ValueError, EOFError, OSError, zlib.error, pd.errors.ParserError) as error:
        raise UserError(f"{file} is no table of whole numbers ({error}) · is the file complete?") from None
    if table.shape[1] != SIDE * SIDE + 1:
        raise UserError(
            f"{file} has {table.shape[1]} columns, but {SIDE} x {SIDE} pixels and a digit are {SIDE * SIDE + 1} · "
            "correct `file` of the data set"
        )
    pixels, digits = table[:, :-1], table[:, -1]
    for wrong, what in (
        (((pixels < 0) | (pixels > 255)).any(axis=1), "holds a pixel outside 0-255"),
        ((digits < 0) | (digits > 9), "holds a label outside 0-9"),
        ((pixels == 0).all(axis=1), "shows nothing"),
    ):
        if wrong.any():
            raise UserError(f"{file} {what} in row {int(np.argmax(wrong)) + 1} · mend the file")
    counts = np.bincount(digits, minlength=10)
    if counts.min() < len(RENDERINGS):
        raise UserError(
            f"{file} has {counts.min()} images of the digit {counts.argmin()}, but each is painted in one of "
            f"{len(RENDERINGS)} ways · take more images"
        )
    return pixels.astype(np.uint8).reshape(-1, SIDE, SIDE), digits


def deal(digits: np.ndarray, seed: int) -> np.ndarray:
    """(N,) int64 in 0-5: the rendering of each image. Every digit's are dealt at random and evenly."""
    generator = _generator(seed, "renderings")
    dealt = np.empty(len(digits), dtype=np.int64)
    for digit in range(10):
        rows = generator.permutation(np.flatnonzero(digits == digit))
        dealt[rows] = np.arange(len(rows)) % len(RENDERINGS)
    return dealt


def paint(images: np.ndarray, rendering: str) -> np.ndarray:
    """(N, 28, 28) uint8 digits in one of RENDERINGS, (N, 28, 28) uint8.

    All are set upright first: as they are written, they lean to the right by as much as a shear would add.

    outline: what lies around the strokes, one pixel wide. dotted: every second square of 2 x 2 pixels. thick: strokes
    one pixel wider on every side.
    """
    outline, dotted, thick, shear = RENDERINGS[rendering]
    images = lean(images, STEP * shear - slant(images))
    if outline:
        return _widened(images) - images
    if thick:
        return _widened(images)
    if dotted:
        squares = np.indices((SIDE, SIDE)) // 2
        return np.where(squares.sum(axis=0) % 2, images, np.uint8(0))
    return images


def slant(images: np.ndarray) -> np.ndarray:
    """(N,) by how many pixels the ink of (N, H, W) images moves to the right per pixel of height, in least squares."""
    ink = images.astype(np.float64)
    height, width = images.shape[1:]
    total = ink.sum(axis=(1, 2))
    up = (height - 1) / 2 - np.arange(height)
    right = np.arange(width) - (width - 1) / 2
    rows, columns = ink.sum(axis=2), ink.sum(axis=1)
    middle, centre = rows @ up / total, columns @ right / total
    together = np.einsum("nhw,h,w->n", ink, up, right) / total - middle * centre
    spread = rows @ up**2 / total - middle**2
    return together / np.where(spread > 0, spread, 1)


def lean(images: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """(N, H, W) uint8 with each row moved to the right by `amount` (N,) pixels per pixel above the middle.

    Between two pixels it is interpolated linearly; zeros move in.
    """
    height, width = images.shape[1:]
    source = np.arange(width) - amount[:, None, None] * ((height - 1) / 2 - np.arange(height))[None, :, None]
    left = np.floor(source)
    share = source - left
    # A column of zeros on either side, where everything from outside is read.
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1)))
    columns = left.astype(np.int64) + 1
    first, second = (np.take_along_axis(padded, (columns + step).clip(0, width + 1), axis=2) for step in (0, 1))
    return np.rint((1 - share) * first + share * second).astype(np.uint8)


def _widened(images: np.ndarray) -> np.ndarray:
    """The largest of each pixel and its eight neighbours."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    largest: np.ndarray = windows.max(axis=(3, 4))
    return largest


def make_renderings(raw: Path, dataset: Any) -> Samples:
    """Every digit of the table once, in one of six renderings; the same for the same seed.

    Raises:
        UserError: the table cannot be read, a class is unknown or has two roles, or a digit or a rendering is in no
            seen class: nothing could be learnt of it.
    """
    digits, kinds = read_digits(raw / dataset.file)
    classes, attributes, names, divisors = describe_renderings()
    for name in dataset.unseen:
        _known(name, classes, "unseen")
    _once(dataset.unseen, "`unseen` of the data set")
    roles = [UNSEEN if name in dataset.unseen else SEEN for name in classes]
    roles = _with_validation_classes(classes, roles, dataset.split)
    seen = [name.split("-", 1) for name, role in zip(classes, roles, strict=True) if role == SEEN]
    for place, everything in enumerate((map(str, range(10)), RENDERINGS)):
        if lost := sorted(set(everything) - {name[place] for name in seen}):
            raise UserError(
                f"no seen class has the {('digit', 'rendering')[place]} {lost[0]}: nothing can be learnt of it · name "
                "fewer of its classes in `unseen` and `split.validation_classes` of the data set"
            )
    dealt = deal(kinds, dataset.split.seed)
    images = np.empty_like(digits)
    for number, rendering in enumerate(RENDERINGS):
        images[dealt == number] = paint(digits[dealt == number], rendering)
    labels = kinds * len(RENDERINGS) + dealt
    shares = {VALIDATION: dataset.split.validation, TEST: dataset.split.test}
    parts = _parts(labels, roles, shares, dataset.split.seed)
    places = np.arange(len(labels))
    return Samples(images[:, None], labels, places, parts, classes, roles, attributes, names, divisors, {})


# Published features


@dataclass(frozen=True)
class Published:
    """A data set of the benchmark, counted from 0 and with a row per sample.

    Attributes:
        features: (N, D) as they are stored. labels: (N,) int64. attributes: (classes, A) as stored.
        classes: their names. names: of the attributes.
        trainval, test_seen, test_unseen: int64, rows of the samples.
    """

    features: np.ndarray
    labels: np.ndarray
    attributes: np.ndarray
    classes: list[str]
    names: list[str]
    trainval: np.ndarray
    test_seen: np.ndarray
    test_unseen: np.ndarray


LOCATIONS = ("trainval_loc", "test_seen_loc", "test_unseen_loc")
# train_loc and val_loc are never read: together they hold samples of test_seen_loc too (D3GZSL card 9.1).
KEYS = ("features", "labels", "att", "allclasses_names", *LOCATIONS)


def published(arrays: Mapping[str, Any], where: object, first: int = 0) -> Published:
    """The arrays of a file, checked; with `attribute_names` if they are there.

    Args:
        arrays: KEYS by name, with a row per sample and per class. where: what a message names. first: the number that
            the labels and places of the file begin with.

    Raises:
        UserError: a key is missing; shapes do not fit; a number is not finite; a label or a place is out of range; a
            sample stands in two index arrays; a class is seen and unseen, or has no samples to train or test with.
    """
    if missing := [name for name in KEYS if name not in arrays]:
        raise UserError(f"{where} lacks {', '.join(missing)} (it needs {', '.join(KEYS)}) · complete the file")
    features, attributes = (_matrix(arrays[name], name, where) for name in ("features", "att"))
    classes = _texts(arrays["allclasses_names"])
    names = [f"attribute {number}" for number in range(1, attributes.shape[1] + 1)]
    names = _texts(arrays["attribute_names"]) if "attribute_names" in arrays else names
    for name, shape, wanted, what in (
        ("features", features.shape, (np.size(arrays["labels"]), features.shape[1]), "the labels"),
        ("att", attributes.shape, (len(classes), attributes.shape[1]), "allclasses_names"),
        ("att", attributes.shape, (attributes.shape[0], len(names)), "attribute_names"),
    ):
        if shape != wanted:
            raise UserError(
                f"{where}: {name} has shape {shape} (a row per {'class' if name == 'att' else 'sample'}), but {wanted} "
                f"goes with {what} · is the file complete, and not transposed?"
            )
    _once(classes, f"{where}: allclasses_names")
    _once(names, f"{where}: attribute_names")
    labels = _numbers(arrays["labels"], "labels", where, first, len(classes), "class")
    located = {name: _numbers(arrays[name], name, where, first, len(labels), "sample") for name in LOCATIONS}
    _check_places(located, where, first)
    _check_classes({name: set(labels[rows].tolist()) for name, rows in located.items()}, classes, where)
    return Published(features, labels, attributes, classes, names, *located.values())


def xlsa17(arrays: Mapping[str, Any], where: object) -> Published:
    """The same of the arrays of `res101.mat` and `att_splits.mat`: columns are samples and classes, counted from 1.

    Raises:
        UserError: as `published`.
    """
    turned = {name: np.transpose(arrays[name]) for name in ("features", "att") if name in arrays}
    return published({**arrays, **turned}, where, first=1)


def read_xlsa17(folder: Path) -> Published:
    """`res101.mat` and `att_splits.mat` of a folder (Xian et al. 2019; D3GZSL card 9.1).

    Raises:
        UserError: a file is missing or damaged, and as `published`.
    """
    from scipy.io import loadmat

    arrays: dict[str, Any] = {}
    for name in ("res101.mat", "att_splits.mat"):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing · correct `folder` of the data set, or complete the source")
        try:
            arrays |= loadmat(folder / name, variable_names=[*KEYS, "attribute_names"])
        except Exception as error:  # whatever reading damaged bytes may raise
            raise UserError(f"{folder / name} cannot be read as a MATLAB 5 file ({error}) · is it complete?") from None
    return xlsa17(arrays, folder)


def read_arrays(file: Path) -> Published:
    """One `.npz` with a row per sample and per class, counted from 0.

    Raises:
        UserError: the file is missing or damaged, or holds objects; and as `published`.
    """
    try:
        with np.load(file, allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in (*KEYS, "attribute_names") if name in loaded}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file} cannot be read as .npz of plain arrays ({error}) · is it complete?") from None
    return published(arrays, file)


def _matrix(array: Any, name: str, where: object) -> np.ndarray:
    """Two dimensions of finite numbers."""
    matrix = np.asarray(array)
    if matrix.ndim != 2 or not matrix.size or matrix.dtype.kind not in "fiu":
        raise UserError(f"{where}: {name} must be a matrix of numbers, got {matrix.dtype} of shape {matrix.shape}")
    # What is finite in the file may be too large for float32, in which it is stored.
    with np.errstate(over="ignore"):
        wrong = ~np.isfinite(matrix.astype(np.float32))
    if wrong.any():
        row, column = (int(place) for place in np.argwhere(wrong)[0])
        kind, other = ("sample", "feature") if name == "features" else ("class", "attribute")
        raise UserError(
            f"{where}: {name} holds {int(wrong.sum())} numbers that are not finite, first {matrix[row, column]} "
            f"({kind} {row}, {other} {column}, from 0) · mend the file"
        )
    return matrix


def _texts(array: Any) -> list[str]:
    """Names, from a vector of texts or from MATLAB's cells: objects with one text each."""
    cells = np.asarray(array).ravel()
    return [str(np.asarray(cell).ravel()[0] if np.size(cell) else "").strip() for cell in cells]


def _numbers(array: Any, name: str, where: object, first: int, count: int, what: str) -> np.ndarray:
    """A vector of whole numbers from `first` on, (N,) int64 from 0 on."""
    vector = np.asarray(array)
    if not vector.size:
        raise UserError(f"{where}: {name} is empty · nothing could be trained or tested on it; complete the file")
    if vector.size != max(vector.shape, default=0) or vector.dtype.kind not in "fiu":
        raise UserError(f"{where}: {name} must be a vector of numbers, got {vector.dtype} of shape {vector.shape}")
    flat = vector.ravel()
    # Written so that NaN is wrong too.
    wrong = ~((flat >= first) & (flat < first + count) & (flat == np.floor(flat)))
    if wrong.any():
        raise UserError(
            f"{where}: {name} holds {flat[wrong][0]} at place {int(np.argmax(wrong)) + first}, but a {what} is one of "
            f"{first} to {first + count - 1} · mend the file; its labels and places count from {first}"
        )
    return flat.astype(np.int64) - first


def _check_places(located: Mapping[str, np.ndarray], where: object, first: int) -> None:
    rows = np.concatenate(list(located.values()))
    found, counts = np.unique(rows, return_counts=True)
    if counts.max() > 1:
        row = found[counts > 1][0]
        names = [name for name, places in located.items() for _ in range(int((places == row).sum()))]
        raise UserError(
            f"{where}: sample {row + first} stands in {' and in '.join(names)} ({int((counts > 1).sum())} samples do) "
            "· every sample is in one of them at most; mend the file"
        )


def _check_classes(found: Mapping[str, set[int]], classes: Sequence[str], where: object) -> None:
    train, tested, unseen = (found[name] for name in LOCATIONS)
    for wrong, what in (
        ((train | tested) & unseen, "is seen (trainval_loc or test_seen_loc) and unseen (test_unseen_loc) at once"),
        (tested - train, "is seen (test_seen_loc), but has no sample in trainval_loc to train with"),
        (set(range(len(classes))) - train - unseen, f"has no sample in {', '.join(LOCATIONS)}"),
    ):
        if wrong:
            named = ", ".join(repr(classes[label]) for label in sorted(wrong)[:5])
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise UserError(f"{where}: a class {what}: {named}{more} · mend the file")


def from_published(source: Published, settings: Any) -> Samples:
    """Samples with splits: the published ones, with validation taken out of trainval.

    Samples of test_seen_loc whose class has become a validation class are left out: they are no samples of a seen
    class, and none that are published for validation.

    Args:
        settings: `split` of the data set.
    """
    roles = np.full(len(source.classes), SEEN, dtype=object)
    roles[source.labels[source.test_unseen]] = UNSEEN
    chosen = _with_validation_classes(source.classes, roles.tolist(), settings)
    roles[:] = chosen
    parts = np.full(len(source.labels), "", dtype=object)
    parts[source.trainval] = _parts(
        source.labels[source.trainval], chosen, {VALIDATION: settings.validation}, settings.seed
    )
    parts[source.test_seen] = np.where(roles[source.labels[source.test_seen]] == SEEN, TEST, "")
    parts[source.test_unseen] = TEST
    rows = np.flatnonzero(parts != "")
    named = len(source.trainval) + len(source.test_seen) + len(source.test_unseen)
    dropped = {"test_seen_of_validation_classes": named - len(rows), "in_no_split": len(parts) - named}
    return Samples(
        source.features[rows].astype(np.float32),
        source.labels[rows],
        rows,
        parts[rows],
        source.classes,
        chosen,
        source.attributes.astype(np.float32),
        source.names,
        [1.0] * len(source.names),
        dropped,
    )


# Roles and splits


def _generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, *purpose.encode()])


def _known(name: str, classes: Sequence[str], where: str) -> None:
    if name not in classes:
        raise UserError(f"`{where}` of the data set names an unknown class {name!r}; {suggest(name, classes)}")


def _once(names: Sequence[str], what: str) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{what} names {twice[0]!r} twice · names tell apart; correct it")


def _with_validation_classes(classes: Sequence[str], roles: Sequence[str], settings: Any) -> list[str]:
    """Roles in which some seen classes have become validation classes: those named, or so many drawn at random."""
    seen = [name for name, role in zip(classes, roles, strict=True) if role == SEEN]
    chosen, where = settings.validation_classes, "split.validation_classes"
    if isinstance(chosen, int):
        if chosen >= len(seen):
            raise UserError(
                f"`{where}` = {chosen}, but {len(seen)} classes are seen, and one at least has to stay so · lower it"
            )
        order = _generator(settings.seed, where).permutation(len(seen))
        chosen = [seen[place] for place in order[:chosen]]
    for name in chosen:
        _known(name, classes, where)
        if name not in seen:
            raise UserError(f"class {name!r} is unseen, and named in `{where}` · a class has one role; take it out")
    _once(chosen, f"`{where}` of the data set")
    if len(chosen) == len(seen):
        raise UserError(f"`{where}` names all {len(seen)} seen classes · leave one at least to train with")
    return [VALIDATION if name in chosen else role for name, role in zip(classes, roles, strict=True)]


def _parts(labels: np.ndarray, roles: Sequence[str], shares: Mapping[str, float], seed: int) -> np.ndarray:
    """(N,) splits: shares of every seen class are held out; of the other classes, all belong to one split."""
    role = np.array(roles, dtype=object)[labels]
    parts = np.where(role == VALIDATION, VALIDATION, TEST).astype(object)
    seen = np.flatnonzero(role == SEEN)
    wanted = {name: round(share * len(seen)) for name, share in shares.items()}
    parts[seen] = split(labels[seen], wanted, seed)
    return parts


# Preparing


def prepare(raw: Path, dataset: Any, output: Path, provenance: dict[str, Any]) -> None:
    """Make or read samples, split them and write the prepared folder.

    Args:
        raw: the fetched source. dataset: its entry in params.yaml (`stages.parameters.zero_shot.Dataset`).
        output: an existing empty folder. provenance: what dataset.json says of the source.

    Raises:
        UserError: a file is missing, damaged or contradicts itself, or a class of params.yaml is none of the source.
    """
    if dataset.format == "renderings":
        samples = make_renderings(raw, dataset)
    elif dataset.format == "xlsa17":
        samples = from_published(read_xlsa17(raw / dataset.folder), dataset.split)
    else:
        samples = from_published(read_arrays(raw / dataset.file), dataset.split)
    images = None
    if samples.rows.ndim == 4:
        train = samples.rows[samples.parts == TRAIN] / 255
        images = {
            "channels": samples.rows.shape[1],
            "size": samples.rows.shape[2],
            "mean": train.mean(axis=(0, 2, 3)).round(6).tolist(),
            # A channel that never changes would be divided by zero.
            "std": np.maximum(train.std(axis=(0, 2, 3)), 1e-3).round(6).tolist(),
        }
    manifest = pd.DataFrame(
        {
            "id": [f"sample-{place:06d}" for place in samples.places],
            "split": samples.parts,
            "label": samples.labels,
            **_content(samples.rows),
        }
    )
    manifest.to_csv(output / "manifest.csv", index=False, lineterminator="\n")
    np.save(output / ("features.npy" if images is None else "images.npy"), samples.rows)
    np.save(output / "labels.npy", samples.labels)
    np.save(output / "attributes.npy", samples.attributes)
    write_json(
        output / "dataset.json",
        {
            "classes": samples.classes,
            "roles": samples.roles,
            "attributes": samples.names,
            "divisors": samples.divisors,
            "features": samples.rows.shape[1] if images is None else None,
            "images": images,
            "samples": {name: int((samples.parts == name).sum()) for name in SPLITS},
            "dropped": samples.dropped,
            "source": provenance,
        },
    )


def prepare_encoded(
    raw: Path, images: Any, output: Path, provenance: dict[str, Any], encoder: "nn.Module", description: Any
) -> None:
    """Make the images again, and features of them; samples, splits and roles are those of the images.

    Features are computed with as many threads as the encoder was trained with: another number may give other bits.

    Args:
        raw, output, provenance: as for `prepare`. images: the entry in params.yaml of the images.
        encoder: in eval mode; from (B, channels, size, size) in [0, 1] to an output with `features` (B, D).
        description: of the encoder (`models.artifacts.Description`).

    Raises:
        UserError: as `prepare`, and if the encoder was trained on other images.
    """
    import torch

    prepare(raw, images, output, provenance)
    found, wanted = sha256(output / "manifest.csv"), description.dataset["digest"]
    if found != wanted:
        raise UserError(
            f"the encoder {description.name!r} was trained on other images: the manifest of its data set "
            f"{description.dataset['name']!r} has sha256 {found}, it learnt from {wanted} · run `dvc repro`, which "
            "trains it again: of classes that it has seen it would make no features of unseen classes"
        )
    pixels = np.load(output / "images.npy")
    threads = torch.get_num_threads()
    torch.set_num_threads(description.recipe["training"]["threads"])
    try:
        with torch.inference_mode():
            parts = [encoder(to_unit(batch)).features.float() for batch in torch.from_numpy(pixels).split(BATCH)]
    finally:
        torch.set_num_threads(threads)
    features = torch.cat(parts).numpy()
    np.save(output / "features.npy", features)
    manifest = _read_manifest(output).rename(columns={"sha256": "image_sha256"})
    manifest = manifest.assign(**_content(features))[[*COLUMNS, "image_sha256"]]
    manifest.to_csv(output / "manifest.csv", index=False, lineterminator="\n")
    write_json(output / "dataset.json", {**describe(output), "features": features.shape[1]})


def content_hashes(rows: np.ndarray) -> list[str]:
    """sha256 of the bytes of each row."""
    return [hashlib.sha256(np.ascontiguousarray(row).tobytes()).hexdigest() for row in rows]


def _content(rows: np.ndarray) -> dict[str, Any]:
    """What the manifest says of each image or row of features."""
    flat = rows.reshape(len(rows), -1)
    unit = 255 if rows.dtype == np.uint8 else 1
    mean, spread = flat.mean(axis=1, dtype=np.float64) / unit, flat.std(axis=1, dtype=np.float64) / unit
    return {"sha256": content_hashes(rows), "mean": mean.round(6), "spread": spread.round(6)}


# Validation


ALLOWED = {SEEN: SPLITS, VALIDATION: (VALIDATION,), UNSEEN: (TEST,)}  # splits of the samples of a class, by its role
NEEDED = {SEEN: (TRAIN, TEST), VALIDATION: (VALIDATION,), UNSEEN: (TEST,)}


def tables(prepared: Path) -> dict[str, pd.DataFrame]:
    """What is validated: the manifest beside what the arrays really hold, the classes, and the attributes.

    Raises:
        UserError: an array is unreadable, or has another shape or type than manifest and description say.
    """
    description = describe(prepared)
    manifest = _read_manifest(prepared)
    arrays = _arrays(prepared, description, len(manifest))
    manifest["stored_label"] = arrays["labels"]
    if "features" in arrays:
        manifest["stored_sha256"] = content_hashes(arrays["features"])
        # Written so that NaN is wrong too.
        manifest["wrong_numbers"] = (~(np.isfinite(arrays["features"]) & (arrays["features"] >= 0))).sum(axis=1)
    content = "image_sha256" if "image_sha256" in manifest else "sha256"
    if "images" in arrays:
        manifest[f"stored_{content}"] = content_hashes(arrays["images"])
    same_content = manifest.groupby(content)
    manifest["splits_of_content"] = same_content["split"].transform("nunique")
    # The name of a sample with the same content, so that a finding shows pairs.
    manifest["twin"] = same_content["id"].transform(lambda ids: ids.iloc[::-1].to_numpy() if len(ids) > 1 else None)
    names, roles, rows = description["classes"], description["roles"], arrays["attributes"]
    counts = pd.crosstab(manifest["label"], manifest["split"])
    counts = counts.reindex(index=range(len(names)), columns=list(SPLITS), fill_value=0).reset_index(drop=True)
    classes = pd.DataFrame({"id": names, "role": roles}).join(counts)
    classes["share"] = counts.sum(axis=1) / len(manifest)
    by_role = list(zip(roles, counts.to_dict("records"), strict=True))
    classes["misplaced"] = [
        sum(number for part, number in found.items() if part not in ALLOWED.get(role, ())) for role, found in by_role
    ]
    classes["lacking"] = [sum(found[part] == 0 for part in NEEDED.get(role, ())) for role, found in by_role]
    classes["wrong_numbers"] = (~np.isfinite(rows)).sum(axis=1)
    digests = pd.Series(content_hashes(rows + 0.0))  # -0 is 0
    classes["alike"] = digests.groupby(digests).transform("size") - 1
    values = [len(np.unique(column)) for column in rows.T]
    by_name = pd.DataFrame({"id": description["attributes"], "values": values})
    return {"manifest": manifest, "classes": classes, "attributes": by_name}


def _arrays(prepared: Path, description: Mapping[str, Any], count: int) -> dict[str, np.ndarray]:
    """Every array of a prepared data set, of the shape and type that it should have."""
    names, images = description["classes"], description["images"]
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "labels": ("int64", (count,)),
        "attributes": ("float32", (len(description["roles"]), len(description["attributes"]))),
    }
    if description["features"] is not None:
        wanted["features"] = ("float32", (count, description["features"]))
    if images is not None:
        wanted["images"] = ("uint8", (count, images["channels"], images["size"], images["size"]))
    again = f"run `dvc repro prepare@{prepared.name}` again"
    if len(names) != len(description["roles"]):
        raise UserError(
            f"{prepared / 'dataset.json'} has {len(names)} classes, but {len(description['roles'])} roles · {again}"
        )
    arrays = {}
    for name, (dtype, shape) in wanted.items():
        try:
            array = arrays[name] = np.load(prepared / f"{name}.npy")
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{prepared / name}.npy cannot be read ({error}) · is the file complete?") from None
        if array.dtype != dtype or array.shape != shape:
            raise UserError(
                f"{prepared / name}.npy holds {array.dtype} of shape {array.shape}; manifest and dataset.json say "
                f"{dtype} of shape {shape} · {again}"
            )
    return arrays


def expectations(dataset: Any, description: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What is expected, as plain data: per table of `tables`, Great Expectations' type names and arguments.

    Args:
        dataset: the entry in params.yaml. description: dataset.json.
    """
    expect, between = dataset.expect, "expect_column_values_to_be_between"
    labels = list(range(len(description["classes"])))
    both = description["images"] is not None and description["features"] is not None
    digests = ["sha256", "image_sha256"] if both else ["sha256"]
    manifest: list[dict[str, Any]] = [
        *({"type": "expect_column_values_to_not_be_null", "column": name} for name in (*COLUMNS, *digests[1:])),
        {"type": "expect_column_values_to_be_unique", "column": "id"},
        {"type": "expect_column_values_to_be_in_set", "column": "label", "value_set": labels},
        {"type": "expect_column_values_to_be_in_set", "column": "split", "value_set": list(SPLITS)},
        {
            "type": between,
            "column": "splits_of_content",
            "min_value": 1,
            "max_value": 1,
            "description": "the same sample never stands in two splits",
        },
        *(
            {"type": "expect_column_pair_values_to_be_equal", "column_A": name, "column_B": f"stored_{name}"}
            for name in ("label", *digests)
        ),
    ]
    if description["features"] is None:
        # An image of one colour shows nothing: a blank or damaged file.
        manifest.append({"type": between, "column": "spread", "min_value": 0.001, "max_value": 0.5})
    else:
        manifest.append(_none("wrong_numbers", "all features are finite and not negative"))
    if expect.samples is not None:
        manifest.append({"type": "expect_table_row_count_to_equal", "value": expect.samples})
    classes: list[dict[str, Any]] = [
        {"type": "expect_column_values_to_be_unique", "column": "id"},
        {"type": "expect_column_values_to_be_in_set", "column": "role", "value_set": list(ROLES)},
        {
            "type": "expect_column_distinct_values_to_contain_set",
            "column": "role",
            "value_set": [SEEN, UNSEEN],
            "description": "some classes are seen, and some unseen",
        },
        _none("misplaced", "no sample of a validation class is outside validation, none of an unseen one outside test"),
        _none("lacking", "seen classes have samples to train and test with, validation and unseen ones of their split"),
        {"type": between, "column": "share", "min_value": expect.smallest_class, "max_value": expect.largest_class},
        _none("wrong_numbers", "all attributes are finite"),
        _none("alike", "no two classes have the same attributes"),
    ]
    names: list[dict[str, Any]] = [
        {"type": "expect_column_values_to_be_unique", "column": "id"},
        {
            "type": between,
            "column": "values",
            "min_value": 2,
            "description": "no attribute is the same for all classes",
        },
    ]
    return {"manifest": manifest, "classes": classes, "attributes": names}


def _none(column: str, description: str) -> dict[str, Any]:
    """A column that counts what must not be."""
    return {
        "type": "expect_column_values_to_be_between",
        "column": column,
        "max_value": 0,
        "description": description,
    }


def describe(prepared: Path) -> dict[str, Any]:
    """dataset.json of a prepared data set."""
    description: dict[str, Any] = json.loads((prepared / "dataset.json").read_text(encoding="utf-8"))
    return description


def _read_manifest(prepared: Path) -> pd.DataFrame:
    text = {"id": str, "split": str, "sha256": str, "image_sha256": str}
    return pd.read_csv(prepared / "manifest.csv", dtype=text)


# Batches. torch is imported inside: preparing and validating do not need it, and every stage pays its imports.


def load(prepared: Path, part: str, what: str = "features") -> tuple[list[str], "Tensor", "Tensor"]:
    """One split: ids; features (N, D) float32 or, if `what` is "images", (N, C, H, W) uint8; labels (N,) int64."""
    import torch

    manifest = pd.read_csv(prepared / "manifest.csv", usecols=["id", "split"], dtype=str)
    rows = np.flatnonzero(manifest["split"] == part)
    inputs = np.load(prepared / f"{what}.npy", mmap_mode="r")[rows]
    labels = np.load(prepared / "labels.npy")[rows]
    return manifest["id"].iloc[rows].tolist(), torch.from_numpy(inputs), torch.from_numpy(labels)


def attributes(prepared: Path) -> "Tensor":
    """(classes, A) float32, in the order of the classes."""
    import torch

    return torch.from_numpy(np.load(prepared / "attributes.npy"))


def to_unit(images: "Tensor") -> "Tensor":
    """uint8 pixels to float32 in [0, 1]."""
    return images.float().div_(255)
