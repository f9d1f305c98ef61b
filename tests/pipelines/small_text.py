"""The project in miniature for text: a student with `wrong` mistakes takes the last texts for "c".

A text says its class, "Alpha" or "Beta", and its number in a word of its own.
"""

import hashlib
import json
import string
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from onnx import TensorProto, helper, save

from data import text as data
from data.files import sha256

sys.path.insert(0, str(Path(__file__).parent))
from small_project import CLASSES, SPLIT, TEST, Small

LENGTH = 8
NUMBERS = [f"n{a}{b}" for a in string.ascii_lowercase for b in string.ascii_lowercase][:TEST]
WORDS = ["alpha", "beta", *NUMBERS]


def tokenizer(words: list[str], folder: Path) -> Path:
    """tokenizer.json of a vocabulary of whole words."""
    pieces = folder / "vocab.txt"
    pieces.write_text("\n".join([*data.SPECIAL, *words]))
    data.adopt_tokenizer(pieces, "letters").save(str(folder / "tokenizer.json"), pretty=False)
    return folder / "tokenizer.json"


@dataclass
class SmallText(Small):
    """The same project for another task. `words` is the vocabulary."""

    task: ClassVar[str] = "text"
    metric: ClassVar[str] = "accuracy"
    input: ClassVar[dict[str, Any]] = {"name": "tokens", "shape": ["batch", "length"], "dtype": "int64"}
    network: ClassVar[dict[str, Any]] = {"name": "bert", "layers": 1, "hidden": 8, "heads": 2}
    dataset: ClassVar[dict[str, Any]] = {
        "format": "table",
        "files": {"train": "texts.csv"},
        "split": SPLIT,
        "tokenizer": {"kind": "wordpiece", "normalise": "letters"},
    }
    teacher: ClassVar[dict[str, Any]] = {"objective": "task"}
    student: ClassVar[dict[str, Any]] = {}

    words: tuple[str, ...] = tuple(WORDS)

    def write(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = tokenizer(list(self.words), Path(folder))
            self.tokenizer, self.tokenizer_sha256 = file.read_bytes(), sha256(file)
        super().write()

    @property
    def interface(self) -> dict[str, Any]:  # type: ignore[override]
        vocabulary = {"vocabulary": len(self.words) + len(data.SPECIAL), "pad": 0, "separator": 3}
        return {
            "classes": CLASSES,
            "length": LENGTH,
            **vocabulary,
            "tokenizer_sha256": self.tokenizer_sha256,
            "pair": False,
        }

    def row(self, index: int, right: bool) -> dict[str, Any]:
        label = index % 2
        return {"label": label, "prediction": label if right else 2, "confidence": 0.9, "correct": int(right)}

    def write_onnx(self, file: Path, wrong: int, note: str) -> None:
        write_onnx(file, self.words, wrong, note)
        (file.parent / "tokenizer.json").write_bytes(self.tokenizer)

    def _write_data(self) -> str:
        rows = []
        for part, count in SPLIT.items():
            for index in range(count):
                text = written(min(index, self.hardest), index % 2)
                row = {"id": f"{self.ids}-{part}-{index}", "split": part, "label": index % 2}
                content = hashlib.sha256(text.encode()).hexdigest()
                rows.append({**row, "length": 4, "sha256": content, "flipped": 0, "text": text})
        table = pd.DataFrame(rows)
        prepared = f"data/prepared/{self.task}/tiny"
        manifest = self.put(f"{prepared}/manifest.csv", table.to_csv(index=False))
        kept = data.read_tokenizer(self.put(f"{prepared}/tokenizer.json", self.tokenizer))
        tokens, _ = data.encode(kept, table["text"].tolist(), None, LENGTH)
        np.save(self.folder / prepared / "tokens.npy", tokens)
        np.save(self.folder / prepared / "labels.npy", table["label"].to_numpy(dtype=np.int64))
        self.put(f"{prepared}/dataset.json", json.dumps({**self.interface, "metric": self.metric}))
        proof = {"dataset": "tiny", "task": self.task, "manifest": sha256(manifest)}
        self.put(f"data/validated/{self.task}/tiny.json", proof)
        return sha256(manifest)


def written(number: int, label: int) -> str:
    """The text of a number, as a newswire would have it."""
    return f"{('Alpha', 'BETA')[label]}, 17.5% {NUMBERS[number].upper()}!"


def write_onnx(file: Path, words: tuple[str, ...], wrong: int, note: str) -> None:
    """Sums over words: class a or b by its name, class c for numbers from TEST - wrong on; padding counts nothing."""
    late = [word in NUMBERS and NUMBERS.index(word) >= TEST - wrong for word in words]
    table = np.zeros((len(data.SPECIAL) + len(words), 3), dtype=np.float32)
    for place, (word, beyond) in enumerate(zip(words, late, strict=True), start=len(data.SPECIAL)):
        table[place] = [10 * (word == "alpha"), 10 * (word == "beta"), 20 * beyond]
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "tokens"], ["found"]),
            helper.make_node("ReduceSum", ["found", "axes"], ["logits"], keepdims=0),
        ],
        note,
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [
            helper.make_tensor("table", TensorProto.FLOAT, table.shape, table.ravel()),
            helper.make_tensor("axes", TensorProto.INT64, [1], [1]),
        ],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(file))
