"""Batches: teacher and student see the same pixels, and labels move with them."""

import itertools
import math
import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.segmentation import CROPS, IGNORE, augment, recolour
from stages.parameters.segmentation import Augment


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(
    count: int, height: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    images = torch.rand((count, 3, height, width), generator=seeded(seed), dtype=dtype)
    labels = torch.randint(0, 4, (count, height, width), generator=seeded(seed + 1))
    return images, torch.where(labels == 3, IGNORE, labels)


def setting(**changes: object) -> Augment:
    return Augment.model_validate({"flip": False, "crowded": 1.0, **changes})


def drawn(seed: int, count: int, scale: tuple[float, float]) -> tuple[list[float], Tensor]:
    """What `augment` draws first: a zoom per sample, and places (tries, 2, B)."""
    generator = seeded(seed)
    zoom = scale[0] + (scale[1] - scale[0]) * torch.rand(count, generator=generator)
    return zoom.tolist(), torch.rand((CROPS, 2, count), generator=generator).double()


def start(place: float, zoomed: int, window: int) -> int:
    """The first pixel of the window: every place from one end to the other is equally likely."""
    free = zoomed - window
    return math.floor(place * (abs(free) + 1)) * (1 if free >= 0 else -1)


def by_hand(
    image: Tensor, labels: Tensor, zoom: float, window: tuple[int, int], places: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Zoom and crop pixel by pixel: bilinear with edges repeated, nearest for labels, nothing outside."""
    sides = labels.shape
    zoomed = [max(round(side * zoom), 1) for side in sides]
    starts = [start(place, length, side) for place, length, side in zip(places, zoomed, window, strict=True)]
    pixels, targets = torch.zeros(3, *window, dtype=image.dtype), torch.full(window, IGNORE)
    for row, column in itertools.product(range(window[0]), range(window[1])):
        y, x = (
            (first + index + 0.5) * side / length
            for first, index, side, length in zip(starts, (row, column), sides, zoomed, strict=True)
        )
        if not (0 <= y < sides[0] and 0 <= x < sides[1]):
            continue
        targets[row, column] = labels[int(y), int(x)]
        top, left = math.floor(y - 0.5), math.floor(x - 0.5)
        for i, j in itertools.product((0, 1), (0, 1)):
            weight = (1 - abs(y - 0.5 - (top + i))) * (1 - abs(x - 0.5 - (left + j)))
            near = min(max(top + i, 0), sides[0] - 1), min(max(left + j, 0), sides[1] - 1)
            pixels[:, row, column] += weight * image[:, near[0], near[1]]
    return pixels, targets


@pytest.mark.parametrize("crop", [None, [17, 21]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_asked_for_is_nothing_done(crop: list[int] | None, dtype: torch.dtype) -> None:
    images, labels = batch(5, 17, 21, dtype=dtype)
    result, targets = augment(images, labels, setting(crop=crop, crowded=0.1), seeded(0))
    assert torch.equal(result, images)
    assert torch.equal(targets, labels)
    assert (result.dtype, targets.dtype) == (dtype, torch.int64)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4), st.integers(16, 24), st.integers(16, 24), st.integers(16, 28), st.integers(16, 28),
    st.floats(0.3, 2.5), st.floats(0.0, 1.0), st.integers(0, 2**31),
)  # fmt: skip
def test_zoom_and_crop_as_by_hand(
    count: int, height: int, width: int, tall: int, wide: int, low: float, more: float, seed: int
) -> None:
    """Also windows larger than the image, and images smaller than the window after they were reduced."""
    images, labels = batch(count, height, width, seed)
    scale = (low, low + more)
    zoom, places = drawn(seed, count, scale)
    before = images.clone(), labels.clone()
    result, targets = augment(images, labels, setting(scale=list(scale), crop=[tall, wide]), seeded(seed))
    assert torch.equal(images, before[0]), "the batch that goes in stays as it is"
    assert torch.equal(labels, before[1])
    assert (result.shape, targets.shape) == ((count, 3, tall, wide), (count, tall, wide))
    for index in range(count):
        first = (float(places[0, 0, index]), float(places[0, 1, index]))
        expected = by_hand(images[index], labels[index], zoom[index], (tall, wide), first)
        # Positions are in single precision: one on the border between two pixels may fall to either side.
        same = (targets[index] == expected[1]) & ((result[index] - expected[0]).abs().amax(dim=0) < 1e-4)
        assert int((~same).sum()) <= max(tall, wide) + 1, (zoom[index], first)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(16, 24), st.integers(16, 24), st.integers(0, 2**31))
def test_a_crop_without_zoom_is_a_window_bit_for_bit(count: int, tall: int, wide: int, seed: int) -> None:
    images, labels = batch(count, 24, 24, seed, torch.float32)
    result, targets = augment(images, labels, setting(crop=[tall, wide]), seeded(seed))
    for index in range(count):
        matches = [
            (top, left)
            for top, left in itertools.product(range(25 - tall), range(25 - wide))
            if torch.equal(result[index], images[index, :, top : top + tall, left : left + wide])
            and torch.equal(targets[index], labels[index, top : top + tall, left : left + wide])
        ]
        assert len(matches) == 1


def test_labels_stay_under_the_pixels_that_they_belong_to() -> None:
    """An image that holds the position of each of its pixels, at four zooms, mirrored or not."""
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    labels = (rows // 4 * 8 + columns // 4).expand(64, 32, 32)
    images = torch.stack([(rows + 0.5) / 32, (columns + 0.5) / 32, torch.ones(32, 32)]).expand(64, 3, 32, 32)
    result, targets = augment(images, labels, setting(scale=[0.5, 3.0], flip=True), seeded(0))
    inside = targets != IGNORE
    assert torch.equal(inside, result[:, 2] > 0), "what is outside has no label, what is inside has one"
    assert 0.5 < inside.double().mean() < 1
    positions = result[:, :2] * 32
    expected = (positions[:, 0] / 4).floor() * 8 + (positions[:, 1] / 4).floor()
    agrees = (expected == targets)[inside].double().mean()
    assert agrees > 0.999


def test_all_windows_and_both_sides_are_equally_frequent() -> None:
    images = torch.zeros(1, 3, 18, 18)
    images[0, :, 8, 4] = 1
    count = 6000
    labels = torch.zeros(count, 18, 18, dtype=torch.int64)
    result, _ = augment(images.expand(count, 3, 18, 18), labels, setting(crop=[16, 16], flip=True), seeded(0))
    places = Counter(map(tuple, result[:, 0].nonzero()[:, 1:].tolist()))
    expected = Counter(
        (8 - top, 15 - (4 - left) if mirrored else 4 - left)
        for top, left, mirrored in itertools.product(range(3), range(3), (False, True))
    )
    assert places.keys() == expected.keys()
    for place in expected:
        assert abs(places[place] - count / 18) < 5 * math.sqrt(count / 18), place


@pytest.mark.parametrize("crowded", [0.6, 0.75, 0.9])
def test_a_window_is_drawn_again_while_one_class_covers_too_much(crowded: float) -> None:
    """The first place that is not crowded is taken; the last one where all are."""
    labels = torch.zeros(40, 48, 48, dtype=torch.int64)
    labels[:, 30:, 20:] = 1
    labels[:, :8] = IGNORE
    labels[:4] = 7
    images = torch.rand(40, 3, 48, 48)
    result, targets = augment(images, labels, setting(crop=[16, 16], crowded=crowded), seeded(3))
    _, places = drawn(3, 40, (1.0, 1.0))
    tries = Counter[int]()
    for index in range(40):
        for attempt in range(CROPS):
            top, left = (start(float(places[attempt, axis, index]), 48, 16) for axis in (0, 1))
            window = labels[index, top : top + 16, left : left + 16]
            counts = Counter(value for value in window.flatten().tolist() if value != IGNORE)
            if counts and max(counts.values()) <= crowded * sum(counts.values()):
                break
        tries[attempt] += 1
        assert torch.equal(targets[index], window)
        assert torch.equal(result[index], images[index, :, top : top + 16, left : left + 16])
    assert tries[CROPS - 1] >= 4
    assert len(tries) > 3


def test_the_generator_decides_and_nothing_else() -> None:
    images, labels = batch(8, 20, 20)
    asked = setting(scale=[0.5, 2.0], flip=True, photometric=0.4, crowded=0.5)
    torch.manual_seed(0)
    first = augment(images, labels, asked, seeded(5))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again, other = augment(images, labels, asked, seeded(5)), augment(images, labels, asked, seeded(6))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    generator = seeded(5)
    augment(images, labels, asked, generator)
    assert not torch.equal(first[0], augment(images, labels, asked, generator)[0])


@pytest.mark.parametrize("shape", [(2, 20, 19), (3, 20, 20), (2, 1, 20, 20)])
def test_labels_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    images, _ = batch(2, 20, 20)
    message = f"images (2, 3, 20, 20) and labels {shape} must be (B, 3, H, W), (B, H, W)"
    with pytest.raises(ValueError, match=re.escape(message)):
        augment(images, torch.zeros(shape, dtype=torch.int64), setting(), seeded(0))


# Colours


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def luminance(images: Tensor) -> Tensor:
    return torch.einsum("bchw,c->bhw", images, values(0.299, 0.587, 0.114))


ZERO = values(0.0, 0.0)


def test_four_zeros_leave_the_colours() -> None:
    images, _ = batch(2, 9, 7)
    torch.testing.assert_close(recolour(images, ZERO, ZERO, ZERO, ZERO), images, atol=1e-12, rtol=0)


def test_each_change_does_what_its_name_says() -> None:
    images = batch(2, 9, 7)[0] * 0.2 + 0.4  # far from the ends, where colours are cut off
    some = values(0.3, -0.2)
    factor = (1 + some)[:, None, None, None]
    torch.testing.assert_close(recolour(images, some, ZERO, ZERO, ZERO), images * factor)
    middle = luminance(images).mean(dim=(1, 2))[:, None, None, None]
    torch.testing.assert_close(recolour(images, ZERO, some, ZERO, ZERO), middle + (images - middle) * factor)
    grey = luminance(images)[:, None]
    torch.testing.assert_close(recolour(images, ZERO, ZERO, some, ZERO), grey + (images - grey) * factor)
    turned = recolour(images, ZERO, ZERO, ZERO, some)
    assert (turned - images).abs().amax() > 0.02
    torch.testing.assert_close(luminance(turned), luminance(images))
    torch.testing.assert_close(recolour(turned, ZERO, ZERO, ZERO, -some), images)
    without = grey.expand_as(images)
    torch.testing.assert_close(recolour(without, ZERO, ZERO, some, some), without)


def test_hue_turns_by_quarters_of_the_circle() -> None:
    """A full value and back again is half of the circle: the opposite colour of equal luminance."""
    images = batch(2, 5, 5)[0] * 0.1 + 0.45
    ones = values(1.0, 1.0)
    opposite = recolour(recolour(images, ZERO, ZERO, ZERO, ones), ZERO, ZERO, ZERO, ones)
    torch.testing.assert_close(opposite, 2 * luminance(images)[:, None] - images)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.05, 1.0), st.integers(0, 2**31))
def test_strengths_are_bounded_and_differ_between_samples(strength: float, seed: int) -> None:
    """Of a uniform grey image only brightness is left: contrast, saturation and hue cannot change it."""
    images = torch.full((64, 3, 4, 4), 0.25, dtype=torch.float64)
    labels = torch.zeros(64, 4, 4, dtype=torch.int64)
    result, targets = augment(images, labels, setting(photometric=strength), seeded(seed))
    assert torch.equal(targets, labels)
    factors = result[:, 0, 0, 0] / 0.25
    assert float((factors - 1).abs().max()) <= strength + 1e-6
    assert float((factors - 1).abs().max()) > 0.8 * strength
    assert len(set(factors.tolist())) > 60
    noisy = torch.rand((8, 3, 6, 6), generator=seeded(seed))
    changed, _ = augment(noisy, torch.zeros(8, 6, 6, dtype=torch.int64), setting(photometric=strength), seeded(seed))
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    assert changed.dtype == torch.float32


def test_what_lies_outside_stays_black_whatever_the_colours() -> None:
    images, labels = torch.rand(8, 3, 32, 32), torch.zeros(8, 32, 32, dtype=torch.int64)
    result, targets = augment(images, labels, setting(scale=[0.5, 0.5], flip=True, photometric=1.0), seeded(0))
    assert int((targets == IGNORE).sum()) == 8 * (32 * 32 - 16 * 16)
    assert float(result.amax(dim=1)[targets == IGNORE].max()) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_generator_of_either_device_serves(device: str) -> None:
    images, labels = batch(4, 32, 32, dtype=torch.float32)
    asked = setting(scale=[0.5, 2.0], crop=[16, 16], flip=True, photometric=0.4, crowded=0.5)
    generator = torch.Generator(device).manual_seed(0)
    result, targets = augment(images.cuda(), labels.cuda(), asked, generator)
    assert result.is_cuda
    assert targets.is_cuda
    if device == "cpu":
        expected = augment(images, labels, asked, seeded(0))
        torch.testing.assert_close(result.cpu(), expected[0], atol=1e-3, rtol=0)
        assert (targets.cpu() == expected[1]).double().mean() > 0.99
