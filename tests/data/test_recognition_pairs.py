"""Pairs for verification: drawn within folds or read as LFW lists them, and planted faults are found."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import recognition
from data.errors import UserError
from data.expectations import validate as check
from data.files import tree_digest
from data.recognition import describe, draw_pairs, load, pairs, prepare
from stages.parameters.recognition import Dataset

PROVENANCE = {"name": "toy", "licence": "none", "credit": "random numbers", "redistributable": True}


def dataset(**fields: Any) -> Dataset:
    entry = {"task": "recognition", "source": "toy", "encoder": "none", "image_size": 4, "channels": 1}
    return Dataset.model_validate({**entry, **fields})


def by_classes(validation: int, test: int, seed: int = 0) -> dict[str, Any]:
    return {"by": "classes", "validation": validation, "test": test, "seed": seed}


# Drawn


@st.composite
def held_out(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Labels in any order, their splits, and a number of folds that they are enough for."""
    folds = draw(st.integers(2, 3))
    counts = draw(st.lists(st.integers(2, 5), min_size=4 * folds + 1, max_size=4 * folds + 4))
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(draw(st.integers(0, 99))).permutation(labels)
    test = draw(st.integers(2 * folds, len(counts) - 2 * folds - 1))
    names = np.array(["train"] + ["validation"] * (len(counts) - 1 - test) + ["test"] * test, dtype=object)
    return labels, names[labels], folds


@settings(deadline=None, max_examples=60)
@given(held_out(), st.integers(0, 99))
def test_a_fold_has_all_pairs_of_its_classes_and_as_many_of_two(
    case: tuple[np.ndarray, np.ndarray, int], seed: int
) -> None:
    labels, part, folds = case
    table = draw_pairs(labels, part, folds, seed)
    assert set(table["split"]) == {"validation", "test"}
    for name in ("validation", "test"):
        classes = sorted(set(labels[part == name]))
        for fold in range(folds):
            own = [label for place, label in enumerate(classes) if place % folds == fold]
            rows = [row for row in range(len(labels)) if labels[row] in own]
            everything = {frozenset(pair) for pair in itertools.combinations(rows, 2)}
            same = {pair for pair in everything if len({labels[row] for row in pair}) == 1}
            chosen = table[(table["split"] == name) & (table["fold"] == fold)]
            found = {
                kind: [frozenset(pair) for pair in zip(some["first"], some["second"], strict=True)]
                for kind, some in ((kind, chosen[chosen["same"] == kind]) for kind in (0, 1))
            }
            assert Counter(found[1]) == Counter(same)
            assert set(found[0]) <= everything - same
            assert len(set(found[0])) == len(found[0]) == min(len(same), len(everything - same))
    assert len(table) == len(table.drop_duplicates(["first", "second"]))
    pd.testing.assert_frame_equal(table, draw_pairs(labels, part, folds, seed))


def test_every_pair_of_two_classes_is_equally_likely() -> None:
    labels = np.repeat(np.arange(9), [1, 2, 2, 2, 2, 2, 2, 3, 3])
    part = np.where(labels == 0, "train", np.where(labels < 5, "validation", "test")).astype(object)
    drawn: Counter[tuple[int, int]] = Counter()
    runs = 500
    for seed in range(runs):
        table = draw_pairs(labels, part, 2, seed)
        wanted = table[(table["split"] == "test") & (table["fold"] == 0) & (table["same"] == 0)]
        drawn.update(zip(wanted["first"], wanted["second"], strict=True))
    # Fold 0 has the classes 5 and 7 of 2 and 3 images: 1 + 3 pairs of one class, 4 of the 6 pairs of two.
    first, second = np.flatnonzero(labels == 5), np.flatnonzero(labels == 7)
    assert drawn.keys() == set(itertools.product(first.tolist(), second.tolist()))
    for count in drawn.values():
        assert abs(count - runs * 4 / 6) < 5 * np.sqrt(runs * 2 / 9)


def test_both_splits_draw_for_themselves() -> None:
    """The pairs of the test split do not depend on how many classes select."""
    labels = np.repeat(np.arange(20), 6)
    few = draw_pairs(labels, np.repeat(["train", "validation", "test"], [72, 24, 24]).astype(object), 2, 0)
    many = draw_pairs(labels, np.repeat(["train", "validation", "test"], [48, 48, 24]).astype(object), 2, 0)
    first, second = (table[table["split"] == "test"].reset_index(drop=True) for table in (few, many))
    pd.testing.assert_frame_equal(first, second)
    assert not draw_pairs(labels, np.repeat(["train", "validation", "test"], [72, 24, 24]).astype(object), 2, 1).equals(
        few
    )


def arrays(folder: Path, counts: list[int], **fields: Any) -> Path:
    """A prepared set of arrays with so many images per class, in a random order."""
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.repeat(np.arange(len(counts)), counts))
    images = generator.integers(0, 256, (len(labels), 4, 4), dtype=np.uint8)
    np.savez(folder / "toy.npz", images=images, labels=labels)
    output = folder / f"out {len(list(folder.iterdir()))}"
    output.mkdir()
    prepare(folder, dataset(format="arrays", file="toy.npz", **fields), output, PROVENANCE)
    return output


def test_pairs_are_found_again_among_the_samples_of_their_split(tmp_path: Path) -> None:
    folder = arrays(tmp_path, [3] * 13, split=by_classes(5, 6), verification={"folds": 2})
    assert describe(folder)["verification"] == {"folds": 2, "pairs": {"validation": 30, "test": 36}}
    table = pd.read_csv(folder / "pairs.csv")
    assert table.columns.tolist() == ["split", "fold", "first", "second", "same"]
    for part in ("train", "validation", "test"):
        ids, _, labels = load(folder, part)
        found = pairs(folder, part)
        rows = zip(found.fold, found.first, found.second, found.same, strict=True)
        read = [(fold, ids[first], ids[second], same) for fold, first, second, same in rows]
        assert read == list(table[table["split"] == part].drop(columns="split").itertuples(index=False, name=None))
        assert (labels.numpy()[found.first] == labels.numpy()[found.second]).tolist() == found.same.tolist()
        assert [array.dtype for array in found] == [np.int64, np.int64, np.int64, bool]
    again = arrays(tmp_path, [3] * 13, split=by_classes(5, 6), verification={"folds": 2})
    assert tree_digest(again) == tree_digest(folder)
    other = arrays(tmp_path, [3] * 13, split=by_classes(5, 6, seed=1), verification={"folds": 2})
    assert (other / "pairs.csv").read_bytes() != (folder / "pairs.csv").read_bytes()
    assert (other / "manifest.csv").read_bytes() == (folder / "manifest.csv").read_bytes()


def test_without_verification_there_are_no_pairs(tmp_path: Path) -> None:
    folder = arrays(tmp_path, [3] * 5, split=by_classes(2, 2))
    assert describe(folder)["verification"] is None
    assert [len(array) for array in pairs(folder, "test")] == [0, 0, 0, 0]
    assert not (folder / "pairs.csv").exists()


def test_too_few_classes_for_the_folds_are_refused(tmp_path: Path) -> None:
    arrays(tmp_path, [3] * 9, split=by_classes(4, 4), verification={"folds": 2})
    message = "the 3 classes of split.validation make no 2 folds of two at least · hold 4 out, or lower"
    with pytest.raises(UserError, match=re.escape(message)):
        arrays(tmp_path, [3] * 9, split=by_classes(3, 4), verification={"folds": 2})
    with pytest.raises(UserError, match=r"the 19 classes of split.test make no 10 folds .* to 9$"):
        arrays(tmp_path, [3] * 40, split=by_classes(20, 19), verification={})


# Listed

PEOPLE = {"Ann_A": 3, "Bob_B": 1, "Cid_C": 2, "Dan_D": 2, "Eve_E": 2, "Flo_F": 1, "Gus_G": 2}
LIST = """2\t2
Ann_A\t1\t3
Dan_D\t1\t2
Ann_A\t2\tBob_B\t1
Dan_D\t1\tAnn_A\t1
Gus_G\t1\t2
Ann_A\t1\t2
Gus_G\t2\tBob_B\t1
Bob_B\t1\tDan_D\t2
"""
NAMED = ["Ann_A", "Bob_B", "Dan_D", "Gus_G"]


def people(folder: Path, text: str = LIST, **fields: Any) -> Path:
    """A prepared set of folders of people, with their list of pairs."""
    for place, (name, count) in enumerate(PEOPLE.items()):
        for number in range(1, count + 1):
            path = folder / "raw" / "faces" / name / f"{name}_{number:04d}.{'jpg' if number % 2 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([place, number]).integers(0, 256, (4, 4), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    (folder / "raw" / "pairs.txt").write_bytes(text.encode())
    output = folder / f"out {len(list(folder.iterdir()))}"
    output.mkdir()
    fields = {"split": by_classes(1, 4), "verification": {"folds": 2, "pairs": "pairs.txt"}, **fields}
    prepare(folder / "raw", dataset(format="folder", folder="faces", **fields), output, PROVENANCE)
    return output


def stem(name: str, number: str) -> str:
    return f"{name}/{name}_{int(number):04d}"


@pytest.mark.parametrize(
    "change", [str, lambda text: text.replace("\t", "  "), lambda text: text.replace("\n", "\r\n")]
)
def test_a_list_is_read_as_it_stands(tmp_path: Path, change: Callable[[str], str]) -> None:
    folder = people(tmp_path, change(LIST) + "\n\n")
    expected = []
    for index, line in enumerate(LIST.splitlines()[1:]):
        words = line.split("\t")
        same = len(words) == 3
        second = stem(words[0], words[2]) if same else stem(words[2], words[3])
        expected.append(("test", index // 4, stem(words[0], words[1]), second, int(same)))
    table = pd.read_csv(folder / "pairs.csv")
    for name in ("first", "second"):
        table[name] = table[name].str.rsplit(".", n=1).str[0]
    assert list(table.itertuples(index=False, name=None)) == expected
    assert describe(folder)["verification"] == {"folds": 2, "pairs": {"test": 8}}
    assert len(pairs(folder, "validation").first) == 0


def test_whoever_is_listed_is_tested_on(tmp_path: Path) -> None:
    """Also those with one image: the list says what they are compared with."""
    folder = people(tmp_path)
    description = describe(folder)
    assert (description["classes"], description["held_out"]) == (["Cid_C", "Eve_E"], ["Flo_F", *NAMED])
    ids, _, labels = load(folder, "test")
    names = recognition.class_names(description)
    assert [names[label] for label in labels] == [name.split("/")[0] for name in ids]
    assert set(load(folder, "validation")[0]) == {"Flo_F/Flo_F_0001.jpg"}


def test_the_order_of_classes_that_is_given_stays(tmp_path: Path) -> None:
    order = ["Eve_E", "Cid_C", "Flo_F", *reversed(NAMED)]
    assert recognition.class_names(describe(people(tmp_path, classes=order))) == order
    with pytest.raises(
        UserError, match=r"line 4: Ann_A/Ann_A_0002.png is in train and Bob_B/Bob_B_0001.jpg in validation"
    ):
        people(tmp_path, classes=list(PEOPLE), split=by_classes(1, 5))


def test_a_pair_in_two_splits_is_refused_with_what_to_hold_out(tmp_path: Path) -> None:
    message = r"line 4: .* is in validation and .* in test \(2 of 8 pairs .* `split.test: 4`"
    with pytest.raises(UserError, match=message):
        people(tmp_path, split=by_classes(1, 3))


def test_a_list_may_stand_beside_a_split_by_samples(tmp_path: Path) -> None:
    """Pairs are then of people who are trained on, in whatever split both of their images are."""
    for place, name in enumerate(("Ann_A", "Bob_B")):
        for number in range(1, 21):
            path = tmp_path / name / f"{name}_{number:04d}.png"
            path.parent.mkdir(exist_ok=True)
            pixels = np.random.default_rng([place, number]).integers(0, 256, (4, 4), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    fields: dict[str, Any] = {"format": "folder", "split": {"validation": 10, "test": 10}}
    for name in ("plain", "listed", "apart"):
        (tmp_path / f".{name}").mkdir()
    prepare(tmp_path, dataset(**fields), tmp_path / ".plain", PROVENANCE)
    lines = ["2\t1"]
    fields["verification"] = {"folds": 2, "pairs": "pairs.txt"}
    for part in ("validation", "test"):
        own = {name: [file[-8:-4] for file in load(tmp_path / ".plain", part)[0] if name in file] for name in PEOPLE}
        lines += [f"Ann_A\t{own['Ann_A'][0]}\t{own['Ann_A'][1]}", f"Ann_A\t{own['Ann_A'][0]}\tBob_B\t{own['Bob_B'][0]}"]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    prepare(tmp_path, dataset(**fields), tmp_path / ".listed", PROVENANCE)
    assert describe(tmp_path / ".listed")["verification"] == {"folds": 2, "pairs": {"validation": 2, "test": 2}}
    assert pairs(tmp_path / ".listed", "validation").same.tolist() == [True, False]
    assert describe(tmp_path / ".listed")["held_out"] == []
    lines[1] = f"Ann_A\t{lines[1][-4:]}\t{lines[3][-4:]}"
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"line 2: .* is in validation and .* in test \(1 of 4 pairs"):
        prepare(tmp_path, dataset(**fields), tmp_path / ".apart", PROVENANCE)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (LIST, "", "is no list of pairs"),
        (LIST, "x\n", "is no list of pairs"),
        ("2\t2\n", "2\n", "is no list of pairs"),
        ("2\t2\n", "2\t2\t2\n", "is no list of pairs"),
        (LIST, "2\t0\n", "announces 2 folds of 0 pairs"),
        ("2\t2\n", "4\t1\n", "announces 4 folds of 1 pairs of one class and 1 of two, and has 8 pairs"),
        ("2\t2\n", "2\t3\n", "announces 2 folds of 3 pairs of one class and 3 of two, and has 8 pairs"),
        ("Bob_B\t1\tDan_D\t2\n", "", "announces 2 folds of 2 pairs of one class and 2 of two, and has 7 pairs"),
        ("Gus_G\t2\tBob_B", "Gus_X\t2\tBob_B", "line 8: no class is called 'Gus_X'"),
        ("Gus_G\t2\tBob_B", "Gus_G\t2\tBob", "line 8: no class is called 'Bob'"),
        ("Ann_A\t1\t3", "Ann_A\t1\t4", "line 2: class 'Ann_A' has no image Ann_A_0004"),
        ("Ann_A\t1\t3", "Ann_A\tx\t3", "line 2: class 'Ann_A' has no image Ann_A_000x"),
        ("Ann_A\t2\tBob_B\t1", "Ann_A\t2\tBob_B\t2", "line 4: class 'Bob_B' has no image Bob_B_0002"),
        ("Ann_A\t2\tBob_B\t1", "Ann_A\t2\t1", "line 4: 'Ann_A\\t2\\t1' has 3 columns, but a pair of two has 4"),
        ("Ann_A\t1\t2", "Ann_A\t1\tBob_B\t1", "line 7: 'Ann_A\\t1\\tBob_B\\t1' has 4 columns, but a pair of one class"),
        ("Gus_G\t1\t2", "", "line 6: '' has 0 columns"),
    ],
)
def test_a_wrong_list_is_refused_by_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert LIST.count(old) == 1
    file = re.escape(str(tmp_path / "raw" / "pairs.txt"))
    with pytest.raises(UserError, match=file + ",? " + re.escape(message)):
        people(tmp_path, LIST.replace(old, new))


def test_a_list_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'raw' / 'no.txt'} is no list of pairs")):
        people(tmp_path, verification={"folds": 2, "pairs": "no.txt"})


# What is expected


def missed(folder: Path, output: Path, entry: Dataset) -> dict[str, list[str | None]]:
    """The ids per sentence of what is not met."""
    expected = recognition.expectations(entry, describe(folder))
    findings = check("toy", recognition.tables(folder), expected, output)
    assert all(finding.error is None for finding in findings)
    return {
        finding.sentence.split("; ")[0].replace("folds: ", "").replace("pairs: ", ""): [row.id for row in finding.rows]
        for finding in findings
        if not finding.success
    }


def edit(file: Path, change: Callable[[pd.DataFrame], Any]) -> None:
    table = pd.read_csv(file)
    changed = change(table)
    (table if changed is None else changed).to_csv(file, index=False, lineterminator="\n")


def test_sound_data_pass(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"split": by_classes(4, 4), "verification": {"folds": 2}}
    folder = arrays(tmp_path, [3] * 10, **fields)
    assert missed(folder, tmp_path, dataset(format="arrays", file="toy.npz", **fields)) == {}
    listed: dict[str, Any] = {"split": by_classes(1, 4), "verification": {"folds": 2, "pairs": "pairs.txt"}}
    assert missed(people(tmp_path), tmp_path, dataset(format="folder", **listed)) == {}


def test_planted_faults_among_pairs_are_found(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"split": by_classes(4, 4), "verification": {"folds": 2}}
    folder = arrays(tmp_path, [3] * 10, **fields)
    sound = pd.read_csv(folder / "pairs.csv")
    trained = load(folder, "train")[0][0]
    named = (sound["first"] + " and " + sound["second"]).tolist()
    another = f"{trained} and {sound['second'][30]}"

    def change(table: Any) -> Any:
        table.loc[0, "same"] = 0
        table.loc[1, ["first", "second"]] = table.loc[2, ["second", "first"]].tolist()
        table.loc[30, "first"] = trained
        table.loc[31, "second"] = table.loc[31, "first"]
        table.loc[32, "second"] = "nobody"
        # In the last fold nobody is the same.
        return table[~((table["split"] == "test") & (table["fold"] == 1) & (table["same"] == 1))]

    assert (sound["split"][[0, 1, 2]] == "validation").all()
    assert (sound["same"][[0, 1, 2]] == 1).all()
    assert ((sound["split"] == "test") & (sound["fold"] == 0) & (sound["same"] == 0))[[30, 31, 32]].all()
    edit(folder / "pairs.csv", change)
    twice = [f"{sound['second'][2]} and {sound['first'][2]}", named[2]]
    nobody = f"{sound['first'][32]} and nobody"
    itself = f"{sound['first'][31]} and {sound['first'][31]}"
    found = missed(folder, tmp_path, dataset(format="arrays", file="toy.npz", **fields))
    assert found.pop("the number of rows must be 48") == []
    assert found == {
        "the first image of a pair is in its split": [another],
        "the second image of a pair is in its split": [nobody],
        "a pair is the same exactly if both labels are": [named[0], itself],
        "no image is compared with itself": [itself],
        "no pair stands there twice": twice,
        "every fold has pairs of one class": ["test/1"],
    }


def test_classes_in_the_wrong_split_are_found(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"split": by_classes(4, 4)}
    entry = dataset(format="arrays", file="toy.npz", **fields)
    folder = arrays(tmp_path, [3] * 10, **fields)
    # One image of class 9 is trained on; class 1 is tested on; nothing is left of class 5.
    edit(folder / "manifest.csv", lambda table: table.__setitem__("split", _moved(table)))
    found = missed(folder, tmp_path, entry)
    assert found == {
        "balance: no class stands in two splits": ["train/9"],
        "balance: exactly the first classes are trained on": ["test/1", "train/9"],
    }
    description = json.loads((folder / "dataset.json").read_text())
    description["held_out"].append("nobody")
    (folder / "dataset.json").write_text(json.dumps(description))
    assert missed(folder, tmp_path, entry)["balance: every class has a sample"] == ["none/nobody"]


def _moved(table: pd.DataFrame) -> pd.Series:
    split = table["split"].where(table["label"] != 1, "test")
    split[table.index[table["label"] == 9][0]] = "train"
    return split
