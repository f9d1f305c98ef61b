"""What is expected of texts: sound data pass, and every planted fault is found with its ids."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from data import text
from data.errors import UserError
from stages import prepare, validate

sys.path.insert(0, str(Path(__file__).parent))
import text_files as files

FOLDER = Path("data/prepared/text/tiny")
PROOF = Path("data/validated/text/tiny.json")
BETWEEN = "expect_column_values_to_be_between"
PARTS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(first: int, last: int) -> list[tuple[str, ...]]:
    return [(found, "xyz"[n % 3]) for n, found in enumerate(files.some_texts(90))][first:last]


def build(
    change: Callable[[dict[str, list[tuple[str, ...]]]], Any] | None = None, header: str = "text,label", **fields: Any
) -> None:
    """A project in the working directory with the data set `tiny` of three files, prepared by the real stage."""
    parts = {"train": rows(0, 60), "validation": rows(60, 75), "test": rows(75, 90)}
    if change is not None:
        change(parts)
    for name, part in parts.items():
        files.write_csv(Path(f"data/raw/toy/{name}.csv"), part, header)
    entry = {
        "task": "text",
        "source": "toy",
        "encoder": "none",
        "format": "table",
        "files": {name: f"{name}.csv" for name in parts},
        "tokenizer": files.WORDPIECE,
        "length": 16,
        **fields,
    }
    rights = {"licence": "none", "credit": "nobody", "redistributable": True}
    source = {"kind": "folder", "path": "unused", "tree_digest": "0" * 64, **rights}
    Path("params.yaml").write_text(yaml.safe_dump({"sources": {"toy": source}, "datasets": {"tiny": entry}}))
    prepare.main("tiny")


def edit(change: Callable[[pd.DataFrame], Any]) -> None:
    """Change manifest.csv, value by value as text."""
    manifest = pd.read_csv(FOLDER / "manifest.csv", dtype=str, keep_default_na=False)
    change(manifest)
    manifest.to_csv(FOLDER / "manifest.csv", index=False, lineterminator="\n")


def refused() -> tuple[dict[str, list[str]], str]:
    """The ids per expectation that is not met, and the message."""
    with pytest.raises(UserError) as caught:
        validate.main("tiny")
    assert not PROOF.exists()
    report = json.loads(Path("reports/validation/text/tiny/findings.json").read_text(encoding="utf-8"))
    missed = {}
    for found in report["findings"]:
        if not found["success"]:
            wanted = found["expectation"]
            columns = [wanted[key] for key in ("column", "column_A", "column_B") if key in wanted]
            missed[f"{wanted['type']}({', '.join(columns)})"] = [row["id"] for row in found["rows"]]
    return missed, str(caught.value)


def test_sound_data_pass() -> None:
    build(expect={"samples": 90, "smallest_class": 0.3, "largest_class": 0.4, "truncated": 0.2})
    validate.main("tiny")
    assert PROOF.is_file()


def test_pairs_with_scores_are_sound_but_for_the_scores_that_nobody_gave() -> None:
    files.write_glue_task(Path("data/raw/toy"), "STS-B")
    build()
    raw = yaml.safe_load(Path("params.yaml").read_text())
    entry = {"task": "text", "source": "toy", "encoder": "none", "format": "glue", "glue": "STS-B", "folder": "STS-B",
             "metric": "spearman", "split": {"validation": 8}, "tokenizer": files.WORDPIECE}  # fmt: skip
    raw["datasets"]["tiny"] = entry
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    prepare.main("tiny")
    # No sample has the scores 1, 3 and 4.
    missed, _ = refused()
    assert missed == {f"{BETWEEN}(samples)": [f"{part}/{score}" for part in PARTS for score in "134"]}


def test_an_empty_text_is_named() -> None:
    def change(parts: dict[str, list[tuple[str, ...]]]) -> None:
        parts["train"][6] = ("", "x")
        parts["validation"][2] = ("  \n ", "z")

    build(change)
    missed, message = refused()
    assert missed[f"{BETWEEN}(letters)"] == ["validation-000003"]
    assert "no text is empty; 1 row is not so: validation-000003" in message


def test_a_text_of_which_the_normaliser_leaves_nothing_is_empty() -> None:
    def change(parts: dict[str, list[tuple[str, ...]]]) -> None:
        parts["test"][2] = ("12.5 %, 13!", "z")

    build(change, tokenizer={**files.WORDPIECE, "normalise": "letters"})
    assert refused()[0] == {f"{BETWEEN}(letters)": ["test-000003"]}


def test_one_empty_text_of_a_pair_is_found() -> None:
    def change(parts: dict[str, list[tuple[str, ...]]]) -> None:
        for name, part in parts.items():
            parts[name] = [(found, f"{found} too", label) for found, label in part]
        found, _, label = parts["test"][4]
        parts["test"][4] = (found, "", label)

    build(change, "text,other,label", columns={"pair": "other"}, length=64)
    assert refused()[0] == {f"{BETWEEN}(letters)": ["test-000005"]}


def test_texts_repeated_in_a_file_of_validation_are_found_and_may_be_allowed() -> None:
    def change(parts: dict[str, list[tuple[str, ...]]]) -> None:
        parts["validation"][3] = parts["validation"][9]
        parts["validation"][6] = (parts["validation"][9][0].upper(), "x")

    build(change)
    missed, message = refused()
    assert missed == {f"{BETWEEN}(repeated)": ["validation"]}
    assert "the share of texts that stand before in the same split is at most 0; 1 row is not so: validation (0.13" in (
        message
    )
    for share, sound in ((0.13, False), (0.14, True)):
        build(change, expect={"duplicates": share})
        if sound:
            validate.main("tiny")
        else:
            assert refused()[0] == {f"{BETWEEN}(repeated)": ["validation"]}


def test_one_text_in_validation_and_test_is_found() -> None:
    def change(parts: dict[str, list[tuple[str, ...]]]) -> None:
        parts["test"][3] = (parts["validation"][9][0].title(), "x")

    build(change)
    missed, message = refused()
    assert missed == {f"{BETWEEN}(splits_of_content)": ["validation-000010", "test-000004"]}
    assert "the same text never stands in two splits" in message


def test_one_text_in_training_and_held_out_is_found() -> None:
    build()

    def change(manifest: pd.DataFrame) -> None:
        first, second = (int(np.flatnonzero(manifest["split"] == part)[0]) for part in ("train", "held_out"))
        manifest.loc[second, ["text", "sha256"]] = manifest.loc[first, ["text", "sha256"]].to_numpy()
        ids.extend(sorted(manifest["id"].iloc[[first, second]]))

    ids: list[str] = []
    edit(change)
    missed, _ = refused()
    assert sorted(missed[f"{BETWEEN}(splits_of_content)"]) == ids


def test_tokens_that_are_not_those_of_the_text_are_found() -> None:
    build()
    tokens = np.load(FOLDER / "tokens.npy")
    tokens[17, 2] += 1
    np.save(FOLDER / "tokens.npy", tokens)
    ids = pd.read_csv(FOLDER / "manifest.csv")["id"]
    missed, message = refused()
    assert missed == {f"{BETWEEN}(wrong_tokens)": [ids[17]]}
    assert "the stored tokens are those of the text" in message


def test_a_text_changed_after_preparation_is_found() -> None:
    build()
    edit(lambda manifest: manifest.__setitem__("text", manifest["text"].where(manifest.index != 5, "grain")))
    assert list(refused()[0]) == [f"{BETWEEN}(wrong_tokens)"]


def test_a_label_changed_after_preparation_is_found() -> None:
    build()
    labels = np.load(FOLDER / "labels.npy")
    labels[17] = (labels[17] + 1) % 3
    np.save(FOLDER / "labels.npy", labels)
    ids = pd.read_csv(FOLDER / "manifest.csv")["id"]
    assert refused()[0] == {"expect_column_pair_values_to_be_equal(label, stored_label)": [ids[17]]}


def test_missing_values_are_found() -> None:
    build()

    def change(manifest: pd.DataFrame) -> None:
        for row, column in enumerate(text.COLUMNS):
            manifest.loc[row, column] = ""

    ids = pd.read_csv(FOLDER / "manifest.csv")["id"].tolist()
    edit(change)
    found = {name: missed for name, missed in refused()[0].items() if "not_be_null" in name}
    assert found == {
        f"expect_column_values_to_not_be_null({column})": [ids[row] if column != "id" else None]
        for row, column in enumerate(text.COLUMNS)
    }


def test_a_class_that_a_split_lacks_is_named_but_for_the_held_out_samples() -> None:
    def change(parts: dict[str, list[tuple[str, ...]]]) -> None:
        parts["test"] = [(found, "x" if label == "y" else label) for found, label in parts["test"]]
        parts["train"] = [(found, label) for n, (found, label) in enumerate(parts["train"]) if label != "z" or n < 4]

    build(change)
    manifest = pd.read_csv(FOLDER / "manifest.csv")
    assert set(manifest["label"][manifest["split"] == "held_out"]) == {0, 1}
    assert refused()[0] == {f"{BETWEEN}(samples)": ["test/y"]}


@pytest.mark.parametrize(("bounds", "wrong"), [({"smallest_class": 0.2}, "z"), ({"largest_class": 0.5}, "x")])
def test_classes_out_of_balance_are_found(bounds: dict[str, float], wrong: str) -> None:
    def change(parts: dict[str, list[tuple[str, ...]]]) -> None:
        for name, part in parts.items():
            labels = np.repeat(list("xyz"), [round(share * len(part)) for share in (0.6, 0.27, 0.13)])
            parts[name] = [(found, label) for (found, _), label in zip(part, labels, strict=True)]

    build(change, expect=bounds)
    assert refused()[0] == {f"{BETWEEN}(share)": [f"{part}/{wrong}" for part in PARTS]}


def test_too_many_texts_that_are_cut_are_found() -> None:
    def change(parts: dict[str, list[tuple[str, ...]]]) -> None:
        parts["test"][:3] = [(f"{'grain ' * (20 + n)}", label) for n, (_, label) in enumerate(parts["test"][:3])]

    large = {**files.WORDPIECE, "pieces": 1000}
    build(change, expect={"truncated": 0.19}, tokenizer=large)
    missed, message = refused()
    assert missed == {f"{BETWEEN}(cut)": ["test"]}
    assert "the share of texts that are cut is at most 0.19" in message
    build(change, expect={"truncated": 0.2}, tokenizer=large)
    validate.main("tiny")


def test_another_number_of_samples_is_found() -> None:
    build(expect={"samples": 91})
    missed, message = refused()
    assert missed == {"expect_table_row_count_to_equal()": []}
    assert "the number of rows must be 91; found 90" in message


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda: np.save(FOLDER / "tokens.npy", np.zeros((90, 15), np.int32)), "int32 of shape (90, 15)"),
        (lambda: np.save(FOLDER / "labels.npy", np.zeros(90, np.int32)), "labels.npy holds int32 of shape (90,)"),
        ((FOLDER / "labels.npy").unlink, "labels.npy cannot be read"),
        (lambda: (FOLDER / "tokens.npy").write_bytes(b"\x93NUMPY"), "tokens.npy cannot be read"),
        (lambda: (FOLDER / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read as a tokenizer"),
        (lambda: edit(lambda manifest: manifest.__delitem__("text")), "'text'"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_the_users(damage: Callable[[], Any], complaint: str) -> None:
    build()
    damage()
    with pytest.raises(UserError) as caught:
        validate.main("tiny")
    assert complaint in str(caught.value)
    assert not PROOF.exists()
