"""Export and latency of zero-shot students: images where the encoder is inside, features where there is none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
import yaml

from data.files import sha256, write_json
from models.artifacts import Description, load_model, save_model
from models.zero_shot import MLP, build
from stages import latency, paths
from stages.export import __main__ as export

TASK, SIDE, WIDTH, HIDDEN = "zero_shot", 6, 5, 4
CLASSES, ROLES = ["a", "b", "c", "d"], ["seen", "validation", "seen", "unseen"]
SEEN = ["a", "c"]
SPLITS = {"train": 6, "validation": 9, "test": 4}
IMAGES = {"channels": 1, "size": SIDE, "mean": [0.4], "std": [0.2]}
ENCODER = {"widths": [3, WIDTH], "blocks": 1}
COMMON = {"task": TASK, "start": "none"}
SPLIT = {"validation": 0.1, "validation_classes": ["b"]}


def parameters() -> dict[str, Any]:
    source = {"kind": "folder", "path": ".", "tree_digest": "0" * 64, "licence": "-", "credit": "-"}
    prepared = {"task": TASK, "source": "x"}
    renderings = {"format": "renderings", "file": "x", "unseen": ["d"], "split": {**SPLIT, "test": 0.1}}
    student = {"task": TASK, "method": "alone", "teacher": "none", "network": {"name": "mlp", "hidden": HIDDEN}}
    return {
        "sources": {"x": {**source, "redistributable": True}},
        "datasets": {
            "pictures": {**prepared, "encoder": "none", **renderings},
            "encoded": {**prepared, "encoder": "encoder", "format": "encoded"},
            "plain": {**prepared, "encoder": "none", "format": "arrays", "file": "x", "split": SPLIT},
        },
        "teachers": {
            "encoder": {**COMMON, "dataset": "pictures", "network": {"name": "encoder", **ENCODER}},
            "taught": {**COMMON, "dataset": "encoded", "network": {"name": "mlp", "hidden": HIDDEN}},
        },
        "students": {"sees": {**student, "dataset": "encoded"}, "reads": {**student, "dataset": "plain"}},
        "exports": {"sees": {"task": TASK, "dataset": "encoded"}, "reads": {"task": TASK, "dataset": "plain"}},
        "tasks": {TASK: {}},
    }


def lively(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights, statistics and scales of which none is what it would be left at."""
    generator = torch.Generator().manual_seed(seed)
    state = network.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            flat = value.dim() == 1
            state[name] = (
                0.5 + torch.rand(value.shape, generator=generator)
                if flat
                else 0.4 * torch.randn(value.shape, generator=generator)
            )
    network.load_state_dict(state)
    return network.eval()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A student of images, a student of features, an encoder and a teacher of features, with random weights."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(parameters()))
    generator = np.random.default_rng(0)
    count = sum(SPLITS.values())
    splits = np.repeat(list(SPLITS), list(SPLITS.values()))
    for name in ("encoded", "plain"):
        prepared = paths.prepared(TASK, name)
        prepared.mkdir(parents=True)
        np.save(prepared / "features.npy", (5 * generator.random((count, WIDTH))).astype(np.float32))
        np.save(prepared / "labels.npy", generator.integers(0, len(CLASSES), count))
        if name == "encoded":
            np.save(prepared / "images.npy", generator.integers(0, 256, (count, 1, SIDE, SIDE), dtype=np.uint8))
        ids = [f"sample-{row}" for row in range(count)]
        pd.DataFrame({"id": ids, "split": splits}).to_csv(prepared / "manifest.csv", index=False)
        images = IMAGES if name == "encoded" else None
        write_json(prepared / "dataset.json", {"classes": CLASSES, "roles": ROLES, "features": WIDTH, "images": images})
    save("encoder", "teacher", {"name": "encoder", **ENCODER}, "pictures", SEEN, IMAGES)
    save("taught", "teacher", {"name": "mlp", "hidden": HIDDEN, "encoder": None}, "encoded", SEEN, IMAGES)
    save("sees", "student", {"name": "mlp", "hidden": HIDDEN, "encoder": ENCODER}, "encoded", CLASSES, IMAGES)
    save("reads", "student", {"name": "mlp", "hidden": HIDDEN, "encoder": None}, "plain", CLASSES, None)
    return tmp_path


def save(name: str, kind: str, network: dict[str, Any], dataset: str, classes: list[str], images: Any) -> None:
    interface = {"classes": classes, "seen": SEEN, "features": WIDTH, "images": images}
    model = lively(build({"network": network, "interface": interface}), len(name))
    folder = paths.trained(TASK, name)
    folder.mkdir(parents=True)
    save_model(folder, model, Description(name, TASK, kind, network, interface, {}, {"name": dataset}, None, []))


def exported(name: str) -> tuple[onnxruntime.InferenceSession, dict[str, Any], MLP]:
    export.main(name)
    folder = paths.exported(TASK, name)
    network, _ = load_model(paths.trained(TASK, name))
    description = json.loads((folder / "model.json").read_text())
    assert description["onnx_sha256"] == sha256(folder / "model.onnx")
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.onnx"]
    assert isinstance(network, MLP)
    return onnxruntime.InferenceSession(str(folder / "model.onnx")), description, network


def by_hand(network: MLP, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits and embedding of features as they were prepared, in float64."""
    state = {name: value.numpy().astype(np.float64) for name, value in network.state_dict().items()}
    scaled = (features.astype(np.float64) - state["scale.minimum"]) / state["scale.divisor"]
    embedding = np.maximum(scaled @ state["embedding.0.weight"].T + state["embedding.0.bias"], 0)
    return embedding @ state["classifier.weight"].T + state["classifier.bias"], embedding


def test_a_student_of_features_scales_them_inside(project: Path) -> None:
    session, description, network = exported("reads")
    assert description["input"] == {"name": "inputs", "shape": ["batch", WIDTH], "dtype": "float32"}
    assert [output["shape"] for output in description["outputs"]] == [["batch", 4], ["batch", HIDDEN]]
    prepared = paths.prepared(TASK, "plain")
    features, labels = np.load(prepared / "features.npy"), np.load(prepared / "labels.npy")
    logits, embedding = by_hand(network, features)
    assert np.ptp(logits, axis=0).min() > 0.1
    for count in (1, 2, len(features)):
        ours = session.run(["logits", "embedding"], {"inputs": features[:count]})
        np.testing.assert_allclose(ours[0], logits[:count], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(ours[1], embedding[:count], rtol=1e-4, atol=1e-4)
    there = slice(SPLITS["train"], SPLITS["train"] + SPLITS["validation"])
    assert description["parity"]["samples"] == SPLITS["validation"]
    right = float((logits[there].argmax(1) == labels[there]).mean())
    assert description["parity"]["metric"] == {"onnx": right, "pytorch": right}


def test_a_student_of_images_normalises_and_encodes_them_inside(project: Path) -> None:
    session, description, network = exported("sees")
    assert description["input"] == {"name": "inputs", "shape": ["batch", 1, SIDE, SIDE], "dtype": "float32"}
    assert description["network"]["encoder"] == ENCODER
    pixels = np.load(paths.prepared(TASK, "encoded") / "images.npy")
    unit = (pixels / 255).astype(np.float32)
    # The same encoder without normalisation, on images that were normalised outside.
    encoder = network.encoder
    assert encoder is not None
    with torch.no_grad():
        encoder.normalise.mean.zero_()
        encoder.normalise.std.fill_(1)
        outside = torch.from_numpy((unit - IMAGES["mean"][0]) / IMAGES["std"][0]).float()
        features = encoder.features(outside).numpy()
    assert (features >= 0).all()
    logits, _ = by_hand(network, features)
    assert np.ptp(logits, axis=0).min() > 0.1
    for count in (1, 3, len(unit)):
        np.testing.assert_allclose(
            session.run(["logits"], {"inputs": unit[:count]})[0], logits[:count], rtol=1e-3, atol=1e-3
        )


def test_the_same_bytes_and_no_path_in_them(project: Path) -> None:
    export.main("sees")
    folder = paths.exported(TASK, "sees")
    first = {path.name: sha256(path) for path in folder.iterdir()}
    written = (folder / "model.onnx").read_bytes()
    assert str(project).encode() not in written
    assert b"site-packages" not in written
    export.main("sees")
    assert {path.name: sha256(path) for path in folder.iterdir()} == first


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("reads", (2, WIDTH + 1)),
        ("reads", (2, 1, SIDE, SIDE)),
        ("sees", (2, WIDTH)),
        ("sees", (2, 3, SIDE, SIDE)),
        ("sees", (2, 1, SIDE + 1, SIDE)),
    ],
)
def test_other_inputs_are_refused_by_the_graph(project: Path, name: str, shape: tuple[int, ...]) -> None:
    session, _, _ = exported(name)
    with pytest.raises(Exception, match=r"inputs|dimension"):
        session.run(None, {"inputs": np.zeros(shape, np.float32)})


def test_latency_is_of_students_and_of_teachers_that_learnt_the_task(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher of an encoded data set takes its features; the encoder's classes are nobody's question."""
    monkeypatch.setattr(latency, "SECONDS", 0.01)
    monkeypatch.setattr(latency, "LEAST", 2)
    for name in ("sees", "reads"):
        export.main(name)
    shapes = []
    times = latency._times
    monkeypatch.setattr(
        latency, "_times", lambda run, *rest: (shapes.append(run.args[1]["inputs"].shape), times(run, *rest))[1]
    )
    latency.main(TASK)
    measured = json.loads(paths.latency(TASK).read_text())
    assert set(measured["models"]) == {"taught", "sees", "reads"}
    assert set(shapes) == {(1, WIDTH), (32, WIDTH), (1, 1, SIDE, SIDE), (32, 1, SIDE, SIDE)}
    assert "images" in measured["inputs"]
