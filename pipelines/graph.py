"""dvc.yaml as DVC itself resolves it: a graph of stages, and a plan that says which of them would run, and why.

Nothing here knows a stage by name. What a stage needs of the machine comes from the entries of params.yaml that it
depends on (`threads`, `training.threads`, `training.devices`) and from its `meta: {resource: gpu}` in dvc.yaml.
"""

import graphlib
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from data.errors import UserError, suggest
from stages.parameters import Parameters, load

PATIENCE = 15.0  # seconds for another dvc to let go
NAMED = 3  # changed things that a reason names before it counts the rest


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: as DVC addresses it, `distill@recognition-kd`.
        upstream: names of the stages whose outputs it reads.
        cmd: what DVC runs.
        task: the task it belongs to; None for what several tasks may share.
        threads: cores it keeps busy. gpus: devices it needs, 0 unless its resource is `gpu`.
        changed: why DVC calls it stale by itself; empty where it does not.
    """

    name: str
    upstream: tuple[str, ...] = ()
    cmd: str = ""
    task: str | None = None
    threads: int = 1
    gpus: int = 0
    changed: str = ""

    @property
    def kind(self) -> str:
        """The stage of dvc.yaml."""
        return self.name.partition("@")[0]

    @property
    def key(self) -> str:
        """The entry of params.yaml that it was made for."""
        return self.name.partition("@")[2]

    @property
    def resource(self) -> str:
        """What it computes on."""
        return "gpu" if self.gpus else "cpu"


@dataclass(frozen=True)
class Step:
    """A stage within a plan: whether it runs, and the reason for either."""

    stage: Stage
    runs: bool
    why: str


class Graph:
    """Stages in an order in which they can run."""

    def __init__(self, stages: Iterable[Stage]) -> None:
        named = {stage.name: stage for stage in stages}
        order = graphlib.TopologicalSorter({name: stage.upstream for name, stage in named.items()})
        self.stages: dict[str, Stage] = {name: named[name] for name in order.static_order() if name in named}

    def select(self, targets: Collection[str] = (), task: str | None = None) -> "Graph":
        """The targets (a name, or a stage of dvc.yaml with all its keys) and what they need; everything without any.

        Args:
            task: only stages of this task, and what they need.

        Raises:
            UserError: there is no such target or task; the nearest name is suggested.
        """
        chosen: set[str] = set()
        for target in targets:
            found = {name for name, stage in self.stages.items() if target in (name, stage.kind)}
            if not found:
                known = {*self.stages, *(stage.kind for stage in self.stages.values())}
                raise UserError(f"unknown target {target!r}; {suggest(target, known)}")
            chosen |= found
        if not targets:
            chosen = set(self.stages)
        if task is not None:
            tasks = {stage.task for stage in self.stages.values() if stage.task}
            if task not in tasks:
                raise UserError(f"unknown task {task!r}; {suggest(task, tasks)}")
            chosen = {name for name in chosen if self.stages[name].task == task}
            if not chosen:
                raise UserError(f"none of the targets {', '.join(targets)} belongs to task {task!r}")
        # Upstream comes first in the order, so one pass from the end finds everything that is needed.
        for name in reversed(self.stages):
            if name in chosen:
                chosen.update(self.stages[name].upstream)
        return Graph(stage for name, stage in self.stages.items() if name in chosen)

    def plan(self) -> list[Step]:
        """A step per stage, in order: those that are stale and all that follows from them run."""
        steps: dict[str, Step] = {}
        for name, stage in self.stages.items():
            running = [other for other in stage.upstream if other in steps and steps[other].runs]
            if stage.changed:
                steps[name] = Step(stage, True, stage.changed)
            elif running:
                steps[name] = Step(stage, True, f"upstream runs: {_listed(running)}")
            else:
                steps[name] = Step(stage, False, "up to date")
        return list(steps.values())

    def heights(self) -> dict[str, int]:
        """For every stage the length of the longest chain that waits for it."""
        heights = dict.fromkeys(self.stages, 0)
        for name in reversed(self.stages):
            for other in self.stages[name].upstream:
                if other in heights:
                    heights[other] = max(heights[other], heights[name] + 1)
        return heights


def read() -> Graph:
    """Ask DVC, once, for every stage of the working directory and its status.

    Raises:
        UserError: params.yaml or dvc.yaml has a mistake, or another process keeps DVC busy.
    """
    parameters = load()
    with _repository() as repo:
        graph = repo.index.graph
        stages = [stage for stage in repo.index.stages if hasattr(stage, "cmd") and stage.cmd]
        status = _status(repo)
        found = []
        for stage in stages:
            entries = [entry for path in _parameter_paths(stage) if (entry := _entry(parameters, path))]
            threads, devices = _needs(entry for _, entry in entries)
            gpu = (stage.meta or {}).get("resource") == "gpu"
            found.append(
                Stage(
                    name=stage.addressing,
                    upstream=tuple(sorted(other.addressing for other in graph.successors(stage) if other in stages)),
                    cmd=stage.cmd if isinstance(stage.cmd, str) else " && ".join(stage.cmd),
                    task=next((task for task, _ in entries if task), None),
                    threads=threads,
                    gpus=devices if gpu else 0,
                    changed=_reason(status.get(stage.addressing, []), _never_ran(stage)),
                )
            )
    return Graph(found)


@contextmanager
def _repository() -> Iterator[Any]:
    """DVC's own view of the project, its complaints as a UserError."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            yield repo
    except DvcException as error:
        raise UserError(f"DVC cannot read the pipeline: {error}") from error


def _status(repo: Any) -> dict[str, list[Any]]:
    """What `dvc status` says, once nobody else holds what it looks at.

    A killed dvc holds its stage until its parent has taken note, which for an orphan is a moment later.
    """
    from dvc.lock import LockError

    until = time.monotonic() + PATIENCE
    while True:
        try:
            status: dict[str, list[Any]] = repo.status()
        except LockError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
        else:
            return status


def _parameter_paths(stage: Any) -> list[str]:
    """Names such as `students.recognition-kd` that a stage depends on in params.yaml."""
    return [
        path
        for dependency in stage.deps
        if getattr(dependency, "def_path", None) == "params.yaml"
        for path in (getattr(dependency, "params", None) or [])
    ]


def _entry(parameters: Parameters, path: str) -> tuple[str | None, Any] | None:
    """The task and the typed entry that a path of params.yaml leads to; None where it leads elsewhere."""
    section, _, rest = path.partition(".")
    entries: Mapping[str, Any] = getattr(parameters, section, {})
    name = rest.partition(".")[0]
    if name not in entries:
        return None
    return (name if section == "tasks" else getattr(entries[name], "task", None)), entries[name]


def _needs(entries: Iterable[Any]) -> tuple[int, int]:
    """Threads and devices of a stage; several devices are as many processes of as many threads."""
    threads, devices = 1, 1
    for entry in entries:
        training = getattr(entry, "training", None)
        own = getattr(training, "devices", 1)
        threads = max(threads, getattr(training, "threads", 1) * own, getattr(entry, "threads", 1))
        devices = max(devices, own)
    return threads, devices


def _never_ran(stage: Any) -> bool:
    """Whether dvc.lock knows nothing of a stage."""
    return bool(stage.outs) and not any(out.hash_info for out in stage.outs)


def _reason(status: Iterable[Any], never_ran: bool) -> str:
    """`dvc status` of one stage in a few words; empty where it is up to date."""
    entries = list(status)
    if not entries:
        return ""
    if never_ran:
        return "never run"
    files: list[str] = []
    parameters: list[str] = []
    made: dict[str, list[str]] = {}
    other = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            # "changed checksum" is the file-wise name of a changed command.
            other.append("command changed" if entry in ("changed command", "changed checksum") else str(entry))
            continue
        for path, change in entry.get("changed deps", {}).items():
            if isinstance(change, Mapping):
                parameters += change
            elif path == "params.yaml":
                parameters.append(path)
            else:
                files.append(path)
        for path, change in entry.get("changed outs", {}).items():
            made.setdefault("output changed" if change == "modified" else "output missing", []).append(path)
    reasons = [("params changed", parameters), ("deps changed", files), *made.items()]
    return "; ".join([*other, *(f"{what}: {_listed(names)}" for what, names in reasons if names)])


def _listed(names: Collection[str]) -> str:
    shown = sorted(names)
    more = len(shown) - NAMED
    return ", ".join(shown[:NAMED]) + (f" and {more} more" if more > 0 else "")
