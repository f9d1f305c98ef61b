"""Images with a class per pixel: making or reading them, what is expected of them, and batches.

A prepared data set is a folder:

    images.npy      (N, 3, H, W) uint8
    labels.npy      (N, H, W) uint8, an index into the classes; IGNORE for pixels without a label
    manifest.csv    a row per sample, in the order of SPLITS: id, split, height and width before preparation, sha256 of
                    the image's pixels, labels_sha256 of its labels, mean and spread (standard deviation) of its pixels
                    in [0, 1] without padding, and the share of pixels that are ignored; for scenes also what they are
                    made of (see `Scene`)
    dataset.json    classes, size [H, W], fit (how an image was brought to that size, see `read`), channels, mean and
                    std per channel of the training split (without padding), samples per split, pixels per class of
                    the training split

Both arrays are written and read row by row: a data set need not fit into memory.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from data.errors import UserError
from data.files import write_json

if TYPE_CHECKING:
    from torch import Generator, Tensor

SPLITS = ("train", "validation", "test")
IGNORE = 255
ARRAYS = ("images.npy", "labels.npy")
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
ORIENTATION = 0x0112  # Exif's tag of the way in which a camera was held
UNKNOWN = -1  # in a table of labels: a value that no label file may hold


@dataclass(frozen=True)
class Row:
    """One prepared sample.

    Attributes:
        id: its name. split: one of SPLITS.
        original: height and width before preparation, in pixels.
        image: (h, w, 3) uint8, at most the data set's size; the rest is filled up.
        labels: (h, w) uint8, classes or IGNORE.
        columns: what else the manifest says of it.
    """

    id: str
    split: str
    original: tuple[int, int]
    image: np.ndarray
    labels: np.ndarray
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class File:
    """An image and its labels, not read yet. `labels` maps the 256 values of the label file; UNKNOWN is refused."""

    id: str
    split: str
    image: Path
    label: Path
    values: np.ndarray


def prepare(raw: Path, dataset: Any, output: Path, provenance: dict[str, Any]) -> None:
    """Make or read the samples of a data set and write the prepared folder.

    Args:
        raw: the fetched source. dataset: its entry in params.yaml (`stages.parameters.segmentation.Dataset`).
        output: an existing empty folder. provenance: what dataset.json says of the source.

    Raises:
        UserError: a file that is missing, is no image or does not fit its pair, a label that is no class, an empty
            split.
    """
    height, width = dataset.image_size
    rows: Iterable[Row]
    if dataset.format == "scenes":
        classes = ["background", *map(str, range(10))]
        samples = {name: getattr(dataset.scenes, name) for name in SPLITS}
        rows = make_scenes(raw, dataset)
    else:
        classes, files = READERS[dataset.format](raw, dataset)
        samples = {name: sum(file.split == name for file in files) for name in SPLITS}
        if empty := [name for name in SPLITS if not samples[name]]:
            raise UserError(f"{raw} has no sample for the split {empty[0]!r} (found: {samples}) · complete the source")
        order = sorted(files, key=lambda file: (SPLITS.index(file.split), file.id))
        rows = (read(file, (height, width), dataset.fit) for file in order)
    total = sum(samples.values())
    manifest: list[dict[str, Any]] = []
    moments = np.zeros((2, 3), dtype=np.int64)
    pixels = np.zeros(256, dtype=np.int64)
    count = 0
    with _Array(output / "images.npy", (total, 3, height, width)) as images, _Array(
        output / "labels.npy", (total, height, width)
    ) as targets:  # fmt: skip
        for row in rows:
            h, w = row.labels.shape
            image = np.zeros((3, height, width), dtype=np.uint8)
            image[:, :h, :w] = row.image.transpose(2, 0, 1)
            labels = np.full((height, width), IGNORE, dtype=np.uint8)
            labels[:h, :w] = row.labels
            images.append(image)
            targets.append(labels)
            found = _moments(row.image)
            mean, spread = _mean_and_spread(found.sum(axis=1), row.image.size)
            if row.split == "train":
                moments += found
                count += h * w
                pixels += np.bincount(row.labels.ravel(), minlength=256)
            manifest.append(
                {
                    "id": row.id,
                    "split": row.split,
                    "height": row.original[0],
                    "width": row.original[1],
                    "sha256": content_hash(image),
                    "labels_sha256": content_hash(labels),
                    "mean": float(mean),
                    "spread": float(spread),
                    "ignored": round(float((labels == IGNORE).mean()), 6),
                    **row.columns,
                }
            )
    pd.DataFrame(manifest).to_csv(output / "manifest.csv", index=False, lineterminator="\n")
    mean, spread = _mean_and_spread(moments, count)
    write_json(
        output / "dataset.json",
        {
            "classes": classes,
            "size": [height, width],
            # Scenes are made at that size.
            "fit": "resize" if dataset.format == "scenes" else dataset.fit,
            "channels": 3,
            "mean": mean.tolist(),
            # A channel that never changes would be divided by zero.
            "std": np.maximum(spread, 1e-3).tolist(),
            "samples": samples,
            "pixels": {name: int(pixels[label]) for label, name in enumerate(classes)},
            "source": provenance,
        },
    )


class _Array:
    """An .npy file of bytes that is written row by row; a full disk is an error here, not the end of the process."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.file = path.open("wb")
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, row: np.ndarray) -> None:
        self.file.write(row.tobytes())

    def __enter__(self) -> "_Array":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def content_hash(array: np.ndarray) -> str:
    """sha256 of the pixels of one image, or of its labels."""
    return hashlib.sha256(array.tobytes()).hexdigest()


def _moments(image: np.ndarray) -> np.ndarray:
    """Sum and sum of squares per channel of (h, w, 3) uint8, as (2, 3) int64: exact."""
    flat = image.reshape(-1, 3)
    return np.stack([flat.sum(axis=0, dtype=np.int64), np.einsum("nc,nc->c", flat, flat, dtype=np.int64)])


def _mean_and_spread(moments: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of `count` pixels in [0, 1], from sum and sum of squares in 0-255."""
    mean = moments[0] / count
    variance = np.maximum(moments[1] / count - mean**2, 0)
    return (mean / 255).round(6), (np.sqrt(variance) / 255).round(6)


# Reading files


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8.

    Raises:
        UserError: no complete image, more than 8 bits per channel, or a picture that is stored turned.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            mode = opened.mode
            orientation = opened.getexif().get(ORIENTATION, 1)
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no complete image ({error}) · mend or remove it") from None
    if mode[0] in "IF":  # Pillow would cut all values above 255 off
        raise UserError(f"{path} has more than 8 bits per channel (mode {mode}) · convert it to 8 bits")
    if orientation not in (0, 1):
        raise UserError(
            f"{path} is stored turned (Exif orientation {orientation}), and nothing says which way its labels are · "
            "store both upright, without that tag"
        )
    return np.asarray(image)


def read_labels(path: Path, values: np.ndarray) -> np.ndarray:
    """(H, W) uint8: the values of an 8-bit image (grey, or the indices of a palette) as classes or IGNORE.

    Args:
        values: (256,) what each value means; UNKNOWN where it means nothing.

    Raises:
        UserError: no complete image, another kind of image, or a value that means nothing.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            mode = opened.mode
            stored = np.asarray(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no complete image ({error}) · mend or remove it") from None
    if mode not in ("L", "P"):
        raise UserError(
            f"{path} has mode {mode}, but labels are one value of 8 bits per pixel: mode L (grey) or P (palette) · "
            "convert it"
        )
    labels = values[stored]
    if (labels == UNKNOWN).any():
        wrong = np.unique(stored[labels == UNKNOWN]).tolist()
        known = np.flatnonzero(values != UNKNOWN)
        raise UserError(
            f"{path} holds the label{'s' * (len(wrong) > 1)} {', '.join(map(str, wrong[:5]))}; known are "
            f"{_ranges(known)} · correct the file, or `classes` and `ignore` of the data set"
        )
    return labels.astype(np.uint8)


def _ranges(values: np.ndarray) -> str:
    """0, 1, 2, 255 as `0-2, 255`."""
    runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def read(file: File, size: tuple[int, int], fit: str) -> Row:
    """Read an image with its labels and bring both to `size`.

    A served student does the same with a caller's image (`pipelines.serving.segmentation`).

    Args:
        fit: `resize`, or `pad`: only reduced, with its proportions, if it is larger than `size` (height, width).

    Raises:
        UserError: as read_image and read_labels, and if both are not of one size.
    """
    from PIL import Image

    image, labels = read_image(file.image), read_labels(file.label, file.values)
    original = (image.shape[0], image.shape[1])
    if labels.shape != original:
        raise UserError(
            f"{file.image} is {original[0]} x {original[1]} pixels, but its labels {file.label} are "
            f"{labels.shape[0]} x {labels.shape[1]} (height x width) · mend or remove the pair"
        )
    if fit == "resize":
        height, width = size
    else:
        scale = min(size[0] / original[0], size[1] / original[1], 1.0)
        height, width = (max(round(side * scale), 1) for side in original)
    if (height, width) != original:
        # Pillow widens the filter when it reduces, and both are aligned by the centres of pixels.
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        labels = np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
    return Row(file.id, file.split, original, image, labels)


def read_folders(raw: Path, dataset: Any) -> tuple[list[str], list[File]]:
    """{train,val,test}/{images,labels}; an image and its labels have one name, without the ending."""
    values = np.full(256, UNKNOWN, dtype=np.int16)
    values[: len(dataset.classes)] = np.arange(len(dataset.classes))
    ignore = IGNORE if dataset.ignore is None else dataset.ignore
    if ignore < len(dataset.classes):
        raise UserError(
            f"`ignore` {ignore} is also the label of the class {dataset.classes[ignore]!r} (of "
            f"{len(dataset.classes)} classes) · correct `classes` or `ignore` of the data set"
        )
    values[ignore] = IGNORE
    files = []
    for split in SPLITS:
        names = ("validation", "val") if split == "validation" else (split,)
        folders = [raw / name for name in names if (raw / name).is_dir()]
        if len(folders) != 1:
            found = ", ".join(sorted(path.name for path in raw.iterdir())) or "nothing"
            raise UserError(f"{raw} must hold one folder {' or '.join(names)}, but holds {found} · complete the source")
        images, labels = _by_stem(folders[0] / "images"), _by_stem(folders[0] / "labels")
        _same_names(images, labels, folders[0] / "images", folders[0] / "labels")
        files += [File(f"{split}/{name}", split, path, labels[name], values) for name, path in images.items()]
    return list(dataset.classes), files


def _by_stem(folder: Path) -> dict[str, Path]:
    """Image files in a folder and those below, by their path without the ending."""
    if not folder.is_dir():
        raise UserError(f"the folder {folder} is missing · {{train,val,test}}/{{images,labels}} is expected")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith("."):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                raise UserError(f"{found[name]} and {path} have one name, {name!r} · labels could belong to either")
            found[name] = path
    return found


def _same_names(images: dict[str, Path], labels: dict[str, Path], image_folder: Path, label_folder: Path) -> None:
    if missing := sorted(images.keys() - labels.keys()):
        raise UserError(
            f"{images[missing[0]]} has no labels in {label_folder} ({len(missing)} of {len(images)} images) · "
            "complete the source"
        )
    if extra := sorted(labels.keys() - images.keys()):
        raise UserError(
            f"{labels[extra[0]]} has no image in {image_folder} ({len(extra)} of {len(labels)} label files) · "
            "complete the source"
        )


CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
"""The 19 classes that Cityscapes evaluates, in the order of their train ids, with their label ids (0-33)."""


def read_cityscapes(raw: Path, dataset: Any) -> tuple[list[str], list[File]]:
    """leftImg8bit/{train,val}/CITY and gtFine/{train,val}/CITY; whole cities of `train` are held out for validation."""
    label_ids = np.full(256, UNKNOWN, dtype=np.int16)
    label_ids[:34] = IGNORE
    label_ids[list(CITYSCAPES.values())] = np.arange(len(CITYSCAPES))
    train_ids = np.full(256, UNKNOWN, dtype=np.int16)
    train_ids[: len(CITYSCAPES)] = np.arange(len(CITYSCAPES))
    train_ids[IGNORE] = IGNORE
    files = []
    for folder in ("train", "val"):
        images = _by_ending(raw / "leftImg8bit" / folder, "_leftImg8bit.png")
        by_id = _by_ending(raw / "gtFine" / folder, "_gtFine_labelIds.png")
        by_train_id = _by_ending(raw / "gtFine" / folder, "_gtFine_labelTrainIds.png")
        _same_names(images, {**by_train_id, **by_id}, raw / "leftImg8bit" / folder, raw / "gtFine" / folder)
        for name, path in images.items():
            label, values = (by_id[name], label_ids) if name in by_id else (by_train_id[name], train_ids)
            files.append(File(name, "test" if folder == "val" else "train", path, label, values))
    cities = {file.id: file.id.split("/")[0] for file in files if file.split == "train"}
    held_out = _hold_out(cities, dataset, "cities")
    return list(CITYSCAPES), [_moved(file, held_out) for file in files]


def _by_ending(folder: Path, ending: str) -> dict[str, Path]:
    """Files in CITY folders, as CITY/name without the ending."""
    if not folder.is_dir():
        raise UserError(
            f"the folder {folder} is missing · leftImg8bit and gtFine, each with train and val, are expected"
        )
    paths = sorted(folder.glob(f"*/*{ending}"))
    return {path.relative_to(folder).as_posix().removesuffix(ending): path for path in paths}


VOC = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
    "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
]  # fmt: skip


def read_voc(raw: Path, dataset: Any) -> tuple[list[str], list[File]]:
    """JPEGImages, SegmentationClass and ImageSets/Segmentation/{train,val}.txt; a share of `train` is held out."""
    values = np.full(256, UNKNOWN, dtype=np.int16)
    values[: len(VOC)] = np.arange(len(VOC))
    values[IGNORE] = IGNORE
    files = []
    for name in ("train", "val"):
        listed = raw / "ImageSets" / "Segmentation" / f"{name}.txt"
        try:
            stems = listed.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{listed} cannot be read ({error}) · it lists the images of {name!r}") from None
        for stem in stems:
            image, label = raw / "JPEGImages" / f"{stem}.jpg", raw / "SegmentationClass" / f"{stem}.png"
            for path in (image, label):
                if not path.is_file():
                    raise UserError(f"{path} is missing, but {listed} lists {stem!r} · complete the source")
            files.append(File(stem, "test" if name == "val" else "train", image, label, values))
    held_out = _hold_out({file.id: file.id for file in files if file.split == "train"}, dataset, "images")
    return list(VOC), [_moved(file, held_out) for file in files]


READERS: dict[str, Callable[[Path, Any], tuple[list[str], list[File]]]] = {
    "folders": read_folders,
    "cityscapes": read_cityscapes,
    "voc": read_voc,
}


def _hold_out(groups: dict[str, str], dataset: Any, what: str) -> frozenset[str]:
    """The samples of whole groups that are as near to the share `validation` as a random order of the groups allows.

    Args:
        groups: the group of each training sample.
    """
    names = sorted(set(groups.values()))
    if len(names) < 2:
        raise UserError(
            f"`validation` holds whole {what} out of the training split, which has {len(names)} · at least 2 are needed"
        )
    order = [names[index] for index in np.random.default_rng(dataset.split_seed).permutation(len(names))]
    counts = pd.Series(groups).value_counts()
    reached = np.cumsum([counts[name] for name in order[:-1]])
    chosen = set(order[: int(np.argmin(np.abs(reached - dataset.validation * len(groups)))) + 1])
    return frozenset(sample for sample, group in groups.items() if group in chosen)


def _moved(file: File, held_out: frozenset[str]) -> File:
    split = "validation" if file.split == "train" and file.id in held_out else file.split
    return File(file.id, split, file.image, file.label, file.values)


# Making scenes


REGIONS = {"train": (0.0, 0.55), "validation": (0.58, 0.77), "test": (0.8, 1.0)}
"""What each split sees of a photograph: shares of its width, mirrored for every second photograph."""
ZOOM = (0.75, 1.3)  # size of a window of a photograph, relative to a scene
WIDEST = 1.4  # of a digit, relative to its height
STROKE = 0.5  # a pixel belongs to a stroke where the stroke covers at least this much of it
SCRAP = 0.12  # how far the scrap of paper reaches around the stroke, relative to the height of both
PAPER, INK, TINT = (0.55, 1.0), (0.0, 0.3), 0.08  # lightness, and the spread of the channels around it
OPACITY = (0.85, 1.0)  # of a stroke
TURN, SHEAR, STRETCH = (
    10,
    0.15,
    (0.85, 1.2),
)  # of a digit: degrees to either side, width per height, factor of the width
LIGHT = (0.7, 1.1)  # brightness of a scene
GRAIN = 0.03  # largest standard deviation of a scene's noise
PEN = 3  # width in pixels of what every line is drawn again with: bold strokes survive an encoder's stride
TRIES = 20  # to find a place for a digit
LOST, HIDDEN = 0.15, 0.4  # of what is there of a class, the share that one more scrap should cover, and may


def make_scenes(raw: Path, dataset: Any) -> Iterator[Row]:
    """Scraps of paper over photographs, a handwritten digit on each; the same for the same seed.

    All pixels of a scrap have the class of its digit, all others are background: where a scrap ends is easy to see,
    what stands on it is not.

    Every split has its own digits (each class in proportion to the number of scenes) and its own regions of the
    photographs. A digit is used again only after all others of its split were. The manifest says of a scene: `digits`,
    the rows of the table that it shows, and `region`, the photograph and the window of it (top, left, bottom, right).

    Raises:
        UserError: a table or a photograph that cannot be read, is too small, or has too few digits.
    """
    height, width = dataset.image_size
    digits, kinds = read_digits(raw / dataset.digits)
    photographs = [(name, read_image(raw / name)) for name in dataset.backgrounds]
    for name, pixels in photographs:
        _check_photograph(raw / name, pixels, (height, width))
    scenes = dataset.scenes
    rows = deal([getattr(scenes, name) for name in SPLITS], kinds, scenes.seed, raw / dataset.digits)
    for number, split in enumerate(SPLITS):
        generator = np.random.default_rng([scenes.seed, number])
        stream = _endless(rows[number], generator)
        for index in range(getattr(scenes, split)):
            canvas, region = _backdrop(photographs, split, (height, width), generator)
            labels = np.zeros((height, width), dtype=np.uint8)
            shown = []
            for _ in range(generator.integers(scenes.digits[0], scenes.digits[1], endpoint=True)):
                row = next(stream)
                high = int(generator.integers(scenes.height[0], scenes.height[1], endpoint=True))
                margin = max(round(SCRAP * high), 1)
                stroke = draw(digits[row], high - 2 * margin, generator)
                if _place(canvas, labels, np.pad(stroke, margin), margin, int(kinds[row]) + 1, generator):
                    shown.append(row)
            canvas = canvas * generator.uniform(*LIGHT)
            canvas = canvas + generator.normal(0, generator.uniform(0, GRAIN), canvas.shape)
            image = (canvas.clip(0, 1) * 255).round().astype(np.uint8)
            columns = {"digits": " ".join(map(str, shown)), "region": region}
            yield Row(f"{split}/{index:05d}", split, (height, width), image, labels, columns)


def read_digits(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows of side * side pixels (0-255) followed by a digit (0-9): (N, side, side) uint8 and (N,) int64.

    Raises:
        UserError: no such table, or a row that shows nothing.
    """
    try:
        table = pd.read_csv(file, header=None, dtype=np.int64).to_numpy()
    except (ValueError, EOFError, OSError, zlib.error, pd.errors.ParserError) as error:
        raise UserError(f"{file} is no table of whole numbers ({error}) · is the file complete?") from None
    side = math.isqrt(max(table.shape[1] - 1, 0))
    if side < 4 or side * side != table.shape[1] - 1:
        raise UserError(f"{file} has {table.shape[1]} columns, but a square of pixels and a digit are expected")
    pixels, kinds = table[:, :-1], table[:, -1]
    for wrong, what in (
        (((pixels < 0) | (pixels > 255)).any(axis=1), "holds a pixel outside 0-255"),
        ((kinds < 0) | (kinds > 9), "holds a label outside 0-9"),
        ((pixels < 128).all(axis=1), "shows nothing"),
    ):
        if wrong.any():
            raise UserError(f"{file} {what} in row {int(np.argmax(wrong)) + 1}")
    return pixels.astype(np.uint8).reshape(-1, side, side), kinds


def deal(scenes: Sequence[int], kinds: np.ndarray, seed: int, file: Path) -> list[np.ndarray]:
    """The rows of the table that each split may show: of every digit as much as its share of the scenes.

    Raises:
        UserError: a split gets no sample of a digit.
    """
    generator = np.random.default_rng(seed)
    bounds = np.cumsum(scenes) / sum(scenes)
    parts: list[list[np.ndarray]] = [[] for _ in scenes]
    for kind in range(10):
        rows = generator.permutation(np.flatnonzero(kinds == kind))
        cuts = np.split(rows, np.floor(bounds[:-1] * len(rows) + 0.5).astype(int))
        for split, part, cut in zip(SPLITS, parts, cuts, strict=True):
            if not len(cut):
                raise UserError(
                    f"{file} has {len(rows)} samples of the digit {kind}: none is left for the split {split!r} · "
                    "take a larger table, or another number of scenes"
                )
            part.append(cut)
    return [np.concatenate(part) for part in parts]


def _endless(rows: np.ndarray, generator: np.random.Generator) -> Iterator[int]:
    while True:
        yield from generator.permutation(rows).tolist()


def _strip(width: int, split: str, mirrored: bool) -> tuple[int, int]:
    """The columns of a photograph that a split may see."""
    left, right = REGIONS[split]
    if mirrored:
        left, right = 1 - right, 1 - left
    return math.ceil(left * width), math.floor(right * width)


def _check_photograph(path: Path, pixels: np.ndarray, size: tuple[int, int]) -> None:
    height, width = pixels.shape[:2]
    narrowest = min(right - left for split in SPLITS for left, right in [_strip(width, split, False)])
    if height < ZOOM[0] * size[0] or narrowest < ZOOM[0] * size[1]:
        needed = math.ceil(ZOOM[0] * size[0]), math.ceil((ZOOM[0] * size[1] + 1) * width / narrowest)
        raise UserError(
            f"{path} is {height} x {width} pixels, but scenes of {size[0]} x {size[1]} need a photograph of about "
            f"{needed[0]} x {needed[1]} (height x width) · take larger photographs, or a smaller `image_size`"
        )


def _backdrop(
    photographs: list[tuple[str, np.ndarray]], split: str, size: tuple[int, int], generator: np.random.Generator
) -> tuple[np.ndarray, str]:
    """A random window of a photograph as (H, W, 3) in [0, 1], and where it is."""
    from PIL import Image

    number = int(generator.integers(len(photographs)))
    name, pixels = photographs[number]
    left, right = _strip(pixels.shape[1], split, number % 2 == 1)
    largest = min(ZOOM[1], pixels.shape[0] / size[0], (right - left) / size[1])
    zoom = generator.uniform(ZOOM[0], largest)
    high, wide = int(zoom * size[0]), int(zoom * size[1])
    y = int(generator.integers(0, pixels.shape[0] - high, endpoint=True))
    x = int(generator.integers(left, right - wide, endpoint=True))
    window = Image.fromarray(pixels[y : y + high, x : x + wide]).resize(size[::-1], Image.Resampling.BICUBIC)
    canvas = np.asarray(window) / 255
    if generator.random() < 0.5:
        canvas = canvas[:, ::-1]
    middle = canvas.mean()
    canvas = middle + (canvas - middle) * generator.uniform(0.7, 1.1)
    return canvas.clip(0, 1), f"{name} {y} {x} {y + high} {x + wide}"


def draw(digit: np.ndarray, height: int, generator: np.random.Generator) -> np.ndarray:
    """A digit of about `height` pixels, stretched, bold, sheared and turned: (h, w) coverage in [0, 1], trimmed."""
    from PIL import Image, ImageFilter

    box = digit[np.ix_(digit.any(axis=1), digit.any(axis=0))]
    stretched = box.shape[1] / box.shape[0] * generator.uniform(*STRETCH)
    inner = height - (PEN - 1)
    width = max(round(inner * min(stretched, WIDEST)), 3)
    turn, shear = math.radians(generator.uniform(-TURN, TURN)), generator.uniform(-SHEAR, SHEAR)
    upright = Image.fromarray(box).resize((width, inner), Image.Resampling.BICUBIC)
    side = 2 * height  # holds it however it is turned
    canvas = Image.new("L", (side, side))
    canvas.paste(upright, ((side - width) // 2, (side - inner) // 2))
    canvas = canvas.filter(ImageFilter.MaxFilter(PEN))
    a, b = math.cos(turn), math.sin(turn) + shear * math.cos(turn)
    c, d = -math.sin(turn), math.cos(turn) - shear * math.sin(turn)
    middle = side / 2
    inverse = (a, b, middle - (a + b) * middle, c, d, middle - (c + d) * middle)
    turned = np.asarray(canvas.transform((side, side), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR))
    seen = turned >= STROKE * 255
    return turned[np.ix_(seen.any(axis=1), seen.any(axis=0))] / 255


def _place(
    canvas: np.ndarray,
    labels: np.ndarray,
    stroke: np.ndarray,
    margin: int,
    label: int,
    generator: np.random.Generator,
) -> bool:
    """Put a digit on its scrap into a scene, where it covers little of what is there; False without such room."""
    from PIL import Image, ImageFilter

    height, width = stroke.shape
    written = Image.fromarray((stroke >= STROKE).astype(np.uint8))
    scrap = np.asarray(written.filter(ImageFilter.MaxFilter(2 * margin + 1))) > 0
    counts = np.bincount(labels.ravel(), minlength=256)
    best: tuple[float, tuple[slice, slice]] | None = None
    for _ in range(TRIES):
        top = int(generator.integers(0, labels.shape[0] - height, endpoint=True))
        left = int(generator.integers(0, labels.shape[1] - width, endpoint=True))
        place = (slice(top, top + height), slice(left, left + width))
        covered = np.bincount(labels[place][scrap], minlength=256)
        lost = float((covered[1:] / np.maximum(counts[1:], 1)).max())
        if best is None or lost < best[0]:
            best = (lost, place)
        if lost <= LOST:
            break
    assert best is not None
    lost, place = best
    if lost > HIDDEN:
        return False
    paper, ink = (
        (generator.uniform(*lightness) + generator.normal(0, TINT, 3)).clip(0, 1) for lightness in (PAPER, INK)
    )
    under = np.where(scrap[..., None], paper, canvas[place])
    cover = (stroke * generator.uniform(*OPACITY))[..., None]
    canvas[place] = under * (1 - cover) + ink * cover
    labels[place][scrap] = label
    return True


# What is validated


def tables(prepared: Path) -> dict[str, pd.DataFrame]:
    """What is validated: the manifest beside what the arrays really hold, and pixels per split and class.

    `splits` has a row per split, `balance` one per split and class, `classes` one per class of the training split.

    Raises:
        UserError: an array is unreadable, or has another shape or type than manifest and description say.
    """
    description = describe(prepared)
    text = dict.fromkeys(("id", "split", "sha256", "labels_sha256", "digits", "region"), str)
    manifest = pd.read_csv(prepared / "manifest.csv", dtype=text)
    if not manifest["split"].map({name: place for place, name in enumerate(SPLITS)}).is_monotonic_increasing:
        raise UserError(f"{prepared / 'manifest.csv'} is not in the order {', '.join(SPLITS)} · prepare it again")
    height, width = description["size"]
    images = _stored(prepared, "images", (len(manifest), description["channels"], height, width))
    labels = _stored(prepared, "labels", (len(manifest), height, width))
    manifest["stored_sha256"] = [content_hash(image) for image in images]
    manifest["stored_labels_sha256"] = [content_hash(target) for target in labels]
    counts = np.stack([np.bincount(target.ravel(), minlength=256) for target in labels])
    labelled = counts[:, :IGNORE].sum(axis=1)
    present = counts[:, :IGNORE] > 0
    manifest["stored_ignored"] = (1 - labelled / (height * width)).round(6)
    # Images without any label have neither; that is an expectation of its own.
    manifest["lowest_label"] = pd.Series(present.argmax(axis=1), dtype="Int64").where(labelled > 0)
    manifest["highest_label"] = pd.Series(IGNORE - 1 - present[:, ::-1].argmax(axis=1), dtype="Int64").where(
        labelled > 0
    )
    same_content = manifest.groupby("sha256")
    manifest["splits_of_content"] = same_content["split"].transform("nunique")
    # The name of a sample with the same content, so that a finding shows pairs.
    manifest["twin"] = same_content["id"].transform(lambda ids: ids.iloc[::-1].to_numpy() if len(ids) > 1 else None)
    if "digits" in manifest:
        manifest["splits_of_digits"] = _splits_of_digits(manifest)
        manifest["splits_of_region"] = _splits_of_region(manifest)
    classes = description["classes"]
    splits, balance = [], []
    for name in SPLITS:
        rows = (manifest["split"] == name).to_numpy()
        total = int(labelled[rows].sum())
        pixels = counts[rows].sum(axis=0)
        size = max(int(rows.sum()) * height * width, 1)
        splits.append({"id": name, "samples": int(rows.sum()), "ignored": round(1 - total / size, 6)})
        balance += [
            {
                "id": f"{name}/{class_name}",
                "split": name,
                "label": label,
                "pixels": int(pixels[label]),
                "share": round(int(pixels[label]) / max(total, 1), 6),
            }
            for label, class_name in enumerate(classes)
        ]
    training = [{"id": row["id"], "pixels": row["pixels"]} for row in balance if row["split"] == "train"]
    for row, class_name in zip(training, classes, strict=True):
        row["described_pixels"] = description["pixels"][class_name]
    return {
        "manifest": manifest,
        "splits": pd.DataFrame(splits),
        "balance": pd.DataFrame(balance),
        "classes": pd.DataFrame(training),
    }


def _stored(prepared: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a prepared folder, mapped rather than read."""
    path = prepared / f"{name}.npy"
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}) · is the file complete?") from None
    if array.dtype != np.uint8 or array.shape != shape:
        raise UserError(
            f"{path} holds {array.dtype} of shape {array.shape}; manifest and dataset.json say uint8 of shape {shape} "
            f"· run `dvc repro prepare@{prepared.name}` again"
        )
    return array


def _splits_of_digits(manifest: pd.DataFrame) -> pd.Series:
    """Per scene, in how many splits the digit stands that stands in most."""
    digits = manifest.assign(digit=manifest["digits"].str.split(" ")).explode("digit")
    splits: pd.Series = digits.groupby("digit")["split"].transform("nunique").groupby(level=0).max()
    return splits


def _splits_of_region(manifest: pd.DataFrame) -> pd.Series:
    """Per scene, how many splits see a part of its window of a photograph."""
    parts = manifest["region"].str.rsplit(" ", n=4, expand=True)
    names = parts[0].to_numpy()
    top, left, bottom, right = parts.drop(columns=0).to_numpy().astype(np.int64).T
    seen = []
    for row in range(len(manifest)):
        shared = (names == names[row]) & (top < bottom[row]) & (bottom > top[row])
        shared &= (left < right[row]) & (right > left[row])
        seen.append(manifest["split"][shared].nunique())
    return pd.Series(seen, index=manifest.index)


def expectations(dataset: Any, description: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What is expected, as plain data: per table of `tables`, Great Expectations' type names and arguments.

    Args:
        dataset: the entry in params.yaml. description: dataset.json.
    """
    expect = dataset.expect
    last = len(description["classes"]) - 1
    columns = ("id", "split", "height", "width", "sha256", "labels_sha256", "mean", "spread", "ignored")
    manifest: list[dict[str, Any]] = [
        *({"type": "expect_column_values_to_not_be_null", "column": name} for name in columns),
        {"type": "expect_column_values_to_be_unique", "column": "id"},
        {"type": "expect_column_values_to_be_in_set", "column": "split", "value_set": list(SPLITS)},
        _between("height", 1, 100_000),
        _between("width", 1, 100_000),
        _between("mean", 0, 1),
        # An image of one colour shows nothing: a blank or damaged file.
        _between("spread", 0.001, 0.5),
        _between("lowest_label", 0, last),
        _between("highest_label", 0, last, "every label is a class, or marks a pixel without one"),
        {
            "type": "expect_column_values_to_not_be_null",
            "column": "highest_label",
            "description": "every image has a pixel with a label",
        },
        _between("splits_of_content", 1, 1, "the same image never stands in two splits"),
        *(
            {"type": "expect_column_pair_values_to_be_equal", "column_A": name, "column_B": f"stored_{name}"}
            for name in ("sha256", "labels_sha256", "ignored")
        ),
    ]
    if dataset.format == "scenes":
        manifest += [
            _between("splits_of_digits", 1, 1, "no digit of a scene stands in another split"),
            _between("splits_of_region", 1, 1, "no part of a scene's photograph is seen in another split"),
        ]
    if expect.samples is not None:
        manifest.append({"type": "expect_table_row_count_to_equal", "value": expect.samples})
    return {
        "manifest": manifest,
        "splits": [
            {**_between("samples", 1), "description": "every split has a sample"},
            _between("ignored", 0, expect.ignored),
        ],
        "balance": [_between("share", expect.smallest_class, expect.largest_class)],
        "classes": [
            _between("pixels", 1, description="every class occurs in the training split"),
            {
                "type": "expect_column_pair_values_to_be_equal",
                "column_A": "pixels",
                "column_B": "described_pixels",
            },
        ],
    }


def _between(
    column: str, lowest: float, highest: float | None = None, description: str | None = None
) -> dict[str, Any]:
    given = {"min_value": lowest, "max_value": highest, "description": description}
    return {
        "type": "expect_column_values_to_be_between",
        "column": column,
        **{name: value for name, value in given.items() if value is not None},
    }


def describe(prepared: Path) -> dict[str, Any]:
    """dataset.json of a prepared data set."""
    description: dict[str, Any] = json.loads((prepared / "dataset.json").read_text(encoding="utf-8"))
    return description


# Batches. torch is imported inside: preparing and validating do not need it, and every stage pays its imports.


CROPS = 10  # windows that are tried before a crowded one is taken
LUMA = (0.299, 0.587, 0.114)
YIQ = (LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
"""From RGB to luminance and the two axes of colour in which hue is an angle (NTSC)."""


def load(prepared: Path, part: str) -> tuple[list[str], "Tensor", "Tensor"]:
    """One split: ids, images (N, 3, H, W) uint8, labels (N, H, W) uint8.

    Both tensors lie on the files: what is not looked at is not read, and what is changed is changed in memory only.
    """
    import torch

    manifest = pd.read_csv(prepared / "manifest.csv", usecols=["id", "split"], dtype=str)
    rows = np.flatnonzero(manifest["split"] == part)
    # The rows of a split follow each other.
    here = slice(rows[0], rows[-1] + 1) if len(rows) else slice(0)
    images, labels = (torch.from_numpy(np.load(prepared / name, mmap_mode="c")[here]) for name in ARRAYS)
    return manifest["id"].iloc[here].tolist(), images, labels


def to_unit(images: "Tensor") -> "Tensor":
    """uint8 pixels to float32 in [0, 1]."""
    return images.float().div_(255)


def augment(images: "Tensor", labels: "Tensor", settings: Any, generator: "Generator") -> tuple["Tensor", "Tensor"]:
    """A random zoom, window, mirror image and change of colours, another one for every sample.

    Images are interpolated, labels take the nearest pixel. What lies outside an image is 0 and IGNORE.

    Args:
        images: (B, 3, H, W) in [0, 1]. labels: (B, H, W) int64.
        settings: `stages.parameters.segmentation.Augment`. generator: of any device.

    Returns:
        Images and labels of the size of `settings.crop`, or of their own.

    Raises:
        ValueError: images and labels are not of one size.
    """
    import torch

    if images.ndim != 4 or images.shape[1] != 3 or labels.shape != (images.shape[0], *images.shape[2:]):
        raise ValueError(
            f"images {tuple(images.shape)} and labels {tuple(labels.shape)} must be (B, 3, H, W), (B, H, W)"
        )

    def draw(*shape: int) -> torch.Tensor:
        """Uniform in [0, 1)."""
        return torch.rand(shape, generator=generator, device=generator.device).to(images.device)

    count, _, height, width = images.shape
    window = (height, width) if settings.crop is None else (settings.crop[0], settings.crop[1])
    inside = None
    if tuple(settings.scale) != (1.0, 1.0) or window != (height, width):
        smallest, largest = settings.scale
        zoom = smallest + (largest - smallest) * draw(count)
        places = draw(CROPS, 2, count)
        images, labels, inside = _zoom_and_crop(images, labels, zoom, window, places, settings.crowded)
    if settings.flip:
        mirrored = draw(count) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        labels = torch.where(mirrored[:, None, None], labels.flip(2), labels)
        inside = inside if inside is None else torch.where(mirrored[:, None, None], inside.flip(2), inside)
    if settings.photometric:
        images = recolour(images, *(settings.photometric * (2 * draw(4, count) - 1)))
        images = images if inside is None else images * inside[:, None]
    return images, labels


def _zoom_and_crop(
    images: "Tensor",
    labels: "Tensor",
    zoom: "Tensor",
    window: tuple[int, int],
    places: "Tensor",
    crowded: float,
) -> tuple["Tensor", "Tensor", "Tensor"]:
    """A window of each zoomed image: the first of several places where no class covers more than `crowded` of it.

    Args:
        zoom: (B,). places: (tries, 2, B) in [0, 1), where the window lies between the ends.

    Returns:
        Images (B, 3, h, w), labels (B, h, w), and which pixels lie inside of the image (B, h, w).

    Source: the share of a class counts labelled pixels only, as in the official code of MMSegmentation (cat_max_ratio).
    """
    import torch
    import torch.nn.functional as F

    count = len(images)
    sides = torch.tensor(images.shape[2:], device=images.device)[:, None]
    zoomed = (sides * zoom).round().clamp(min=1)  # (2, B)
    free = zoomed - torch.tensor(window, device=images.device)[:, None]
    # Where the window starts; below 0 where it is larger than the image, which then lies somewhere in it.
    starts = (places * (free.abs() + 1)).floor().minimum(free.abs()) * free.sign()

    def positions(axis: int, start: torch.Tensor) -> torch.Tensor:
        """Centres of the window's pixels in pixels of the image, (B, side), from 0 to the image's side."""
        centres = torch.arange(window[axis], device=images.device) + 0.5
        return (start[:, None] + centres) * (sides[axis] / zoomed[axis])[:, None]

    samples = torch.arange(count, device=images.device)[:, None, None]

    def nearest(start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows (B, h, 1) and columns (B, 1, w) of the nearest pixels, and which are inside (B, h, w)."""
        y, x = positions(0, start[0]).floor().long()[:, :, None], positions(1, start[1]).floor().long()[:, None, :]
        inside = (y >= 0) & (y < sides[0]) & (x >= 0) & (x < sides[1])
        return y.clamp(min=0).minimum(sides[0] - 1), x.clamp(min=0).minimum(sides[1] - 1), inside

    start = starts[0].clone()
    if crowded < 1:
        waiting = torch.ones(count, dtype=torch.bool, device=images.device)
        for candidate in starts:
            start = torch.where(waiting, candidate, start)
            rows, columns, inside = nearest(start)
            found = torch.where(inside, labels[samples, rows, columns], IGNORE)
            waiting = waiting & _crowded(found, crowded)
            if not waiting.any():
                break
    rows, columns, inside = nearest(start)
    targets = torch.where(inside, labels[samples, rows, columns], IGNORE)
    if bool((zoomed == sides).all()):  # whole steps: nothing is interpolated, every bit is kept
        pixels = images.permute(0, 2, 3, 1)[samples, rows, columns].permute(0, 3, 1, 2).contiguous()
    else:
        y, x = (positions(axis, start[axis]) / sides[axis] * 2 - 1 for axis in (0, 1))
        grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1).to(images.dtype)
        pixels = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return pixels * inside[:, None], targets, inside


def _crowded(labels: "Tensor", share: float) -> "Tensor":
    """Whether one class has more than `share` of the labelled pixels, or none has a label: (B, h, w) to (B,)."""
    import torch

    count = len(labels)
    keys = labels.flatten(1) + 256 * torch.arange(count, device=labels.device)[:, None]
    counts = torch.bincount(keys.flatten(), minlength=256 * count).view(count, 256)[:, :IGNORE]
    labelled = counts.sum(dim=1)
    return (counts.amax(dim=1) > share * labelled) | (labelled == 0)


def recolour(
    images: "Tensor", brightness: "Tensor", contrast: "Tensor", saturation: "Tensor", hue: "Tensor"
) -> "Tensor":
    """Change colours; four zeros leave an image as it is, up to rounding.

    Brightness and saturation are multiplied with 1 + their value; contrast likewise, around the mean luminance of the
    image; hue is turned by its value in quarters of the circle, at the same luminance.

    Args:
        images: (B, 3, H, W) in [0, 1]. The others: (B,) in [-1, 1].
    """
    import torch

    yiq = torch.tensor(YIQ, dtype=torch.float64)
    to_yiq, to_rgb = (matrix.to(images) for matrix in (yiq, torch.linalg.inv(yiq)))
    angle = (hue * (math.pi / 2)).to(images.dtype)
    cosine, sine = (1 + saturation) * angle.cos(), (1 + saturation) * angle.sin()
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([one, zero, zero, zero, cosine, -sine, zero, sine, cosine]).T.reshape(-1, 3, 3).to(images)
    matrix = (1 + brightness).to(images)[:, None, None] * (to_rgb @ turn @ to_yiq)
    changed = (matrix @ images.flatten(2)).view_as(images)
    middle = torch.einsum("bchw,c->b", changed, to_yiq[0]) / changed[0, 0].numel()
    middle = middle[:, None, None, None]
    return (middle + (changed - middle) * (1 + contrast).to(images)[:, None, None, None]).clamp(0, 1)
