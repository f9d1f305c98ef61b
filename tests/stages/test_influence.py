"""`python -m stages.influence`: the join with the manifest, ROC areas against pairs, the list, and what goes wrong."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from data.errors import UserError
from data.files import sha256, write_json
from stages import influence, paths

ROOT = Path(__file__).parents[2]
CLASSES = ["good", "bad"]
# Row of the manifest, visits and mean, as a training writes them: in no order, with a sample that was never drawn.
TABLE = [(4, 2, 0.5), (1, 2, -0.25), (0, 1, 0.125), (3, 0, float("nan")), (6, 2, -0.5), (5, 2, 0.25)]
TEXTS = ["NA", 'nan, "quoted"', "held out", "never", "four\n\ttimes \x1b[31m four", "five", "six", "tested"]


def write(pair: bool = False) -> None:
    network = {"name": "bert", "layers": 1, "hidden": 4, "heads": 1}
    common = {"task": "text", "dataset": "x", "network": network}
    source = {"kind": "folder", "path": ".", "tree_digest": "0" * 64, "licence": "-", "credit": "-"}
    data: dict[str, Any] = {
        "task": "text",
        "source": "x",
        "encoder": "none",
        "format": "table",
        "files": {"train": "x.csv"},
    }
    data |= {"split": {"validation": 1, "test": 1}, "tokenizer": {"kind": "wordpiece"}}
    parameters = {
        "sources": {"x": {**source, "redistributable": True}},
        "datasets": {"x": data},
        "teachers": {"text-mlm": {**common, "start": "none", "objective": "mlm"}},
        "students": {
            "text-lgtm": {**common, "method": "lgtm", "teacher": "text-mlm"},
            "text-alone": {**common, "method": "alone", "teacher": "none"},
            "text-late": {**common, "method": "alone", "teacher": "none"},
        },
        "tasks": {"text": {}},
    }
    Path("params.yaml").write_text(yaml.safe_dump(parameters))
    prepared = paths.prepared("text", "x")
    prepared.mkdir(parents=True, exist_ok=True)
    manifest = pd.DataFrame({"id": [f"00{row}" for row in range(8)], "text": TEXTS, "label": [0, 1] * 4})
    manifest["split"] = ["train", "train", "held_out", *["train"] * 4, "test"]
    manifest["flipped"] = [0, 1, 0, 1, 0, 0, 1, 0]
    if pair:
        manifest["pair"] = [f"second {row}" for row in range(8)]
    manifest.to_csv(prepared / "manifest.csv", index=False)
    write_json(prepared / "dataset.json", {"classes": CLASSES})
    for name in ("text-lgtm", "text-alone"):
        folder = paths.trained("text", name)
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "name": name, "task": "text", "kind": "student", "network": {}, "interface": {}, "recipe": {},
            "dataset": {"name": "x", "digest": sha256(prepared / "manifest.csv")}, "teacher": None, "start": None,
            "sources": [],
        }  # fmt: skip
        write_json(folder / "model.json", description)
        paths.companions("text", name).mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(TABLE, columns=["row", "visits", "mean"]).assign(epoch_1=0.5, epoch_2=0.25)
    table.to_csv(paths.companions("text", "text-lgtm") / "influence.csv", index=False)


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    write()


def test_rows_are_joined_by_their_number_and_sorted() -> None:
    found = influence.influences("text", "text-lgtm", "x")
    assert found is not None
    assert found["id"].tolist() == ["006", "001", "000", "005", "004"]
    assert found["mean"].tolist() == [-0.5, -0.25, 0.125, 0.25, 0.5]
    assert found["class"].tolist() == ["good", "bad", "good", "bad", "good"]
    assert found["text"].tolist() == [TEXTS[row] for row in (6, 1, 0, 5, 4)]
    assert influence.influences("text", "text-alone", "x") is None


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 30), st.integers(1, 8))
def test_the_roc_area_is_a_share_of_pairs(seed: int, wanted: int, others: int, values: int) -> None:
    """Coarse values, so that many are equal; scikit-learn looks for high values, hence the sign."""
    generator = np.random.default_rng(seed)
    kind = generator.permutation([True] * wanted + [False] * others)
    found = generator.integers(0, values, wanted + others) / 4
    area, error = influence.roc_area(found, kind)
    pairs = [[(a < b) + (a == b) / 2 for b in found[~kind]] for a in found[kind]]
    assert area == pytest.approx(np.mean(pairs))
    assert area == pytest.approx(roc_auc_score(kind, -found))
    if min(wanted, others) > 1:  # DeLong's placements, from their definition
        of_wanted, of_others = np.mean(pairs, axis=1), np.mean(pairs, axis=0)
        variance = np.var(of_wanted, ddof=1) / wanted + np.var(of_others, ddof=1) / others
        assert error == pytest.approx(np.sqrt(variance))
    else:
        assert np.isnan(error)


def test_the_error_of_the_roc_area_is_its_spread() -> None:
    generator = np.random.default_rng(0)
    kind = np.arange(200) < 40
    drawn = [influence.roc_area(generator.normal(size=200) - 0.7 * kind, kind) for _ in range(400)]
    areas, errors = np.array(drawn).T
    assert errors.mean() == pytest.approx(areas.std(), rel=0.1)


def test_detection() -> None:
    found = influence.influences("text", "text-lgtm", "x")
    assert found is not None
    check = influence.detection(found)
    assert check is not None
    assert (check.area, check.precision, check.flipped, check.samples) == (1.0, 1.0, 2, 5)
    found["flipped"] = [0, 1, 1, 0, 0]
    check = influence.detection(found)
    assert check is not None
    assert (check.area, check.precision) == (pytest.approx(4 / 6), 0.5)
    assert influence.detection(found.assign(flipped=0)) is None
    assert influence.detection(found.drop(columns="flipped")) is None


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    influence.main("text-lgtm", top=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "text-lgtm (lgtm on x): influence of 5 training samples"
    assert lines[1].startswith("40.0 % have a negative influence")
    assert "ROC area of 1.000" in " ".join(lines)
    at = lines.index("most harmful")
    assert [line.split() for line in lines[at + 1 : at + 3]] == [
        ["-0.5", "good", "(flipped)", "six"],
        ["-0.25", "bad", "(flipped)", "nan,", '"quoted"'],
    ]
    at = lines.index("most helpful")
    assert [line.split() for line in lines[at + 1 : at + 3]] == [
        ["+0.5", "good", "four", "times", "[31m", "four"],  # no escape sequence reaches the terminal
        ["+0.25", "bad", "five"],
    ]


def test_lines_fit_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    TEXTS[6], before = "word " * 100, TEXTS[6]
    write(pair=True)
    TEXTS[6] = before
    for width in (60, 100):
        monkeypatch.setenv("COLUMNS", str(width))
        influence.main("text-lgtm")
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= width
        assert any(line.endswith("word…") for line in lines)
        assert any("| second 5" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "most", "shown"), [("one two", 7, "one two"), ("one two", 6, "one…"), ("x" * 9, 5, "xxxx…")]
)
def test_texts_are_cut_between_words(text: str, most: int, shown: str) -> None:
    assert influence.readable(pd.Series({"id": "1", "text": text}), most) == shown


def test_a_text_that_is_empty_is_shown_by_its_name() -> None:
    assert influence.readable(pd.Series({"id": "007", "text": float("nan")}), 20) == "007"


@pytest.mark.parametrize("pair", [False, True])
def test_the_list_for_a_person(pair: bool, capsys: pytest.CaptureFixture[str]) -> None:
    write(pair=pair)
    influence.main("text-lgtm", export=Path("out/list.csv"))
    assert "out/list.csv (5 samples" in capsys.readouterr().out
    table = pd.read_csv("out/list.csv", dtype={"id": str}, keep_default_na=False)
    assert list(table) == ["rank", "id", "label", "influence", "visits", "text"] + ["pair"] * pair
    assert table["rank"].tolist() == [1, 2, 3, 4, 5]
    assert table["id"].tolist() == ["006", "001", "000", "005", "004"]
    assert table["label"].tolist() == ["good", "bad", "good", "bad", "good"]
    assert table["influence"].tolist() == [-0.5, -0.25, 0.125, 0.25, 0.5]
    assert table["text"].tolist() == [TEXTS[row] for row in (6, 1, 0, 5, 4)]


def test_what_goes_wrong_is_told() -> None:
    with pytest.raises(UserError, match="unknown student 'text-lgmt'; did you mean 'text-lgtm'"):
        influence.main("text-lgmt")
    with pytest.raises(UserError, match=r"method 'alone'\) records no influence of samples · these do: text-lgtm"):
        influence.main("text-alone")
    with pytest.raises(UserError, match=r"text-late is not trained yet .* · run `dvc repro distill@text-late`"):
        influence.main("text-late")
    Path("folder").mkdir()
    for file in ("folder", "params.yaml/list.csv"):
        with pytest.raises(UserError, match=rf"--export {file} cannot be written .* · name another file"):
            influence.main("text-lgtm", export=Path(file))
    manifest = paths.prepared("text", "x") / "manifest.csv"
    text = manifest.read_text()
    manifest.write_text(text.replace("five", "5"))
    with pytest.raises(UserError, match=r"about other data than is prepared now .*dvc repro distill@text-lgtm"):
        influence.main("text-lgtm")
    manifest.unlink()
    with pytest.raises(UserError, match=r"manifest.csv is missing · run `dvc repro prepare@x`"):
        influence.main("text-lgtm")
    manifest.write_text(text)
    table = paths.companions("text", "text-lgtm") / "influence.csv"
    table.write_text("row,visits\n1,1\n")
    with pytest.raises(UserError, match="no column 'mean'"):
        influence.main("text-lgtm")
    table.unlink()
    with pytest.raises(UserError, match=r"'lgtm'.* records no influence of samples · method 'lgtm' does, if"):
        influence.main("text-lgtm")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "stages.influence", *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_command_line() -> None:
    done = run("text-lgtm", "--top", "1", "--export", "list.csv")
    assert done.returncode == 0, done.stderr
    assert Path("list.csv").is_file()
    assert json.dumps(done.stdout).count("+0.5") == 1
    refused = run("text-alone")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error in influence text-alone: ")


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many"])
def test_how_many_are_printed_is_a_positive_number(text: str) -> None:
    assert influence._positive("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match=f"must be a whole number above 0, got '{text}'"):
        influence._positive(text)
