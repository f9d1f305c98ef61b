"""Policies: a caller sends what was observed so far; a champion acts again where the tests are others now.

`pipelines.serving.policy` answers the caller.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from pipelines.gates import ONNX

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

FILES: dict[str, str] = {}
REQUIREMENTS: tuple[str, ...] = ()
TESTED = ("rollouts", "steps", "greedy", "seed")
REQUEST = (
    '{"inputs": [HISTORY, ...]}, a history being a list of raw observations, the newest last; or {"inputs": '
    '{"histories": [{"observations": HISTORY, "allowed": [true, ...], "greedy": false, "draw": 0.5}, ...]}}'
)


def signature(description: Mapping[str, Any]) -> "ModelSignature":
    """Request and answer, as MLflow writes them down.

    The request is an object of any shape: the served code checks it itself, and answers with status 400 where MLflow's
    own check of shapes would answer with 500, and would leave out without a word what it does not know.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Array

    answer = Schema(
        [
            ColSpec(Array(DataType.double), "action"),
            ColSpec("long", "expert"),
            ColSpec("double", "probability"),
            ColSpec(Array(DataType.double), "probabilities"),
        ]
    )
    return ModelSignature(Schema([TensorSpec(np.dtype("O"), (-1,), "histories")]), answer)


def example(description: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A request of one history that is of no data set: the mean of all observations, at the first step.

    Args:
        description: model.json of the export.
    """
    mean = description["interface"]["scaling"]["observation"]["mean"]
    return {"histories": np.array([[mean] * (description["network"]["goals"] + 1)])}


def evaluate(files: Path, description: Mapping[str, Any], prepared: Path) -> pd.DataFrame:
    """What `stages.evaluate` says of every rollout of the test split, with an ONNX file to act: a row per rollout.

    Args:
        files: the folder of a version's. description: its model.json. prepared: the data set of today.

    Raises:
        ValueError: the data set has no environment, or another than the one that the student was trained for.
    """
    import onnxruntime
    import torch

    from data import policy as data
    from models.artifacts import Description
    from models.policy import Decision
    from stages.evaluate import policy as evaluation
    from stages.parameters import load
    from stages.parameters.policy import Task

    today, known = json.loads((prepared / "dataset.json").read_text(encoding="utf-8")), description["interface"]
    name = today["environment"] and today["environment"]["name"]
    if name is None or name != known["environment"]:
        raise ValueError(f"the environment is {name} today, and the student acts in {known['environment']}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(files / ONNX), options, providers=["CPUExecutionProvider"])

    class Exported(torch.nn.Module):
        """The ONNX file in the place of the network that it was made of."""

        count = description["network"]["experts"]

        def step(self, observations: torch.Tensor, draw: torch.Tensor | None) -> Decision:
            rows = len(observations)
            fed = {
                "observations": observations.cpu().numpy(),
                "draw": np.full(rows, -1, np.float32) if draw is None else draw.cpu().numpy(),
                "allowed": np.ones((rows, self.count), dtype=bool),
            }
            return Decision(*map(torch.from_numpy, session.run(["action", "expert", "probability"], fed)))

    settings = cast(Task, load().tasks["policy"])
    told = Description(description["name"], "policy", "version", description["network"], known, {}, {}, None, [])
    place, seeds = data.environment(name), data.seeds("test", settings.rollouts)
    goals = evaluation.goals_of(prepared, "test", len(seeds), description["network"]["goals"])
    outcome = evaluation.roll_out(Exported().eval(), told, place, seeds, settings, goals=goals).outcome
    return evaluation.table("test", seeds, outcome, len(place.modes))
