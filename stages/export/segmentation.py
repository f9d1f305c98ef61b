"""Segmentation: what the exported graph takes and gives, and what it is checked with."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import segmentation as data
from models import segmentation as models
from models.artifacts import Description

INPUT = "images"
OUTPUTS = ("logits",)
AXES = ("batch",)
FILES: dict[str, str] = {}
MEASURED = "validation images"
# The most that is checked: images, and numbers in them (half a gigabyte).
IMAGES, NUMBERS = 256, 2**27


class Graph(nn.Module):
    """images (B, 3, H, W) in [0, 1] to logits (B, classes, H, W), for one H and W.

    Normalisation is inside, and so is the enlargement of the logits to the size of the images.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor]:
        height, width = images.shape[-2:]
        return (models.upsample(self.network(images).logits, (int(height), int(width))),)


def inputs(prepared: Path, description: Description) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The first images of the validation split as the graph takes them, float32 (N, 3, H, W), and their labels."""
    _, images, labels = data.load(prepared, "validation")
    some = max(1, min(IMAGES, NUMBERS // images[0].numel()))
    return {INPUT: data.to_unit(images[:some]).numpy()}, labels[:some].numpy()


def answers(outputs: list[np.ndarray]) -> np.ndarray:
    """What the metric needs of the outputs: the class of every pixel, (B, H, W) uint8."""
    return outputs[0].argmax(1).astype(np.uint8)


def metric(found: np.ndarray, target: np.ndarray) -> float:
    """mIoU."""
    classes = int(max(found.max(), target[target != data.IGNORE].max(initial=0))) + 1
    counts = models.confusion(torch.from_numpy(target), torch.from_numpy(found), classes, data.IGNORE)
    return models.mean_iou(counts.sum(0)).item()
