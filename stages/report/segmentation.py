"""Segmentation: test images as every model cuts them up, IoU by class, and mIoU on images that were made worse."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from data import segmentation as data
from data.errors import UserError
from data.files import digest
from models.artifacts import load_model
from stages import paths
from stages.report import charts, pictures, samples, sections
from stages.report.page import Html, join, note, tag
from stages.report.results import Group, Metric, Model

if TYPE_CHECKING:
    from torch import Tensor, nn

WORSE = {
    "noise": "standard deviation, of pixels in [0, 1]",
    "blur": "standard deviation, in pixels",
    "darkness": "what pixels are multiplied with",
}
LEVELS = (1, 2, 3)
METRICS = {
    "miou": Metric("mIoU", True, "intersection over union of truth and prediction, mean over classes, in per cent"),
    "pixel_accuracy": Metric("pixel accuracy", True, "share of labelled pixels whose class is found"),
    "boundary_f": Metric("boundary F", True, "F-score of the boundaries of classes, mean over classes and images"),
    **{f"miou_{kind}_{level}": Metric(f"{kind} {level}", True) for kind in WORSE for level in LEVELS},
}

BESIDE = None
ANSWER = None
PARITY = METRICS["miou"]

DIFFERENT, OTHERS = 4, 2
# Pixels across a picture on the page, and at most inside the file.
SHOWN, KEPT = 176, 352


def main_metric(group: Group) -> str:
    """The same of every data set."""
    return "miou"


def relatives(model: Model) -> tuple[str, ...]:
    """The same of every model."""
    return ("alone", "kd")


def size(interface: dict[str, Any]) -> str:
    """Height and width of the image that goes in."""
    height, width = interface["size"]
    return f"{height}x{width}"


def figures(group: Group) -> list[tuple[str, Html]]:
    """Sections of this task."""
    by_class = sections.by_class(group, "iou", "pixels", "Test IoU in per cent; a dash: neither there nor found.")
    return [("Test images", images(group)), ("IoU by class", by_class), ("Noise, blur and darkness", robustness(group))]


def images(group: Group) -> Html:
    """Test images, their truth, and what every model makes of them; first those where teacher and alone differ most."""
    prepared = paths.prepared(group.task, group.dataset)
    if not (prepared / "images.npy").is_file():
        return note(f"The images are not here ({prepared}) · run `dvc repro prepare@{group.dataset}`")
    loaded, missing = networks(group)
    tables = {model.name: samples.of_test(model) for model in group.models if model.samples is not None}
    ids, pixels, labels = data.load(prepared, "test")
    place = {name: index for index, name in enumerate(ids)}
    chosen = [name for name in choose(group, tables, ids) if name in place]
    rows = [place[name] for name in chosen]
    names = data.describe(prepared)["classes"]
    shown, truth = pixels[rows], labels[rows].numpy()
    maps = {name: predict(network, shown) for name, network in loaded.items()}
    cards = []
    for index, name in enumerate(chosen):
        image = shown[index].numpy()
        views = [
            _column(
                "image, truth",
                _view(pictures.photograph(image), f"{name}, as it is"),
                _view(pictures.class_map(truth[index], len(names)), f"{name}, its classes"),
            )
        ]
        for model, found in maps.items():
            who = group.short(model)
            wrong = pictures.error_map(image, truth[index], found[index], len(names))
            views.append(
                _column(
                    join([who, _figure(tables, model, name)]),
                    _view(pictures.class_map(found[index], len(names)), f"{name}, classes by {who}"),
                    _view(wrong, f"{name}, where {who} is wrong"),
                )
            )
        cards.append(tag("figure", tag("figcaption", name), tag("div", *views, class_="maps"), class_="sample"))
    swatches = (
        tag("li", tag("span", class_="swatch", style=f"background:{pictures.colour(label)}"), name)
        for label, name in enumerate(names)
    )
    said = (
        f"The first are up to {DIFFERENT} of {len(ids):,} test images where teacher and alone differ most in mIoU, the "
        f"others {OTHERS} by a digest of their names. Under each image stands the truth; under what a model says, "
        "where it is wrong. Beside its name: its mIoU on that image, in per cent. Pixels without a label are blank."
    )
    return join(
        [
            tag("p", said, class_="small soft"),
            *(note(line) for line in missing),
            tag("ul", *swatches, class_="legend"),
            tag("div", *cards, class_="scenes"),
        ]
    )


def networks(group: Group) -> tuple[dict[str, "nn.Module"], list[str]]:
    """Every model whose weights are here, and a sentence for each other."""
    loaded, missing = {}, []
    for model in group.models:
        try:
            loaded[model.name], _ = load_model(model.folder)
        except UserError as error:
            missing.append(f"Without {model.name}: {error}")
    return loaded, missing


def predict(network: "nn.Module", images: "Tensor") -> np.ndarray:
    """(N, H, W) the class of every pixel.

    Args:
        images: (N, 3, H, W) uint8.
    """
    import torch

    from models.segmentation import classify

    with torch.inference_mode():
        return np.concatenate([classify(network, data.to_unit(image[None])).numpy() for image in images])


def choose(group: Group, tables: dict[str, pd.DataFrame], ids: list[str]) -> list[str]:
    """Ids to show: first those where teacher and alone differ most in mIoU, then others in the order of a digest.

    That order looks random and is the same for ever.

    Args:
        tables: of each model, a row per test sample, by id, with the column `miou`.
    """
    order = sorted(ids, key=digest)
    teacher = next((model for model in group.models if model.role == "teacher" and model.name in tables), None)
    alone = next((model for model in group.models if model.method == "alone" and model.name in tables), None)
    first: list[str] = []
    if teacher and alone:
        gap = (tables[teacher.name]["miou"] - tables[alone.name]["miou"]).abs().reindex(order).dropna()
        first = gap[gap > 0].sort_values(ascending=False, kind="stable").index[:DIFFERENT].tolist()
    return first + [name for name in order if name not in first][: DIFFERENT + OTHERS - len(first)]


def robustness(group: Group) -> Html:
    """mIoU on the test split under noise, blur and darkness, a chart each, a line per model."""
    found = {}
    for kind in WORSE:
        names = ["miou", *(f"miou_{kind}_{level}" for level in LEVELS)]
        for number, model in enumerate(group.models):
            known = model.metrics["test"]
            if all(name in known for name in names):
                found[kind, number] = 100 * np.array([known[name] for name in names])
    if not found:
        return note(f"There are no figures on worse images · run `dvc repro evaluate@{group.task}`")
    scale = charts.linear(np.concatenate([np.zeros(1), *found.values()]))
    drawn = []
    for kind, meaning in WORSE.items():
        series = {
            number: (np.arange(len(LEVELS) + 1.0), found[key]) for key in found if key[0] == kind for number in key[1:]
        }
        if series:
            strengths = [f"{strength:g}" for strength in getattr(group.settings, kind)]
            ticks = [(float(place), text) for place, text in enumerate(["none", *strengths])]
            who = ", ".join(group.models[number].name for number in series)
            drawing = charts.lines(
                series, scale, charts.Axis(ticks, float(len(LEVELS)), kind), f"test mIoU under {kind}: {who}"
            )
            drawn.append(tag("figure", tag("figcaption", tag("b", kind), f": {meaning}"), drawing))
    said = "Test mIoU in per cent, by how much an image was worsened; `tasks` in params.yaml sets the strengths."
    return join(
        [
            charts.legend({number: group.models[number].name for _, number in found}),
            tag("div", *drawn, class_="charts"),
            tag("p", said, class_="small soft"),
        ]
    )


def _figure(tables: dict[str, pd.DataFrame], model: str, name: str) -> Html | None:
    """The mIoU of a model on one image."""
    if model not in tables or name not in tables[model].index:
        return None
    value: Any = tables[model].loc[name, "miou"]
    return None if pd.isna(value) else tag("b", f" {100 * value:.1f}")


def _column(caption: object, *views: Html) -> Html:
    return tag("div", *views, tag("span", caption))


def _view(picture: Any, description: str) -> Html:
    """A picture, reduced where the page could not show its pixels anyway."""
    from PIL import Image

    if picture.width > KEPT:
        kind = Image.Resampling.NEAREST if picture.mode == "P" else Image.Resampling.BOX
        picture = picture.resize((KEPT, max(1, round(KEPT * picture.height / picture.width))), kind)
    height = max(1, round(SHOWN * picture.height / picture.width))
    few = "pixels" if picture.width <= SHOWN else None
    return tag(
        "img", src=pictures.source(picture), alt=description, width=SHOWN, height=height, class_=few, loading="lazy"
    )
