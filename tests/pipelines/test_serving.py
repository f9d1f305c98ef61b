"""What is served: raw images in, names and probabilities out; whatever else comes in is answered, not crashed on."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from pipelines.registry import register
from pipelines.serving.recognition import LARGEST_SIDE, Student, bicubic

sys.path.insert(0, str(Path(__file__).parent))
from small_project import INTERFACE, SIDE, TASK, Faces, Small, usual, write_onnx
from small_server import post, server


def served(folder: Path, **changed: Any) -> Student:
    folder.mkdir(exist_ok=True)
    interface = {**INTERFACE, **changed}
    write_onnx(folder / "model.onnx", 10, "served", len(interface["classes"]), interface["channels"])
    description = {"interface": interface, "input": {"name": "images"}}
    (folder / "model.json").write_text(json.dumps(description))
    student = Student()
    artifacts = {"onnx": str(folder / "model.onnx"), "description": str(folder / "model.json")}
    student.load_context(SimpleNamespace(artifacts=artifacts))
    return student


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    return served(tmp_path_factory.mktemp("served"))


def image(label: int, side: int = SIDE) -> list[list[int]]:
    """A raw image of class a or b."""
    found = np.zeros((side, side), dtype=int)
    found[0, label] = 255
    return found.tolist()


def test_names_and_probabilities(student: Student) -> None:
    answers = student.predict(None, [image(0), image(1)])
    assert [answer["label"] for answer in answers] == ["a", "b"]
    for answer in answers:
        assert list(answer) == ["embedding", "label", "probability", "probabilities", "logits"]
        assert list(answer["probabilities"]) == list(answer["logits"]) == ["a", "b", "c"]
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["probability"] == max(answer["probabilities"].values())
    logits = np.array([10.0, 0.0])  # and class c is far below
    assert [answers[0]["logits"][name] for name in "ab"] == pytest.approx([10, 0])
    assert answers[0]["logits"]["c"] < -1e3
    assert answers[0]["probability"] == pytest.approx(np.exp(10) / np.exp(logits).sum(), abs=1e-6)


@pytest.mark.parametrize("classes", [[], ["a", "b", "c"]])
def test_the_embedding_is_always_answered(tmp_path: Path, classes: list[str]) -> None:
    """Of more images than one batch too, in their order; without classes nothing else is."""
    raw = np.random.default_rng(0).integers(0, 256, (300, SIDE, SIDE), dtype=np.uint8)
    answers = served(tmp_path, classes=classes).predict(None, raw)
    found = np.array([answer["embedding"] for answer in answers])
    np.testing.assert_allclose(found, raw.reshape(300, -1) / 255, atol=1e-6)  # as `write_onnx` says
    assert isinstance(answers[0]["embedding"][0], float)
    assert set(answers[0]) - {"embedding"} == (
        {"label", "probability", "probabilities", "logits"} if classes else set()
    )


@pytest.mark.parametrize("kind", [Small, Faces])
def test_a_registered_student_answers_as_its_signature_says(root: Path, kind: type[Small]) -> None:
    """Through MLflow's own loader, from the registry alone."""
    import mlflow

    small = usual(root, kind)
    small.models = {name: small.models[name] for name in ("teacher", "best")}
    small.write()
    register(TASK)
    model = mlflow.pyfunc.load_model(f"models:/{TASK}@challenger")
    wanted = ["embedding", "label", "probability", "probabilities", "logits"] if small.interface["classes"] else None
    assert model.metadata.signature.outputs.input_names() == (wanted or ["embedding"])
    assert model.metadata.metadata["classes"] == small.interface["classes"]
    answers = model.predict(np.array([image(0), image(1)]))
    for answer, pixels in zip(answers, (image(0), image(1)), strict=True):
        assert list(answer) == model.metadata.signature.outputs.input_names()
        np.testing.assert_allclose(answer["embedding"], np.ravel(pixels) / 255)
    json.dumps(answers)


@pytest.mark.parametrize("kind", ["array", "object", "channels", "mapping", "table", "floats", "many"])
def test_every_form_of_a_request(student: Student, kind: str) -> None:
    raw = [image(0), image(1)]
    requests: dict[str, Any] = {
        "array": np.array(raw),
        "object": np.array(raw, dtype=object),
        "channels": [[one] for one in raw],
        "mapping": {"images": np.array(raw, dtype=object)},
        "table": pd.DataFrame({"images": raw}),
        "floats": np.array(raw, dtype=np.float32),
        "many": raw * 300,
    }
    answers = student.predict(None, requests[kind])
    assert [answer["label"] for answer in answers[-2:]] == ["a", "b"]
    assert len(answers) == (600 if kind == "many" else 2)


@pytest.mark.parametrize("side", [SIDE + 1, 7, 16, 33])
def test_larger_images_are_reduced_as_in_training(student: Student, side: int) -> None:
    import torch

    from data.recognition import downsample, to_unit

    pixels = np.random.default_rng(side).integers(0, 256, (side, side), dtype=np.uint8)
    wanted = downsample(to_unit(torch.from_numpy(pixels)[None, None]), SIDE)[0].numpy()
    np.testing.assert_allclose(student.images([pixels])[0], wanted, atol=1e-6)


def test_images_of_several_sizes_in_one_request(student: Student) -> None:
    assert student.images([image(0), image(0, 8), image(0, 5)]).shape == (3, 1, SIDE, SIDE)


def test_what_is_not_reduced_stays_as_it_is() -> None:
    np.testing.assert_allclose(bicubic(5, 5), np.eye(5), atol=1e-12)
    np.testing.assert_allclose(bicubic(9, 4).sum(axis=1), 1)


def test_colour(tmp_path: Path) -> None:
    colour = served(tmp_path, channels=3)
    assert colour.images(np.zeros((2, 3, SIDE, SIDE))).shape == (2, 3, SIDE, SIDE)
    with pytest.raises(MlflowException, match=r"image 0 has shape \(4, 4\); expected \(3, H, W\) with"):
        colour.images([image(0)])


MALFORMED: dict[str, tuple[Any, str]] = {
    "empty": ([], "empty"),
    "number": (7, "a list of images is expected"),
    "text": ("7", "a list of images is expected"),
    "ragged": ([[[1, 2], [3]]], "image 0 has rows of different lengths"),
    "words": ([[["a"] * SIDE] * SIDE], "something else than numbers"),
    "nothing": ([[[None] * SIDE] * SIDE], "something else than numbers"),
    "booleans": ([[[True] * SIDE] * SIDE], "something else than numbers"),
    "small": ([image(0, 3)], r"image 0 has shape .*3, 3\); expected"),
    "not square": ([[[0] * 8] * 5], r"image 0 has shape .*5, 8\)"),
    "flat": ([[0] * 16], "image 0 has shape"),
    "deep": ([[[image(0)]]], "image 0 has shape"),
    "negative": ([[[-1] * SIDE] * SIDE], "outside 0 to 255"),
    "bright": ([image(0), [[256] * SIDE] * SIDE], "image 1 holds a pixel outside 0 to 255"),
    "unit": ([[[0.5] * SIDE] * SIDE], r"pixels in \[0, 1\]"),
    "huge numbers": ([[[10**400] * SIDE] * SIDE], "something else than numbers"),
    "mappings": ([{"pixels": image(0)}], "image 0"),
    "other column": ({"pictures": [image(0)]}, "'pictures'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_the_callers_mistake(student: Student, name: str) -> None:
    request, message = MALFORMED[name]
    with pytest.raises(MlflowException, match=message) as caught:
        student.predict(None, request)
    assert caught.value.get_http_status_code() == 400


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_pixels(student: Student, value: float) -> None:
    with pytest.raises(MlflowException, match="outside 0 to 255"):
        student.predict(None, np.full((1, SIDE, SIDE), value))


def test_an_image_that_is_too_large(student: Student) -> None:
    side = LARGEST_SIDE + 1
    with pytest.raises(MlflowException, match=f"at most {LARGEST_SIDE}"):
        student.predict(None, np.zeros((1, side, side), dtype=np.uint8))


def test_the_served_file_imports_nothing_of_the_project() -> None:
    text = (Path(__file__).parents[2] / "pipelines/serving/recognition.py").read_text()
    for package in ("data", "models", "stages", "pipelines"):
        assert f"from {package}" not in text
        assert f"import {package}" not in text


# Over HTTP


@pytest.mark.slow
def test_over_http(root: Path) -> None:
    small = usual(root)
    small.write()
    small.commit()
    register(TASK)
    with server(root, TASK) as address:
        raw = [image(0), image(1), image(0, 8)]
        for body in ({"inputs": raw}, {"inputs": {"images": raw}}, {"instances": raw[:2]}):
            status, answer = post(address, body)
            assert status == 200, answer
            assert [one["label"] for one in answer["predictions"]][:2] == ["a", "b"]
            assert list(answer["predictions"][0]["probabilities"]) == ["a", "b", "c"]
            assert answer["predictions"][0]["embedding"] == (np.ravel(raw[0]) / 255).tolist()
        bodies = {name: {"inputs": request} for name, (request, _) in MALFORMED.items()}
        bodies["no key"], bodies["other key"], bodies["list"] = {}, {"imges": raw}, raw
        bodies["nan"] = {"inputs": [[[float("nan")] * SIDE] * SIDE]}
        bodies["records"] = {"dataframe_records": [{"x": 1}]}
        said = {}
        for name, body in bodies.items():
            status, answer = post(address, body)
            said[name] = (status, str(answer))
            assert "Traceback" not in str(answer), name
        assert {name: found for name, found in said.items() if not 400 <= found[0] < 500} == {}
        for name in MALFORMED.keys() - {"mappings", "other column"}:  # these MLflow refuses itself
            assert re.search(MALFORMED[name][1], said[name][1]), (name, said[name])
        for data, kind in ((b"{", "application/json"), (b"\xff\xfe", "application/json"), (b"x", "text/html")):
            assert 400 <= post(address, data, kind)[0] < 500, data
        assert post(address, {"inputs": raw})[0] == 200
