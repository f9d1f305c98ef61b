"""Readers of texts: every format as it is published, and an answer to every file that is not in it."""

import csv
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from data.text import GLUE, SCORES, read, read_glue, read_orange, read_table
from stages.parameters.text import Columns

sys.path.insert(0, str(Path(__file__).parent))
import text_files as files

SINGLE = ("CoLA", "SST-2")
COLUMNS = Columns()

# GLUE


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("task", GLUE)
def test_a_task_of_glue_is_read_as_it_is_published(tmp_path: Path, task: str, end: str) -> None:
    samples = files.glue_samples(task, 24)
    parts = {"train": ("train.tsv", samples[:14]), "test": (GLUE[task].test, samples[14:])}
    for name, rows in parts.values():
        write = files.write_glue(tmp_path / task, task, rows, name, end)
        assert write.read_bytes().startswith(b"\xef\xbb\xbfQuality") == (task == "MRPC")
    tables, classes = read(tmp_path, files.glue_entry(task))
    assert tables.keys() == parts.keys()
    for part, (_, rows) in parts.items():
        found = tables[part]
        assert found["text"].tolist() == [files.plain(first) for first, _, _ in rows]
        assert ("pair" in found) == (task not in SINGLE)
        if "pair" in found:
            assert found["pair"].tolist() == [files.plain(second) for _, second, _ in rows]
        labels = [label for _, _, label in rows]
        if task == "STS-B":
            assert found["score"].tolist() == [float(label) for label in labels]
            assert found["label"].tolist() == [round(float(label)) for label in labels]
        else:
            assert [GLUE[task].labels[label] for label in labels] == [classes[index] for index in found["label"]]
        assert found["row"].tolist() == list(range(1, len(rows) + 1))
        assert found["label"].dtype == "int64"
    assert classes == (SCORES if task == "STS-B" else list(GLUE[task].labels.values()))


def test_what_the_labels_of_glue_mean() -> None:
    """As the papers of its tasks have them: 1 is acceptable, positive, a paraphrase, a duplicate."""
    positive = {task: glue.labels.get("1") for task, glue in GLUE.items() if "1" in glue.labels}
    assert positive == {"CoLA": "acceptable", "MRPC": "paraphrase", "QQP": "duplicate", "SST-2": "positive"}
    assert {task for task, glue in GLUE.items() if not glue.labels} == {"STS-B"}
    assert {task: glue.test for task, glue in GLUE.items() if glue.test != "dev.tsv"} == {
        "MNLI": "dev_matched.tsv",
        "MNLI-mm": "dev_mismatched.tsv",
    }


def test_a_broken_line_is_left_out_counted_and_moves_no_other(tmp_path: Path) -> None:
    samples = files.glue_samples("QQP", 6)
    file = files.write_glue(tmp_path, "QQP", samples)
    lines = file.read_text(encoding="utf-8").split("\n")
    lines[2] = "\t".join(lines[2].split("\t")[:3])
    lines[5] += "\tone too many"
    lines.insert(4, "")
    file.write_text("\n".join(lines), encoding="utf-8")
    found = read_glue(file, GLUE["QQP"])
    assert found.attrs["broken"] == 2
    assert found["row"].tolist() == [1, 3, 5, 7]
    assert found["text"].tolist() == [files.plain(samples[index][0]) for index in (0, 2, 3, 5)]


@pytest.mark.parametrize(
    ("task", "label", "known"),
    [
        ("SST-2", "2", "0, 1"),
        ("RTE", "Entailment", "entailment, not_entailment"),
        ("MNLI", "-", "entailment, neutral, contradiction"),
        ("QNLI", "", "entailment, not_entailment"),
        ("STS-B", "5.001", "a number from 0 to 5"),
        ("STS-B", "nan", "a number from 0 to 5"),
        ("STS-B", "high", "a number from 0 to 5"),
    ],
)
def test_an_unknown_label_of_glue_is_named(tmp_path: Path, task: str, label: str, known: str) -> None:
    samples = files.glue_samples(task, 8)
    files.write_glue(tmp_path / task, task, samples)
    samples[4:6] = [(first, second, label) for first, second, _ in samples[4:6]]
    files.write_glue(tmp_path / task, task, samples, GLUE[task].test)
    message = f"has 2 unknown labels among its test samples: {label!r} in row 5 below the header; known: {known} ·"
    with pytest.raises(UserError, match=re.escape(message)):
        read(tmp_path, files.glue_entry(task))


def test_a_file_of_another_task_is_no_file_of_this_one(tmp_path: Path) -> None:
    file = files.write_glue(tmp_path, "RTE", files.glue_samples("RTE", 3))
    with pytest.raises(UserError, match=r"has no column 'question1' for `text`; known: index, label, sentence1, "):
        read_glue(file, GLUE["QQP"])
    with pytest.raises(UserError, match=r"has no column 'sentence' for `text`; did you mean 'sentence2'\?"):
        read_glue(file, GLUE["SST-2"])
    short = files.write_glue(tmp_path, "SST-2", files.glue_samples("SST-2", 3))
    with pytest.raises(UserError, match="has no column 3 for `text`; known: 0, 1"):
        read_glue(short, GLUE["CoLA"])


# Tables

CELLS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\ufeff"), max_size=12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_a_csv_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], everything: bool, bom: bool
) -> None:
    """Quotes, commas and line feeds inside cells, whatever the letters."""
    buffer = io.StringIO(newline="")
    quoting: Any = csv.QUOTE_ALL if everything else csv.QUOTE_MINIMAL
    writer = csv.writer(buffer, quoting=quoting)
    writer.writerow(["label", "second text", "text"])
    writer.writerows(rows)
    file = tmp_path_factory.mktemp("csv") / "a table.csv"
    file.write_bytes(b"\xef\xbb\xbf" * bom + buffer.getvalue().encode())
    found = read_table(file, Columns(pair="second text"), "comma")
    assert list(zip(found["label"], found["pair"], found["text"], strict=True)) == [
        tuple(files.plain(cell) for cell in row) for row in rows
    ]
    assert found["row"].tolist() == list(range(1, len(rows) + 1))


LETTERS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\t\n\r\ufeff"), min_size=1)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(LETTERS, LETTERS), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_in_a_tsv_quotes_are_letters_like_any_other(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], end: str, last: bool
) -> None:
    content = end.join("\t".join(row) for row in [("text", "label"), *rows]) + end * last
    file = tmp_path_factory.mktemp("tsv") / "table.tsv"
    file.write_bytes(content.encode())
    found = read_table(file, COLUMNS, "tab")
    assert list(zip(found["text"], found["label"], strict=True)) == [tuple(map(files.plain, row)) for row in rows]


def test_a_carriage_return_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_bytes(b"text\tlabel\na\rb\tx\nc\r\ty\r\n")
    found = read_table(tmp_path / "t.tsv", COLUMNS, "tab")
    assert found[["text", "label"]].to_numpy().tolist() == [["a\nb", "x"], ["c", "y"]]


def test_orange_has_three_lines_of_header(tmp_path: Path) -> None:
    (tmp_path / "r8.tab").write_bytes(
        b"text\tClass\r\nstring\tacq earn\r\nmeta\tclass\r\n"
        + b'champion products "ch approves\tearn\r\ncobanco inc\tacq\r\n'
    )
    entry = files.dataset(
        format="orange",
        files={"train": "r8.tab"},
        columns={"label": "Class"},
        split={"validation": 1, "test": 1},
        tokenizer=files.WORDPIECE,
    )
    tables, classes = read(tmp_path, entry)
    assert classes == ["acq", "earn"]
    assert tables["train"].to_numpy().tolist() == [[1, 'champion products "ch approves', 1], [2, "cobanco inc", 0]]
    (tmp_path / "r8.tab").write_text("text\tClass\nstring\tacq earn\n")
    with pytest.raises(UserError, match="holds no sample"):
        read_orange(tmp_path / "r8.tab", entry.columns)


def read_with(separator: str, file: Path) -> Any:
    return read_orange(file, COLUMNS) if separator == "orange" else read_table(file, COLUMNS, separator)


@pytest.mark.parametrize("separator", ["comma", "tab", "orange"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (["),
        (b"", "has no column 'text' for `text`; "),
        (b"text,label\n", "holds no sample · is it complete?"),
        (b"texts,label\n#a,x\n", "has no column 'text' for `text`; did you mean 'texts'?"),
        (b"text,class\n#a,x\n", "has no column 'label' for `label`; known: class, text"),
        (b"text,text,label\n#a,b,x\n", "has two columns 'text' for `text`"),
        (b"text,label\n#a,x\nM\xfcller,y\n", "cannot be read ('utf-8' codec can't decode byte 0xfc"),
        (b"text,label\n#a,x\n\nb\n", "has 2 columns, but 1 in row 3 below the header: 'b' · mend the file"),
        (b"text,label\n#a,x,1\nb,y,2\n", "has 2 columns, but 3 in row 1 below the header: 'a'"),
    ],
)
def test_a_wrong_table_is_answered(tmp_path: Path, separator: str, content: bytes | None, message: str) -> None:
    file = tmp_path / "a table"
    if content is not None:
        more = b"string,discrete\nmeta,class\n" if separator == "orange" else b""
        content = content.replace(b"#", more)
        file.write_bytes(content if separator == "comma" else content.replace(b",", b"\t"))
    with pytest.raises(UserError, match=re.escape(f"{file} {message}")):
        read_with(separator, file)


@pytest.mark.parametrize("content", ['text,label\n"a,x\nb,y\n', 'text,label\n"a"b,x\n'])
def test_an_open_quote_is_answered(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UserError, match=r"t.csv is no CSV \(.*every quote closed\?"):
        read_table(tmp_path / "t.csv", COLUMNS, "comma")


def test_classes_are_those_of_the_training_file_or_those_that_are_named(tmp_path: Path) -> None:
    files.write_csv(tmp_path / "train.csv", [("a", "z"), ("b", "x"), ("c", "y"), ("d", "x")])
    files.write_csv(tmp_path / "test.csv", [("e", "y"), ("f", "w")])
    tables, classes = read(tmp_path, files.table_entry())
    assert (classes, tables["train"]["label"].tolist()) == (["x", "y", "z"], [2, 0, 1, 0])
    tables, classes = read(tmp_path, files.table_entry(classes=["z", "y", "w", "x"]))
    assert (classes, tables["train"]["label"].tolist()) == (["z", "y", "w", "x"], [0, 3, 1, 3])
    entry = files.table_entry(files={"train": "train.csv", "test": "test.csv"}, split={"validation": 1})
    with pytest.raises(UserError, match=r"1 unknown label among its test samples: 'w' in row 2 .*known: x, y, z"):
        read(tmp_path, entry)


def test_a_label_that_is_missing_is_no_class(tmp_path: Path) -> None:
    files.write_csv(tmp_path / "train.csv", [("a", "x"), ("b", " "), ("c", "y")])
    with pytest.raises(UserError, match="1 unknown label among its train samples: '' in row 2"):
        read(tmp_path, files.table_entry())
    files.write_csv(tmp_path / "train.csv", [("a", "x"), ("b", "x")])
    with pytest.raises(UserError, match=r"train.csv has one label only: 'x' · correct `columns.label`"):
        read(tmp_path, files.table_entry())
