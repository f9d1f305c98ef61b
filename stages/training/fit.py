"""From parameters to a trained model on disk: what `teach` and `distill` share."""

import dataclasses
import shutil
from pathlib import Path

from torch import nn

from data.files import new_directory, sha256
from models.artifacts import Description, save_model
from stages import paths
from stages.parameters.shared import Student, Teacher
from stages.records import FILE, write_curves
from stages.training.loop import finish, train
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
        recipe=entry.model_dump(mode="json", by_alias=True),
        dataset={
            "name": entry.dataset,
            "digest": sha256(paths.prepared(entry.task, entry.dataset) / "manifest.csv"),
        },
        teacher={"name": teacher.name, "weights_sha256": teacher.weights_sha256} if teacher else None,
        sources=sources,
    )


def fit(stage: str, description: Description, task: Task, learner: Method, run: Run, seed: int) -> None:
    """Train, then write model, record and curves. Only the first process writes."""
    key = description.name

    def monitor() -> dict[str, float]:
        with evaluating(learner.student):
            return dict(task.monitor(learner.student))

    record = train(
        learner,
        run,
        stage=stage,
        key=key,
        steps=task.steps,
        seed=seed,
        identity=dataclasses.asdict(description),
        monitor=monitor,
        monitor_every=task.steps_per_epoch,
    )
    if run.rank == 0:
        write(description, learner.student, record)
        finish(stage, key)


def write(description: Description, network: nn.Module, record: Path) -> None:
    """The model folder, complete or absent, and the curves."""
    with new_directory(paths.trained(description.task, description.name)) as output:
        save_model(output, network, description)
        shutil.copyfile(record, output / FILE)
    write_curves(record, paths.curves(description.task, description.name))
