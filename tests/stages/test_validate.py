"""`python -m stages.validate`: sound data pass, every planted fault is found and its rows are named."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from data.errors import UserError
from data.splits import split
from stages import paths, prepare, validate

ROOT = Path(__file__).resolve().parents[2]
CLASSES, PER_CLASS, SIZE = 3, 20, 4
TOTAL = CLASSES * PER_CLASS
WANTED = {"validation": 12, "test": 12}
PREPARED = Path("data/prepared/recognition/tiny")
PROOF = Path("data/validated/recognition/tiny.json")
REPORT = Path("reports/validation/recognition/tiny")
IMAGES_STORED = "expect_column_pair_values_to_be_equal(sha256, stored_sha256)"
LABELS_STORED = "expect_column_pair_values_to_be_equal(label, stored_label)"


def pixels_and_labels() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    return generator.integers(0, 256, (TOTAL, SIZE * SIZE)), np.repeat(np.arange(CLASSES), PER_CLASS)


def build(pixels: np.ndarray, labels: np.ndarray, **expect: Any) -> None:
    """A project in the working directory with the data set `tiny`, prepared by the real stage."""
    parameters = {
        "sources": {
            "tiny": {
                "kind": "folder",
                "path": "unused",
                "tree_digest": "0" * 64,
                "licence": "none",
                "credit": "random numbers",
                "redistributable": True,
            }
        },
        "datasets": {
            "tiny": {
                "task": "recognition",
                "source": "tiny",
                "encoder": "none",
                "format": "csv",
                "file": "tiny.csv",
                "image_size": SIZE,
                "channels": 1,
                "classes": ["x", "y", "z"],
                "split": {**WANTED, "seed": 0},
                "expect": expect,
            }
        },
    }
    Path("params.yaml").write_text(yaml.safe_dump(parameters), encoding="utf-8")
    raw = Path("data/raw/tiny")
    raw.mkdir(parents=True)
    np.savetxt(raw / "tiny.csv", np.column_stack([pixels, labels]), fmt="%d", delimiter=",")
    prepare.main("tiny")


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def edit(change: Callable[[pd.DataFrame], Any]) -> None:
    """Change manifest.csv, value by value as text."""
    manifest = pd.read_csv(PREPARED / "manifest.csv", dtype=str, keep_default_na=False)
    changed = change(manifest)
    (manifest if changed is None else changed).to_csv(PREPARED / "manifest.csv", index=False, lineterminator="\n")


def put(row: int, column: str, value: str) -> None:
    def change(manifest: pd.DataFrame) -> None:
        manifest.loc[row, column] = value

    edit(change)


def sample(row: int) -> str:
    return f"row-{row:06d}"


def refused() -> tuple[str, dict[str, list[str]], dict[str, Any]]:
    """Validate, with an old proof lying about: the message, the ids per expectation not met, findings.json."""
    PROOF.parent.mkdir(parents=True, exist_ok=True)
    PROOF.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        validate.main("tiny")
    assert not PROOF.exists()
    report = json.loads((REPORT / "findings.json").read_text(encoding="utf-8"))
    assert report["success"] is False
    assert list(REPORT.parent.iterdir()) == [REPORT]
    missed = {
        name(found["expectation"]): [row["id"] for row in found["rows"]]
        for found in report["findings"]
        if not found["success"]
    }
    return str(caught.value), missed, report


def name(expectation: dict[str, Any]) -> str:
    columns = [expectation[key] for key in ("column", "column_A", "column_B") if key in expectation]
    return f"{expectation['type']}({', '.join(columns)})"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command line, in the project."""
    return subprocess.run(
        [sys.executable, "-m", "stages.validate", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_sound_data_pass_with_the_same_bytes_every_time() -> None:
    build(*pixels_and_labels(), samples=TOTAL, smallest_class=0.2, largest_class=0.5)
    validate.main("tiny")
    first = PROOF.read_bytes()
    done = run("tiny", PYTHONHASHSEED="1", TZ="Asia/Tokyo")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert PROOF.read_bytes() == first

    proof = json.loads(first)
    assert proof["manifest"] == hashlib.sha256((PREPARED / "manifest.csv").read_bytes()).hexdigest()
    assert proof["rows"] == {"manifest": TOTAL, "balance": 3 * CLASSES}
    assert (proof["dataset"], proof["task"]) == ("tiny", "recognition")
    # What was expected is no part of the proof: expecting something else of the same data trains nothing again.
    assert set(proof) == {"dataset", "task", "manifest", "rows"}

    report = json.loads((REPORT / "findings.json").read_text(encoding="utf-8"))
    assert (report["success"], report["error"]) == (True, None)
    met = [found["expectation"] for found in report["findings"]]
    assert {"type": "expect_table_row_count_to_equal", "value": TOTAL} in met
    assert {name(expectation) for expectation in met} >= {IMAGES_STORED, LABELS_STORED}
    assert met[-1]["min_value"] == 0.2
    assert all(found["success"] and not found["rows"] for found in report["findings"])
    assert (REPORT / "index.html").is_file()


def test_a_proof_holds_for_the_data_it_was_given_for() -> None:
    build(*pixels_and_labels())
    with pytest.raises(UserError, match="has not passed validation"):
        paths.require_validated("recognition", "tiny")
    validate.main("tiny")
    paths.require_validated("recognition", "tiny")
    put(7, "split", "test")
    with pytest.raises(UserError, match="changed since it passed validation"):
        paths.require_validated("recognition", "tiny")


def test_the_command_fails_with_one_readable_paragraph() -> None:
    build(*pixels_and_labels())
    put(7, "label", "12")
    done = run("tiny")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error in validate tiny: data set 'tiny' does not meet ")
    assert done.stderr.count("\n") == 1
    assert f"label must be one of 0, 1, 2; 1 row is not so: {sample(7)} (12)" in done.stderr
    assert str(REPORT / "findings.json") in done.stderr
    assert "datasets.tiny" in done.stderr
    assert not PROOF.exists()
    assert (REPORT / "index.html").is_file()


def test_the_same_image_in_training_and_test_is_found() -> None:
    pixels, labels = pixels_and_labels()
    part = split(labels, WANTED, 0)
    here, there = np.flatnonzero(part == "train")[3], np.flatnonzero(part == "test")[5]
    pixels[there] = pixels[here]
    build(pixels, labels)
    message, missed, _ = refused()
    assert missed == {"expect_column_values_to_be_between(splits_of_content)": sorted([sample(here), sample(there)])}
    assert sample(here) in message
    assert sample(there) in message


def test_the_same_image_twice_in_training_is_no_leak() -> None:
    pixels, labels = pixels_and_labels()
    first, second = np.flatnonzero(split(labels, WANTED, 0) == "train")[:2]
    pixels[second] = pixels[first]
    build(pixels, labels)
    validate.main("tiny")
    assert PROOF.is_file()


def test_a_wrong_label_in_the_source_is_found() -> None:
    pixels, labels = pixels_and_labels()
    row = 4
    labels[row] = 12
    build(pixels, labels)
    message, missed, _ = refused()
    assert missed["expect_column_values_to_be_in_set(label)"] == [sample(row)]
    assert f"{sample(row)} (12)" in message


@pytest.mark.parametrize("array", ["images", "labels"])
def test_a_truncated_array_is_found(array: str) -> None:
    build(*pixels_and_labels())
    validate.main("tiny")
    file = PREPARED / f"{array}.npy"
    file.write_bytes(file.read_bytes()[:-9])
    message, _, report = refused()
    assert f"{array}.npy cannot be read" in message
    assert report["error"] == message
    assert not (REPORT / "index.html").exists()


def test_pixels_changed_after_preparation_are_found() -> None:
    build(*pixels_and_labels())
    images = np.load(PREPARED / "images.npy")
    images[17, 0, 2, 3] ^= 1
    np.save(PREPARED / "images.npy", images)
    message, missed, _ = refused()
    assert missed == {IMAGES_STORED: [sample(17)]}
    assert "1 of " in message


def test_a_label_changed_after_preparation_is_found() -> None:
    build(*pixels_and_labels())
    labels = np.load(PREPARED / "labels.npy")
    labels[17] = (labels[17] + 1) % CLASSES
    np.save(PREPARED / "labels.npy", labels)
    _, missed, report = refused()
    assert missed == {LABELS_STORED: [sample(17)]}
    (found,) = [found for found in report["findings"] if not found["success"]]
    assert found["rows"] == [{"id": sample(17), "row": 18, "values": {"label": 0, "stored_label": 1}}]


def test_missing_values_are_found() -> None:
    build(*pixels_and_labels())
    columns = ["split", "label", "height", "width", "sha256", "mean", "spread"]
    for row, column in enumerate(columns):
        put(row, column, "")
    _, missed, _ = refused()
    found = {name: ids for name, ids in missed.items() if "not_be_null" in name}
    assert found == {
        f"expect_column_values_to_not_be_null({column})": [sample(row)] for row, column in enumerate(columns)
    }


def test_a_row_without_id_is_named_by_its_place() -> None:
    build(*pixels_and_labels())
    put(9, "id", "")
    message, missed, _ = refused()
    assert missed == {"expect_column_values_to_not_be_null(id)": [None]}
    assert "row 10 (missing)" in message


def test_an_id_given_twice_is_found() -> None:
    build(*pixels_and_labels())
    put(9, "id", sample(2))
    message, missed, _ = refused()
    assert missed == {"expect_column_values_to_be_unique(id)": [sample(2), sample(2)]}
    assert f"row 3 ({sample(2)}), row 10 ({sample(2)})" in message


def test_an_unknown_split_and_a_blank_image_are_found() -> None:
    pixels, labels = pixels_and_labels()
    pixels[30] = 200
    build(pixels, labels)
    put(31, "split", "tarin")
    _, missed, _ = refused()
    assert missed["expect_column_values_to_be_between(spread)"] == [sample(30)]
    assert missed["expect_column_values_to_be_in_set(split)"] == [sample(31)]


@pytest.mark.parametrize(("bounds", "wrong"), [({"smallest_class": 0.2}, "z"), ({"largest_class": 0.5}, "x")])
def test_classes_out_of_balance_are_found(bounds: dict[str, float], wrong: str) -> None:
    pixels, _ = pixels_and_labels()
    labels = np.repeat([0, 1, 2], [36, 16, 8])
    build(pixels, labels, **bounds)
    message, missed, _ = refused()
    assert missed == {
        "expect_column_values_to_be_between(share)": [f"{part}/{wrong}" for part in ("train", "validation", "test")]
    }
    assert f"train/{wrong} (0." in message


def test_another_number_of_samples_is_found() -> None:
    build(*pixels_and_labels(), samples=TOTAL + 1)
    message, missed, report = refused()
    assert missed == {"expect_table_row_count_to_equal()": []}
    assert f"the number of rows must be {TOTAL + 1}; found {TOTAL}" in message
    assert [found["observed"] for found in report["findings"] if not found["success"]] == [TOTAL]


def test_data_without_a_row_are_no_sound_data() -> None:
    build(*pixels_and_labels())
    edit(lambda manifest: manifest[:0])
    for array in ("images", "labels"):
        np.save(PREPARED / f"{array}.npy", np.load(PREPARED / f"{array}.npy")[:0])
    message, missed, report = refused()
    assert len(missed["expect_column_values_to_be_between(samples)"]) == 3 * CLASSES
    assert "balance: every class has a sample in every split" in message
    assert report["rows"] == {"manifest": 0, "balance": 3 * CLASSES}


def test_a_class_that_a_split_lacks_is_named() -> None:
    build(*pixels_and_labels())
    edit(lambda manifest: manifest.assign(split=manifest["split"].where(manifest["label"] != "1", "train")))
    _, missed, _ = refused()
    assert missed == {
        "expect_column_values_to_be_between(samples)": ["validation/y", "test/y"],
    }


def test_a_missing_column_is_found() -> None:
    build(*pixels_and_labels())
    edit(lambda manifest: manifest.drop(columns="spread"))
    message, missed, _ = refused()
    assert set(missed) == {
        "expect_column_values_to_not_be_null(spread)",
        "expect_column_values_to_be_between(spread)",
    }
    assert "could not be checked" in message


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda: edit(lambda manifest: manifest.drop(columns="sha256")), "sha256"),
        (lambda: edit(lambda manifest: manifest[:-1]), f"uint8 of shape ({TOTAL}, 1, 4, 4)"),
        (lambda: (PREPARED / "manifest.csv").write_text(""), "cannot be read"),
        (lambda: (PREPARED / "dataset.json").write_text('{"classes": ['), "cannot be read"),
        ((PREPARED / "dataset.json").unlink, "dataset.json"),
        ((PREPARED / "manifest.csv").unlink, "stages.prepare tiny"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_the_users(damage: Callable[[], Any], complaint: str) -> None:
    build(*pixels_and_labels())
    damage()
    message, _, report = refused()
    assert complaint in message
    assert report["error"] == message


def test_many_findings_are_summed_up() -> None:
    build(*pixels_and_labels())

    def blank(manifest: pd.DataFrame) -> None:
        manifest.loc[:7, ["label", "height", "width", "mean", "spread"]] = ""

    edit(blank)
    message, missed, _ = refused()
    names = ", ".join(f"{sample(row)} (missing)" for row in range(5))
    assert f"height must not be missing; 8 rows are not so: {names} and 3 more" in message
    assert len(missed) == 6
    assert message.count(" | ") == 5
    assert "| and 1 more ·" in message


def test_an_unknown_data_set_is_refused() -> None:
    build(*pixels_and_labels())
    with pytest.raises(UserError, match="unknown data set 'tinny'; did you mean 'tiny'"):
        validate.main("tinny")
