"""A student for zero-shot recognition behind `mlflow models serve`: images or features in, label names out.

MLflow copies this one file beside the ONNX file and runs it wherever the student is served, so it imports nothing of
the project that made it.

Request: `{"inputs": [SAMPLE, ...]}`. Where the student has its encoder inside, a SAMPLE is an image: a nested list of
pixels from 0 to 255, (H, W) of one channel, (C, H, W) in general, of exactly the size that the student was trained on.
Where it has none, a SAMPLE is a list of features, as many and as large as those it was trained on: not scaled.

Answer: `{"predictions": [{"label": ..., "probability": ..., "probabilities": {NAME: ..., ...}, "seen": ...}, ...]}`.
`seen` says whether samples of that class were trained on; where they were not, the student knows the class by its
description alone. What cannot be answered gets status 400, and a message that names the sample and says what is
expected.
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


class Student(PythonModel):
    """The artifacts are `onnx` (the network, with encoder and scaling inside) and `description` (model.json)."""

    def load_context(self, context: Any) -> None:
        """Read the files."""
        description = json.loads(Path(context.artifacts["description"]).read_text(encoding="utf-8"))
        self.classes: list[str] = description["interface"]["classes"]
        self.seen = set(description["interface"]["seen"])
        self.input: str = description["input"]["name"]
        self.shape: tuple[int, ...] = tuple(description["input"]["shape"][1:])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            context.artifacts["onnx"], options, providers=["CPUExecutionProvider"]
        )

    # The hint keeps MLflow from checking the request in its own words; lists, mappings and tables arrive here too.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> list[dict[str, Any]]:
        """An answer per sample.

        Args:
            model_input: the samples, or a mapping or a table whose one column `inputs` holds them.

        Raises:
            MlflowException: the request cannot be answered; status 400.
        """
        samples = self.samples(model_input)
        answers: list[dict[str, Any]] = []
        for start in range(0, len(samples), BATCH):
            logits = self.session.run(["logits"], {self.input: samples[start : start + BATCH]})[0].astype(np.float64)
            exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
            for row in exponentials / exponentials.sum(axis=1, keepdims=True):
                label = self.classes[int(row.argmax())]
                answers.append(
                    {
                        "label": label,
                        "probability": float(row.max()),
                        "probabilities": dict(zip(self.classes, row.tolist(), strict=True)),
                        "seen": label in self.seen,
                    }
                )
        return answers

    def samples(self, request: Any) -> np.ndarray:
        """(N, channels, size, size) float32 in [0, 1], or (N, D) float32."""
        if hasattr(request, "columns"):
            request = {name: request[name].tolist() for name in request.columns}
        if isinstance(request, dict):
            if list(request) != ["inputs"]:
                raise refusal(f"the request names {sorted(map(str, request))}; only 'inputs' is known")
            request = request["inputs"]
        if not isinstance(request, (list, tuple, np.ndarray)) or np.ndim(np.asarray(request, dtype=object)) == 0:
            raise refusal(f"a list of samples is expected, got {str(request)[:40]!r}")
        if len(request) == 0:
            raise refusal("the list of samples is empty")
        one = self.features if len(self.shape) == 1 else self.image
        return np.stack([one(sample, f"sample {index}") for index, sample in enumerate(request)])

    def image(self, pixels: Any, name: str) -> np.ndarray:
        """(channels, size, size) float32 in [0, 1] from one raw image."""
        wanted = f"an image {self.shape}" + f" or {self.shape[1:]}" * (self.shape[0] == 1) + " is expected"
        array = numbers(pixels, name, wanted)
        if array.ndim == 2 and self.shape[0] == 1:
            array = array[None]
        if array.shape != self.shape:
            raise refusal(f"{name} has shape {np.shape(pixels) or array.shape}; {wanted}")
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 255:
            raise refusal(f"{name} holds a pixel outside 0 to 255 (from {array.min():g} to {array.max():g})")
        if array.max() <= 1 and (array % 1 != 0).any():
            raise refusal(f"{name} holds pixels in [0, 1]; they are expected from 0 to 255")
        return (array / 255).astype(np.float32)

    def features(self, values: Any, name: str) -> np.ndarray:
        """(D,) float32 from one list of features."""
        (width,) = self.shape
        wanted = f"a list of {width} features is expected"
        array = numbers(values, name, wanted)
        if array.ndim != 1:
            raise refusal(f"{name} has shape {array.shape}; {wanted}")
        if len(array) != width:
            raise refusal(f"{name} has {len(array)} features; {wanted}")
        wrong = ~np.isfinite(array) | (array < 0) | (array > LARGEST)
        if wrong.any():
            place = int(wrong.argmax())
            raise refusal(f"feature {place} of {name} is {array[place]:g}; a finite number from 0 on is expected")
        return array.astype(np.float32)


def numbers(sample: Any, name: str, wanted: str) -> np.ndarray:
    """A sample as an array of float64."""
    try:
        array = np.asarray(sample)
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
