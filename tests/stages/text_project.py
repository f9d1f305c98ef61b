"""A prepared data set of text in miniature: what a model has to find is a word of its class."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data import text
from data.text import prepare
from models.artifacts import Description
from models.text import build
from stages.parameters import text as schema

PROVENANCE = {"name": "toy", "licence": "none", "credit": "invented", "redistributable": True}
CLASSES = ["corn", "crude", "trade"]
WORDS = ["tons", "price", "year", "said", "week", "more", "than", "last"]
NETWORK: dict[str, Any] = {"name": "bert", "layers": 2, "hidden": 8, "heads": 2, "dropout": 0.0}
TRAINING: dict[str, Any] = {"epochs": 2, "batch": 8, "accelerator": "cpu", "learning_rate": 1e-3}


def write(folder: Path, count: int = 90, classes: list[str] = CLASSES, **fields: Any) -> Path:
    """A prepared data set in `folder`/prepared: texts of a few words, one of which is the class."""
    generator = np.random.default_rng(0)
    lines = ["text\tlabel"]
    for row in range(count):
        words = list(generator.choice(WORDS, generator.integers(3, 9)))
        words.insert(int(generator.integers(len(words) + 1)), CLASSES[row % len(classes)])
        number = "x" * (row // 26 + 1) + chr(97 + row % 26)  # no text stands there twice
        lines.append(f"{' '.join(words)} {number}\t{classes[row % len(classes)]}")
    (folder / "raw").mkdir(parents=True)
    (folder / "raw" / "train.tsv").write_text("\n".join(lines))
    entry = {
        "task": "text",
        "source": "toy",
        "encoder": "none",
        "format": "table",
        "separator": "tab",
        "files": {"train": "train.tsv"},
        "tokenizer": {"kind": "wordpiece", "pieces": 100},
        "length": 16,
        "split": {"validation": 12, "test": 12, "held_out": 0.25},
        **fields,
    }
    output = folder / "prepared"
    output.mkdir()
    prepare(folder / "raw", schema.Dataset.model_validate(entry), output, PROVENANCE)
    return output


def student(method: str = "alone", training: dict[str, Any] | None = None, **fields: Any) -> Any:
    kind: Any = {"alone": schema.Alone, "kd": schema.KD, "lgtm": schema.LGTM}[method]
    base = {"task": "text", "dataset": "prepared", "method": method, "teacher": "none" if method == "alone" else "big"}
    return kind.model_validate({**base, "network": NETWORK, "training": {**TRAINING, **(training or {})}, **fields})


def teacher(objective: str = "task", training: dict[str, Any] | None = None, **fields: Any) -> schema.Teacher:
    entry = {"task": "text", "dataset": "prepared", "start": "none", "objective": objective}
    if objective != "none":
        entry |= {"network": NETWORK, "training": {**TRAINING, **(training or {})}}
    return schema.Teacher.model_validate({**entry, **fields})


def trained(prepared: Path, name: str = "big", changes: dict[str, Any] | None = None, **network: Any) -> Any:
    """A teacher with random weights and its description. changes: of what goes in and comes out."""
    description = text.describe(prepared)
    kept = ("classes", "length", "vocabulary", "pad", "separator", "tokenizer_sha256", "pair")
    interface = {key: description[key] for key in kept} | (changes or {})
    made = schema.Bert.model_validate({**NETWORK, **network}).model_dump(mode="json")
    torch.manual_seed(1)
    built: nn.Module = build({"network": made, "interface": interface}).eval()
    return built, Description(name, "text", "teacher", made, interface, {}, {}, None, None, [])
