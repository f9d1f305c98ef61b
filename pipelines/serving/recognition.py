"""A student for recognition behind `mlflow models serve`: raw images in, embeddings and label names out.

MLflow copies this one file beside the ONNX file and runs it wherever the student is served, so it imports nothing of
the project that made it.

Request: `{"inputs": [IMAGE, ...]}`. An IMAGE is a nested list of pixels from 0 to 255: (H, W) where the student takes
one channel, (C, H, W) in general. Images are square, of the student's resolution or larger, and need not be of one
size; larger ones are reduced as in training (bicubic with antialiasing, clamped).

Answer: `{"predictions": [ANSWER, ...]}`, an ANSWER being `{"embedding": [...], "label": ..., "probability": ...,
"probabilities": {NAME: ..., ...}, "logits": {NAME: ..., ...}}`; of a student that was trained without classes,
`{"embedding": [...]}`. Two images are alike where the angle between their embeddings is small. What cannot be answered
gets status 400, and a message that names the image and says what is expected.
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
LARGEST_SIDE = 4096


class Student(PythonModel):
    """The artifacts are `onnx` (the network, with normalisation inside) and `description` (model.json)."""

    def load_context(self, context: Any) -> None:
        """Read the files."""
        description = json.loads(Path(context.artifacts["description"]).read_text(encoding="utf-8"))
        self.classes: list[str] = description["interface"]["classes"]
        self.channels: int = description["interface"]["channels"]
        self.resolution: int = description["interface"]["resolution"]
        self.input: str = description["input"]["name"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            context.artifacts["onnx"], options, providers=["CPUExecutionProvider"]
        )

    # The hint keeps MLflow from checking the request in its own words; lists, mappings and tables arrive here too.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> list[dict[str, Any]]:
        """An answer per image.

        Args:
            model_input: the images, or a mapping or a table whose one column `images` holds them.

        Raises:
            MlflowException: the request cannot be answered; status 400.
        """
        images = self.images(model_input)
        names = ["embedding", "logits"] if self.classes else ["embedding"]
        answers: list[dict[str, Any]] = []
        for start in range(0, len(images), BATCH):
            embedding, *logits = self.session.run(names, {self.input: images[start : start + BATCH]})
            found = [{"embedding": row} for row in embedding.tolist()]
            if logits:
                found = [{**one, **self.named(row)} for one, row in zip(found, *logits, strict=True)]
            answers.extend(found)
        return answers

    def named(self, logits: np.ndarray) -> dict[str, Any]:
        """What the logits (classes,) of one image say, by the names of the classes."""
        exponentials = np.exp(logits.astype(np.float64) - logits.max())
        probabilities = exponentials / exponentials.sum()
        best = int(probabilities.argmax())
        return {
            "label": self.classes[best],
            "probability": float(probabilities[best]),
            "probabilities": dict(zip(self.classes, probabilities.tolist(), strict=True)),
            "logits": dict(zip(self.classes, logits.tolist(), strict=True)),
        }

    def images(self, request: Any) -> np.ndarray:
        """(N, channels, resolution, resolution) float32 in [0, 1]."""
        if hasattr(request, "columns"):
            request = {name: request[name].tolist() for name in request.columns}
        if isinstance(request, dict):
            if list(request) != ["images"]:
                raise refusal(f"the request names {sorted(map(str, request))}; only 'images' is known")
            request = request["images"]
        if not isinstance(request, (list, tuple, np.ndarray)) or np.ndim(np.asarray(request, dtype=object)) == 0:
            raise refusal(f"a list of images is expected, got {str(request)[:40]!r}")
        if len(request) == 0:
            raise refusal("the list of images is empty")
        return np.stack([self.image(image, f"image {index}") for index, image in enumerate(request)])

    def image(self, pixels: Any, name: str) -> np.ndarray:
        """(channels, resolution, resolution) float32 in [0, 1] from one raw image."""
        side = self.resolution
        shape = f"({self.channels}, H, W)" + " or (H, W)" * (self.channels == 1)
        wanted = f"expected {shape} with H = W, at least {side} and at most {LARGEST_SIDE}"
        try:
            array = np.asarray(pixels)
            if array.dtype == object:  # MLflow hands over nested lists so
                array = np.asarray(array.tolist())
        except (ValueError, TypeError, OverflowError):
            raise refusal(f"{name} has rows of different lengths; {wanted}") from None
        if array.dtype.kind not in "iuf":
            raise refusal(f"{name} holds something else than numbers ({array.dtype}); pixels are from 0 to 255")
        if array.ndim == 2 and self.channels == 1:
            array = array[None]
        if array.ndim != 3 or array.shape[0] != self.channels or array.shape[1] != array.shape[2]:
            raise refusal(f"{name} has shape {np.shape(pixels) or array.shape}; {wanted}")
        if not side <= array.shape[1] <= LARGEST_SIDE:
            raise refusal(f"{name} has shape {array.shape}; {wanted}")
        array = array.astype(np.float64)
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 255:
            raise refusal(f"{name} holds a pixel outside 0 to 255 (from {array.min():g} to {array.max():g})")
        if array.max() <= 1 and (array % 1 != 0).any():
            raise refusal(f"{name} holds pixels in [0, 1]; they are expected from 0 to 255")
        unit = (array / 255).astype(np.float32)
        if array.shape[1] == side:
            return unit
        weights = bicubic(array.shape[1], side)
        return np.clip(weights @ unit @ weights.T, 0, 1).astype(np.float32)


def bicubic(before: int, after: int) -> np.ndarray:
    """(after, before) weights that reduce `before` pixels to `after`: cubic (a = -0.5), as wide as the reduction asks.

    The same as torch's `interpolate(mode="bicubic", antialias=True, align_corners=False)`, which the student was
    trained behind.
    """
    scale = before / after
    centre = scale * (np.arange(after) + 0.5)
    first = np.maximum((centre - 2 * scale + 0.5).astype(int), 0)
    last = np.minimum((centre + 2 * scale + 0.5).astype(int), before)
    places = np.arange(before)
    distance = np.abs((places[None, :] - centre[:, None] + 0.5) / scale)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    weights[(places[None, :] < first[:, None]) | (places[None, :] >= last[:, None])] = 0
    return weights / weights.sum(axis=1, keepdims=True)


def refusal(message: str) -> MlflowException:
    """A mistake of the caller's: status 400, no stack trace."""
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


set_model(Student())
