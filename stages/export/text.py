"""Text: what the exported graph takes and gives, and what it is checked with."""

from pathlib import Path

import numpy as np
from torch import Tensor, nn

from data import text as data
from models.artifacts import Description

INPUT = "tokens"
OUTPUTS = ("logits",)
AXES = ("batch", "length")
FILES = {"tokenizer.json": "tokenizer_sha256"}
MEASURED = "validation texts, padded to their full length"


class Graph(nn.Module):
    """tokens (B, L) int64 to logits (B, classes), for any L up to the length that the network was built for.

    What is padding, and which of two texts a token belongs to, is found inside. Tokens are made outside, by the
    tokenizer that lies beside the graph.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        return (self.network(tokens).logits,)


def inputs(prepared: Path, description: Description) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The validation split as the graph takes it, int64 (N, length) padded, and what the metric compares with."""
    _, tokens, labels = data.load(prepared, "validation")
    return {INPUT: tokens.numpy()}, labels.numpy()


def answers(outputs: list[np.ndarray]) -> np.ndarray:
    """What the metric needs of the outputs: the class of every text, (B,)."""
    found: np.ndarray = outputs[0].argmax(1)
    return found


def metric(found: np.ndarray, target: np.ndarray) -> float:
    """Accuracy."""
    return float((found == target).mean())
