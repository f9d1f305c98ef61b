"""Recognition: top-1, per-class accuracy, calibration; Recall@K of the embedding, MAP@R, NMI, pairs, a gallery."""

from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import recognition as data
from data.errors import UserError
from models.artifacts import Description, load_model
from stages import paths
from stages.evaluate import retrieval
from stages.evaluate.calibration import expected_calibration_error
from stages.evaluate.result import Result
from stages.neighbours import recall, same_class_rank
from stages.parameters.recognition import Task

RECALL_AT = (1, 2, 4, 8)
FALSE_ACCEPTS = (0.1, 0.01, 0.001)
# Of every sample, by their rows in the split.
NEIGHBOURS = 5


def evaluate(network: nn.Module, description: Description, prepared: Path, split: str, settings: Task) -> Result:
    """All figures of one model on one split.

    Where classes are held out, and of a model that knows no classes, `recall_at_1` and so on, `map_at_r` and `nmi`;
    else `top_1`, `worst_class`, `recall_at_1` and so on, and `calibration_error`. Where the data set has pairs of this
    split also `verification` and `verification_error` (its standard error over folds), `tar_at_far_0.1` and so on, and
    `rank_1`; for students that learnt the embeddings of their source `rank_1_by_source`, with the source's gallery, at
    its resolution. The table `resolutions` says what the main figure and `rank_1` are at each of
    `settings.resolutions`.

    Args:
        network: in eval mode; it is fed images at the resolution of its description.

    Raises:
        UserError: an answer is the nearest sample, and no class has two samples in the split.
    """
    dataset = data.describe(prepared)
    ids, images, labels = data.load(prepared, split)
    side, searched = description.interface["resolution"], data.retrieves(description.interface, dataset)
    if searched and labels.bincount().max() < 2:
        raise UserError(
            f"the {split} split of {prepared.name!r} has no two images of a class, so that none can find another "
            f"({prepared}) · hold out more: split.{split} of the data set"
        )
    logits, embeddings = _outputs(network, images, side, settings.batch)
    labels = labels.to(embeddings.device)
    samples = table(split, ids, labels, None if searched else logits, embeddings)
    ranks = torch.tensor(samples["same_class_rank"].to_numpy())
    classes = _by_class(samples, data.class_names(dataset), searched)
    if searched:
        metrics = _recall(ranks) | retrieval.clustering(embeddings, labels, settings.seed)
    else:
        confidence, correct = logits.softmax(1).amax(1).cpu(), torch.from_numpy(samples["correct"].to_numpy() == 1)
        metrics = {
            "top_1": correct.double().mean().item(),
            "worst_class": float(classes["accuracy"].min()),
            **_recall(ranks),
            "calibration_error": expected_calibration_error(confidence, correct),
        }
    pairs = data.pairs(prepared, split)
    if verified := len(pairs.same) > 0:
        metrics |= _verification(embeddings, labels, pairs)
        if (source := _source(description)) is not None:
            gallery = _outputs(source[0], images, source[1], settings.batch)[1]
            if (share := retrieval.rank_1(gallery, embeddings, labels)) is not None:
                metrics["rank_1_by_source"] = share
    further = {}
    if settings.resolutions:
        rows = []
        for resolution in settings.resolutions:
            if resolution > images.shape[-1]:
                continue
            few, seen = _outputs(network, images, side, settings.batch, resolution)
            found = {"split": split, "resolution": resolution}
            if searched:
                found["recall_at_1"] = recall(same_class_rank(seen, labels))
            else:
                found["top_1"] = (few.argmax(1) == labels).double().mean().item()
            if searched or verified:
                found["rank_1"] = retrieval.rank_1(embeddings, seen, labels)
            rows.append(found)
        if rows:
            further["resolutions"] = pd.DataFrame(rows).round(6)
    return Result({name: round(value, 6) for name, value in metrics.items()}, samples, classes, further)


def table(split: str, ids: list[str], labels: Tensor, logits: Tensor | None, embeddings: Tensor) -> pd.DataFrame:
    """A row per sample: what it is taken for, and what lies near it.

    `prediction` is the likeliest class; without logits that of the nearest other sample, and there is no `confidence`.
    `neighbours` are the nearest others by their rows in the split, the nearest first, with spaces between.

    Args:
        labels: (N,). logits: (N, classes). embeddings: (N, D) float32.
    """
    near = retrieval.nearest(embeddings, labels, NEIGHBOURS)
    if logits is None:
        prediction, confidence = labels[near[:, 0]], torch.full(labels.shape, float("nan"))
    else:
        confidence, prediction = logits.softmax(1).max(1)
    return pd.DataFrame(
        {
            "split": split,
            "id": ids,
            "label": labels.cpu().numpy(),
            "prediction": prediction.cpu().numpy(),
            "confidence": confidence.double().cpu().round(decimals=6).numpy(),
            "correct": (prediction == labels).int().cpu().numpy(),
            "same_class_rank": same_class_rank(embeddings, labels).cpu().numpy(),
            "neighbours": [" ".join(map(str, row)) for row in near.tolist()],
        }
    )


def _source(description: Description) -> tuple[nn.Module, int] | None:
    """The network whose embeddings a student learnt to give (order 1, without a projection), and its resolution.

    Source: HORKD card 6 (small probes, gallery of full resolution); that it is the source's is this project's choice.
    """
    recipe = description.recipe
    if recipe.get("method") != "horkd" or recipe["tap"] != "embedding" or "projection" in description.chosen:
        return None
    if not (recipe["weights"]["points"] or recipe["shares"]["points"]) or description.teacher is None:
        return None
    network, source = load_model(paths.trained("recognition", description.teacher["name"]))
    return network, source.interface["resolution"]


def _outputs(
    network: nn.Module, images: Tensor, side: int, batch: int, resolution: int | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and embeddings (N, D), float32.

    Args:
        images: (N, C, H, W) uint8. side: of what the network takes. resolution: that images are reduced to first.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device)
    logits, embeddings = [], []
    with torch.inference_mode():
        for part in images.split(batch):
            seen = data.to_unit(part.to(device))
            output = network(_brought_to(seen if resolution is None else data.downsample(seen, resolution), side))
            logits.append(output.logits.float())
            embeddings.append(output.embedding.float())
    return torch.cat(logits), torch.cat(embeddings)


def _brought_to(images: Tensor, side: int) -> Tensor:
    """Images (B, C, H, W) in [0, 1] as a network takes them: reduced as in training, or enlarged.

    Source: HORKD card 3.7 (resize_back) and 6 (a teacher applied to enlarged images), a decision of this project.
    """
    if side <= images.shape[-1]:
        return data.downsample(images, side)
    return F.interpolate(images, (side, side), mode="bicubic", align_corners=False).clamp(0, 1)


def _recall(ranks: Tensor) -> dict[str, float]:
    """Of (N,) ranks; nothing where no class has two samples."""
    return {f"recall_at_{k}": share for k in RECALL_AT if (share := recall(ranks, k)) is not None}


def _by_class(samples: pd.DataFrame, names: list[str], searched: bool) -> pd.DataFrame:
    """A row per class of the split; no accuracy where the others are searched, and there is no other."""
    asked = samples["same_class_rank"] > 0 if searched else samples["label"] >= 0
    grouped = samples.assign(correct=samples["correct"].where(asked)).groupby("label")["correct"]
    classes = pd.DataFrame(
        {
            "split": samples["split"].iloc[0],
            "samples": samples.groupby("label").size(),
            "accuracy": grouped.mean().round(6),
        }
    ).reset_index()
    classes.insert(1, "class", [names[label] for label in classes["label"]])
    return classes


def _verification(embeddings: Tensor, labels: Tensor, pairs: data.Pairs) -> dict[str, float]:
    """What can be said of pairs, and of a gallery."""
    unit = retrieval.cosine(embeddings).cpu()
    similarity = (unit[pairs.first] * unit[pairs.second]).sum(1).numpy()
    mean, error = retrieval.verification(similarity, pairs.same, pairs.fold)
    found = {"verification": mean, "verification_error": error}
    accepted = retrieval.true_accepts(embeddings, labels, FALSE_ACCEPTS)
    found |= {f"tar_at_far_{rate:g}": value for rate, value in zip(FALSE_ACCEPTS, accepted, strict=False)}
    identified = retrieval.rank_1(embeddings, embeddings, labels)
    return found if identified is None else {**found, "rank_1": identified}
