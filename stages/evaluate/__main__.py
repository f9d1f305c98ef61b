"""Evaluate every model of a task, teachers included, on validation and on test. Nothing is compared here."""

import importlib
import json

import pandas as pd
import torch

from data.files import digest, new_directory, sha256, write_json
from models.artifacts import load_model
from stages import command, paths
from stages.code import code_digest
from stages.parameters import load, select
from stages.records import FILE, Record

SPLITS = ("validation", "test")


def main(key: str) -> None:
    """Evaluate all models of the task `key`."""
    parameters = load()
    settings = select(parameters.tasks, key, "task")
    torch.set_num_threads(settings.threads)
    task = importlib.import_module(f"stages.evaluate.{key}")
    names = parameters.models(key)
    paths.refuse_strangers(key, names)
    with new_directory(paths.metrics(key)) as metrics, new_directory(paths.evaluation(key)) as details:
        figures, weights, manifests = {}, {}, {}
        for name, folder in paths.models(key, names).items():
            network, description = load_model(folder)
            dataset = description.dataset["name"]
            paths.require_validated(key, dataset)
            weights[name] = description.weights_sha256
            prepared = paths.prepared(key, dataset)
            manifests[dataset] = sha256(prepared / "manifest.csv")
            results = {split: task.evaluate(network, description, prepared, split, settings) for split in SPLITS}
            figures[name] = {split: result.metrics for split, result in results.items()}
            write_json(metrics / f"{name}.json", figures[name])
            for kind in results[SPLITS[0]].tables:
                table = pd.concat([result.tables[kind] for result in results.values()])
                table.to_csv(details / f"{name}.{kind}.csv", index=False, lineterminator="\n")
            command.log.info("evaluate %s: %s, test %s", key, name, json.dumps(figures[name]["test"]))
        write_json(details / "models.json", weights)
        write_json(details / "data.json", manifests)
        made_from = {"weights": weights, "data": manifests, "settings": settings.model_dump(), "code": code_digest()}
        record = Record(details / FILE, {"stage": "evaluate", "key": key, "digest": digest(made_from)})
        for name, splits in figures.items():
            for split, values in splits.items():
                record.write(0, {f"{name}/{split}/{metric}": value for metric, value in values.items()})


if __name__ == "__main__":
    command.run("evaluate", __doc__, main, key="task", example="recognition")
