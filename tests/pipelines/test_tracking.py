"""Where runs are kept, and what is said when they cannot be."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.errors import UserError
from pipelines import tracking

PROJECT = Path(__file__).parents[2]


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_without_an_address_it_is_a_file_at_the_root(root: Path) -> None:
    client = tracking.connect()
    assert tracking.uri() == f"sqlite:///{root}/mlflow.db" == client.tracking_uri
    assert client._registry_uri == client.tracking_uri
    experiment = client.get_experiment(client.create_experiment("recognition"))
    assert Path(experiment.artifact_location).parent == root / "mlruns"
    client.create_registered_model("recognition")
    with sqlite3.connect(root / "mlflow.db") as database:
        assert database.execute("select name from registered_models").fetchall() == [("recognition",)]


def test_connecting_leaves_the_address_in_the_environment_alone(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking.connect().create_experiment("here")
    assert "MLFLOW_TRACKING_URI" not in os.environ
    other = tmp_path_factory.mktemp("other")
    (other / "mlflow.db").write_bytes((root / "mlflow.db").read_bytes())
    monkeypatch.chdir(other)
    client = tracking.connect()
    assert str(other) in client.tracking_uri
    client.create_experiment("there")
    monkeypatch.chdir(root)
    assert tracking.connect().get_experiment_by_name("there") is None


def test_functions_of_mlflow_use_the_same_place(root: Path) -> None:
    import mlflow

    client = tracking.connect()
    assert mlflow.get_tracking_uri() == mlflow.get_registry_uri() == client.tracking_uri


def test_no_pickle_is_ever_loaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    tracking.connect()
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"


@pytest.mark.parametrize(
    "given", ["file:./mlruns", "file:///tmp/mlruns", "./mlruns", "databricks", "sqlite:///:memory:"]
)
def test_an_address_that_cannot_work_is_refused_by_name(
    given: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is"):
        tracking.connect()


def test_a_server_that_is_away_is_told_of_soon_and_without_its_password(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = closed_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://somebody:secret@127.0.0.1:{port}/")
    before = time.monotonic()
    with pytest.raises(UserError, match=rf"http://127.0.0.1:{port} does not answer") as told:
        tracking.connect()
    assert time.monotonic() - before < 8
    assert "secret" not in str(told.value)
    assert tracking.address() == f"http://127.0.0.1:{port}"


def test_a_database_of_another_version_names_the_command(root: Path) -> None:
    with sqlite3.connect(root / "mlflow.db") as database:
        database.execute("update alembic_version set version_num = '0123456789ab'")
    with pytest.raises(UserError, match="mlflow db upgrade sqlite:///"):
        tracking.connect()


def test_a_file_that_is_no_database_is_told_of(root: Path) -> None:
    (root / "mlflow.db").write_text("this is a text that is longer than the header of a database " * 20)
    with pytest.raises(UserError, match=r"mlflow\.db cannot be used"):
        tracking.connect()


@pytest.mark.slow
def test_what_a_killed_first_user_left_is_no_obstacle(root: Path) -> None:
    """The tables of mlflow.db appear whole: a process that dies while it makes them leaves no half of them."""
    (root / "mlflow.db").unlink()
    killed = subprocess.Popen(
        [sys.executable, "-c", "from pipelines import tracking; tracking.connect()"],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    try:
        until = time.monotonic() + 60
        while not (root / "mlflow.db.part" / "mlflow.db-journal").exists():
            assert time.monotonic() < until
            assert killed.poll() is None
            time.sleep(0.001)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert not (root / "mlflow.db").exists()
    assert [experiment.name for experiment in tracking.connect().search_experiments()] == ["Default"]
    assert not (root / "mlflow.db.part").exists()


def test_an_empty_file_is_prepared_too(root: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_make_tables", lambda database, artifacts: shutil.copyfile(empty_mlflow, database))
    (root / "mlflow.db").write_bytes(b"")
    assert tracking.connect().search_experiments()
