"""How far a model's confidence is from its accuracy: for every task with one answer per sample."""

import torch
from torch import Tensor

BINS = 15


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = BINS) -> float:
    """Mean distance between confidence and accuracy over equally wide bins of confidence, weighted by their size.

    Args:
        confidence: (N,) the probability of the predicted class. correct: (N,) bool.

    Source: Guo et al. 2017, "On calibration of modern neural networks", equation 3.
    """
    index = (confidence.double() * bins).ceil().clamp(1, bins).long() - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, confidence.double() - correct.double())
    return (gap.abs().sum() / len(confidence)).item()
