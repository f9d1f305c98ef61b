"""Evaluate every model of a task, teachers included, on validation and on test. Nothing is compared here."""

import importlib
import json
from pathlib import Path

import pandas as pd
import torch

from data.errors import UserError
from data.files import digest, new_directory, write_json
from models.artifacts import load_model
from stages import command, paths
from stages.parameters import Parameters, load, select
from stages.records import FILE, Record

SPLITS = ("validation", "test")


def main(key: str) -> None:
    """Evaluate all models of the task `key`."""
    parameters = load()
    settings = select(parameters.tasks, key, "task")
    torch.set_num_threads(settings.threads)
    task = importlib.import_module(f"stages.evaluate.{key}")
    models = parameters.models(key)
    _refuse_strangers(key, parameters)
    with new_directory(paths.metrics(key)) as metrics, new_directory(paths.evaluation(key)) as details:
        figures, weights = {}, {}
        for name, entry in models.items():
            paths.require_validated(key, entry.dataset)
            network, description = load_model(paths.trained(key, name))
            weights[name] = description.weights_sha256
            prepared = paths.prepared(key, entry.dataset)
            results = {split: task.evaluate(network, description, prepared, split, settings) for split in SPLITS}
            figures[name] = {split: result.metrics for split, result in results.items()}
            write_json(metrics / f"{name}.json", figures[name])
            for kind in ("samples", "classes"):
                table = pd.concat([getattr(result, kind) for result in results.values()])
                table.to_csv(details / f"{name}.{kind}.csv", index=False, lineterminator="\n")
            command.log.info("evaluate %s: %s, test %s", key, name, json.dumps(figures[name]["test"]))
        _record(details, key, figures, weights)


def _record(folder: Path, key: str, figures: dict[str, dict[str, dict[str, float]]], weights: dict[str, str]) -> None:
    """All figures once more as a record."""
    record = Record(folder / FILE, {"stage": "evaluate", "key": key, "digest": digest(weights)})
    for name, splits in figures.items():
        for split, values in splits.items():
            record.write(0, {f"{name}/{split}/{metric}": value for metric, value in values.items()})


def _refuse_strangers(key: str, parameters: Parameters) -> None:
    """What lies among the models of a task enters the digest of its evaluation; it has to be known.

    Raises:
        UserError: a folder that params.yaml does not name.
    """
    folder = paths.trained(key, "none").parent
    known = {*parameters.models(key), "none"}
    if strangers := sorted(path.name for path in folder.iterdir() if path.name not in known and path.name[0] != "."):
        raise UserError(
            f"{folder} holds models that params.yaml does not name: {', '.join(strangers)} · "
            f"name them there, or remove them: rm -r {' '.join(str(folder / name) for name in strangers)}"
        )


if __name__ == "__main__":
    command.run("evaluate", __doc__, main, key="task", example="recognition")
