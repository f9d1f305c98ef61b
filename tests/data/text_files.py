"""Small data sets of text in published formats, and their entries in params.yaml."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from data import text
from data.text import GLUE
from stages.parameters.text import Dataset

PROVENANCE = {"name": "toy", "licence": "none", "credit": "invented", "redistributable": True}
WORDPIECE = {"kind": "wordpiece", "pieces": 120}
# What stands in two columns of texts, as it may be met in a file without quoting; tabs and line feeds cannot.
ODD = [
    'He said "no',
    "it's ''quoted'' ",
    " trailing spaces  ",
    "a\u2028line\u2029separator",
    "next\x85line \x0b\x0c\x1c\x1d",
    "naïve café — “curly”",
    "nan",
    "NULL",
    "[SEP] spelt [MASK]",
    "漢字 \U0001f600",
]

HEADERS = {
    "CoLA": None,
    "MNLI": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "RTE": "index\tsentence1\tsentence2\tlabel",
    "SST-2": "sentence\tlabel",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
}
HEADERS["MNLI-mm"] = HEADERS["MNLI"]
# The published dev files of MNLI hold the labels of five readers.
DEV_OF_MNLI = str(HEADERS["MNLI"]).replace("label1", "label1\tlabel2\tlabel3\tlabel4\tlabel5")
LABELS = {
    "CoLA": ["0", "1"],
    "MNLI": ["entailment", "neutral", "contradiction"],
    "MRPC": ["0", "1"],
    "QNLI": ["entailment", "not_entailment"],
    "QQP": ["0", "1"],
    "RTE": ["entailment", "not_entailment"],
    "SST-2": ["0", "1"],
    "STS-B": ["0.000", "4.8", "2.4", "5.000"],
}
LABELS["MNLI-mm"] = LABELS["MNLI"]


def glue_line(task: str, row: int, first: str, second: str, label: str, header: str | None) -> str:
    """One line in the published order of columns."""
    if task == "CoLA":
        return f"gj04\t{label}\t{'*' * (label == '0')}\t{first}"
    values = {
        **dict.fromkeys(("sentence1", "#1 String", "question", "question1"), first),
        **dict.fromkeys(("sentence2", "#2 String", "question2"), second),
        **dict.fromkeys(("label", "gold_label", "Quality", "is_duplicate", "score"), label),
        "sentence": first if task == "SST-2" else second,
    }
    return "\t".join(values.get(name, f"{name} {row}") for name in str(header).split("\t"))


def write_glue(
    folder: Path, task: str, samples: list[tuple[str, str, str]], part: str = "train.tsv", end: str = "\n"
) -> Path:
    """A file of a task of GLUE with (text, second text, label)."""
    header = DEV_OF_MNLI if task.startswith("MNLI") and part != "train.tsv" else HEADERS[task]
    lines = [] if header is None else [header]
    lines += [glue_line(task, row, *sample, header) for row, sample in enumerate(samples)]
    content = "".join(line + end for line in lines).encode()
    if task == "MRPC":  # as it is published
        content = b"\xef\xbb\xbf" + content
    folder.mkdir(parents=True, exist_ok=True)
    (folder / part).write_bytes(content)
    return folder / part


def glue_samples(task: str, count: int) -> list[tuple[str, str, str]]:
    """Distinct texts with every label of the task in turn."""
    labels = LABELS[task]
    return [(f"{ODD[n % 10]} {n} a", f"{ODD[(n + 3) % 10]} {n} b", labels[n % len(labels)]) for n in range(count)]


def glue_entry(task: str, **fields: Any) -> Dataset:
    entry = {
        "format": "glue",
        "glue": task,
        "folder": task,
        "split": {"validation": 8},
        "tokenizer": WORDPIECE,
        "metric": "spearman" if task == "STS-B" else "accuracy",
    }
    return dataset(**{**entry, **fields})


def write_glue_task(raw: Path, task: str, train: int = 60, test: int = 12) -> None:
    samples = glue_samples(task, train + test)
    write_glue(raw / task, task, samples[:train])
    write_glue(raw / task, task, samples[train:], GLUE[task].test)


def dataset(**fields: Any) -> Dataset:
    return Dataset.model_validate({"task": "text", "source": "toy", "encoder": "none", **fields})


def table_entry(**fields: Any) -> Dataset:
    entry: dict[str, Any] = {
        "format": "table",
        "files": {"train": "train.csv"},
        "split": {"validation": 10, "test": 10, "held_out": 0.2, "seed": 3},
        "tokenizer": WORDPIECE,
        "length": 16,
    }
    return dataset(**{**entry, **fields})


WORDS = "grain wheat corn ship port crude oil barrel trade tariff bank rate money stock share profit"


def some_texts(count: int, seed: int = 0, shortest: int = 3, longest: int = 12) -> list[str]:
    """Distinct texts of invented headlines."""
    generator = np.random.default_rng(seed)
    found = dict.fromkeys(
        " ".join(generator.choice(WORDS.split(), generator.integers(shortest, longest + 1))) for _ in range(4 * count)
    )
    assert len(found) >= count
    return list(found)[:count]


def write_csv(file: Path, rows: list[tuple[str, ...]], header: str = "text,label") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    file.write_bytes("".join(line + "\n" for line in [header, *quoted]).encode())


def prepared(raw: Path, entry: Dataset, output: Path) -> Path:
    output.mkdir(parents=True)
    text.prepare(raw, entry, output, PROVENANCE)
    return output


def plain(found: str) -> str:
    """A text as a reader gives it."""
    return re.sub("\r\n?", "\n", found).strip()
