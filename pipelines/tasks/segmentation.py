"""Segmentation: a caller sends raw images; a champion is evaluated again where the test data moved.

`pipelines.serving.segmentation` answers the caller.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pipelines.gates import ONNX

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

FILES: dict[str, str] = {}
REQUIREMENTS: tuple[str, ...] = ()
TESTED: tuple[str, ...] = ()
REQUEST = '{"inputs": [IMAGE, ...]}, an image being nested lists (3, H, W) of pixels from 0 to 255'
BATCH = 8


def signature(description: Mapping[str, Any]) -> "ModelSignature":
    """Request and answer, as MLflow writes them down.

    The request is an object of any shape: the served code checks it itself, and answers with status 400 where MLflow's
    own check of shapes would answer with 500.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Array, Map

    answer = Schema(
        [
            ColSpec(Array(Array(DataType.long)), "labels"),
            ColSpec(Array(DataType.string), "classes"),
            ColSpec(Map(DataType.long), "pixels"),
        ]
    )
    return ModelSignature(Schema([TensorSpec(np.dtype("O"), (-1,), "images")]), answer)


def example(description: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A request of one image, no image of any data set: a ramp from black to white.

    Args:
        description: model.json of the export.
    """
    shape = description["input"]["shape"][1:]
    return {"images": np.linspace(0, 255, int(np.prod(shape))).round().reshape(1, *shape)}


def evaluate(files: Path, description: Mapping[str, Any], prepared: Path) -> pd.DataFrame:
    """What `stages.evaluate` says of every test image, from an ONNX file: a row per image, with its id and, per class,
    `intersection_k` and `union_k` in pixels that have a label.

    Args:
        files: the folder of a version's. description: its model.json. prepared: the data set of today.

    Raises:
        ValueError: the data set has a label that the model does not know.
    """
    import onnxruntime
    import torch

    from data import segmentation as data
    from models import segmentation as models

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(files / ONNX), options, providers=["CPUExecutionProvider"])
    ids, images, labels = data.load(prepared, "test")
    name, classes = description["input"]["name"], len(description["interface"]["classes"])
    parts = []
    for start in range(0, len(ids), BATCH):
        rows = slice(start, start + BATCH)
        (logits,) = session.run(["logits"], {name: data.to_unit(images[rows]).numpy()})
        found = torch.from_numpy(logits.argmax(1))
        parts.append(models.confusion(labels[rows], found, classes, data.IGNORE))
    table = torch.cat(models.intersection_and_union(torch.cat(parts)), dim=1).numpy()
    columns = [f"{kind}_{label}" for kind in ("intersection", "union") for label in range(classes)]
    return pd.DataFrame(table, columns=columns).assign(id=ids)
