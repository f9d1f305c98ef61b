"""The task text through the real command line, with every method and a teacher that learns too."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from data.files import sha256

sys.path.insert(0, str(Path(__file__).parent))
from clones import Project, copy_tree, refusal

pytestmark = pytest.mark.slow
STUDENTS = ("alone", "kd", "online", "lgtm")
ABSOLUTE = {"untampered", "validated", "evaluated", "parity", "signature", "redistributable", "clean"}
RAW = (
    "COMPUTER TERMINAL SYSTEMS <CPML> COMPLETES SALE\n    Computer Terminal Systems Inc said it has completed the sale "
    "of 200,000 shares of its common stock to Sedio N.V. of Lugano, Switzerland for 50,000 dlrs."
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project on which `dvc repro` has run once. Tests leave it as they found it."""
    project = copy_tree(tmp_path_factory.mktemp("a clone for text", numbered=False) / "my project", "text.yaml")
    project.run("dvc", "repro")
    project.commit("made")
    return project


@pytest.fixture
def project(made: Project) -> Iterator[Project]:
    """The made project; whatever a test did to its parameters and results is undone."""
    yield made
    made.restore()


def trained(project: Project, name: str) -> Path:
    return project.path(f"models/trained/text/text-{name}/weights.safetensors")


def companion(project: Project, name: str) -> Path:
    return project.path(f"models/companions/text/text-{name}/teacher/weights.safetensors")


def figures(project: Project, name: str) -> dict[str, Any]:
    return json.loads(project.path(f"reports/metrics/text/text-{name}.json").read_text())


def test_teacher_and_student_are_outputs_of_their_own(project: Project) -> None:
    """The student is the plain network; the teacher that learnt with it is kept, described and evaluated beside it."""
    from safetensors import safe_open

    shapes = {}
    for name in STUDENTS:
        with safe_open(trained(project, name), "pt") as file:
            shapes[name] = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert all(found == shapes["alone"] for found in shapes.values())
    for name in ("online", "lgtm"):
        description = json.loads((companion(project, name).parent / "model.json").read_text())
        assert description["name"] == f"text-{name}.teacher"
        assert description["start"]["name"] == "text-mlm"
        assert description["weights_sha256"] == sha256(companion(project, name)) != sha256(trained(project, "mlm"))
        assert figures(project, f"{name}.teacher")["test"]["accuracy"] > 0
    for name in ("alone", "kd"):
        assert not companion(project, name).exists()
        beside = project.path(f"models/companions/text/text-{name}")
        assert [path.name for path in beside.iterdir()] == ["contents.json"]


def test_who_holds_out_uses_fewer_rows(project: Project) -> None:
    rows = {name: json.loads((trained(project, name).parent / "model.json").read_text())["rows"] for name in STUDENTS}
    assert rows["alone"] == rows["kd"] == rows["online"] == {"train": 520}
    assert rows["lgtm"] == {"train": 416, "held_out": 104}


def test_an_encoder_that_was_not_taught_answers_alike(project: Project) -> None:
    """A classifier of zeros: every class has the same probability."""
    samples = pd.read_csv(project.path("reports/evaluation/text/text-mlm.samples.csv"))
    assert samples["prediction"].nunique() == 1
    assert samples["confidence"].between(0.1249, 0.1251).all()


def test_killed_and_started_again_it_ends_alike(project: Project) -> None:
    """Both networks, both optimisers, both streams, the held factor and every sample's influence: the same bits."""
    table = project.path("models/companions/text/text-lgtm/influence.csv")
    before = [sha256(path) for path in (trained(project, "lgtm"), companion(project, "lgtm"), table)]
    command = [sys.executable, "-m", "stages.distill", "text-lgtm"]
    environment = {**project.environment, "DISTILLERY_CHECKPOINT_SECONDS": "0"}
    process = subprocess.Popen(command, cwd=project.folder, env=environment, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(project.folder.glob(".checkpoints/distill/text-lgtm/*/checkpoint.pt")):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(trained(project, "lgtm").parent)
    shutil.rmtree(companion(project, "lgtm").parent.parent)
    done = project.stage("stages.distill", "text-lgtm")
    assert "going on at step" in done.stderr
    assert [sha256(path) for path in (trained(project, "lgtm"), companion(project, "lgtm"), table)] == before


def test_influence_of_every_sample_for_a_person(project: Project) -> None:
    output = project.path("to clean.csv")
    shown = project.stage("stages.influence", "text-lgtm", "--export", str(output)).stdout
    table, manifest = pd.read_csv(output), pd.read_csv(project.path("data/prepared/text/reuters/manifest.csv"))
    assert table["influence"].is_monotonic_increasing
    assert set(table["id"]) <= set(manifest[manifest["split"] == "train"]["id"])
    texts = manifest.set_index("id")["text"]
    assert (table.set_index("id")["text"] == texts.loc[table["id"]]).all()
    assert "ROC" in shown
    output.unlink()
    assert "records no influence" in refusal(project.stage("stages.influence", "text-kd", code=None))


def test_register_promote_and_answer_raw_text(project: Project) -> None:
    project.stage("stages.latency", "text")
    project.stage("pipelines.registry", "register", "text")
    done = project.stage("pipelines.registry", "promote", "text", code=None)
    assert "Traceback" not in done.stderr
    (file,) = project.path("decisions/text").glob("*.json")
    record = json.loads(file.read_text())
    verdicts = {name: check["verdict"] for name, check in record["gates"].items()}
    assert {name: verdicts[name] for name in ABSOLUTE} == dict.fromkeys(ABSOLUTE, "passed")
    report = project.stage("stages.report", "text").stdout
    assert {"mlm", "bert", *STUDENTS, "lgtm.teacher", "online.teacher"} <= {
        line.split()[0] for line in report.splitlines() if line
    }
    code = (
        "import sys, json, mlflow, numpy as np\n"
        "model = mlflow.pyfunc.load_model('models:/text@challenger')\n"
        "print(json.dumps(model.predict({'texts': np.array(sys.argv[1:], dtype=object)})))\n"
    )
    normal = re.sub("[^a-z]+", " ", RAW.lower())
    tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{project.path('mlflow.db')}"}
    answers = json.loads(project.run(sys.executable, "-c", code, RAW, normal, **tracking).stdout.splitlines()[-1])
    assert answers[0]["probabilities"] == answers[1]["probabilities"]
    assert set(answers[0]["probabilities"]) == {
        *("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
    }


@pytest.mark.parametrize(
    ("section", "entry", "values", "command", "message"),
    [
        ("datasets", "reuters", {"classes": ["earn", "acq"]}, "prepare", r"unknown label.*known: earn, acq"),
        ("datasets", "reuters", {"columns": {"text": "Txt"}}, "prepare", r"no column 'Txt'.*did you mean 'Text'"),
        (
            "datasets",
            "reuters",
            {"split": {"validation": 80, "held_out": 0}},
            "prepare",
            "held_out: must be > 0",
        ),
        (
            "datasets",
            "reuters",
            {"split": {"validation": 80, "held_out": 1}},
            "prepare",
            "held_out: must be < 1",
        ),
        ("students", "text-lgtm", {"influence_scale": -1}, "distill", r"students.text-lgtm.influence_scale"),
        ("students", "text-lgtm", {"teacher": "none"}, "distill", r"method 'lgtm' needs a teacher"),
        ("students", "text-lgtm", {"training": {"batch": 300}}, "distill", r"held_out samples.*lower training.batch"),
        ("students", "text-lgtm", {"initial": {"layers": [7]}}, "distill", r"it has no layer 7, only 0 to 1"),
        ("teachers", "text-bert", {"start": "text-mlmm"}, "teach", r"text-bert.start: .*did you mean 'text-mlm'"),
    ],
)
def test_wrong_input_is_refused_in_one_paragraph(
    project: Project, section: str, entry: str, values: dict[str, Any], command: str, message: str
) -> None:
    project.edit(lambda raw: raw[section][entry].update(values))
    assert re.search(message, refusal(project.stage(f"stages.{command}", entry, code=None)))


def test_a_teacher_of_another_vocabulary_is_refused(project: Project) -> None:
    project.edit(lambda raw: raw["datasets"]["reuters"]["tokenizer"].update(pieces=300))
    project.run("dvc", "repro", "validate@reuters")
    said = refusal(project.stage("stages.distill", "text-kd", code=None))
    assert re.search(r"teacher 'text-bert' and .*differ in tokenizer_sha256", said)
