"""Zero-shot recognition: a caller sends raw images or features; a champion is evaluated again where the test data moved.

`pipelines.serving.zero_shot` answers the caller.
"""

import json
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
REQUEST = (
    '{"inputs": [SAMPLE, ...]}, a sample being nested lists of pixels from 0 to 255 where the student has its encoder '
    "inside, and a list of features where it has none"
)
BATCH = 256


def signature() -> "ModelSignature":
    """Request and answer, as MLflow writes them down.

    The request is an object of any shape: the served code checks it itself, and answers with status 400 where MLflow's
    own check of shapes would answer with 500.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Map

    answer = Schema(
        [
            ColSpec("string", "label"),
            ColSpec("double", "probability"),
            ColSpec(Map(DataType.double), "probabilities"),
            ColSpec("boolean", "seen"),
        ]
    )
    return ModelSignature(Schema([TensorSpec(np.dtype("O"), (-1,), "inputs")]), answer)


def example(description: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A request of one sample that is of no data set: a ramp from black to white, or from 0 to 1.

    Args:
        description: model.json of the export.
    """
    shape = description["input"]["shape"][1:]
    ramp = np.linspace(0, 1, int(np.prod(shape)))
    return {"inputs": (ramp[None] if len(shape) == 1 else (255 * ramp).round().reshape(1, *shape))}
