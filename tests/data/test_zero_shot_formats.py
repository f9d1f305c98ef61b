"""Published features: read as they were written, split as published, and refused where they contradict themselves."""

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import zero_shot
from data.errors import UserError
from data.files import tree_digest
from models.zero_shot import Scale

sys.path.insert(0, str(Path(__file__).parent))
import zero_shot_sources as files

KINDS = ["xlsa17", "arrays"]
Arrays = dict[str, np.ndarray]


def read(kind: str, raw: Path) -> zero_shot.Published:
    return zero_shot.read_xlsa17(raw / "SET") if kind == "xlsa17" else zero_shot.read_arrays(raw / "set.npz")


def prepared(kind: str, arrays: Arrays, folder: Path, **split: Any) -> Path:
    files.write(kind, folder / "raw", arrays)
    return files.prepared(folder / "raw", files.published(kind, **split), folder / "prepared")


# Reading


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 3), st.integers(5, 12), st.integers(0, 99))
def test_files_are_read_as_they_were_written(kind: str, seen: int, unseen: int, each: int, seed: int) -> None:
    arrays = files.benchmark(seen, unseen, each, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        files.write(kind, Path(folder), arrays)
        found = read(kind, Path(folder))
    np.testing.assert_array_equal(found.features, arrays["features"])
    np.testing.assert_array_equal(found.attributes, arrays["att"])
    np.testing.assert_array_equal(found.labels, arrays["labels"])
    assert found.classes == arrays["allclasses_names"].tolist()
    assert found.names == arrays["attribute_names"].tolist()
    for name, rows in zip(files.LOCATIONS, (found.trainval, found.test_seen, found.test_unseen), strict=True):
        np.testing.assert_array_equal(rows, arrays[name])
        assert rows.dtype == np.int64


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_without_names_are_numbered(kind: str, tmp_path: Path) -> None:
    arrays = files.benchmark()
    del arrays["attribute_names"]
    files.write(kind, tmp_path, arrays)
    assert read(kind, tmp_path).names == ["attribute 1", "attribute 2", "attribute 3"]


def test_half_precision_becomes_single(tmp_path: Path) -> None:
    arrays = files.benchmark()
    arrays["features"] = arrays["features"].astype(np.float16)
    output = prepared("arrays", arrays, tmp_path, validation=0.0)
    stored = np.load(output / "features.npy")
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, arrays["features"].astype(np.float32))


def test_both_formats_give_the_same_bytes(tmp_path: Path) -> None:
    arrays = files.benchmark(each=12)
    first, second = (
        prepared(kind, arrays, tmp_path / kind, validation=0.2, validation_classes=1, seed=3) for kind in KINDS
    )
    assert tree_digest(first) == tree_digest(second)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_index_array_will_do(kind: str, tmp_path: Path) -> None:
    """Rows, columns, and vectors; unsigned, signed, and MATLAB's doubles."""
    arrays = files.benchmark()
    first = 1 if kind == "xlsa17" else 0
    turned = {"features": arrays["features"].T, "att": arrays["att"].T} if first else {}
    found = []
    for dtype in (np.uint8, np.uint16, np.int32, np.float64):
        for shape in ((-1,), (-1, 1), (1, -1)):
            indices = {name: (arrays[name] + first).astype(dtype).reshape(shape) for name in files.LOCATIONS}
            indices["labels"] = (arrays["labels"] + first).astype(dtype).reshape(shape)
            everything = {**arrays, **turned, **indices}
            reader = zero_shot.xlsa17 if first else zero_shot.published
            found.append(reader(everything, "here"))
    for name in ("trainval", "test_seen", "test_unseen", "labels"):
        assert len({getattr(one, name).tobytes() for one in found}) == 1
    np.testing.assert_array_equal(found[0].test_unseen, arrays["test_unseen_loc"])


def test_what_else_a_file_holds_is_not_looked_at(tmp_path: Path) -> None:
    """train_loc and val_loc of the published files hold samples of test_seen_loc (card 9.1)."""
    arrays = files.benchmark()
    for kind in KINDS:
        plain = prepared(kind, arrays, tmp_path / kind / "plain", validation=0.2)
        leaking = np.concatenate([arrays["trainval_loc"], arrays["test_seen_loc"]])
        more = {**arrays, "train_loc": leaking, "val_loc": arrays["test_unseen_loc"], "other": np.ones(2)}
        assert tree_digest(prepared(kind, more, tmp_path / kind / "more", validation=0.2)) == tree_digest(plain)


# Splits


@settings(deadline=None, max_examples=25)
@given(
    st.integers(3, 6),
    st.integers(1, 3),
    st.integers(8, 14),
    st.sampled_from([0.0, 0.2, 0.3]),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_samples_go_where_their_class_and_place_say(
    seen: int, unseen: int, each: int, share: float, classes: int, seed: int
) -> None:
    arrays = files.benchmark(seen, unseen, each, seed=seed)
    arrays["trainval_loc"] = arrays["trainval_loc"][2:]  # of which nothing is said any more
    with tempfile.TemporaryDirectory() as folder:
        output = prepared("arrays", arrays, Path(folder), validation=share, validation_classes=classes, seed=seed)
        description = zero_shot.describe(output)
        manifest = pd.read_csv(output / "manifest.csv")
        features, labels = np.load(output / "features.npy"), np.load(output / "labels.npy")
    roles = description["roles"]
    assert (roles.count("validation"), roles.count("unseen"), len(roles)) == (classes, unseen, seen + unseen)
    places = [int(name.removeprefix("sample-")) for name in manifest["id"]]
    assert places == sorted(set(places))
    np.testing.assert_array_equal(features, arrays["features"][places])
    np.testing.assert_array_equal(labels, arrays["labels"][places])
    np.testing.assert_array_equal(manifest["label"], labels)
    part = dict(zip(places, manifest["split"], strict=True))
    dropped = 0
    for row, label in enumerate(arrays["labels"]):
        if row in arrays["test_unseen_loc"]:
            assert (roles[label], part[row]) == ("unseen", "test")
        elif row in arrays["test_seen_loc"]:
            assert roles[label] in ("seen", "validation")
            assert part.get(row) == ("test" if roles[label] == "seen" else None)
            dropped += roles[label] == "validation"
        elif row in arrays["trainval_loc"]:
            assert part[row] == "validation" if roles[label] == "validation" else part[row] in ("train", "validation")
        else:
            assert row not in part
    assert description["dropped"] == {"test_seen_of_validation_classes": dropped, "in_no_split": 2}
    trained = pd.crosstab(manifest["label"], manifest["split"]).reindex(columns=list(zero_shot.SPLITS), fill_value=0)
    for label, role in enumerate(roles):
        if role == "seen":
            train, held_out = trained.loc[label, ["train", "validation"]]
            assert abs(held_out - share * (train + held_out)) < 1
            assert train > 0


@pytest.mark.parametrize("kind", KINDS)
def test_validation_classes_may_be_named(kind: str, tmp_path: Path) -> None:
    arrays = files.benchmark()
    seen = sorted({f"class.{label}" for label in arrays["labels"][arrays["trainval_loc"]]})
    output = prepared(kind, arrays, tmp_path / "a", validation=0.1, validation_classes=seen[1:3])
    description = zero_shot.describe(output)
    found = [name for name, role in zip(description["classes"], description["roles"], strict=True) if role != "seen"]
    unseen = {f"class.{label}" for label in arrays["labels"][arrays["test_unseen_loc"]]}
    assert set(found) == {*seen[1:3], *unseen}


def test_which_classes_are_drawn_depends_on_the_seed_alone(tmp_path: Path) -> None:
    arrays = files.benchmark(seen=10)
    found = {}
    for seed in (0, 1):
        for share in (0.0, 0.3):
            output = prepared("arrays", arrays, tmp_path / f"{seed}-{share}", validation=share, validation_classes=4,
                              seed=seed)  # fmt: skip
            found[seed, share] = zero_shot.describe(output)["roles"]
    assert found[0, 0.0] == found[0, 0.3] != found[1, 0.0] == found[1, 0.3]


# Nothing leaks (D3GZSL card 7.17 and 7.18)


def of_training(output: Path) -> tuple[Any, ...]:
    ids, features, labels = zero_shot.load(output, "train")
    scale = Scale(features.shape[1])
    scale.fit(features)
    return ids, features.numpy().tobytes(), labels.tolist(), scale.minimum.tolist(), scale.divisor.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_training_knows_nothing_of_samples_that_are_not_its_own(kind: str, tmp_path: Path) -> None:
    arrays = files.benchmark(seen=5, each=12)
    split = {"validation": 0.2, "validation_classes": 2, "seed": 1}
    before = prepared(kind, arrays, tmp_path / "before", **split)
    manifest = pd.read_csv(before / "manifest.csv")
    trained = {int(name.removeprefix("sample-")) for name in manifest["id"][manifest["split"] == "train"]}
    others = np.array(sorted(set(range(len(arrays["labels"]))) - trained))
    assert set(arrays["labels"][sorted(trained)]) == {
        label for label, role in enumerate(zero_shot.describe(before)["roles"]) if role == "seen"
    }
    changed = {**arrays, "features": arrays["features"].copy()}
    changed["features"][others] += 1000
    assert of_training(prepared(kind, changed, tmp_path / "others", **split)) == of_training(before)
    changed["features"][min(trained)] += 1000
    after = of_training(prepared(kind, changed, tmp_path / "own", **split))
    assert after[0] == of_training(before)[0]
    assert after[3:] != of_training(before)[3:]


def test_scaling_follows_the_trainval_samples_of_the_published_split() -> None:
    """Without validation, that is what the official loader fits on (card 3.11)."""
    arrays = files.benchmark(features=7)
    arrays["features"][:, 2] = 3.5
    samples = zero_shot.from_published(zero_shot.published(arrays, "here"), files.published("arrays").split.model_copy(
        update={"validation": 0.0}))  # type: ignore[union-attr]  # fmt: skip
    train = samples.rows[samples.parts == "train"].astype(np.float64)
    assert len(train) == len(arrays["trainval_loc"])
    scale = Scale(7)
    scale.fit(torch.from_numpy(train))
    own = arrays["features"][arrays["trainval_loc"]]
    low, high = own.min(axis=0), own.max(axis=0)
    wanted = (own - low) / np.where(high > low, high - low, 1)
    np.testing.assert_allclose(scale(torch.from_numpy(own)), wanted, atol=1e-6)


# What is refused


def at(name: str, place: Any, value: Any) -> Callable[[Arrays], None]:
    return lambda arrays: arrays[name].__setitem__(place, value)


def with_changes(change: Callable[[Arrays], Any]) -> Arrays:
    arrays = files.benchmark()
    arrays["features"] = arrays["features"].astype(np.float64)
    for name in files.LOCATIONS:
        arrays[name] = arrays[name].astype(np.int64)
    change(arrays)
    return arrays


def move(arrays: Arrays, row: int, label: int) -> None:
    """Another class for the first sample of an index array."""
    arrays["labels"][row] = label


def unseen_class(arrays: Arrays) -> int:
    return int(arrays["labels"][arrays["test_unseen_loc"][0]])


def seen_class(arrays: Arrays) -> int:
    return int(arrays["labels"][arrays["trainval_loc"][0]])


def without_training(arrays: Arrays) -> None:
    rows = arrays["trainval_loc"]
    arrays["trainval_loc"] = rows[arrays["labels"][rows] != seen_class(arrays)]


def without_samples(arrays: Arrays) -> None:
    arrays["allclasses_names"] = np.append(arrays["allclasses_names"], "nobody")
    arrays["att"] = np.vstack([arrays["att"], arrays["att"][:1] + 1])


def repeat(arrays: Arrays, name: str, other: str) -> None:
    arrays[name] = np.append(arrays[name], arrays[other][0])


def set_to(name: str, value: Any) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.__setitem__(name, value)


REFUSED: list[tuple[Callable[[Arrays], Any], str]] = [
    *((lambda arrays, name=name: arrays.pop(name), rf"lacks {name} \(it needs features, ") for name in zero_shot.KEYS),
    (lambda arrays: [arrays.pop(name) for name in files.LOCATIONS], "lacks trainval_loc, test_seen_loc, test_unseen"),
    # Shapes.
    (lambda arrays: set_to("labels", arrays["labels"][:-1])(arrays),
     r"features has shape \(60, 5\) \(a row per sample\), but \(59, 5\) goes with the labels"),
    (lambda arrays: set_to("features", arrays["features"].T)(arrays),
     r"features has shape \(5, 60\) \(a row per sample\), but \(60, 60\) goes with the labels"),
    (lambda arrays: set_to("att", arrays["att"].T)(arrays),
     r"att has shape \(3, 6\) \(a row per class\), but \(6, 6\) goes with allclasses_names"),
    (lambda arrays: set_to("att", arrays["att"][:5])(arrays), r"att has shape \(5, 3\) .* but \(6, 3\) goes with"),
    (lambda arrays: set_to("attribute_names", arrays["attribute_names"][:2])(arrays),
     r"att has shape \(6, 3\) .* but \(6, 2\) goes with attribute_names"),
    (set_to("features", np.zeros((0, 5))), r"features must be a matrix of numbers, got float64 of shape \("),
    (lambda arrays: set_to("labels", np.stack([arrays["labels"]] * 2))(arrays), "features has shape"),
    (lambda arrays: set_to("trainval_loc", np.stack([arrays["trainval_loc"]] * 2))(arrays),
     "trainval_loc must be a vector of numbers, got"),
    # Values.
    (at("features", (7, 3), np.nan), r"features holds 1 numbers that are not finite, first nan \(sample 7, feature 3,"),
    (at("features", (7, slice(3, 5)), -np.inf), r"features holds 2 numbers that are not finite, first -inf"),
    (at("features", (7, 3), 1e39), r"features holds 1 numbers that are not finite, first 1e\+39"),
    (at("att", (2, 1), np.nan), r"att holds 1 numbers that are not finite, first nan \(class 2, attribute 1, from 0\)"),
    (at("labels", 4, 6), r"labels holds [67](\.0)? at place [45], but a class is one of [01] to [56]"),
    (at("labels", 4, -1), r"labels holds (-1|0)(\.0)? at place [45], but a class is one of [01] to [56]"),
    (at("trainval_loc", 1, 60), r"trainval_loc holds 6[01] at place [12], but a sample is one of [01] to (59|60)"),
    (at("test_seen_loc", 0, 99), r"test_seen_loc holds (99|100) at place [01], but a sample is one of"),
    # Samples and classes.
    *((set_to(name, np.zeros(0, dtype=np.int64)), f"{name} is empty") for name in files.LOCATIONS),
    (lambda arrays: repeat(arrays, "trainval_loc", "trainval_loc"), r"stands in trainval_loc and in trainval_loc \(1"),
    (lambda arrays: repeat(arrays, "trainval_loc", "test_seen_loc"), "stands in trainval_loc and in test_seen_loc"),
    (lambda arrays: repeat(arrays, "trainval_loc", "test_unseen_loc"), "stands in trainval_loc and in test_unseen"),
    (lambda arrays: repeat(arrays, "test_seen_loc", "test_unseen_loc"), "stands in test_seen_loc and in test_unseen_l"),
    (lambda arrays: move(arrays, arrays["trainval_loc"][3], unseen_class(arrays)), r"a class is seen \(trainval"),
    (lambda arrays: move(arrays, arrays["test_seen_loc"][0], unseen_class(arrays)), r"a class is seen \(trainval"),
    (lambda arrays: move(arrays, arrays["test_unseen_loc"][0], seen_class(arrays)), r"a class is seen \(trainval"),
    (without_training, r"a class is seen \(test_seen_loc\), but has no sample in trainval_loc to train with: 'class\."),
    (without_samples, "a class has no sample in trainval_loc, test_seen_loc, test_unseen_loc: 'nobody'"),
    (at("allclasses_names", 1, "class.0"), "allclasses_names names 'class.0' twice"),
    (at("attribute_names", 1, "has::0"), "attribute_names names 'has::0' twice"),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_contradicts_itself_is_refused(
    kind: str, change: Callable[[Arrays], Any], message: str, tmp_path: Path
) -> None:
    """The arrays as a file holds them: for xlsa17 turned, and counted from 1."""
    arrays: dict[str, Any] = dict(with_changes(change))
    where = tmp_path / "SET"
    reader: Callable[..., zero_shot.Published] = zero_shot.published
    if kind == "xlsa17":
        reader = zero_shot.xlsa17
        for name in ("features", "att"):
            arrays |= {name: arrays[name].T} if name in arrays else {}
        for name in ("labels", *files.LOCATIONS):
            arrays |= {name: arrays[name] + 1} if name in arrays else {}
    with pytest.raises(UserError, match=f"{re.escape(str(where))}.*{message}"):
        reader(arrays, where)


@pytest.mark.parametrize("name", ["labels", "trainval_loc"])
@pytest.mark.parametrize("value", [1.5, np.nan, np.inf])
def test_a_number_that_is_not_whole_is_refused(name: str, value: float) -> None:
    arrays = files.benchmark()
    arrays[name] = arrays[name].astype(np.float64)
    arrays[name][3] = value
    with pytest.raises(UserError, match=f"{name} holds {value} at place 3, but"):
        zero_shot.published(arrays, "here")


def test_a_matlab_index_of_0_is_refused() -> None:
    """As uint16 it would be 65535 after the subtraction."""
    left, right = files.as_matlab(files.benchmark())
    right["test_seen_loc"][0] = 0
    with pytest.raises(UserError, match="test_seen_loc holds 0 at place 1, but a sample is one of 1 to 60"):
        zero_shot.xlsa17({**left, **right}, "here")


def test_labels_that_count_from_the_other_number_are_refused() -> None:
    arrays = files.benchmark()
    with pytest.raises(UserError, match=r"labels holds 6 at place .* one of 0 to 5 .* count from 0"):
        zero_shot.published({**arrays, "labels": arrays["labels"] + 1}, "here")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"validation_classes": ["class.9"]}, "`split.validation_classes` of the data set names an unknown class"),
        ({"validation_classes": 4}, "`split.validation_classes` = 4, but 4 classes are seen, and one at least has to"),
        ({"validation_classes": 9}, "`split.validation_classes` = 9, but 4 classes are seen"),
        ({"validation": 0.95}, "have no sample left for training: too few samples for split.validation"),
    ],
)  # fmt: skip
def test_a_split_that_cannot_be_is_refused(split: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        prepared("arrays", files.benchmark(), tmp_path, **split)


def test_an_unseen_class_is_no_validation_class(tmp_path: Path) -> None:
    arrays = files.benchmark()
    name = f"class.{unseen_class(arrays)}"
    with pytest.raises(UserError, match=f"class '{name}' is unseen, and named in `split.validation_classes`"):
        prepared("arrays", arrays, tmp_path, validation_classes=[name])


# Files that cannot be read


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    files.write_matlab(tmp_path / "SET", files.benchmark())
    (tmp_path / "SET" / "att_splits.mat").unlink()
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/SET/att_splits.mat is missing")):
        zero_shot.read_xlsa17(tmp_path / "SET")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/no.npz cannot be read as .npz")):
        zero_shot.read_arrays(tmp_path / "no.npz")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_read_as_it_was(kind: str, tmp_path: Path) -> None:
    """Whatever byte is wrong: never another kind of error, and never other numbers."""
    arrays = files.benchmark()
    files.write(kind, tmp_path, arrays)
    file = tmp_path / ("SET/att_splits.mat" if kind == "xlsa17" else "set.npz")
    whole, before = file.read_bytes(), read(kind, tmp_path)
    complaints = []
    for position in range(0, len(whole), len(whole) // 60):
        for content in (whole[:position], whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :]):
            file.write_bytes(content)
            try:
                found = read(kind, tmp_path)
            except UserError as error:
                complaints.append(str(error))
            else:
                for name in ("features", "labels", "attributes", "trainval", "test_seen", "test_unseen"):
                    np.testing.assert_array_equal(getattr(found, name), getattr(before, name))
    assert len(complaints) > 60
    assert all(str(tmp_path) in complaint for complaint in complaints)


def test_objects_are_not_loaded(tmp_path: Path) -> None:
    """They would be unpickled, and a pickle runs what it likes."""
    arrays: dict[str, Any] = {**files.benchmark(), "allclasses_names": files.cells(["a"] * 6)}
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(UserError, match=r"cannot be read as \.npz of plain arrays \(.*allow_pickle"):
        zero_shot.read_arrays(tmp_path / "set.npz")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("one.npy", "text.npz"):
        with pytest.raises(UserError, match=r"cannot be read as \.npz"):
            zero_shot.read_arrays(tmp_path / name)
