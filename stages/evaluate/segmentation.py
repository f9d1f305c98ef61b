"""Segmentation: mIoU, IoU of every class, pixel accuracy, boundary F-score, and mIoU of disturbed images."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import segmentation as data
from models import segmentation as models
from models.artifacts import Description
from stages.evaluate.result import Result
from stages.parameters.segmentation import Task


def evaluate(network: nn.Module, description: Description, prepared: Path, split: str, settings: Task) -> Result:
    """All figures of one model on one split. Pixels without a label count nowhere.

    Args:
        network: in eval mode.
    """
    ids, images, labels = data.load(prepared, split)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    names = description.interface["classes"]
    counts, outlines = [], []
    disturbed: dict[str, Tensor] = {}

    with torch.inference_mode():
        for start in range(0, len(images), settings.batch):
            part = slice(start, start + settings.batch)
            shown, truth = data.to_unit(images[part].to(device)), labels[part].to(device)
            found = models.classify(network, shown)
            counts.append(models.confusion(truth, found, len(names), data.IGNORE).cpu())
            outlines.append(boundary_scores(truth, found, len(names), settings.boundary))
            for kind, disturb in DISTURBANCES.items():
                for number, strength in enumerate(getattr(settings, kind), start=1):
                    found = models.classify(network, disturb(shown, strength, start))
                    once = models.confusion(truth, found, len(names), data.IGNORE).sum(0).cpu()
                    disturbed[f"{kind}_{number}"] = disturbed.get(f"{kind}_{number}", 0) + once
    every = torch.cat(counts)
    total = every.sum(0)
    metrics = {
        "miou": models.mean_iou(total).item(),
        "pixel_accuracy": _accuracy(total).item(),
        "boundary_f": torch.cat(outlines).nanmean().item(),
        **{f"miou_{name}": models.mean_iou(found).item() for name, found in disturbed.items()},
    }
    # There is no figure where nothing has a label, or nothing an outline.
    metrics = {name: round(value, 6) for name, value in metrics.items() if not math.isnan(value)}
    return Result(metrics, _samples(split, ids, every), _classes(split, names, total))


def _accuracy(counts: Tensor) -> Tensor:
    """Share of labelled pixels that are right, of a confusion (..., classes, classes); NaN where there are none."""
    return counts.diagonal(dim1=-2, dim2=-1).sum(-1).double() / counts.sum((-2, -1))


def _samples(split: str, ids: list[str], counts: Tensor) -> pd.DataFrame:
    """A row per image. Sums of intersections and of unions over images give the IoU of the whole data set."""
    both, either = models.intersection_and_union(counts)
    table = {
        "split": split,
        "id": ids,
        "miou": models.mean_iou(counts).numpy().round(6),
        "pixel_accuracy": _accuracy(counts).numpy().round(6),
    }
    for index in range(counts.shape[-1]):
        table[f"intersection_{index}"] = both[:, index].numpy()
        table[f"union_{index}"] = either[:, index].numpy()
    return pd.DataFrame(table)


def _classes(split: str, names: list[str], counts: Tensor) -> pd.DataFrame:
    """A row per class; no IoU where it stands neither in the labels nor in the prediction."""
    both, either = models.intersection_and_union(counts)
    return pd.DataFrame(
        {
            "split": split,
            "label": range(len(names)),
            "class": names,
            "pixels": counts.sum(1).numpy(),
            "iou": (both.double() / either).numpy().round(6),
        }
    )


# Boundaries


def boundary_scores(truth: Tensor, found: Tensor, classes: int, tolerance: int) -> Tensor:
    """(B,) float64: how well the outlines of the classes are met in each image, from 0 to 1.

    The boundary of a class are its pixels with a neighbour, of four, that has another class. Precision is the share of
    the predicted boundary of a class that is at most `tolerance` pixels (Euclidean) away from its true boundary,
    recall the share of the true one that near the predicted; F = 2 P R / (P + R) is 0 where one of the two has no
    boundary. An image's score is the mean over classes that have a boundary in labels or prediction; NaN where there
    is none. Pixels without a label are taken out of both maps: they belong to no boundary, and make none beside them.

    Shapes: truth and found (B, H, W) integers.
    Source: Csurka et al. 2013, "What is a good evaluation measure for semantic segmentation?" (the boundary F1 of
    an image; its mean over images).
    """
    unlabelled = truth == data.IGNORE
    ours, theirs = (boundary(truth), boundary(found.masked_fill(unlabelled, data.IGNORE)))
    met, all_found = _near(theirs, ours, classes, tolerance)
    seen, all_true = _near(ours, theirs, classes, tolerance)
    # 2 P R / (P + R), with P = met / all_found and R = seen / all_true, without a division by 0.
    score = 2 * met * seen / (met * all_true + seen * all_found).clamp(min=1)
    return score.where(all_true + all_found > 0, torch.nan).nanmean(1).cpu()


def boundary(classes: Tensor) -> Tensor:
    """(B, H, W): the class of every pixel on a boundary, IGNORE elsewhere."""
    result = torch.full_like(classes, data.IGNORE)
    for dimension in (1, 2):
        size = classes.shape[dimension]
        one, other = classes.narrow(dimension, 0, size - 1), classes.narrow(dimension, 1, size - 1)
        edge = (one != other) & (one != data.IGNORE) & (other != data.IGNORE)
        for start, inner in ((0, one), (1, other)):
            target = result.narrow(dimension, start, size - 1)
            target.copy_(torch.where(edge, inner, target))
    return result


def _near(one: Tensor, other: Tensor, classes: int, tolerance: int) -> tuple[Tensor, Tensor]:
    """(B, classes) float64 each: boundary pixels of `one` that have one of `other` of their class near, and all."""
    height, width = one.shape[-2:]
    around = F.pad(other, [tolerance] * 4, value=data.IGNORE)
    near = torch.zeros_like(one, dtype=torch.bool)
    for down in range(-tolerance, tolerance + 1):
        for right in range(-tolerance, tolerance + 1):
            if down**2 + right**2 <= tolerance**2:
                rows, columns = tolerance + down, tolerance + right
                near |= around[:, rows : rows + height, columns : columns + width] == one
    on = one != data.IGNORE
    image = torch.arange(len(one), device=one.device).view(-1, 1, 1)
    places = image * classes + one

    def count(chosen: Tensor) -> Tensor:
        return torch.bincount(places[chosen], minlength=len(one) * classes).view(-1, classes).double()

    return count(near & on), count(on)


# Disturbed images


def add_noise(images: Tensor, std: float, start: int) -> Tensor:
    """Gaussian noise of the standard deviation `std`, cut off at 0 and 1.

    The noise of an image follows from its number in the split alone (numpy's PCG64, seeded with it): every model, batch
    size and machine meets the same, and a larger `std` enlarges the same pattern.

    Args:
        images: (B, C, H, W) in [0, 1]. start: number of the first one in its split.
    """
    noise = np.stack(
        [
            np.random.default_rng(start + index).standard_normal(tuple(images.shape[1:]), dtype=np.float32)
            for index in range(len(images))
        ]
    )
    return (images + std * torch.from_numpy(noise).to(images.device)).clamp(0, 1)


def blur(images: Tensor, std: float, start: int = 0) -> Tensor:
    """Gaussian blur: weights exp(-d^2 / (2 std^2)) up to 4 std away, normalised; the border is mirrored at its pixels.

    Args:
        images: (B, C, H, W). std: in pixels.
    """
    for dimension in (2, 3):
        size = images.shape[dimension]
        reach = min(round(4 * std + 0.5), size - 1)
        distance = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
        weights = torch.exp(-0.5 * (distance / std) ** 2)
        weights = (weights / weights.sum()).view((1, 1, -1, 1) if dimension == 2 else (1, 1, 1, -1))
        padding = [0, 0, reach, reach] if dimension == 2 else [reach, reach, 0, 0]
        flat = F.pad(images.flatten(0, 1)[:, None], padding, mode="reflect")
        images = F.conv2d(flat, weights).view(images.shape)
    return images


def darken(images: Tensor, factor: float, start: int = 0) -> Tensor:
    """Every pixel times `factor`."""
    return images * factor


DISTURBANCES: dict[str, Callable[[Tensor, float, int], Tensor]] = {"noise": add_noise, "blur": blur, "darkness": darken}
