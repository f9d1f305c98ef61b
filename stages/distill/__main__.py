"""Train a student by its method, from its teacher or (method `alone`) from the labels."""

import importlib

from models.artifacts import load_model
from stages import command, paths
from stages.parameters import load, select
from stages.training import Run
from stages.training.fit import describe, fit


def main(key: str) -> None:
    """Train the student `key` of params.yaml."""
    entry = select(load().students, key, "student")
    paths.require_validated(entry.task, entry.dataset)
    run = Run(entry.training)
    teacher = None if entry.teacher == "none" else load_model(paths.trained(entry.task, entry.teacher))
    module = importlib.import_module(f"stages.teach.{entry.task}")
    method = importlib.import_module(f"stages.distill.{entry.method}")
    task = module.for_student(entry, paths.prepared(entry.task, entry.dataset), run, teacher)
    source = teacher[1] if teacher else None
    learner = method.Learner(task, entry, run)
    fit("distill", describe(key, entry, task, source), task, learner, run, before=source)


if __name__ == "__main__":
    command.run("distill", __doc__, main, key="student", example="recognition-kd")
