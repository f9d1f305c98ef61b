"""Stages as processes: order, room, reasons of failure, and that nothing outlives whoever started it."""

import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from pipelines import child
from pipelines.execution import (
    Processes,
    Result,
    Room,
    StageError,
    environment,
    execute,
    failure,
    killed_by,
    only_flow,
    visible_gpus,
)
from pipelines.graph import Graph, Stage

ROOT = Path(__file__).parents[2]


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[Graph, set[str], Room]:
    """A graph, the stages that fail when they run, and a machine."""
    stages = []
    for index in range(draw(st.integers(1, 8))):
        upstream = draw(st.sets(st.integers(0, index - 1), max_size=3)) if index else set()
        stages.append(
            Stage(
                f"s@{index}",
                upstream=tuple(f"s@{other}" for other in upstream),
                threads=draw(st.integers(1, 5)),
                gpus=draw(st.integers(0, 3)),
                changed="changed" * draw(st.booleans()),
            )
        )
    failing = {stage.name for stage in stages if draw(st.booleans())}
    room = Room(cores=draw(st.integers(1, 4)), gpus=draw(st.sampled_from([["0"], ["3", "5"]])))
    return Graph(stages), failing, room


@settings(deadline=None)
@given(pipelines(), st.integers(0, 2**32))
def test_any_graph_is_executed(pipeline: tuple[Graph, set[str], Room], seed: int) -> None:
    graph, failing, room = pipeline
    steps = graph.plan()
    runs = {step.stage.name: step.runs for step in steps}
    ended: dict[str, bool] = {name: True for name in runs if not runs[name]}
    running: dict[str, tuple[Stage, tuple[str, ...]]] = {}
    started: queue.SimpleQueue[tuple[str, Callable[[Result], None]] | None] = queue.SimpleQueue()
    lock = threading.Lock()
    wrong: list[str] = []

    def start(stage: Stage, gpus: tuple[str, ...], done: Callable[[Result], None]) -> None:
        with lock:
            running[stage.name] = (stage, gpus)
            devices = [device for _, names in running.values() for device in names]
            if stage.name in ended or not all(ended.get(name) for name in stage.upstream):
                wrong.append(f"{stage.name} was not to start now")
            if sum(other.threads for other, _ in running.values()) > room.cores and len(running) > 1:
                wrong.append("more threads than cores, and not alone")
            if len(devices) > len(set(devices)) or len(gpus) != min(stage.gpus, len(room.gpus)):
                wrong.append(f"devices {devices}")
        started.put((stage.name, done))

    def finish() -> None:
        """End what runs in any order, from another thread."""
        chance = random.Random(seed)
        under_way = []
        while (item := started.get()) is not None:
            under_way.append(item)
            with lock:
                alone = len(running) == len(under_way)
            if alone:
                name, done = under_way.pop(chance.randrange(len(under_way)))
                with lock:
                    ended[name] = name not in failing
                    del running[name]
                done(Result("ran" if ended[name] else "failed"))
                if under_way:
                    started.put(under_way.pop())

    thread = threading.Thread(target=finish)
    thread.start()
    results = execute(steps, room, start)
    started.put(None)
    thread.join()
    assert not wrong
    check(graph, failing, results)


def check(graph: Graph, failing: set[str], results: dict[str, Result]) -> None:
    """Every stage ended as the graph and the failures demand."""
    runs = {step.stage.name: step.runs for step in graph.plan()}

    def good(name: str) -> bool:
        return all(map(good, graph.stages[name].upstream)) and not (runs[name] and name in failing)

    assert list(results) == list(graph.stages)
    for name, result in results.items():
        if not runs[name]:
            assert result.status == "cached"
        elif not all(map(good, graph.stages[name].upstream)):
            assert result.status == "skipped"
            blamed = result.reason.removesuffix(" failed")
            assert results[blamed].status == "failed"
        else:
            assert result.status == ("failed" if name in failing else "ran")


def test_independent_stages_run_side_by_side_and_the_longest_chain_comes_first() -> None:
    stages = [Stage("short", changed="c"), Stage("long", changed="c"), Stage("after", upstream=("long",)), Stage("x")]
    order: list[str] = []
    both = threading.Barrier(2, timeout=20)

    def start(stage: Stage, gpus: tuple[str, ...], done: Callable[[Result], None]) -> None:
        def work() -> None:
            if stage.name in ("short", "long"):
                both.wait()
            done(Result("ran"))

        order.append(stage.name)
        threading.Thread(target=work).start()

    results = execute(Graph(stages).plan(), Room(cores=2, gpus=["0"]), start)
    assert order == ["long", "short", "after"]
    assert {name: result.status for name, result in results.items()}["x"] == "cached"


def test_one_slot_per_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    room = Room(cores=8, gpus=visible_gpus())
    first, second, plain = Stage("a", gpus=1), Stage("b", gpus=1), Stage("c")
    assert room.take(first) == ("0",)
    assert room.take(second) is None
    assert room.take(plain) == ()
    room.give(first)
    assert room.take(second) == ("0",)
    # Without a list of devices nobody says which of them a stage sees.
    assert "CUDA_VISIBLE_DEVICES" not in environment(first, ("0",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-7")
    room = Room(cores=8, gpus=visible_gpus())
    assert (room.take(first), room.take(second)) == (("2",), ("GPU-7",))
    assert environment(second, ("GPU-7",))["CUDA_VISIBLE_DEVICES"] == "GPU-7"
    assert environment(plain, ())["CUDA_VISIBLE_DEVICES"] == "2,GPU-7"


@pytest.mark.parametrize(
    ("code", "line", "number"),
    [
        (-9, "", 9),
        (255, "ERROR: failed to reproduce 'a': failed to run: python a.py, exited with -9", 9),
        (255, "ERROR: failed to reproduce 'a': failed to run: a && b, exited with 143", 15),
        (255, "ERROR: failed to reproduce 'a': failed to run: python a.py, exited with 1", None),
        (255, "ERROR: failed to reproduce 'a': failed to run: python a.py, exited with 130", None),
        (255, "ERROR: failed to reproduce 'a': output 'b' does not exist", None),
        (1, "", None),
    ],
)
def test_what_was_killed(code: int, line: str, number: int | None) -> None:
    assert killed_by(code, ["some output", line]) == number


def test_the_reason_of_a_failure_is_what_the_stage_said() -> None:
    dvc = "ERROR: failed to reproduce 'a': failed to run: python a.py, exited with 1"
    said = ["Running stage 'a':", "> python a.py", "step 1", "error in distill a: 2 mistakes:", "  x", "  y", dvc]
    assert failure(said) == "error in distill a: 2 mistakes: x y"
    assert failure(["Running stage 'a':", "Traceback", "  line", "KeyError: 'b'", dvc]) == "KeyError: 'b'"
    assert failure(["Running stage 'a':", "> python a.py", dvc]) == dvc.removeprefix("ERROR: ")
    assert failure([]) == ""


def test_only_one_flow_works_on_a_checkout(tmp_path: Path) -> None:
    path = tmp_path / ".prefect" / "flow.lock"
    with only_flow(path):
        with pytest.raises(UserError, match=f"process {os.getpid()}"), only_flow(path):
            pass
        assert path.read_text() == f"{os.getpid()}\n"
    with only_flow(path):
        pass


@pytest.fixture(params=["sh", "bash"])
def project(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty DVC project; the working directory. DVC uses the user's shell, and they treat a last command unlike."""
    shell = shutil.which(request.param)
    if shell is None:
        pytest.skip(f"no {request.param} on this machine")
    monkeypatch.setenv("SHELL", shell)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def write(project: Path, **commands: str) -> None:
    """Stages that run a line of Python each, and make a file of their name."""
    stages = {name: {"cmd": f'exec python -c "{code}"', "outs": [name]} for name, code in commands.items()}
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))


def inside(folder: Path) -> Iterator[str]:
    """Command lines of the processes whose working directory this is, this one aside."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.joinpath("cwd").readlink() == folder and int(process.name) != os.getpid():
                yield process.joinpath("cmdline").read_text().replace("\0", " ")
        except OSError:
            continue


def gone(folder: Path, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while list(inside(folder)):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def appears(path: Path, seconds: float = 30.0) -> bool:
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_a_stage_runs_and_says_how_it_ended(project: Path) -> None:
    write(project, good="print(7); open('good', 'w')", bad="import sys; sys.exit('error in bad: no luck')")
    said: list[str] = []
    processes = Processes()
    assert processes.run(Stage("good"), say=said.append).status == "ran"
    assert said[0] == "7"
    assert processes.run(Stage("good"), say=said.append).status == "cached"
    with pytest.raises(StageError, match=r"^error in bad: no luck$") as caught:
        processes.run(Stage("bad"))
    assert not caught.value.killed


def test_a_killed_stage_is_told_from_a_failed_one(project: Path) -> None:
    write(project, a="import os; os.kill(os.getpid(), 9)")
    with pytest.raises(StageError, match="SIGKILL") as caught:
        Processes().run(Stage("a"))
    assert caught.value.killed


def test_a_stopped_stage_has_time_to_save_itself(project: Path) -> None:
    """SIGTERM goes to the whole group; DVC must not end, and take its stage along, before the stage has saved."""
    write(
        project,
        a="import signal, sys, time; "
        "signal.signal(15, lambda *_: (time.sleep(0.7), open('saved', 'w'), sys.exit(143))); "
        "open('begun', 'w'); time.sleep(60)",
    )
    processes = Processes()
    caught: list[StageError] = []

    def work() -> None:
        try:
            processes.run(Stage("a"))
        except StageError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert appears(project / "begun")
    begun = time.monotonic()
    processes.stop()
    thread.join(20)
    assert time.monotonic() - begun < 9
    assert (project / "saved").exists()
    assert str(caught[0]) == "the flow was stopped"
    assert not caught[0].killed
    assert gone(project)
    with pytest.raises(StageError, match="the flow was stopped"):
        processes.run(Stage("a"))


def test_nothing_outlives_a_killed_parent(project: Path) -> None:
    write(project, a="import os, sys; sys.path.insert(0, os.environ['PYTHONPATH']); import stages.command as c; "
          "c.end_with_parent(); import time; open('begun', 'w'); time.sleep(60)")  # fmt: skip
    code = "from pipelines.execution import Processes; from pipelines.graph import Stage; Processes().run(Stage('a'))"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=project)
    assert appears(project / "begun")
    assert len(list(inside(project))) >= 3
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(project)


def test_a_child_of_nobody_does_not_start(project: Path) -> None:
    command = child.command("http.server", "--help")
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    command[3] = "1"
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
