"""Prepare a data set: arrays with a fixed split, and a manifest with a row per sample."""

import importlib

from data.errors import UserError
from data.files import new_directory
from stages import command, paths
from stages.parameters import load, select


def main(key: str) -> None:
    """Prepare the data set `key` of params.yaml from its fetched source."""
    parameters = load()
    dataset = select(parameters.datasets, key, "data set")
    source = parameters.sources[dataset.source]
    if not paths.raw(dataset.source).is_dir():
        raise UserError(f"source {dataset.source!r} is not fetched yet · run `dvc repro fetch@{dataset.source}`")
    task = importlib.import_module(f"data.{dataset.task}")
    provenance = {
        "name": dataset.source,
        "licence": source.licence,
        "credit": source.credit,
        "redistributable": source.redistributable,
    }
    with new_directory(paths.prepared(dataset.task, key)) as output:
        task.prepare(paths.raw(dataset.source), dataset, output, provenance)


if __name__ == "__main__":
    command.run("prepare", __doc__, main, key="data set", example="mnist")
