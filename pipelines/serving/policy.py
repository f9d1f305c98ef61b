"""A policy behind `mlflow models serve`: what was observed so far in, what to do and whose idea that was out.

MLflow copies this one file beside the ONNX file and runs it wherever the student is served, so it imports nothing of
the project that made it.

Request: `{"inputs": [HISTORY, ...]}`. A HISTORY is a list of observations, the newest last: raw, as many as there were
since the episode began, but no more than the student's window. Goals come before them where the student is told any.
Histories need not be of one length. To say more than that, `{"inputs": {"histories": [SITUATION, ...]}}`, where a
SITUATION is a HISTORY or `{"observations": HISTORY, "allowed": [...], "greedy": ..., "draw": ...}`. All but the first
may be left out: `allowed` has true or false for every expert, at least one true, and the others' probability is shared
out; `greedy: true` takes the likeliest expert instead of drawing one by probability; `draw` is the number in [0, 1)
that is drawn, where the caller wants the same answers again. Without it the server draws, never the same again.

Answer: `{"predictions": [{"action": [...], "expert": ..., "probability": ..., "probabilities": [...]}, ...]}`. `action`
is raw; `expert` counts from 0, and `probability` is its own. What cannot be answered gets status 400, and a message
that names the history and says what is expected.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel

BATCH = 256
LARGEST = np.finfo(np.float32).max
KNOWN = ("observations", "allowed", "greedy", "draw")
LIKELIEST = -1.0  # what the graph takes for no draw at all


class Student(PythonModel):
    """The artifacts are `onnx` (the network, with scaling inside) and `description` (model.json)."""

    def load_context(self, context: Any) -> None:
        """Read the files, and begin a stream of random numbers that is this server's own."""
        description = json.loads(Path(context.artifacts["description"]).read_text(encoding="utf-8"))
        self.observations: int = description["interface"]["observations"]
        network = description["network"]
        self.goals: int = network["goals"]
        self.window: int = network["window"]
        self.experts: int = network["experts"]
        self.random = np.random.default_rng()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            context.artifacts["onnx"], options, providers=["CPUExecutionProvider"]
        )

    # The hint keeps MLflow from checking the request in its own words; lists, mappings and tables arrive here too.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> list[dict[str, Any]]:
        """An answer per history.

        Args:
            model_input: the histories, or a mapping or a table whose one column `histories` holds them.

        Raises:
            MlflowException: the request cannot be answered; status 400.
        """
        situations = self.situations(model_input)
        by_length: dict[int, list[int]] = {}
        for place, (history, _, _) in enumerate(situations):
            by_length.setdefault(len(history), []).append(place)
        answers: list[dict[str, Any]] = [{} for _ in situations]
        for places in by_length.values():
            for start in range(0, len(places), BATCH):
                part = places[start : start + BATCH]
                for place, answer in zip(part, self.decide([situations[place] for place in part]), strict=True):
                    answers[place] = answer
        return answers

    def decide(self, situations: list[tuple[np.ndarray, np.ndarray, float]]) -> list[dict[str, Any]]:
        """An answer for each of some situations whose histories have one length."""
        observations, allowed, draw = (np.stack(values) for values in zip(*situations, strict=True))
        fed = {"observations": observations, "draw": draw.astype(np.float32), "allowed": allowed}
        found = self.session.run(["action", "expert", "probability"], fed)
        return [
            {
                "action": action,
                "expert": expert,
                "probability": probabilities[expert],
                "probabilities": probabilities,
            }
            for action, expert, probabilities in zip(*(array.tolist() for array in found), strict=True)
        ]

    def situations(self, request: Any) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """Per history: what was observed (goals + steps, O) float32, which experts are allowed (K,), and the draw."""
        if hasattr(request, "columns"):
            request = {name: request[name].tolist() for name in request.columns}
        if isinstance(request, dict):
            if list(request) != ["histories"]:
                raise refusal(f"the request names {sorted(map(str, request))}; only 'histories' is known")
            request = request["histories"]
        if not isinstance(request, (list, tuple, np.ndarray)) or np.ndim(np.asarray(request, dtype=object)) == 0:
            raise refusal(f"a list of histories is expected, got {str(request)[:40]!r}")
        if len(request) == 0:
            raise refusal("the list of histories is empty")
        return [self.situation(one, f"history {index}") for index, one in enumerate(request)]

    def situation(self, told: Any, name: str) -> tuple[np.ndarray, np.ndarray, float]:
        """One of `situations`."""
        if isinstance(told, np.ndarray) and told.ndim == 0:  # so MLflow hands over a mapping among `instances`
            told = told.item()
        if not isinstance(told, dict):
            told = {"observations": told}
        if "observations" not in told or not set(told) <= set(KNOWN):
            raise refusal(f"{name} says {sorted(map(str, told))}; 'observations' is needed, {', '.join(KNOWN)} known")
        greedy, draw = told.get("greedy", False), told.get("draw")
        if not isinstance(greedy, (bool, np.bool_)):
            raise refusal(f"greedy of {name} is {str(greedy)[:40]!r}; true or false is expected")
        if draw is not None:
            if greedy:
                raise refusal(f"{name} has a draw, and is greedy; one of the two is expected")
            if isinstance(draw, bool) or not isinstance(draw, (int, float, np.number)) or not 0 <= draw < 1:
                raise refusal(f"draw of {name} is {str(draw)[:40]!r}; a number in [0, 1) is expected")
        else:
            draw = LIKELIEST if greedy else self.random.random()
        return self.history(told["observations"], name), self.allowed(told.get("allowed"), name), float(draw)

    def history(self, observations: Any, name: str) -> np.ndarray:
        """(goals + steps, O) float32."""
        least, most = self.goals + 1, self.goals + self.window
        wanted = f"from {least} to {most} observations of {self.observations} numbers each are expected"
        array = numbers(observations, name, wanted)
        if array.ndim != 2 or array.shape[1] != self.observations or not least <= len(array) <= most:
            raise refusal(f"{name} has shape {array.shape}; {wanted}")
        wrong = ~(np.abs(array) <= LARGEST)
        if wrong.any():
            step, value = np.argwhere(wrong)[0]
            raise refusal(f"number {value} of observation {step} of {name} is {array[step, value]:g}; a finite one is "
                          "expected")  # fmt: skip
        return array.astype(np.float32)

    def allowed(self, mask: Any, name: str) -> np.ndarray:
        """(K,) bool."""
        if mask is None:
            return np.ones(self.experts, dtype=bool)
        found = list(mask) if isinstance(mask, (list, tuple, np.ndarray)) else []
        if len(found) != self.experts or not all(isinstance(one, (bool, np.bool_)) for one in found):
            raise refusal(
                f"allowed of {name} is {str(mask)[:40]!r}; true or false for each of the {self.experts} experts is "
                "expected"
            )
        if not any(found):
            raise refusal(f"allowed of {name} leaves no expert; at least one true is expected")
        return np.array(found, dtype=bool)


def numbers(history: Any, name: str, wanted: str) -> np.ndarray:
    """A history as an array of float64."""
    try:
        array = np.asarray(history)
        if array.dtype == object:  # MLflow hands over nested lists so
            array = np.asarray(array.tolist())
    except (ValueError, TypeError, OverflowError):
        raise refusal(f"{name} has rows of different lengths; {wanted}") from None
    if array.dtype.kind not in "iuf":
        raise refusal(f"{name} holds something else than numbers ({array.dtype}); {wanted}")
    return array.astype(np.float64)


def refusal(message: str) -> MlflowException:
    """A mistake of the caller's: status 400, no stack trace."""
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


set_model(Student())
