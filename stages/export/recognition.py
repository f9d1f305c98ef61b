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

CHUNK = 1024  # rows of distances at a time


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
    """The validation split as the graph takes it, float32 (N, C, r, r), and what the metric compares with."""
    _, images, labels = data.load(prepared, "validation")
    with torch.inference_mode():
        small = data.downsample(data.to_unit(images), description.interface["resolution"])
    return {INPUT: small.numpy()}, labels.numpy()


def answers(outputs: list[np.ndarray]) -> np.ndarray:
    """What the metric needs of the outputs: classes (B,); without classes embeddings (B, width)."""
    first, *others = outputs
    found: np.ndarray = first.argmax(1) if others else first
    return found


def metric(found: np.ndarray, target: np.ndarray) -> float:
    """Top-1; of embeddings Recall@1, as evaluation has it: the share of images whose nearest other one is of their
    class, of those whose class has another. Among equals the other classes come first.

    Args:
        found: (N,) classes or (N, width) embeddings. target: (N,) labels.
    """
    if found.ndim == 1:
        return float((found == target).mean())
    points, labels = torch.from_numpy(found), torch.from_numpy(target)
    asked = hit = 0
    for start in range(0, len(points), CHUNK):
        rows = torch.arange(start, min(start + CHUNK, len(points)))
        # Without a matrix product: what it rounds away would decide between near neighbours.
        distance = torch.cdist(points[rows], points, compute_mode="donot_use_mm_for_euclid_dist")
        distance[torch.arange(len(rows)), rows] = torch.inf
        same = labels[rows, None] == labels
        near, far = (distance.masked_fill(~mask, torch.inf).amin(1) for mask in (same, ~same))
        asked += int((same.sum(1) > 1).sum())
        hit += int((near < far).sum())
    return hit / asked if asked else 0.0
