"""Export and latency of a small BERT: tokens of any number and length, and the tokenizer that travels with it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
import yaml

from data.errors import UserError
from data.files import sha256, write_json
from models.artifacts import Description, load_model, save_model
from models.text import build
from stages import latency, paths
from stages.export import __main__ as export
from stages.export import text as task

PAD, SEPARATOR, LENGTH, VOCABULARY = 0, 3, 11, 50
CLASSES = ["one", "two", "three"]
NETWORK = {"name": "bert", "layers": 2, "hidden": 16, "heads": 2}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two teachers, one of which never learnt its task, a student with lively weights, and 12 prepared texts."""
    monkeypatch.chdir(tmp_path)
    common = {"task": "text", "dataset": "x"}
    parameters: dict[str, Any] = {
        "sources": {
            "x": {
                "kind": "folder", "path": ".", "tree_digest": "0" * 64, "licence": "-", "credit": "-",
                "redistributable": True,
            }
        },
        "datasets": {
            "x": {
                "task": "text", "source": "x", "encoder": "none", "format": "table",
                "files": {"train": "x.csv"}, "length": LENGTH,
                "split": {"validation": 7, "test": 3}, "tokenizer": {"kind": "wordpiece"},
            }
        },
        "teachers": {
            "masked": {**common, "start": "none", "objective": "mlm", "network": NETWORK},
            "big": {**common, "start": "none", "objective": "task", "network": NETWORK},
        },
        "students": {"small": {**common, "method": "alone", "teacher": "none", "network": NETWORK}},
        "exports": {"small": common},
        "tasks": {"text": {}},
    }  # fmt: skip
    Path("params.yaml").write_text(yaml.safe_dump(parameters))
    prepared = paths.prepared("text", "x")
    prepared.mkdir(parents=True)
    generator = np.random.default_rng(0)
    tokens = np.full((12, LENGTH), PAD, np.int32)
    for row in range(12):
        words = LENGTH - 2 if row == 5 else int(generator.integers(1, LENGTH - 1))  # a text of the full length
        tokens[row, : words + 2] = [2, *generator.integers(4, VOCABULARY, words), SEPARATOR]
    tokens[6, 2], tokens[6, 5] = SEPARATOR, SEPARATOR  # a pair
    np.save(prepared / "tokens.npy", tokens)
    np.save(prepared / "labels.npy", generator.integers(0, 3, 12))
    splits = ["train"] * 2 + ["validation"] * 7 + ["test"] * 3
    pd.DataFrame({"id": [str(n) for n in range(12)], "split": splits}).to_csv(prepared / "manifest.csv", index=False)
    (prepared / "tokenizer.json").write_text('{"a": "tokenizer"}')
    interface = {
        "classes": CLASSES, "length": LENGTH, "vocabulary": VOCABULARY, "pad": PAD, "separator": SEPARATOR,
        "tokenizer_sha256": sha256(prepared / "tokenizer.json"), "pair": False,
    }  # fmt: skip
    write_json(prepared / "dataset.json", interface)
    network = {**NETWORK, "intermediate": None, "positions": None, "dropout": 0.1}
    for seed, (name, kind) in enumerate((("masked", "teacher"), ("big", "teacher"), ("small", "student"))):
        torch.manual_seed(seed)
        model = build({"network": network, "interface": interface})
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
        folder = paths.trained("text", name)
        folder.mkdir(parents=True)
        save_model(
            folder, model, Description(name, "text", kind, network, interface, {}, {"name": "x"}, None, None, [])
        )
    return tmp_path


def test_the_exported_graph_is_the_student(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "BATCH", 3)
    export.main("small")
    folder, prepared = paths.exported("text", "small"), paths.prepared("text", "x")
    description = json.loads((folder / "model.json").read_text())
    assert description["onnx_sha256"] == sha256(folder / "model.onnx")
    assert description["input"] == {"name": "tokens", "shape": ["batch", "length"], "dtype": "int64"}
    assert description["outputs"] == [{"name": "logits", "shape": ["batch", 3], "dtype": "float32"}]
    assert (folder / "tokenizer.json").read_bytes() == (prepared / "tokenizer.json").read_bytes()
    network, _ = load_model(paths.trained("text", "small"))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    tokens = np.load(prepared / "tokens.npy")[2:9].astype(np.int64)
    with torch.no_grad():
        logits = network(torch.from_numpy(tokens)).logits.numpy()
    assert np.ptp(logits, axis=0).min() > 0.1
    for count in (1, 2, 7):
        np.testing.assert_allclose(session.run(None, {"tokens": tokens[:count]})[0], logits[:count], atol=1e-5)
    for row, text in enumerate(tokens):  # alone, without padding
        length = int(np.flatnonzero(text).max()) + 1
        np.testing.assert_allclose(session.run(None, {"tokens": text[None, :length]})[0][0], logits[row], atol=1e-5)
    parity = description["parity"]
    assert parity["samples"] == 7
    labels = np.load(prepared / "labels.npy")[2:9]
    assert parity["metric"] == {name: (logits.argmax(1) == labels).mean() for name in ("onnx", "pytorch")}
    first = {path.name: sha256(path) for path in folder.iterdir()}
    assert sorted(first) == ["model.json", "model.onnx", "tokenizer.json"]
    written = (folder / "model.onnx").read_bytes()
    assert str(project).encode() not in written
    assert b"site-packages" not in written
    export.main("small")
    assert {path.name: sha256(path) for path in folder.iterdir()} == first


def test_a_difference_at_another_length_counts(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "BATCH", 4)
    inputs, target = task.inputs(paths.prepared("text", "x"), None)  # type: ignore[arg-type]
    lengths = []

    class Runtime:
        """Right at full length; off by 3, and of another opinion, at any other."""

        def run(self, _: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            lengths.append(feed["tokens"].shape)
            logits = np.zeros((len(feed["tokens"]), 3), np.float32)
            logits[0, 1] = 0 if feed["tokens"].shape[1] == LENGTH else 3
            return [logits]

    def graph(tokens: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.zeros(len(tokens), 3),)

    difference, metric, shapes = export.compare(task, Runtime(), graph, inputs, target)  # type: ignore[arg-type]
    assert difference == {"logits": 3.0}
    assert metric["onnx"] == metric["pytorch"] == (target == 0).mean()
    assert set(lengths) == {(4, LENGTH), (4, LENGTH // 2), (3, LENGTH), (3, LENGTH // 2)}
    assert shapes["logits"][0] == (3, 3)


@pytest.mark.parametrize("gone", [True, False])
def test_another_tokenizer_is_refused(project: Path, gone: bool) -> None:
    file = paths.prepared("text", "x") / "tokenizer.json"
    file.unlink() if gone else file.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json is not what small was trained with.*dvc repro"):
        export.main("small")
    assert not paths.exported("text", "small").exists()


def test_latency_is_of_the_full_length_and_of_teachers_of_the_task(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.01)
    monkeypatch.setattr(latency, "LEAST", 2)
    export.main("small")
    shapes = []
    times = latency._times
    monkeypatch.setattr(
        latency, "_times", lambda run, *rest: (shapes.append(run.args[1]["tokens"].shape), times(run, *rest))[1]
    )
    latency.main("text")
    measured = json.loads(paths.latency("text").read_text())
    assert set(measured["models"]) == {"big", "small"}
    assert set(shapes) == {(1, LENGTH), (32, LENGTH)}
    assert "full length" in measured["inputs"]
