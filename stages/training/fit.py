"""From parameters to a trained model on disk: what `teach` and `distill` share."""

import contextlib
import dataclasses
import fcntl
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from data.errors import UserError
from data.files import digest, new_directory, sha256
from models.artifacts import Description, save_model
from stages import paths
from stages.code import code_digest
from stages.parameters.shared import Student, Teacher
from stages.records import FILE, Record, write_curves
from stages.training.loop import train
from stages.training.method import Method, evaluating
from stages.training.run import Run
from stages.training.task import Task


def describe(key: str, entry: Teacher | Student, task: Task, teacher: Description | None = None) -> Description:
    """What is known of a model before it has weights."""
    sources = [task.source]
    for other in teacher.sources if teacher else []:
        if other not in sources:
            sources.append(other)
    return Description(
        name=key,
        task=entry.task,
        kind="student" if isinstance(entry, Student) else "teacher",
        network=task.network,
        interface=task.interface,
        # A path belongs to one machine; what lies there is pinned by its digest.
        recipe=entry.model_dump(mode="json", by_alias=True, exclude={"outside": {"file"}}),
        dataset={
            "name": entry.dataset,
            "digest": sha256(paths.prepared(entry.task, entry.dataset) / "manifest.csv"),
        },
        teacher={"name": teacher.name, "weights_sha256": teacher.weights_sha256} if teacher else None,
        sources=sources,
    )


def fit(
    stage: str, description: Description, task: Task, learner: Method, run: Run, *, teacher: Description | None = None
) -> None:
    """Train, then write model, record and curves. Only the first process writes."""
    key = description.name
    # All of the teacher's description: other normalisation with the same weights is another teacher.
    identity = {
        "model": dataclasses.asdict(description),
        "teacher": dataclasses.asdict(teacher) if teacher else None,
        "code": code_digest(),
    }

    def monitor() -> dict[str, float]:
        with evaluating(learner.student):
            return dict(task.monitor(learner.student))

    with exclusive(stage, key) if run.rank == 0 else contextlib.nullcontext():
        record = train(
            learner,
            run,
            stage=stage,
            key=key,
            steps=task.steps,
            seed=task.seed,
            identity=identity,
            monitor=monitor,
            monitor_every=task.steps_per_epoch,
        )
        if run.rank == 0:
            _write(description, learner.student, record)
            shutil.rmtree(paths.checkpoints(stage, key))


def adopt(stage: str, description: Description, task: Task) -> None:
    """Write an existing model as if it had been trained: its record holds what it reaches on the validation split."""
    key = description.name
    name = digest({"model": dataclasses.asdict(description), "code": code_digest()})
    with exclusive(stage, key), evaluating(task.student):
        record = Record(paths.checkpoints(stage, key) / name[:16] / FILE, {"stage": stage, "key": key, "digest": name})
        record.write(0, {f"validation/{metric}": value for metric, value in task.monitor(task.student).items()})
        _write(description, task.student, record.path)
        shutil.rmtree(paths.checkpoints(stage, key))


@contextlib.contextmanager
def exclusive(stage: str, key: str) -> Iterator[None]:
    """Hold the checkpoints and the output of one model; the end of the process lets go.

    Raises:
        UserError: another process holds them.
    """
    path = paths.lock(stage, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        # Whoever follows records asks for a moment whether somebody trains: a second try tells that from a training.
        for patience in (0.2, 0.5, None):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if patience is None:
                    raise UserError(
                        f"{stage} {key} is being trained by another process · wait for it, or end it"
                    ) from None
                time.sleep(patience)
        yield


def _write(description: Description, network: nn.Module, record: Path) -> None:
    """The model folder, complete or absent, and the curves."""
    with new_directory(paths.trained(description.task, description.name)) as output:
        save_model(output, network, description)
        shutil.copyfile(record, output / FILE)
    write_curves(record, paths.curves(description.task, description.name))
