"""Images: read as they are, split in proportion, prepared to the same bytes; batches are shifted, mirrored, reduced."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from data.errors import UserError
from data.files import tree_digest
from data.recognition import augment, downsample, load, prepare, read_csv, read_folder, to_unit
from data.splits import split
from stages.parameters.recognition import Dataset

PROVENANCE = {"name": "toy", "licence": "none", "credit": "random numbers", "redistributable": True}


def some_images(count: int, channels: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


# Reading tables


def as_csv(images: np.ndarray, labels: np.ndarray) -> bytes:
    rows = np.column_stack([images.reshape(len(images), -1), labels])
    return "".join(",".join(map(str, row)) + "\n" for row in rows.tolist()).encode()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.sampled_from([1, 3]), st.integers(1, 5), st.integers(0, 99))
def test_a_table_is_read_as_it_was_written(count: int, channels: int, size: int, seed: int) -> None:
    images = some_images(count, channels, size, seed)
    labels = np.random.default_rng(seed).integers(0, 3, count)
    content = as_csv(images, labels)
    for name, data in both(content):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / name).write_bytes(data)
            samples = read_csv(Path(folder) / name, size, channels, ["a", "b", "c"])
        np.testing.assert_array_equal(samples.images, images)
        np.testing.assert_array_equal(samples.labels, labels)
        assert (samples.images.dtype, samples.labels.dtype) == (np.uint8, np.int64)
        assert len(set(samples.ids)) == count
        assert samples.sizes.tolist() == [[size, size]] * count
        assert samples.classes == ["a", "b", "c"]


def both(content: bytes) -> list[tuple[str, bytes]]:
    return [("table.csv", content), ("table.csv.gz", gzip.compress(content, mtime=0))]


def test_a_table_that_ends_early_is_refused(tmp_path: Path) -> None:
    content = as_csv(some_images(8, 1, 4), np.arange(8))
    (_, text), (_, packed) = both(content)
    last_row = text.rindex(b"\n", 0, -1) + 1
    cases = [("t.csv.gz", packed[:end]) for end in range(0, len(packed) - 1, 7)]
    cases += [("t.csv", text[:end]) for end in range(last_row + 1, text.rindex(b","), 5)]
    assert len(cases) > 40
    for name, cut in cases:
        (tmp_path / name).write_bytes(cut)
        with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
            read_csv(tmp_path / name, 4, 1, ["a"])


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    content = gzip.compress(as_csv(some_images(60, 1, 4), np.arange(60)), mtime=0)
    positions = range(10, len(content) - 8, 23)
    assert len(positions) > 40
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        (tmp_path / "t.csv.gz").write_bytes(damaged)
        with pytest.raises(UserError, match="is the file complete"):
            read_csv(tmp_path / "t.csv.gz", 4, 1, ["a"])


ROW = "1,2,3,4,0\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3,0\n1,2,3,1\n", "has 4 columns, but 1 x 2 x 2 pixels and a label are 5"),
        ("1,2,3,4,5,0\n", "has 6 columns, but 1 x 2 x 2 pixels and a label are 5"),
        (ROW + ROW + "1,256,3,4,0\n" + ROW, "holds a pixel outside 0-255 in row 3"),
        (ROW + "1,2,3,-1,0\n", "holds a pixel outside 0-255 in row 2"),
        (ROW + "1,2,3,4\n", "is no table of whole numbers"),
        (ROW + "1,2,3,4,0,6\n", "is no table of whole numbers"),
        (ROW + "1,2,x,4,0\n", "is no table of whole numbers"),
        (ROW + "1,2,3.5,4,0\n", "is no table of whole numbers"),
        (ROW + "1,2,,4,0\n", "is no table of whole numbers"),
        (ROW + "1,2,nan,4,0\n", "is no table of whole numbers"),
        ("a,b,c,d,label\n" + ROW, "is no table of whole numbers"),
        ("", "is no table of whole numbers"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 't.csv'} {message}")):
        read_csv(tmp_path / "t.csv", 2, 1, ["a"])


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "no.csv"))):
        read_csv(tmp_path / "no.csv", 2, 1, ["a"])


# Reading folders


def save(path: Path, pixels: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def colour(height: int, width: int, value: tuple[int, int, int]) -> np.ndarray:
    return np.broadcast_to(np.array(value, np.uint8), (height, width, 3)).copy()


def test_images_of_the_right_size_are_kept_to_the_bit(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    images = some_images(4, 3, 6).transpose(0, 2, 3, 1)
    for index, name in enumerate(["b/2.png", "b/sub folder/1.bmp", "a/3.PNG", "a/0 0.tif"]):
        save(folder / name, images[index])
    (folder / "a" / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    samples = read_folder(folder, 6, 3, None)
    assert samples.classes == ["a", "b"]
    assert samples.ids == ["a/0 0.tif", "a/3.PNG", "b/2.png", "b/sub folder/1.bmp"]
    assert samples.labels.tolist() == [0, 0, 1, 1]
    assert samples.images.dtype == np.uint8
    np.testing.assert_array_equal(samples.images, images[[3, 2, 0, 1]].transpose(0, 3, 1, 2))
    reordered = read_folder(folder, 6, 3, ["b", "a"])
    assert reordered.classes == ["b", "a"]
    assert dict(zip(reordered.ids, reordered.labels, strict=True)) == {
        name: 1 - label for name, label in zip(samples.ids, samples.labels, strict=True)
    }


@pytest.mark.parametrize(("height", "width"), [(12, 36), (36, 12), (12, 12), (24, 72), (72, 24), (6, 18)])
def test_the_centre_is_cut_out_of_the_image_whose_shorter_side_was_resized(
    tmp_path: Path, height: int, width: int
) -> None:
    thirds = np.repeat(np.array([[255, 0, 0], [0, 200, 0], [0, 0, 255]], np.uint8), max(height, width) // 3, axis=0)
    pixels = np.broadcast_to(thirds, (height, width, 3)) if width > height else thirds[:, None].repeat(width, 1)
    if height == width:
        pixels = colour(height, width, (0, 200, 0))
    save(tmp_path / "a" / "x.png", np.ascontiguousarray(pixels))
    samples = read_folder(tmp_path, 12, 3, None)
    assert samples.sizes.tolist() == [[height, width]]
    inner = samples.images[0][:, 3:-3, 3:-3].reshape(3, -1)
    np.testing.assert_allclose(inner, np.array([[0], [200], [0]]).repeat(36, 1), atol=25)
    assert samples.images[0, 1].mean() > 180


def test_proportions_are_kept(tmp_path: Path) -> None:
    """A wide image is cut, not squeezed: a square in its middle stays a square."""
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[10:30, 50:70] = 255
    save(tmp_path / "a" / "x.png", pixels)
    image = read_folder(tmp_path, 20, 3, None).images[0, 0].astype(int)
    bright = image > 127
    assert np.flatnonzero(bright.any(0)).tolist() == np.flatnonzero(bright.any(1)).tolist() == list(range(5, 15))


def test_grey_and_colour_are_converted(tmp_path: Path) -> None:
    grey, rgb = some_images(1, 1, 5)[0, 0], some_images(1, 3, 5, seed=1)[0].transpose(1, 2, 0)
    save(tmp_path / "a" / "grey.png", grey)
    save(tmp_path / "a" / "rgb.png", rgb)
    as_colour = read_folder(tmp_path, 5, 3, None).images
    assert as_colour.shape == (2, 3, 5, 5)
    for channel in range(3):
        np.testing.assert_array_equal(as_colour[0, channel], grey)
    as_grey = read_folder(tmp_path, 5, 1, None).images
    assert as_grey.shape == (2, 1, 5, 5)
    np.testing.assert_array_equal(as_grey[0, 0], grey)
    luma = rgb.astype(float) @ [0.299, 0.587, 0.114]  # ITU-R BT.601
    np.testing.assert_allclose(as_grey[1, 0], luma, atol=1)


def test_the_orientation_that_a_camera_notes_is_applied(tmp_path: Path) -> None:
    pixels = some_images(1, 3, 8)[0].transpose(1, 2, 0)[:, :4]
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to see it"
    save(tmp_path / "a" / "x.png", np.ascontiguousarray(pixels), exif=exif)
    samples = read_folder(tmp_path, 4, 3, None)
    assert samples.sizes.tolist() == [[4, 8]]
    np.testing.assert_array_equal(samples.images[0].transpose(1, 2, 0), np.rot90(pixels, -1)[:, 2:6])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("suffix", [".bmp", ".gif", ".jpeg", ".pgm", ".png", ".ppm", ".tiff", ".webp"])
def test_an_image_that_ends_early_is_named(tmp_path: Path, suffix: str) -> None:
    buffer, kind = io.BytesIO(), {".pgm": "PPM", ".ppm": "PPM"}.get(suffix, suffix[1:].upper())
    pixels = Image.fromarray(some_images(1, 3, 24)[0].transpose(1, 2, 0))
    (pixels.convert("L") if suffix == ".pgm" else pixels).save(buffer, kind)
    content = buffer.getvalue()
    path = tmp_path / "some class" / f"broken one{suffix}"
    path.parent.mkdir()
    path.write_bytes(content)
    assert read_folder(tmp_path, 8, 3, None).images.shape == (1, 3, 8, 8)
    for end in {0, 1, 4, 7, 9, 12, *(len(content) * tenth // 10 for tenth in range(1, 10))}:
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match=re.escape(f"{path} is no complete image")):
            read_folder(tmp_path, 8, 3, None)


@pytest.mark.parametrize("header", [b"P5 20 2x 255\n", b"P5 2\n", b"P5 200000 200000 255\n", b"no image at all"])
def test_what_is_no_image_is_named(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a" / "x.pgm"
    path.parent.mkdir()
    path.write_bytes(header + b"0" * 500)
    with pytest.raises(UserError, match=re.escape(f"{path} is no complete image")):
        read_folder(tmp_path, 8, 1, None)


def test_an_image_of_16_bits_is_refused_rather_than_cut_off_at_255(tmp_path: Path) -> None:
    save(tmp_path / "a" / "x.png", np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16))
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'a' / 'x.png'} has more than 8 bits per channel")):
        read_folder(tmp_path, 8, 1, None)


def test_wrong_classes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no folders: one folder of images per class"):
        read_folder(tmp_path, 8, 3, None)
    for name in ("cat", "dog", "zebra"):
        save(tmp_path / name / "x.png", colour(8, 8, (1, 2, 3)))
    with pytest.raises(UserError, match=r"has classes that `classes` does not list: dog, zebra$"):
        read_folder(tmp_path, 8, 3, ["cat"])
    with pytest.raises(UserError, match="class 'yak' has no images in"):
        read_folder(tmp_path, 8, 3, ["cat", "dog", "yak", "zebra"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="class 'empty' has no images in"):
        read_folder(tmp_path, 8, 3, None)


# Preparing and loading


def csv_dataset(channels: int, size: int, classes: int) -> Dataset:
    return Dataset.model_validate(
        {
            "task": "recognition",
            "source": "toy",
            "encoder": "none",
            "format": "csv",
            "file": "toy.csv",
            "image_size": size,
            "channels": channels,
            "classes": [f"class {index}" for index in range(classes)],
            "split": {"validation": 9, "test": 7, "seed": 3},
        }
    )


@pytest.fixture(params=[1, 3])
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """A prepared folder, and what it was made from."""
    images, labels = some_images(40, request.param, 5), np.arange(40) % 4
    images[7] = 0
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "toy.csv").write_bytes(as_csv(images, labels))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        prepare(tmp_path / "raw", csv_dataset(request.param, 5, 4), tmp_path / name, PROVENANCE)
    return tmp_path / "one", images, labels


def test_preparing_twice_gives_the_same_bytes(prepared: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, _, _ = prepared
    assert sorted(path.name for path in folder.iterdir()) == [
        "dataset.json",
        "images.npy",
        "labels.npy",
        "manifest.csv",
    ]
    assert tree_digest(folder) == tree_digest(folder.parent / "two")


def test_the_manifest_says_what_the_pixels_are(prepared: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, images, labels = prepared
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "split", "label", "height", "width", "sha256", "mean", "spread"]
    assert len(rows) == len({row["id"] for row in rows}) == 40
    part = split(labels, {"validation": 9, "test": 7}, 3)
    for index, row in enumerate(rows):
        pixels = [value / 255 for value in images[index].ravel().tolist()]
        mean = math.fsum(pixels) / len(pixels)
        spread = math.sqrt(math.fsum((value - mean) ** 2 for value in pixels) / len(pixels))
        assert (row["split"], int(row["label"])) == (part[index], labels[index])
        assert (row["height"], row["width"]) == ("5", "5")
        assert row["sha256"] == hashlib.sha256(bytes(images[index].ravel().tolist())).hexdigest()
        assert float(row["mean"]) == pytest.approx(mean, abs=1e-6)
        assert float(row["spread"]) == pytest.approx(spread, abs=1e-6)


def test_the_description_holds_mean_and_spread_of_the_training_images(
    prepared: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    folder, images, labels = prepared
    description = json.loads((folder / "dataset.json").read_text())
    train = images[split(labels, {"validation": 9, "test": 7}, 3) == "train"]
    for channel, (mean, std) in enumerate(zip(description["mean"], description["std"], strict=True)):
        pixels = [value / 255 for value in train[:, channel].ravel().tolist()]
        expected = math.fsum(pixels) / len(pixels)
        assert mean == pytest.approx(expected, abs=1e-6)
        spread = math.fsum((value - expected) ** 2 for value in pixels) / len(pixels)
        assert std == pytest.approx(math.sqrt(spread), abs=1e-6)
    assert abs(description["mean"][0] - images[:, 0].mean() / 255) > 1e-5, "all images have the same mean"
    assert len(description["mean"]) == description["channels"] == images.shape[1]
    assert description["samples"] == {"train": 24, "validation": 9, "test": 7}
    assert description["classes"] == ["class 0", "class 1", "class 2", "class 3"]
    assert description["size"] == 5
    assert description["source"] == PROVENANCE


def test_a_channel_that_never_changes_is_not_divided_by_zero(tmp_path: Path) -> None:
    images = some_images(20, 3, 4)
    images[:, 1] = 77
    (tmp_path / "toy.csv").write_bytes(as_csv(images, np.arange(20) % 2))
    (tmp_path / "out").mkdir()
    prepare(tmp_path, csv_dataset(3, 4, 2), tmp_path / "out", PROVENANCE)
    std = json.loads((tmp_path / "out" / "dataset.json").read_text())["std"]
    assert std[1] == 1e-3
    assert min(std[0], std[2]) > 0.1


def test_folders_are_prepared_with_their_original_sizes(tmp_path: Path) -> None:
    for index, (height, width) in enumerate([(6, 9), (8, 6), (6, 6), (12, 7)] * 6):
        save(tmp_path / "raw" / "ab"[index % 2] / f"{index:02}.png", some_images(1, 3, 12, index)[0].T[:height, :width])
    entry = {
        "task": "recognition",
        "source": "toy",
        "encoder": "none",
        "format": "folder",
        "image_size": 6,
        "channels": 3,
    }
    dataset = Dataset.model_validate({**entry, "split": {"validation": 4, "test": 4}})
    (tmp_path / "out").mkdir()
    prepare(tmp_path / "raw", dataset, tmp_path / "out", PROVENANCE)
    with (tmp_path / "out" / "manifest.csv").open(newline="") as file:
        found = {row["id"]: (int(row["height"]), int(row["width"])) for row in csv.DictReader(file)}
    assert found["a/00.png"] == (6, 9)
    assert found["b/01.png"] == (8, 6)
    assert found["b/03.png"] == (12, 7)
    ids, images, labels = load(tmp_path / "out", "validation")
    expected = read_folder(tmp_path / "raw", 6, 3, None)
    rows = [expected.ids.index(name) for name in ids]
    np.testing.assert_array_equal(images.numpy(), expected.images[rows])
    assert labels.tolist() == ["ab".index(name[0]) for name in ids]


def test_load_gives_every_sample_to_one_split_with_its_own_image_and_label(
    prepared: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    folder, images, labels = prepared
    seen = []
    for name, count in (("train", 24), ("validation", 9), ("test", 7)):
        ids, found, classes = load(folder, name)
        assert (len(ids), found.shape, classes.shape) == (count, (count, *images.shape[1:]), (count,))
        assert (found.dtype, classes.dtype) == (torch.uint8, torch.int64)
        rows = [int(identifier.removeprefix("row-")) for identifier in ids]
        np.testing.assert_array_equal(found.numpy(), images[rows])
        np.testing.assert_array_equal(classes.numpy(), labels[rows])
        found.zero_()  # a batch may be changed in place: the file is not
        seen += rows
    assert sorted(seen) == list(range(40))
    assert load(folder, "test")[1].any()


# Batches


def test_to_unit_scales_every_value() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(values)
    assert unit.dtype == torch.float32
    np.testing.assert_allclose(unit.double(), np.arange(256) / 255, atol=1e-7)
    assert values.tolist() == list(range(256)), "the stored images stay as they are"


def moved(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Every pixel goes `down` and `right`; what leaves the image is lost, zeros move in."""
    result = np.zeros_like(image)
    _, height, width = image.shape
    for row, column in itertools.product(range(height), range(width)):
        if 0 <= row + down < height and 0 <= column + right < width:
            result[:, row + down, column + right] = image[:, row, column]
    return result


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 6), st.integers(1, 3), st.integers(5, 8), st.integers(5, 8), st.integers(0, 3), st.booleans(),
    st.integers(0, 2**31), st.sampled_from([torch.uint8, torch.float32, torch.float64]),
)  # fmt: skip
def test_every_sample_is_shifted_and_perhaps_mirrored(
    count: int, channels: int, height: int, width: int, shift: int, flip: bool, seed: int, dtype: torch.dtype
) -> None:
    drawn = torch.randint(1, 256, (count, channels, height, width), generator=torch.Generator().manual_seed(seed))
    images = drawn.to(dtype)
    before = images.clone()
    result = augment(images, shift, flip, torch.Generator().manual_seed(seed))
    assert torch.equal(images, before), "the batch that goes in stays as it is"
    assert (result.shape, result.dtype) == (images.shape, dtype)
    assert result.is_contiguous()
    steps = range(-shift, shift + 1)
    for index in range(count):
        matches = [
            (down, right, mirrored)
            for down, right, mirrored in itertools.product(steps, steps, [False, True] if flip else [False])
            if np.array_equal(
                result[index].numpy(), moved(images[index].numpy(), down, right)[:, :, :: -1 if mirrored else 1]
            )
        ]
        assert len(matches) == 1, f"sample {index} is none of the shifts of its image"


def test_all_shifts_and_both_sides_are_equally_frequent() -> None:
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 1] = 1
    count = 6000
    result = augment(image.expand(count, 1, 5, 5), 1, True, torch.Generator().manual_seed(0))
    places = Counter(map(tuple, result[:, 0].nonzero()[:, 1:].tolist()))
    expected: Counter[tuple[int, int]] = Counter()
    for down, right, mirrored in itertools.product((-1, 0, 1), (-1, 0, 1), (False, True)):
        expected[2 + down, 3 - right if mirrored else 1 + right] += 1
    assert places.keys() == expected.keys()
    for place, weight in expected.items():
        share = weight / 18
        assert abs(places[place] - count * share) < 5 * math.sqrt(count * share * (1 - share)), place


def test_the_generator_decides() -> None:
    images = noise(16, 3, 8, 8)
    torch.manual_seed(0)
    first = augment(images, 2, True, torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    assert torch.equal(first, augment(images, 2, True, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, augment(images, 2, True, torch.Generator().manual_seed(6)))
    generator = torch.Generator().manual_seed(5)
    augment(images, 2, True, generator)
    assert not torch.equal(first, augment(images, 2, True, generator)), "two batches in a row get the same shifts"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_no_shift_and_no_flip_change_nothing(dtype: torch.dtype) -> None:
    images = noise(9, 3, 6, 7).mul(255).to(dtype)
    assert torch.equal(augment(images, 0, False, torch.Generator()), images)


# Resolutions


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def smooth(count: int, channels: int, size: int, seed: int) -> Tensor:
    """Sums of three waves of at most two periods per image, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.arange(size, dtype=torch.float64) / size
    waves = torch.zeros(count, channels, size, size, dtype=torch.float64)
    for _ in range(3):
        frequency = torch.rand(2, count, channels, 1, 1, generator=generator, dtype=torch.float64) * 2
        phase = torch.rand(count, channels, 1, 1, generator=generator, dtype=torch.float64)
        waves += torch.sin(2 * math.pi * (frequency[0] * x[:, None] + frequency[1] * x + phase)) / 6
    return waves + 0.5


def area_mean(images: Tensor, factor: int) -> np.ndarray:
    count, channels, height, width = images.shape
    cells = images.double().numpy().reshape(count, channels, height // factor, factor, width // factor, factor)
    mean: np.ndarray = cells.mean((3, 5))
    return mean


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 1, width=32), st.integers(2, 40), st.integers(2, 40), st.sampled_from([1, 3]))
def test_a_constant_image_stays_constant(value: float, size: int, resolution: int, channels: int) -> None:
    assume(resolution <= size)
    result = downsample(torch.full((2, channels, size, size), value), resolution)
    assert result.shape == (2, channels, resolution, resolution)
    np.testing.assert_allclose(result.double(), value, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_no_pixel_leaves_the_unit_interval(size: int, resolution: int, seed: int, hard: bool, double: bool) -> None:
    assume(resolution <= size)
    images = noise(3, 1, size, size, seed=seed)
    images = (images.round() if hard else images).to(torch.float64 if double else torch.float32)
    result = downsample(images, resolution)
    assert result.dtype == images.dtype
    assert result.min() >= 0
    assert result.max() <= 1


def test_an_edge_would_overshoot() -> None:
    """What the test above rests on: bicubic leaves [0, 1] at an edge unless it is clamped."""
    edge = torch.zeros(1, 1, 16, 16)
    edge[..., 8:] = 1
    free = torch.nn.functional.interpolate(edge, (8, 8), mode="bicubic", antialias=True)
    assert free.min() < -0.01
    assert free.max() > 1.01
    clamped = downsample(edge, 8)
    assert (clamped.min(), clamped.max()) == (0, 1)
    np.testing.assert_allclose(clamped, free.clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_a_smooth_image_becomes_its_area_mean(seed: int) -> None:
    images = smooth(4, 3, 64, seed).float()
    assert images.std() > 0.05
    np.testing.assert_allclose(downsample(images, 16).double(), area_mean(images, 4), atol=0.02)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("size", "resolution"), [(28, 7), (32, 8), (64, 16), (30, 11), (28, 27)])
def test_the_mean_colour_stays(size: int, resolution: int, seed: int) -> None:
    for images in (smooth(4, 3, size, seed).float(), noise(4, 3, size, size, seed=seed)):
        small = downsample(images, resolution)
        np.testing.assert_allclose(small.mean((2, 3)), images.mean((2, 3)), atol=0.05)


@pytest.mark.parametrize("first", range(4))
def test_what_is_finer_than_the_small_image_is_averaged_and_not_picked(first: int) -> None:
    stripes = torch.zeros(1, 1, 64, 64)
    stripes[..., first::4] = 1
    small = downsample(stripes, 16)[..., 2:-2]
    np.testing.assert_allclose(small, 0.25, atol=0.05)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 30), st.integers(0, 99))
def test_the_own_resolution_changes_nothing(size: int, seed: int) -> None:
    images = noise(2, 3, size, size, seed=seed)
    assert torch.equal(downsample(images, size), images)


@pytest.mark.parametrize(("shape", "resolution"), [((2, 3, 8, 8), 9), ((1, 1, 8, 30), 10), ((1, 1, 30, 8), 10)])
def test_a_resolution_larger_than_the_image_is_refused(shape: tuple[int, ...], resolution: int) -> None:
    message = f"resolution {resolution} is larger than the images {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        downsample(noise(*shape), resolution)


def test_samples_do_not_touch_each_other() -> None:
    images = noise(5, 3, 28, 28)
    together = downsample(images, 7)
    for index in range(5):
        np.testing.assert_allclose(downsample(images[index : index + 1], 7)[0], together[index], atol=1e-6)
