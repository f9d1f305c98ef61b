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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
PAIR_COLUMNS = ("split", "fold", "first", "second", "same")
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
            with it; pairs cannot be made of it, or are not those of a list.
    """
    size, channels = dataset.image_size, dataset.channels
    if dataset.format == "csv":
        samples = read_csv(raw / dataset.file, size, channels, dataset.classes)
    elif dataset.format == "arrays":
        samples = read_arrays(raw / dataset.file, dataset.keys, size, channels, dataset.classes)
    else:
        samples = read_folder(raw / dataset.folder, size, channels, dataset.classes)
    verification, listed = dataset.verification, None
    if verification is not None and verification.pairs is not None:
        listed = read_pairs(raw / verification.pairs, verification.folds, samples)
        if dataset.split.by == "classes" and dataset.classes is None:
            samples = named_last(samples, listed)
    wanted = {name: getattr(dataset.split, name) for name in HELD_OUT}
    if dataset.split.by == "classes":
        part, trained = split_by_classes(samples.labels, len(samples.classes), wanted), -sum(wanted.values())
    else:
        part, trained = split(samples.labels, wanted, dataset.split.seed), len(samples.classes)
    _check_classes(samples, part, dataset.split.by, alone=listed is not None)
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
    counts = None
    if verification is not None:
        if listed is None:
            chosen = draw_pairs(samples.labels, part, verification.folds, dataset.split.seed)
        else:
            chosen = _within_splits(listed, part, samples, raw / verification.pairs)
        counts = chosen["split"].value_counts()
        ids = np.array(samples.ids, dtype=object)
        chosen = chosen.assign(first=ids[chosen["first"]], second=ids[chosen["second"]])
        chosen[list(PAIR_COLUMNS)].to_csv(output / "pairs.csv", index=False, lineterminator="\n")
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
            "verification": None
            if counts is None
            else {"folds": verification.folds, "pairs": {name: int(counts[name]) for name in SPLITS if name in counts}},
            "source": provenance,
        },
    )


def _check_classes(samples: Samples, part: np.ndarray, by: str, alone: bool) -> None:
    """Every class has what its splits need: a sample in each of them, or (held out as a whole) two to compare.

    Args:
        alone: whether a class that is held out may have one sample, as in lists of pairs of different classes.
    """
    for label, name in enumerate(samples.classes):
        own = part[samples.labels == label]
        count = f"{len(own)} image{'s' * (len(own) != 1)}"
        if by == "samples" and (absent := [place for place in SPLITS if place not in own]):
            raise UserError(
                f"class {name!r} has {count}, and none of them is in {' and '.join(absent)} · every class stands in "
                "every split: add images of it, leave it out, or raise `split` of the data set"
            )
        if by == "classes" and (len(own) == 0 or (len(own) == 1 and own[0] != TRAIN and not alone)):
            raise UserError(
                f"class {name!r} has {count}, and where classes are held out one image is to be found by another · add "
                "images of it, or leave it out"
            )


# Pairs, for verification


def read_pairs(file: Path, folds: int, samples: Samples) -> pd.DataFrame:
    """A list of pairs in the format of LFW's View 2 (Huang et al., 2007), for samples of `read_folder`.

    Its first line holds the number of folds and of pairs, of one class and of two, in each. Then every fold has so many
    lines "name i j" and so many "name i other j": images i and j of those folders, of files like NAME_0001.jpg.

    Returns:
        A row per pair: fold (from 0), first and second (rows of `samples`), same (1 or 0), line (of the file, from 1).

    Raises:
        UserError: the file is missing, has another number of folds or of lines, or names an image that there is not.
    """
    try:
        header, *lines = file.read_bytes().decode("utf-8-sig").rstrip().splitlines()
        there, each = (int(word) for word in header.split())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} is no list of pairs ({error}) · its first line holds two numbers, of folds and of pairs in each; "
            "correct `verification.pairs` of the data set"
        ) from None
    if (there, len(lines)) != (folds, 2 * each * folds) or each < 1:
        raise UserError(
            f"{file} announces {there} folds of {each} pairs of one class and {each} of two, and has {len(lines)} "
            f"pairs; `verification.folds` of the data set is {folds} · set it to what the list has, or complete that"
        )
    place = {(samples.classes[samples.labels[row]], Path(name).stem): row for row, name in enumerate(samples.ids)}

    def find(line: int, name: str, number: str) -> int:
        if name not in known:
            raise UserError(f"{file}, line {line}: no class is called {name!r} · correct the line, or add its images")
        stem = f"{name}_{number.zfill(4)}"
        if (name, stem) not in place:
            raise UserError(f"{file}, line {line}: class {name!r} has no image {stem} · correct the line, or add it")
        return place[name, stem]

    known, rows = set(samples.classes), []
    for index, line in enumerate(lines):
        same = index % (2 * each) < each
        words = line.split("\t") if "\t" in line else line.split()
        if len(words) != (3 if same else 4):
            raise UserError(
                f"{file}, line {index + 2}: {line.strip()!r} has {len(words)} columns, but a pair of "
                + ("one class has 3: name, number, number" if same else "two has 4: name, number, name, number")
                + " · correct the line"
            )
        first = find(index + 2, words[0], words[1])
        second = find(index + 2, words[0] if same else words[2], words[-1])
        rows.append((index // (2 * each), first, second, int(same), index + 2))
    return pd.DataFrame(rows, columns=["fold", "first", "second", "same", "line"], dtype=np.int64)


def named_last(samples: Samples, listed: pd.DataFrame) -> Samples:
    """The same samples, with the labels of the classes that a list of pairs names after all others.

    Otherwise no list would fit: it names classes from everywhere in the alphabet, and the last ones are tested on.
    """
    named = np.zeros(len(samples.classes), dtype=bool)
    named[samples.labels[listed[["first", "second"]].to_numpy().ravel()]] = True
    order = np.argsort(named, kind="stable")
    return replace(samples, labels=np.argsort(order)[samples.labels], classes=[samples.classes[old] for old in order])


def _within_splits(listed: pd.DataFrame, part: np.ndarray, samples: Samples, file: Path) -> pd.DataFrame:
    """The pairs of a list with their split, which is that of both images."""
    first, second = part[listed["first"]], part[listed["second"]]
    if (apart := first != second).any():
        row = listed[apart].iloc[0]
        named = len(np.unique(samples.labels[listed[["first", "second"]].to_numpy().ravel()]))
        raise UserError(
            f"{file}, line {row['line']}: {samples.ids[row['first']]} is in {first[apart][0]} and "
            f"{samples.ids[row['second']]} in {second[apart][0]} ({apart.sum()} of {len(listed)} pairs stand in two "
            f"splits) · with `split.by: classes`, `split.test: {named}` and no `classes` all of the list are tested on"
        )
    return listed.assign(split=first)


def draw_pairs(labels: np.ndarray, part: np.ndarray, folds: int, seed: int) -> pd.DataFrame:
    """Pairs of the splits that are held out: all of one class, and as many of two (all, where there are fewer).

    The classes of a split are dealt into the folds in turn, and both images of a pair are of one fold: a threshold is
    tried on classes that had no part in choosing it.

    Args:
        labels: (N,) integers, a class being in one split only. part: (N,) names of splits.

    Returns:
        A row per pair: split, fold (from 0), first and second (rows; of two labels the lower is first), same (1 or 0).

    Raises:
        UserError: a split has too few classes for two in every fold.
    """
    tables = []
    for name in HELD_OUT:
        generator = np.random.default_rng([seed, SPLITS.index(name)])
        classes = np.unique(labels[part == name])
        if len(classes) < 2 * folds:
            raise UserError(
                f"the {len(classes)} classes of split.{name} make no {folds} folds of two at least · hold {2 * folds} "
                f"out, or lower `verification.folds` of the data set to {len(classes) // 2}"
            )
        for fold in range(folds):
            own = [np.flatnonzero(labels == label) for label in classes[fold::folds]]
            same = np.concatenate([rows[np.stack(np.triu_indices(len(rows), 1))] for rows in own], axis=1)
            different = _of_two_classes(own, same.shape[1], generator)
            both = np.concatenate([same, different], axis=1)
            kind = np.arange(both.shape[1]) < same.shape[1]
            tables.append(
                pd.DataFrame(
                    {"split": name, "fold": fold, "first": both[0], "second": both[1], "same": kind.astype(np.int64)}
                )
            )
    return pd.concat(tables, ignore_index=True)


def _of_two_classes(rows: Sequence[np.ndarray], count: int, generator: np.random.Generator) -> np.ndarray:
    """(2, count) different pairs of rows of two classes; fewer where there are not so many. Rows are given by class."""
    everything = np.concatenate(rows)
    ends = np.cumsum([len(own) for own in rows])
    end = np.repeat(ends, [len(own) for own in rows])  # where the classes after a row's own begin
    before = np.concatenate([[0], np.cumsum(len(everything) - end)])
    # A number per pair stands for a table of all of them.
    drawn = np.sort(generator.choice(before[-1], min(count, before[-1]), replace=False))
    first = np.searchsorted(before, drawn, side="right") - 1
    return everything[np.stack([first, end[first] + drawn - before[first]])]


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
    return {
        "manifest": manifest,
        "balance": balance,
        **({} if description["verification"] is None else _tables_of_pairs(prepared, manifest, description)),
    }


def _tables_of_pairs(prepared: Path, manifest: pd.DataFrame, description: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """The pairs beside what the manifest says of their images, and how many of both kinds stand in every fold."""
    table = pd.read_csv(prepared / "pairs.csv", dtype={"split": str, "first": str, "second": str})
    known = manifest.drop_duplicates("id").set_index("id")
    labels = [table[name].map(known["label"]) for name in ("first", "second")]
    for name in ("first", "second"):
        table[f"split_of_{name}"] = table[name].map(known["split"])
    table["stored_same"] = (labels[0] == labels[1]).astype(int)
    both = np.sort(table[["first", "second"]].to_numpy(dtype=str), axis=1)
    table["with_itself"] = (both[:, 0] == both[:, 1]).astype(int)
    table["times"] = table.groupby([both[:, 0], both[:, 1]])["fold"].transform("size")
    table.insert(0, "id", table["first"] + " and " + table["second"])
    verification = description["verification"]
    everything = pd.MultiIndex.from_product(
        [verification["pairs"], range(verification["folds"])], names=["split", "fold"]
    )
    grouped = table.groupby(["split", "fold"])["same"].agg(same="sum", pairs="size")
    folds = grouped.reindex(grouped.index.union(everything), fill_value=0).reset_index()
    folds["different"] = folds["pairs"] - folds["same"]
    folds.insert(0, "id", folds["split"] + "/" + folds["fold"].astype(str))
    return {"pairs": table, "folds": folds}


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
    found = {"manifest": manifest, "balance": balance}
    return found | (_expected_of_pairs(description["verification"]) if description["verification"] is not None else {})


def _expected_of_pairs(verification: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    between, equal = "expect_column_values_to_be_between", "expect_column_pair_values_to_be_equal"
    pairs: list[dict[str, Any]] = [
        *({"type": "expect_column_values_to_not_be_null", "column": name} for name in PAIR_COLUMNS),
        *(
            {
                "type": equal,
                "column_A": "split",
                "column_B": f"split_of_{name}",
                "description": f"the {name} image of a pair is in its split",
            }
            for name in ("first", "second")
        ),
        {
            "type": equal,
            "column_A": "same",
            "column_B": "stored_same",
            "description": "a pair is the same exactly if both labels are",
        },
        {"type": between, "column": "with_itself", "max_value": 0, "description": "no image is compared with itself"},
        {"type": between, "column": "times", "max_value": 1, "description": "no pair stands there twice"},
        {"type": "expect_table_row_count_to_equal", "value": sum(verification["pairs"].values())},
    ]
    folds: list[dict[str, Any]] = [
        {
            "type": "expect_column_values_to_be_in_set",
            "column": "fold",
            "value_set": list(range(verification["folds"])),
        },
        *(
            {"type": between, "column": name, "min_value": 1, "description": f"every fold has pairs of {kind}"}
            for name, kind in (("same", "one class"), ("different", "two classes"))
        ),
    ]
    return {"pairs": pairs, "folds": folds}


def describe(prepared: Path) -> dict[str, Any]:
    """dataset.json of a prepared data set."""
    description: dict[str, Any] = json.loads((prepared / "dataset.json").read_text(encoding="utf-8"))
    return description


def class_names(description: dict[str, Any]) -> list[str]:
    """The name of every label: of the classes of training, then of those held out."""
    return [*description["classes"], *description["held_out"]]


def retrieves(interface: Mapping[str, Any], dataset: Mapping[str, Any]) -> bool:
    """Whether a model answers by the nearest sample: it knows no classes, or those of the split are none of them.

    Args:
        interface: of a model's description. dataset: dataset.json.
    """
    return not interface["classes"] or bool(dataset["held_out"])


# Batches. torch is imported inside: preparing and validating do not need it, and every stage pays its imports.


def load(prepared: Path, part: str) -> tuple[list[str], "Tensor", "Tensor"]:
    """One split: ids, images (N, C, H, W) uint8, labels (N,) int64."""
    import torch

    manifest = pd.read_csv(prepared / "manifest.csv", usecols=["id", "split"], dtype=str)
    rows = np.flatnonzero(manifest["split"] == part)
    images = np.load(prepared / "images.npy", mmap_mode="r")[rows]
    labels = np.load(prepared / "labels.npy")[rows]
    return manifest["id"].iloc[rows].tolist(), torch.from_numpy(images), torch.from_numpy(labels)


class Pairs(NamedTuple):
    """Pairs of samples of one split, (P,) each.

    Attributes:
        fold: int64, from 0. first, second: int64, places among the samples as `load` gives them. same: bool, whether
            both are of one class.
    """

    fold: np.ndarray
    first: np.ndarray
    second: np.ndarray
    same: np.ndarray


def pairs(prepared: Path, part: str) -> Pairs:
    """The pairs of one split; none where the data set has no `verification`, or no pairs in that split."""
    if describe(prepared)["verification"] is None:
        nothing = np.zeros(0, dtype=np.int64)
        return Pairs(nothing, nothing, nothing, nothing.astype(bool))
    table = pd.read_csv(prepared / "pairs.csv", dtype={"split": str, "first": str, "second": str})
    table = table[table["split"] == part]
    manifest = pd.read_csv(prepared / "manifest.csv", usecols=["id", "split"], dtype=str)
    place = pd.Index(manifest["id"][manifest["split"] == part])
    first, second = (place.get_indexer(table[name]).astype(np.int64) for name in ("first", "second"))
    return Pairs(table["fold"].to_numpy(np.int64), first, second, table["same"].to_numpy() == 1)


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
