"""Recognition: test images as every model sees them, with what it takes them for, and accuracy by class."""

from typing import TYPE_CHECKING, Any

from data import recognition as data
from stages import paths
from stages.parameters.shared import Dataset
from stages.report import pictures, samples, sections
from stages.report.page import Html, join, note, tag
from stages.report.results import Group, Metric, Model

if TYPE_CHECKING:
    from torch import Tensor

METRICS = {
    "top_1": Metric("top-1", True, "share of images whose class is found, in per cent"),
    "worst_class": Metric("worst class", True, "the same within the class where it is lowest"),
    "recall_at_1": Metric(
        "Recall@1", True, "share of images whose nearest other image is of their class; @K: one of the K nearest"
    ),
    "recall_at_2": Metric("Recall@2", True),
    "recall_at_4": Metric("Recall@4", True),
    "recall_at_8": Metric("Recall@8", True),
    "calibration_error": Metric("calibration error", True, "mean distance of confidence from accuracy, 0 is best"),
}

BESIDE = None
ANSWER = None
PARITY = METRICS["top_1"]

DISAGREED, OTHERS = 9, 3
SIDE = 96


def main_metric(dataset: Dataset) -> str:
    """The same of every data set."""
    return "top_1"


def relatives(model: Model) -> tuple[str, ...]:
    """The same of every model."""
    return ("alone", "kd")


def size(interface: dict[str, Any]) -> str:
    """Height and width of the image that goes in."""
    return f"{interface['resolution']}x{interface['resolution']}"


def figures(group: Group) -> list[tuple[str, Html]]:
    """Sections of this task."""
    by_class = sections.by_class(group, "accuracy", "samples", "Test accuracy in per cent.")
    return [("Test images", images(group)), ("Accuracy by class", by_class)]


def images(group: Group) -> Html:
    """Test images at the resolution of every model, with all predictions; first those where models disagree."""
    prepared = paths.prepared(group.task, group.dataset)
    models = [model for model in group.models if model.samples is not None and model.description is not None]
    if not models or not (prepared / "images.npy").is_file():
        return note(f"The images are not here ({prepared}) · run `dvc repro prepare@{group.dataset}`")
    tables = {model.name: samples.of_test(model) for model in models}
    chosen, disagreed = samples.choose(tables, DISAGREED, OTHERS)
    ids, pixels, labels = data.load(prepared, "test")
    place = {name: index for index, name in enumerate(ids)}
    chosen = [name for name in chosen if name in place]
    names = data.describe(prepared)["classes"]
    rows = [place[name] for name in chosen]
    unit = data.to_unit(pixels[rows])
    sides = sorted({_side(model) for model in models}, reverse=True)
    views = {side: data.downsample(unit, side) for side in sides}
    cards = []
    for index, name in enumerate(chosen):
        truth = names[int(labels[rows[index]])]
        shown = [_view(views[side][index], f"{name}, class {truth}, {side} by {side} pixels") for side in sides]
        found: list[tuple[Model, Any]] = [(model, tables[model.name].loc[name]) for model in models]
        opinions = [
            samples.opinion(group.short(model.name), row, names[int(row["prediction"])]) for model, row in found
        ]
        caption = tag("figcaption", "class ", tag("b", truth), f" · {name}")
        cards.append(tag("figure", tag("div", *shown, class_="views"), caption, tag("ul", *opinions), class_="sample"))
    seen = "; ".join(
        f"{side}x{side}: " + ", ".join(group.short(model.name) for model in models if _side(model) == side)
        for side in sides
    )
    said = (
        f"Models disagree on {disagreed:,} of {len(ids):,} test images: some right, some wrong. Here are up to "
        f"{DISAGREED} of these, then others, chosen by a digest of their names. Who sees which size: {seen}. Beside "
        "each class stands the model's confidence."
    )
    return join([tag("p", said, class_="small soft"), tag("div", *cards, class_="samples")])


def _side(model: Model) -> int:
    return int(model.description.interface["resolution"]) if model.description else 0


def _view(image: "Tensor", description: str) -> Html:
    """An image (C, H, W) in [0, 1], as many pixels as it has; the page enlarges them as squares."""
    picture = pictures.photograph((image * 255).round().byte().numpy())
    side = picture.width
    few = "pixels" if side <= SIDE else None
    return tag(
        "div",
        tag("img", src=pictures.source(picture), alt=description, width=SIDE, height=SIDE, class_=few),
        f"{side}\N{MULTIPLICATION SIGN}{side}",
    )
