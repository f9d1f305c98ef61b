"""Recognition: what the exported graph takes and gives, and what it is checked with."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import recognition as data
from models.artifacts import Description

INPUT = "images"
OUTPUTS = ("logits", "embedding")
AXES = ("batch",)
FILES: dict[str, str] = {}
MEASURED = "validation images"


class Graph(nn.Module):
    """images (B, channels, resolution, resolution) in [0, 1] to logits (B, classes) and embedding (B, width).

    Normalisation is inside. Resizing is not: the student is made for cameras that deliver this resolution.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output = self.network(images)
        return output.logits, output.embedding


def inputs(prepared: Path, description: Description) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The validation split as the graph takes it, float32 (N, C, r, r), and what the metric compares with."""
    _, images, labels = data.load(prepared, "validation")
    with torch.inference_mode():
        small = data.downsample(data.to_unit(images), description.interface["resolution"])
    return {INPUT: small.numpy()}, labels.numpy()


def answers(outputs: list[np.ndarray]) -> np.ndarray:
    """What the metric needs of the outputs: the class of every image, (B,)."""
    found: np.ndarray = outputs[0].argmax(1)
    return found


def metric(found: np.ndarray, target: np.ndarray) -> float:
    """Top-1."""
    return float((found == target).mean())
