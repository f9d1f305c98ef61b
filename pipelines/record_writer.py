"""From records to runs: one experiment per task, a run per pipeline run, and below it a run per record.

Every step may be repeated. Lines are written in groups, then the number of lines done; the time of a line follows from
the start of its run and its number. MLflow keeps equal values once, so that a group that is written again after a crash
doubles nothing. A pipeline run is RUNNING from before the first change below it until after the last one: whatever was
interrupted is found again by that.
"""

import fcntl
import hashlib
import json
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import UserError
from data.files import digest
from pipelines import tracking
from pipelines.record_files import Source, Tree, evaluated_models, read_parameters
from stages import paths

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

METRICS_PER_CALL, PARAMS_PER_CALL = 1000, 100
# A record that is refused is told of, and the others go on; any other error means that MLflow cannot be used.
REFUSED = (400, 404, 409)
ACTIVE_ONLY, ALL = 1, 3  # of mlflow.entities.ViewType
FOLLOW_LOCK = Path(f"{tracking.DATABASE}.follow-lock")


class Writer:
    """Brings what MLflow holds up to what the records say. Every step of it may be repeated."""

    def __init__(self, client: "MlflowClient", pipeline_run: str, tree: Tree) -> None:
        self.client, self.pipeline_run, self.tree = client, pipeline_run, tree
        self.created = self.lines = 0
        self._experiments: dict[str, str] = {}
        self._parents: dict[str, str] = {}
        self._runs: dict[str, str] = {}
        self._checkout = hashlib.sha256(f"{socket.gethostname()}:{Path.cwd()}".encode()).hexdigest()[:16]

    def write(self, sources: Iterable[Source], every: list[Source]) -> list[str]:
        """Log the records, then put the status of their pipeline runs right.

        Args:
            every: all records there are; what runs in MLflow and is not among them has been given up.

        Returns:
            what could not be logged, and why.
        """
        chosen, problems = list(sources), []
        for task in sorted({source.task for source in every} | set(read_parameters().get("tasks") or {})):
            of_task = [source for source in every if source.task == task]
            try:
                experiment = self._experiment(task, create=bool(of_task))
                if experiment is not None:
                    problems += self._write_task(
                        experiment, task, [source for source in chosen if source.task == task], of_task
                    )
            except UserError as error:
                problems.append(str(error))
        return problems

    def _write_task(self, experiment: str, task: str, chosen: list[Source], every: list[Source]) -> list[str]:
        from mlflow.exceptions import MlflowException

        problems = []
        running = self._search(experiment, "attributes.status = 'RUNNING'", {"sync.checkout": self._checkout})
        parents = {run.info.run_id: run for run in running if run.data.tags.get("kind") == "pipeline"}
        for source in chosen:
            try:
                if parent := self._write_source(experiment, source, every):
                    parents[parent.info.run_id] = parent
            except UserError as error:
                problems.append(str(error))
            except MlflowException as error:
                if error.get_http_status_code() not in REFUSED:
                    raise
                problems.append(f"MLflow refuses the record of {source.name}: {str(error).partition(chr(10))[0][:300]}")
        known = {source.identity for source in every}
        for run in running:
            if run.data.tags.get("kind") == "stage" and run.data.tags.get("sync.identity") not in known:
                self._end(run, "KILLED", int(time.time() * 1000))
        self._list_stages(task, parents, every)
        for parent in parents.values():
            self._settle(experiment, parent)
        return problems

    def log_system(self) -> None:
        """How busy the machine is, to the pipeline runs that this process follows."""
        import psutil  # type: ignore[import-untyped]
        from mlflow.entities import Metric

        memory, now = psutil.virtual_memory(), int(time.time() * 1000)
        values = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),  # since the call before
            "system/system_memory_usage_percentage": memory.percent,
            "system/system_memory_usage_megabytes": memory.used / 1e6,
        }
        for run in self._parents.values():
            info = self.client.get_run(run).info
            if info.lifecycle_stage != "deleted":
                seconds = max(0, now - info.start_time) // 1000
                self.client.log_batch(
                    run, metrics=[Metric(name, value, now, seconds) for name, value in values.items()]
                )

    def _write_source(self, experiment: str, source: Source, every: list[Source]) -> "Run | None":
        """Bring one stage's run up to date; returns its parent if there was anything to do."""
        run = self._find(experiment, source)
        if run is None:
            run = self._create(experiment, source)
        elif run.info.lifecycle_stage == "deleted":
            return None  # somebody does not want it; `mlflow runs restore` brings it back
        self._runs[source.identity] = run.info.run_id
        tags, status = run.data.tags, run.info.status
        done = int(tags.get("sync.lines", 0))
        wanted = "FINISHED" if source.finished or status == "FINISHED" else "RUNNING" if source.alive else "KILLED"
        models = evaluated_models(source, every) if source.stage == "evaluate" else [source]
        # An evaluation of models that lie there no longer waits for them: without them little is known of it.
        complete = source.finished and bool(models) and "sync.complete" not in tags
        if done >= len(source.lines) and status == wanted and not complete:
            return None
        # Opened first, settled last: a crash in between is found again by its status.
        parent = self._open(tags.get("mlflow.parentRunId"))
        if status != wanted == "RUNNING":
            self.client.update_run(run.info.run_id, status="RUNNING")
        self._write_lines(run, source, done)
        if complete:
            if source.stage == "evaluate":
                self._write_to_models(experiment, source, run, models)
            self._describe(run, source, models)
        if wanted != "RUNNING":
            self._end(run, wanted, source.modified)
        return parent

    def _find(self, experiment: str, source: Source) -> "Run | None":
        if known := self._runs.get(source.identity):
            return self.client.get_run(known)
        found = self._search(experiment, "", {"sync.identity": source.identity}, ALL)
        active = [run for run in found if run.info.lifecycle_stage == "active"]
        # Two machines at once can each have made one; both hold the same lines, or part of them.
        active.sort(key=lambda run: (-int(run.data.tags.get("sync.lines", 0)), run.info.start_time, run.info.run_id))
        for double in active[1:]:
            self.client.delete_run(double.info.run_id)
        return next(iter(active or found), None)

    def _create(self, experiment: str, source: Source) -> "Run":
        recipe = source.description.get("recipe", {})
        tags = {
            "mlflow.parentRunId": self._parent(experiment, source.task),
            "mlflow.source.name": f"python -m stages.{source.stage} {source.key}",
            "kind": "stage",
            "task": source.task,
            "stage": source.stage,
            "key": source.key,
            "dvc.stage": source.name,
            "digest": source.digest,
            "sync.identity": source.identity,
            # Whether the revision is that of the training, or that of the day on which its files were found.
            "sync.seen": "finished" if source.finished else "under way",
            **({"method": str(recipe["method"])} if "method" in recipe else {}),
            **self._common_tags(),
        }
        self.created += 1
        start = source.modified if source.finished else int(time.time() * 1000)
        return self.client.create_run(experiment, start_time=start, tags=tags, run_name=source.name)

    def _write_lines(self, run: "Run", source: Source, done: int) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(_name(name), value, run.info.start_time + number, step)
            for number, step, name, value in source.values(done)
        ]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            part = metrics[start : start + METRICS_PER_CALL]
            self.client.log_batch(run.info.run_id, metrics=part)
            self.client.set_tag(run.info.run_id, "sync.lines", str(done + start + len(part)))
            self.lines += len(part)

    def _describe(self, run: "Run", source: Source, models: list[Source]) -> None:
        """Parameters, digests and data of a finished stage."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        described = source.description
        recipe = described.get("recipe", {})
        params = [Param(name[:250], value[:6000]) for name, value in _flat(recipe)]
        for start in range(0, len(params), PARAMS_PER_CALL):
            self.client.log_batch(run.info.run_id, params=params[start : start + PARAMS_PER_CALL])
        data = {model.description["dataset"]["name"]: model.description["dataset"]["digest"] for model in models}
        context = InputTag("mlflow.data.context", "evaluation" if source.stage == "evaluate" else "training")
        inputs = [
            # MLflow keeps 36 characters of a digest; the tag holds all of them.
            DatasetInput(
                Dataset(name, full[:36], "local", json.dumps({"uri": paths.prepared(source.task, name).as_posix()})),
                [context],
            )
            for name, full in sorted(data.items())
        ]
        if inputs:
            self.client.log_inputs(run.info.run_id, datasets=inputs)
        tags = {"digest.data": " ".join(full for _, full in sorted(data.items()))} if data else {}
        if described:
            tags |= {"digest.parameters": digest(recipe), "digest.weights": described["weights_sha256"]}
            tags |= {"model.kind": described["kind"], f"digest.{described['kind']}": described["weights_sha256"]}
            tags |= {"method": str(recipe["method"])} if "method" in recipe else {}
            if teacher := described.get("teacher"):
                tags |= {"teacher": teacher["name"], "digest.teacher": teacher["weights_sha256"]}
        tags["sync.complete"] = "true"
        self.client.log_batch(run.info.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def _write_to_models(self, experiment: str, evaluation: Source, run: "Run", models: list[Source]) -> None:
        """What an evaluation found, in the runs of its models too: only there can the UI compare them.

        What it found of a companion stands in the run of its student, under the companion's name.
        """
        from mlflow.entities import Metric

        for model in models:
            found = self._find(experiment, model)
            if found is None or found.info.lifecycle_stage == "deleted":
                continue
            metrics = []
            for number, _, name, value in evaluation.values(0):
                owner, _, rest = name.partition("/")
                student, _, companion = owner.partition(".")
                if student == model.key:
                    # `validation/...` alone is the curve that the training wrote.
                    shown = rest if rest.startswith("test/") else f"final/{rest}"
                    shown = f"{companion}/{shown}" if companion else shown
                    metrics.append(Metric(_name(shown), value, run.info.start_time + number, 0))
            for start in range(0, len(metrics), METRICS_PER_CALL):
                self.client.log_batch(found.info.run_id, metrics=metrics[start : start + METRICS_PER_CALL])

    def _experiment(self, task: str, create: bool) -> str | None:
        from mlflow.exceptions import MlflowException

        if task in self._experiments:
            return self._experiments[task]
        found = self.client.get_experiment_by_name(task)
        if found is None and not create:
            return None
        if found is not None and found.lifecycle_stage == "deleted":
            raise UserError(
                f"the experiment {task!r} was deleted in MLflow · bring it back: "
                f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
            )
        if found is None:
            try:
                self._experiments[task] = self.client.create_experiment(task)
            except MlflowException as error:
                found = self.client.get_experiment_by_name(task)  # another process may have been faster
                if found is None:
                    raise error
        if found is not None:
            self._experiments[task] = found.experiment_id
        return self._experiments[task]

    def _parent(self, experiment: str, task: str) -> str:
        """The pipeline run, made when it is needed first."""
        if task not in self._parents:
            found = self._search(experiment, "", {"kind": "pipeline", "pipeline_run": self.pipeline_run})
            if found:
                self._parents[task] = min(found, key=lambda run: (run.info.start_time, run.info.run_id)).info.run_id
            else:
                tags = {"kind": "pipeline", "task": task, "mlflow.source.name": "dvc.yaml", **self._common_tags()}
                run = self.client.create_run(experiment, tags=tags, run_name=f"pipeline {self.pipeline_run[:21]}")
                self._parents[task] = run.info.run_id
        return self._parents[task]

    def _common_tags(self) -> dict[str, str]:
        return {
            "mlflow.source.type": "LOCAL",
            **({"mlflow.source.git.commit": self.tree.revision} if self.tree.revision else {}),
            "pipeline_run": self.pipeline_run,
            "git.revision": self.tree.revision or "none",
            "git.clean": str(self.tree.clean).lower(),
            "sync.checkout": self._checkout,
        }

    def _open(self, parent: str | None) -> "Run | None":
        """A parent whose stages are about to change, RUNNING."""
        if parent is None:
            return None
        run = self.client.get_run(parent)
        if run.info.lifecycle_stage == "deleted":
            return None
        if run.data.tags.get("sync.checkout") != self._checkout:
            self.client.set_tag(parent, "sync.checkout", self._checkout)
        if run.info.status != "RUNNING":
            self.client.update_run(parent, status="RUNNING")
            run = self.client.get_run(parent)
        return run

    def _list_stages(self, task: str, parents: Mapping[str, "Run"], every: list[Source]) -> None:
        from mlflow.entities import RunTag

        for run_id, parent in parents.items():
            if parent.data.tags.get("pipeline_run") == self.pipeline_run:
                self._parents[task] = run_id
                there = {
                    _name(f"stage.{source.stage}/{source.key}"): self._runs.get(source.identity) for source in every
                }
                wanted = {name: run for name, run in there.items() if run and parent.data.tags.get(name) != run}
                if parent.data.tags.get("dvc.lock") != self.tree.lock:
                    wanted["dvc.lock"] = self.tree.lock
                tags = [RunTag(name, value) for name, value in sorted(wanted.items())]
                for start in range(0, len(tags), PARAMS_PER_CALL):
                    self.client.log_batch(run_id, tags=tags[start : start + PARAMS_PER_CALL])

    def _settle(self, experiment: str, parent: "Run") -> None:
        """End a pipeline run of which nothing runs any more and that nobody follows."""
        if _followed():
            return
        children = self._search(experiment, "", {"mlflow.parentRunId": parent.info.run_id})
        states = {child.info.status for child in children}
        if "RUNNING" not in states:
            end = max((child.info.end_time or 0 for child in children), default=parent.info.start_time)
            self._end(parent, "KILLED" if "KILLED" in states else "FINISHED", end)

    def _end(self, run: "Run", status: str, end: int) -> None:
        self.client.set_terminated(run.info.run_id, status, max(end, run.info.start_time))

    def _search(self, experiment: str, condition: str, tags: Mapping[str, str], view: int = ACTIVE_ONLY) -> "list[Run]":
        """All runs of an experiment with these tags."""
        parts = [condition] * bool(condition) + [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
        runs: list[Run] = []
        token = None
        while True:
            page = self.client.search_runs([experiment], " and ".join(parts), view, 1000, page_token=token)
            runs.extend(page)
            token = page.token
            if not token:
                return runs


def _followed() -> bool:
    """Whether a process of this checkout follows a pipeline run."""
    try:
        with FOLLOW_LOCK.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested parameters as names with dots; lists and None as JSON."""
    for name, value in values.items():
        full = f"{prefix}{_name(str(name))}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{full}.")
        else:
            yield full, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _name(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w.\- :/]", "_", name)[:250]
