"""Images with one label each: reading, splitting, what is expected of them, and batches.

A prepared data set is a folder:

    images.npy      (N, channels, size, size) uint8
    labels.npy      (N,) int64, an index into the classes: those of training, then those held out
    manifest.csv    a row per sample: id, split, label, height and width before preparation, sha256 of the pixels,
                    their mean and spread (standard deviation), both in [0, 1]
    pairs.csv       only for verification, a row per pair of samples: split, fold (from 0), first and second (ids),
                    same (1 or 0: whether both are of one class)
    dataset.json    classes (those that are trained on), held_out (further ones, whose samples are all in validation or
                    test), size, channels, mean and std per channel of the training split, samples per split,
                    verification (folds, and pairs per split; or null)
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from data.errors import UserError
from data.files import write_json
from data.splits import TRAIN, split

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from torch import Generator, Tensor

HELD_OUT = ("validation", "test")
SPLITS = (TRAIN, *HELD_OUT)
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class Samples:
    """Raw samples in memory, before they are split.

    Attributes:
        images: (N, channels, size, size) uint8.
        labels: (N,) int64.
        ids: N names, unique in a sound data set.
        sizes: (N, 2) height and width of the original images, in pixels.
        classes: name of every label.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: list[str]
    sizes: np.ndarray
    classes: list[str]


def read_csv(file: Path, size: int, channels: int, classes: list[str]) -> Samples:
    """Rows of `channels * size * size` pixels (0-255) followed by the label, as text or gzipped text.

    Raises:
        UserError: a row has another length or a value that is no whole number in 0-255.
    """
    width = channels * size * size
    try:
        table = pd.read_csv(file, header=None, dtype=np.int64).to_numpy()
    except (ValueError, EOFError, OSError, zlib.error, pd.errors.ParserError) as error:
        raise UserError(f"{file} is no table of whole numbers ({error}) · is the file complete?") from None
    if table.shape[1] != width + 1:
        raise UserError(
            f"{file} has {table.shape[1]} columns, but {channels} x {size} x {size} pixels and a label are "
            f"{width + 1} · check `image_size` and `channels` of the data set"
        )
    pixels, labels = table[:, :width], table[:, width]
    if pixels.min() < 0 or pixels.max() > 255:
        row = int(np.argmax(((pixels < 0) | (pixels > 255)).any(axis=1)))
        raise UserError(f"{file} holds a pixel outside 0-255 in row {row + 1}")
    images = pixels.astype(np.uint8).reshape(-1, channels, size, size)
    ids = [f"row-{index:06d}" for index in range(len(images))]
    return Samples(images, labels, ids, np.full((len(images), 2), size), list(classes))


def read_folder(folder: Path, size: int, channels: int, classes: Sequence[str] | None) -> Samples:
    """One folder of images per class; the shorter side is resized to `size`, then the centre is cut out.

    Args:
        classes: the folders to read, in the order of their labels; all of them, sorted, by default.

    Raises:
        UserError: no such folder, no class, an unlisted class, a class without images, a file that is no complete
            image, or one with more than 8 bits per channel.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} · correct `folder` of the data set")
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise UserError(f"{folder} has no folders: one folder of images per class is expected")
    names = list(found if classes is None else classes)
    if unlisted := sorted(set(found) - set(names)):
        raise UserError(f"{folder} has classes that `classes` does not list: {', '.join(unlisted)}")
    images, labels, ids, sizes = [], [], [], []
    for label, name in enumerate(names):
        directory = folder / name
        paths = image_files(directory)
        if not paths:
            raise UserError(f"class {name!r} has no images in {directory} ({', '.join(sorted(IMAGE_SUFFIXES))})")
        for path in paths:
            image = read_image(path, channels)
            sizes.append((image.height, image.width))
            images.append(square(image, size))
            labels.append(label)
            ids.append(path.relative_to(folder).as_posix())
    return Samples(np.stack(images), np.array(labels, dtype=np.int64), ids, np.array(sizes), names)


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and in those inside, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def read_image(path: Path, channels: int) -> "Picture":
    """An image with 1 or 3 channels of 8 bits, turned as its camera says.

    Raises:
        UserError: no complete image, or one with more than 8 bits per channel.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            mode = opened.mode
            image = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no complete image ({error}) · mend or remove it") from None
    if mode[0] in "IF":  # Pillow would cut all values above 255 off
        raise UserError(f"{path} has more than 8 bits per channel (mode {mode}) · convert it to 8 bits")
    return image


def read_arrays(file: Path, keys: Any, size: int, channels: int, classes: Sequence[str] | None) -> Samples:
    """A .npz with images, (N, H, W) or (N, H, W, 3) uint8, and their labels, (N,) whole numbers.

    Args:
        keys: what both are called (`stages.parameters.recognition.Keys`).
        classes: the names of the labels 0, 1, ...; by default the numbers that occur, in their order.

    Raises:
        UserError: the file is missing or damaged, lacks an array or holds objects; an array has another type or shape;
            a label has no name.
    """
    from PIL import Image

    try:
        with np.load(file, allow_pickle=False) as loaded:
            if missing := [f"{what} ({name!r})" for what, name in keys if name not in loaded]:
                raise UserError(
                    f"{file} has no array of {' and '.join(missing)}; it has {', '.join(sorted(loaded)) or 'none'} · "
                    "correct `keys` of the data set"
                )
            pixels, numbers = loaded[keys.images], loaded[keys.labels]
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file} cannot be read as .npz of plain arrays ({error}) · is it complete?") from None
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[3:] not in ((), (3,)) or not pixels.size:
        raise UserError(
            f"{file}: {keys.images} is {pixels.dtype} of shape {pixels.shape}, but images are uint8 of shape (N, H, W) "
            "or (N, H, W, 3) · convert it, or correct `keys.images` of the data set"
        )
    if numbers.dtype.kind not in "iu" or numbers.shape != pixels.shape[:1]:
        raise UserError(
            f"{file}: {keys.labels} is {numbers.dtype} of shape {numbers.shape}, but {len(pixels)} images have "
            f"whole numbers of shape ({len(pixels)},) as labels · correct the file, or `keys.labels` of the data set"
        )
    values, labels = np.unique(numbers, return_inverse=True)
    if classes is not None:
        if values[0] < 0 or values[-1] >= len(classes):
            wrong = values[-1] if values[0] >= 0 else values[0]
            raise UserError(
                f"{file}: {keys.labels} holds {wrong}, but `classes` names the labels 0 to {len(classes) - 1} · "
                "correct `classes` of the data set, or leave it out"
            )
        labels = numbers
    names = list(classes) if classes is not None else [str(value) for value in values]
    mode = "L" if channels == 1 else "RGB"
    images = np.stack([square(Image.fromarray(image).convert(mode), size) for image in pixels])
    ids = [f"row-{index:06d}" for index in range(len(images))]
    return Samples(images, labels.astype(np.int64), ids, np.tile(pixels.shape[1:3], (len(images), 1)), names)


def square(image: "Picture", size: int) -> np.ndarray:
    """(channels, size, size) uint8: the shorter side is resized, then the centre is cut out."""
    from PIL import Image, ImageOps

    square = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC), dtype=np.uint8)
    return square.reshape(size, size, -1).transpose(2, 0, 1)


def content_hashes(images: np.ndarray) -> list[str]:
    """sha256 of the pixels of each image."""
    return [hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest() for image in images]


def split_by_classes(labels: np.ndarray, classes: int, wanted: dict[str, int]) -> np.ndarray:
    """(N,) names of splits: the last classes are the last split of `wanted`, and so on; TRAIN is what is left.

    Args:
        labels: (N,) integers below `classes`. wanted: number of classes by name, in the order of their labels.

    Raises:
        UserError: no class is left for training.
    """
    if (number := sum(wanted.values())) >= classes:
        raise UserError(
            f"{' + '.join(f'split.{name}' for name in wanted)} = {number} classes are held out, but there are only "
            f"{classes}, and some have to be trained on · lower them"
        )
    names = [TRAIN] * (classes - number) + [name for name, amount in wanted.items() for _ in range(amount)]
    return np.array(names, dtype=object)[labels]


def prepare(raw: Path, dataset: Any, output: Path, provenance: dict[str, Any]) -> None:
    """Read raw data, split it and write the prepared folder.

    Args:
        raw: the fetched source. dataset: its entry in params.yaml (`stages.parameters.recognition.Dataset`).
        output: an existing empty folder. provenance: what dataset.json says of the source.

    Raises:
        UserError: the source cannot be read; more is held out than there is; a class lacks samples for what is done
            with it.
    """
    size, channels = dataset.image_size, dataset.channels
    if dataset.format == "csv":
        samples = read_csv(raw / dataset.file, size, channels, dataset.classes)
    elif dataset.format == "arrays":
        samples = read_arrays(raw / dataset.file, dataset.keys, size, channels, dataset.classes)
    else:
        samples = read_folder(raw / dataset.folder, size, channels, dataset.classes)
    wanted = {name: getattr(dataset.split, name) for name in HELD_OUT}
    if dataset.split.by == "classes":
        part, trained = split_by_classes(samples.labels, len(samples.classes), wanted), -sum(wanted.values())
    else:
        part, trained = split(samples.labels, wanted, dataset.split.seed), len(samples.classes)
    _check_classes(samples, part, dataset.split.by)
    total, squares = _moments(samples.images)
    mean, spread = _mean_and_spread(total.sum(1), squares.sum(1), samples.images[0].size)
    manifest = pd.DataFrame(
        {
            "id": samples.ids,
            "split": part,
            "label": samples.labels,
            "height": samples.sizes[:, 0],
            "width": samples.sizes[:, 1],
            "sha256": content_hashes(samples.images),
            "mean": mean,
            "spread": spread,
        }
    )
    manifest.to_csv(output / "manifest.csv", index=False, lineterminator="\n")
    np.save(output / "images.npy", samples.images)
    np.save(output / "labels.npy", samples.labels)
    train = part == TRAIN
    pixels = int(train.sum()) * size**2
    mean, spread = _mean_and_spread(total[train].sum(0), squares[train].sum(0), pixels)
    write_json(
        output / "dataset.json",
        {
            "classes": samples.classes[:trained],
            "held_out": samples.classes[trained:],
            "size": size,
            "channels": channels,
            "mean": mean.tolist(),
            # A channel that never changes would be divided by zero.
            "std": np.maximum(spread, 1e-3).tolist(),
            "samples": {name: int((part == name).sum()) for name in SPLITS},
            "verification": None,
            "source": provenance,
        },
    )


def _check_classes(samples: Samples, part: np.ndarray, by: str) -> None:
    """Every class has what its splits need: a sample in each of them, or (held out as a whole) two to compare."""
    for label, name in enumerate(samples.classes):
        own = part[samples.labels == label]
        count = f"{len(own)} image{'s' * (len(own) != 1)}"
        if by == "samples" and (absent := [place for place in SPLITS if place not in own]):
            raise UserError(
                f"class {name!r} has {count}, and none of them is in {' and '.join(absent)} · every class stands in "
                "every split: add images of it, leave it out, or raise `split` of the data set"
            )
        if by == "classes" and (len(own) == 0 or (len(own) == 1 and own[0] != TRAIN)):
            raise UserError(
                f"class {name!r} has {count}, and where classes are held out one image is to be found by another · add "
                "images of it, or leave it out"
            )


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and sum of squares of the pixels, (N, channels) int64 each: exact, and without a wider copy of the images."""
    squares = np.einsum("nchw,nchw->nc", images, images, dtype=np.int64, casting="unsafe")
    return images.sum(axis=(2, 3), dtype=np.int64), squares


def _mean_and_spread(total: np.ndarray, squares: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of `count` pixels in [0, 1], from their moments in 0-255."""
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 0)
    return (mean / 255).round(6), (np.sqrt(variance) / 255).round(6)


def tables(prepared: Path) -> dict[str, pd.DataFrame]:
    """What is validated: the manifest beside what the arrays really hold, and the balance of the classes.

    Raises:
        UserError: an array is unreadable, or has another shape or type than manifest and description say.
    """
    description = describe(prepared)
    manifest = pd.read_csv(prepared / "manifest.csv", dtype={"id": str, "split": str, "sha256": str})
    arrays = {}
    for name in ("images", "labels"):
        try:
            arrays[name] = np.load(prepared / f"{name}.npy")
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{prepared / name}.npy cannot be read ({error}) · is the file complete?") from None
    side = description["size"]
    wanted = {
        "images": ("uint8", (len(manifest), description["channels"], side, side)),
        "labels": ("int64", (len(manifest),)),
    }
    for name, (dtype, shape) in wanted.items():
        array = arrays[name]
        if array.dtype != dtype or array.shape != shape:
            raise UserError(
                f"{prepared / name}.npy holds {array.dtype} of shape {array.shape}; manifest and dataset.json say "
                f"{dtype} of shape {shape} · run `dvc repro prepare@{prepared.name}` again"
            )
    manifest["stored_sha256"] = content_hashes(arrays["images"])
    manifest["stored_label"] = arrays["labels"]
    same_content = manifest.groupby("sha256")
    manifest["splits_of_content"] = same_content["split"].transform("nunique")
    # The name of a sample with the same content, so that a finding shows pairs.
    manifest["twin"] = same_content["id"].transform(lambda ids: ids.iloc[::-1].to_numpy() if len(ids) > 1 else None)
    names = class_names(description)
    if description["held_out"]:
        grouped = manifest.groupby("label").agg(
            split=("split", "first"), samples=("id", "size"), splits=("split", "nunique")
        )
        complete = grouped.reindex(range(len(names))).fillna({"split": "none", "samples": 0, "splits": 0})
        balance = complete.rename_axis("label").reset_index()
        balance["trained_on"] = balance["split"] == TRAIN
        balance["of_training"] = balance["label"] < len(description["classes"])
    else:
        everything = pd.MultiIndex.from_product([SPLITS, range(len(names))], names=["split", "label"])
        sizes = manifest.groupby(["split", "label"]).size()
        balance = sizes.reindex(everything, fill_value=0).rename("samples").reset_index()
    balance["share"] = balance["samples"] / balance.groupby("split")["samples"].transform("sum")
    balance.insert(0, "id", balance["split"] + "/" + balance["label"].map(dict(enumerate(names))))
    return {"manifest": manifest, "balance": balance}


def expectations(dataset: Any, description: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What is expected, as plain data: per table of `tables`, Great Expectations' type names and arguments.

    Args:
        dataset: the entry in params.yaml. description: dataset.json.
    """
    labels = list(range(len(class_names(description))))
    expect = dataset.expect
    columns = ("id", "split", "label", "height", "width", "sha256", "mean", "spread")
    manifest: list[dict[str, Any]] = [
        *({"type": "expect_column_values_to_not_be_null", "column": name} for name in columns),
        {"type": "expect_column_values_to_be_unique", "column": "id"},
        {"type": "expect_column_values_to_be_in_set", "column": "label", "value_set": labels},
        {"type": "expect_column_values_to_be_in_set", "column": "split", "value_set": list(SPLITS)},
        {"type": "expect_column_values_to_be_between", "column": "height", "min_value": 1, "max_value": 100_000},
        {"type": "expect_column_values_to_be_between", "column": "width", "min_value": 1, "max_value": 100_000},
        {"type": "expect_column_values_to_be_between", "column": "mean", "min_value": 0, "max_value": 1},
        # An image of one colour shows nothing: a blank or damaged file.
        {"type": "expect_column_values_to_be_between", "column": "spread", "min_value": 0.001, "max_value": 0.5},
        {
            "type": "expect_column_values_to_be_between",
            "column": "splits_of_content",
            "min_value": 1,
            "max_value": 1,
            "description": "the same image never stands in two splits",
        },
        {"type": "expect_column_pair_values_to_be_equal", "column_A": "sha256", "column_B": "stored_sha256"},
        {"type": "expect_column_pair_values_to_be_equal", "column_A": "label", "column_B": "stored_label"},
    ]
    if expect.samples is not None:
        manifest.append({"type": "expect_table_row_count_to_equal", "value": expect.samples})
    held_out = bool(description["held_out"])
    balance: list[dict[str, Any]] = [
        {
            "type": "expect_column_values_to_be_between",
            "column": "samples",
            "min_value": 1,
            "description": "every class has a sample" + ("" if held_out else " in every split"),
        },
        {
            "type": "expect_column_values_to_be_between",
            "column": "share",
            "min_value": expect.smallest_class,
            "max_value": expect.largest_class,
        },
    ]
    if held_out:
        balance += [
            {
                "type": "expect_column_values_to_be_between",
                "column": "splits",
                "max_value": 1,
                "description": "no class stands in two splits",
            },
            {
                "type": "expect_column_pair_values_to_be_equal",
                "column_A": "trained_on",
                "column_B": "of_training",
                "description": "exactly the first classes are trained on",
            },
        ]
    return {"manifest": manifest, "balance": balance}


def describe(prepared: Path) -> dict[str, Any]:
    """dataset.json of a prepared data set."""
    description: dict[str, Any] = json.loads((prepared / "dataset.json").read_text(encoding="utf-8"))
    return description


def class_names(description: dict[str, Any]) -> list[str]:
    """The name of every label: of the classes of training, then of those held out."""
    return [*description["classes"], *description["held_out"]]


# Batches. torch is imported inside: preparing and validating do not need it, and every stage pays its imports.


def load(prepared: Path, part: str) -> tuple[list[str], "Tensor", "Tensor"]:
    """One split: ids, images (N, C, H, W) uint8, labels (N,) int64."""
    import torch

    manifest = pd.read_csv(prepared / "manifest.csv", usecols=["id", "split"], dtype=str)
    rows = np.flatnonzero(manifest["split"] == part)
    images = np.load(prepared / "images.npy", mmap_mode="r")[rows]
    labels = np.load(prepared / "labels.npy")[rows]
    return manifest["id"].iloc[rows].tolist(), torch.from_numpy(images), torch.from_numpy(labels)


def to_unit(images: "Tensor") -> "Tensor":
    """uint8 pixels to float32 in [0, 1]."""
    return images.float().div_(255)


def augment(images: "Tensor", shift: int, flip: bool, generator: "Generator") -> "Tensor":
    """A random shift of up to `shift` pixels (zeros move in), then, half of the time, a mirror image.

    Args:
        images: (B, C, H, W). generator: on the device of the images.
    """
    import torch
    import torch.nn.functional as F

    count, _, height, width = images.shape
    if shift:
        padded = F.pad(images, [shift] * 4).permute(0, 2, 3, 1)
        offset = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator, device=images.device)
        rows = offset[0] + torch.arange(height, device=images.device)
        columns = offset[1] + torch.arange(width, device=images.device)
        sample = torch.arange(count, device=images.device)
        images = padded[sample[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        mirrored = torch.rand(count, generator=generator, device=images.device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images.contiguous()


def downsample(images: "Tensor", resolution: int) -> "Tensor":
    """The low-resolution version of images in [0, 1]: bicubic with antialiasing, clamped (bicubic overshoots).

    Args:
        images: (B, C, H, W) floating point. resolution: side of the result; the images' own leaves them as they are.

    Source: HORKD card 3.7, a decision of this project.

    Raises:
        ValueError: `resolution` is larger than the images.
    """
    import torch.nn.functional as F

    if resolution > min(images.shape[-2:]):
        raise ValueError(f"resolution {resolution} is larger than the images {tuple(images.shape)}")
    if images.shape[-2:] == (resolution, resolution):
        return images
    size = (resolution, resolution)
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
