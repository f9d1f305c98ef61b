"""Recognition: top-1, per-class accuracy, Recall@K of the embedding, calibration."""

from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from data import recognition as data
from models.artifacts import Description
from stages.evaluate.calibration import expected_calibration_error
from stages.evaluate.result import Result
from stages.parameters.recognition import Task

RECALL_AT = (1, 2, 4, 8)


def evaluate(network: nn.Module, description: Description, prepared: Path, split: str, settings: Task) -> Result:
    """All figures of one model on one split.

    Args:
        network: in eval mode; it is fed images at the resolution of its description.
    """
    ids, images, labels = data.load(prepared, split)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device)
    logits, embeddings = [], []
    with torch.inference_mode():
        for part in images.split(settings.batch):
            small = data.downsample(data.to_unit(part.to(device)), description.interface["resolution"])
            output = network(small)
            logits.append(output.logits.float())
            embeddings.append(output.embedding.float())
        probabilities = torch.cat(logits).softmax(1)
        rank = same_class_rank(torch.cat(embeddings), labels.to(device)).cpu()
    confidence, prediction = (tensor.cpu() for tensor in probabilities.max(1))
    correct = prediction == labels
    names = description.interface["classes"]
    samples = pd.DataFrame(
        {
            "split": split,
            "id": ids,
            "label": labels.numpy(),
            "prediction": prediction.numpy(),
            "confidence": confidence.double().round(decimals=6).numpy(),
            "correct": correct.int().numpy(),
            "same_class_rank": rank.numpy(),
        }
    )
    grouped = samples.groupby("label")["correct"]
    classes = pd.DataFrame(
        {"split": split, "samples": grouped.size(), "accuracy": grouped.mean().round(6)}
    ).reset_index()
    classes.insert(1, "class", [names[label] for label in classes["label"]])
    comparable = rank[rank > 0]
    recall_at = RECALL_AT if len(comparable) else ()  # nobody can be found where every class has one sample
    metrics = {
        "top_1": correct.double().mean().item(),
        "worst_class": float(classes["accuracy"].min()),
        **{f"recall_at_{k}": (comparable <= k).double().mean().item() for k in recall_at},
        "calibration_error": expected_calibration_error(confidence, correct),
    }
    return Result({name: round(value, 6) for name, value in metrics.items()}, samples, classes)


def same_class_rank(embeddings: Tensor, labels: Tensor, chunk: int = 1024) -> Tensor:
    """(N,) int64: the place, from 1, of the nearest other sample of the same class among all other samples.

    0 where the class has no other sample. Neighbours by Euclidean distance, leave-one-out; among equals the other
    classes come first, so that embeddings that collapsed find nothing. Recall@K is the share of ranks <= K.

    Args:
        embeddings: (N, D). labels: (N,).
    """
    ranks = []
    for start in range(0, len(embeddings), chunk):
        rows = slice(start, start + chunk)
        distance = torch.cdist(embeddings[rows], embeddings, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(start, start + len(distance), device=distance.device)
        distance[torch.arange(len(distance)), own] = float("inf")
        same = labels[rows, None] == labels[None, :]
        same[torch.arange(len(distance)), own] = False
        nearest = distance.masked_fill(~same, float("inf")).amin(1, keepdim=True)
        closer = ((distance <= nearest) & ~same).sum(1)
        ranks.append(torch.where(same.any(1), closer + 1, 0))
    return torch.cat(ranks)
