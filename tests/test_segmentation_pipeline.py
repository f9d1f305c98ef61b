"""The task segmentation through the real command line, with every method."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
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
METHODS = ("alone", "kd", "cwd", "mgd", "gdd")
# Gates whose verdict is about files; the verdicts of the others follow from figures and times.
ABSOLUTE = {"untampered", "validated", "evaluated", "parity", "signature", "redistributable", "clean"}
COMPARED = {"baseline", "champion", "teacher_share", "latency"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project on which `dvc repro` has run once. Tests leave it as they found it."""
    project = copy_tree(
        tmp_path_factory.mktemp("a clone for segmentation", numbered=False) / "my project", "segmentation.yaml"
    )
    project.run("dvc", "repro")
    project.commit("made")
    return project


@pytest.fixture
def project(made: Project) -> Iterator[Project]:
    """The made project; whatever a test did to its parameters and results is undone."""
    yield made
    made.restore()


def weights(project: Project, method: str) -> Path:
    return project.path(f"models/trained/segmentation/segmentation-{method}/weights.safetensors")


def test_every_method_gives_the_plain_network(project: Project) -> None:
    """No trace of what exists only in training, and other weights than any other method's."""
    from safetensors import safe_open

    shapes, digests = {}, set()
    for method in METHODS:
        with safe_open(weights(project, method), "pt") as file:
            shapes[method] = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        digests.add(sha256(weights(project, method)))
    assert all(found == shapes["alone"] for found in shapes.values())
    assert len(digests) == len(METHODS)


def test_figures_follow_from_samples_and_classes(project: Project) -> None:
    for method in METHODS:
        name = f"segmentation-{method}"
        figures = json.loads(project.path(f"reports/metrics/segmentation/{name}.json").read_text())
        samples = pd.read_csv(project.path(f"reports/evaluation/segmentation/{name}.samples.csv"))
        classes = pd.read_csv(project.path(f"reports/evaluation/segmentation/{name}.classes.csv"))
        for split in ("validation", "test"):
            own = samples[samples["split"] == split]
            both = own[[f"intersection_{k}" for k in range(11)]].sum().to_numpy()
            either = own[[f"union_{k}" for k in range(11)]].sum().to_numpy()
            iou = both[either > 0] / either[either > 0]
            assert figures[split]["miou"] == pytest.approx(iou.mean(), abs=1e-6)
            assert classes[classes["split"] == split]["iou"].mean() == pytest.approx(iou.mean(), abs=1e-5)
            robust = [key for key in figures[split] if re.fullmatch(r"miou_(noise|blur|darkness)_[123]", key)]
            assert len(robust) == 9


def test_the_exported_graph_takes_raw_images_of_any_number(project: Project) -> None:
    file = project.path("models/exported/segmentation/segmentation-gdd/model.onnx")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for count in (1, 3):
        (logits,) = session.run(None, {"images": np.random.default_rng(0).random((count, 3, 64, 64), np.float32)})
        assert logits.shape == (count, 11, 64, 64)


def test_killed_and_started_again_it_ends_alike(project: Project) -> None:
    """With noise, several places and two optimised modules: the same bits."""
    before = sha256(weights(project, "gdd"))
    command = [sys.executable, "-m", "stages.distill", "segmentation-gdd"]
    environment = {**project.environment, "DISTILLERY_CHECKPOINT_SECONDS": "0"}
    process = subprocess.Popen(command, cwd=project.folder, env=environment, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(project.folder.glob(".checkpoints/distill/segmentation-gdd/*/checkpoint.pt")):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(weights(project, "gdd").parent)
    done = project.stage("stages.distill", "segmentation-gdd")
    assert "going on at step" in done.stderr
    assert sha256(weights(project, "gdd")) == before


def test_the_noise_alone_decides_nothing_else(project: Project) -> None:
    """Weight 0 is `alone` bit for bit: noise, generator and teacher leave no trace."""
    project.edit(lambda raw: raw["students"]["segmentation-gdd"].update(weight=0.0, logits=0.0))
    project.stage("stages.distill", "segmentation-gdd")
    assert sha256(weights(project, "gdd")) == sha256(weights(project, "alone"))


def test_register_and_promote(project: Project) -> None:
    project.stage("stages.latency", "segmentation")
    project.stage("pipelines.registry", "register", "segmentation")
    done = project.stage("pipelines.registry", "promote", "segmentation", code=None)
    assert "Traceback" not in done.stderr
    (file,) = project.path("decisions/segmentation").glob("*.json")
    record = json.loads(file.read_text())
    assert (done.returncode, record["decision"]) in ((0, "promoted"), (1, "refused")), done.stderr
    verdicts = {name: check["verdict"] for name, check in record["gates"].items()}
    assert set(verdicts) == {*ABSOLUTE, *COMPARED}
    assert {name: verdicts[name] for name in ABSOLUTE} == dict.fromkeys(ABSOLUTE, "passed")
    shown = project.stage("pipelines.registry", "show", "segmentation").stdout
    assert [line for line in shown.splitlines() if record["student"] in line and "challenger" in line]
    report = project.stage("stages.report", "segmentation").stdout
    assert {"pspnet", *METHODS} <= {line.split()[0] for line in report.splitlines() if line}
    page = project.path("reports/index.html").read_text()
    assert [name for name in ("pspnet", *METHODS) if f"segmentation-{name}" not in page] == []


def change(name: str, **values: Any) -> Callable[[dict], object]:
    return lambda raw: raw["students"][name].update(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0}, r"students.segmentation-gdd.temperature: must be > 0, got 0"),
        ({"noise": {"std": -1}}, r"students.segmentation-gdd.noise.std: must be >= 0, got -1"),
        ({"noise": {"kind": "poisson"}}, r"students.segmentation-gdd.noise.kind"),
        ({"places": [{"student": "stage1"}]}, r"\(8, 4, 14, 14\).*\(8, 24, 7, 7\).*places\[0\]"),
        ({"places": [{"student": "stage7"}]}, r"no place .stage7.*places\[0\].student"),
        ({"weight": -1}, r"students.segmentation-gdd.weight: must be >= 0, got -1"),
        ({"training": {"augment": {"crop": [128, 128]}}}, r"training.augment.crop: must fit into the images"),
        ({"training": {"batch": 1000}}, r"lower training.batch"),
    ],
)
def test_wrong_input_is_refused_in_one_paragraph(project: Project, values: dict[str, Any], message: str) -> None:
    project.edit(change("segmentation-gdd", **values))
    assert re.search(message, refusal(project.stage("stages.distill", "segmentation-gdd", code=None)))
    assert weights(project, "gdd").is_file()
