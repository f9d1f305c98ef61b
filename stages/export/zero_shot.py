"""Zero-shot recognition: what the exported graph takes and gives, and what it is checked with."""

from pathlib import Path

import numpy as np
from torch import Tensor, nn

from data import zero_shot as data
from models.artifacts import Description

INPUT = "inputs"
OUTPUTS = ("logits", "embedding")
AXES = ("batch",)
FILES: dict[str, str] = {}
MEASURED = "validation images where the model has its encoder inside, else validation features"


class Graph(nn.Module):
    """images (B, channels, size, size) in [0, 1], or features (B, D) as they were prepared, to logits (B, classes) and
    embedding (B, width).

    It takes images where the network has its encoder inside. Normalisation of images and scaling of features are in it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        output = self.network(inputs)
        return output.logits, output.embedding


def inputs(prepared: Path, description: Description) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The validation split as the graph takes it, float32 (N, C, s, s) or (N, D), and what the metric compares with."""
    if description.network["encoder"] is None:
        _, features, labels = data.load(prepared, "validation")
        return {INPUT: features.numpy()}, labels.numpy()
    _, images, labels = data.load(prepared, "validation", "images")
    return {INPUT: data.to_unit(images).numpy()}, labels.numpy()


def answers(outputs: list[np.ndarray]) -> np.ndarray:
    """What the metric needs of the outputs: the class of every sample, (B,)."""
    found: np.ndarray = outputs[0].argmax(1)
    return found


def metric(found: np.ndarray, target: np.ndarray) -> float:
    """Top-1 over all classes, seen or not: the share of samples, not the mean of classes that evaluation gives."""
    return float((found == target).mean())
