"""Flows on a real Prefect server, through the command that a user types."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.files import sha256
from pipelines.services import free_port

sys.path.insert(0, str(Path(__file__).parents[1]))
from clones import copy_sources

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
BINARIES = Path(sys.executable).parent

WORK = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, os.getcwd())
from stages.command import end_with_parent
end_with_parent()
name = sys.argv[1]
mode = Path("modes", name)
asked = mode.read_text() if mode.exists() else ""
begun = Path("begun", name)
begun.parent.mkdir(exist_ok=True)
again = begun.exists()
begun.touch()
if asked == "fail":
    sys.exit(f"error in {name}: it was asked to")
if asked == "die once" and not again:
    os.kill(os.getpid(), signal.SIGKILL)
if asked == "wait":
    time.sleep(120)
Path(name).write_text(Path("seed").read_text())
"""
STAGES = {"first": [], "left": ["first"], "right": ["first"], "last": ["left", "right"]}


class Project:
    """A folder with the project in it, and the commands that its user types."""

    def __init__(self, folder: Path, api: str = "") -> None:
        self.folder = folder
        copy_sources(folder)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        self.environment = {
            **kept,
            "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}",
            "DVC_NO_ANALYTICS": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "HOME": str(folder / "home"),
            **({"PREFECT_API_URL": api} if api else {}),
        }
        (folder / "home").mkdir()
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, code: int = 0, **environment: str) -> tuple[str, str]:
        with self.start(*command, **environment) as process:
            try:
                out, err = process.communicate(timeout=400)
            except BaseException:
                process.kill()
                raise
        assert process.returncode == code, f"{command}\n{out}\n{err}"
        return out, err

    def flow(self, *arguments: str, code: int = 0, **environment: str) -> tuple[str, str]:
        return self.run(sys.executable, "-m", "pipelines.distillation", *arguments, code=code, **environment)

    def lock(self) -> Any:
        return yaml.safe_load(self.folder.joinpath("dvc.lock").read_text())

    def processes(self) -> list[str]:
        """Command lines of all processes whose working directory this is."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if process.joinpath("cwd").readlink().is_relative_to(self.folder):
                    found.append(process.joinpath("cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return [command for command in found if command]


def until(condition: Callable[[], object], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real server with an empty database."""
    home = tmp_path_factory.mktemp("prefect")
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_API_URL": url}
    # How far ahead runs are made is settled when the server starts; how often it looks for new schedules too.
    server = subprocess.Popen(
        [str(BINARIES / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        env={**kept, **quiet, "PREFECT_HOME": str(home), "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2"},
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:

        def healthy() -> bool:
            assert server.poll() is None
            try:
                return bool(urllib.request.urlopen(f"{url}/health", timeout=5))
            except OSError:
                return False

        assert until(healthy, 120)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def ask(api: str, what: str, **body: Any) -> Any:
    """Newest first, what a filter of the server's API finds."""
    content = json.dumps(body).encode()
    request = urllib.request.Request(f"{api}/{what}/filter", content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


@pytest.fixture
def small(tmp_path: Path, api: str) -> Iterator[Project]:
    """Four stages that take no time, in the form of a diamond; `modes/NAME` says how one of them behaves."""
    project = Project(tmp_path / "a project", api)
    # Uninteresting here, and MLflow's database takes long to prepare.
    project.folder.joinpath("pipelines/records.py").write_text("def run_url(stage, key):\n    return None\n")
    project.folder.joinpath("work.py").write_text(WORK)
    project.folder.joinpath("modes").mkdir()
    project.folder.joinpath("seed").write_text("1")
    stages = {
        name: {"cmd": f"exec python work.py {name}", "deps": [*upstream, "seed"], "outs": [name]}
        for name, upstream in STAGES.items()
    }
    project.folder.joinpath("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    yield project
    # Flows that a failed test has left; those of a passed one have ended.
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.joinpath("cwd").readlink().is_relative_to(project.folder):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue


def statuses(output: str) -> dict[str, str]:
    """The second column of the table that a flow prints."""
    lines = (line.split() for line in output.splitlines())
    return {line[0]: line[1].rstrip(":") for line in lines if line and line[0] in STAGES}


def last_run(api: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The newest flow run, and its task runs by name."""
    newest = ask(api, "flow_runs", sort="EXPECTED_START_TIME_DESC", limit=1)[0]
    wanted = {"id": {"any_": [newest["id"]]}}
    # Prefect writes the states of tasks down a moment after they happened.
    until(lambda: all(run["state"] for run in ask(api, "task_runs", flow_runs=wanted)), 10)
    return newest, {run["name"]: run for run in ask(api, "task_runs", flow_runs=wanted)}


def test_one_failure_among_several(small: Project, api: str) -> None:
    small.folder.joinpath("modes/left").write_text("fail")
    out, err = small.flow(code=1)
    assert statuses(out) == {"first": "ran", "left": "failed", "right": "ran", "last": "skipped"}
    assert "failed: error in left: it was asked to" in out
    assert "skipped: left failed" in out
    assert "Traceback" not in err
    assert not small.folder.joinpath("last").exists()
    run, tasks = last_run(api)
    assert run["state"]["type"] == "FAILED"
    assert {name: task["state_name"] for name, task in tasks.items()} == {
        "first": "Completed",
        "left": "Failed",
        "right": "Completed",
        "last": "Skipped",
    }
    assert tasks["left"]["run_count"] == 1  # a stage's own error is not tried again
    artifact = ask(api, "artifacts", flow_runs={"id": {"any_": [run["id"]]}})[0]
    assert artifact["key"] == "distillation"
    assert "| left | failed: error in left: it was asked to |" in artifact["data"]
    # Mended, the same command goes on.
    small.folder.joinpath("modes/left").unlink()
    out, _ = small.flow()
    assert statuses(out) == {"first": "cached", "left": "ran", "right": "cached", "last": "ran"}
    out, _ = small.flow()
    assert set(statuses(out).values()) == {"cached"}
    assert last_run(api)[0]["state"]["type"] == "COMPLETED"


def test_a_killed_stage_is_tried_again(small: Project, api: str) -> None:
    small.folder.joinpath("modes/right").write_text("die once")
    out, err = small.flow()
    assert set(statuses(out).values()) == {"ran"}
    assert "right | failed: ended by signal 9 (SIGKILL)" in err
    tasks = last_run(api)[1]
    assert {name: task["run_count"] for name, task in tasks.items()} == {"first": 1, "left": 1, "right": 2, "last": 1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_flow(small: Project, number: signal.Signals) -> None:
    small.folder.joinpath("modes/left").write_text("wait")
    small.folder.joinpath("modes/right").write_text("wait")
    environment = {} if number == signal.SIGTERM else {"PREFECT_API_URL": ""}  # with a server of its own, too
    with small.start(sys.executable, "-m", "pipelines.distillation", **environment) as flow:
        both = [small.folder / "begun" / name for name in ("left", "right")]
        assert until(lambda: all(path.exists() for path in both))
        assert len(small.processes()) >= 5
        flow.send_signal(number)
        flow.communicate(timeout=60)
    assert flow.returncode != 0
    assert until(lambda: not small.processes(), 10), small.processes()
    small.folder.joinpath("modes/left").unlink()
    small.folder.joinpath("modes/right").unlink()
    out, _ = small.flow()
    assert statuses(out) == {"first": "cached", "left": "ran", "right": "ran", "last": "ran"}


def test_a_second_flow_says_who_works_here(small: Project) -> None:
    small.folder.joinpath("modes/left").write_text("wait")
    with small.start(sys.executable, "-m", "pipelines.distillation") as flow:
        assert until(small.folder.joinpath("begun/left").exists)
        _, err = small.flow(code=1)
        assert re.fullmatch(rf"error in distillation: another flow \(process {flow.pid}\) .*\n", err)
        flow.send_signal(signal.SIGTERM)
        flow.communicate(timeout=60)


def test_a_deployment_runs_on_demand_and_on_schedule(small: Project, api: str) -> None:
    prefect = str(BINARIES / "prefect")
    small.run(prefect, "work-pool", "create", "distillery", "--type", "process")
    small.run(prefect, "--no-prompt", "deploy", "--all")
    deployment = ask(api, "deployments")[0]
    name = f"distillation/{deployment['name']}"
    scheduled = {"deployment_id": {"any_": [deployment["id"]]}, "state": {"type": {"any_": ["SCHEDULED"]}}}
    assert until(lambda: ask(api, "flow_runs", flow_runs=scheduled), 30), "the schedule has made no run"
    planned = ask(api, "flow_runs", flow_runs=scheduled)
    assert all("T02:00:00" in run["expected_start_time"] for run in planned)
    assert all(run["auto_scheduled"] for run in planned)
    worker = small.start(prefect, "worker", "start", "--pool", "distillery", "--type", "process")
    try:
        small.run(prefect, "deployment", "run", name, "--param", 'targets=["left"]')
        wanted = {"deployment_id": {"any_": [deployment["id"]]}, "state": {"type": {"any_": ["COMPLETED", "FAILED"]}}}
        assert until(lambda: ask(api, "flow_runs", flow_runs=wanted), 60)
        run = ask(api, "flow_runs", flow_runs=wanted)[0]
        assert run["state"]["type"] == "COMPLETED", run["state"]
    finally:
        os.killpg(worker.pid, signal.SIGTERM)
        try:
            worker.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.communicate()
    assert {path.name for path in small.folder.joinpath("begun").iterdir()} == {"first", "left"}
    assert small.folder.joinpath("left").read_text() == "1"
    assert until(lambda: not small.processes(), 20), small.processes()


def test_the_flow_and_plain_dvc_leave_the_same(tmp_path: Path) -> None:
    """Without any server, real trainings, one of them killed on the way."""
    targets = ("export@recognition-kd", "export@recognition-alone")
    plain, flow = Project(tmp_path / "plain"), Project(tmp_path / "flow")
    plain.run("dvc", "repro", *targets)
    arguments = [sys.executable, "-m", "pipelines.distillation", *targets]
    with flow.start(*arguments, DISTILLERY_CHECKPOINT_SECONDS="0") as process:
        place = ".checkpoints/distill/recognition-kd/*/checkpoint.pt"
        assert until(lambda: list(flow.folder.glob(place)) or process.poll() is not None, 300)
        listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
        killed = [line.split()[0] for line in listed.splitlines() if "python -m stages.distill recognition-kd" in line]
        own = [pid for pid in killed if Path(f"/proc/{pid}/cwd").readlink() == flow.folder]
        for pid in own:
            os.kill(int(pid), signal.SIGKILL)
        out, err = process.communicate(timeout=300)
    assert own
    assert process.returncode == 0, err
    assert "ended by signal 9" in err
    assert "going on at step" in err
    assert flow.lock() == plain.lock()
    weights = "models/trained/recognition/recognition-kd/weights.safetensors"
    assert sha256(flow.folder / weights) == sha256(plain.folder / weights)
    assert until(lambda: not flow.processes(), 10), flow.processes()
    # Where a lock was, its order stays.
    shutil.copy(plain.folder / "dvc.lock", flow.folder)
    for project in (plain, flow):
        path = project.folder / "params.yaml"
        path.write_text(path.read_text().replace("temperature: 4.0", "temperature: 3.0"))
    plain.run("dvc", "repro", *targets)
    flow.flow(*targets)
    assert flow.folder.joinpath("dvc.lock").read_bytes() == plain.folder.joinpath("dvc.lock").read_bytes()
    assert "temperature: 3.0" in flow.folder.joinpath("dvc.lock").read_text()
    out, _ = flow.flow(*targets)
    assert "everything is up to date" in out
