"""Export and latency on a small trained student, through the real command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml

from data import recognition as data
from data.files import sha256
from models.artifacts import Description, load_model, read_description, save_model
from models.recognition import build
from stages import latency, paths, prepare
from stages.export import __main__ as export
from stages.export import recognition as task

ROOT = Path(__file__).parents[2]
NAMES = ["a", "b", "c"]
NETWORK = {"name": "resnet", "widths": [4, 6], "blocks": 1, "embedding": 5}
MODELS = (("big", "teacher", 8), ("small", "student", 4))


def train(classes: list[str], **network: object) -> None:
    """Teacher and student with random weights and lively statistics."""
    for name, kind, resolution in MODELS:
        interface = {"classes": classes, "channels": 1, "resolution": resolution, "mean": [0.4], "std": [0.2]}
        described = {"network": {**NETWORK, **network}, "interface": interface}
        torch.manual_seed(resolution)
        model = build(described)
        for _ in range(5):
            model(torch.rand(16, 1, resolution, resolution))
        folder = paths.trained("recognition", name)
        folder.mkdir(parents=True, exist_ok=True)
        description = Description(
            name, "recognition", kind, **described, recipe={}, dataset={"name": "x"}, teacher=None, sources=[]
        )
        save_model(folder, model.eval(), description)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher and a student, and a prepared data set of 8 x 8 images."""
    monkeypatch.chdir(tmp_path)
    parameters = {
        "sources": {"x": {"kind": "folder", "path": ".", "tree_digest": "0" * 64, "licence": "-", "credit": "-"}},
        "datasets": {
            "x": {
                "task": "recognition",
                "source": "x",
                "encoder": "none",
                "format": "csv",
                "file": "x.csv",
                "image_size": 8,
            }
        },
        "teachers": {"big": {"task": "recognition", "dataset": "x", "start": "none", "network": NETWORK}},
        "students": {
            "small": {"task": "recognition", "dataset": "x", "method": "alone", "teacher": "none", "resolution": 4}
        },
        "exports": {"small": {"task": "recognition", "dataset": "x"}},
        "tasks": {"recognition": {}},
    }
    parameters["sources"]["x"]["redistributable"] = True
    parameters["datasets"]["x"] |= {"channels": 1, "classes": NAMES, "split": {"validation": 20, "test": 10}}
    parameters["students"]["small"]["network"] = NETWORK
    Path("params.yaml").write_text(yaml.safe_dump(parameters))
    generator = np.random.default_rng(0)
    rows = np.column_stack([generator.integers(0, 256, (60, 64)), np.repeat([0, 1, 2], 20)])
    paths.raw("x").mkdir(parents=True)
    np.savetxt(paths.raw("x") / "x.csv", rows, fmt="%d", delimiter=",")
    prepare.main("x")
    train(NAMES)
    return tmp_path


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_the_exported_graph_is_the_student(project: Path) -> None:
    done = command("stages.export", "small")
    assert done.returncode == 0, done.stderr
    folder = paths.exported("recognition", "small")
    description = json.loads((folder / "model.json").read_text())
    assert description["onnx_sha256"] == sha256(folder / "model.onnx")
    assert description["parity"]["samples"] == 20
    assert description["input"] == {"name": "images", "shape": ["batch", 1, 4, 4], "dtype": "float32"}
    network, _ = load_model(paths.trained("recognition", "small"))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    _, images, _ = data.load(paths.prepared("recognition", "x"), "test")
    small = data.downsample(data.to_unit(images), 4)
    for count in (1, 3, 10):
        logits, embedding = session.run(None, {"images": small[:count].numpy()})
        with torch.no_grad():
            expected = network(small[:count])
        np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-5)
        np.testing.assert_allclose(embedding, expected.embedding.numpy(), atol=1e-5)
        assert embedding.shape == (count, 5)
    first = {path.name: sha256(path) for path in folder.iterdir()}
    assert str(project).encode() not in (folder / "model.onnx").read_bytes()
    assert command("stages.export", "small").returncode == 0
    assert {path.name: sha256(path) for path in folder.iterdir()} == first


@pytest.mark.parametrize("unit", [False, True])
def test_without_classes_the_embedding_is_all(project: Path, unit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    train([], unit=unit)
    export.main("small")
    folder = paths.exported("recognition", "small")
    description = json.loads((folder / "model.json").read_text())
    assert description["outputs"] == [{"name": "embedding", "shape": ["batch", 5], "dtype": "float32"}]
    assert list(description["parity"]["largest_difference"]) == ["embedding"]
    network, _ = load_model(paths.trained("recognition", "small"))
    _, images, labels = data.load(paths.prepared("recognition", "x"), "validation")
    with torch.no_grad():
        expected = network(data.downsample(data.to_unit(images), 4)).embedding.numpy()
    inputs, _ = task.inputs(paths.prepared("recognition", "x"), read_description(paths.trained("recognition", "small")))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    assert [output.name for output in session.get_outputs()] == ["embedding"]
    np.testing.assert_allclose(session.run(None, inputs)[0], expected, atol=1e-5)
    assert np.allclose(np.linalg.norm(expected, axis=1), 1) is unit
    wanted = pytest.approx(slow_recall(expected, labels.numpy()), abs=1e-9)
    assert description["parity"]["metric"] == {"onnx": wanted, "pytorch": wanted}
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    latency.main("recognition")
    assert set(json.loads(paths.latency("recognition").read_text())["models"]) == {"big", "small"}


def slow_recall(points: np.ndarray, labels: np.ndarray) -> float:
    """Recall@1 one image at a time."""
    hits = []
    for index in range(len(points)):
        distance = {other: np.abs(points[other] - points[index]) for other in range(len(points)) if other != index}
        squared = {other: float((apart.astype(np.float64) ** 2).sum()) for other, apart in distance.items()}
        same = [squared[other] for other in squared if labels[other] == labels[index]]
        if same:
            others = [squared[other] for other in squared if labels[other] != labels[index]]
            hits.append(not others or min(same) < min(others))
    return float(np.mean(hits)) if hits else 0.0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("classes", [True, False])
def test_a_parity_check_asks_for_what_the_student_answers(seed: int, classes: bool) -> None:
    """Classes with one image and ties included; the same outputs, and labels that are its own or others'."""
    generator = np.random.default_rng(seed)
    points = generator.integers(0, 3, (20, 2)) if seed % 2 else generator.normal(size=(20, 3))
    labels = generator.integers(0, 9, 20)
    labels[0] = 9
    points, logits = points.astype(np.float32), generator.normal(size=(20, 10)).astype(np.float32)
    found = task.answers([logits, points] if classes else [points])
    assert task.metric(found, labels[:, None]) == pytest.approx(slow_recall(points, labels))
    if classes:
        assert task.metric(found, labels) == np.mean(
            [row.argmax() == label for row, label in zip(logits, labels, strict=True)]
        )


def test_recall_of_what_asks_nothing_and_of_what_collapsed() -> None:
    found = task.answers([np.zeros((4, 2), dtype=np.float32)])
    assert task.metric(found, np.arange(4)[:, None]) == 0
    assert task.metric(found, np.array([0, 0, 1, 1])[:, None]) == 0
    assert task.metric(found, np.zeros((4, 1), dtype=int)) == 1


def test_a_difference_beyond_tolerance_is_refused(project: Path) -> None:
    text = Path("params.yaml").read_text()
    parameters = yaml.safe_load(text)
    parameters["exports"]["small"]["tolerance"] = 1e-30
    Path("params.yaml").write_text(yaml.safe_dump(parameters))
    done = command("stages.export", "small")
    assert done.returncode == 1
    assert "more than exports.small.tolerance = 1e-30" in done.stderr
    assert "Traceback" not in done.stderr
    assert not paths.exported("recognition", "small").exists()


def test_latency_is_measured_for_teacher_and_student(project: Path) -> None:
    done = command("stages.latency", "recognition")
    assert done.returncode == 1
    assert "dvc repro export@small" in done.stderr
    assert command("stages.export", "small").returncode == 0
    done = command("stages.latency", "recognition")
    assert done.returncode == 0, done.stderr
    measured = json.loads(paths.latency("recognition").read_text())
    assert set(measured["models"]) == {"big", "small"}
    small = measured["models"]["small"]
    assert small["onnx_sha256"] == sha256(paths.exported("recognition", "small") / "model.onnx")
    for batch in ("1", "32"):
        assert 0 < small["latency_ms"][batch]["p50"] <= small["latency_ms"][batch]["p95"]
    assert measured["threads"] == 1
