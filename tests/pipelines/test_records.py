"""Records to MLflow: what a run is, once and for ever, whatever happens on the way."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.files import digest, sha256
from pipelines import record_files, record_writer, records, tracking

sys.path.insert(0, str(Path(__file__).parent))
from small_records import (
    PARAMETERS,
    PROJECT,
    STUDENT,
    TEACHER,
    Disk,
    all_runs,
    broken_sync,
    curve,
    forget_engines,
    git,
    history,
    lines,
    picture,
    pipeline,
    runs,
)


@pytest.fixture
def disk(root: Path) -> Disk:
    return Disk(root)


# What a run is


def test_a_pipeline_run_and_its_stages_in_the_experiment_of_the_task(disk: Disk) -> None:
    disk.everything()
    disk.finish("distill", "words", "c" * 64, lines((0, "loss/task", 1.0)), task="text")
    assert records.sync("monday") == []
    found = runs()
    parent = pipeline(found)
    assert set(found) == {parent.info.run_name, "teach@big", "distill@small", "evaluate@recognition"}
    children = [run for run in found.values() if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert {run.data.tags["pipeline_run"] for run in found.values()} == {"monday"}
    assert parent.data.tags["stage.distill/small"] == found["distill@small"].info.run_id
    assert pipeline(runs("text")).data.tags["pipeline_run"] == "monday"
    assert set(runs("text")) == {pipeline(runs("text")).info.run_name, "distill@words"}


def test_a_run_tells_what_it_is_and_where_it_comes_from(disk: Disk) -> None:
    disk.everything()
    records.sync()
    run = runs()["distill@small"]
    recipe = json.loads((disk.root / "models/trained/recognition/small/model.json").read_text())["recipe"]
    wanted = {
        "kind": "stage",
        "task": "recognition",
        "stage": "distill",
        "key": "small",
        "dvc.stage": "distill@small",
        "method": "kd",
        "teacher": "big",
        "model.kind": "student",
        "digest": STUDENT,
        "digest.data": "d" * 64,
        "digest.teacher": "5" * 64,
        "digest.student": digest(["weights", STUDENT]),
        "digest.weights": digest(["weights", STUDENT]),
        "digest.parameters": digest(recipe),
        "sync.seen": "finished",
    }
    assert {tag: run.data.tags.get(tag) for tag in wanted} == wanted
    assert run.data.params == {
        "task": "recognition",
        "dataset": "digits",
        "method": "kd",
        "teacher": "big",
        "training.epochs": "3",
        "training.rate": "0.1",
        "widths": "[1, 2]",
    }
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("digits", "d" * 36)
    assert json.loads(data.dataset.source) == {"uri": "data/prepared/recognition/digits"}


def test_every_line_of_a_record_is_there_and_figures_of_evaluations_in_their_models_too(disk: Disk) -> None:
    disk.everything()
    records.sync()
    found = runs()
    own = [value for value in history(found["distill@small"]) if not value[1].startswith(("final/", "test/"))]
    assert own == sorted(curve(7))
    assert found["distill@small"].data.metrics["test/top_1"] == 0.8
    assert found["distill@small"].data.metrics["final/validation/top_1"] == 0.8
    assert found["teach@big"].data.metrics["test/top_1"] == 0.9
    assert history(found["evaluate@recognition"]) == sorted(
        (0, f"{name}/{split}/top_1", value)
        for name, value in (("big", 0.9), ("small", 0.8))
        for split in ("validation", "test")
    )


def test_figures_of_a_companion_stand_with_its_student(disk: Disk) -> None:
    disk.everything()
    disk.accompany("small", "teacher", "9" * 64)
    disk.evaluate({"big": 0.9, "small": 0.8, "small.teacher": 0.95})
    assert records.sync() == []
    found = runs()
    assert set(found) == {pipeline(found).info.run_name, "teach@big", "distill@small", "evaluate@recognition"}
    shown = {name: value for name, value in found["distill@small"].data.metrics.items() if "test/" in name}
    assert shown == {"test/top_1": 0.8, "teacher/test/top_1": 0.95}
    assert found["distill@small"].data.metrics["teacher/final/validation/top_1"] == 0.95
    assert found["distill@small"].data.metrics["validation/top_1"] == curve(7)[-1][2]
    assert not [name for name in found["teach@big"].data.metrics if name.startswith("teacher/")]
    assert found["evaluate@recognition"].data.metrics["small.teacher/test/top_1"] == 0.95


def test_an_evaluation_says_which_weights_it_is_of(disk: Disk) -> None:
    """By what the stage writes: models.json, not the digest of the record, which names data and code as well."""
    disk.everything()
    file = disk.root / "reports/evaluation/recognition/models.json"
    weights = json.loads(file.read_text())
    assert weights == {"big": digest(["weights", TEACHER]), "small": digest(["weights", STUDENT])}
    assert json.loads(file.with_name("record.jsonl").read_text().splitlines()[0])["digest"] != digest(weights)
    kept = file.read_text()
    file.write_text("{")
    (problem,) = records.sync()
    assert "reports/evaluation/recognition/models.json is damaged" in problem
    assert "test/top_1" not in runs()["teach@big"].data.metrics
    file.write_text(kept)
    assert records.sync() == []
    assert runs()["teach@big"].data.metrics["test/top_1"] == 0.9


def test_names_and_values_that_mlflow_does_not_take_are_fitted(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_writer, "METRICS_PER_CALL", 3)
    many = {f"p{number}": number for number in range(250)}
    disk.finish(
        "distill", "small", STUDENT, lines(*curve(7), (7, "recall@1", 0.5)), many=many, long="x" * 9000, empty={}
    )
    assert records.sync() == []
    run = runs()["distill@small"]
    assert run.data.metrics["recall_1"] == 0.5
    assert len(history(run)) == 15
    assert len(run.data.params) == 250 + 2 + 7
    assert run.data.params["long"] == "x" * 6000


def test_revision_and_cleanliness_are_those_of_the_working_tree(disk: Disk) -> None:
    disk.everything()
    (disk.root / ".gitignore").write_text("/mlflow.db*\n/mlruns/\n/models/\n/reports/\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "x")
    (disk.root / "dvc.lock").write_text("every pipeline run changes it")
    clean = record_files.read_tree()
    assert (clean.revision, clean.clean) == (git("rev-parse", "HEAD"), True)
    assert clean.lock == sha256(disk.root / "dvc.lock")
    records.sync()
    tags = runs()["teach@big"].data.tags
    assert (tags["git.revision"], tags["git.clean"]) == (clean.revision, "true")
    assert tags["mlflow.source.git.commit"] == clean.revision
    parent = pipeline(runs())
    assert parent.data.tags["dvc.lock"] == clean.lock
    assert parent.data.tags["pipeline_run"] == clean.name
    (disk.root / "params.yaml").write_text(PARAMETERS + "# one\n")
    one = record_files.read_tree()
    assert (one.revision, one.clean) == (clean.revision, False)
    (disk.root / "params.yaml").write_text(PARAMETERS + "# two\n")
    assert len({clean.name, one.name, record_files.read_tree().name}) == 3
    disk.finish("teach", "big", "e" * 64, lines((0, "loss", 1.0)))
    records.sync()
    tags = {run.data.tags["digest"]: run.data.tags for run in all_runs() if run.data.tags["kind"] == "stage"}
    assert tags["e" * 64]["git.clean"] == "false"
    assert tags[TEACHER]["git.clean"] == "true"


def test_the_tree_of_a_project_in_a_folder_is_the_whole_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, folder = tmp_path / "code.py", tmp_path / "benchmarks"
    folder.mkdir()
    code.write_text("")
    (folder / "dvc.lock").write_text("")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "x")
    monkeypatch.chdir(folder)
    (folder / "dvc.lock").write_text("every pipeline run changes it")
    clean = record_files.read_tree()
    assert clean.clean
    code.write_text("one = 1")
    one = record_files.read_tree()
    code.write_text("two = 2")
    assert not one.clean
    assert len({clean.name, one.name, record_files.read_tree().name}) == 3


# Once, and for ever


def test_a_second_sync_changes_nothing_and_asks_for_little(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.everything()
    records.sync("one")
    before = picture()
    database = sha256(disk.root / "mlflow.db")
    records.sync("two")
    assert picture() == before
    assert sha256(disk.root / "mlflow.db") == database
    asked: list[str] = []
    client = tracking.connect()
    for name in ("get_run", "search_runs", "get_experiment_by_name", "search_experiments"):
        method = getattr(client, name)
        monkeypatch.setattr(
            client, name, lambda *a, _name=name, _method=method, **k: (asked.append(_name), _method(*a, **k))[1]
        )
    monkeypatch.setattr(tracking, "connect", lambda: client)
    records.sync("three")
    assert len(asked) == 5  # the experiment, what runs in it, and the run of each record


SOME_OR_ALL = [pytest.param(6, id="every-sixth"), pytest.param(1, id="every", marks=pytest.mark.slow)]


@pytest.mark.parametrize("stride", SOME_OR_ALL)
def test_an_interruption_after_any_call_costs_nothing(
    stride: int, disk: Disk, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_writer, "METRICS_PER_CALL", 5)
    disk.everything()
    records.sync("one")
    wanted = picture()
    assert sum(len(run["history"]) for run in wanted.values()) == 10 + 14 + 4 + 4
    last = 1 - stride
    while True:
        last += stride
        shutil.copyfile(empty_mlflow, disk.root / "mlflow.db")
        forget_engines()
        if not broken_sync(monkeypatch, last):
            break
        records.sync("one")
        assert picture() == wanted, f"after call {last}"
    assert last > 30


@pytest.mark.parametrize("stride", SOME_OR_ALL)
def test_an_interruption_at_any_time_of_a_training_costs_nothing(
    stride: int, disk: Disk, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Growing, stopped, cut back and going on, stopped, finished; one sync breaks at one call of one moment."""
    monkeypatch.setattr(record_writer, "METRICS_PER_CALL", 4)
    monkeypatch.setattr(record_files, "_held", lambda lock: not (lock.parent / "stopped").exists())
    full = curve(6)
    folder = disk.root / ".checkpoints/distill/small"
    moments: list[Callable[[], Any]] = [
        lambda: disk.grow("distill", "small", STUDENT, lines(*full[:5])),
        lambda: (disk.grow("distill", "small", STUDENT, lines(*full[:7])), (folder / "stopped").touch()),
        lambda: (disk.grow("distill", "small", STUDENT, lines(*full[:3])), (folder / "stopped").unlink()),
        (folder / "stopped").touch,
        lambda: disk.finish("distill", "small", STUDENT, lines(*full)),
    ]

    def play(broken: int, last: int) -> bool:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(disk.root / "models", ignore_errors=True)
        shutil.copyfile(empty_mlflow, disk.root / "mlflow.db")
        forget_engines()
        reached = False
        for number, moment in enumerate(moments):
            moment()
            if number == broken:
                reached = broken_sync(monkeypatch, last)
            else:
                records.sync("one")
        records.sync("one")
        return reached

    def result() -> dict[str, Any]:
        return picture(times=False, without=("sync.seen",))

    play(-1, 0)
    wanted = result()
    assert wanted["distill@small"]["history"] == sorted(full)
    assert {run["status"] for run in wanted.values()} == {"FINISHED"}
    tried = 0
    for broken in range(0, len(moments), min(stride, 2)):
        last = 1
        while play(broken, last):
            assert result() == wanted, f"moment {broken}, call {last}"
            tried += 1
            last += stride
    assert tried > 12 / stride


@pytest.mark.parametrize(
    "prepared", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["prepared", "before-there-is-a-database"]
)
def test_two_at_once(prepared: bool, disk: Disk, empty_mlflow: Path) -> None:
    disk.everything()
    if not prepared:
        (disk.root / "mlflow.db").unlink()
    command = [sys.executable, "-m", "pipelines.records", "sync", "--pipeline-run", "one"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert sorted("nothing new" in text for text in told) == [False, True], told
    twice = picture()
    shutil.copyfile(empty_mlflow, disk.root / "mlflow.db")
    forget_engines()
    records.sync("one")
    assert picture() == twice


def test_a_record_that_was_restored_leads_to_the_run_that_it_had(disk: Disk) -> None:
    disk.everything()
    records.sync("one")
    first = runs()["distill@small"].info.run_id
    kept = (disk.root / "models/trained/recognition/small").rename(disk.root / "kept")
    disk.finish("distill", "small", "9" * 64, lines(*curve(3)))
    records.sync("two")
    shutil.rmtree(disk.root / "models/trained/recognition/small")
    kept.rename(disk.root / "models/trained/recognition/small")
    records.sync("three")
    students = [run for run in all_runs() if run.data.tags.get("key") == "small"]
    assert {run.data.tags["digest"]: run.data.tags["pipeline_run"] for run in students} == {
        STUDENT: "one",
        "9" * 64: "two",
    }
    assert first in {run.info.run_id for run in students}
    assert records.run_id("distill", "small") == (students[0].info.experiment_id, first)


def test_the_same_models_evaluated_otherwise_are_another_run(disk: Disk) -> None:
    disk.everything()
    records.sync()
    disk.evaluate({"big": 0.95, "small": 0.85}, day=2)
    records.sync()
    found = [run for run in all_runs() if run.data.tags.get("stage") == "evaluate"]
    assert len(found) == 2
    assert len({run.data.tags["digest"] for run in found}) == 1
    (student,) = [run for run in all_runs() if run.data.tags.get("key") == "small"]
    assert student.data.metrics["test/top_1"] == 0.85


def test_an_evaluation_of_other_models_is_not_theirs(disk: Disk) -> None:
    disk.everything()
    kept = (disk.root / "models/trained/recognition/small").rename(disk.root / "kept")
    disk.finish("distill", "small", "9" * 64, lines(*curve(3)))
    records.sync("one")
    assert "test/top_1" not in runs()["distill@small"].data.metrics
    assert "test/top_1" not in runs()["teach@big"].data.metrics
    shutil.rmtree(disk.root / "models/trained/recognition/small")
    kept.rename(disk.root / "models/trained/recognition/small")
    records.sync("one")
    by_digest = {run.data.tags.get("digest"): run.data.metrics for run in all_runs()}
    assert by_digest[STUDENT]["test/top_1"] == 0.8
    assert "test/top_1" not in by_digest["9" * 64]


def test_a_run_that_somebody_deleted_does_not_come_back(disk: Disk) -> None:
    disk.everything()
    records.sync("one")
    tracking.connect().delete_run(runs()["teach@big"].info.run_id)
    assert records.sync("one") == []
    assert "teach@big" not in runs()


def test_of_two_runs_of_one_record_the_fuller_one_stays(disk: Disk) -> None:
    """Two machines that share a server can make one at the same moment."""
    disk.everything()
    records.sync("one")
    wanted = picture()
    kept = runs()["teach@big"]
    tags = {name: kept.data.tags[name] for name in ("kind", "sync.identity", "mlflow.parentRunId")}
    tracking.connect().create_run(kept.info.experiment_id, start_time=1, tags=tags, run_name="teach@big")
    records.sync("one")
    assert picture() == wanted
    assert runs()["teach@big"].info.run_id == kept.info.run_id
