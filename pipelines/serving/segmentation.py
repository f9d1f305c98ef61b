"""A student for segmentation behind `mlflow models serve`: raw images in, a class per pixel out.

MLflow copies this one file beside the ONNX file and runs it wherever the student is served, so it imports nothing of
the project that made it.

Request: `{"inputs": [IMAGE, ...]}`. An IMAGE is a nested list of pixels from 0 to 255 of shape (3, H, W): red, green,
blue. Images need not be of one size: each is brought to the student's as the images that it was trained and evaluated
on, and is answered at its own. That is bilinear with antialiasing; where the student's `fit` is `pad`, an image is only
reduced, with its proportions, and then filled up at the right and below.

Answer: `{"predictions": [{"labels": [[...], ...], "classes": [NAME, ...], "pixels": {NAME: COUNT, ...}}, ...]}`.
`labels` has the height and width of the image; a label is a place in `classes`, from 0. What cannot be answered gets
status 400, and a message that names the image and says what is expected.
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

BATCH = 8
SMALLEST_SIDE, LARGEST_SIDE = 16, 4096


class Student(PythonModel):
    """The artifacts are `onnx` (the network, with normalisation inside) and `description` (model.json)."""

    def load_context(self, context: Any) -> None:
        """Read the files."""
        description = json.loads(Path(context.artifacts["description"]).read_text(encoding="utf-8"))
        self.classes: list[str] = description["interface"]["classes"]
        self.channels: int = description["interface"]["channels"]
        height, width = description["interface"]["size"]
        self.size: tuple[int, int] = (height, width)
        self.fit: str = description["interface"]["fit"]
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
        answers: list[dict[str, Any]] = []
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            batch = np.stack([self.prepared(image) for image in part])
            for image, logits in zip(part, self.session.run(["logits"], {self.input: batch})[0], strict=True):
                height, width = self.inside(image)
                labels = best(logits[:, :height, :width], (image.shape[1], image.shape[2]))
                counts = np.bincount(labels.ravel(), minlength=len(self.classes)).tolist()
                pixels = dict(zip(self.classes, counts, strict=True))
                answers.append({"labels": labels.tolist(), "classes": self.classes, "pixels": pixels})
        return answers

    def prepared(self, image: np.ndarray) -> np.ndarray:
        """(channels, H, W) in [0, 1] at the student's size, as its data set was prepared."""
        height, width = self.inside(image)
        filled = np.zeros((self.channels, *self.size), dtype=np.float32)
        filled[:, :height, :width] = resize(image, (height, width)).clip(0, 1)
        return filled

    def inside(self, image: np.ndarray) -> tuple[int, int]:
        """Height and width of the part of the student's input, at its top left, that holds an image."""
        if self.fit == "resize":
            return self.size
        scale = min(self.size[0] / image.shape[1], self.size[1] / image.shape[2], 1.0)
        return max(round(image.shape[1] * scale), 1), max(round(image.shape[2] * scale), 1)

    def images(self, request: Any) -> list[np.ndarray]:
        """(channels, H, W) float32 in [0, 1] per image, each of its own size."""
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
        return [self.image(image, f"image {index}") for index, image in enumerate(request)]

    def image(self, pixels: Any, name: str) -> np.ndarray:
        """(channels, H, W) float32 in [0, 1] from one raw image."""
        wanted = f"expected ({self.channels}, H, W) with H and W from {SMALLEST_SIDE} to {LARGEST_SIDE}"
        try:
            array = np.asarray(pixels)
            if array.dtype == object:  # MLflow hands over nested lists so
                array = np.asarray(array.tolist())
        except (ValueError, TypeError, OverflowError):
            raise refusal(f"{name} has rows of different lengths; {wanted}") from None
        if array.dtype.kind not in "iuf":
            raise refusal(f"{name} holds something else than numbers ({array.dtype}); pixels are from 0 to 255")
        if array.ndim != 3 or array.shape[0] != self.channels:
            turned = array.ndim == 3 and array.shape[2] == self.channels
            hint = "; channels come first: (H, W, C) has to be turned" if turned else ""
            raise refusal(f"{name} has shape {np.shape(pixels) or array.shape}; {wanted}{hint}")
        if not SMALLEST_SIDE <= min(array.shape[1:]) <= max(array.shape[1:]) <= LARGEST_SIDE:
            raise refusal(f"{name} has shape {array.shape}; {wanted}")
        array = array.astype(np.float32)
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 255:
            raise refusal(f"{name} holds a pixel outside 0 to 255 (from {array.min():g} to {array.max():g})")
        if array.max() <= 1 and (array % 1 != 0).any():
            raise refusal(f"{name} holds pixels in [0, 1]; they are expected from 0 to 255")
        return np.asarray(array / 255, dtype=np.float32)


def best(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(height, width) the class with the highest of (classes, H, W) logits, resized to `size`.

    One class after the other, so that a large image with many classes stays in memory.
    """
    highest = np.full(size, -np.inf, dtype=np.float32)
    labels = np.zeros(size, dtype=np.int64)
    for label, map_ in enumerate(logits):
        resized = resize(map_, size)
        above = resized > highest
        highest[above], labels[above] = resized[above], label
    return labels


def resize(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(..., H, W) to (..., height, width), float32; what has that size already stays as it is."""
    if maps.shape[-2:] == size:
        return maps
    rows, columns = bilinear(maps.shape[-2], size[0]), bilinear(maps.shape[-1], size[1])
    return np.asarray(rows @ maps @ columns.T, dtype=np.float32)


def bilinear(before: int, after: int) -> np.ndarray:
    """(after, before) float32 weights that bring `before` pixels to `after`, as wide as a reduction asks.

    The same as Pillow's BILINEAR (up to its rounding to 8 bits), which data sets are prepared with, and as torch's
    `interpolate(mode="bilinear", antialias=True, align_corners=False)`; where pixels become more, that is plain
    bilinear.
    """
    scale = before / after
    reach = max(scale, 1.0)
    centre = scale * (np.arange(after) + 0.5)
    distance = np.abs(np.arange(before)[None, :] + 0.5 - centre[:, None]) / reach
    weights = np.clip(1 - distance, 0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)


def refusal(message: str) -> MlflowException:
    """A mistake of the caller's: status 400, no stack trace."""
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


set_model(Student())
