"""Zero-shot recognition: seen against unseen, which epoch was kept, real and synthesised features, images, classes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from data import zero_shot as data
from data.errors import UserError
from models.artifacts import DESCRIPTION, load_model
from stages import paths
from stages.evaluate.zero_shot import ADDED, SEEN, UNSEEN, trade_off
from stages.report import charts, pictures, samples, sections
from stages.report.comparison import NOTHING
from stages.report.page import Html, join, note, table, tag
from stages.report.results import ENCODER, LAST_EPOCH, SPLITS, TEACHER, Group, Metric, Model

if TYPE_CHECKING:
    from models.zero_shot import MLP, Generator

METRICS = {
    "harmonic_mean": Metric("H", True, "harmonic mean of S and U, 0 where the answer can only be a seen class"),
    "seen": Metric("S", True, "accuracy on samples of seen classes, mean over classes; any class may be the answer"),
    "unseen": Metric("U", True, "the same of unseen classes; on validation, of those held out to stand for them"),
    "unseen_only": Metric("T1", True, "the same if only unseen classes of that split may be the answer"),
    "area": Metric("AUSUC", False, "area under S against U over all handicaps of the seen classes"),
    "calibrated_harmonic_mean": Metric("calibrated H", True, "after the handicap, as S and U beside it"),
    "calibrated_seen": Metric("calibrated S", True),
    "calibrated_unseen": Metric("calibrated U", True),
    "handicap": Metric("handicap", False, "taken off the logits of seen classes; chosen on validation, used on both"),
    "detection": Metric(
        "AUROC",
        False,
        "how often the largest log-probability among seen classes is higher on a seen than on an unseen sample",
    ),
}
BESIDE = None
ANSWER = None
PARITY = Metric("accuracy", True)

TEST_BEST = "test_best_harmonic_mean"
DISAGREED, OTHERS = 9, 3
SIDE = 96
# Synthesised samples of a class that means are taken of; points of a kind, and classes, that are shown.
SYNTHESISED, POINTS, PANELS = 300, 50, 12


def main_metric(group: Group) -> str:
    """Images are there for an encoder, which only learns the seen classes."""
    return "seen" if getattr(group.entry, "format", None) == "renderings" else "harmonic_mean"


def relatives(model: Model) -> tuple[str, ...]:
    """The closed form, and the generator alone. A model that knows the seen classes only is compared with neither."""
    if model.role in (TEACHER, ENCODER):
        return ()
    recipe = model.description.recipe if model.description else {}
    generator = (recipe.get("generator") or {}).get("name")
    return ("eszsl", generator) if generator else ("eszsl",)


def size(interface: dict[str, Any]) -> str:
    """Height and width of an image, also where features are made of it first; or the number of features."""
    side = (interface["images"] or {}).get("size")
    return f"{side}x{side}" if side else f"{interface['features']} features"


def figures(group: Group) -> list[tuple[str, Html]]:
    """Sections of this task."""
    found = [
        ("Seen against unseen", seen_against_unseen(group)),
        ("Which epoch", epochs(group)),
        ("Real and synthesised features", features(group)),
        ("Test images", None if group.encodes else images(group)),
        ("Accuracy by class", accuracy_by_class(group)),
    ]
    return [(title, part) for title, part in found if part is not None]


# Seen against unseen


def seen_against_unseen(group: Group) -> Html | None:
    """Both accuracies on the test split, under every handicap; None where no model answers with unseen classes."""
    series, marks, rows = {}, [], []
    for number, model in enumerate(group.models):
        known = model.metrics["test"]
        if not _answers_unseen(model):
            continue
        for kind, ring in (("", False), ("calibrated_", True)):
            place, value = (100 * known[f"{kind}{name}"] for name in ("unseen", "seen"))
            marks.append(charts.Mark(number, place, value, ring))
        if model.samples is not None:
            curve = trade_off(model.samples[model.samples["split"] == "test"])
            kept = np.unique(np.linspace(0, len(curve.seen) - 1, charts.POINTS).round().astype(int))
            series[number] = (100 * curve.unseen[kept], 100 * curve.seen[kept])
        names = ("seen", "unseen", "harmonic_mean")
        shown = [METRICS[name].show(known[f"{kind}{name}"]) for kind in ("", "calibrated_") for name in names]
        rows.append([group.short(model.name), *shown, f"{known['handicap']:+.3f}"])
    if not rows:
        return None
    ticks = [(float(place), str(place)) for place in range(0, 101, 20)]
    scale = charts.linear(np.array([0.0, 100.0]))
    who = ", ".join(group.models[number].name for number in series)
    drawing = charts.lines(
        series,
        scale,
        charts.Axis(ticks, 100.0, "U, on unseen classes"),
        f"accuracy on seen against accuracy on unseen test classes, per handicap: {who}",
        marks,
    )
    said = (
        "The less the seen classes are trusted, the further down and to the right a model stands: a handicap is taken "
        "off their logits, and every handicap is a point of its curve. The dot is the model as it is, the ring the "
        "handicap with the highest H on the validation split. What is exported has no handicap."
    )
    compared = table(
        ["model", "S", "U", "H", "S", "U", "H", "handicap"],
        rows,
        numeric=range(1, 8),
        bold=[3, 6],
        rule=[1, 4],
        bands=[("", 1), ("test, as it is", 3), ("test, calibrated on validation", 4)],
    )
    figure = tag(
        "figure",
        tag("figcaption", tag("b", "S"), ", accuracy on seen test classes, against U, on unseen ones; in per cent"),
        drawing,
    )
    return join(
        [
            tag("p", said, class_="small soft"),
            charts.legend({number: group.models[number].name for number in series}),
            tag("div", tag("div", figure, class_="charts large"), compared, class_="side"),
        ]
    )


# Epochs


def epochs(group: Group) -> Html | None:
    """What selection on the validation split kept, the last epoch, and the best on the test split; None where nothing
    was selected.
    """
    last = {model.name.partition(".")[0]: model for model in group.models if model.role == LAST_EPOCH}
    rows = []
    for model in group.models:
        best = model.metrics["test"].get(TEST_BEST)
        if "." in model.name or (best is None and model.name not in last):
            continue
        kept = [_harmonic(model, split) for split in SPLITS]
        ended = [_harmonic(last[model.name], split) if model.name in last else "the same" for split in SPLITS]
        rows.append([model.name, *kept, *ended, NOTHING if best is None else METRICS["harmonic_mean"].show(best)])
    if not rows:
        return None
    return join(
        [
            table(
                ["model", "validation H", "test H", "validation H", "test H", "test H"],
                rows,
                numeric=range(1, 6),
                bold=[2],
                rule=[1, 3, 5],
                bands=[
                    ("", 1),
                    ("selected on validation: the student", 2),
                    ("last epoch", 2),
                    ("best on test: not to be used", 1),
                ],
            ),
            tag(
                "p",
                "The student is the epoch that was best on the validation split. The last column picks among the same "
                "epochs by the test split itself: it says how much that would flatter, it is no result, and nothing "
                "was selected by it.",
                class_="small soft",
            ),
        ]
    )


def _harmonic(model: Model, split: str) -> str:
    found = model.metrics[split].get("harmonic_mean")
    return NOTHING if found is None else METRICS["harmonic_mean"].show(found)


# Real and synthesised features


@dataclass(frozen=True)
class Clouds:
    """Scaled features of unseen test classes, real ones and those a generator makes of the classes' attributes.

    Attributes:
        classes: their names. real, synthesised: (N, D) of each.
    """

    classes: list[str]
    real: list[np.ndarray]
    synthesised: list[np.ndarray]

    @property
    def distances(self) -> np.ndarray:
        """(classes, classes) Euclidean, from the mean of what is synthesised of a class (row) to the real means."""
        ours, theirs = (np.array([points.mean(axis=0) for points in kind]) for kind in (self.synthesised, self.real))
        return np.linalg.norm(ours[:, None] - theirs, axis=2)

    @property
    def spreads(self) -> np.ndarray:
        """(classes,) root mean square distance of the real features of a class from their mean."""
        return np.array([np.sqrt(((points - points.mean(axis=0)) ** 2).sum(axis=1).mean()) for points in self.real])


def features(group: Group) -> Html | None:
    """Of every student with a generator of its own; None where there is none."""
    parts: list[object] = []
    for model in group.models:
        folder = paths.companions(group.task, model.name) / "generator"
        # Classes that were added later came by the generator of the student they were added to.
        if "." in model.name or model.method == "extended" or not (folder / DESCRIPTION).is_file():
            continue
        try:
            clouds = read_clouds(group, model)
        except (UserError, FileNotFoundError) as error:
            parts.append(note(f"Without the features of {model.name}: {error}"))
            continue
        parts += [tag("h4", model.name), _clouds(clouds, model.name)]
    if not parts:
        return None
    said = (
        "Every unseen class of the test split: its real features (dots), never used in training, and what the "
        "generator makes of its attributes (crosses), scaled as the student scales them; in grey, the real features of "
        "the other classes. All panels of a model share two axes, the principal components of all points that are "
        "shown. The line joins the two means. Beside the name of a class stands their distance, in all dimensions, as "
        "a multiple of the spread of its real features (root mean square distance from their mean)."
    )
    return join([tag("p", said, class_="small soft"), *parts])


def read_clouds(group: Group, model: Model) -> Clouds:
    """What a student's scaling and its generator make of the unseen test classes; the noise is that of a fixed seed.

    Raises:
        UserError: a model is not there. FileNotFoundError: the prepared data are not.
    """
    import torch

    prepared = paths.prepared(group.task, group.dataset)
    about = data.describe(prepared)
    student, _ = load_model(model.folder)
    generator, _ = load_model(paths.companions(group.task, model.name) / "generator")
    _, inputs, labels = data.load(prepared, "test")
    unseen = [label for label, role in enumerate(about["roles"]) if role == UNSEEN["test"] and (labels == label).any()]
    width = cast("Generator", generator).noise
    with torch.inference_mode():
        scaled = cast("MLP", student).scale(inputs)
        made = []
        for label in unseen:
            noise = torch.randn(SYNTHESISED, width, generator=torch.Generator().manual_seed(label))
            made.append(generator(noise, torch.full((SYNTHESISED,), label)).double().numpy())
    real = [scaled[labels == label].double().numpy() for label in unseen]
    return Clouds([about["classes"][label] for label in unseen], real, made)


def _clouds(clouds: Clouds, name: str) -> Html:
    """A panel per class, the nearest means first; of many classes the two ends of that order."""
    distances = clouds.distances
    away = distances.diagonal() / np.maximum(clouds.spreads, np.finfo(float).tiny)
    own = distances.argmin(axis=1)
    order = np.argsort(away, kind="stable")
    shown = order if len(order) <= PANELS else np.concatenate([order[: PANELS // 2], order[-PANELS // 2 :]])
    pairs = [(clouds.real[index][:POINTS], clouds.synthesised[index][:POINTS]) for index in shown]
    axes, middle, share = principal_components(np.concatenate([points for pair in pairs for points in pair]))
    drawn = []
    for index, pair in zip(shown, pairs, strict=True):
        dots, crosses = ((points - middle) @ axes for points in pair)
        start, end = ((kind[index].mean(axis=0) - middle) @ axes for kind in (clouds.real, clouds.synthesised))
        what = f"{name}: real and synthesised features of {clouds.classes[index]}"
        drawn.append(charts.Cloud(dots, crosses, (start, end), what))
    panels = []
    for index, drawing in zip(shown, charts.clouds(drawn, f"clouds-{name}"), strict=True):
        caption = [tag("b", clouds.classes[index]), f" {away[index]:.2f}"]
        if own[index] != index:
            caption.append(tag("span", f" nearer to {clouds.classes[own[index]]}", class_="wrong"))
        panels.append(tag("figure", drawing, tag("figcaption", *caption)))
    right = int((own == np.arange(len(own))).sum())
    said = (
        f"For {right} of {len(own)} unseen classes, the mean of what is synthesised is nearer to the class's own real "
        f"mean than to any other's. The two are {np.median(away):.2f} spreads apart in the median, {away.min():.2f} to "
        f"{away.max():.2f}. The axes hold {100 * share:.0f} % of the variance."
    )
    if len(shown) < len(order):
        said += f" Shown are the {PANELS // 2} nearest and the {PANELS // 2} farthest."
    return join([tag("p", said), tag("div", *panels, class_="clouds")])


def principal_components(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(D, 2) orthonormal axes of the largest variance, (D,) the mean, and their share of the variance.

    The largest entry of each axis is positive, so that a map does not flip from one machine to another.

    Args:
        points: (N, D), N at least 2.
    """
    middle = points.mean(axis=0)
    _, values, rows = np.linalg.svd(points - middle, full_matrices=False)
    axes = np.zeros((points.shape[1], 2))
    for column, row in enumerate(rows[:2]):
        axes[:, column] = row * np.sign(row[np.abs(row).argmax()])
    total = (values**2).sum()
    return axes, middle, float((values[:2] ** 2).sum() / total) if total > 0 else 1.0


# Images and classes


def images(group: Group) -> Html | None:
    """Test images with all answers; first those where models disagree. None where the data set has no images."""
    prepared = paths.prepared(group.task, group.dataset)
    models = [model for model in group.models if model.samples is not None and model.description is not None]
    if not models or not (prepared / "manifest.csv").is_file():
        return note(f"The data set is not here ({prepared}) · run `dvc repro prepare@{group.dataset}`")
    if not (prepared / "images.npy").is_file():
        return None
    tables = {model.name: samples.of_test(model) for model in models}
    # All others disagree with a teacher on whatever is of an unseen class.
    able = {model.name: tables[model.name] for model in models if _answers_unseen(model)} or tables
    chosen, disagreed = samples.choose(able, DISAGREED, OTHERS)
    about = data.describe(prepared)
    ids, pixels, labels = data.load(prepared, "test", "images")
    place = {name: index for index, name in enumerate(ids)}
    cards = []
    for name in (name for name in chosen if name in place):
        label = int(labels[place[name]])
        truth, role = about["classes"][label], about["roles"][label]
        opinions = []
        for model in models:
            row: Any = tables[model.name].loc[name]
            answer = _names(model, about["classes"])[int(row["prediction"])]
            opinions.append(samples.opinion(group.short(model.name), row, answer))
        picture = pictures.photograph(pixels[place[name]].numpy())
        few = "pixels" if picture.width <= SIDE else None
        view = tag(
            "img", src=pictures.source(picture), alt=f"{name}, class {truth}", width=SIDE, height=SIDE, class_=few
        )
        caption = tag("figcaption", f"{role} class ", tag("b", truth), f" · {name}")
        cards.append(
            tag("figure", tag("div", tag("div", view), class_="views"), caption, tag("ul", *opinions), class_="sample")
        )
    said = (
        f"Models that know all classes disagree on {disagreed:,} of {len(ids):,} test images: some right, some wrong. "
        f"Here are up to {DISAGREED} of these, then others, chosen by a digest of their names. Beside each class "
        "stands the model's confidence. A teacher knows the seen classes only."
    )
    return join([tag("p", said, class_="small soft"), tag("div", *cards, class_="samples")])


def _answers_unseen(model: Model) -> bool:
    """Whether it knows more than the seen classes."""
    return "area" in model.metrics["test"]


def _names(model: Model, known: list[str]) -> list[str]:
    """Of the classes by the numbers of a model's samples: those of the data set, then what it has beside them."""
    answered = model.description.interface["classes"] if model.description else []
    return [*known, *(name for name in answered if name not in known)]


def accuracy_by_class(group: Group) -> Html:
    """Unseen classes, then seen ones; classes that were added have no samples here, and are named."""
    tables = sections.classes_of_test(group)
    parts: list[object] = []
    for role, title in ((UNSEEN["test"], "Unseen classes"), (SEEN, "Seen classes")):
        # Whoever knows the seen classes only is wrong in all others.
        able = [model.name for model in group.models if role == SEEN or _answers_unseen(model)]
        of_role = {
            name: rows[(rows["role"] == role) & (rows["samples"] > 0)] for name, rows in tables.items() if name in able
        }
        if of_role:
            said = "Test accuracy in per cent; any class may be the answer."
            parts += [tag("h4", title), sections.by_class(group, "accuracy", "samples", said, of_role)]
    for name, rows in tables.items():
        if len(added := rows.loc[rows["role"] == ADDED, "class"]):
            parts.append(tag("p", f"{name} knows {len(added)} more, without samples here: {', '.join(added)}."))
    return join(parts) if parts else sections.by_class(group, "accuracy", "samples", "")
