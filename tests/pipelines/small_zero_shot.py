"""The project in miniature for zero-shot recognition: a student with `wrong` mistakes takes the last samples for "c".

A sample has four features: three say its class, the last its number. Class a is seen, b unseen, c plays unseen on the
validation split. `best` has a generator beside it, which knows the attributes of all classes.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import yaml
from onnx import TensorProto, helper, save
from safetensors.numpy import save_file

from data.files import sha256
from models.zero_shot import Output
from stages.evaluate.zero_shot import evaluate
from stages.parameters.zero_shot import Task

sys.path.insert(0, str(Path(__file__).parent))
from small_project import CLASSES, SPLIT, TEST, Model, Small

FEATURES = 4
ROLES = ["seen", "validation", "unseen"]
ORDER = ["a", "c", "b"]  # of the data set: labels are its places
ATTRIBUTES = ["stripes", "legs", "long, soft fur"]
ROWS = np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 0.6, 0.8]])
PARAMETERS = """\
# A comment at the top.
code: .

sources:
  tiny: {kind: folder, path: unused, tree_digest: "%s", licence: none, credit: nobody, redistributable: %s}

datasets:
  tiny: {task: zero_shot, source: tiny, encoder: none, format: arrays, file: tiny.npz, split: {validation: 0.1}}

teachers:
  teacher: &teacher
    task: zero_shot
    dataset: tiny
    start: none
    network: {name: mlp, hidden: 8}   # two spaces more than needed

# Small models.
students:
%s  # The last comment of the section.

# What is deployed.
exports:
%s
tasks:
  zero_shot: {}
gates:
  zero_shot: %s
"""
STUDENT = """\
  %s:
    task: zero_shot
    dataset: tiny
    method: d3gzsl
    teacher: teacher
    network: {name: mlp, hidden: 8}
    generator: {name: clswgan,
                hidden: 8}
    classifier: {mode: two_stage, samples: 7, learning_rate: 1.0e-3}
"""
BASELINE = """\
  %s:
    {task: zero_shot, dataset: tiny, method: eszsl, teacher: none, network: {name: mlp, hidden: null}}
"""


@dataclass
class SmallZeroShot(Small):
    """The same project for another task. `known` has the classes of models that know others than the data set's."""

    task: ClassVar[str] = "zero_shot"
    metric: ClassVar[str] = "harmonic_mean"
    input: ClassVar[dict[str, Any]] = {"name": "inputs", "shape": ["batch", FEATURES], "dtype": "float32"}

    gates: dict[str, Any] = field(
        default_factory=lambda: {"delta": 0.02, "teacher_share": 0.5, "baseline": "eszsl", "metric": "harmonic_mean"}
    )
    known: dict[str, list[str]] = field(default_factory=dict)
    writing: str = ""

    @property
    def interface(self) -> dict[str, Any]:  # type: ignore[override]
        classes = ["a"] if self.writing == "teacher" else self.known.get(self.writing, ORDER)
        return {"classes": classes, "seen": ["a"], "features": FEATURES, "images": None}

    def write_onnx(self, file: Path, wrong: int, note: str) -> None:
        write_onnx(file, self.interface["classes"], wrong, note)

    def _write_model(self, name: str, model: Model, data: str) -> tuple[str, str]:
        self.writing = name
        weights, onnx = super()._write_model(name, model, data)
        if "." not in name:
            file = self.folder / f"models/trained/{self.task}/{name}/model.json"
            kind = "student" if model.method else "teacher"
            more = {"kind": kind, "network": {"name": "mlp", "hidden": 8, "encoder": None}, "recipe": {}}
            file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
        if model.method in ("d3gzsl", "extended"):
            self.write_generator(name, weights)
        return weights, onnx

    def write_generator(self, name: str, weights: str) -> None:
        """The generator beside a student: attributes of its classes, and which weights it was trained beside."""
        classes = self.known.get(name, ORDER)
        extra = np.eye(3)[[number % 3 for number in range(len(classes) - len(ORDER))]].reshape(-1, 3)
        folder = self.put(f"models/companions/{self.task}/{name}/generator/model.json", {
            "name": f"{name}.generator", "task": self.task, "kind": "companion",
            "network": {"name": "generator", "attributes": 3, "noise": 3, "hidden": 8}, "interface": self.interface,
            "recipe": {}, "dataset": {"name": "tiny"}, "teacher": None, "sources": [],
            "beside": {"name": name, "weights_sha256": weights},
        }).parent  # fmt: skip
        save_file({"attributes": np.concatenate([ROWS, extra]).astype(np.float32)}, str(folder / "weights.safetensors"))
        contents = {"models": ["generator"], "evaluated": [], "tables": []}
        self.put(f"models/companions/{self.task}/{name}/contents.json", contents)

    def _write_data(self) -> str:
        rows, features = [], []
        for part, count in SPLIT.items():
            for index in range(count):
                label = (0, 1 if part == "validation" else 2)[index % 2]
                values = sample(min(index, self.hardest), ORDER[label])
                content = hashlib.sha256(np.array(values).tobytes()).hexdigest()
                rows.append({"id": f"{self.ids}-{part}-{index}", "split": part, "label": label, "sha256": content})
                features.append(values)
        table = pd.DataFrame(rows)
        prepared = f"data/prepared/{self.task}/tiny"
        manifest = self.put(f"{prepared}/manifest.csv", table.to_csv(index=False))
        np.save(self.folder / prepared / "features.npy", np.array(features, dtype=np.float32))
        np.save(self.folder / prepared / "labels.npy", table["label"].to_numpy())
        np.save(self.folder / prepared / "attributes.npy", ROWS.astype(np.float32))
        described = {"classes": ORDER, "roles": ROLES, "attributes": ATTRIBUTES, "features": FEATURES, "images": None}
        described["divisors"] = [1.0] * len(ATTRIBUTES)
        self.put(f"{prepared}/dataset.json", described)
        proof = {"dataset": "tiny", "task": self.task, "manifest": sha256(manifest)}
        self.put(f"data/validated/{self.task}/tiny.json", proof)
        return sha256(manifest)

    def _write_parameters(self) -> None:
        """With comments and a layout that no program would write."""
        texts = {"d3gzsl": STUDENT, "eszsl": BASELINE}
        students = {name: model.method for name, model in self.models.items() if model.method in texts}
        content = PARAMETERS % (
            "0" * 64,
            json.dumps(self.redistributable),
            "".join(texts[str(method)] % name for name, method in students.items()),
            "".join(f"  {name}: {{task: zero_shot, dataset: tiny}}\n" for name in students),
            yaml.safe_dump(self.gates, default_flow_style=True).strip(),
        )
        self.put("params.yaml", content)

    def _samples(self, wrong: int) -> pd.DataFrame:
        """What evaluation says of a model with that many mistakes."""
        weights, bias = linear(self.interface["classes"], wrong)
        network = torch.nn.Linear(*weights.shape)
        network.load_state_dict({"weight": torch.from_numpy(weights.T), "bias": torch.from_numpy(bias)})

        class Answering(torch.nn.Module):
            def forward(self, features: torch.Tensor) -> Output:
                return Output(features, features, network(features.cpu()))

        told: Any = SimpleNamespace(
            interface=self.interface, network={"name": "mlp"}, task=self.task, name="", kind="teacher"
        )
        prepared = self.folder / f"data/prepared/{self.task}/tiny"
        with torch.inference_mode():
            parts = [evaluate(Answering(), told, prepared, split, Task()).samples for split in SPLIT]
        return pd.concat(parts)


def sample(number: int, name: str) -> list[float]:
    """The features of a sample."""
    return [*(float(name == other) for other in CLASSES), number / TEST]


def linear(classes: list[str], wrong: int) -> tuple[np.ndarray, np.ndarray]:
    """(FEATURES, classes) and (classes,): each class by its feature, c also by a number of TEST - wrong or higher."""
    weights, bias = np.zeros((FEATURES, len(classes)), dtype=np.float32), np.zeros(len(classes), dtype=np.float32)
    for column, name in enumerate(classes):
        if name in CLASSES:
            weights[CLASSES.index(name), column] = 10
        else:
            bias[column] = -5
        if name == "c" and wrong:
            weights[3, column], bias[column] = 1e5, -1e5 * (TEST - wrong - 0.5) / TEST
            weights[2, column] = 2e5
    return weights, bias


def write_onnx(file: Path, classes: list[str], wrong: int, note: str) -> None:
    """A student that answers with these classes."""
    weights, bias = linear(classes, wrong)
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["inputs"], ["embedding"]),
            helper.make_node("Gemm", ["embedding", "weights", "bias"], ["logits"]),
        ],
        note,
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["batch", FEATURES])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(classes)]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", FEATURES]),
        ],
        [
            helper.make_tensor("weights", TensorProto.FLOAT, weights.shape, weights.ravel()),
            helper.make_tensor("bias", TensorProto.FLOAT, bias.shape, bias),
        ],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(file))


def usual(folder: Path) -> SmallZeroShot:
    """A teacher of the seen class, a student with a generator and the baseline; `best` is best everywhere."""
    return SmallZeroShot(
        folder,
        {
            "teacher": Model(wrong=0, validation=0.0, method=None),
            "best": Model(wrong=10, validation=0.95, method="d3gzsl"),
            "plain": Model(wrong=12, validation=0.85, method="eszsl"),
        },
    )
