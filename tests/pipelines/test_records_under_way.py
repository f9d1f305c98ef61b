"""Records to MLflow: while they grow, while MLflow is away, and the command."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from mlflow.exceptions import MlflowException

from data.errors import UserError
from pipelines import record_files, records, tracking

sys.path.insert(0, str(Path(__file__).parent))
from small_records import (
    PROJECT,
    STUDENT,
    TEACHER,
    Disk,
    all_runs,
    closed_port,
    curve,
    history,
    lines,
    picture,
    pipeline,
    runs,
    script,
)


@pytest.fixture
def disk(root: Path) -> Disk:
    return Disk(root)


# While it grows


@pytest.fixture
def trainer(disk: Disk) -> Iterator[Callable[[], IO[bytes]]]:
    held: list[IO[bytes]] = []

    def hold() -> IO[bytes]:
        held.append((disk.root / ".checkpoints/distill/small.lock").open("wb"))
        fcntl.flock(held[-1], fcntl.LOCK_EX)
        return held[-1]

    yield hold
    for file in held:
        file.close()


def test_a_training_runs_is_killed_goes_on_and_finishes(disk: Disk, trainer: Callable[[], IO[bytes]]) -> None:
    full = curve(5)
    disk.grow("distill", "small", STUDENT, lines(*full[:4]) + b'{"step": 4, "na')
    lock = trainer()
    records.sync("one")
    run = runs()["distill@small"]
    assert (run.info.status, pipeline(runs()).info.status) == ("RUNNING", "RUNNING")
    assert history(run) == sorted(full[:4])
    assert run.data.tags["sync.seen"] == "under way"
    lock.close()
    records.sync("one")
    assert (runs()["distill@small"].info.status, pipeline(runs()).info.status) == ("KILLED", "KILLED")
    disk.grow("distill", "small", STUDENT, lines(*full[:2]))  # cut back to its checkpoint
    lock = trainer()
    records.sync("one")
    assert runs()["distill@small"].info.status == "RUNNING"
    assert history(runs()["distill@small"]) == sorted(full[:4])
    disk.grow("distill", "small", STUDENT, lines(*full[:7]))
    records.sync("one")
    lock.close()
    disk.finish("distill", "small", STUDENT, lines(*full))
    records.sync("one")
    after = runs()["distill@small"]
    assert (after.info.run_id, after.info.status) == (run.info.run_id, "FINISHED")
    assert pipeline(runs()).info.status == "FINISHED"
    assert history(after) == sorted(full)
    assert after.data.params["training.epochs"] == "3"


def test_an_interruption_between_a_stage_and_its_pipeline_run(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.grow("distill", "small", STUDENT, b"")
    records.sync("one")
    assert {run.info.status for run in runs().values()} == {"KILLED"}
    disk.finish("distill", "small", STUDENT, lines(*curve(2)))
    client = tracking.connect()
    end = client.set_terminated

    def end_and_lose_the_answer(*arguments: Any) -> None:
        end(*arguments)
        raise MlflowException("the answer is lost")

    with monkeypatch.context() as patch:
        patch.setattr(client, "set_terminated", end_and_lose_the_answer)
        patch.setattr(tracking, "connect", lambda: client)
        with pytest.raises(UserError, match="the answer is lost"):
            records.sync("one")
    assert {run.info.status for run in runs().values()} == {"FINISHED", "RUNNING"}
    records.sync("one")
    assert {run.info.status for run in runs().values()} == {"FINISHED"}


def test_a_training_that_was_given_up_is_killed(disk: Disk, trainer: Callable[[], IO[bytes]]) -> None:
    old, new = "1" * 64, "2" * 64
    disk.grow("distill", "small", old, lines((0, "loss", 1.0)))
    lock = trainer()
    records.sync("one")
    disk.grow("distill", "small", new, lines((0, "loss", 2.0)), now=True)  # other parameters
    records.sync("one")
    states = {run.data.tags.get("digest"): run.info.status for run in all_runs()}
    assert states == {None: "RUNNING", old: "KILLED", new: "RUNNING"}
    lock.close()
    shutil.rmtree(disk.root / ".checkpoints")  # make clean
    records.sync("one")
    assert {run.info.status for run in all_runs()} == {"KILLED"}


def test_silence_ends_a_training_only_where_nobody_holds_it(disk: Disk, trainer: Callable[[], IO[bytes]]) -> None:
    disk.grow("distill", "small", STUDENT, b"", now=True)
    assert [source.alive for source in record_files.find()[0]] == [False]
    assert [source.alive for source in record_files.find(quiet_seconds=30)[0]] == [True]
    disk.grow("distill", "small", STUDENT, b"")
    assert [source.alive for source in record_files.find(quiet_seconds=30)[0]] == [False]
    trainer()
    assert [source.alive for source in record_files.find(quiet_seconds=30)[0]] == [True]


def test_looking_at_a_training_takes_nothing_from_it(disk: Disk) -> None:
    disk.grow("distill", "small", STUDENT, b"")
    record_files.find()
    with (disk.root / ".checkpoints/distill/small.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_following_shows_a_training_while_it_runs(
    disk: Disk, trainer: Callable[[], IO[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "POLL_SECONDS", 0)
    monkeypatch.setattr(records, "SYSTEM_SECONDS", 0)
    full, seen = curve(5), []

    def look() -> None:
        found = runs()
        stage = found.get("distill@small")
        seen.append((stage.info.status, len(history(stage)), pipeline(found).info.status) if stage else None)

    def grow(count: int) -> None:
        disk.grow("distill", "small", STUDENT, lines(*full[:count]), now=True)

    acts = [
        lambda: None,
        lambda: (grow(2), trainer()),
        lambda: (look(), grow(6)),
        lambda: (look(), disk.finish("distill", "small", STUDENT, lines(*full))),
        lambda: None,  # a finished one is read when it has lain still for a moment
        look,
    ]
    assert records.follow(script(*acts), "one") == []
    look()
    assert seen == [
        ("RUNNING", 2, "RUNNING"),
        ("RUNNING", 6, "RUNNING"),
        ("FINISHED", 10, "RUNNING"),
        ("FINISHED", 10, "FINISHED"),
    ]
    assert history(runs()["distill@small"]) == sorted(full)
    system = pipeline(runs()).data.metrics
    assert set(system) == {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_percentage",
        "system/system_memory_usage_megabytes",
    }
    assert 0 < system["system/system_memory_usage_percentage"] <= 100


def test_a_sync_beside_a_follower_does_not_end_its_pipeline_run(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "POLL_SECONDS", 0)
    seen = []
    acts = [
        lambda: disk.finish("teach", "big", TEACHER, lines(*curve(2))),
        lambda: None,
        lambda: (records.sync("another"), seen.append(pipeline(runs()).info.status)),
    ]
    records.follow(script(*acts), "one")
    assert seen == ["RUNNING"]
    assert pipeline(runs()).info.status == "FINISHED"


# While MLflow is away


def test_a_server_that_is_away_loses_nothing(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.everything()
    records.sync("one")
    wanted = picture()
    shutil.copyfile(disk.root / "mlflow.db", disk.root / "other.db")
    disk.grow("teach", "big", "7" * 64, lines(*curve(1)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(UserError, match="does not answer"):
        records.sync("one")
    shutil.rmtree(disk.root / ".checkpoints")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    records.sync("one")
    assert picture() == wanted


def test_following_survives_a_server_that_is_away(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="distillery")
    monkeypatch.setattr(records, "POLL_SECONDS", 0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port()}")
    told: list[int] = []

    def count() -> None:
        told.append(sum("does not answer" in record.message for record in caplog.records))

    acts = [
        disk.everything,
        count,
        count,
        lambda: monkeypatch.delenv("MLFLOW_TRACKING_URI"),
        lambda: None,
        lambda: told.append(len(history(runs()["distill@small"]))),
    ]
    assert records.follow(script(*acts), "one") == []
    assert told == [1, 1, 16]
    assert sum("answers again" in record.message for record in caplog.records) == 1
    assert len(history(runs()["distill@small"])) == 16


def test_a_damaged_record_is_named_and_the_others_are_written(disk: Disk) -> None:
    disk.everything()
    disk.finish("distill", "small", STUDENT, lines(*curve(2)) + b"no value\n")
    (problem,) = records.sync("one")
    assert "line 6 of the record of distill@small is no value: b'no value'" in problem
    assert runs()["teach@big"].info.status == "FINISHED"
    disk.finish("distill", "small", STUDENT, lines(*curve(7)))
    assert records.sync("one") == []
    assert runs()["distill@small"].info.status == "FINISHED"
    (disk.root / "models/trained/recognition/small/model.json").unlink()
    (problem,) = records.sync("one")
    assert "models/trained/recognition/small is not complete" in problem


def test_a_deleted_experiment_names_the_command(disk: Disk) -> None:
    disk.everything()
    records.sync("one")
    client = tracking.connect()
    client.delete_experiment(client.get_experiment_by_name("recognition").experiment_id)
    (problem,) = records.sync("one")
    assert "mlflow experiments restore" in problem


def test_a_name_that_no_pipeline_run_can_have_is_refused(disk: Disk) -> None:
    with pytest.raises(UserError, match="no name of a pipeline run"):
        records.sync("it's")


# The command


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.records", *arguments]


def test_the_command_follows_until_it_is_told_to_end(disk: Disk) -> None:
    disk.grow("distill", "small", STUDENT, lines(*curve(2)), now=True)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "DISTILLERY_PIPELINE_RUN": "from-the-flow"}
    process = subprocess.Popen(command("sync", "--follow"), env=environment, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while "distill@small" not in runs():
            assert time.monotonic() < until
            time.sleep(0.2)
        disk.finish("distill", "small", STUDENT, lines(*curve(7)))
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, told
    assert "Traceback" not in told
    assert history(runs()["distill@small"]) == sorted(curve(7))
    assert pipeline(runs()).data.tags["pipeline_run"] == "from-the-flow"
    assert pipeline(runs()).info.status == "FINISHED"


def test_the_end_of_a_process_is_seen_zombies_included() -> None:
    process = subprocess.Popen(["sleep", "60"])
    ended = records._end_of(process.pid)
    assert not ended()
    process.kill()
    until = time.monotonic() + 10
    while not ended():  # nobody has waited for it: it is a zombie
        assert time.monotonic() < until
        time.sleep(0.01)
    process.wait()
    assert ended()
    assert records._end_of(process.pid)()


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    names = ("torch", "mlflow", "pandas", "prefect")
    code = f"import sys, pipelines.records; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_page_exists_only_where_a_server_does(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.everything()
    records.sync("one")
    assert records.run_url("distill", "small") is None
    assert records.run_id("export", "small") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port()}")
    assert records.run_url("distill", "small") is None


@pytest.mark.slow
def test_with_a_real_server(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away during the training, there, away again, back."""
    port = closed_port()
    disk.grow("distill", "small", STUDENT, lines(*curve(2)), now=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with pytest.raises(UserError, match="does not answer"):
        records.sync("one")
    server = start(port)
    try:
        records.sync("one")
        assert runs()["distill@small"].info.status == "KILLED"
    finally:
        stop(server)
    disk.everything()
    with pytest.raises(UserError, match="does not answer"):
        records.sync("one")
    server = start(port)
    try:
        records.sync("one")
        found = runs()
        assert {run.info.status for run in found.values()} == {"FINISHED"}
        assert len(history(found["distill@small"])) == 16
        before = picture()
        records.sync("two")
        assert picture() == before
        url = records.run_url("distill", "small")
        run = found["distill@small"].info
        assert url == f"http://127.0.0.1:{port}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    finally:
        stop(server)


def start(port: int) -> subprocess.Popen[bytes]:
    """An MLflow server on the database of the working directory, when it answers."""
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db"),
            *("--default-artifact-root", "mlruns", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        ],
        env={**os.environ, **tracking.ENVIRONMENT, "MLFLOW_TRACKING_URI": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while True:
        try:
            tracking.connect()
            return server
        except UserError:
            if time.monotonic() > until or server.poll() is not None:
                stop(server)
                raise
            time.sleep(0.5)


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and its workers."""
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
