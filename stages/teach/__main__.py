"""Train a teacher by its task's ordinary objective, or take an existing model as it is."""

import importlib

from stages import command, paths
from stages.distill.alone import Learner
from stages.parameters import load, select
from stages.records import FILE, Record
from stages.training import Run, evaluating
from stages.training.fit import describe, fit, write
from stages.training.loop import finish


def main(key: str) -> None:
    """Train or take the teacher `key` of params.yaml."""
    entry = select(load().teachers, key, "teacher")
    paths.require_validated(entry.task, entry.dataset)
    run = Run(entry.training)
    module = importlib.import_module(f"stages.teach.{entry.task}")
    task = module.for_teacher(entry, paths.prepared(entry.task, entry.dataset), run)
    description = describe(key, entry, task)
    if entry.outside is None:
        fit("teach", description, task, Learner(task, entry, run), run, entry.training.seed)
    elif run.rank == 0:
        record = Record(
            paths.checkpoints("teach", key) / FILE, {"stage": "teach", "key": key, "digest": entry.outside.sha256}
        )
        with evaluating(task.student):
            record.write(0, {f"validation/{name}": value for name, value in task.monitor(task.student).items()})
        write(description, task.student, record.path)
        finish("teach", key)


if __name__ == "__main__":
    command.run("teach", __doc__, main, key="teacher", example="recognition-resnet")
