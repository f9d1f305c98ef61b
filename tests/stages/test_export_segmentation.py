"""Export and latency of a small network for segmentation: batches, sizes that no pool divides, large outputs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml

from data.errors import UserError
from data.files import sha256, write_json
from models.artifacts import Description, load_model, save_model
from models.segmentation import build
from stages import latency, paths
from stages.export import __main__ as export
from stages.export import segmentation as task

CLASSES = ["road", "car", "sky"]
SIZE = [40, 56]  # features of 5 x 7
ENCODER = {"name": "resnet", "widths": [4, 6, 6, 8], "blocks": [1, 1, 1, 1], "block": "basic", "stem": "light"}
HEADS: dict[str, dict[str, Any]] = {
    "pspnet": {"name": "pspnet", "pools": [1, 2, 3, 6]},
    "deeplabv3": {"name": "deeplabv3", "dilations": [1, 2, 12]},
}


@pytest.fixture(params=sorted(HEADS))
def project(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher and a student with random weights and lively statistics, and 12 prepared images."""
    monkeypatch.chdir(tmp_path)
    network = {**HEADS[request.param], "encoder": ENCODER, "width": 4, "auxiliary": 3, "dropout": 0.1}
    common = {"task": "segmentation", "dataset": "x"}
    parameters: dict[str, Any] = {
        "sources": {"x": {"kind": "folder", "path": ".", "tree_digest": "0" * 64, "licence": "-", "credit": "-"}},
        "datasets": {
            "x": {"task": "segmentation", "source": "x", "encoder": "none", "format": "folders", "image_size": SIZE}
        },
        "teachers": {"big": {**common, "start": "none", "network": network}},
        "students": {"small": {**common, "method": "alone", "teacher": "none", "network": network}},
        "exports": {"small": common},
        "tasks": {"segmentation": {}},
    }
    parameters["sources"]["x"]["redistributable"] = True
    parameters["datasets"]["x"]["classes"] = CLASSES
    Path("params.yaml").write_text(yaml.safe_dump(parameters))
    generator = np.random.default_rng(0)
    prepared = paths.prepared("segmentation", "x")
    prepared.mkdir(parents=True)
    np.save(prepared / "images.npy", generator.integers(0, 256, (12, 3, *SIZE)).astype(np.uint8))
    labels = generator.integers(0, 3, (12, *SIZE))
    labels[generator.random(labels.shape) < 0.2] = 255
    np.save(prepared / "labels.npy", labels.astype(np.uint8))
    splits = ["train"] * 2 + ["validation"] * 7 + ["test"] * 3
    pd.DataFrame({"id": [str(n) for n in range(12)], "split": splits}).to_csv(prepared / "manifest.csv", index=False)
    interface = {"classes": CLASSES, "channels": 3, "size": SIZE, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    write_json(prepared / "dataset.json", {**interface, "fit": "resize"})
    interface |= {"fit": "resize", "resize": "bilinear with antialiasing"}
    for seed, (name, kind) in enumerate((("big", "teacher"), ("small", "student"))):
        torch.manual_seed(seed)
        model = build({"network": network, "interface": interface})
        for _ in range(5):
            model(torch.rand(8, 3, *SIZE))
        folder = paths.trained("segmentation", name)
        folder.mkdir(parents=True)
        description = Description(name, "segmentation", kind, network, interface, {}, {"name": "x"}, None, None, [])
        save_model(folder, model.eval(), description)
    return tmp_path


def test_the_exported_graph_is_the_student(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "BATCH", 3)  # 7 images in three batches, the last of them smaller
    export.main("small")
    folder = paths.exported("segmentation", "small")
    description = json.loads((folder / "model.json").read_text())
    assert description["onnx_sha256"] == sha256(folder / "model.onnx")
    assert description["input"] == {"name": "images", "shape": ["batch", 3, *SIZE], "dtype": "float32"}
    assert description["outputs"] == [{"name": "logits", "shape": ["batch", 3, *SIZE], "dtype": "float32"}]
    parity = description["parity"]
    assert parity["samples"] == 7
    assert 0 <= parity["largest_difference"]["logits"] < 1e-4
    network, _ = load_model(paths.trained("segmentation", "small"))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    prepared = paths.prepared("segmentation", "x")
    unit = torch.from_numpy(np.load(prepared / "images.npy")[2:9]).float() / 255
    with torch.no_grad():
        logits = F.interpolate(network(unit).logits, SIZE, mode="bilinear", align_corners=False)
    for count in (1, 2, 7):
        (found,) = session.run(None, {"images": unit[:count].numpy()})
        np.testing.assert_allclose(found, logits[:count], atol=1e-4)
    truth = np.load(prepared / "labels.npy")[2:9]
    answer = logits.argmax(1).numpy()
    ratios = []
    for label in range(3):
        pairs = [(a, b) for a, b in zip(truth.ravel(), answer.ravel(), strict=True) if a != 255]
        ratios.append(sum(a == b == label for a, b in pairs) / sum(label in pair for pair in pairs))
    assert parity["metric"]["pytorch"] == pytest.approx(np.mean(ratios), abs=1e-9)
    assert parity["metric"]["onnx"] == pytest.approx(np.mean(ratios), abs=1e-3)
    first = {path.name: sha256(path) for path in folder.iterdir()}
    assert str(project).encode() not in (folder / "model.onnx").read_bytes()
    export.main("small")
    assert {path.name: sha256(path) for path in folder.iterdir()} == first


def test_the_auxiliary_head_is_not_deployed(project: Path) -> None:
    import onnx

    export.main("small")
    graph = onnx.load(paths.exported("segmentation", "small") / "model.onnx").graph
    assert not [tensor.name for tensor in graph.initializer if "auxiliary" in tensor.name]


def test_a_difference_or_no_number_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "compare", lambda *_: ({"logits": float("nan")}, {}, {}))
    with pytest.raises(
        UserError, match=r"differs from PyTorch by \{'logits': nan\}, more than exports.small.tolerance"
    ):
        export.main("small")
    assert not paths.exported("segmentation", "small").exists()


def test_the_largest_difference_of_all_batches_counts(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "BATCH", 2)
    inputs, target = task.inputs(paths.prepared("segmentation", "x"), None)  # type: ignore[arg-type]

    class Runtime:
        """Zeros, but for one number in the second batch."""

        wrong = 5.0
        batch = 0

        def run(self, _: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            self.batch += 1
            logits = np.zeros((len(feed["images"]), 3, *SIZE), np.float32)
            logits[0, 1, 3, 4] = self.wrong if self.batch == 2 else 0
            return [logits]

    def graph(images: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.zeros(len(images), 3, *SIZE),)

    difference, _, shapes = export.compare(task, Runtime(), graph, inputs, target)  # type: ignore[arg-type]
    assert difference == {"logits": 5.0}
    assert shapes == {"logits": ((1, 3, *SIZE), "float32")}
    unknown = Runtime()
    unknown.wrong = float("nan")
    assert np.isnan(export.compare(task, unknown, graph, inputs, target)[0]["logits"])  # type: ignore[arg-type]


def test_no_more_is_checked_than_fits_into_memory(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = paths.prepared("segmentation", "x")
    monkeypatch.setattr(task, "NUMBERS", 4 * 3 * SIZE[0] * SIZE[1])
    inputs, target = task.inputs(prepared, None)  # type: ignore[arg-type]
    assert (len(inputs["images"]), len(target)) == (4, 4)
    monkeypatch.setattr(task, "NUMBERS", 1)
    assert len(task.inputs(prepared, None)[0]["images"]) == 1  # type: ignore[arg-type]
    np.testing.assert_allclose(inputs["images"], np.load(prepared / "images.npy")[2:6] / 255, atol=1e-6)


def test_latency_is_measured_for_teacher_and_student(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.01)
    monkeypatch.setattr(latency, "LEAST", 2)
    export.main("small")
    latency.main("segmentation")
    measured = json.loads(paths.latency("segmentation").read_text())["models"]
    assert set(measured) == {"big", "small"}
    for values in measured.values():
        assert 0 < values["latency_ms"]["32"]["p50"] <= values["latency_ms"]["32"]["p95"]


def test_a_batch_that_is_too_large_is_left_out(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inputs of three channels and outputs of three classes count."""
    monkeypatch.setattr(latency, "SECONDS", 0.01)
    monkeypatch.setattr(latency, "LEAST", 2)
    export.main("small")
    numbers = 32 * (3 + 3) * SIZE[0] * SIZE[1]
    for limit, batches in ((numbers, ["1", "32"]), (numbers - 1, ["1"]), (0, ["1"])):
        monkeypatch.setattr(latency, "NUMBERS", limit)
        latency.main("segmentation")
        measured = json.loads(paths.latency("segmentation").read_text())["models"]
        assert {name: list(values["latency_ms"]) for name, values in measured.items()} == {
            "big": batches,
            "small": batches,
        }
        assert ("batch 32" in capsys.readouterr().out) is ("32" in batches)


@pytest.mark.parametrize(
    ("each", "seconds", "runs"),
    [(0.001, 1.0, 1000), (0.1, 1.0, 30), (2.0, 1.0, 15), (20.0, 1.0, 5), (0.001, 0.0, 30), (2.0, 0.0, 15)],
)
def test_slow_runs_are_few(monkeypatch: pytest.MonkeyPatch, each: float, seconds: float, runs: int) -> None:
    """Runs of `each` seconds, on a clock that only they move: 30 of them, but no more than fill half a minute."""
    clock = [0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0] / 1000)

    def run() -> None:
        clock[0] += round(each * 1000)

    assert latency._times(run, 30, seconds) == pytest.approx([1000 * each] * runs)
