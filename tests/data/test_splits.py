"""A split: exact, in proportion, repeatable, and never without a training sample of a class."""

import math
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from data.splits import split

LABELS = st.lists(st.integers(0, 5), min_size=3, max_size=120).map(np.array)
NUMBERS = st.lists(st.integers(0, 40), min_size=1, max_size=4)
NAMES = ("validation", "test", "held_out", "more")


def in_proportion(counts: dict[int, int], wanted: int) -> dict[int, int]:
    """The method of the largest remainder in exact fractions; among equal remainders the lower label is served."""
    total = sum(counts.values())
    share = {label: Fraction(wanted * count, total) for label, count in counts.items()}
    take = {label: math.floor(value) for label, value in share.items()}
    for label in sorted(counts, key=lambda label: (take[label] - share[label], label))[: wanted - sum(take.values())]:
        take[label] += 1
    return take


@settings(deadline=None, max_examples=100)
@given(LABELS, NUMBERS, st.integers(0, 2**31))
def test_a_split_is_exact_in_proportion_and_repeatable(labels: np.ndarray, numbers: list[int], seed: int) -> None:
    wanted = dict(zip(NAMES, numbers, strict=False))
    together = " + ".join(f"split.{name}" for name in wanted)
    if sum(numbers) >= len(labels):
        message = f"{together} = {sum(numbers)}, but there are only {len(labels)} samples"
        with pytest.raises(UserError, match=re.escape(message)):
            split(labels, wanted, seed)
        return
    left = Counter(labels.tolist())
    expected = {}
    for name, number in wanted.items():
        expected[name] = in_proportion({label: count for label, count in left.items() if count}, number)
        left -= Counter(expected[name])
    if lost := sorted(set(labels.tolist()) - set(left)):
        message = f"labels {lost} have no sample left for training: too few samples for {together} ("
        with pytest.raises(UserError, match=re.escape(message)):
            split(labels, wanted, seed)
        return
    part = split(labels, wanted, seed)
    assert part.shape == labels.shape
    assert set(part) <= {"train", *wanted}
    for name, counts in {**expected, "train": left}.items():
        assert Counter(labels[part == name].tolist()) == Counter(counts), name
    assert {name: int((part == name).sum()) for name in wanted} == wanted
    assert (split(labels, wanted, seed) == part).all()


@settings(deadline=None)
@given(LABELS, st.integers(0, 2**31))
def test_what_is_drawn_first_does_not_depend_on_what_is_drawn_later(labels: np.ndarray, seed: int) -> None:
    """A held-out share that changes leaves validation and test alone."""
    labels = np.concatenate([labels, np.repeat(np.arange(6), 30)])
    few, many = ({"validation": 20, "test": 30, "held_out": number} for number in (1, 40))
    first, second = split(labels, few, seed), split(labels, many, seed)
    for name in ("validation", "test"):
        assert ((first == name) == (second == name)).all()
    assert (second[first == "held_out"] == "held_out").all()


def test_equal_remainders_go_to_the_lower_label() -> None:
    """22 and 34 of 87 leave the same remainder for 58, 2/3, which floating point does not see."""
    labels = np.repeat(np.arange(4), [19, 22, 34, 12])
    part = split(labels, {"validation": 58, "test": 1}, 0)
    assert np.bincount(labels[part == "validation"]).tolist() == [13, 15, 22, 8]


@pytest.mark.parametrize("seed", range(5))
def test_another_seed_is_another_split_and_no_class_is_cut_in_the_order_of_its_rows(seed: int) -> None:
    labels = np.repeat(np.arange(3), 40)
    first, second = (split(labels, {"validation": 30, "test": 30}, number) for number in (seed, seed + 1))
    assert (first != second).mean() > 0.3
    for name in ("train", "validation", "test"):
        for label in range(3):
            rows = np.flatnonzero((first == name) & (labels == label)) - 40 * label
            assert np.ptp(rows) > len(rows), "the rows of one class follow each other"


def test_the_message_names_every_number() -> None:
    with pytest.raises(UserError) as caught:
        split(np.array([0, 0, 0, 1]), {"validation": 1, "held_out": 2}, 0)
    assert str(caught.value) == (
        "labels [1] have no sample left for training: too few samples for split.validation + split.held_out (1, 2) · "
        "lower them, or add samples"
    )
