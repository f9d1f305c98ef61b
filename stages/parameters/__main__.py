"""Check params.yaml before anything runs; with a TASK, print what `dvc repro` takes to make all of that task."""

from stages import command, paths
from stages.parameters import load, select


def main(key: str) -> None:
    """Every mistake with its path, or nothing; the targets of one task."""
    parameters = load()
    for task in parameters.tasks:
        paths.refuse_strangers(task, parameters.models(task))
    if key:
        select(parameters.tasks, key, "task")
        exports = [f"export@{name}" for name, export in parameters.exports.items() if export.task == key]
        print(" ".join([f"evaluate@{key}", *exports]))


if __name__ == "__main__":
    command.run("parameters", __doc__, main, key="task", example="recognition", optional=True)
