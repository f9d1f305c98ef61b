"""Zero-shot recognition: a caller sends images or features; a champion is evaluated again where the test data moved.

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
TESTED: tuple[str, ...] = ()
REQUEST = (
    '{"inputs": [SAMPLE, ...]}, a sample being nested lists of pixels from 0 to 255 where the student has its encoder '
    "inside, and a list of features where it has none"
)
BATCH = 256


def signature(description: Mapping[str, Any]) -> "ModelSignature":
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


def evaluate(files: Path, description: Mapping[str, Any], prepared: Path) -> pd.DataFrame:
    """What `stages.evaluate` says of every test sample, from an ONNX file: a row per sample.

    Classes are matched by name. One that the version does not know is never its answer; one that the data set does not
    have competes with the others.

    Args:
        files: the folder of a version's. description: its model.json. prepared: the data set of today.

    Raises:
        ValueError: the data set has none of the classes, no images, or samples of another shape.
    """
    import onnxruntime
    import torch

    from models.artifacts import Description
    from models.zero_shot import Output
    from stages.evaluate import zero_shot as evaluation
    from stages.parameters.zero_shot import Task

    today, known = json.loads((prepared / "dataset.json").read_text(encoding="utf-8")), description["interface"]
    if not set(today["classes"]) & set(known["classes"]):
        raise ValueError(f"the data set has none of the {len(known['classes'])} classes that the student knows")
    shape, images = description["input"]["shape"][1:], today["images"]
    taken = [images["channels"], images["size"], images["size"]] if images else None
    if shape not in (taken, [today["features"]]):
        raise ValueError(f"the samples are images {taken} or {today['features']} features, the student takes {shape}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(files / ONNX), options, providers=["CPUExecutionProvider"])

    class Exported(torch.nn.Module):
        """The ONNX file in the place of the network that it was made of."""

        def forward(self, inputs: torch.Tensor) -> Output:
            outputs = session.run(["embedding", "logits"], {description["input"]["name"]: inputs.cpu().numpy()})
            embedding, logits = map(torch.from_numpy, outputs)
            return Output(embedding, embedding, logits)

    # What takes images is fed like an encoder.
    network = {"name": "encoder" if shape == taken else "mlp"}
    told = Description(description["name"], "zero_shot", "version", network, known, {}, {}, None, [])
    return evaluation.evaluate(Exported().eval(), told, prepared, "test", Task(batch=BATCH)).samples
