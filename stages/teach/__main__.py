"""Train a teacher by its task's ordinary objective, or take an existing model as it is."""

import importlib

from models.artifacts import load_model
from stages import command, paths
from stages.distill.alone import Learner
from stages.parameters import load, select
from stages.training import Run
from stages.training.fit import adopt, describe, fit


def main(key: str) -> None:
    """Train or take the teacher `key` of params.yaml."""
    entry = select(load().teachers, key, "teacher")
    paths.require_validated(entry.task, entry.dataset)
    run = Run(entry.training)
    module = importlib.import_module(f"stages.teach.{entry.task}")
    start = None if entry.start == "none" else load_model(paths.trained(entry.task, entry.start))
    task = module.for_teacher(entry, paths.prepared(entry.task, entry.dataset), run, start)
    before = start[1] if start else None
    description = describe(key, entry, task, start=before)
    if entry.outside is None:
        fit("teach", description, task, task.pretraining() or Learner(task, entry, run), run, before=before)
    else:
        adopt("teach", description, task)


if __name__ == "__main__":
    command.run("teach", __doc__, main, key="teacher", example="recognition-resnet")
