"""Batches of whole classes: what stands in one, and that seed and position alone say so."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.training import ClassStream, Stream


def labels_of(counts: list[int], seed: int = 0) -> Tensor:
    """So many samples of each class, mixed; the numbers of the classes have gaps."""
    every = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) * 3
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))]


def stream(labels: Tensor, classes: int, per_class: int) -> ClassStream:
    return ClassStream([torch.arange(len(labels)), labels], classes * per_class, labels, per_class)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=8), st.integers(2, 6), st.data())
def test_a_batch_has_so_many_classes_with_so_many_samples(
    counts: list[int], per_class: int, data: st.DataObject
) -> None:
    most = min(len(counts), sum(counts) // per_class)
    if most < 1:
        return
    classes = data.draw(st.integers(1, most))
    labels = labels_of(counts)
    drawn = stream(labels, classes, per_class)
    for _ in range(6):
        rows, given_labels = drawn.draw(data.draw(st.integers(0, 5)), 0, 1)
        assert torch.equal(labels[rows], given_labels)
        groups = given_labels.view(classes, per_class)
        assert (groups == groups[:, :1]).all()
        assert len(groups[:, 0].unique()) == classes
        for label, members in zip(groups[:, 0].tolist(), rows.view(classes, per_class).tolist(), strict=True):
            there = counts[label // 3]
            times = Counter(members)
            assert len(times) == min(there, per_class)
            assert max(times.values()) - min(times.values()) <= 1, "none a second time before all were there"


def test_a_batch_follows_from_seed_and_position() -> None:
    labels = labels_of([4, 7, 5, 9, 3])
    whole = [stream(labels, 2, 3).draw(1, 0, 1)[0].tolist() for _ in range(3)]
    assert whole[0] == whole[1] == whole[2]
    one = stream(labels, 2, 3)
    order = [one.draw(1, 0, 1)[0].tolist() for _ in range(30)]
    assert len(set(map(tuple, order))) == 30
    other = stream(labels, 2, 3)
    for position in (17, 3, 29, 0):
        other.position = position
        assert other.draw(1, 0, 1)[0].tolist() == order[position]
        assert other.position == position + 1
    other.position = 0
    assert other.draw(2, 0, 1)[0].tolist() != order[0]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_see_whole_classes_of_one_global_batch(world: int) -> None:
    labels = labels_of([6] * 9)
    whole, parts = stream(labels, 6, 4), [stream(labels, 6 // world, 4) for _ in range(world)]
    assert parts[0].batches(world) == whole.batches(1)
    for _ in range(8):
        found = [part.draw(5, rank, world)[0] for rank, part in enumerate(parts)]
        assert torch.equal(torch.cat(found), whole.draw(5, 0, 1)[0])
        assert sum(len(labels[rows].unique()) for rows in found) == 6


def test_an_epoch_has_as_many_batches_as_any() -> None:
    labels = labels_of([11, 8, 4, 7, 20])
    for classes, per_class, world in ((1, 2, 1), (3, 3, 1), (2, 5, 1), (2, 4, 2)):
        plain = Stream([labels], classes * per_class)
        assert stream(labels, classes, per_class).batches(world) == plain.batches(world)


def test_every_class_and_every_sample_has_its_chance() -> None:
    """3,000 batches of 2 of 4 classes, 2 samples each: binomial counts, within five standard deviations."""
    counts = [2, 3, 5, 10]
    labels = labels_of(counts)
    drawn = stream(labels, 2, 2)
    rows = torch.cat([drawn.draw(0, 0, 1)[0] for _ in range(3000)])
    times = torch.bincount(rows, minlength=len(labels)).double()
    for label, there in enumerate(counts):
        share = 0.5 * 2 / there  # of a batch: the class is drawn, and then this sample of it
        deviation = (3000 * share * (1 - share)) ** 0.5
        assert ((times[labels == 3 * label] - 3000 * share).abs() <= 5 * deviation + 1e-9).all()


def test_what_is_too_small_is_said_with_both_numbers() -> None:
    labels = labels_of([9, 9, 9])
    with pytest.raises(
        ValueError, match="a batch of 8 with 2 samples of every class in it needs 4 classes, and there are 3"
    ):
        stream(labels, 4, 2).draw(0, 0, 1)
    with pytest.raises(ValueError, match="in each of 2 processes, needs 4 classes, and there are 3"):
        stream(labels, 2, 2).batches(2)
    with pytest.raises(ValueError, match="5 samples do not fill a batch of 6"):
        stream(labels_of([2, 3]), 2, 3).batches(1)
    with pytest.raises(ValueError, match="a batch of 7 does not hold 2 samples of every class in it"):
        ClassStream([labels], 7, labels, 2)
