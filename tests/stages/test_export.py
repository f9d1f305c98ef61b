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
from models.artifacts import Description, save_model
from models.recognition import build
from stages import paths, prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher and a student with random weights and lively statistics, and a prepared data set of 8 x 8 images."""
    monkeypatch.chdir(tmp_path)
    network = {"name": "resnet", "widths": [4, 6], "blocks": 1, "embedding": 5}
    names = ["a", "b", "c"]
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
        "teachers": {"big": {"task": "recognition", "dataset": "x", "start": "none", "network": network}},
        "students": {
            "small": {"task": "recognition", "dataset": "x", "method": "alone", "teacher": "none", "resolution": 4}
        },
        "exports": {"small": {"task": "recognition", "dataset": "x"}},
        "tasks": {"recognition": {}},
    }
    parameters["sources"]["x"]["redistributable"] = True
    parameters["datasets"]["x"] |= {"channels": 1, "classes": names, "split": {"validation": 20, "test": 10}}
    parameters["students"]["small"]["network"] = network
    Path("params.yaml").write_text(yaml.safe_dump(parameters))
    generator = np.random.default_rng(0)
    rows = np.column_stack([generator.integers(0, 256, (60, 64)), np.repeat([0, 1, 2], 20)])
    paths.raw("x").mkdir(parents=True)
    np.savetxt(paths.raw("x") / "x.csv", rows, fmt="%d", delimiter=",")
    prepare.main("x")
    for name, kind, resolution in (("big", "teacher", 8), ("small", "student", 4)):
        interface = {"classes": names, "channels": 1, "resolution": resolution, "mean": [0.4], "std": [0.2]}
        torch.manual_seed(resolution)
        model = build({"network": network, "interface": interface})
        for _ in range(5):
            model(torch.rand(16, 1, resolution, resolution))
        folder = paths.trained("recognition", name)
        folder.mkdir(parents=True)
        description = Description(name, "recognition", kind, network, interface, {}, {"name": "x"}, None, None, [])
        save_model(folder, model.eval(), description)
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
    from models.artifacts import load_model

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
