"""What is expected of data with unseen classes: sound data pass, and every planted fault is found with its ids."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from data import zero_shot
from data.errors import UserError
from data.expectations import validate as check
from data.files import sha256
from stages import prepare, validate

sys.path.insert(0, str(Path(__file__).parent))
import zero_shot_sources as files

FOLDER = Path("data/prepared/zero_shot/tiny")
PROOF = Path("data/validated/zero_shot/tiny.json")
BETWEEN = "expect_column_values_to_be_between"
STORED = "expect_column_pair_values_to_be_equal"
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def build(change: Callable[[Arrays], Any] | None = None, **fields: Any) -> None:
    """A project in the working directory with the data set `tiny` of one .npz, prepared by the real stage."""
    arrays = files.benchmark(seen=5, each=12)
    if change is not None:
        change(arrays)
    files.write("arrays", Path("data/raw/toy"), arrays)
    entry = files.published("arrays", validation=0.2, validation_classes=1).model_dump(exclude_none=True)
    rights = {"licence": "none", "credit": "nobody", "redistributable": True}
    source = {"kind": "folder", "path": "unused", "tree_digest": "0" * 64, **rights}
    parameters = {"sources": {"toy": source}, "datasets": {"tiny": {**entry, **fields}}}
    Path("params.yaml").write_text(yaml.safe_dump(parameters))
    prepare.main("tiny")


def edit(change: Callable[[pd.DataFrame], Any]) -> None:
    manifest = pd.read_csv(FOLDER / "manifest.csv", dtype=str)
    change(manifest)
    manifest.to_csv(FOLDER / "manifest.csv", index=False, lineterminator="\n")


def describe(**changes: Any) -> None:
    description = {**zero_shot.describe(FOLDER), **changes}
    (FOLDER / "dataset.json").write_text(json.dumps(description))


def alter(name: str, place: Any, value: Any) -> None:
    array = np.load(FOLDER / f"{name}.npy")
    array[place] = value
    np.save(FOLDER / f"{name}.npy", array)


def facts() -> tuple[pd.DataFrame, list[str], list[str]]:
    """The manifest, names and roles."""
    description = zero_shot.describe(FOLDER)
    return pd.read_csv(FOLDER / "manifest.csv"), description["classes"], description["roles"]


def refused() -> tuple[dict[str, list[str]], str]:
    """The ids per expectation that is not met, and the message."""
    with pytest.raises(UserError) as caught:
        validate.main("tiny")
    assert not PROOF.exists()
    report = json.loads(Path("reports/validation/zero_shot/tiny/findings.json").read_text(encoding="utf-8"))
    return missed(report["findings"]), str(caught.value)


def missed(findings: list[dict[str, Any]]) -> dict[str, list[str]]:
    found = {}
    for finding in findings:
        if not finding["success"]:
            wanted = finding["expectation"]
            columns = [wanted[key] for key in ("column", "column_A", "column_B") if key in wanted]
            found[f"{wanted['type']}({', '.join(columns)})"] = [row["id"] for row in finding["rows"]]
    return found


def test_sound_data_pass() -> None:
    # Two samples of the validation class are dropped.
    build(expect={"samples": 82, "smallest_class": 0.1, "largest_class": 0.2})
    validate.main("tiny")
    assert json.loads(PROOF.read_text())["rows"] == {"manifest": 82, "classes": 7, "attributes": 3}


def test_data_without_validation_pass() -> None:
    build(split={"validation": 0.0})
    assert zero_shot.describe(FOLDER)["samples"]["validation"] == 0
    validate.main("tiny")


def test_a_sample_in_two_splits_is_found() -> None:
    def change(arrays: Arrays) -> None:
        first, second = arrays["trainval_loc"][0], arrays["test_unseen_loc"][0]
        arrays["features"][second] = arrays["features"][first]
        ids.extend(f"sample-{row:06d}" for row in sorted((first, second)))

    ids: list[str] = []
    build(change)
    found, message = refused()
    assert found == {f"{BETWEEN}(splits_of_content)": ids}
    assert "the same sample never stands in two splits; 2 rows are not so" in message


def test_features_that_are_negative_or_no_numbers_are_found() -> None:
    build(lambda arrays: arrays["features"].__setitem__((np.array([3, 70]), 1), -0.5))
    alter("features", (17, slice(2)), np.nan)
    alter("features", (18, 0), np.inf)
    manifest, _, _ = facts()
    changed = manifest["id"][[17, 18]].tolist()
    found, message = refused()
    assert found == {
        f"{BETWEEN}(wrong_numbers)": sorted(["sample-000003", "sample-000070", *changed]),
        f"{STORED}(sha256, stored_sha256)": changed,
    }
    assert (
        f"all features are finite and not negative; 4 rows are not so: sample-000003 (1), {changed[0]} (2)" in message
    )


def test_what_was_changed_after_preparation_is_found() -> None:
    build()
    manifest, _, roles = facts()
    seen = [label for label, role in enumerate(roles) if role == "seen"]
    row = int(np.flatnonzero((manifest["label"] == seen[0]) & (manifest["split"] == "train"))[0])
    alter("features", (3, 0), 0.123)
    alter("labels", row, seen[1])
    assert refused()[0] == {
        f"{STORED}(label, stored_label)": [manifest["id"][row]],
        f"{STORED}(sha256, stored_sha256)": [manifest["id"][3]],
    }


def test_a_label_out_of_range_is_found() -> None:
    build()
    manifest, _, _ = facts()
    edit(lambda table: table.loc.__setitem__((5, "label"), "9"))
    found, _ = refused()
    assert found["expect_column_values_to_be_in_set(label)"] == [manifest["id"][5]]


def test_a_training_sample_of_an_unseen_or_a_validation_class_is_found() -> None:
    build()
    manifest, names, roles = facts()
    wrong = []
    for role in ("validation", "unseen"):
        row = int(np.flatnonzero(manifest["label"].isin([label for label, one in enumerate(roles) if one == role]))[0])
        edit(lambda table, row=row: table.loc.__setitem__((row, "split"), "train"))  # type: ignore[misc]
        wrong.append(names[manifest["label"][row]])
    found, message = refused()
    assert found == {f"{BETWEEN}(misplaced)": sorted(wrong, key=names.index)}
    assert "no sample of a validation class is outside validation, none of an unseen one outside test" in message


def test_a_class_that_is_said_to_be_unseen_and_trained_on_is_found() -> None:
    build()
    _, names, roles = facts()
    label = roles.index("seen")
    describe(roles=["unseen" if place == label else role for place, role in enumerate(roles)])
    assert refused()[0] == {f"{BETWEEN}(misplaced)": [names[label]]}


def test_a_class_in_both_sets_is_found() -> None:
    """One name with two roles."""
    build()
    _, names, roles = facts()
    seen, unseen = roles.index("seen"), roles.index("unseen")
    describe(classes=[names[seen] if place == unseen else name for place, name in enumerate(names)])
    assert refused()[0] == {"expect_column_values_to_be_unique(id)": [names[seen]] * 2}


def test_an_unknown_role_and_no_unseen_class_are_found() -> None:
    build()
    _, names, roles = facts()
    describe(roles=["seenn" if role == "unseen" else role for role in roles])
    found, message = refused()
    unseen = [name for name, role in zip(names, roles, strict=True) if role == "unseen"]
    assert found == {
        "expect_column_values_to_be_in_set(role)": unseen,
        "expect_column_distinct_values_to_contain_set(role)": [],
        f"{BETWEEN}(misplaced)": unseen,
    }
    assert "some classes are seen, and some unseen" in message


def test_classes_without_the_samples_of_their_roles_are_found() -> None:
    build(split={"validation": 0.2, "validation_classes": 2})
    manifest, names, roles = facts()
    seen = [label for label, role in enumerate(roles) if role == "seen"]
    lost = {seen[0]: "train", seen[2]: "test", roles.index("validation"): "validation", roles.index("unseen"): "test"}
    kept = np.array([lost.get(row.label) != row.split for row in manifest.itertuples()])
    manifest[kept].to_csv(FOLDER / "manifest.csv", index=False, lineterminator="\n")
    for name in ("features", "labels"):
        np.save(FOLDER / f"{name}.npy", np.load(FOLDER / f"{name}.npy")[kept])
    found, message = refused()
    assert found == {f"{BETWEEN}(lacking)": [names[label] for label in sorted(lost)]}
    assert "seen classes have samples to train and test with, validation and unseen ones of their split" in message


def test_a_published_class_that_is_not_tested_is_found() -> None:
    def change(arrays: Arrays) -> None:
        tested = arrays["test_seen_loc"]
        seen = sorted(set(arrays["labels"][tested].tolist()))
        arrays["test_seen_loc"] = tested[~np.isin(arrays["labels"][tested], seen[:2])]
        names.extend(f"class.{label}" for label in seen[:2])

    names: list[str] = []
    build(change, split={"validation": 0.1})
    assert refused()[0] == {f"{BETWEEN}(lacking)": names}


def test_attributes_that_tell_nothing_are_found() -> None:
    """No numbers, a constant attribute, and two classes with the same ones, of which 0 and -0 are the same."""

    def change(arrays: Arrays) -> None:
        arrays["att"][:, 2] = 0.25
        arrays["att"][1, 0] = 0.0
        arrays["att"][4] = arrays["att"][1]
        arrays["att"][4, 0] = -0.0

    build(change)
    alter("attributes", (2, 1), np.nan)
    found, message = refused()
    assert found == {
        f"{BETWEEN}(wrong_numbers)": ["class.2"],
        f"{BETWEEN}(alike)": ["class.1", "class.4"],
        f"{BETWEEN}(values)": ["has::2"],
    }
    assert "all attributes are finite; 1 row is not so: class.2 (1)" in message
    assert "no two classes have the same attributes; 2 rows are not so" in message
    assert "no attribute is the same for all classes; 1 row is not so: has::2 (1)" in message


def test_classes_out_of_balance_and_other_numbers_of_samples_are_found() -> None:
    build(expect={"samples": 83, "smallest_class": 0.13, "largest_class": 0.145})
    manifest, names, _ = facts()
    counts = manifest["label"].value_counts()
    found, message = refused()
    assert found == {
        "expect_table_row_count_to_equal()": [],
        f"{BETWEEN}(share)": [names[label] for label in range(7) if not 0.13 <= counts[label] / 82 <= 0.145],
    }
    assert len(found[f"{BETWEEN}(share)"]) == 7
    assert "the number of rows must be 83; found 82" in message


def test_missing_values_are_found() -> None:
    build()

    def change(manifest: pd.DataFrame) -> None:
        for row, column in enumerate(zero_shot.COLUMNS):
            manifest.loc[row, column] = ""

    ids = facts()[0]["id"].tolist()
    edit(change)
    found = {name: rows for name, rows in refused()[0].items() if "not_be_null" in name}
    assert found == {
        f"expect_column_values_to_not_be_null({column})": [ids[row] if column != "id" else None]
        for row, column in enumerate(zero_shot.COLUMNS)
    }


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda: np.save(FOLDER / "features.npy", np.zeros((82, 4), np.float32)), "holds float32 of shape (82, 4)"),
        (lambda: np.save(FOLDER / "features.npy", np.zeros((82, 5))), "holds float64 of shape (82, 5); manifest and"),
        (lambda: np.save(FOLDER / "labels.npy", np.zeros(81, np.int64)), "labels.npy holds int64 of shape (81,)"),
        (lambda: np.save(FOLDER / "attributes.npy", np.zeros((6, 3), np.float32)), "float32 of shape (6, 3); manifest"),
        (lambda: (FOLDER / "features.npy").write_bytes(b"\x93NUMPY"), "features.npy cannot be read"),
        ((FOLDER / "attributes.npy").unlink, "attributes.npy cannot be read"),
        (lambda: describe(roles=["seen"] * 6), "has 7 classes, but 6 roles"),
        (lambda: edit(lambda manifest: manifest.__delitem__("sha256")), "'sha256'"),
        (lambda: (FOLDER / "dataset.json").write_text("{"), "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_the_users(damage: Callable[[], Any], complaint: str) -> None:
    build()
    damage()
    with pytest.raises(UserError) as caught:
        validate.main("tiny")
    assert complaint in str(caught.value)
    assert not PROOF.exists()


# Images, and features of them


class Encoder(nn.Module):
    def forward(self, images: torch.Tensor) -> Any:
        return SimpleNamespace(features=images.flatten(1) @ torch.linspace(0, 1, 784 * 4).reshape(784, 4))


def with_images(encoded: bool) -> tuple[Path, Any]:
    raw, entry = Path("raw"), files.renderings(expect={"samples": 300, "smallest_class": 0.01})
    files.write_digits(raw / "digits.csv.gz", *files.some_digits(30))
    images = files.prepared(raw, entry, Path("images"))
    if not encoded:
        return images, entry
    description = SimpleNamespace(
        name="small",
        dataset={"name": "images", "digest": sha256(images / "manifest.csv")},
        recipe={"training": {"threads": 1}},
    )
    Path("features").mkdir()
    zero_shot.prepare_encoded(raw, entry, Path("features"), files.PROVENANCE, Encoder(), description)
    return Path("features"), entry


def missed_in(folder: Path, entry: Any) -> dict[str, list[str]]:
    docs = Path("docs")
    docs.mkdir()
    expected = zero_shot.expectations(entry, zero_shot.describe(folder))
    return missed([finding.plain() for finding in check("tiny", zero_shot.tables(folder), expected, docs)])


@pytest.mark.parametrize("encoded", [False, True])
def test_sound_images_and_their_features_pass(encoded: bool) -> None:
    assert missed_in(*with_images(encoded)) == {}


def test_a_changed_and_a_blank_image_are_found() -> None:
    folder, entry = with_images(encoded=False)
    images, manifest = np.load(folder / "images.npy"), pd.read_csv(folder / "manifest.csv")
    images[5, 0, 3, 3] += 1
    np.save(folder / "images.npy", images)
    manifest.loc[7, "spread"] = 0
    manifest.to_csv(folder / "manifest.csv", index=False)
    assert missed_in(folder, entry) == {
        f"{STORED}(sha256, stored_sha256)": ["sample-000005"],
        f"{BETWEEN}(spread)": ["sample-000007"],
    }


def test_features_and_images_are_both_compared_with_what_was_prepared() -> None:
    folder, entry = with_images(encoded=True)
    for name, row in (("images", 4), ("features", 6)):
        array = np.load(folder / f"{name}.npy")
        array[row].flat[0] += 1
        np.save(folder / f"{name}.npy", array)
    assert missed_in(folder, entry) == {
        f"{STORED}(sha256, stored_sha256)": ["sample-000006"],
        f"{STORED}(image_sha256, stored_image_sha256)": ["sample-000004"],
    }


def test_one_image_in_two_splits_is_found_whatever_its_features() -> None:
    folder, entry = with_images(encoded=True)
    manifest = pd.read_csv(folder / "manifest.csv")
    rows = [int(np.flatnonzero(manifest["split"] == part)[0]) for part in ("train", "test")]
    images = np.load(folder / "images.npy")
    images[rows[1]] = images[rows[0]]
    np.save(folder / "images.npy", images)
    manifest.loc[rows[1], "image_sha256"] = manifest.loc[rows[0], "image_sha256"]
    manifest.to_csv(folder / "manifest.csv", index=False)
    assert missed_in(folder, entry) == {f"{BETWEEN}(splits_of_content)": manifest["id"].iloc[sorted(rows)].tolist()}
