"""Recognition: what models take test images for, or find near them; pairs; few pixels; accuracy by class."""

import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from data import recognition as data
from stages import paths
from stages.evaluate.recognition import FALSE_ACCEPTS, NEIGHBOURS
from stages.parameters import recognition as parameters
from stages.report import charts, pictures, samples, sections
from stages.report.comparison import NOTHING
from stages.report.page import Html, join, note, table, tag
from stages.report.results import TEACHER, Group, Metric, Model, further

if TYPE_CHECKING:
    import pandas as pd
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
    "map_at_r": Metric(
        "MAP@R", True, "mean average precision among as many neighbours as there are other images of the class"
    ),
    "nmi": Metric(
        "NMI", True, "normalised mutual information of the classes and as many clusters of embeddings, by k-means"
    ),
    "calibration_error": Metric("calibration error", True, "mean distance of confidence from accuracy, 0 is best"),
    "verification": Metric(
        "verification",
        True,
        "share of pairs of which it is told rightly whether both are of one class, by a threshold of the cosine that "
        "is best on the other folds",
    ),
    "verification_error": Metric("s.e.", True, "standard error of verification, over folds"),
    **{
        f"tar_at_far_{rate:g}": Metric(
            f"TAR@FAR {rate:g}",
            True,
            "share of all pairs of one class that are accepted where at most so many of the pairs of two classes are"
            if rate == FALSE_ACCEPTS[0]
            else "",
        )
        for rate in FALSE_ACCEPTS
    },
    "rank_1": Metric(
        "rank-1", True, "share of images that find their class in a gallery that holds the first image of each"
    ),
    "rank_1_by_source": Metric(
        "rank-1 by source",
        True,
        "the same, the gallery being embedded at full resolution by the network whose embeddings the student learnt",
    ),
}

BESIDE = None
ANSWER = None
PARITY = Metric("accuracy", True)

GALLERIES = ("rank_1", "rank_1_by_source")
DISAGREED, OTHERS = 9, 3
SIDE = 96
# Of nearest neighbours: how many queries where models disagree, and others; models at most; pixels at most.
QUERIES_DISAGREED, QUERIES_OTHERS = 6, 3
SEARCHERS = 4
FIRST = ("student", TEACHER, "baseline")
THUMBNAIL = 64


def main_metric(group: Group) -> str:
    """Recall@1 where classes are held out, or where a model knows none: then nothing else is asked of all."""
    return "top_1" if all("top_1" in model.metrics["test"] for model in group.models) else "recall_at_1"


def relatives(model: Model) -> tuple[str, ...]:
    """The same of every model."""
    return ("alone", "kd")


def size(interface: dict[str, Any]) -> str:
    """Height and width of the image that goes in."""
    return f"{interface['resolution']}x{interface['resolution']}"


def figures(group: Group) -> list[tuple[str, Html]]:
    """Sections of this task."""
    main = main_metric(group)
    shown = ("Test images", images(group)) if main == "top_1" else ("Nearest neighbours", neighbours(group))
    by_class = sections.by_class(group, "accuracy", "samples", _share(group, main))
    found = [
        shown,
        ("Verification", verification(group)),
        ("Accuracy against resolution", resolutions(group)),
        ("Accuracy by class", by_class),
    ]
    return [(title, part) for title, part in found if part is not None]


def _share(group: Group, main: str) -> str:
    if main == "top_1":
        return "Test accuracy in per cent."
    sure = [group.short(model.name) for model in group.models if "top_1" in model.metrics["test"]]
    return f"Test {METRICS[main].label} in per cent" + (f"; of {', '.join(sure)}: top-1." if sure else ".")


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


def neighbours(group: Group) -> Html:
    """Some test images as models see them, each with its nearest others; first those where models disagree."""
    prepared = paths.prepared(group.task, group.dataset)
    searchers = _searchers(group)
    if not searchers or not (prepared / "images.npy").is_file():
        return note(f"The images are not here ({prepared}) · run `dvc repro prepare@{group.dataset}`")
    # What counts here is the nearest neighbour, also of a model that knows classes.
    tables = {model.name: _by_neighbour(samples.of_test(model)) for model in searchers}
    chosen, disagreed = samples.choose(tables, QUERIES_DISAGREED, QUERIES_OTHERS)
    ids, pixels, labels = data.load(prepared, "test")
    place, truth = {name: index for index, name in enumerate(ids)}, labels.tolist()
    names = data.class_names(data.describe(prepared))
    cards = []
    for name in (name for name in chosen if name in place):
        parts: list[Html] = []
        for model in searchers:
            row, side = tables[model.name].loc[name], min(_side(model), THUMBNAIL)
            near = [int(other) for other in str(row["neighbours"]).split()]
            views = data.downsample(data.to_unit(pixels[[place[name], *near]]), side)
            own = truth[place[name]]
            strip = [_thumbnail(views[0], f"{name}, class {names[own]}", None)]
            for view, other in zip(views[1:], near, strict=True):
                strip.append(_thumbnail(view, f"{ids[other]}, class {names[truth[other]]}", truth[other] == own))
            parts.append(tag("ul", samples.opinion(group.short(model.name), row, names[truth[near[0]]])))
            parts.append(tag("div", *strip, class_="near"))
        caption = tag("figcaption", "class ", tag("b", names[truth[place[name]]]), f" · {name}")
        cards.append(tag("figure", caption, *parts, class_="sample"))
    sizes = ", ".join(f"{group.short(model.name)} {_side(model)}" for model in searchers)
    said = (
        f"Left a test image, beside it the {NEIGHBOURS} others whose embeddings are nearest, the nearest first: a "
        "check mark where the class is the same, a cross where it is not. A model answers with the class of the "
        f"nearest. These models disagree on {disagreed:,} of {len(ids):,} test images; here are up to "
        f"{QUERIES_DISAGREED} of these, then others, chosen by a digest of their names. Pixels that a model sees, on a "
        f"side: {sizes}."
    )
    left_out = [group.short(model.name) for model in group.models if model not in searchers]
    if left_out:
        said += f" Not shown: {', '.join(left_out)}."
    return join([tag("p", said, class_="small soft"), tag("div", *cards, class_="texts")])


def _by_neighbour(found: "pd.DataFrame") -> "pd.DataFrame":
    return found.assign(correct=(found["same_class_rank"] == 1).astype(int), confidence=float("nan"))


def _searchers(group: Group) -> list[Model]:
    """The first model of every role and method, of those whose neighbours are known; students and teachers first."""
    known = [model for model in group.models if model.description and "neighbours" in samples.of_test(model)]
    first = {(model.role, model.method): model for model in reversed(known)}.values()
    wanted = sorted(first, key=lambda model: (*(model.role != role for role in FIRST), known.index(model)))
    return sorted(wanted[:SEARCHERS], key=known.index)


def _thumbnail(image: "Tensor", description: str, right: bool | None) -> Html:
    """An image (C, H, W) in [0, 1], marked as right or wrong; None: neither."""
    picture = pictures.photograph((image * 255).round().byte().numpy())
    mark = None if right is None else tag("span", "\N{CHECK MARK}" if right else "\N{BALLOT X}")
    shown = tag("img", src=pictures.source(picture), alt=description, title=description)
    return tag("div", shown, mark, class_={None: None, True: "right", False: "wrong"}[right])


def verification(group: Group) -> Html | None:
    """Pairs of test images, and a gallery; None where the data set has no pairs of them."""
    names = [name for name in METRICS if name.startswith("tar_at_far_")]
    rows = []
    for model in group.models:
        known = model.metrics["test"]
        if "verification" in known:
            error = METRICS["verification_error"].show(known["verification_error"])
            mean = METRICS["verification"].show(known["verification"])
            shown = join([mean, " ", tag("span", f"\N{PLUS-MINUS SIGN}{error}", class_="error")])
            others = [METRICS[name].show(known[name]) if name in known else NOTHING for name in (*names, *GALLERIES)]
            side = f"{_side(model)}" if model.description else NOTHING
            rows.append([group.short(model.name), side, shown, *others])
    if not rows:
        return None
    asked = cast(parameters.Dataset, group.entry).verification
    folds = f"{asked.folds} folds" if asked else "folds"
    said = (
        "Are two images of one class? Test images, in per cent. Accuracy: mean over "
        f"{folds} of pairs \N{PLUS-MINUS SIGN} its standard error; the threshold of each fold is the best of the "
        "others. TAR: how many of all pairs of one class are accepted at the lowest threshold that accepts no more "
        "than that share of the pairs of two. Rank-1: a gallery holds the first image of every class, and all others "
        "are sought in it; `by source`: the gallery is embedded at full resolution by the network whose embeddings the "
        "student learnt."
    )
    headings = ["model", "pixels", "accuracy", *(name.rpartition("_")[2] for name in names), "rank-1", "by source"]
    bands = [("", 2), ("pairs", 1), ("TAR at FAR", len(names)), ("gallery", len(GALLERIES))]
    figures = table(headings, rows, numeric=range(1, len(headings)), bold=[2], rule=[2, 3, 3 + len(names)], bands=bands)
    return join([figures, tag("p", said, class_="small soft")])


def resolutions(group: Group) -> Html | None:
    """The figures of every model on test images that were reduced first; None where no such thing was measured."""
    found: dict[int, dict[str, dict[int, float]]] = {}
    for number, model in enumerate(group.models):
        whole = further(model, "resolutions")
        if whole is not None and (whole["split"] == "test").any():
            rows = whole[whole["split"] == "test"].sort_values("resolution")
            sides = rows["resolution"].tolist()
            found[number] = {name: dict(zip(sides, rows[name], strict=True)) for name in METRICS if name in rows}
    if not found:
        return None
    metrics = [name for name in METRICS if any(name in known for known in found.values())]
    sides = sorted({side for known in found.values() for values in known.values() for side in values})
    drawn = [
        _chart(name, {number: known[name] for number, known in found.items() if name in known}, sides, group)
        for name in metrics
    ]
    listed = []
    for number, known in found.items():
        model = group.models[number]
        every = [(METRICS[name], known.get(name, {}).get(side)) for name in metrics for side in sides]
        cells = [NOTHING if value is None else metric.show(value) for metric, value in every]
        listed.append([group.short(model.name), f"{_side(model)}" if model.description else NOTHING, *cells])
    headings = ["model", "pixels", *(side for _ in metrics for side in sides)]
    bands = [("", 2), *((METRICS[name].label, len(sides)) for name in metrics)]
    rule = range(2, len(headings), len(sides))
    said = (
        "Test images that were reduced to so many pixels on a side before they were brought to a model's own size: "
        "reduced further, or enlarged (bicubic), which is what a model of large images is left with where a camera "
        "gives few pixels. A ring is a model's own size."
    )
    if "rank_1" in metrics:
        said += (
            " Rank-1: what is sought is reduced; the gallery holds full images, each brought to the model's own size."
        )
    return join(
        [
            tag("p", said, class_="small soft"),
            charts.legend({number: group.models[number].name for number in found}),
            tag("div", *drawn, class_="charts"),
            table(headings, listed, numeric=range(1, len(headings)), rule=rule, bands=bands),
        ]
    )


def _chart(name: str, found: dict[int, dict[int, float]], sides: list[int], group: Group) -> Html:
    """One figure over resolutions, equal factors at equal distances.

    Args:
        found: by number of the model and resolution.
    """

    def place(side: int) -> float:
        return math.log2(side / sides[0])

    series, marks = {}, []
    for number, known in found.items():
        own = _side(group.models[number])
        series[number] = np.array([place(side) for side in known]), 100 * np.array(list(known.values()))
        marks += [charts.Mark(number, place(side), 100 * value, ring=side == own) for side, value in known.items()]
    # A ring is drawn last, so that no line runs through it.
    marks.sort(key=lambda mark: mark.ring)
    scale = charts.linear(np.concatenate([values for _, values in series.values()]))
    axis = charts.Axis([(place(side), str(side)) for side in sides], max(place(sides[-1]), 1.0), "pixels on a side")
    who = ", ".join(group.models[number].name for number in series)
    label = METRICS[name].label
    drawing = charts.lines(series, scale, axis, f"{label} against resolution: {who}", marks)
    return tag("figure", tag("figcaption", tag("b", label), ", test, in per cent"), drawing)


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
