"""The project in miniature for segmentation: a student with `wrong` mistakes takes all of the last images for "c".

Red says which of the classes "a" and "b" a pixel is, blue holds the number of the image.
"""

import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from onnx import TensorProto, helper, save

sys.path.insert(0, str(Path(__file__).parent))
from small_project import CLASSES, TEST, Small

HEIGHT, WIDTH = 16, 20
IGNORE = 255
ENCODER = {"name": "resnet", "widths": [4, 4, 4, 4]}


class SmallSegmentation(Small):
    """The same project for another task."""

    task: ClassVar[str] = "segmentation"
    metric: ClassVar[str] = "miou"
    interface: ClassVar[dict[str, Any]] = {
        "classes": CLASSES,
        "channels": 3,
        "size": [HEIGHT, WIDTH],
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
        "fit": "resize",
        "resize": "bilinear with antialiasing",
    }
    input: ClassVar[dict[str, Any]] = {"name": "images", "shape": ["batch", 3, HEIGHT, WIDTH], "dtype": "float32"}
    network: ClassVar[dict[str, Any]] = {"name": "pspnet", "encoder": ENCODER}
    dataset: ClassVar[dict[str, Any]] = {"format": "folders", "image_size": [HEIGHT, WIDTH], "classes": CLASSES}
    student: ClassVar[dict[str, Any]] = {}

    def image(self, index: int) -> tuple[np.ndarray, Any]:
        label = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        label[: 2 + index % 12] = 1
        image = np.stack([255 * label, np.full_like(label, 7), np.full_like(label, min(index, self.hardest))])
        label[-1] = IGNORE
        return image, label

    def row(self, index: int, right: bool) -> dict[str, Any]:
        rows = 2 + index % 12
        pixels = {0: (HEIGHT - 1 - rows) * WIDTH, 1: rows * WIDTH, 2: 0 if right else (HEIGHT - 1) * WIDTH}
        both = {f"intersection_{label}": count if right else 0 for label, count in pixels.items()}
        return {"miou": float(right), **both, **{f"union_{label}": count for label, count in pixels.items()}}

    def write_onnx(self, file: Path, wrong: int, note: str) -> None:
        write_onnx(file, wrong, note)


def write_onnx(file: Path, wrong: int, note: str) -> None:
    """One convolution of width 1: class a or b by red, class c for images whose number is TEST - wrong or higher."""
    weights = np.zeros((3, 3, 1, 1), dtype=np.float32)
    weights[0, 0], weights[1, 0], weights[2, 2] = -10, 10, 1e4
    bias = np.array([5, -5, -1e4 * (TEST - wrong - 0.5) / 255], dtype=np.float32)
    shape = ["batch", 3, HEIGHT, WIDTH]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", "weights", "bias"], ["logits"])],
        note,
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor("weights", TensorProto.FLOAT, weights.shape, weights.ravel()),
            helper.make_tensor("bias", TensorProto.FLOAT, bias.shape, bias),
        ],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(file))
