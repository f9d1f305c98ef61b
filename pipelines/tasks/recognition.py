"""Recognition: a caller sends raw images; a champion is evaluated again where the test data moved.

`pipelines.serving.recognition` answers the caller.
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
REQUEST = '{"inputs": [IMAGE, ...]}, an image being nested lists of pixels from 0 to 255'
COLUMNS = ["id", "label", "prediction", "correct", "same_class_rank"]


def signature(description: Mapping[str, Any]) -> "ModelSignature":
    """Request and answer, as MLflow writes them down.

    The request is an object of any shape: the served code checks it itself, and answers with status 400 where MLflow's
    own check of shapes would answer with 500.

    Args:
        description: model.json of the export. Without classes the embedding is all that is answered.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Array, Map

    answer: list[ColSpec | TensorSpec] = [ColSpec(Array(DataType.double), "embedding")]
    if description["interface"]["classes"]:
        answer += [
            ColSpec("string", "label"),
            ColSpec("double", "probability"),
            ColSpec(Map(DataType.double), "probabilities"),
            ColSpec(Map(DataType.double), "logits"),
        ]
    return ModelSignature(Schema([TensorSpec(np.dtype("O"), (-1,), "images")]), Schema(answer))


def example(description: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A request of one image, no image of any data set: a ramp from black to white.

    Args:
        description: model.json of the export.
    """
    shape = description["input"]["shape"][1:]
    return {"images": np.linspace(0, 255, int(np.prod(shape))).round().reshape(1, *shape)}


def evaluate(files: Path, description: Mapping[str, Any], prepared: Path) -> pd.DataFrame:
    """What `stages.evaluate` says of every test image, from an ONNX file: COLUMNS, a row per image.

    Args:
        files: the folder of a version's. description: its model.json. prepared: the data set of today.
    """
    import onnxruntime
    import torch

    from data import recognition as data
    from stages.evaluate import recognition as evaluation

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(files / ONNX), options, providers=["CPUExecutionProvider"])
    ids, images, labels = data.load(prepared, "test")
    small = data.downsample(data.to_unit(images), description["interface"]["resolution"]).numpy()
    searched = data.retrieves(description["interface"], data.describe(prepared))
    wanted, name = ["embedding"] if searched else ["embedding", "logits"], description["input"]["name"]
    parts = [session.run(wanted, {name: part}) for part in np.split(small, range(256, len(small), 256))]
    embeddings, *logits = (torch.from_numpy(np.concatenate(output)) for output in zip(*parts, strict=True))
    return evaluation.table("test", ids, labels, logits[0] if logits else None, embeddings)[COLUMNS]
