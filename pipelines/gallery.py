"""A gallery of known faces, and who an image shows: two commands on the registered student of recognition.

    enrol       adds images to a gallery: those of FOLDER/NAME/ for every NAME, or with --name all of FOLDER for one
    search      says per image which people of the gallery are most alike, or `nobody`

An image may have any size from the student's on. It is read as a folder of a data set is: turned as its camera says,
cut to a square in the middle; then it is reduced as the served student does it. Two images are as alike as the cosine
of the angle between their embeddings, and a person is as alike as the most similar image of that name. From which
similarity on two images show the same person depends on the student: choose --threshold on pairs of your own.

A gallery is one .npz without pickle. Embeddings of different students cannot be compared: it belongs to the one that it
was made with, and is made again when the champion changes. Nothing is sent anywhere. It holds personal data.
"""

import argparse
import json
import logging
import os
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from data import recognition as data
from data.errors import UserError
from data.files import write_file
from pipelines import registry, tracking
from pipelines.gates import DESCRIPTION, ONNX
from pipelines.versions import CHAMPION, aliases, changed, locked, stored
from stages.command import errors_told

if TYPE_CHECKING:
    from pipelines.serving.recognition import Student

TASK = "recognition"
BATCH = 256
# Of a gallery: what there is of every image, and of the whole.
ROWS, ORIGIN = ("embeddings", "names", "files", "sha256"), ("model", "version", "onnx_sha256")
DAMAGED = (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error)
ENROL = "`python -m pipelines.gallery enrol`"
EPILOG = """examples:
  python -m pipelines.gallery enrol staff.npz photos
  python -m pipelines.gallery enrol staff.npz photos/new/ada --name "Ada Lovelace"
  python -m pipelines.gallery search staff.npz door-1.png door-2.png --top 3 --threshold 0.7"""


@dataclass(frozen=True)
class Recogniser:
    """A registered student.

    Attributes:
        model, version: of the registry. onnx_sha256: of its network, which alone decides what embeddings it gives.
    """

    student: "Student"
    model: str
    version: str
    onnx_sha256: str


@dataclass(frozen=True)
class Gallery:
    """Images of known people, all embedded by one student.

    Attributes:
        embeddings: (N, width) float32, of length 1; zero stays zero.
        names, files, sha256: (N,) text: the person, where the image was found, and the digest of its pixels.
        model, version, onnx_sha256: of the student, as in `Recogniser`.
    """

    embeddings: np.ndarray
    names: np.ndarray
    files: np.ndarray
    sha256: np.ndarray
    model: str
    version: str
    onnx_sha256: str


@dataclass(frozen=True)
class Place:
    """A person that an image was compared with: the most similar image of that name."""

    name: str
    similarity: float
    file: str


def recogniser(model: str, alias: str) -> Recogniser:
    """The registered student that holds an alias.

    Raises:
        UserError: nobody holds it; it is of another task; or its files are gone or are not what was registered.
    """
    from pipelines.serving.recognition import Student

    client = tracking.connect()
    held = aliases(client, model)
    if alias not in held:
        raise UserError(
            f"registered model {model!r} has no {alias} (it has: {', '.join(sorted(held)) or 'nothing'}) · run "
            f"`python -m pipelines.registry register {TASK}`, then `promote {TASK}`, or correct --model and --alias"
        )
    version = client.get_model_version(model, held[alias])
    if (task := version.tags.get("task")) != TASK:
        raise UserError(f"registered model {model!r} is of the task {task!r}, not {TASK!r} · correct --model")
    folder = stored(TASK, version.version, model)
    if said := changed(version, folder):
        raise UserError(f"version {version.version} of {model!r} is not used: its {said}")
    student = Student()
    artifacts = {"onnx": str(folder / ONNX), "description": str(folder / DESCRIPTION)}
    student.load_context(SimpleNamespace(artifacts=artifacts))
    return Recogniser(student, model, str(version.version), version.tags["onnx_sha256"])


def enrol(gallery: Path, folder: Path, name: str | None, known: Recogniser) -> None:
    """Add the images of a folder to a gallery, which is made if there is none. An image that is in it adds nothing.

    Args:
        name: whose images these are; None: those of a person are in a folder of that name.

    Raises:
        UserError: a file is no image or is too small, an image stands for two people, or the gallery is of another
            student. The gallery is as it was then.
    """
    people = images_of(folder, name)
    with locked(gallery.with_name(f".{gallery.name}.lock"), f"the gallery {gallery}"):
        before = read(gallery, known) if gallery.exists() else None
        whose = dict(zip(before.sha256.tolist(), before.names.tolist(), strict=True)) if before else {}
        reduced, rows = [], []
        for person, path in tqdm(people, desc="enrol", disable=None):
            image, digest = read_image(path, known)
            if digest not in whose:
                reduced.append(image)
                rows.append((person, str(path), digest))
            if whose.setdefault(digest, person) != person:
                raise UserError(
                    f"{path} stands for {person!r}, and the same image for {whose[digest]!r} · remove the wrong one; "
                    "what a gallery holds goes when it is made anew"
                )
        if rows:
            names, files, digests = map(np.array, zip(*rows, strict=True))
            new = Gallery(embed(reduced, known), names, files, digests, known.model, known.version, known.onnx_sha256)
            write(gallery, joined(before, new) if before else new)
    print(
        f"{len(rows)} image(s) enrolled, {len(people) - len(rows)} known already: {gallery} has {len(whose)} image(s) "
        f"of {len(set(whose.values()))} name(s), by version {known.version} of {known.model!r}"
    )


def joined(one: Gallery, other: Gallery) -> Gallery:
    """Both galleries of one student, the rows of `one` first."""
    rows: dict[str, Any] = {name: np.concatenate([getattr(one, name), getattr(other, name)]) for name in ROWS}
    return replace(other, **rows)


def search(gallery: Path, images: Sequence[Path], top: int, known: Recogniser) -> list[list[Place]]:
    """Per image the `top` most similar people of a gallery, most similar first.

    Raises:
        UserError: the gallery is missing, empty or of another student; a file is no image or is too small.
    """
    found = read(gallery, known)
    if not len(found.names):
        raise UserError(f"the gallery {gallery} is empty · run {ENROL} first")
    queries = embed([read_image(path, known)[0] for path in images], known)
    return [
        [Place(str(found.names[row]), round(float(similarity[row]), 6), str(found.files[row])) for row in rows[:top]]
        for similarity, rows in ((line, best_of_each(line, found.names)) for line in queries @ found.embeddings.T)
    ]


def best_of_each(similarity: np.ndarray, names: np.ndarray) -> np.ndarray:
    """The row of the most similar image of every name, (names,), most similar first; among equals the first row.

    Args:
        similarity, names: (N,).
    """
    order = np.argsort(-similarity, kind="stable")
    _, first = np.unique(names[order], return_index=True)
    rows: np.ndarray = order[np.sort(first)]
    return rows


def embed(images: Sequence[np.ndarray], known: Recogniser) -> np.ndarray:
    """(N, width) float32 of length 1, zero staying zero, from images (channels, r, r) as the network takes them."""
    student = known.student
    parts = [
        student.session.run(["embedding"], {student.input: np.stack(images[start : start + BATCH])})[0]
        for start in range(0, len(images), BATCH)
    ]
    embeddings = np.concatenate(parts).astype(np.float64)
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit: np.ndarray = np.divide(embeddings, length, out=np.zeros_like(embeddings), where=length > 0)
    return unit.astype(np.float32)


def read_image(path: Path, known: Recogniser) -> tuple[np.ndarray, str]:
    """An image as the network takes it, (channels, r, r) float32 in [0, 1], and sha256 of its pixels before that.

    Raises:
        UserError: no such file, no complete image, or one that is smaller than what the student takes.
    """
    from pipelines.serving.recognition import LARGEST_SIDE

    student = known.student
    picture = data.read_image(path, student.channels)
    side = min(*picture.size, LARGEST_SIDE)
    if side < student.resolution:
        raise UserError(
            f"{path} has {picture.width} x {picture.height} pixels; version {known.version} of {known.model!r} takes "
            f"images from {student.resolution} x {student.resolution} on · take a larger one"
        )
    pixels = data.square(picture, side)
    return student.image(pixels, str(path)), data.content_hashes(pixels[None])[0]


def images_of(folder: Path, name: str | None) -> list[tuple[str, Path]]:
    """The images of a folder, each with the person whose it is: its name, or that of the folder inside.

    Raises:
        UserError: there is no such folder, or nobody in it, or somebody without an image.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    if name is not None:
        if not name.strip() or not name.isprintable():
            raise UserError(f"--name {name!r} is no name: printable characters are expected")
        people = {name: folder}
    else:
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        people = {path.name: path for path in inside}
    if not people:
        raise UserError(f"{folder} has no folders: one folder of images per person is expected · or say --name")
    found = {person: data.image_files(inside) for person, inside in people.items()}
    if without := [person for person, paths in found.items() if not paths]:
        kinds = ", ".join(sorted(data.IMAGE_SUFFIXES))
        raise UserError(f"no image of {without[0]!r} in {people[without[0]]} ({kinds})")
    return [(person, path) for person, paths in found.items() for path in paths]


def read(file: Path, known: Recogniser) -> Gallery:
    """A gallery, if it was made with the student that is asked now.

    Raises:
        UserError: there is none, it is damaged, or it is of another student.
    """
    try:
        with np.load(file, allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in (*ROWS, *ORIGIN)}
    except FileNotFoundError:
        raise UserError(f"there is no gallery {file} · run {ENROL} first") from None
    except DAMAGED as error:
        raise UserError(f"{file} is no gallery, or is damaged ({error}) · make it anew: {ENROL}") from None
    embeddings, *text = arrays.values()
    count = len(embeddings) if embeddings.ndim else -1
    shapes = [(count,)] * (len(ROWS) - 1) + [()] * len(ORIGIN)
    sound = [array.shape for array in text] == shapes and all(array.dtype.kind == "U" for array in text)
    if not sound or embeddings.dtype != np.float32 or embeddings.ndim != 2 or not np.isfinite(embeddings).all():
        held = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
        raise UserError(f"{file} is no gallery: it holds {held} · make it anew: {ENROL}")
    names, files, digests, *origin = text
    model, version, onnx_sha256 = map(str, origin)
    gallery = Gallery(embeddings, names, files, digests, model, version, onnx_sha256)
    if gallery.onnx_sha256 != known.onnx_sha256:
        raise UserError(
            f"{file} was made with version {gallery.version} of {gallery.model!r} (sha256 of its network "
            f"{gallery.onnx_sha256}), asked is version {known.version} of {known.model!r} ({known.onnx_sha256}): their "
            f"embeddings cannot be compared · enrol again into a new gallery, or ask the former: --model, --alias"
        )
    return gallery


def write(file: Path, gallery: Gallery) -> None:
    """A gallery, complete or not at all; the same bytes for the same one."""
    arrays: dict[str, Any] = {name: np.asarray(getattr(gallery, name)) for name in (*ROWS, *ORIGIN)}
    write_file(file, lambda opened: np.savez(opened, **arrays))


def told(images: Sequence[Path], found: Sequence[Sequence[Place]], threshold: float) -> list[dict[str, Any]]:
    """What is said of every image: the people from `threshold` on in `places`, of whom the first is `name`.

    Where nobody is, `name` is None. `similarity` is always the highest.
    """
    answers = []
    for path, places in zip(images, found, strict=True):
        near = [place for place in places if place.similarity >= threshold]
        name = near[0].name if near else None
        answers.append(
            {"image": str(path), "name": name, "similarity": places[0].similarity, "places": list(map(asdict, near))}
        )
    return answers


def table(answers: Sequence[dict[str, Any]]) -> str:
    """The same to read: a line per place."""
    lines = [["image", "place", "name", "similarity"]]
    for answer in answers:
        places = answer["places"] or [{"name": "nobody", "similarity": answer["similarity"]}]
        for number, place in enumerate(places, start=1):
            shown = str(number) if answer["places"] else "-"
            lines.append([answer["image"], shown, place["name"], f"{place['similarity']:.3f}"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.gallery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("gallery", metavar="GALLERY", type=Path, help="the gallery, a file .npz")
    common.add_argument("--model", default=TASK, help="name of the registered model (%(default)s)")
    common.add_argument("--alias", default=CHAMPION, help="which version of it (%(default)s)")
    actions = parser.add_subparsers(dest="action", required=True, metavar="enrol|search")
    adds = actions.add_parser("enrol", parents=[common], help="add images to a gallery", epilog=EPILOG)
    adds.add_argument("folder", metavar="FOLDER", type=Path, help="holds one folder of images per person")
    adds.add_argument("--name", help="whose images all of FOLDER are")
    asks = actions.add_parser("search", parents=[common], help="say whom images show", epilog=EPILOG)
    asks.add_argument("images", metavar="IMAGE", type=Path, nargs="+", help="an image")
    asks.add_argument("--top", type=_places, default=5, help="name at most so many people (%(default)s)")
    asks.add_argument(
        "--threshold", type=_cosine, default=0.6, help="the least similarity of a person who is named (%(default)s)"
    )
    asks.add_argument("--json", action="store_true", help="as JSON, with the files of the most similar images")
    for one in (adds, asks):
        one.formatter_class = argparse.RawDescriptionHelpFormatter
    given = parser.parse_args(arguments)
    for name, value in registry.QUIET.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with errors_told(f"gallery {given.action} {given.gallery}", registry.explain):
        known = recogniser(given.model, given.alias)
        if given.action == "enrol":
            enrol(given.gallery, given.folder, given.name, known)
        else:
            answers = told(given.images, search(given.gallery, given.images, given.top, known), given.threshold)
            print(json.dumps(answers, indent=2, ensure_ascii=False) if given.json else table(answers))


def _places(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is no number of people")
    return number


def _cosine(text: str) -> float:
    if not -1 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{number} is no cosine: it lies from -1 to 1")
    return number


if __name__ == "__main__":
    main()
