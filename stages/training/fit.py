"""From parameters to a trained model on disk: what `teach` and `distill` share."""

import contextlib
import dataclasses
import fcntl
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from data.errors import UserError
from data.files import digest, new_directory, sha256, write_json
from models.artifacts import Description, save_model
from stages import paths
from stages.code import code_digest
from stages.parameters.shared import Student, Teacher
from stages.records import FILE, Record, write_curves
from stages.training.loop import train
from stages.training.method import Companion, Method, evaluating
from stages.training.run import Run
from stages.training.task import Task

if TYPE_CHECKING:
    import pandas as pd


def describe(
    key: str,
    entry: Teacher | Student,
    task: Task,
    teacher: Description | None = None,
    start: Description | None = None,
) -> Description:
    """What is known of a model before it has weights.

    Args:
        teacher: of the model it learns from. start: of the model whose weights it begins with.
    """
    sources = [task.source]
    inherited = [origin.model_dump() for origin in entry.origins]
    for other in (*inherited, *(teacher.sources if teacher else []), *(start.sources if start else [])):
        if other not in sources:
            sources.append(other)
    return Description(
        name=key,
        task=entry.task,
        kind="student" if isinstance(entry, Student) else "teacher",
        network=task.network,
        interface=task.interface,
        # A path belongs to one machine; what lies there is pinned by its digest.
        recipe=entry.model_dump(mode="json", by_alias=True, exclude={"outside": {"file"}, "initial": {"file"}}),
        dataset={
            "name": entry.dataset,
            "digest": sha256(paths.prepared(entry.task, entry.dataset) / "manifest.csv"),
        },
        teacher=_reference(teacher),
        start=_reference(start),
        sources=sources,
    )


def _reference(model: Description | None) -> dict[str, str] | None:
    return {"name": model.name, "weights_sha256": model.weights_sha256} if model else None


def fit(
    stage: str, description: Description, task: Task, learner: Method, run: Run, *, before: Description | None = None
) -> None:
    """Train, then write model, companions, record and curves. Only the first process writes.

    Args:
        before: of the model that it learns from or begins with.
    """
    key = description.name
    description = dataclasses.replace(description, chosen=learner.chosen)
    # All of that description: other normalisation with the same weights is another teacher.
    identity = {
        "model": dataclasses.asdict(description),
        "before": dataclasses.asdict(before) if before else None,
        "code": code_digest(),
    }

    def monitor() -> dict[str, float]:
        with evaluating(learner.watched):
            return dict(task.monitor(learner.watched))

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
            monitor_every=learner.look_every or task.steps_per_epoch,
        )
        if run.rank == 0:
            rows = {name: stream.size for name, stream in learner.streams.items()}
            written = _write(dataclasses.replace(description, rows=rows), learner.student, record)
            _write_companions(written, learner.companions, learner.tables(), before)
            shutil.rmtree(paths.checkpoints(stage, key))


def adopt(stage: str, description: Description, task: Task) -> None:
    """Write an existing model as if it had been trained: its record holds what it reaches on the validation split."""
    key = description.name
    name = digest({"model": dataclasses.asdict(description), "code": code_digest()})
    with exclusive(stage, key), evaluating(task.student):
        record = Record(paths.checkpoints(stage, key) / name[:16] / FILE, {"stage": stage, "key": key, "digest": name})
        record.write(0, {f"validation/{metric}": value for metric, value in task.monitor(task.student).items()})
        _write_companions(_write(description, task.student, record.path), {}, {}, None)
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


def _write_companions(
    model: Description,
    companions: Mapping[str, Companion],
    tables: Mapping[str, "pd.DataFrame"],
    teacher: Description | None,
) -> None:
    """What was trained beside a model: the teacher's description with the model's recipe, and weights of its own."""
    with new_directory(paths.companions(model.task, model.name)) as output:
        for name, (network, built_from, _) in companions.items():
            (output / name).mkdir()
            like = model if built_from or teacher is None else teacher
            description = dataclasses.replace(
                like,
                name=f"{model.name}.{name}",
                kind="companion",
                network=built_from or like.network,
                recipe=model.recipe,
                dataset=model.dataset,
                teacher=None,
                start=_reference(teacher),
                beside=_reference(model),
                sources=model.sources,
                chosen=model.chosen,
                rows=model.rows,
            )
            save_model(output / name, network, description)
        for name, table in tables.items():
            table.to_csv(output / f"{name}.csv", index=False, lineterminator="\n")
        evaluated = [name for name, companion in companions.items() if companion.evaluated]
        contents = {"models": list(companions), "evaluated": evaluated, "tables": list(tables)}
        # DVC warns of an output that is an empty folder.
        write_json(output / paths.CONTENTS, contents)


def _write(description: Description, network: nn.Module, record: Path) -> Description:
    """The model folder, complete or absent, and the curves; the description with the digest of its weights."""
    with new_directory(paths.trained(description.task, description.name)) as output:
        written = save_model(output, network, description)
        shutil.copyfile(record, output / FILE)
    write_curves(record, paths.curves(description.task, description.name))
    return written
