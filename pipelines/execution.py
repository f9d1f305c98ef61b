"""Stages as processes: room on the machine, the order of starting, one `dvc repro --single-item` per stage.

Nothing here knows Prefect: whoever starts a stage is handed in.
"""

import fcntl
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import UserError
from pipelines import child
from pipelines.graph import Graph, Stage, Step

LOCK = Path(".prefect/flow.lock")
GRACE = 10.0  # seconds that a stage has to write its checkpoint once it was asked to end
REMEMBERED = 60  # lines of a stage's output that are searched for the reason of its failure
# What DVC says around every stage, and what says nothing about it.
CHATTER = (
    *("Generating lock file", "Updating lock file", "To track the changes with git", "git add ", "> "),
    *("To enable auto staging", "dvc config core.autostage", "Use `dvc push`", "Running stage '"),
)


@dataclass(frozen=True)
class Result:
    """How a stage ended.

    Attributes:
        status: ran, cached (nothing to do, or taken from DVC's cache), failed, skipped. reason: of the last two.
    """

    status: str
    seconds: float = 0.0
    reason: str = ""

    @property
    def well(self) -> bool:
        """Whether its outputs are what they should be."""
        return self.status in ("ran", "cached")


class StageError(Exception):
    """A stage did not end well. `killed`: by a signal, so that trying again may help."""

    def __init__(self, message: str, killed: bool = False) -> None:
        super().__init__(message)
        self.killed = killed


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """One GPU, unless CUDA_VISIBLE_DEVICES names several."""
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or ["0"]


@dataclass
class Room:
    """What the machine has, and which stages use it now.

    Attributes:
        gpus: identifiers of devices as CUDA_VISIBLE_DEVICES takes them.
    """

    cores: int = field(default_factory=count_cores)
    gpus: Sequence[str] = field(default_factory=visible_gpus)
    _taken: dict[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)

    def take(self, stage: Stage) -> tuple[str, ...] | None:
        """Devices for a stage that may start now; None if it has to wait. One wider than the machine runs alone."""
        busy = {name for _, names in self._taken.values() for name in names}
        free = [name for name in self.gpus if name not in busy]
        wanted = min(stage.gpus, len(self.gpus))
        used = sum(threads for threads, _ in self._taken.values())
        if wanted > len(free) or used + min(stage.threads, self.cores) > self.cores:
            return None
        self._taken[stage.name] = (min(stage.threads, self.cores), tuple(free[:wanted]))
        return self._taken[stage.name][1]

    def give(self, stage: Stage) -> None:
        """A stage has ended."""
        del self._taken[stage.name]


Start = Callable[[Stage, tuple[str, ...], Callable[[Result], None]], None]


def execute(steps: Sequence[Step], room: Room, start: Start) -> dict[str, Result]:
    """Start every stage that runs once all its upstream ended well and there is room for it; wait for all.

    Args:
        start: called with the stage, its devices, and a function that takes the result, from any thread, once.

    Returns:
        a result per stage, in the order of the plan. What waits for a failed stage is skipped, everything else runs.
    """
    results = {step.stage.name: Result("cached") for step in steps if not step.runs}
    heights = Graph(step.stage for step in steps).heights()
    # The longest chain first: it decides when the whole is done.
    waiting = sorted((step.stage for step in steps if step.runs), key=lambda stage: -heights[stage.name])
    ended: queue.SimpleQueue[tuple[Stage, Result]] = queue.SimpleQueue()
    running = 0
    while waiting or running:
        for stage in list(waiting):
            upstream = [name for name in stage.upstream if name in heights]
            bad = [name for name in upstream if name in results and not results[name].well]
            if bad:
                waiting.remove(stage)
                results[stage.name] = Result("skipped", reason=_because(bad[0], results[bad[0]]))
            elif all(name in results for name in upstream) and (gpus := room.take(stage)) is not None:
                waiting.remove(stage)
                running += 1
                start(stage, gpus, lambda result, stage=stage: ended.put((stage, result)))  # type: ignore[misc]
        if running:
            stage, result = ended.get()
            running -= 1
            room.give(stage)
            results[stage.name] = result
    return {step.stage.name: results[step.stage.name] for step in steps}


def _because(name: str, result: Result) -> str:
    return f"{name} failed" if result.status == "failed" else result.reason


class Processes:
    """The stages that run now. `stop` ends them all, and every later `run` at once."""

    def __init__(self) -> None:
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._lock = threading.Lock()
        self.stopped = False

    def run(self, stage: Stage, gpus: Sequence[str] = (), say: Callable[[str], object] = print) -> Result:
        """Run `dvc repro --single-item` for one stage and wait for it, in the calling thread.

        Raises:
            StageError: it failed; the message is the stage's own error where it gave one.
        """
        begun = time.monotonic()
        lines: deque[str] = deque(maxlen=REMEMBERED)
        marks: list[str] = []

        def read(stream: Iterator[str]) -> None:
            for raw in stream:
                line = raw.rstrip()
                if line.startswith("Running stage '"):
                    marks.append(line)
                if line.strip():
                    lines.append(line)
                    if not line.strip().startswith(CHATTER):
                        say(line)

        with self._lock:
            if self.stopped:
                raise StageError("the flow was stopped")
            # The kernel ends this process when the thread that starts it ends: it has to be waited for in here.
            process = subprocess.Popen(
                child.command("dvc", "--wait-for-lock", "repro", "--single-item", stage.name),
                env=environment(stage, gpus),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self._running[stage.name] = process
        reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            code = process.wait()
        finally:
            # Also what a stage left behind, which would keep the pipe open.
            _signal(process, signal.SIGKILL)
            with self._lock:
                del self._running[stage.name]
        reader.join()
        process.stdout.close()  # type: ignore[union-attr]
        if code == 0:
            return Result("ran" if marks else "cached", time.monotonic() - begun)
        if self.stopped:
            raise StageError("the flow was stopped")
        number = killed_by(code, lines)
        if number is not None:
            raise StageError(f"ended by signal {number} ({signal.Signals(number).name})", killed=True)
        raise StageError(failure(lines) or f"dvc ended with exit code {code}")

    def stop(self) -> None:
        """Ask every running process group to end, and end those that take longer than GRACE."""
        with self._lock:
            self.stopped = True
            running = list(self._running.values())
        for process in running:
            _signal(process, signal.SIGTERM)
        until = time.monotonic() + GRACE
        while any(process.returncode is None for process in running) and time.monotonic() < until:
            time.sleep(0.05)
        for process in running:
            if process.returncode is None:
                _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def environment(stage: Stage, gpus: Sequence[str]) -> dict[str, str]:
    """Of a stage's process. dvc.yaml says `python -m stages...`: the interpreter of the flow comes first."""
    binaries = str(Path(sys.executable).parent)
    variables = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    if stage.gpus and os.environ.get("CUDA_VISIBLE_DEVICES"):
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return {"DVC_NO_ANALYTICS": "true", **variables}


def killed_by(code: int, lines: Sequence[str]) -> int | None:
    """The signal that ended dvc or its stage; None where the stage ended by itself."""
    told = [int(number) for line in lines for number in re.findall(r"failed to run: .*, exited with (-?\d+)", line)]
    if code >= 0 and told:
        code = told[-1]
    number = -code if code < 0 else code - 128  # a shell adds 128
    known = {int(member) for member in signal.Signals}
    # Whoever pressed Ctrl-C did not want to see it again.
    return number if number in known and number != signal.SIGINT else None


def failure(lines: Sequence[str]) -> str:
    """What a stage said about its failure: its own error, else the last line before those of DVC."""
    said = [line for line in lines if not line.strip().startswith(("ERROR: ", *CHATTER))]
    for place, line in enumerate(said):
        if line.startswith("error in "):
            return " ".join(part.strip() for part in said[place:])
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return said[-1] if said else "".join(errors[-1:])


@contextmanager
def only_flow(path: Path = LOCK) -> Iterator[None]:
    """Hold the checkout: two flows would start the same stages.

    Raises:
        UserError: another flow holds it; its process id is named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(
                f"another flow (process {holder}) works on this checkout · wait for it, or end it"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def counts(results: Mapping[str, Result]) -> dict[str, int]:
    """How many stages ended in which way."""
    statuses = [result.status for result in results.values()]
    return {status: statuses.count(status) for status in ("ran", "cached", "failed", "skipped") if status in statuses}
