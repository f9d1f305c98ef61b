"""Prepare a data set: arrays with a fixed split, and a manifest with a row per sample."""

import importlib

from data.errors import UserError
from data.files import new_directory
from stages import command, paths
from stages.parameters import load, select


def main(key: str) -> None:
    """Prepare the data set `key` of params.yaml from its fetched source, and with its encoder if it has one."""
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
    raw = paths.raw(dataset.source)
    with new_directory(paths.prepared(dataset.task, key)) as output:
        if dataset.encoder == "none":
            task.prepare(raw, dataset, output, provenance)
        else:
            # Only here: torch is not imported to prepare anything else.
            from models.artifacts import copy_model, load_model

            folder = paths.trained(dataset.task, dataset.encoder)
            encoder, description = load_model(folder)
            # As they were when the encoder was trained on them, and not as they lie here: no input but raw and encoder.
            images = parameters.datasets[parameters.teachers[dataset.encoder].dataset]
            task.prepare_encoded(raw, images, output, provenance, encoder, description)
            copy_model(folder, output / "encoder")


if __name__ == "__main__":
    command.run("prepare", __doc__, main, key="data set", example="mnist")
