"""A project in miniature as `dvc repro` would leave it, without training: students whose mistakes are known.

Test image i of n holds its number as a grey value. A student with `wrong` mistakes takes the last `wrong` images for
class "c"; its ONNX file and its table of samples say the same.
"""

import dataclasses
import hashlib
import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import yaml
from onnx import TensorProto, helper, save

from data.files import sha256

TASK, SIDE, CLASSES = "recognition", 4, ["a", "b", "c"]
VALIDATION, TEST = 20, 250
SPLIT = {"validation": VALIDATION, "test": TEST}
INTERFACE = {"classes": CLASSES, "channels": 1, "resolution": SIDE, "mean": [0.0], "std": [1.0], "resize": "bicubic"}


@dataclass(frozen=True)
class Model:
    """A model and how good it is."""

    wrong: int
    validation: float
    method: str | None = "kd"
    weights: str = "first"


@dataclass
class Small:
    """The files of a project. Change the fields, then `write` again.

    A model NAME.COMPANION was trained beside the student NAME.
    """

    task: ClassVar[str] = TASK
    metric: ClassVar[str] = "top_1"
    interface: ClassVar[dict[str, Any]] = INTERFACE
    input: ClassVar[dict[str, Any]] = {"name": "images", "shape": ["batch", 1, SIDE, SIDE], "dtype": "float32"}
    network: ClassVar[dict[str, Any]] = {"name": "resnet", "widths": [4]}
    dataset: ClassVar[dict[str, Any]] = {"format": "folder", "image_size": SIDE, "channels": 1, "split": SPLIT}
    teacher: ClassVar[dict[str, Any]] = {}
    student: ClassVar[dict[str, Any]] = {"resolution": SIDE}

    folder: Path
    models: dict[str, Model] = field(default_factory=dict)
    gates: dict[str, Any] = field(default_factory=lambda: {"delta": 0.02, "teacher_share": 0.5})
    ids: str = "row"  # another prefix is other test data
    hardest: int = TEST  # from this image on, none is harder
    redistributable: bool = True

    def write(self) -> None:
        """Everything, as after `dvc repro` and `python -m stages.latency`."""
        data = self._write_data()
        self._write_parameters()
        evaluated, latency = {}, {}
        for name, model in self.models.items():
            evaluated[name], onnx = self._write_model(name, model, data)
            if onnx:
                times = {"p50": 0.5, "p95": 1.0, "runs": 100}
                latency[name] = {"onnx_sha256": onnx, "latency_ms": {"1": times, "32": times}}
        self.put(f"reports/evaluation/{self.task}/models.json", json.dumps(evaluated))
        self.put(f"reports/evaluation/{self.task}/data.json", {"tiny": data})
        self.put(f"reports/latency/{self.task}.json", {"task": self.task, "threads": 1, "models": latency})

    def put(self, path: str, value: Any) -> Path:
        """Write text, bytes or JSON."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, bytes):
            file.write_bytes(value)
        else:
            file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return file

    def change(self, name: str, **changes: Any) -> None:
        """Train a model again, or another way."""
        self.models[name] = dataclasses.replace(self.models[name], **changes)
        self.write()

    def git(self, *arguments: str) -> None:
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", *who, *arguments], cwd=self.folder, check=True, capture_output=True)

    def commit(self) -> None:
        """Commit everything; what the pipeline makes is ignored."""
        if not (self.folder / ".git").exists():
            made = "data\nmodels\nreports\nmlruns\nmlflow.db*\ndecisions\n"
            self.put(".gitignore", made)
            self.git("init", "-q")
        self.git("add", "-A")
        self.git("commit", "-qm", "state", "--allow-empty")

    def image(self, index: int) -> tuple[np.ndarray, Any]:
        """The image of that number, and its label."""
        image = np.zeros((1, SIDE, SIDE), dtype=np.uint8)
        label = index % 2
        image[0, 0, label] = 255
        image[0, 1, 0] = min(index, self.hardest)
        return image, label

    def row(self, index: int, right: bool) -> dict[str, Any]:
        """What evaluation says of a model that is right or wrong about the image of that number."""
        label = index % 2
        prediction = label if right else 2
        answer = {"label": label, "prediction": prediction, "confidence": 0.9, "correct": int(right)}
        return {**answer, "same_class_rank": 1}

    def write_onnx(self, file: Path, wrong: int, note: str) -> None:
        """A model with that many mistakes."""
        write_onnx(file, wrong, note)

    def _write_data(self) -> str:
        rows, images, labels = [], [], []
        for part, count in (("validation", VALIDATION), ("test", TEST)):
            for index in range(count):
                image, label = self.image(index)
                content = hashlib.sha256(image.tobytes()).hexdigest()
                images.append(image)
                labels.append(label)
                row = {"id": f"{self.ids}-{part}-{index}", "split": part, "sha256": content}
                if isinstance(label, int):
                    rows.append({**row, "label": label})
                else:
                    rows.append({**row, "labels_sha256": hashlib.sha256(label.tobytes()).hexdigest()})
        prepared = f"data/prepared/{self.task}/tiny"
        manifest = self.put(f"{prepared}/manifest.csv", pd.DataFrame(rows).to_csv(index=False))
        np.save(self.folder / prepared / "images.npy", np.stack(images))
        np.save(self.folder / prepared / "labels.npy", np.array(labels))
        self.put(f"{prepared}/dataset.json", {"classes": CLASSES, "held_out": []})
        proof = {"dataset": "tiny", "task": self.task, "manifest": sha256(manifest)}
        self.put(f"data/validated/{self.task}/tiny.json", proof)
        return sha256(manifest)

    def _write_parameters(self) -> None:
        rights = {"licence": "none", "credit": "nobody", "redistributable": self.redistributable}
        common = {"task": self.task, "dataset": "tiny"}
        students = {name: model for name, model in self.models.items() if model.method}
        dataset = {"task": self.task, "source": "tiny", "encoder": "none", **self.dataset}
        entries = {
            name: {
                **common,
                "method": model.method,
                "teacher": "none" if model.method == "alone" else "teacher",
                "network": self.network,
                **self.student,
            }
            for name, model in students.items()
        }
        content = {
            "sources": {"tiny": {"kind": "folder", "path": "unused", "tree_digest": "0" * 64, **rights}},
            "datasets": {"tiny": dataset},
            "teachers": {"teacher": {**common, "start": "none", "network": self.network, **self.teacher}},
            "students": entries,
            "exports": dict.fromkeys(entries, common),
            "tasks": {self.task: {}},
            "gates": {self.task: self.gates},
        }
        self.put("params.yaml", yaml.safe_dump(content))

    def _write_model(self, name: str, model: Model, data: str) -> tuple[str, str]:
        """Its files; sha256 of weights and ONNX file (none of a teacher)."""
        student, _, companion = name.partition(".")
        trained = (
            f"models/companions/{self.task}/{student}/{companion}"
            if companion
            else f"models/trained/{self.task}/{name}"
        )
        weights = sha256(self.put(f"{trained}/weights.safetensors", f"{name} {model.weights}"))
        if companion:
            beside = [other.partition(".")[2] for other in self.models if other.startswith(f"{student}.")]
            contents = {"models": beside, "evaluated": beside, "tables": []}
            self.put(f"models/companions/{self.task}/{student}/contents.json", contents)
        source = {"name": "tiny", "licence": "none", "redistributable": self.redistributable}
        description = {
            "name": name,
            "task": self.task,
            "interface": self.interface,
            "dataset": {"name": "tiny", "digest": data},
            "teacher": {"name": "teacher", "weights_sha256": "f" * 64} if model.method not in (None, "alone") else None,
            "sources": [source],
            "parameters": 51,
            "weights_sha256": weights,
        }
        self.put(f"{trained}/model.json", description)
        self.put(f"{trained}/record.jsonl", json.dumps({"stage": "distill", "key": name, "digest": "d" * 64}) + "\n")
        self.put(
            f"reports/metrics/{self.task}/{name}.json",
            {"validation": {self.metric: model.validation}, "test": {self.metric: 1 - model.wrong / TEST}},
        )
        self.put(f"reports/evaluation/{self.task}/{name}.samples.csv", self._samples(model.wrong).to_csv(index=False))
        if not model.method:
            return weights, ""
        exported = self.folder / f"models/exported/{self.task}/{name}"
        exported.mkdir(parents=True, exist_ok=True)
        self.write_onnx(exported / "model.onnx", model.wrong, f"{name} {model.weights}")
        onnx = sha256(exported / "model.onnx")
        more = {
            "onnx_sha256": onnx,
            "input": self.input,
            "outputs": [{"name": "logits", "shape": ["batch", 3], "dtype": "float32"}],
            "parity": {
                "samples": VALIDATION,
                "largest_difference": {"logits": 1e-6, "embedding": 0.0},
                "metric": {"onnx": 0.9, "pytorch": 0.9},
            },
        }
        self.put(f"models/exported/{self.task}/{name}/model.json", {**description, **more})
        return weights, onnx

    def _samples(self, wrong: int) -> pd.DataFrame:
        rows = []
        for part, count in (("validation", VALIDATION), ("test", TEST)):
            for index in range(count):
                right = part == "validation" or min(index, self.hardest) < TEST - wrong
                row = {"split": part, "id": f"{self.ids}-{part}-{index}"}
                rows.append(row | self.row(index, right))
        return pd.DataFrame(rows)


def write_onnx(file: Path, wrong: int, note: str, classes: int = 3, channels: int = 1) -> None:
    """Linear: class a or b by its pixel, and class c for images whose number is TEST - wrong or higher.

    The embedding are the pixels. Without classes that is all.
    """
    pixels = channels * SIDE * SIDE
    weights = np.zeros((pixels, classes), dtype=np.float32)
    nodes = [helper.make_node("Flatten", ["images"], ["embedding"], axis=1)]
    outputs, values = {"embedding": pixels}, {}
    if classes:
        weights[0, 0] = weights[1, 1] = 10.0
        weights[SIDE, 2] = 1e4
        values = {"weights": weights, "bias": np.array([0, 0, -1e4 * (TEST - wrong - 0.5) / 255], dtype=np.float32)}
        nodes.append(helper.make_node("Gemm", ["embedding", "weights", "bias"], ["logits"]))
        outputs = {"logits": classes, **outputs}
    graph = helper.make_graph(
        nodes,
        note,
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", channels, SIDE, SIDE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name, width in outputs.items()],
        [
            helper.make_tensor(name, TensorProto.FLOAT, value.shape, value.ravel().tolist())
            for name, value in values.items()
        ],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(file))


@dataclass
class Faces(Small):
    """Students without classes: what may be wrong is an image's nearest neighbour."""

    metric: ClassVar[str] = "recall_at_1"
    interface: ClassVar[dict[str, Any]] = {**INTERFACE, "classes": []}

    gates: dict[str, Any] = field(
        default_factory=lambda: {"delta": 0.02, "teacher_share": 0.5, "metric": "recall_at_1"}
    )

    def row(self, index: int, right: bool) -> dict[str, Any]:
        label = index % 2
        answer = {"label": label, "prediction": label if right else 1 - label, "confidence": None}
        return {**answer, "correct": int(right), "same_class_rank": 1 if right else 2, "neighbours": ""}

    def write_onnx(self, file: Path, wrong: int, note: str) -> None:
        write_onnx(file, wrong, note, classes=0)


def usual(folder: Path, kind: type[Small] = Small) -> Small:
    """A teacher, two students and the baseline; `best` is best on validation and on test."""
    return kind(
        folder,
        {
            "teacher": Model(wrong=2, validation=1.0, method=None),
            "best": Model(wrong=10, validation=0.95),
            "second": Model(wrong=12, validation=0.9),
            "plain": Model(wrong=12, validation=0.85, method="alone"),
        },
    )
