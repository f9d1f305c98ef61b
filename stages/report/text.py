"""Text: test texts with every model's answer, recall by class, and which training texts helped and harmed a student."""

from typing import Any

import numpy as np
import pandas as pd

from data import text as data
from data.errors import UserError
from stages import paths
from stages.influence import detection, influences, readable
from stages.report import charts, samples, sections
from stages.report.page import Html, code, join, note, table, tag
from stages.report.results import CO_TRAINED, PRETRAINED, Group, Metric, Model

METRICS = {
    "accuracy": Metric("accuracy", True, "share of texts whose class is found, in per cent"),
    "macro_f1": Metric("macro F1", True, "mean over classes of the harmonic mean of precision and recall"),
    "f1": Metric("F1", True, "the same for the second class alone"),
    "matthews": Metric("Matthews", False, "correlation of labels and predictions, 0 is chance; of several classes R_K"),
    "spearman": Metric("Spearman", False, "rank correlation of true and predicted scores"),
    "worst_class": Metric("worst class", True, "recall of the class where it is lowest"),
    "calibration_error": Metric("calibration error", True, "mean distance of confidence from accuracy, 0 is best"),
    "cross_entropy": Metric("cross-entropy", False, "mean of -log of the probability of the true class, in nats"),
}
BESIDE = None
ANSWER = "prediction"
PARITY = METRICS["accuracy"]

DISAGREED, OTHERS = 9, 3
EXTREMES = 8
# Characters of a text that are shown.
SHOWN, SHOWN_IN_TABLE = 420, 220
QUANTILES = {"highest tenth": 0.9, "median": 0.5, "lowest tenth": 0.1}


def main_metric(group: Group) -> str:
    """The data set's own."""
    return str(getattr(group.entry, "metric", "accuracy"))


def relatives(model: Model) -> tuple[str, ...]:
    """The same of every model."""
    return ("alone", "kd")


def size(interface: dict[str, Any]) -> str:
    """The longest text that goes in."""
    return f"{interface['length']} tokens"


def figures(group: Group) -> list[tuple[str, Html]]:
    """Sections of this task."""
    said = "Test recall in per cent: how much of a class is found; a dash where there is none of it."
    found = [("Test texts", texts(group)), ("Accuracy by class", sections.by_class(group, "recall", "samples", said))]
    return [*found, *([("Influence", parts)] if (parts := influence(group)) is not None else [])]


def texts(group: Group) -> Html:
    """Test texts with all answers; first those where some models are right and some are wrong."""
    prepared = paths.prepared(group.task, group.dataset)
    # A model that has not learnt the task gives every text the same answer.
    models = [model for model in group.models if model.samples is not None and model.role != PRETRAINED]
    if not models or not (prepared / "manifest.csv").is_file():
        return note(f"The texts are not here ({prepared}) · run `dvc repro prepare@{group.dataset}`")
    tables = {model.name: samples.of_test(model) for model in models}
    chosen, disagreed = samples.choose(tables, DISAGREED, OTHERS)
    manifest = pd.read_csv(prepared / "manifest.csv", dtype={"id": str}, keep_default_na=False).set_index("id")
    names = data.describe(prepared)["classes"]
    cards = [_card(group, name, manifest.loc[name], tables, names) for name in chosen if name in manifest.index]
    said = (
        f"Models disagree on {disagreed:,} of {len(next(iter(tables.values()))):,} test texts: some right, some wrong. "
        f"Here are up to {DISAGREED} of these, then others, chosen by a digest of their names. Beside each answer "
        "stands the model's confidence. Long texts are cut."
    )
    return join([tag("p", said, class_="small soft"), tag("div", *cards, class_="texts")])


def _card(group: Group, name: str, sample: Any, tables: dict[str, pd.DataFrame], names: list[str]) -> Html:
    """One text, its class or score, and what every model says."""
    lines = []
    for model, found in tables.items():
        row: Any = found.loc[name]
        answer = names[int(row["prediction"])]
        lines.append(
            samples.opinion(group.short(model), row, f"{row['predicted_score']:.2f}" if "score" in row else answer)
        )
    truth = (
        ["score ", tag("b", f"{sample['score']:g}")]
        if "score" in sample
        else ["class ", tag("b", names[sample["label"]])]
    )
    parts = [sample[part] for part in ("text", "pair") if part in sample]
    shown = [tag("blockquote", readable(pd.Series({"id": name, "text": part}), SHOWN)) for part in parts]
    return tag("figure", tag("figcaption", *truth, f" · {name}"), *shown, tag("ul", *lines), class_="sample")


def influence(group: Group) -> Html | None:
    """Of every student that recorded it; None where none did."""
    parts: list[object] = []
    for model in group.models:
        if model.method is None or model.role == CO_TRAINED:
            continue
        try:
            found = influences(group.task, model.name, group.dataset)
        except UserError as error:
            parts.append(note(f"Without the influence on {model.name}: {error}"))
            continue
        if found is not None and len(found):
            parts += [tag("h4", model.name), _influence(model, found)]
    return join(parts) if parts else None


def _influence(model: Model, found: pd.DataFrame) -> Html:
    """Summary, course of the training, extremes."""
    harmful = 100 * (found["mean"] < 0).mean()
    said = [
        "Influence of a training text: how much a distillation step on it lowers the student's loss on held-out texts, "
        f"to first order and per unit of learning rate. Of {len(found):,} texts, {harmful:.1f} % have a negative mean: "
        "steps on them harm."
    ]
    if check := detection(found):
        said.append(
            f"{check.flipped:,} of the labels ({100 * check.flipped / check.samples:.1f} %) were flipped on purpose. "
            f"Low influence finds them with an ROC area of {check.area:.3f} (s.e. {check.error:.3f}, DeLong; 0.5 is "
            f"chance): among the {check.flipped:,} texts with the lowest influence, {100 * check.precision:.1f} % are "
            "flipped."
        )
    drawn = _course(model, found)
    listed = f"python -m stages.influence {model.name} --export to-check.csv"
    return join(
        [
            *(tag("p", line) for line in said),
            drawn,
            tag("h4", "Most harmful"),
            _extremes(found.head(EXTREMES)),
            tag("h4", "Most helpful"),
            _extremes(found[::-1].head(EXTREMES)),
            tag("p", "All of them as a list, for whoever cleans the data:", class_="small soft"),
            code(listed),
        ]
    )


def _course(model: Model, found: pd.DataFrame) -> Html | None:
    """Influence by epoch: its mean and spread, and the means of flipped and other texts where some are flipped."""
    epochs = found[[name for name in found.columns if str(name).startswith("epoch_")]]
    if epochs.empty or epochs.isna().all(axis=None):
        return None
    places = np.arange(epochs.shape[1], dtype=float)
    spread = {"mean": epochs.mean()} | {name: epochs.quantile(share) for name, share in QUANTILES.items()}
    drawings = [_lines("all texts", spread, places, model)]
    if "flipped" in found and found["flipped"].nunique() > 1:
        kinds = {
            "flipped label": epochs[found["flipped"] == 1].mean(),
            "other texts": epochs[found["flipped"] == 0].mean(),
        }
        drawings.append(_lines("means, by whether the label was flipped", kinds, places, model))
    said = "Over the epochs of the training, by the texts that were drawn in each."
    return join([tag("div", *drawings, class_="charts"), tag("p", said, class_="small soft")])


def _lines(title: str, kinds: dict[str, pd.Series], places: np.ndarray, model: Model) -> Html:
    series = {number: (places, values.to_numpy(dtype=float)) for number, values in enumerate(kinds.values())}
    known = {number: (x[~np.isnan(y)], y[~np.isnan(y)]) for number, (x, y) in series.items() if not np.isnan(y).all()}
    scale = charts.linear(np.concatenate([np.zeros(1), *(y for _, y in known.values())]))
    every = -(-len(places) // 12)
    ticks = [(float(place), f"{place + 1:.0f}") for place in places[::every]]
    axis = charts.Axis(ticks, max(float(places[-1]), 1.0), "epoch")
    drawing = charts.lines(known, scale, axis, f"influence on {model.name} by epoch, {title}: {', '.join(kinds)}")
    named = {number: name for number, name in enumerate(kinds) if number in known}
    return tag("figure", tag("figcaption", tag("b", "influence"), f", {title}"), charts.legend(named), drawing)


def _extremes(found: pd.DataFrame) -> Html:
    rows = []
    for _, sample in found.iterrows():
        label: list[object] = [sample["class"]]
        if sample.get("flipped") == 1:
            label.append(tag("span", " flipped", class_="wrong"))
        text = tag("td", readable(sample, SHOWN_IN_TABLE), class_="long")
        rows.append([f"{sample['mean']:+.3g}", join(label), f"{sample['visits']:,}", text])
    return table(["influence", "label", "visits", "text"], rows, numeric=[2])
