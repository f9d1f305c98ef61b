"""Text: a caller sends raw strings; a champion is evaluated again where the test data moved.

`pipelines.serving.text` answers the caller.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pipelines.gates import DESCRIPTION, ONNX

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

TOKENIZER = "tokenizer.json"
FILES = {TOKENIZER: "tokenizer_sha256"}
REQUIREMENTS = ("tokenizers",)
TESTED: tuple[str, ...] = ()
REQUEST = '{"inputs": [TEXT, ...]}, a text being a string, or ["the first", "the second"] where the student reads pairs'
EXAMPLE = ["A sentence of seven words, and more.", "A second one!"]


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
            ColSpec("boolean", "truncated"),
        ]
    )
    return ModelSignature(Schema([TensorSpec(np.dtype("O"), (-1,), "texts")]), answer)


def example(description: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A request of one text, or pair, that is of no data set.

    Args:
        description: model.json of the export.
    """
    text = EXAMPLE if description["interface"]["pair"] else EXAMPLE[0]
    return {"texts": np.array([text], dtype=object)}


def evaluate(files: Path, description: Mapping[str, Any], prepared: Path) -> pd.DataFrame:
    """What `stages.evaluate` says of every test text, from an ONNX file and the tokenizer beside it: a row per text.

    Today's tokens may be another vocabulary's: the texts themselves are read, as they are when a caller sends them.

    Args:
        files: the folder of a version's. description: its model.json. prepared: the data set of today.

    Raises:
        ValueError: the data set asks another question: its classes are others, or it has pairs where there were none.
    """
    from mlflow.pyfunc.model import PythonModelContext

    from pipelines.serving.text import Student

    today, known = json.loads((prepared / "dataset.json").read_text(encoding="utf-8")), description["interface"]
    for name in ("classes", "pair"):
        if today[name] != known[name]:
            raise ValueError(f"the texts have {name} {today[name]}, the student was trained with {known[name]}")
    columns = {"id": str, "text": str, "pair": str}
    table = pd.read_csv(prepared / "manifest.csv", dtype=columns, keep_default_na=False)
    table = table[table["split"] == "test"].reset_index(drop=True)
    student = Student()
    artifacts = {"onnx": files / ONNX, "description": files / DESCRIPTION, "tokenizer": files / TOKENIZER}
    student.load_context(PythonModelContext({name: str(file) for name, file in artifacts.items()}, None))
    texts = [table[name] for name in ("text", "pair") if name in table]
    probabilities = student.probabilities([student.encode(*parts).ids for parts in zip(*texts, strict=True)])
    label, prediction = table["label"].to_numpy(), probabilities.argmax(1)
    found = {
        "id": table["id"],
        "label": label,
        "prediction": prediction,
        "confidence": probabilities.max(1).round(6),
        "correct": (prediction == label).astype(int),
    }
    if "score" in table:
        expected = probabilities @ np.arange(probabilities.shape[1])
        found |= {"predicted_score": expected.round(6), "score": table["score"]}
    return pd.DataFrame(found)
