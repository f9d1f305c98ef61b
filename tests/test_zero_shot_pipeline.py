"""The task zero_shot through the real command line, with every way to a student, and a class added after deployment."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest

from data.files import sha256

sys.path.insert(0, str(Path(__file__).parent))
from clones import Project, copy_tree, refusal

pytestmark = pytest.mark.slow
TASK, OLD, NEW = "zero_shot", "zero_shot-d3gzsl", "zero_shot-more"
STUDENTS = ("alone", "eszsl", "d3gzsl", "cegzsl")
PREPARED = "data/prepared/zero_shot/renderings-features"
ABSOLUTE = {"untampered", "validated", "evaluated", "parity", "signature", "redistributable", "clean"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project on which `dvc repro` has run once. Tests leave it as they found it, but for the last one."""
    project = copy_tree(tmp_path_factory.mktemp("a clone for classes", numbered=False) / "my project", "zero_shot.yaml")
    project.run("dvc", "repro")
    project.commit("made")
    return project


@pytest.fixture
def project(made: Project) -> Iterator[Project]:
    """The made project; whatever a test did to its parameters and results is undone."""
    yield made
    made.restore()


def described(project: Project, path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(project.path(path).read_text())
    return found


def figures(project: Project, name: str) -> dict[str, Any]:
    return described(project, f"reports/metrics/{TASK}/{name}.json")


def everything(project: Project) -> dict[str, str]:
    """sha256 of the weights and graphs of all models that the made project has."""
    files = [*project.path("models").rglob("*.safetensors"), *project.path("models").rglob("*.onnx")]
    return {str(file.relative_to(project.folder)): sha256(file) for file in files if NEW not in str(file)}


def test_every_student_answers_with_every_class(project: Project) -> None:
    classes = described(project, f"{PREPARED}/dataset.json")["classes"]
    assert len(classes) == 60
    for name in STUDENTS:
        told = described(project, f"models/trained/{TASK}/{TASK}-{name}/model.json")
        assert told["interface"]["classes"] == classes
        assert len(told["interface"]["seen"]) == 50
        assert next(iter(figures(project, f"{TASK}-{name}")["validation"])) == "harmonic_mean"
    teacher = described(project, f"models/trained/{TASK}/{TASK}-teacher/model.json")
    assert teacher["interface"]["classes"] == teacher["interface"]["seen"]


def test_the_registered_model_takes_images(project: Project) -> None:
    """The encoder is in front of the student: the stored features and the images give the same answers."""
    exported = project.path(f"models/exported/{TASK}/{OLD}")
    told = json.loads((exported / "model.json").read_text())
    assert told["input"]["shape"] == ["batch", 1, 28, 28]
    images = np.load(project.path(PREPARED, "images.npy"))
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"))
    (logits,) = session.run(["logits"], {"inputs": (images / 255).astype(np.float32)})
    samples = pd.read_csv(project.path(f"reports/evaluation/{TASK}/{OLD}.samples.csv")).set_index("id")
    manifest = pd.read_csv(project.path(PREPARED, "manifest.csv"))
    there = manifest["split"] == "test"
    stored = samples[samples["split"] == "test"].loc[manifest.loc[there, "id"], "prediction"]
    assert (logits.argmax(1)[there] == stored).mean() > 0.99
    assert {"features.npy", "images.npy", "encoder"} <= {path.name for path in project.path(PREPARED).iterdir()}


def row(project: Project, name: str, **changes: float) -> dict[str, Any]:
    """The attributes of a known class, some of them changed."""
    told = described(project, f"{PREPARED}/dataset.json")
    numbers = np.load(project.path(PREPARED, "attributes.npy"))[told["classes"].index(name)]
    return {**dict(zip(told["attributes"], numbers.tolist(), strict=True)), **changes}


def csv(project: Project, rows: dict[str, dict[str, Any]]) -> str:
    """A file for the command, its columns turned round."""
    file = project.path("new classes.csv")
    table = pd.DataFrame(rows).T[::-1]
    table[table.columns[::-1]].to_csv(file, index_label="name")
    return str(file)


# Wrong inputs


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            lambda p: {"x": {**row(p, "5-plain"), "wings": 1}},
            r"has 23 attributes, the data set has 22: unknown 'wings'",
        ),
        (lambda p: {"5-plain": row(p, "5-plain", dotted=1)}, r"class '5-plain' is known already"),
    ],
    ids=["wide", "known"],
)
def test_a_class_that_does_not_fit_is_refused(
    project: Project, rows: Callable[[Project], dict[str, Any]], message: str
) -> None:
    before = project.path("params.yaml").read_bytes()
    file = csv(project, rows(project))
    said = refusal(project.stage("pipelines.extend", OLD, "--name", NEW, "--attributes", file, code=None))
    assert re.search(message, said)
    assert project.path("params.yaml").read_bytes() == before
    assert not project.path(f"models/trained/{TASK}/{NEW}").exists()


def test_a_descriptor_of_the_wrong_width_in_params(project: Project) -> None:
    """Whoever writes the entry by hand."""
    entry = {"task": TASK, "dataset": "renderings-features", "method": "extended", "teacher": OLD}
    project.edit(lambda raw: raw["students"].update({NEW: {**entry, "added": {"x": [1.0, 2.0]}}}))
    said = refusal(project.stage("stages.distill", NEW, code=None))
    assert re.search(r"class 'x' has 2 attributes, those of 'renderings-features' have 22", said)
    assert not project.path(f"models/trained/{TASK}/{NEW}").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(unseen=[]), r"datasets.renderings.unseen"),
        (lambda entry: entry.update(unseen=["0-plane"]), r"'0-plane'; did you mean '0-plain'"),
        (lambda entry: entry["split"].update(validation_classes=["0-plain"]), r"'0-plain' is unseen"),
        (lambda entry: entry["split"].update(validation_classes=50, test=None), r"split.test"),
        (lambda entry: entry["split"].update(validation_classes=54), r"validation_classes.*54"),
    ],
    ids=["no unseen class", "unknown class", "class in both sets", "no test", "no seen class"],
)
def test_wrong_roles_are_refused(project: Project, change: Callable[[dict[str, Any]], object], message: str) -> None:
    project.edit(lambda raw: change(raw["datasets"]["renderings"]))
    assert re.search(message, refusal(project.stage("stages.prepare", "renderings", code=None)))


def published() -> dict[str, np.ndarray]:
    """A published data set of four classes, the last of which is unseen: counted from 0, a row per sample."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 20)
    seen = np.flatnonzero(labels < 3)
    return {
        "features": generator.random((80, 5)),
        "labels": labels,
        "att": generator.random((4, 6)),
        "allclasses_names": np.array(["a", "b", "c", "d"]),
        "trainval_loc": seen[seen % 4 != 0],
        "test_seen_loc": seen[seen % 4 == 0],
        "test_unseen_loc": np.flatnonzero(labels == 3),
    }


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    found = array.copy()
    found.flat[3] = value
    return found


WRONG: dict[str, tuple[Callable[[dict[str, np.ndarray]], dict[str, Any]], str]] = {
    "NaN feature": (lambda a: {"features": with_value(a["features"], np.nan)}, r"features.*nan"),
    "label outside the range": (lambda a: {"labels": with_value(a["labels"], 4)}, r"labels.*4"),
    "class in both sets": (
        lambda a: {
            "trainval_loc": np.append(a["trainval_loc"], a["test_unseen_loc"][0]),
            "test_unseen_loc": a["test_unseen_loc"][1:],
        },
        r"is seen \(trainval_loc or test_seen_loc\) and unseen \(test_unseen_loc\) at once: 'd'",
    ),
    "sample in both sets": (
        lambda a: {"test_seen_loc": np.append(a["test_seen_loc"], a["trainval_loc"][0])},
        r"stands in trainval_loc and in test_seen_loc",
    ),
    "empty unseen set": (lambda a: {"test_unseen_loc": a["test_unseen_loc"][:0]}, r"test_unseen_loc"),
    "index outside the range": (lambda a: {"trainval_loc": with_value(a["trainval_loc"], 80)}, r"trainval_loc.*80"),
    "fewer descriptors": (lambda a: {"att": a["att"][:3]}, r"att.*3.*4.*allclasses_names"),
}


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        *(("arrays", wrong) for wrong in [*WRONG, "missing keys"]),
        *(("xlsa17", wrong) for wrong in ("missing keys", "class in both sets", "label outside the range")),
    ],
)
def test_wrong_files_are_refused(project: Project, kind: str, wrong: str) -> None:
    """One `.npz`, and the two `.mat` files of the benchmark, which count from 1; without a mistake both are read."""
    raw = project.path("data/raw/published")
    raw.mkdir(parents=True, exist_ok=True)
    common = {"task": TASK, "source": "published", "encoder": "none", "format": kind}
    where = {"file": "all.npz"} if kind == "arrays" else {"folder": "."}
    source = {"kind": "folder", "path": ".", "tree_digest": "0" * 64, "licence": "-", "credit": "-"}
    project.edit(lambda p: p["sources"].update(published={**source, "redistributable": False}))
    project.edit(lambda p: p["datasets"].update(published={**common, **where, "split": {"validation": 0.2}}))
    good = published()
    bad = {name: array for name, array in good.items() if name not in ("att", "test_unseen_loc")}
    message = r"lacks att, test_unseen_loc"
    if wrong in WRONG:
        make, message = WRONG[wrong]
        bad = {**good, **make(good)}
        if (kind, wrong) == ("xlsa17", "label outside the range"):
            message = r"labels.*5"
    write(raw, kind, bad)
    done = project.stage("stages.prepare", "published", code=None)
    assert re.search(message, refusal(done)), done.stderr
    if wrong == "missing keys":
        write(raw, kind, good)
        project.stage("stages.prepare", "published")


def write(folder: Path, kind: str, arrays: dict[str, np.ndarray]) -> None:
    """As one `.npz`, or as xlsa17 has it: columns are samples, and counting begins with 1."""
    if kind == "arrays":
        np.savez(folder / "all.npz", **arrays)
        return
    from scipy.io import savemat

    turned = {name: array.T if name in ("features", "att") else array for name, array in arrays.items()}
    turned |= {name: turned[name][:, None] + 1 for name in turned if name == "labels" or name.endswith("_loc")}
    names = np.empty((len(arrays["allclasses_names"]), 1), dtype=object)
    names[:, 0] = arrays["allclasses_names"]
    first = {name: turned[name] for name in ("features", "labels")}
    savemat(folder / "res101.mat", first)
    savemat(
        folder / "att_splits.mat",
        {**{name: array for name, array in turned.items() if name not in first}, "allclasses_names": names},
    )


# Adding a class


def answers(project: Project, alias: str, images: np.ndarray) -> list[dict[str, Any]]:
    """What a version answers to raw images, loaded from the registry alone."""
    np.save(project.path("images.npy"), images)
    code = (
        "import json, sys, mlflow, numpy as np\n"
        f"model = mlflow.pyfunc.load_model('models:/{TASK}@{alias}')\n"
        "print(json.dumps(model.predict({'inputs': np.load(sys.argv[1]).astype(float)})))\n"
    )
    tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{project.path('mlflow.db')}"}
    done = project.run(sys.executable, "-c", code, str(project.path("images.npy")), **tracking)
    project.path("images.npy").unlink()
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def last_decision(project: Project) -> dict[str, Any]:
    files = sorted(project.path("decisions", TASK).glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    found: dict[str, Any] = json.loads(files[-1].read_text())
    return found


def test_a_class_is_added_after_deployment(made: Project) -> None:
    """Registered, promoted, extended with one command, promoted again; nothing that was there is trained anew."""
    made.stage("stages.latency", TASK)
    made.edit(lambda raw: raw["exports"].pop("zero_shot-eszsl"))  # so that the student with a generator is challenger
    made.run("dvc", "repro")
    made.commit("one student")
    made.stage("pipelines.registry", "register", TASK)
    assert made.stage("pipelines.registry", "promote", TASK).stdout.startswith("promoted: version 1")
    classes = described(made, f"{PREPARED}/dataset.json")["classes"]
    images = np.load(made.path(PREPARED, "images.npy"))[:50]
    before = answers(made, "champion", images)
    assert list(before[0]["probabilities"]) == classes

    models, text = everything(made), made.path("params.yaml").read_text()
    file = csv(
        made, {"5-dotted-thick": row(made, "5-dotted", thick=1), "8-bold-oblique": row(made, "8-thick", shear=1)}
    )
    command = ("pipelines.extend", OLD, "--name", NEW, "--attributes", file)
    done = made.stage(*command)
    assert "version 2: zero_shot-more (new, challenger)" in done.stdout
    assert everything(made) == models
    added = [line for line in made.path("params.yaml").read_text().splitlines() if line not in text.splitlines()]
    assert added[0] == f"  {NEW}:"
    assert [line for line in text.splitlines() if line not in made.path("params.yaml").read_text().splitlines()] == []
    assert made.stale() == set()
    told = described(made, f"models/exported/{TASK}/{NEW}/model.json")
    assert set(told["interface"]["classes"][60:]) == {"5-dotted-thick", "8-bold-oblique"}
    assert figures(made, NEW)["test"].keys() >= {"harmonic_mean", "seen", "unseen", "calibrated_harmonic_mean"}
    assert NEW in described(made, f"reports/latency/{TASK}.json")["models"]

    again = made.stage(*command)
    assert "everything is up to date" in again.stdout
    assert "(registered before, challenger)" in again.stdout
    assert "version 3" not in again.stdout

    made.commit("more classes")
    promoted = made.stage("pipelines.registry", "promote", TASK, code=None)
    assert promoted.stdout.startswith("promoted: version 2"), promoted.stdout
    gates = last_decision(made)["gates"]
    assert {name: gates[name]["verdict"] for name in ABSOLUTE} == dict.fromkeys(ABSOLUTE, "passed")
    assert re.search(r"the 60 labels of version 1 stay; 2 more: .*8-bold-oblique", gates["signature"]["sentence"])
    assert not gates["champion"]["figures"]["evaluated_again"]
    after = answers(made, "champion", images)
    assert list(after[0]["probabilities"]) == told["interface"]["classes"]
    seen = {
        name
        for name, role in zip(classes, described(made, f"{PREPARED}/dataset.json")["roles"], strict=True)
        if role == "seen"
    }
    assert all(answer["seen"] is (answer["label"] in seen) for answer in after)
    report = made.stage("stages.report", TASK).stdout
    assert "more" in {line.split()[0] for line in report.splitlines() if line}
    made.stage("pipelines.registry", "rollback", TASK)
    assert answers(made, "champion", images) == before
