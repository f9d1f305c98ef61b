"""The gallery as its user meets it: enrol, search; and whatever may be wrong with files, people and students."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.errors import UserError
from data.files import sha256
from pipelines import gallery as module
from pipelines import tracking
from pipelines.gallery import Recogniser, enrol, main, recogniser, search, table, told
from pipelines.promotion import promote
from pipelines.registry import register
from pipelines.serving.recognition import Student
from pipelines.versions import aliases, stored

sys.path.insert(0, str(Path(__file__).parent))
from small_project import INTERFACE, SIDE, TASK, Faces, Small, usual, write_onnx

ROOT = Path(__file__).resolve().parents[2]
GALLERY, PHOTOS = Path("staff.npz"), Path("photos")
PEOPLE = ("Ada", "Bo", "Cy")


def load(folder: Path, **changed: Any) -> Recogniser:
    """A student without classes, whose embedding are the pixels."""
    folder.mkdir(exist_ok=True)
    interface = {**INTERFACE, "classes": [], **changed}
    write_onnx(folder / "model.onnx", 0, "served", classes=0, channels=interface["channels"])
    (folder / "model.json").write_text(json.dumps({"interface": interface, "input": {"name": "images"}}))
    student = Student()
    artifacts = {"onnx": str(folder / "model.onnx"), "description": str(folder / "model.json")}
    student.load_context(SimpleNamespace(artifacts=artifacts))
    return Recogniser(student, "recognition", "3", "a" * 64)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recogniser:
    """A student; the working directory is empty but for its files."""
    monkeypatch.chdir(tmp_path)
    return load(tmp_path / "student")


def pixels(seed: int, side: int = SIDE) -> np.ndarray:
    """(side, side) grey noise."""
    return np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)


def save(path: Path, image: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return path


def photos(images: int = 2, sides: tuple[int, ...] = (SIDE, 9, 20)) -> Path:
    """A folder of every person, of images in several sizes."""
    for number, name in enumerate(PEOPLE):
        for index in range(images):
            save(PHOTOS / name / f"{index}.png", pixels(10 * number + index, sides[index % len(sides)]))
    return PHOTOS


def slow_similarity(known: Recogniser, one: np.ndarray, other: np.ndarray) -> float:
    """Cosine of what the served student answers to two square images, in float64."""
    a, b = (np.array(known.student.predict(None, image[None])[0]["embedding"]) for image in (one, other))
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def spoken(caught: pytest.ExceptionInfo[Any], *parts: str) -> None:
    for part in parts:
        assert part in str(caught.value)


# What is found


@pytest.mark.parametrize("seed", range(4))
def test_search_is_what_the_served_student_says_of_every_pair(known: Recogniser, seed: int) -> None:
    """Against brute force: every image with every image, by the served answers alone; then the best of every name."""
    generator = np.random.default_rng(seed)
    images, whose = {}, {}
    for index in range(12):
        name = str(generator.choice(PEOPLE))
        path = PHOTOS / name / f"{index}.png"
        images[path], whose[path] = pixels(100 * seed + index, int(generator.integers(SIDE, 30))), name
        save(path, images[path])
    asked = {Path(f"{index}.png"): pixels(1000 + 100 * seed + index, 11) for index in range(3)}
    for path, image in asked.items():
        save(path, image)
    enrol(GALLERY, PHOTOS, None, known)
    for path, places in zip(asked, search(GALLERY, list(asked), 5, known), strict=True):
        everyone = {other: slow_similarity(known, asked[path], images[other]) for other in images}
        ranked = sorted(
            ((max(everyone[one] for one in images if whose[one] == name), name) for name in set(whose.values())),
            reverse=True,
        )
        assert [place.name for place in places] == [name for _, name in ranked]
        assert [place.similarity for place in places] == pytest.approx([value for value, _ in ranked], abs=1e-6)
        for place in places:
            assert everyone[Path(place.file)] == pytest.approx(place.similarity, abs=1e-6)
            assert whose[Path(place.file)] == place.name


@pytest.mark.parametrize("seed", range(5))
def test_the_best_image_of_every_name(seed: int) -> None:
    """Ties included: the first row is named."""
    generator = np.random.default_rng(seed)
    similarity = generator.integers(-3, 4, 40) / 4
    names = np.array(PEOPLE * 3)[generator.integers(0, 9, 40)]
    rows = module.best_of_each(similarity, names).tolist()
    best = {name: max(range(40), key=lambda row: (names[row] == name, similarity[row], -row)) for name in set(names)}
    assert rows == sorted(best.values(), key=lambda row: (-similarity[row], row))


def test_no_more_people_than_are_asked_for(known: Recogniser) -> None:
    enrol(GALLERY, photos(), None, known)
    image = PHOTOS / "Bo" / "1.png"
    everybody = search(GALLERY, [image], 9, known)[0]
    assert len(everybody) == 3
    assert search(GALLERY, [image], 2, known)[0] == everybody[:2]
    assert (everybody[0].name, everybody[0].similarity, everybody[0].file) == ("Bo", 1.0, str(image))


def test_more_images_than_a_batch(known: Recogniser, monkeypatch: pytest.MonkeyPatch) -> None:
    enrol(GALLERY, photos(images=5), None, known)
    monkeypatch.setattr(module, "BATCH", 4)
    enrol(Path("other.npz"), PHOTOS, None, known)
    assert sha256(GALLERY) == sha256(Path("other.npz"))


def test_an_image_is_read_as_a_data_set_is(known: Recogniser, tmp_path: Path) -> None:
    """Cut in the middle, turned as its camera says, grey or colour as the student takes it."""
    wide = pixels(0, 20)
    save(PHOTOS / "Ada" / "wide.png", np.hstack([pixels(1, 20)[:, :7], wide, pixels(2, 20)[:, :7]]))
    turned = Image.Exif()
    turned[0x0112] = 6  # what is up lies to the right
    save(PHOTOS / "Bo" / "turned.png", np.rot90(pixels(3, 20)).copy(), exif=turned)
    save(PHOTOS / "Cy" / "colour.png", np.repeat(pixels(4, 20)[:, :, None], 3, axis=2))
    enrol(GALLERY, PHOTOS, None, known)
    upright = [save(Path(f"{index}.png"), pixels(index, 20)) for index in (0, 3, 4)]
    found = search(GALLERY, upright, 1, known)
    assert [places[0].name for places in found] == list(PEOPLE)
    assert [places[0].similarity for places in found] == [1.0, 1.0, 1.0]
    coloured = load(tmp_path / "coloured", channels=3)
    image, _ = module.read_image(upright[0], coloured)
    assert image.shape == (3, SIDE, SIDE)


def test_very_large_images_are_reduced_first(known: Recogniser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.serving.recognition.LARGEST_SIDE", 16)
    image, _ = module.read_image(save(Path("large.png"), np.full((40, 60), 255, dtype=np.uint8)), known)
    np.testing.assert_allclose(image, np.ones((1, SIDE, SIDE)), atol=1e-6)


def test_a_black_image_is_nobody(known: Recogniser) -> None:
    """Its embedding is zero, which has no direction."""
    enrol(GALLERY, photos(), None, known)
    black = save(Path("black.png"), np.zeros((8, 8), dtype=np.uint8))
    assert [place.similarity for place in search(GALLERY, [black], 3, known)[0]] == [0, 0, 0]


def test_nobody_is_named_below_the_threshold(known: Recogniser) -> None:
    enrol(GALLERY, photos(), None, known)
    image = PHOTOS / "Cy" / "0.png"
    found = search(GALLERY, [image], 3, known)
    second = found[0][1].similarity
    assert second < 1
    for threshold, names in ((-1, 3), (second, 2), (second + 1e-6, 1), (1, 1)):
        (answer,) = told([image], found, threshold)
        assert [place["name"] for place in answer["places"]] == [place.name for place in found[0][:names]]
        assert answer["name"] == "Cy"
    nobody = told([image], [found[0][1:]], 1.0)
    assert nobody == [{"image": str(image), "name": None, "similarity": second, "places": []}]
    lines = table(nobody).splitlines()
    assert lines[0].split() == ["image", "place", "name", "similarity"]
    assert lines[1].split() == [str(image), "-", "nobody", f"{second:.3f}"]
    assert table(told([image], found, -1)).splitlines()[2].split()[1:] == ["2", found[0][1].name, f"{second:.3f}"]


# What is kept


def test_the_gallery_is_plain_arrays(known: Recogniser) -> None:
    enrol(GALLERY, photos(), None, known)
    with np.load(GALLERY, allow_pickle=False) as found:
        kept = dict(found)
    assert kept["embeddings"].dtype == np.float32
    assert kept["embeddings"].shape == (6, SIDE * SIDE)
    np.testing.assert_allclose(np.linalg.norm(kept["embeddings"], axis=1), 1, atol=1e-6)
    assert kept["names"].tolist() == ["Ada", "Ada", "Bo", "Bo", "Cy", "Cy"]
    assert kept["files"].tolist() == [f"photos/{name}/{index}.png" for name in PEOPLE for index in range(2)]
    assert len(set(kept["sha256"].tolist())) == 6
    assert [str(kept[name]) for name in ("model", "version", "onnx_sha256")] == ["recognition", "3", "a" * 64]


def test_the_same_image_again_adds_nothing(known: Recogniser, capsys: pytest.CaptureFixture[str]) -> None:
    enrol(GALLERY, photos(), None, known)
    first, written = sha256(GALLERY), GALLERY.stat()
    assert "6 image(s) enrolled, 0 known already: staff.npz has 6 image(s) of 3 name(s)" in capsys.readouterr().out
    enrol(GALLERY, PHOTOS, None, known)
    assert (sha256(GALLERY), GALLERY.stat().st_ino) == (first, written.st_ino)
    assert "0 image(s) enrolled, 6 known already" in capsys.readouterr().out
    # The same pixels in another file; and one that is new.
    shutil.copy(PHOTOS / "Bo" / "0.png", PHOTOS / "Bo" / "again.png")
    save(PHOTOS / "Bo" / "new.bmp", pixels(99))
    enrol(GALLERY, PHOTOS / "Bo", "Bo", known)
    assert "1 image(s) enrolled, 3 known already: staff.npz has 7 image(s) of 3 name(s)" in capsys.readouterr().out
    kept = module.read(GALLERY, known)
    assert kept.names.tolist() == ["Ada", "Ada", "Bo", "Bo", "Cy", "Cy", "Bo"]
    assert kept.files[-1] == "photos/Bo/new.bmp"
    assert search(GALLERY, [PHOTOS / "Bo" / "new.bmp"], 1, known)[0][0].similarity == 1


def test_one_after_the_other_is_all_at_once(known: Recogniser) -> None:
    """Longer names than those before are kept whole."""
    enrol(GALLERY, photos(), None, known)
    save(Path("more") / "Bartholomew the Younger" / "0.png", pixels(50))
    enrol(GALLERY, Path("more"), None, known)
    kept = module.read(GALLERY, known)
    assert kept.names[-1] == "Bartholomew the Younger"
    for name in PEOPLE:
        enrol(Path("slowly.npz"), PHOTOS / name, name, known)
    enrol(Path("slowly.npz"), Path("more"), None, known)
    assert sha256(Path("slowly.npz")) == sha256(GALLERY)


@pytest.mark.parametrize("enrolled", [False, True])
def test_an_image_has_one_name(known: Recogniser, enrolled: bool) -> None:
    photos()
    if enrolled:
        enrol(GALLERY, PHOTOS, None, known)
    before = sha256(GALLERY) if enrolled else None
    save(PHOTOS / "Dan" / "0.png", pixels(0))  # Ada's
    with pytest.raises(UserError) as caught:
        enrol(GALLERY, PHOTOS, None, known)
    spoken(caught, "photos/Dan/0.png stands for 'Dan'", "for 'Ada'")
    assert (sha256(GALLERY) if GALLERY.exists() else None) == before


def test_a_gallery_of_another_student_is_refused(known: Recogniser) -> None:
    enrol(GALLERY, photos(), None, known)
    before = sha256(GALLERY)
    other = replace(known, version="4", onnx_sha256="b" * 64)
    acts: list[Callable[[], object]] = [
        lambda: search(GALLERY, [PHOTOS / "Bo" / "0.png"], 1, other),
        lambda: enrol(GALLERY, PHOTOS, None, other),
    ]
    for act in acts:
        with pytest.raises(UserError) as caught:
            act()
        spoken(caught, "version 3 of 'recognition'", "a" * 64, "version 4 of 'recognition'", "b" * 64, "enrol again")
    assert sha256(GALLERY) == before


def test_the_same_network_in_another_version_is_the_same_student(known: Recogniser) -> None:
    enrol(GALLERY, photos(), None, known)
    assert search(GALLERY, [PHOTOS / "Bo" / "0.png"], 1, replace(known, version="9"))[0][0].name == "Bo"


# What breaks


@pytest.mark.parametrize("fails", ["half written", "not renamed", "embedding"])
def test_a_gallery_is_written_whole_or_not_at_all(
    known: Recogniser, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    enrol(GALLERY, photos(), None, known)
    before = sha256(GALLERY)
    save(PHOTOS / "Dan" / "0.png", pixels(60))
    full = OSError(errno.ENOSPC, "No space left on device")

    def half(file: Any, **arrays: Any) -> None:
        file.write(b"PK\x03\x04" * 100)
        raise full

    def broken(*arguments: Any) -> Any:
        raise full

    where = {
        "half written": (module.np, "savez", half),
        "not renamed": (Path, "replace", broken),
        "embedding": (module, "embed", broken),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*where[fails])
        with pytest.raises((UserError, OSError)):
            enrol(GALLERY, PHOTOS, None, known)
    assert sha256(GALLERY) == before
    assert list(Path().glob(".staff.npz.part*")) == []
    enrol(GALLERY, PHOTOS, None, known)
    assert module.read(GALLERY, known).names[-1] == "Dan"


def test_two_that_enrol_at_once_lose_nobody(known: Recogniser, monkeypatch: pytest.MonkeyPatch) -> None:
    photos()
    quick = module.embed

    def slowly(*arguments: Any) -> np.ndarray:
        time.sleep(0.2)
        return quick(*arguments)

    monkeypatch.setattr(module, "embed", slowly)
    both = [threading.Thread(target=enrol, args=(GALLERY, PHOTOS / name, name, known)) for name in PEOPLE]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert sorted(module.read(GALLERY, known).names.tolist()) == ["Ada", "Ada", "Bo", "Bo", "Cy", "Cy"]


def spoiled(**changed: Any) -> Callable[[], object]:
    """The gallery with other arrays in it; None: without."""

    def act() -> None:
        with np.load(GALLERY) as found:
            arrays = {**dict(found), **changed}
        np.savez(GALLERY, **{name: array for name, array in arrays.items() if array is not None})

    return act


DAMAGES: dict[str, tuple[Callable[[], object], str]] = {
    "missing": (GALLERY.unlink, "there is no gallery staff.npz"),
    "text": (lambda: GALLERY.write_text("names"), "is no gallery"),
    "empty file": (lambda: GALLERY.write_bytes(b""), "is no gallery"),
    "cut": (lambda: GALLERY.write_bytes(GALLERY.read_bytes()[:-100]), "is no gallery"),
    "array": (lambda: GALLERY.write_bytes(Path("array.npy").read_bytes()), "is no gallery"),
    "folder": (lambda: (GALLERY.unlink(), GALLERY.mkdir()), "is no gallery"),
    "keys": (spoiled(names=None), "names"),
    "objects": (spoiled(names=np.array(["Ada", 1, None, 2, 3, 4], dtype=object)), "is no gallery"),
    "rows": (spoiled(names=np.array(["Ada"])), "names <U3 (1,)"),
    "numbers": (spoiled(names=np.arange(6)), "names int64 (6,)"),
    "type": (spoiled(embeddings=np.zeros((6, SIDE * SIDE))), "embeddings float64"),
    "rank": (spoiled(embeddings=np.float32(1)), "embeddings float32 ()"),
    "values": (spoiled(embeddings=np.full((6, SIDE * SIDE), np.nan, np.float32)), "is no gallery"),
    "origin": (spoiled(version=np.array(["3"])), "version <U1 (1,)"),
    "nobody": (
        spoiled(
            embeddings=np.zeros((0, 16), np.float32),
            **dict.fromkeys(("names", "files", "sha256"), np.array([], dtype=str)),
        ),
        "the gallery staff.npz is empty",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_no_gallery(known: Recogniser, name: str) -> None:
    act, message = DAMAGES[name]
    enrol(GALLERY, photos(), None, known)
    np.save("array.npy", np.zeros(3))
    act()
    with pytest.raises(UserError) as caught:
        search(GALLERY, [PHOTOS / "Bo" / "0.png"], 1, known)
    spoken(caught, message, "python -m pipelines.gallery enrol")


def test_files_that_are_no_images(known: Recogniser) -> None:
    enrol(GALLERY, photos(), None, known)
    before = sha256(GALLERY)
    Path("text.png").write_text("no image")
    whole = save(Path("whole.png"), pixels(0, 64)).read_bytes()
    Path("cut.png").write_bytes(whole[:300])
    save(Path("deep.png"), np.zeros((8, 8), dtype=np.uint16))
    save(Path("small.png"), np.zeros((SIDE - 1, 50), dtype=np.uint8))
    for name, message in {
        "text.png": "text.png is no complete image",
        "cut.png": "cut.png is no complete image",
        "deep.png": "deep.png has more than 8 bits",
        "small.png": "small.png has 50 x 3 pixels; version 3 of 'recognition' takes images from 4 x 4 on",
        "none.png": "none.png",
        "photos": "photos is no complete image",
    }.items():
        with pytest.raises(UserError) as caught:
            search(GALLERY, [PHOTOS / "Bo" / "0.png", Path(name)], 1, known)
        spoken(caught, message)
        if Path(name).is_file():
            shutil.copy(name, PHOTOS / "Cy")
            with pytest.raises(UserError) as caught:
                enrol(GALLERY, PHOTOS, None, known)
            spoken(caught, message)
            (PHOTOS / "Cy" / name).unlink()
    assert sha256(GALLERY) == before


def test_folders_of_nobody(known: Recogniser) -> None:
    photos()
    (PHOTOS / "Dan").mkdir()
    save(PHOTOS / ".cache" / "0.png", pixels(0))
    Path("nothing").mkdir()
    for folder, name, message in (
        ("nowhere", None, "there is no folder nowhere"),
        ("nothing", None, "say --name"),
        ("photos/Ada", None, "say --name"),
        ("nothing", "Dan", "no image of 'Dan' in nothing"),
        ("photos", None, "no image of 'Dan' in photos/Dan"),
        ("photos/Ada", " ", "--name ' ' is no name"),
        ("photos/Ada", "A\nda", "is no name"),
    ):
        with pytest.raises(UserError) as caught:
            enrol(GALLERY, Path(folder), name, known)
        spoken(caught, message)
        assert not GALLERY.exists()
    (PHOTOS / "Dan").rmdir()
    enrol(GALLERY, PHOTOS, None, known)
    assert set(module.read(GALLERY, known).names.tolist()) == set(PEOPLE)  # and no hidden folder


# The registry


@pytest.fixture
def project(root: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """One student is registered, and champion by hand."""
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    small = usual(root, Faces)
    small.models = {name: small.models[name] for name in ("teacher", "best")}
    small.write()
    register(TASK)
    tracking.connect().set_registered_model_alias(TASK, "champion", "1")
    return small


def test_the_champion_is_asked_with_the_network_away(
    project: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(*arguments: Any) -> Any:
        raise OSError("the network is away")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, away)
    monkeypatch.setattr(socket, "getaddrinfo", away)
    photos()
    main(["enrol", str(GALLERY), str(PHOTOS)])
    assert "by version 1 of 'recognition'" in capsys.readouterr().out
    found = np.load(GALLERY)
    assert str(found["onnx_sha256"]) == sha256(Path(f"models/exported/{TASK}/best/model.onnx"))
    image = str(PHOTOS / "Cy" / "1.png")
    main(["search", str(GALLERY), image, "--top", "1", "--json"])
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer == {
        "image": image,
        "name": "Cy",
        "similarity": 1.0,
        "places": [{"name": "Cy", "similarity": 1.0, "file": image}],
    }
    # Another alias, of the same version; a copy of it in another registered model.
    main(["search", str(GALLERY), image, "--alias", "challenger"])
    client = tracking.connect()
    client.copy_model_version(f"models:/{TASK}/1", "doors")
    client.set_registered_model_alias("doors", "champion", "1")
    main(["search", str(GALLERY), image, "--model", "doors"])
    one, other = capsys.readouterr().out.split("image ")[1:]
    assert one == other
    # A new champion.
    project.change("best", weights="other")
    register(TASK)
    client.set_registered_model_alias(TASK, "champion", "2")
    with pytest.raises(SystemExit) as caught:
        main(["search", str(GALLERY), image])
    assert caught.value.code == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error in gallery search staff.npz: staff.npz was made with version 1 of 'recognition'")
    assert "asked is version 2 of 'recognition'" in said


def test_who_cannot_be_asked(project: Small, root: Path) -> None:
    client = tracking.connect()
    for model, alias in (("recognition", "shadow"), ("nothing", "champion")):
        with pytest.raises(UserError) as caught:
            recogniser(model, alias)
        spoken(
            caught, f"registered model {model!r} has no {alias}", "python -m pipelines.registry register recognition"
        )
    client.copy_model_version(f"models:/{TASK}/1", "other")
    client.set_model_version_tag("other", "1", "task", "text")
    client.set_registered_model_alias("other", "champion", "1")
    with pytest.raises(UserError, match="registered model 'other' is of the task 'text'"):
        recogniser("other", "champion")
    (stored(TASK, "1") / "model.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"version 1 of 'recognition' is not used: its model\.onnx in the registry"):
        recogniser(TASK, "champion")


@pytest.mark.parametrize("wrong", [["--top", "0"], ["--threshold", "2"], ["--threshold", "nan"], ["--top", "many"]])
def test_numbers_that_are_none(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["search", "staff.npz", "0.png", *wrong])
    assert caught.value.code == 2
    assert wrong[0] in capsys.readouterr().err


@pytest.mark.slow
def test_the_two_commands(root: Path) -> None:
    """Before there is a champion, with one (it has classes), and after another took its place: as a user types them."""

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "pipelines.gallery", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)

    small = usual(root)
    small.gates["baseline"] = "alone"
    small.write()
    small.commit()
    photos(images=3)
    done = command("enrol", "staff.npz", "photos")
    assert done.returncode == 1
    assert "registered model 'recognition' has no champion" in done.stderr
    register(TASK)
    small.put(".gitignore", Path(".gitignore").read_text() + "photos\n*.npz*\n*.png\n")
    small.commit()
    assert promote(TASK)
    done = command("enrol", "staff.npz", "photos")
    assert done.returncode == 0, done.stderr
    champion = aliases(tracking.connect(), TASK)["champion"]
    assert done.stdout == (
        f"9 image(s) enrolled, 0 known already: staff.npz has 9 image(s) of 3 name(s), by version {champion} of "
        "'recognition'\n"
    )
    noisy = pixels(11, 9).astype(int) + np.random.default_rng(0).integers(-9, 10, (9, 9))
    save(Path("door.png"), noisy.clip(0, 255).astype(np.uint8))
    done = command("search", "staff.npz", "door.png", "photos/Ada/2.png", "--top", "1", "--threshold", "0.95")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:3] for line in lines] == [
        ["image", "place", "name"],
        ["door.png", "1", "Bo"],
        ["photos/Ada/2.png", "1", "Ada"],
    ]
    done = command("search", "staff.npz", "photos/text.png")
    assert done.returncode == 1
    assert done.stderr.startswith("error in gallery search staff.npz: photos/text.png ")
    assert "Traceback" not in done.stderr
    small.change("best", weights="other")
    small.commit()
    register(TASK)
    assert promote(TASK)
    done = command("search", "staff.npz", "door.png")
    assert done.returncode == 1
    assert f"was made with version {champion} of 'recognition'" in done.stderr
    assert command("--help").returncode == 0
