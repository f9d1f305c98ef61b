"""Digits in renderings: painted as described, dealt evenly, split by class; and features that an encoder makes."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data import zero_shot
from data.errors import UserError
from data.files import sha256, tree_digest
from models.zero_shot import build

sys.path.insert(0, str(Path(__file__).parent))
import zero_shot_sources as files

SHEAR = {"sheared-left": -0.5, "sheared-right": 0.5}


def column(name: str) -> np.ndarray:
    found: np.ndarray = zero_shot.DIGITS[:, zero_shot.STROKES.index(name)]
    return found


# Attributes


def test_classes_are_named_digit_by_digit() -> None:
    classes, attributes, names, _ = zero_shot.describe_renderings()
    assert classes[:7] == [
        "0-plain",
        "0-outline",
        "0-dotted",
        "0-thick",
        "0-sheared-left",
        "0-sheared-right",
        "1-plain",
    ]
    assert classes == files.ALL
    assert attributes.shape == (60, len(names))
    assert attributes.dtype == np.float32
    assert len(set(names)) == len(names)


def test_attributes_tell_all_classes_apart_and_none_is_constant() -> None:
    _, attributes, *_ = zero_shot.describe_renderings()
    distances = np.linalg.norm(attributes[:, None] - attributes, axis=2)
    assert distances[~np.eye(60, dtype=bool)].min() > 0.1
    assert (np.ptp(attributes, axis=0) > 0.1).all()
    np.testing.assert_allclose(np.linalg.norm(attributes.astype(np.float64), axis=1), 1, rtol=1e-6)


def test_a_class_is_its_digit_and_its_rendering() -> None:
    """But for the length of a class, attributes of strokes depend on the digit alone, the others on the rendering."""
    classes, attributes, names, _ = zero_shot.describe_renderings()
    strokes = len(zero_shot.STROKES)
    largest = zero_shot.DIGITS.max(axis=0)
    for name, row in zip(classes, attributes.astype(np.float64), strict=True):
        digit, rendering = name.split("-", 1)
        painted = dict(zip(names[strokes:], row[strokes:], strict=True))
        length = np.linalg.norm(row[:strokes]) / np.linalg.norm(zero_shot.DIGITS[int(digit)] / largest)
        np.testing.assert_allclose(row[:strokes] / length, zero_shot.DIGITS[int(digit)] / largest, atol=1e-6)
        wanted = {"outline": 0.0, "dotted": 0.0, "thick": 0.0, "shear": 0.0}
        if rendering in SHEAR:
            wanted["shear"] = np.sign(SHEAR[rendering])
        elif rendering != "plain":
            wanted[rendering] = 1.0
        assert {key: round(value / length, 5) for key, value in painted.items()} == wanted


def test_numbers_of_strokes_agree_with_each_other() -> None:
    """A connected drawing: (edges - nodes) = (loops - 1), and a node with k edges counts k / 2 of them."""
    extra = column("ends") + 2 * column("loops") - 2
    assert ((column("junctions") <= extra) & (extra <= 2 * column("junctions"))).all()
    assert (column("loop above") + column("loop below") <= column("loops")).all()
    bars = sum(column(name) for name in zero_shot.STROKES if "bar" in name.split())
    assert (bars <= column("straight strokes")).all()
    assert (column("straight strokes") + column("curved strokes") > 0).all()
    both = column("symmetry left to right") & column("symmetry top to bottom")
    assert (both <= column("symmetry of a half turn")).all()
    for side in ("left", "right"):
        assert not (column(f"openings to the {side}") * column("symmetry left to right")).any()
    assert not (column("opening above") * column("symmetry top to bottom")).any()


def test_loops_are_those_of_a_drawing() -> None:
    """Seven segments have the loops of handwriting."""
    for digit in range(10):
        _, parts = scipy.ndimage.label(files.draw(digit) == 0)
        assert column("loops")[digit] == parts - 1


# Painting


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_leaning_equals_pixel_by_pixel(height: int, width: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (3, height, width), dtype=np.uint8)
    amount = generator.normal(0, 1.5, 3)
    found = zero_shot.lean(images, amount)
    assert found.dtype == np.uint8
    for n, row, place in np.ndindex(images.shape):
        at = place - amount[n] * ((height - 1) / 2 - row)
        value = sum(max(0.0, 1 - abs(at - x)) * images[n, row, x] for x in range(width))
        assert abs(int(found[n, row, place]) - value) <= 0.5 + 1e-9


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 7), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_the_slant_is_a_weighted_regression(height: int, width: int, seed: int) -> None:
    images = np.random.default_rng(seed).integers(1, 256, (3, height, width), dtype=np.uint8)
    rows, places = np.indices((height, width))
    for image, found in zip(images, zero_shot.slant(images), strict=True):
        line = np.polyfit(-rows.ravel().astype(float), places.ravel(), 1, w=np.sqrt(image.ravel().astype(float)))
        assert found == pytest.approx(line[0], abs=1e-9)


def test_what_has_no_height_has_no_slant() -> None:
    image = np.zeros((1, 28, 28), dtype=np.uint8)
    image[0, 5, 3:20] = 255
    assert zero_shot.slant(image) == [0]
    np.testing.assert_array_equal(zero_shot.paint(image, "plain"), image)


@pytest.fixture(scope="module")
def leaning() -> tuple[np.ndarray, np.ndarray]:
    """Digits that lean to both sides, as handwriting does."""
    images, kinds = files.some_digits(6, seed=1)
    return zero_shot.lean(images, np.random.default_rng(2).uniform(-0.3, 0.3, len(images))), kinds


@pytest.mark.parametrize("rendering", zero_shot.RENDERINGS)
def test_a_rendering_stands_as_it_should(leaning: tuple[np.ndarray, np.ndarray], rendering: str) -> None:
    painted = zero_shot.paint(leaning[0], rendering)
    assert (painted.shape, painted.dtype) == (leaning[0].shape, np.uint8)
    tolerance = 0.02 if rendering in ("plain", *SHEAR) else 0.15
    np.testing.assert_allclose(zero_shot.slant(painted), SHEAR.get(rendering, 0), atol=tolerance)


def test_thick_is_plain_with_its_outline(leaning: tuple[np.ndarray, np.ndarray]) -> None:
    plain, outline, dotted, thick = (
        zero_shot.paint(leaning[0], name) for name in ("plain", "outline", "dotted", "thick")
    )
    np.testing.assert_array_equal(thick, scipy.ndimage.grey_dilation(plain, (1, 3, 3), mode="constant"))
    np.testing.assert_array_equal(outline, thick - plain)
    assert outline[plain == 255].max() == 0
    kept = np.add.outer(np.arange(28) // 2, np.arange(28) // 2) % 2 == 1
    np.testing.assert_array_equal(dotted[:, kept], plain[:, kept])
    assert dotted[:, ~kept].max() == 0
    shares = dotted.sum(axis=(1, 2)) / plain.sum(axis=(1, 2))
    assert (shares > 0.3).all()
    assert (shares < 0.7).all()


def test_a_mirror_swaps_left_and_right(leaning: tuple[np.ndarray, np.ndarray]) -> None:
    mirrored = zero_shot.paint(leaning[0][:, :, ::-1], "sheared-left")[:, :, ::-1]
    right = zero_shot.paint(leaning[0], "sheared-right")
    assert np.abs(mirrored.astype(int) - right).max() <= 1


@pytest.mark.parametrize("rendering", zero_shot.RENDERINGS)
def test_a_digit_can_be_told_after_painting(leaning: tuple[np.ndarray, np.ndarray], rendering: str) -> None:
    """It is more like the same digit in this rendering than like any other, wherever both stand (with either pen)."""
    images, kinds = leaning
    painted = zero_shot.paint(images, rendering)
    drawn = [files.draw(digit, pen=pen) for pen in (2, 3) for digit in range(10)]
    templates = zero_shot.paint(np.stack(drawn), rendering)

    def spectrum(batch: np.ndarray) -> np.ndarray:
        blurred = scipy.ndimage.gaussian_filter(batch.astype(float), (0, 1.5, 1.5))
        rows = np.fft.fft2(blurred, (56, 56))
        return rows / np.linalg.norm(rows, axis=(1, 2), keepdims=True)

    # The largest correlation over all shifts.
    likeness = np.fft.ifft2(spectrum(painted)[:, None] * spectrum(templates).conj()[None]).real.max(axis=(2, 3))
    np.testing.assert_array_equal(likeness.argmax(axis=1) % 10, kinds)


# Dealing and splitting


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(6, 30), min_size=10, max_size=10), st.integers(0, 99))
def test_digits_are_dealt_evenly(counts: list[int], seed: int) -> None:
    digits = np.random.default_rng(seed).permutation(np.repeat(np.arange(10), counts))
    dealt = zero_shot.deal(digits, seed)
    table = pd.crosstab(digits, dealt)
    assert table.shape == (10, 6)
    assert (table.max(axis=1) - table.min(axis=1) <= 1).all()
    np.testing.assert_array_equal(dealt, zero_shot.deal(digits, seed))
    assert (dealt != zero_shot.deal(digits, seed + 1)).any()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    files.write_digits(folder / "digits.csv.gz", *files.some_digits(50))
    return folder


@pytest.fixture(scope="module")
def prepared(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.prepared(raw, files.renderings(), tmp_path_factory.mktemp("prepared") / "images")


def test_every_digit_is_painted_once(prepared: Path) -> None:
    digits, kinds = files.some_digits(50)
    manifest = pd.read_csv(prepared / "manifest.csv")
    images, labels = np.load(prepared / "images.npy"), np.load(prepared / "labels.npy")
    assert manifest["id"].tolist() == [f"sample-{row:06d}" for row in range(500)]
    np.testing.assert_array_equal(labels // 6, kinds)
    for digit, label, image in zip(digits, labels, images, strict=True):
        wanted = zero_shot.paint(digit[None], list(zero_shot.RENDERINGS)[label % 6])
        np.testing.assert_array_equal(image, wanted)
    np.testing.assert_array_equal(manifest["label"], labels)
    np.testing.assert_allclose(manifest["mean"], (images / 255).mean(axis=(1, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(manifest["spread"], (images / 255).std(axis=(1, 2, 3)), atol=1e-6)


def test_classes_have_roles_and_their_samples_go_where_these_say(prepared: Path) -> None:
    description = zero_shot.describe(prepared)
    roles = dict(zip(description["classes"], description["roles"], strict=True))
    assert [name for name, role in roles.items() if role == "unseen"] == files.renderings().unseen
    assert {name for name, role in roles.items() if role == "validation"} == {
        "4-sheared-left", "5-sheared-right", "0-thick"
    }  # fmt: skip
    manifest = pd.read_csv(prepared / "manifest.csv")
    counts = pd.crosstab(manifest["label"], manifest["split"])
    total, seen = 0, 0
    for label, (name, role) in enumerate(roles.items()):
        train, validation, test = counts.loc[label, ["train", "validation", "test"]]
        number = train + validation + test
        if role == "seen":
            # In proportion, up to a sample of rounding.
            assert abs(validation - 0.2 * number) < 1
            assert abs(test - 0.25 * number) < 1
            seen += number
        else:
            assert (train, validation, test)[zero_shot.SPLITS.index("test" if role == "unseen" else role)] == number
        assert number in (8, 9), name
        total += number
    assert total == 500
    parts = dict(manifest["split"].value_counts())
    assert {name: int(number) for name, number in parts.items()} == description["samples"]
    assert parts["train"] == seen - round(0.2 * seen) - round(0.25 * seen)


def test_statistics_are_those_of_training_images(prepared: Path) -> None:
    description = zero_shot.describe(prepared)
    manifest = pd.read_csv(prepared / "manifest.csv")
    train = np.load(prepared / "images.npy")[manifest["split"] == "train"] / 255
    images = description["images"]
    assert (images["channels"], images["size"], description["features"]) == (1, 28, None)
    assert images["mean"] == [pytest.approx(train.mean(), abs=1e-6)]
    assert images["std"] == [pytest.approx(train.std(), abs=1e-6)]


def test_the_same_seed_gives_the_same_bytes(raw: Path, prepared: Path, tmp_path: Path) -> None:
    again = files.prepared(raw, files.renderings(), tmp_path / "again")
    assert tree_digest(again) == tree_digest(prepared)
    split = {"validation": 0.2, "test": 0.25, "seed": 1}
    other = files.prepared(raw, files.renderings(split=split), tmp_path / "other")
    assert (np.load(other / "labels.npy") != np.load(prepared / "labels.npy")).any()


def test_so_many_validation_classes_are_drawn_among_the_seen(raw: Path, tmp_path: Path) -> None:
    found = {}
    for seed in (0, 0, 1):
        split = {"validation": 0.2, "test": 0.25, "validation_classes": 5, "seed": seed}
        output = files.prepared(raw, files.renderings(split=split), tmp_path / str(len(list(tmp_path.iterdir()))))
        roles = zero_shot.describe(output)["roles"]
        assert roles.count("validation") == 5
        assert roles.count("unseen") == 4
        assert found.setdefault(seed, roles) == roles
    assert found[0] != found[1]


def row_of(rendering: str) -> list[str]:
    return [f"{digit}-{rendering}" for digit in range(10)]


@pytest.mark.parametrize(
    ("unseen", "classes", "message"),
    [
        (["3-outlne"], 0, "`unseen` of the data set names an unknown class '3-outlne'; did you mean '3-outline'?"),
        (
            ["0-plain"],
            ["9-thik"],
            "`split.validation_classes` of the data set names an unknown class '9-thik'; did",
        ),
        (["0-plain", "0-plain"], 0, "`unseen` of the data set names '0-plain' twice"),
        (["0-plain"], ["1-plain"] * 2, "`split.validation_classes` of the data set names '1-plain' twice"),
        (["0-plain"], ["0-plain"], "class '0-plain' is unseen, and named in `split.validation_classes`"),
        (["0-plain"], 59, "`split.validation_classes` = 59, but 59 classes are seen, and one at least has to stay so"),
        (["0-plain"], files.ALL[1:], "`split.validation_classes` names all 59 seen classes"),
        (row_of("thick"), 0, "no seen class has the rendering thick: nothing can be learnt of it"),
        (row_of("thick")[:5], row_of("thick")[5:], "no seen class has the rendering thick"),
        (files.ALL[18:24], 0, "no seen class has the digit 3: nothing can be learnt of it"),
        (files.ALL[18:22], files.ALL[22:24], "no seen class has the digit 3"),
    ],
)
def test_roles_that_cannot_be_are_refused(
    raw: Path, tmp_path: Path, unseen: list[str], classes: Any, message: str
) -> None:
    split = {"validation": 0.2, "test": 0.2, "validation_classes": classes}
    with pytest.raises(UserError, match=re.escape(message)):
        files.prepared(raw, files.renderings(unseen=unseen, split=split), tmp_path / "out")


def test_shares_that_leave_nothing_to_train_with_are_refused(raw: Path, tmp_path: Path) -> None:
    for number, shares in enumerate([{"validation": 0.6, "test": 0.6}, {"validation": 0.49, "test": 0.5}]):
        with pytest.raises(UserError, match=r"split\.validation \+ split\.test"):
            files.prepared(raw, files.renderings(split=shares), tmp_path / str(number))


def damaged(change: Any) -> tuple[np.ndarray, np.ndarray]:
    images, kinds = files.some_digits(6)
    images, kinds = images.astype(np.int64), kinds.copy()
    change(images, kinds)
    return images, kinds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, kinds: images.__setitem__((7, 3, 3), 256), "holds a pixel outside 0-255 in row 8"),
        (lambda images, kinds: images.__setitem__((7, 3, 3), -1), "holds a pixel outside 0-255 in row 8"),
        (lambda images, kinds: kinds.__setitem__(4, 10), "holds a label outside 0-9 in row 5"),
        (lambda images, kinds: images.__setitem__(9, 0), "shows nothing in row 10"),
        (lambda images, kinds: kinds.__setitem__(kinds == 6, 5), "has 0 images of the digit 6, but each is painted in"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    file = tmp_path / "digits.csv.gz"
    files.write_digits(file, *damaged(change))
    with pytest.raises(UserError, match=re.escape(f"{file} {message}")):
        zero_shot.read_digits(file)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.csv.gz"
    files.write_digits(whole, *files.some_digits(6))
    (tmp_path / "cut.csv.gz").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "text.csv").write_text("a,b\n1,2\n")
    for name in ("cut.csv.gz", "text.csv", "absent.csv"):
        with pytest.raises(UserError, match=re.escape(f"{tmp_path / name} is no table of whole numbers")):
            zero_shot.read_digits(tmp_path / name)
    (tmp_path / "narrow.csv").write_text("1,2\n1,2\n")
    with pytest.raises(UserError, match=r"has 2 columns, but 28 x 28 pixels and a digit are 785"):
        zero_shot.read_digits(tmp_path / "narrow.csv")


# Features of an encoder


def an_encoder(prepared: Path, **changes: Any) -> tuple[nn.Module, Any]:
    description = zero_shot.describe(prepared)
    recipe = {
        "interface": {"classes": description["classes"], "images": description["images"]},
        "network": {"name": "encoder", "widths": [4, 6], "blocks": 1},
    }
    torch.manual_seed(0)
    encoder = build(recipe)
    for _ in range(3):  # statistics of batches, so that training and evaluation differ
        encoder(torch.rand(8, 1, 28, 28))
    entry = {"name": "images", "digest": sha256(prepared / "manifest.csv"), **changes}
    return encoder.eval(), SimpleNamespace(name="small", dataset=entry, recipe={"training": {"threads": 1}})


@pytest.fixture(scope="module")
def encoded(raw: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "features"
    output.mkdir()
    zero_shot.prepare_encoded(raw, files.renderings(), output, files.PROVENANCE, *an_encoder(prepared))
    return output


def test_features_are_those_of_each_image_alone(prepared: Path, encoded: Path) -> None:
    encoder, _ = an_encoder(prepared)
    features = np.load(encoded / "features.npy")
    assert (features.shape, features.dtype) == ((500, 6), np.float32)
    images = torch.from_numpy(np.load(prepared / "images.npy"))
    with torch.inference_mode():
        for row in range(0, 500, 49):
            alone = encoder.double()(images[row : row + 1].double() / 255).features[0]
            np.testing.assert_allclose(features[row], alone, rtol=1e-4, atol=1e-5)


def test_all_but_the_features_is_that_of_the_images(prepared: Path, encoded: Path) -> None:
    for name in ("images.npy", "labels.npy", "attributes.npy"):
        assert sha256(encoded / name) == sha256(prepared / name)
    of_images, of_features = (pd.read_csv(folder / "manifest.csv") for folder in (prepared, encoded))
    assert of_features[["id", "split", "label"]].equals(of_images[["id", "split", "label"]])
    assert of_features["image_sha256"].equals(of_images["sha256"])
    features = np.load(encoded / "features.npy")
    assert of_features["sha256"].tolist() == zero_shot.content_hashes(features)
    np.testing.assert_allclose(of_features["mean"], features.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(of_features["spread"], features.std(axis=1), atol=1e-6)
    assert zero_shot.describe(encoded) == {**zero_shot.describe(prepared), "features": 6}


def test_features_do_not_depend_on_batches_and_threads(
    raw: Path, prepared: Path, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero_shot, "BATCH", 7)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        output = tmp_path / "out"
        output.mkdir()
        zero_shot.prepare_encoded(raw, files.renderings(), output, files.PROVENANCE, *an_encoder(prepared))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(np.load(output / "features.npy"), np.load(encoded / "features.npy"), rtol=1e-4)


def test_an_encoder_is_used_as_it_was_trained(raw: Path, prepared: Path, tmp_path: Path) -> None:
    used = []

    class Encoder(nn.Module):
        def forward(self, images: Tensor) -> Any:
            used.append((torch.get_num_threads(), len(images), torch.is_inference_mode_enabled()))
            return SimpleNamespace(features=images.flatten(1)[:, 300:303].double())

    _, description = an_encoder(prepared)
    output = tmp_path / "out"
    output.mkdir()
    zero_shot.prepare_encoded(raw, files.renderings(), output, files.PROVENANCE, Encoder(), description)
    assert used == [(1, 500, True)]
    assert np.load(output / "features.npy").dtype == np.float32


def test_an_encoder_of_other_images_is_refused(raw: Path, prepared: Path, tmp_path: Path) -> None:
    """Another seed deals other images to the classes that it must not have seen."""
    split = files.renderings().split
    assert split is not None
    other = files.renderings(split={**split.model_dump(), "seed": 7})
    with pytest.raises(UserError, match=r"encoder 'small' was trained on other images: .* run `dvc repro`"):
        zero_shot.prepare_encoded(raw, other, tmp_path, files.PROVENANCE, *an_encoder(prepared))
    assert not (tmp_path / "features.npy").exists()


# Batches


@pytest.mark.parametrize("what", ["features", "images"])
def test_a_split_is_loaded_in_order(encoded: Path, what: str) -> None:
    manifest = pd.read_csv(encoded / "manifest.csv")
    everything, labels = np.load(encoded / f"{what}.npy"), np.load(encoded / "labels.npy")
    found = 0
    for part in zero_shot.SPLITS:
        rows = np.flatnonzero(manifest["split"] == part)
        ids, inputs, loaded = zero_shot.load(encoded, part, what)
        assert ids == manifest["id"].iloc[rows].tolist()
        np.testing.assert_array_equal(inputs, everything[rows])
        np.testing.assert_array_equal(loaded, labels[rows])
        assert loaded.dtype == torch.int64
        assert inputs.dtype == (torch.float32 if what == "features" else torch.uint8)
        found += len(ids)
    assert found == 500


def test_attributes_are_loaded_by_class(encoded: Path) -> None:
    loaded = zero_shot.attributes(encoded)
    assert loaded.dtype == torch.float32
    _, attributes, names, divisors = zero_shot.describe_renderings()
    np.testing.assert_array_equal(loaded, attributes)
    told = json.loads((encoded / "dataset.json").read_text())
    assert (told["attributes"], told["divisors"]) == (names, divisors)
    # What the table says, divided and then made as long as the row: what a new class's attributes go through too.
    raw = np.concatenate([zero_shot.DIGITS[3], [1, 0, 0, 0]]) / divisors
    np.testing.assert_allclose(raw / np.linalg.norm(raw), loaded[told["classes"].index("3-outline")], rtol=1e-6)


def test_pixels_become_numbers_from_0_to_1() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    unit = zero_shot.to_unit(pixels)
    assert unit.dtype == torch.float32
    np.testing.assert_allclose(unit, np.arange(256) / 255, rtol=1e-6)
    assert pixels.dtype == torch.uint8
