"""Zero-shot recognition as the registry and its callers meet it: served, evaluated from its ONNX file, promoted."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException

from models.artifacts import Description
from models.zero_shot import build
from pipelines import tracking
from pipelines.candidates import digest_of_test
from pipelines.promotion import promote, rollback
from pipelines.registry import register
from pipelines.serving.zero_shot import BATCH, Student
from pipelines.tasks import zero_shot
from pipelines.versions import aliases
from stages.evaluate import zero_shot as evaluation
from stages.export import zero_shot as export
from stages.export.onnx_graph import write_onnx as write_graph
from stages.parameters.zero_shot import Task

sys.path.insert(0, str(Path(__file__).parent))
from small_project import TEST, Model
from small_server import post, server
from small_zero_shot import FEATURES, ORDER, ROLES, SmallZeroShot, sample, usual, write_onnx

TASK, SIDE = "zero_shot", 5
MORE = [*ORDER, "d", "e"]


def served(folder: Path, interface: dict[str, Any], shape: list[Any]) -> Student:
    description = {"name": "x", "interface": interface, "input": {"name": "inputs", "shape": shape}}
    (folder / "model.json").write_text(json.dumps(description))
    student = Student()
    artifacts = {"onnx": str(folder / "model.onnx"), "description": str(folder / "model.json")}
    student.load_context(SimpleNamespace(artifacts=artifacts))
    return student


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> Student:
    """A student of features."""
    folder = tmp_path_factory.mktemp("features")
    write_onnx(folder / "model.onnx", ORDER, 10, "served")
    return served(folder, {"classes": ORDER, "seen": ["a"]}, ["batch", FEATURES])


NETWORK = {"name": "mlp", "hidden": 6, "encoder": {"widths": [4, FEATURES], "blocks": 1}}
IMAGES = {"channels": 1, "size": SIDE, "mean": [0.4], "std": [0.2]}
INTERFACE = {"classes": MORE, "seen": ["a", "d"], "features": FEATURES, "images": IMAGES}


def network(seed: int = 0, **interface: Any) -> torch.nn.Module:
    """A student of images whose answers differ."""
    torch.manual_seed(seed)
    found = build({"network": NETWORK, "interface": {**INTERFACE, **interface}})
    found.eval()
    with torch.no_grad():
        logits = found(torch.from_numpy(pictures(200, 1)[:, None] / 255).float()).logits
        scale = 1 / logits.std(0)
        found.classifier.weight.mul_(scale[:, None])
        found.classifier.bias.mul_(scale).sub_(scale * logits.mean(0))
    return found


def exported(folder: Path, **interface: Any) -> torch.nn.Module:
    folder.mkdir(exist_ok=True)
    found = network(**interface)
    example = {export.INPUT: np.zeros((2, 1, SIDE, SIDE), np.float32)}
    write_graph(export.Graph(found), example, export.OUTPUTS, export.AXES, folder / "model.onnx")
    return found


@pytest.fixture(scope="module")
def sees(tmp_path_factory: pytest.TempPathFactory) -> Student:
    """A student of images."""
    folder = tmp_path_factory.mktemp("images")
    exported(folder)
    return served(folder, INTERFACE, ["batch", 1, SIDE, SIDE])


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE))


# Serving


def test_names_probabilities_and_whether_the_class_was_trained_on(reads: Student) -> None:
    answers = reads.predict(None, [sample(3, "a"), sample(4, "b"), sample(TEST - 1, "a")])
    assert [answer["label"] for answer in answers] == ["a", "b", "c"]
    assert [answer["seen"] for answer in answers] == [True, False, False]
    for answer in answers:
        assert list(answer) == ["label", "probability", "probabilities", "seen"]
        assert list(answer["probabilities"]) == ORDER
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["probability"] == answer["probabilities"][answer["label"]]
        assert json.loads(json.dumps(answer)) == answer
    assert answers[0]["probability"] == pytest.approx(np.exp(10) / (np.exp(10) + 1), abs=1e-6)


def test_raw_images_are_what_the_network_was_trained_on(sees: Student) -> None:
    raw = pictures(2 * BATCH + 3)
    answers = sees.predict(None, raw)
    with torch.inference_mode():
        unit = torch.from_numpy(raw[:, None] / 255).float()
        wanted = network()(unit).logits.double().softmax(1).numpy()
    found = np.array([list(answer["probabilities"].values()) for answer in answers])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert len(set(found.argmax(1))) > 1
    assert {answer["label"]: answer["seen"] for answer in answers}.items() <= {
        name: name in "ad" for name in MORE
    }.items()


@pytest.mark.parametrize("kind", ["array", "object", "mapping", "table", "tuple", "channels"])
def test_every_form_of_a_request(reads: Student, sees: Student, kind: str) -> None:
    for student, raw in ((reads, [sample(1, "a"), sample(2, "b")]), (sees, pictures(2).tolist())):
        requests: dict[str, Any] = {
            "array": np.array(raw),
            "object": np.array(raw, dtype=object),
            "mapping": {"inputs": np.array(raw, dtype=object)},
            "table": pd.DataFrame({"inputs": raw}),
            "tuple": tuple(raw),
            "channels": [[one] for one in raw] if student is sees else raw,
        }
        assert student.predict(None, requests[kind]) == student.predict(None, raw)


GOOD = [0.5, 0, 1, 2]
FLAT = [[0] * SIDE] * SIDE
ALWAYS: dict[str, tuple[Any, str]] = {
    "empty": ([], "the list of samples is empty"),
    "number": (7, "a list of samples is expected"),
    "text": ("7", "a list of samples is expected"),
    "other column": ({"features": [GOOD]}, "'features'"),
    "mappings": ([{"inputs": GOOD}], "sample 0"),
}
FEATURELESS: dict[str, tuple[Any, str]] = {
    "narrow": ([GOOD, GOOD[:3]], "sample 1 has 3 features; a list of 4 features is expected"),
    "wide": ([[*GOOD, 1]], "sample 0 has 5 features; a list of 4"),
    "one sample": (GOOD, r"sample 0 has shape \(\); a list of 4 features"),
    "image": ([FLAT], r"sample 0 has shape \(5, 5\); a list of 4 features"),
    "nan": ([GOOD, [0, 0, float("nan"), 0]], "feature 2 of sample 1 is nan; a finite number from 0 on"),
    "infinite": ([[0, float("inf"), 0, 0]], "feature 1 of sample 0 is inf"),
    "huge": ([[0, 1e39, 0, 0]], r"feature 1 of sample 0 is 1e\+39"),
    "negative": ([[0, 0, 0, -0.5]], "feature 3 of sample 0 is -0.5"),
    "words": ([["a"] * 4], "sample 0 holds something else than numbers"),
    "nothing": ([[None] * 4], "sample 0 holds something else than numbers"),
    "booleans": ([[True] * 4], "sample 0 holds something else than numbers"),
    "ragged": ([[[1, 2], [3], 1, 1]], "sample 0"),
}
PICTURELESS: dict[str, tuple[Any, str]] = {
    "small": ([FLAT, [[0] * 4] * 4], r"sample 1 has shape \(4, 4\); an image \(1, 5, 5\) or \(5, 5\) is expected"),
    "large": ([[[0] * 28] * 28], r"sample 0 has shape \(28, 28\)"),
    "colour": ([[FLAT] * 3], r"sample 0 has shape \(3, 5, 5\)"),
    "features": ([GOOD], r"sample 0 has shape \(4,\); an image"),
    "ragged": ([[[1, 2], [3]]], "sample 0 has rows of different lengths"),
    "bright": ([[[256] * SIDE] * SIDE], "sample 0 holds a pixel outside 0 to 255"),
    "negative": ([[[-1] * SIDE] * SIDE], "outside 0 to 255"),
    "nan": ([[[float("nan")] * SIDE] * SIDE], "outside 0 to 255"),
    "unit": ([[[0.5] * SIDE] * SIDE], r"pixels in \[0, 1\]"),
    "words": ([[["a"] * SIDE] * SIDE], "something else than numbers"),
}


def refused(student: Student, request: Any, message: str) -> None:
    with pytest.raises(MlflowException, match=message) as caught:
        student.predict(None, request)
    assert caught.value.get_http_status_code() == 400


@pytest.mark.parametrize("name", ALWAYS | FEATURELESS)
def test_malformed_features_are_the_callers_mistake(reads: Student, name: str) -> None:
    refused(reads, *(ALWAYS | FEATURELESS)[name])


@pytest.mark.parametrize("name", ALWAYS | PICTURELESS)
def test_malformed_images_are_the_callers_mistake(sees: Student, name: str) -> None:
    refused(sees, *(ALWAYS | PICTURELESS)[name])


def test_the_served_file_imports_nothing_of_the_project() -> None:
    file = (Path(__file__).parents[2] / "pipelines/serving/zero_shot.py").read_text()
    assert re.findall(r"^\s*(?:from|import) (?:data|models|stages|pipelines)\b", file, re.MULTILINE) == []


@pytest.mark.parametrize("shape", [["batch", FEATURES], ["batch", 3, SIDE, SIDE]])
def test_the_example_is_a_request(shape: list[Any], tmp_path: Path) -> None:
    """MLflow keeps it beside the version, and whoever reads it there may send it."""
    write_onnx(tmp_path / "model.onnx", ORDER, 10, "served")
    student = served(tmp_path, {"classes": ORDER, "seen": ["a"]}, shape)
    assert list(student.samples(zero_shot.example({"input": {"shape": shape}})).shape) == [1, *shape[1:]]


# Evaluation


def prepare(folder: Path, classes: list[str], roles: list[str], images: bool) -> Path:
    """A data set of 40 validation and 60 test samples, whose seen classes are in both."""
    folder.mkdir()
    generator = np.random.default_rng(1)
    unseen = {"validation": "validation", "test": "unseen"}
    parts = np.repeat(["validation", "test"], [40, 60])
    labels = [
        generator.choice([place for place, role in enumerate(roles) if role in ("seen", unseen[part])])
        for part in parts
    ]
    np.save(folder / "labels.npy", np.array(labels))
    features = generator.random((100, FEATURES)).astype(np.float32)
    np.save(folder / "features.npy", features)
    if images:
        np.save(folder / "images.npy", pictures(100)[:, None].astype(np.uint8))
    pd.DataFrame({"id": [f"s-{n}" for n in range(100)], "split": parts}).to_csv(folder / "manifest.csv", index=False)
    described = {"classes": classes, "roles": roles, "features": FEATURES, "images": IMAGES if images else None}
    (folder / "dataset.json").write_text(json.dumps(described))
    return folder


def by_hand(logits: np.ndarray, prepared: Path, answered: list[str], split: str) -> pd.DataFrame:
    """label, prediction, seen and the best unseen class of every sample, sample by sample."""
    described = json.loads((prepared / "dataset.json").read_text())
    names, roles = described["classes"], dict(zip(described["classes"], described["roles"], strict=True))
    labels = np.load(prepared / "labels.npy")
    splits = pd.read_csv(prepared / "manifest.csv")["split"]
    rows = []
    for number in np.flatnonzero(splits == split):
        scores = dict(zip(answered, logits[number], strict=True))
        extra = [name for name in answered if name not in names]
        every = [*names, *extra]
        best = max(scores, key=lambda name: scores[name])
        there = [name for name in answered if roles.get(name) == ("unseen" if split == "test" else "validation")]
        label = int(labels[number])
        rows.append({
            "id": f"s-{number}",
            "label": label,
            "prediction": every.index(best),
            "correct": int(best == names[label]),
            "seen": int(roles[names[label]] == "seen"),
            "unseen_prediction": every.index(max(there, key=lambda name: scores[name])) if there else -1,
        })  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize("answered", [ORDER, MORE, ["a", "b"], ["d", "a", "c"]], ids=["same", "more", "fewer", "other"])
def test_an_onnx_file_is_evaluated_as_the_stage_does(tmp_path: Path, answered: list[str]) -> None:
    """Whatever classes it knows of those that the data set has today; matched by name."""
    prepared = prepare(tmp_path / "prepared", ORDER, ROLES, images=True)
    torch_network = exported(tmp_path / "version", classes=answered)
    description = {
        "name": "x",
        "interface": {**INTERFACE, "classes": answered},
        "input": {"name": "inputs", "shape": ["batch", 1, SIDE, SIDE]},
    }
    found = zero_shot.evaluate(tmp_path / "version", description, prepared)
    with torch.inference_mode():
        unit = torch.from_numpy(np.load(prepared / "images.npy") / 255).float()
        logits = torch_network(unit).logits.numpy()
    wanted = by_hand(logits, prepared, answered, "test")
    pd.testing.assert_frame_equal(found[list(wanted)], wanted, check_dtype=False)
    assert (found["id"] == [f"s-{number}" for number in range(40, 100)]).all()
    unknown = ~found["label"].isin([ORDER.index(name) for name in answered if name in ORDER])
    assert not found.loc[unknown, "correct"].any()
    assert found["prediction"].nunique() > 1


def test_the_table_is_the_stages_own_to_the_last_column(tmp_path: Path) -> None:
    """Of a student of images, evaluation feeds the stored features; through its ONNX file the images go in."""
    prepared = prepare(tmp_path / "prepared", ORDER, ROLES, images=True)
    torch_network = exported(tmp_path / "version", classes=ORDER)
    with torch.inference_mode():
        unit = torch.from_numpy(np.load(prepared / "images.npy") / 255).float()
        np.save(prepared / "features.npy", torch_network.encoder.features(unit).numpy())
    interface = {**INTERFACE, "classes": ORDER}
    told = Description("x", TASK, "student", NETWORK, interface, {}, {}, None, [])
    wanted = evaluation.evaluate(torch_network, told, prepared, "test", Task()).samples
    description = {"name": "x", "interface": interface, "input": {"name": "inputs", "shape": ["batch", 1, SIDE, SIDE]}}
    found = zero_shot.evaluate(tmp_path / "version", description, prepared)
    pd.testing.assert_frame_equal(found, wanted, atol=1e-4)
    assert found["calibrated"].sum() != found["correct"].sum()


def test_another_question_is_not_answered(tmp_path: Path) -> None:
    prepared = prepare(tmp_path / "prepared", ORDER, ROLES, images=False)
    exported(tmp_path / "version")
    description = {"name": "x", "interface": INTERFACE, "input": {"name": "inputs", "shape": ["batch", 1, SIDE, SIDE]}}
    with pytest.raises(ValueError, match=r"images None or 4 features, the student takes \[1, 5, 5\]"):
        zero_shot.evaluate(tmp_path / "version", description, prepared)
    description["input"]["shape"] = ["batch", FEATURES + 1]
    with pytest.raises(ValueError, match=r"or 4 features, the student takes \[5\]"):
        zero_shot.evaluate(tmp_path / "version", description, prepared)
    description["interface"] = {**INTERFACE, "classes": ["x", "y"]}
    with pytest.raises(ValueError, match="none of the 2 classes that the student knows"):
        zero_shot.evaluate(tmp_path / "version", description, prepared)


def test_what_travels_is_what_the_export_writes() -> None:
    assert zero_shot.FILES == export.FILES


# Registration and promotion


@pytest.fixture
def small(root: Path, monkeypatch: pytest.MonkeyPatch) -> SmallZeroShot:
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    small = usual(root)
    small.write()
    small.commit()
    return small


def decision() -> dict[str, Any]:
    files = sorted(Path("decisions", TASK).glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    found: dict[str, Any] = json.loads(files[-1].read_text())
    return found


def more(small: SmallZeroShot, name: str, known: list[str], wrong: int = 11, validation: float = 0.9) -> None:
    """One more deployed student, which knows these classes."""
    small.known[name] = known
    small.models[name] = Model(wrong=wrong, validation=validation, method="d3gzsl")
    small.write()
    small.commit()


def test_a_registered_student_takes_features(small: SmallZeroShot) -> None:
    """As a server loads it: from the registry alone; its metadata say what it knows."""
    register(TASK)
    shutil.rmtree("models")
    model = mlflow.pyfunc.load_model(f"models:/{TASK}@challenger")
    assert model.metadata.metadata["classes"] == ORDER
    assert model.metadata.metadata["seen"] == ["a"]
    answers = model.predict({"inputs": np.array([sample(3, "a"), sample(4, "b")])})
    assert [(answer["label"], answer["seen"]) for answer in answers] == [("a", True), ("b", False)]
    with pytest.raises(MlflowException, match="sample 0 has 3 features"):
        model.predict({"inputs": np.array([[0.0, 1.0, 0.0]])})


def test_from_the_first_champion_to_moved_test_data(small: SmallZeroShot) -> None:
    register(TASK)
    assert promote(TASK)
    gates = decision()["gates"]
    assert gates["baseline"]["sentence"].startswith("harmonic_mean 96.00 against 95.20 of plain")
    assert "no teacher of this data set answers the same question" in gates["teacher_share"]["sentence"]

    small.change("best", wrong=60, validation=0.99, weights="second")
    small.commit()
    register(TASK)
    assert not promote(TASK)
    assert [name for name, check in decision()["gates"].items() if check["verdict"] == "failed"] == [
        "baseline",
        "champion",
    ]

    small.ids, small.hardest = "new", TEST - 30
    small.change("best", wrong=10, weights="third")
    small.commit()
    register(TASK)
    assert promote(TASK)
    champion = decision()["gates"]["champion"]
    assert champion["figures"]["evaluated_again"]
    assert champion["figures"]["other_score"] == 1.0  # today's samples are none of its mistakes


def test_more_classes_pass_and_are_named(small: SmallZeroShot) -> None:
    """The student that knows more is the challenger, although another is better on validation; nothing is silent."""
    client = tracking.connect()
    register(TASK)
    assert promote(TASK)
    first = aliases(client, TASK)["champion"]
    more(small, "wider", MORE)
    register(TASK)
    assert client.get_model_version(TASK, aliases(client, TASK)["challenger"]).tags["student"] == "wider"
    assert promote(TASK)
    check = decision()["gates"]["signature"]
    assert check["sentence"] == f"input and the 3 labels of version {first} stay; 2 more: d, e"
    assert check["figures"]["added"] == ["d", "e"]
    assert not decision()["gates"]["champion"]["figures"]["evaluated_again"]
    assert decision()["gates"]["champion"]["figures"]["difference"] == pytest.approx(-1 / TEST, abs=1e-4)

    # Without it, the one that knows fewer is the challenger, and refused: who relies on d and e would miss them.
    del small.models["wider"]
    small.write()
    small.commit()
    register(TASK)
    assert not promote(TASK)
    check = decision()["gates"]["signature"]
    assert check["verdict"] == "failed"
    assert check["sentence"].endswith("would have to change: it no longer knows d, e")
    rollback(TASK)
    assert aliases(client, TASK)["champion"] == first


def test_a_worse_student_does_not_pass_for_its_classes(small: SmallZeroShot) -> None:
    register(TASK)
    assert promote(TASK)
    more(small, "wider", MORE, wrong=60)
    register(TASK)
    assert not promote(TASK)
    verdicts = {name: check["verdict"] for name, check in decision()["gates"].items()}
    assert (verdicts["champion"], verdicts["signature"]) == ("failed", "passed")


@pytest.mark.parametrize("changed", [["c", "a", "b", "d"], ["a", "b", "c"]])
def test_labels_in_another_order_are_refused(small: SmallZeroShot, changed: list[str]) -> None:
    register(TASK)
    assert promote(TASK)
    more(small, "wider", changed, validation=0.99)
    register(TASK)
    assert not promote(TASK)
    assert decision()["gates"]["signature"]["sentence"].endswith("it has the labels in another order")


@pytest.mark.parametrize("champion", [MORE, ["a", "c"]], ids=["more", "fewer"])
def test_a_champion_that_knows_other_classes_answers_todays_data(small: SmallZeroShot, champion: list[str]) -> None:
    """By name: a class that it does not know, it never finds."""
    small.known = {"best": champion, "plain": champion}
    small.write()
    small.commit()
    register(TASK)
    assert promote(TASK) is True
    small.ids = "new"
    small.known = {}
    small.change("best", weights="second", wrong=10)
    small.commit()
    register(TASK)
    promote(TASK)
    gates = decision()["gates"]
    assert gates["champion"]["figures"]["evaluated_again"]
    # b, the one unseen class of the test split, is answered by the champion that knows it; 10 mistakes are its own.
    assert gates["champion"]["figures"]["other_score"] == pytest.approx(0.96 if "b" in champion else 0.0)
    passed = gates["signature"]["verdict"]
    assert passed == ("passed" if champion == ["a", "c"] else "failed")


def test_the_digest_of_the_test_set_is_about_samples(small: SmallZeroShot) -> None:
    """More classes without samples leave it; another label or another feature changes it."""
    table = pd.read_csv(small.folder / f"data/prepared/{TASK}/tiny/manifest.csv", dtype={"id": str})
    whole = digest_of_test(table)
    train = table["split"] != "test"
    assert digest_of_test(table.assign(label=table["label"].where(~train, 7))) == whole
    assert digest_of_test(table.assign(label=table["label"].where(table.index != table.index[-1], 1))) != whole
    assert digest_of_test(table.assign(sha256=table["sha256"].where(table.index != table.index[-1], "0"))) != whole


def test_a_class_that_is_trained_on_now_is_said(small: SmallZeroShot) -> None:
    from pipelines import gates

    ours = {"input": small.input, "classes": ORDER, "seen": ["a", "b"]}
    check = gates.signature(ours, {**ours, "seen": ["a"]}, "version 1")
    assert check.passed
    assert check.sentence == "input and the 3 labels of version 1 stay; now trained on: b"
    check = gates.signature({**ours, "seen": ["b"]}, {**ours, "seen": ["a"]}, "version 1")
    assert check.sentence.endswith("now trained on: b; no longer trained on: a")
    assert not gates.signature({**ours, "input": {}, "classes": MORE}, ours, "version 1").passed
    unnamed = {name: value for name, value in ours.items() if name != "seen"}
    assert not gates.signature({**unnamed, "classes": MORE}, unnamed, "version 1").passed


@pytest.mark.slow
def test_over_http(small: SmallZeroShot) -> None:
    register(TASK)
    with server(small.folder, TASK) as address:
        raw = [sample(3, "a"), sample(4, "b")]
        for body in ({"inputs": raw}, {"inputs": {"inputs": raw}}, {"instances": raw}):
            status, answer = post(address, body)
            assert status == 200, answer
            assert [one["label"] for one in answer["predictions"]] == ["a", "b"]
            assert [one["seen"] for one in answer["predictions"]] == [True, False]
        for name, (request, message) in (ALWAYS | FEATURELESS).items():
            status, answer = post(address, {"inputs": request})
            assert 400 <= status < 500, (name, answer)
            assert "Traceback" not in str(answer), name
            if name not in ("mappings", "other column", "infinite"):  # these MLflow refuses itself
                assert re.search(message, str(answer)), (name, answer)
        assert post(address, {"inputs": raw})[0] == 200
