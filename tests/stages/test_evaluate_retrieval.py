"""Figures of embeddings against slow computations: neighbours, MAP@R, NMI, pairs, a gallery, lower resolutions."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data import recognition as data
from data.errors import UserError
from data.files import write_json
from models.artifacts import Description
from models.recognition import Output
from stages.evaluate import __main__ as stage
from stages.evaluate import retrieval
from stages.evaluate.recognition import FALSE_ACCEPTS, evaluate, table
from stages.evaluate.result import Result
from stages.neighbours import recall, same_class_rank
from stages.parameters.recognition import Task

Points = tuple[np.ndarray, np.ndarray]


@st.composite
def points(draw: st.DrawFn, fewest: int = 1) -> Points:
    """Embeddings on a grid, where many distances are equal and points coincide, or anywhere; and labels."""
    count, generator = draw(st.integers(fewest, 30)), np.random.default_rng(draw(st.integers(0, 2**31)))
    labels = generator.integers(0, draw(st.integers(1, 6)), count)
    if draw(st.booleans()):
        return generator.integers(-2, 3, (count, 2)).astype(np.float32), labels
    return generator.normal(size=(count, draw(st.integers(1, 8)))).astype(np.float32), labels


def tensors(found: Points) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def neighbours_by_hand(embeddings: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """All others, sorted by distance, strangers first among equals, then by row."""
    wide = embeddings.astype(np.float64)
    return [
        sorted(
            (j for j in range(len(labels)) if j != i),
            key=lambda j: (np.float32(np.sqrt(((wide[i] - wide[j]) ** 2).sum())), labels[j] == labels[i], j),
        )
        for i in range(len(labels))
    ]


# Neighbours


@settings(deadline=None, max_examples=80)
@given(points(), st.integers(1, 40), st.integers(1, 40))
def test_neighbours_are_those_of_sorting_all(found: Points, count: int, chunk: int) -> None:
    near = retrieval.nearest(*tensors(found), count, chunk)
    assert near.dtype == torch.int64
    assert near.tolist() == [row[:count] for row in neighbours_by_hand(*found)]


@settings(deadline=None, max_examples=60)
@given(points(2))
def test_the_first_neighbour_is_of_the_class_where_the_rank_is_1(found: Points) -> None:
    embeddings, labels = tensors(found)
    hit = labels[retrieval.nearest(embeddings, labels, 1)[:, 0]] == labels
    assert torch.equal(hit, same_class_rank(embeddings, labels) == 1)


# Clusters


def map_at_r_by_hand(embeddings: np.ndarray, labels: np.ndarray) -> float:
    """Musgrave et al.: (1 / R) sum over i <= R of precision at i, where the i-th neighbour is of the class."""
    found = []
    for i, near in enumerate(neighbours_by_hand(embeddings, labels)):
        relevant = [labels[j] == labels[i] for j in near]
        if amount := sum(relevant):
            found.append(sum(sum(relevant[: k + 1]) / (k + 1) for k in range(amount) if relevant[k]) / amount)
    return float(np.mean(found))


def information(one: np.ndarray, other: np.ndarray) -> float:
    """Mutual information in nats, from counts."""
    pairs = list(zip(one.tolist(), other.tolist(), strict=True))
    share = {key: pairs.count(key) / len(pairs) for key in set(pairs)}
    mine = {key: one.tolist().count(key) / len(pairs) for key in set(one.tolist())}
    theirs = {key: other.tolist().count(key) / len(pairs) for key in set(other.tolist())}
    return sum(value * math.log(value / mine[a] / theirs[b]) for (a, b), value in share.items())


@settings(deadline=None, max_examples=60)
@given(points(2))
def test_map_at_r_is_that_of_a_slow_computation(found: Points) -> None:
    metrics = retrieval.clustering(*tensors(found), seed=0)
    if np.bincount(found[1]).max() < 2:
        assert metrics == {}
    else:
        assert metrics["map_at_r"] == pytest.approx(map_at_r_by_hand(*found), abs=1e-12)


def test_nmi_compares_clusters_with_classes() -> None:
    """Clusters far apart that cut through the classes: what k-means has to find is known."""
    generator = np.random.default_rng(0)
    cluster, labels = np.arange(60) % 4, np.where(generator.random(60) < 0.7, np.arange(60) % 4, 0)
    embeddings = 100 * np.eye(4)[cluster] + generator.normal(size=(60, 4))
    found = retrieval.clustering(torch.from_numpy(embeddings).float(), torch.from_numpy(labels), seed=0)
    entropy = (information(labels, labels) + information(cluster, cluster)) / 2
    assert found["nmi"] == pytest.approx(information(labels, cluster) / entropy)
    assert 0.2 < found["nmi"] < 0.9


def test_clusters_are_the_seeds() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(200, 3, generator=generator), torch.arange(200) % 9
    found = [retrieval.clustering(embeddings, labels, seed)["nmi"] for seed in (0, 0, 1, 2)]
    assert found[0] == found[1]
    assert len(set(found)) > 1


def test_embeddings_that_collapsed_form_no_clusters(recwarn: pytest.WarningsRecorder) -> None:
    found = retrieval.clustering(torch.full((12, 4), 0.3), torch.arange(12) % 3, seed=0)
    assert found == {"map_at_r": 0, "nmi": 0}
    assert not len(recwarn)


# Pairs


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Similarities, few of them different, and whether the pair is of one class."""
    count = draw(st.integers(1, 25))
    similarity = draw(st.lists(st.integers(-4, 4), min_size=count, max_size=count))
    same = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return np.array(similarity) / 4, np.array(same)


def accuracy(similarity: np.ndarray, same: np.ndarray, threshold: float) -> float:
    right = [(value >= threshold) == alike for value, alike in zip(similarity, same, strict=True)]
    return sum(right) / len(right)


@settings(deadline=None, max_examples=100)
@given(pairs())
def test_no_threshold_is_better(found: tuple[np.ndarray, np.ndarray]) -> None:
    threshold = retrieval.best_threshold(*found)
    values = sorted(set(found[0].tolist()))
    every = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(values)), math.inf]
    best = max(accuracy(*found, one) for one in every)
    assert threshold == next(one for one in every if accuracy(*found, one) == best)


def test_a_fold_has_no_say_in_its_own_threshold() -> None:
    """Fold 0 alone would be perfect above 0.7; by the others the threshold is 0.3, where half of it is wrong."""
    similarity = np.array([0.6, 0.8, 0.2, 0.4, 0.2, 0.4])
    same, fold = np.array([False, True] * 3), np.array([0, 0, 1, 1, 2, 2])
    mean, error = retrieval.verification(similarity, same, fold)
    # By folds 0 and 1, or 0 and 2: 0.3 and 0.7 leave one pair wrong, and the lower is taken.
    assert mean == pytest.approx((0.5 + 1 + 1) / 3)
    assert error == pytest.approx(math.sqrt(((0.5 - 5 / 6) ** 2 + 2 * (1 - 5 / 6) ** 2) / 2) / math.sqrt(3))


@st.composite
def directions(draw: st.DrawFn) -> Points:
    """Embeddings of one or four numbers of the same size, whose cosines are exact and often equal; or any."""
    count, generator = draw(st.integers(2, 30)), np.random.default_rng(draw(st.integers(0, 2**31)))
    labels, signs = generator.integers(0, draw(st.integers(1, 5)), count), generator.integers(0, 2, (count, 4)) * 2 - 1
    if draw(st.booleans()):
        return generator.normal(size=(count, 3)).astype(np.float32), labels
    one = np.eye(4)[generator.integers(0, 4, count)] * generator.integers(0, 2, (count, 1))
    return (signs * np.where(generator.random((count, 1)) < 0.5, one, 3)).astype(np.float32), labels


def cosine_by_hand(one: np.ndarray, other: np.ndarray) -> float:
    lengths = math.sqrt(sum(value**2 for value in one.tolist())) * math.sqrt(sum(value**2 for value in other.tolist()))
    return sum(a * b for a, b in zip(one.tolist(), other.tolist(), strict=True)) / lengths if lengths else 0.0


@settings(deadline=None, max_examples=80)
@given(directions(), st.integers(1, 40))
def test_true_accepts_are_those_of_trying_every_threshold(found: Points, chunk: int) -> None:
    rates = [0.0, 0.001, 0.01, 0.1, 0.5, 1.0]
    embeddings, labels = found
    rows = list(itertools.combinations(range(len(labels)), 2))
    similarity = np.array([cosine_by_hand(embeddings[i], embeddings[j]) for i, j in rows])
    same = np.array([labels[i] == labels[j] for i, j in rows])
    accepted = retrieval.true_accepts(*tensors(found), rates, chunk)
    if same.all() or not same.any():
        assert accepted == []
        return
    # Between any two that differ, above all and below all.
    values = np.unique(similarity)
    thresholds = [-2.0, *(values[1:] + values[:-1]) / 2, 2.0]
    for rate, share in zip(rates, accepted, strict=True):
        lowest = min(one for one in thresholds if (similarity[~same] >= one).sum() <= rate * (~same).sum() + 1e-9)
        assert share == pytest.approx((similarity[same] >= lowest).mean(), abs=1e-12)
    assert accepted[-1] == 1


def test_a_share_of_false_accepts_is_counted_exactly() -> None:
    """All of 10 and 11 images in two classes: 110 pairs that are wrong, and 0.3 of 110 is 33, not 32.999."""
    assert math.floor(0.3 * 110) == 33
    assert math.floor(0.1 * 3 * 110) == 33
    generator = np.random.default_rng(0)
    embeddings, labels = generator.normal(size=(21, 3)), np.array([0] * 10 + [1] * 11)
    rows = list(itertools.combinations(range(21), 2))
    wrong = sorted((cosine_by_hand(embeddings[i], embeddings[j]) for i, j in rows if labels[i] != labels[j]))[::-1]
    right = np.array([cosine_by_hand(embeddings[i], embeddings[j]) for i, j in rows if labels[i] == labels[j]])
    for allowed in range(111):
        limit = wrong[allowed] if allowed < 110 else -2
        (found,) = retrieval.true_accepts(*tensors((embeddings, labels)), [allowed / 110])
        assert found == pytest.approx((right > limit).mean(), abs=1e-12)


# A gallery


@settings(deadline=None, max_examples=80)
@given(directions(), st.booleans())
def test_rank_1_is_that_of_looking_through_the_gallery(found: Points, other: bool) -> None:
    embeddings, labels = found
    probes = np.roll(embeddings, 1, axis=0) if other else embeddings
    gallery: dict[int, np.ndarray] = {}
    hits = []
    for row, label in enumerate(labels.tolist()):
        gallery.setdefault(label, embeddings[row])
    first = {label: labels.tolist().index(label) for label in gallery}
    for row, label in enumerate(labels.tolist()):
        if row != first[label]:
            strangers = [cosine_by_hand(probes[row], face) for name, face in gallery.items() if name != label]
            hits.append(cosine_by_hand(probes[row], gallery[label]) > max(strangers, default=-math.inf))
    share = retrieval.rank_1(torch.from_numpy(embeddings), torch.from_numpy(probes), torch.from_numpy(labels))
    assert share == (pytest.approx(np.mean(hits)) if hits else None)


def test_embeddings_that_are_no_numbers_find_nothing() -> None:
    """All of them, or one among others, whose neighbours the others are not."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20) % 4
    nothing = torch.full((20, 3), float("nan"))
    assert recall(same_class_rank(nothing, labels), 8) == 0
    some = torch.randn(20, 3, generator=generator)
    some[7] = float("nan")
    ranks, near = same_class_rank(some, labels), retrieval.nearest(some, labels, 5)
    assert ranks[7] == 16  # behind all of other classes
    assert labels[near[7]].ne(labels[7]).all()
    for embeddings in (nothing, some):
        found = retrieval.nearest(embeddings, labels, 19)
        assert [sorted(row) for row in found.tolist()] == [[j for j in range(20) if j != i] for i in range(20)]
    sound = torch.arange(20) != 7
    assert not (near[sound] == 7).any()


# The whole evaluation of one model


class Lookup(nn.Module):
    """Embeds by a table, at the row that the first pixel says; below its own resolution it sees less and less of it."""

    def __init__(self, embeddings: Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", embeddings)
        self.classes = classes
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Output:
        self.seen.append(images)
        rows = (images[:, 0].mean((1, 2)) * 255).round().long()
        found = self.embeddings[rows]
        return Output(found * 0, found, found[:, : self.classes])


SIDE = 8
COUNT = 60


def prepare(folder: Path, held_out: bool, pairs: bool) -> Points:
    """60 images, each of one colour: half are the validation split, with labels 2 to 4, half the test split."""
    generator = np.random.default_rng(5)
    colours = np.arange(COUNT, dtype=np.uint8)
    labels = np.where(np.arange(COUNT) % 2 == 0, generator.integers(2, 5, COUNT), generator.integers(5, 8, COUNT))
    if not held_out:
        labels = generator.integers(0, 4, COUNT)
    embeddings = (generator.normal(size=(COUNT, 6)) + 1.5 * np.eye(8)[labels, :6]).astype(np.float32)
    np.save(folder / "images.npy", np.broadcast_to(colours[:, None, None, None], (COUNT, 1, SIDE, SIDE)))
    np.save(folder / "labels.npy", labels)
    manifest = pd.DataFrame({"id": [f"image {row}" for row in range(COUNT)]})
    manifest["split"] = np.where(np.arange(COUNT) % 2 == 0, "validation", "test")
    manifest.to_csv(folder / "manifest.csv", index=False)
    names = [f"class {label}" for label in range(8)]
    described = {"classes": names[: 2 if held_out else 4], "held_out": names[2:] if held_out else []}
    write_json(folder / "dataset.json", {**described, "verification": {"folds": 3} if pairs else None})
    if pairs:
        rows = generator.permutation(list(itertools.combinations(range(1, COUNT, 2), 2)))[:60]
        listed = pd.DataFrame({"split": "test", "fold": np.arange(60) % 3})
        listed["first"], listed["second"] = ([f"image {row}" for row in side] for side in rows.T)
        listed["same"] = (labels[rows[:, 0]] == labels[rows[:, 1]]).astype(int)
        listed.to_csv(folder / "pairs.csv", index=False)
    return embeddings, labels


def run(folder: Path, embeddings: np.ndarray, classes: int, split: str = "test", **more: Any) -> tuple[Result, Lookup]:
    network = Lookup(torch.from_numpy(embeddings), classes).eval()
    side = more.pop("side", SIDE)
    interface = {"classes": [f"class {label}" for label in range(classes)], "resolution": side, "channels": 1}
    description = Description("toy", "recognition", "student", {}, interface, {}, {}, None, None, [])
    return evaluate(network, description, folder, split, Task(**more)), network


RETRIEVAL = ["recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8", "map_at_r", "nmi"]
VERIFICATION = ["verification", "verification_error", *(f"tar_at_far_{rate:g}" for rate in FALSE_ACCEPTS), "rank_1"]


@pytest.mark.parametrize("classes", [0, 2])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_unseen_classes_are_found_by_neighbours(tmp_path: Path, split: str, classes: int) -> None:
    """A model of other classes answers no other question than one of none."""
    everything, labels = prepare(tmp_path, held_out=True, pairs=False)
    result, _ = run(tmp_path, everything, classes, split)
    rows = np.arange(split == "test", COUNT, 2)
    embeddings, labels = everything[rows], labels[rows]
    near = neighbours_by_hand(embeddings, labels)
    assert list(result.metrics) == RETRIEVAL
    for k in (1, 2, 4, 8):
        hit = [any(labels[j] == labels[i] for j in row[:k]) for i, row in enumerate(near)]
        assert result.metrics[f"recall_at_{k}"] == pytest.approx(np.mean(hit), abs=1e-6)
    assert result.metrics["map_at_r"] == pytest.approx(map_at_r_by_hand(embeddings, labels), abs=1e-6)
    samples = result.samples
    assert samples["id"].tolist() == [f"image {row}" for row in rows]
    assert samples["label"].tolist() == labels.tolist()
    assert samples["prediction"].tolist() == [labels[row[0]] for row in near]
    assert samples["correct"].tolist() == [int(labels[row[0]] == labels[i]) for i, row in enumerate(near)]
    assert samples["neighbours"].tolist() == [" ".join(map(str, row[:5])) for row in near]
    assert samples["confidence"].isna().all()
    assert (samples["same_class_rank"] == 1).tolist() == (samples["correct"] == 1).tolist()
    classes_found = result.classes.set_index("label")
    for label in sorted(set(labels.tolist())):
        own = samples[samples["label"] == label]
        assert classes_found.loc[label, "class"] == f"class {label}"
        assert classes_found.loc[label, "samples"] == len(own)
        assert classes_found.loc[label, "accuracy"] == pytest.approx(own["correct"].mean(), abs=1e-6)


def test_a_model_without_classes_answers_by_neighbours_anywhere(tmp_path: Path) -> None:
    embeddings, _ = prepare(tmp_path, held_out=False, pairs=False)
    without, _ = run(tmp_path, embeddings, 0)
    known, _ = run(tmp_path, embeddings, 4)
    assert list(without.metrics) == RETRIEVAL
    assert list(known.metrics) == ["top_1", "worst_class", *RETRIEVAL[:4], "calibration_error"]
    assert all(without.metrics[name] == known.metrics[name] for name in RETRIEVAL[:4])
    assert list(without.samples.columns) == list(known.samples.columns)


@pytest.mark.parametrize("held_out", [True, False])
def test_pairs_are_compared_where_there_are_any(tmp_path: Path, held_out: bool) -> None:
    embeddings, labels = prepare(tmp_path, held_out, pairs=True)
    result, _ = run(tmp_path, embeddings, 0 if held_out else 4)
    assert list(result.metrics)[-6:] == VERIFICATION
    assert not set(run(tmp_path, embeddings, 0, "validation")[0].metrics) & set(VERIFICATION)
    listed = pd.read_csv(tmp_path / "pairs.csv")
    place = {f"image {row}": row for row in range(COUNT)}
    similarity = np.array(
        [cosine_by_hand(embeddings[place[a]], embeddings[place[b]]) for a, b in listed[["first", "second"]].to_numpy()]
    )
    scores = []
    for fold in range(3):
        mine = (listed["fold"] == fold).to_numpy()
        same = listed["same"].to_numpy() == 1
        threshold = retrieval.best_threshold(similarity[~mine], same[~mine])
        scores.append(accuracy(similarity[mine], same[mine], threshold))
    assert result.metrics["verification"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert result.metrics["verification_error"] == pytest.approx(np.std(scores, ddof=1) / math.sqrt(3), abs=1e-6)
    test = torch.from_numpy(embeddings[1::2]), torch.from_numpy(labels[1::2])
    accepted = [result.metrics[name] for name in VERIFICATION[2:5]]
    assert accepted == pytest.approx(retrieval.true_accepts(*test, FALSE_ACCEPTS), abs=1e-6)
    assert result.metrics["rank_1"] == pytest.approx(retrieval.rank_1(test[0], *test), abs=1e-6)


def test_the_gallery_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a student that learnt its embeddings, and of no other."""
    embeddings, labels = prepare(tmp_path, held_out=True, pairs=True)
    theirs = np.roll(embeddings, 1, axis=1).copy()
    source = Lookup(torch.from_numpy(theirs), 0).eval()
    described = Description("source", "recognition", "student", {}, {"resolution": 6}, {}, {}, None, None, [])
    monkeypatch.setattr("stages.evaluate.recognition.load_model", lambda folder: (source, described))
    weights = {"weights": {"points": 1.0}, "shares": {"points": None}}
    recipe = {"method": "horkd", "tap": "embedding", **weights}
    network = Lookup(torch.from_numpy(embeddings), 0).eval()
    interface = {"classes": [], "resolution": 4, "channels": 1}
    teacher = {"name": "source", "weights_sha256": ""}

    def found(chosen: dict[str, str], **changed: Any) -> float | None:
        made = Description("toy", "recognition", "student", {}, interface, recipe | changed, {}, teacher, [])
        made = dataclasses.replace(made, chosen=chosen)
        return evaluate(network, made, tmp_path, "test", Task()).metrics.get("rank_1_by_source")

    test = [torch.from_numpy(array[1::2]) for array in (theirs, embeddings, labels)]
    assert found({}) == pytest.approx(retrieval.rank_1(*test), abs=1e-6)
    assert found({}) != pytest.approx(retrieval.rank_1(test[1], *test[1:]), abs=1e-6)
    assert source.seen[0].shape[-1] == 6
    assert network.seen[0].shape[-1] == 4
    assert found({}, weights={"points": 0.0}, shares={"points": 0.5}) == found({})
    assert found({"projection": "6 to 8"}) is None
    assert found({}, tap="pooled") is None
    assert found({}, weights={"points": 0.0}) is None
    assert found({}, method="kd") is None


def test_a_split_in_which_nothing_can_be_found_is_an_error(tmp_path: Path) -> None:
    embeddings, _ = prepare(tmp_path, held_out=True, pairs=False)
    np.save(tmp_path / "labels.npy", np.arange(COUNT))
    with pytest.raises(
        UserError, match=r"the test split of .* has no two images of a class.* hold out more: split\.test"
    ):
        run(tmp_path, embeddings, 0)


def test_a_class_of_one_image_asks_no_question(tmp_path: Path) -> None:
    embeddings, labels = prepare(tmp_path, held_out=True, pairs=False)
    labels[1] = 2  # in the test split, the only one of its class
    np.save(tmp_path / "labels.npy", labels)
    result, _ = run(tmp_path, embeddings, 0)
    assert result.samples["same_class_rank"].tolist()[0] == 0
    assert math.isnan(result.classes.set_index("label").loc[2, "accuracy"])
    near = neighbours_by_hand(embeddings[1::2], labels[1::2])
    hits = [labels[1::2][row[0]] == labels[1::2][i] for i, row in enumerate(near)][1:]
    assert result.metrics["recall_at_1"] == pytest.approx(np.mean(hits), abs=1e-6)


# Lower resolutions


def test_models_see_what_was_reduced_in_their_own_size(tmp_path: Path) -> None:
    """Reduced as in training, or enlarged and clamped; 16 is more than the data set has, and is left out."""
    prepare(tmp_path, held_out=True, pairs=False)
    generator = torch.Generator().manual_seed(0)
    # Hard edges between quarters, that bicubic overshoots.
    quarters = torch.rand(COUNT, 1, 2, 2, generator=generator) < 0.5
    sharp = quarters.repeat_interleave(SIDE // 2, 2).repeat_interleave(SIDE // 2, 3).to(torch.uint8) * 255
    np.save(tmp_path / "images.npy", sharp.numpy())
    constant = np.zeros((256, 6), np.float32)
    result, network = run(tmp_path, constant, 0, side=6, batch=30, resolutions=[2, 4, 6, 8, 16])
    ordinary, two, four, six, eight = network.seen
    unit = data.to_unit(sharp[1::2])
    for few, seen in ((2, two), (4, four)):
        enlarged = nn.functional.interpolate(data.downsample(unit, few), (6, 6), mode="bicubic", align_corners=False)
        torch.testing.assert_close(seen, enlarged.clamp(0, 1))
    assert enlarged.min() < -0.01
    assert torch.equal(six, ordinary)
    assert torch.equal(eight, ordinary)
    assert torch.equal(ordinary, data.downsample(unit, 6))
    _, network = run(tmp_path, constant, 0, side=4, batch=30, resolutions=[6])
    assert torch.equal(network.seen[1], data.downsample(data.downsample(unit, 6), 4))
    assert not torch.equal(network.seen[1], network.seen[0])
    assert result.further["resolutions"]["resolution"].tolist() == [2, 4, 6, 8]


def test_resolutions_that_a_data_set_has_not_leave_no_table(tmp_path: Path) -> None:
    embeddings, _ = prepare(tmp_path, held_out=True, pairs=False)
    assert list(run(tmp_path, embeddings, 0, resolutions=[16])[0].tables) == ["samples", "classes"]


@pytest.mark.parametrize(
    ("held_out", "classes", "metrics"), [(True, 0, ["recall_at_1", "rank_1"]), (False, 4, ["top_1"])]
)
def test_at_its_own_resolution_a_model_is_what_it_is(
    tmp_path: Path, held_out: bool, classes: int, metrics: list[str]
) -> None:
    embeddings, labels = prepare(tmp_path, held_out, pairs=False)
    result, _ = run(tmp_path, embeddings, classes, resolutions=[4, SIDE])
    found = result.further["resolutions"]
    assert list(found.columns) == ["split", "resolution", *metrics]
    assert set(found["split"]) == {"test"}
    own = found.set_index("resolution").loc[SIDE]
    assert own[metrics[0]] == result.metrics[metrics[0]]
    if held_out:
        test = torch.from_numpy(embeddings[1::2])
        assert own["rank_1"] == pytest.approx(retrieval.rank_1(test, test, torch.from_numpy(labels[1::2])), abs=1e-6)
    assert run(tmp_path, embeddings, classes)[0].further == {}


def test_probes_of_few_pixels_are_sought_in_a_gallery_of_all(tmp_path: Path) -> None:
    """Images of 2 by 2 blocks in a chessboard: what is left of them at a lower resolution is another row."""
    embeddings, labels = prepare(tmp_path, held_out=True, pairs=False)
    images = np.zeros((COUNT, 1, SIDE, SIDE), np.uint8)
    images[:, :, ::2] = np.arange(COUNT)[:, None, None, None]
    np.save(tmp_path / "images.npy", images)

    class Corner(Lookup):
        """Looks at the first pixel, which mixes with black as the image is reduced."""

        def forward(self, images: Tensor) -> Output:
            found = self.embeddings[(images[:, 0, 0, 0] * 255).round().long()]
            return Output(found, found, found[:, :0])

    interface = {"classes": [], "resolution": SIDE, "channels": 1}
    description = Description("toy", "recognition", "student", {}, interface, {}, {}, None, None, [])
    network = Corner(torch.from_numpy(np.concatenate([embeddings, np.zeros((9, 6), np.float32)])), 0)
    found = evaluate(network, description, tmp_path, "test", Task(resolutions=[4])).further["resolutions"]
    small = data.downsample(data.to_unit(torch.from_numpy(images[1::2])), 4)
    large = nn.functional.interpolate(small, (SIDE, SIDE), mode="bicubic", align_corners=False).clamp(0, 1)
    moved = embeddings[(large[:, 0, 0, 0] * 255).round().long()]
    assert not np.array_equal(moved, embeddings[1::2])
    gallery, test = torch.from_numpy(embeddings[1::2]), torch.from_numpy(labels[1::2])
    wanted = retrieval.rank_1(gallery, torch.from_numpy(moved), test)
    assert found["rank_1"].item() == pytest.approx(wanted, abs=1e-6)
    assert wanted != retrieval.rank_1(gallery, gallery, test)
    assert wanted != retrieval.rank_1(torch.from_numpy(moved), torch.from_numpy(moved), test)


def test_the_table_needs_no_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(9, 3, generator=generator), torch.arange(9) % 3
    found = table("test", [str(row) for row in range(9)], labels, None, embeddings)
    assert found["prediction"].tolist() == labels[retrieval.nearest(embeddings, labels, 1)[:, 0]].tolist()
    assert table("test", found["id"].tolist(), labels, torch.eye(3)[labels], embeddings)["correct"].all()


def test_the_stage_writes_every_table_of_both_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepared = Path("data/prepared/recognition/tiny")
    prepared.mkdir(parents=True)
    embeddings, _ = prepare(prepared, held_out=True, pairs=True)
    interface = {"classes": [], "resolution": SIDE, "channels": 1}
    description = Description("toy", "recognition", "student", {}, interface, {}, {"name": "tiny"}, None, None, [])
    network = Lookup(torch.from_numpy(embeddings), 0).eval()
    parameters = SimpleNamespace(tasks={"recognition": Task(resolutions=[4, 8])}, models=lambda key: {"toy": None})
    monkeypatch.setattr(stage, "load", lambda: parameters)
    monkeypatch.setattr(stage, "load_model", lambda folder: (network, description))
    monkeypatch.setattr(stage.paths, "require_validated", lambda task, dataset: None)
    stage.main("recognition")
    details = Path("reports/evaluation/recognition")
    for kind in ("samples", "classes", "resolutions"):
        assert set(pd.read_csv(details / f"toy.{kind}.csv")["split"]) == {"validation", "test"}
    found = pd.read_csv(details / "toy.resolutions.csv")
    assert found["resolution"].tolist() == [4, 8, 4, 8]
    metrics = json.loads(Path("reports/metrics/recognition/toy.json").read_text())
    assert next(iter(metrics["validation"])) == "recall_at_1"
    assert found.iloc[3]["recall_at_1"] == metrics["test"]["recall_at_1"]
    assert (pd.read_csv(details / "toy.samples.csv")["confidence"].isna()).all()
