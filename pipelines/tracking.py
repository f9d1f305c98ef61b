"""The connection to MLflow: a server, or a SQLite file at the root that is prepared once.

`MLFLOW_TRACKING_URI` says where; without it everything lies in `mlflow.db` and `mlruns/` at the root, and no server is
needed. Runs and the registry lie in the same place.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from data.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlflow.db"
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # A server that is away is told of within seconds; mlflow's own seven retries take minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def uri() -> str:
    """Where runs and models are kept: MLFLOW_TRACKING_URI, or mlflow.db in the working directory.

    Raises:
        UserError: a kind of address that MLflow no longer takes.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or f"sqlite:///{DATABASE}"
    if "://" not in given or given.startswith("file:"):
        raise UserError(
            f"MLFLOW_TRACKING_URI is {given!r}; MLflow keeps nothing in plain folders any more · set the address of a "
            f"server (http://HOST:PORT) or a database (sqlite:///{DATABASE}), or unset it"
        )
    database = _sqlite_file(given)
    # Absolute: the store is found again, and knows its artifacts, wherever a thread's working directory moves to.
    return f"sqlite:///{database}" if database else given.rstrip("/")


def address() -> str:
    """`uri()` without a user name or password, for messages and links."""
    parts = urlsplit(uri())
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.netloc else uri()


def connect() -> "MlflowClient":
    """A client of the place that `uri` names, after it has answered once.

    A SQLite file that does not exist yet is prepared first, by one process while the others wait: parallel first users
    would crash each other's migration. mlflow's own functions (`mlflow.onnx.log_model`) use the same place afterwards.

    Raises:
        UserError: the server does not answer, refuses, or the database is of another version of MLflow.
    """
    where = uri()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Not a default but a rule: a pickle runs whatever code it holds.
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    # The reason stands in the UserError, once.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        database = _sqlite_file(where)
        if database:
            _prepare(database)
        with _unchanged("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
            mlflow.set_tracking_uri(where)
            mlflow.set_registry_uri(where)
        client = mlflow.MlflowClient(tracking_uri=where, registry_uri=where)
        client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ImportError) as error:
        raise UserError(explain(error)) from error
    return client


def explain(error: BaseException) -> str:
    """What went wrong between us and MLflow, and what to do, in one paragraph."""
    text = (str(error).partition("\n")[0] or repr(error)).replace(uri(), address())[:300]
    if "out-of-date database schema" in text:
        return (
            f"{address()} was written by another version of MLflow · keep a copy of it and run "
            f"`mlflow db upgrade {address()}`"
        )
    if address().startswith("sqlite:"):
        return (
            f"the MLflow database {address()} cannot be used: {text} · move it away, or wait for who is writing to it"
        )
    return f"MLflow at {address()} does not answer: {text} · start it, or correct MLFLOW_TRACKING_URI, and try again"


def _sqlite_file(where: str) -> Path | None:
    """The absolute path of a SQLite address; None for every other kind."""
    if not where.startswith("sqlite:///"):
        return None
    name = where.removeprefix("sqlite:///")
    if name in ("", ":memory:"):
        raise UserError(f"MLFLOW_TRACKING_URI is {where!r}, which nobody else could read · name a file")
    return Path.cwd() / name


def _prepare(database: Path) -> None:
    """Make the tables of a fresh database, beside it; it takes its place when it is complete."""
    if _has_tables(database):
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f"{database.name}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _has_tables(database):
            return
        # Only the holder of the lock gets here: what lies there was left by a killed process. A folder, because SQLite
        # would roll back a new file by the journal of an old one.
        partial = database.with_name(f"{database.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _make_tables(partial / database.name, Path.cwd() / "mlruns")
        (partial / database.name).replace(database)
        shutil.rmtree(partial)


def _has_tables(database: Path) -> bool:
    return database.is_file() and database.stat().st_size > 0


def _make_tables(database: Path, artifacts: Path) -> None:
    for name in ("alembic", "mlflow.store.db.utils"):  # a page of migrations that nobody has to read
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(f"sqlite:///{database}", str(artifacts)).engine.dispose()


@contextlib.contextmanager
def _unchanged(*names: str) -> Iterator[None]:
    """mlflow writes the address into the environment; a later `connect` elsewhere would follow it."""
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
