"""What a flow starts beside its stages: a temporary Prefect API where none is named, and the writer of records."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import UserError
from pipelines import child

log = logging.getLogger("distillery")

HOME = Path(".prefect")
STARTUP = 180.0  # seconds; a cold disk and a new database together take 30
FOLLOWER = "pipelines.records"
LAST_SYNC, HASTY_SYNC = 120.0, 10.0  # seconds for the last look at the records, and the same after a cancellation
# Prefect's console shows warnings only; what stages say is printed by the flow itself, and kept by the API.
QUIET = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "DO_NOT_TRACK": "1",
}
EPHEMERAL = {
    "PREFECT_UI_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
}


@contextlib.contextmanager
def prefect_api() -> Iterator[None]:
    """The server that PREFECT_API_URL names; without one a temporary server with its database in .prefect/.

    Started by this process and ended with it, however it ends. Prefect must not have been imported before: it reads
    its settings once. No setting of the user's own Prefect (its home, its profiles) is used or changed.

    Raises:
        UserError: the server does not answer, or does not start.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    named = os.environ.get("PREFECT_API_URL")
    if named:
        if not _answers(named):
            raise UserError(
                f"Prefect's server at PREFECT_API_URL={named} does not answer · start `prefect server start`, or unset "
                "the variable for a temporary server"
            )
        yield
        return
    for name in [name for name in os.environ if name.startswith("PREFECT_") and name not in QUIET]:
        del os.environ[name]
    HOME.mkdir(exist_ok=True)
    os.environ["PREFECT_HOME"] = str(HOME.resolve())
    port = free_port()
    process = subprocess.Popen(
        child.command(
            *("uvicorn", "--factory", "prefect.server.api.server:create_app", "--host", "127.0.0.1"),
            *("--port", str(port), "--log-level", "critical", "--lifespan", "on"),
        ),
        env={**os.environ, **EPHEMERAL},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the flow, which then tells its server how it ended
    )
    url = f"http://127.0.0.1:{port}/api"
    os.environ["PREFECT_API_URL"] = url
    try:
        # Importing takes as long as the server does, and neither waits for the other.
        import prefect  # noqa: F401

        _wait_until_healthy(url, process)
        yield
    finally:
        end(process, 5.0)
        del os.environ["PREFECT_API_URL"]


def free_port() -> int:
    """A port of the loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + STARTUP
    while time.monotonic() < until:
        if _answers(url):
            return
        if process.poll() is not None:
            raise UserError(
                f"Prefect's temporary server ended with exit code {process.returncode} · if its database "
                f"({HOME}/prefect.db) is of another version, remove it; or start `prefect server start` and set "
                "PREFECT_API_URL"
            )
        time.sleep(0.1)
    raise UserError(
        f"Prefect's temporary server was not ready after {STARTUP:.0f} s · start `prefect server start` and set "
        "PREFECT_API_URL"
    )


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except urllib.error.HTTPError:
        return True  # it wants to know who asks; Prefect will tell it
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


@contextlib.contextmanager
def live_records(pipeline_run: str) -> Iterator[None]:
    """Let `pipelines.records` follow the records of this process's stages into MLflow, and look once more at the end.

    Nothing of it can stop a flow: whatever was missed is there after `python -m pipelines.records sync`. After a
    `kill -9` of the flow the follower notices by itself, writes what is left, and ends.
    """
    command = [sys.executable, "-m", FOLLOWER, "sync", "--pipeline-run", pipeline_run]
    # What it says about runs and lines belongs to a command of its own; only its warnings and errors are for here.
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    follow = [*command, "--follow", "--until-pid", str(os.getpid())]
    process = subprocess.Popen(follow, start_new_session=True, **options)
    try:
        yield
    except BaseException:
        end(process, HASTY_SYNC)
        raise
    code = end(process, LAST_SYNC)
    if code == -signal.SIGTERM:  # it had not yet begun to listen
        code = subprocess.run(command, check=False, timeout=LAST_SYNC, **options).returncode
    if code:
        log.warning("not everything was written to MLflow · run `python -m %s sync`", FOLLOWER)


def end(process: subprocess.Popen[bytes], patience: float) -> int:
    """Ask a process to end, and end it when it has not after so many seconds; returns its exit code."""
    process.terminate()
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
