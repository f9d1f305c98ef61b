"""Recognition: what the exported graph takes and gives, and what it is checked with."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import recognition as data
from models.artifacts import Description
from stages.neighbours import recall, same_class_rank

INPUT = "images"
OUTPUTS = ("logits", "embedding")
AXES = ("batch",)
FILES: dict[str, str] = {}
MEASURED = "validation images"


class Graph(nn.Module):
    """images (B, channels, resolution, resolution) in [0, 1] to logits (B, classes) and embedding (B, width); of a
    network without classes, to the embedding alone.

    Normalisation is inside. Resizing is not: the student is made for cameras that deliver this resolution.

    Attributes:
        outputs: names of what it gives, in order.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.outputs = OUTPUTS if network.classifier is not None else OUTPUTS[1:]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output = self.network(images)
        return tuple(getattr(output, name) for name in self.outputs)


def inputs(prepared: Path, description: Description) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The validation split as the graph takes it, float32 (N, C, r, r), and what the metric compares with: labels (N,);
    (N, 1) of samples that are to find each other, as no class of the student is theirs.
    """
    _, images, labels = data.load(prepared, "validation")
    with torch.inference_mode():
        small = data.downsample(data.to_unit(images), description.interface["resolution"])
    searched = data.retrieves(description.interface, data.describe(prepared))
    return {INPUT: small.numpy()}, labels.numpy()[:, None] if searched else labels.numpy()


def answers(outputs: list[np.ndarray]) -> np.ndarray:
    """What the metric needs of the outputs, (B, 1 + width): the class, -1 without classes; and the embedding."""
    *logits, embedding = outputs
    found = logits[0].argmax(1) if logits else np.full(len(embedding), -1)
    return np.column_stack([found, embedding])


def metric(found: np.ndarray, target: np.ndarray) -> float:
    """Top-1, or, of samples that are to find each other, Recall@1, both as evaluation has them.

    Args:
        found: (N, 1 + width), see `answers`. target: (N,) or (N, 1) labels, see `inputs`.
    """
    if target.ndim == 1:
        return float((found[:, 0] == target).mean())
    return recall(same_class_rank(torch.from_numpy(found[:, 1:]), torch.from_numpy(target[:, 0]))) or 0.0
