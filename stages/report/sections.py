"""What tasks share: who teaches whom, curves, figures by class, export, latency, validation, how to reproduce."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages import paths
from stages.report import charts
from stages.report.comparison import NOTHING, main_metric, size_text
from stages.report.page import Html, code, join, note, table, tag
from stages.report.results import PRETRAINED, Group, Model

CLASSES_SHOWN = 20
# The strongest shade of the heat table; text stays readable on it.
HEAT = 0.6


def facts(group: Group) -> Html:
    """Where the data come from and what may be done with them."""
    rows: list[tuple[str, object]] = [("data set", f"{group.dataset} (samples evaluated: {_splits(group)})")]
    for name, source in group.sources.items():
        rows += [("source", name), ("credit", source["credit"]), ("licence", source["licence"])]
    listed = tag("dl", *(join([tag("dt", key), tag("dd", value)]) for key, value in rows), class_="facts")
    closed = [name for name, source in group.sources.items() if not source["redistributable"]]
    warning = note(
        f"Not to be passed on: {', '.join(closed)} may not be redistributed. This page may show samples of it, and the "
        "models were made from it.",
        "warning",
    )
    return join([warning if closed else None, listed])


def _splits(group: Group) -> str:
    table = next((model.samples for model in group.models if model.samples is not None), None)
    if table is None:
        return "unknown"
    return ", ".join(f"{split} {count:,}" for split, count in table["split"].value_counts(sort=False).items())


def chain(group: Group, task: Any) -> Html:
    """Who learns from whom, or begins with whose weights."""
    main, metric = main_metric(group, task)
    nodes = []
    for model in group.models:
        figure = metric.show(model.metrics["test"][main]) + " %" * metric.percent
        found = model.description
        start = found.start["name"] if found and found.start and model.learnt_from is None else None
        nodes.append(
            charts.Node(
                name=model.name,
                kind=model.role,
                lines=(
                    model.name,
                    f"{model.role} · {task.size(found.interface)}" if found else model.role,
                    f"test {metric.label} {figure}",
                ),
                parent=model.learnt_from or start,
                label=model.method or ("start" if start else ""),
            )
        )
    links = "; ".join(f"{model.name} learns from {model.learnt_from or 'labels'}" for model in group.models)
    drawing = charts.chain(nodes, links)
    said = "An arrow is a training, named by its method. Who has no arrow learnt from no other model."
    if any(node.label == "start" for node in nodes):
        said += " The arrow `start` leads to a model that began with the weights of another and learnt from labels."
    return join([drawing, tag("p", said, class_="small soft")])


def curves(group: Group, task: Any) -> Html:
    """Validation metrics, then every term of the losses, a chart each, a line per model."""
    found = {number: model.curve for number, model in enumerate(group.models) if model.curve is not None}
    if not found:
        return note(f"There are no training curves · run `dvc repro` or `dvc checkout` (reports/curves/{group.task})")
    names = sorted({str(column) for curve in found.values() for column in curve.columns})
    # The curve that decides first, then the term that all share, then the terms of single methods.
    wanted = [name for name in names if name.startswith("validation/")]
    wanted += sorted(
        (name for name in names if name.startswith("loss/")),
        key=lambda name: (-sum(name in curve.columns for curve in found.values()), name),
    )
    last = max(float(curve["step"].max()) for curve in found.values())
    drawn = []
    # What a pretrained model's loss is about is another question: it has charts of its own.
    for pretrained in (False, True):
        for name in wanted:
            series = {}
            for number, curve in found.items():
                own = (group.models[number].role == PRETRAINED) == pretrained
                if own and name in curve.columns and curve[name].notna().any():
                    known = curve[["step", name]].dropna()
                    series[number] = (known["step"].to_numpy(dtype=float), known[name].to_numpy(dtype=float))
            if series:
                drawn.append(_chart(name, series, last, group, task, f", {PRETRAINED}" * pretrained))
    said = "Losses as recorded every few steps; an axis whose labels grow by factors is logarithmic."
    return join(
        [
            charts.legend({number: group.models[number].name for number in found}),
            tag("div", *drawn, class_="charts"),
            tag("p", said, class_="small soft"),
        ]
    )


def _chart(
    name: str,
    series: dict[int, tuple[np.ndarray, np.ndarray]],
    last: float,
    group: Group,
    task: Any,
    of: str,
) -> Html:
    """One figure over training steps, of the models of `series` by number."""
    values = np.concatenate([values for _, values in series.values()])
    metric = task.METRICS.get(name.removeprefix("validation/"))
    if name.startswith("loss/"):
        scale, more = charts.loss_scale(values), ""
    elif metric is not None and metric.percent and values.min() >= 0 and values.max() <= 1:
        scale, more = charts.share(values), " (wider towards 100 %)"
    else:
        scale, more = charts.linear(values), ""
    who = ", ".join(group.models[number].name for number in series)
    drawing = charts.lines(series, scale, charts.steps(last), f"{name} over training steps: {who}")
    return tag("figure", tag("figcaption", tag("b", name), of, more), drawing)


def classes_of_test(group: Group) -> dict[str, pd.DataFrame]:
    """Of every model by name, its rows of <model>.classes.csv about the test split, by label."""
    return {
        model.name: model.classes[model.classes["split"] == "test"].set_index("label")
        for model in group.models
        if model.classes is not None
    }


def by_class(
    group: Group, figure: str, counted: str, said: str, tables: Mapping[str, pd.DataFrame] | None = None
) -> Html:
    """A share on the test split by class and model; the further from 1, the stronger the shade.

    Args:
        figure, counted: columns of <model>.classes.csv: the share, and what its class has in the test split.
        said: what the share is. tables: some of `classes_of_test`, if not all.
    """
    tables = classes_of_test(group) if tables is None else tables
    if not tables:
        return note("There are no figures by class · run `dvc checkout` or `dvc repro`")
    shares = pd.DataFrame({name: found[figure] for name, found in tables.items()})
    first = next(iter(tables.values()))
    left_out = len(shares) - CLASSES_SHOWN
    if left_out > 0:
        shares = shares.loc[shares.mean(axis=1).sort_values(kind="stable").index[:CLASSES_SHOWN]]
    worst = float((1 - shares).max().max())
    rows = [
        [first.loc[label, "class"], f"{first.loc[label, counted]:,}", *(_heat(value, worst) for value in values)]
        for label, values in zip(shares.index, shares.to_numpy(dtype=float), strict=True)
    ]
    headings = ["class", counted, *(group.short(name) for name in shares.columns)]
    said += " The lower, the stronger the shade."
    if left_out > 0:
        said += f" The {CLASSES_SHOWN} classes with the lowest mean; {left_out} others are left out."
    return join([table(headings, rows, numeric=range(1, len(headings))), tag("p", said, class_="small soft")])


def _heat(share: float, worst: float) -> Html:
    if math.isnan(share):
        return tag("td", "-", class_="heat", style="--share:0")
    depth = HEAT * (1 - share) / worst if worst > 0 else 0.0
    return tag("td", f"{100 * share:.1f}", class_="heat", style=f"--share:{depth:.3f}")


def export(group: Group, task: Any) -> Html:
    """How near the exported graphs are to PyTorch."""
    metric = task.PARITY
    rows = []
    for model in group.models:
        if model.exported is not None:
            parity = model.exported["parity"]
            largest = ", ".join(f"{name} {value:g}" for name, value in parity["largest_difference"].items())
            same = [metric.show(parity["metric"][kind]) for kind in ("onnx", "pytorch")]
            size = size_text(model.onnx_bytes) if model.onnx_bytes is not None else "-"
            rows.append([model.name, f"{parity['samples']:,}", largest, *same, size])
    if not rows:
        targets = _export_targets(group)
        return note(f"Nothing is exported yet · run `dvc repro {targets}`" if targets else "Nothing is to be exported")
    headings = ["model", "samples", "largest difference", f"{metric.label} ONNX", f"{metric.label} PyTorch", "file"]
    said = "ONNX Runtime against PyTorch on the validation split, as the export stage found it."
    return join([tag("p", said, class_="small soft"), table(headings, rows, numeric=(1, 3, 4, 5))])


def _export_targets(group: Group) -> str:
    """Stages that export what is deployed."""
    return " ".join(f"export@{model.name}" for model in group.models if model.deployed)


def latency(group: Group) -> Html:
    """Time and size in ONNX Runtime, or the command that measures them."""
    command = f"python -m stages.latency {group.task}"
    measured = [model for model in group.models if model.latency is not None]
    if group.latency is None or not measured:
        said = "Not measured yet. Alone on the machine, after the exports:"
        return join([tag("p", said), code(command)])
    # A batch that is too large for a model was not measured of it.
    batches = list(dict.fromkeys(batch for model in measured for batch in (model.latency or {})["latency_ms"]))
    rows = [_latency_row(model, batches) for model in measured]
    headings = ["model", *(quantile for _ in batches for quantile in ("p50 ms", "p95 ms")), "parameters", "ONNX file"]
    bands = [("", 1), *((f"batch {batch}", 2) for batch in batches), ("size", 2)]
    rule = range(1, 2 * len(batches) + 2, 2)
    machine, threads = group.latency["machine"], group.latency["threads"]
    inputs = f"; {group.latency['inputs']}" if "inputs" in group.latency else ""
    said = (
        f"ONNX Runtime, {threads} thread{'s' * (threads != 1)}, on {machine['processor'] or 'an unnamed processor'} "
        f"({machine['cores']} cores), {group.latency['time']}{inputs}. Only figures of one run on one machine compare."
    )
    figures = table(headings, rows, numeric=range(1, len(headings)), bold=[1], rule=rule, bands=bands)
    return join([figures, tag("p", said, class_="small soft")])


def _latency_row(model: Model, batches: list[str]) -> list[object]:
    found = model.latency or {}
    measured = [found["latency_ms"].get(batch, {}) for batch in batches]
    times = [f"{one[name]:.3f}" if one else NOTHING for one in measured for name in ("p50", "p95")]
    return [model.name, *times, f"{found['parameters']:,}", size_text(found["bytes"])]


def validation(group: Group, reports: Path) -> Html:
    """What was expected of the data, and what was not met.

    Args:
        reports: the folder of the page, which the link to Data Docs starts from.
    """
    folder = paths.validation_report(group.task, group.dataset)
    if group.findings is None:
        return note(f"There is no report of the validation · run `python -m stages.validate {group.dataset}`")
    if group.findings["error"] is not None:
        return note(f"The data could not be checked: {group.findings['error']}", "warning")
    findings = group.findings["findings"]
    failed = [found["sentence"] for found in findings if not found["success"]]
    rows = ", ".join(f"{name} {count:,}" for name, count in group.findings["rows"].items())
    said = f"{len(findings) - len(failed)} of {len(findings)} expectations are met (rows looked at: {rows})."
    docs = folder / "index.html"
    link = tag("a", "Data Docs", href=docs.relative_to(reports).as_posix()) if docs.is_file() else None
    return join(
        [
            note(said, "warning") if failed else tag("p", said),
            tag("ul", *(tag("li", sentence) for sentence in failed)) if failed else None,
            tag("p", "Every expectation, with what was found: ", link, ".") if link else None,
        ]
    )


def reproduce(group: Group, revision: str | None) -> Html:
    """The commands that lead to this page."""
    targets = _export_targets(group)
    wanted = [
        ("make setup", "the environment, once"),
        (f"dvc repro evaluate@{group.task}", "trains what is not trained yet, evaluates every model"),
        *([(f"dvc repro {targets}", "")] if targets else []),
        *([] if group.encodes else [(f"python -m stages.latency {group.task}", "alone on the machine")]),
        (f"python -m stages.report {group.task}", "this page"),
    ]
    if revision is not None:
        commit, *more = revision.split()
        wanted.insert(0, (f"git checkout {commit}", "and changes that no commit holds" if more else ""))
    width = max(len(command) for command, meaning in wanted if meaning)
    commands = [f"{command:{width}}  # {meaning}" if meaning else command for command, meaning in wanted]
    said = (
        "What is trained, and how, stands in params.yaml. The same inputs, parameters and number of threads give the "
        "same weights on one type of machine."
    )
    return join([tag("p", said), code(*commands)])
