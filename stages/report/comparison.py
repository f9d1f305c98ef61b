"""Models of one data set side by side: columns, the table as text and as HTML, and what may be concluded from it."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data.errors import UserError
from stages.report.page import Html, join, note, table, tag
from stages.report.results import (
    CO_TRAINED,
    ENCODER,
    LAST_EPOCH,
    PRETRAINED,
    SPLITS,
    Difference,
    Group,
    Metric,
    Model,
    agreement,
    difference,
    error_of,
)

WIDTH = 110
TEACHER_ERRORS, METHOD_ERRORS = 3, 2
# What a terminal can do without, the first first, where the table is wider than WIDTH.
DISPENSABLE = ("weights", "ONNX", "input", "learnt from", "params", "rows", "p50 ms")
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """A column of the comparison: a cell per model, as a figure and its standard error."""

    title: str
    cells: list[tuple[str, str]]
    numeric: bool = True
    band: str = ""
    bold: bool = False


def columns(group: Group, task: Any) -> list[Column]:
    """What is compared. A column that is empty for every model is left out.

    Args:
        task: the module stages.report.<task>.
    """

    def column(title: str, cell: Callable[[Model], str | tuple[str, str]], **more: Any) -> Column:
        cells = [cell(model) for model in group.models]
        return Column(title, [(cell, "") if isinstance(cell, str) else cell for cell in cells], **more)

    main, metric = main_metric(group, task)
    label, beside = metric.label, task.BESIDE
    against = next((methods[0] for model in group.models if (methods := task.relatives(model))), NOTHING)
    second = []
    if beside is not None:
        title = f"test {task.METRICS[beside].label}"
        second = [column(title, lambda model: _figure(model, task, beside, "test"), band="test")]
    everything = [
        column("role", lambda model: model.role + "*" * (model.role == "assistant"), numeric=False),
        column("method", lambda model: model.method or NOTHING, numeric=False),
        column("learnt from", lambda model: _origin(group, model), numeric=False),
        column("input", lambda model: _of(model.description, lambda found: task.size(found.interface))),
        column(
            f"validation {label}", lambda model: _figure(model, task, main, "validation"), band="validation", bold=True
        ),
        column(f"test {label}", lambda model: _figure(model, task, main, "test"), band="test", bold=True),
        column(f"vs {against}", lambda model: _against(group, model, task), band="test"),
        *second,
        column("agrees", lambda model: _agrees(group, model, task), band="test"),
        column("rows", lambda model: _of(model.description, lambda found: _rows(found.rows)), band="trained on"),
        column("params", lambda model: _of(model.description, lambda found: f"{found.parameters:,}"), band="cost"),
        column("weights", lambda model: _of(model.weights_bytes, size_text), band="cost"),
        column("ONNX", lambda model: _of(model.onnx_bytes, size_text), band="cost"),
        column("p50 ms", lambda model: _of(model.latency, lambda found: _p50(found["latency_ms"])), band="cost"),
    ]
    return [one for one in everything if any(figure != NOTHING for figure, _ in one.cells)]


def main_metric(group: Group, task: Any) -> tuple[str, Metric]:
    """Name and meaning of the figure that models of this data set are compared by.

    Raises:
        UserError: a model has no such figure: it was evaluated before the data set's metric was changed.
    """
    name = task.main_metric(group)
    for model in group.models:
        # Only a test split is sure to have samples of every kind.
        if name not in model.metrics["test"]:
            raise UserError(
                f"the figures of {model.name} hold no {name!r}, by which models of data set {group.dataset!r} are "
                f"compared (they hold {', '.join(model.metrics['test'])}) · run `dvc repro evaluate@{group.task}`"
            )
    return name, task.METRICS[name]


def text(group: Group, task: Any) -> str:
    """The table for a terminal, and under it what it says."""
    prefix = next((model.name[: len(model.name) - len(group.short(model.name))] for model in group.models), "")
    head = f"{group.task} on {group.dataset}" + (
        f" ({group.test_samples():,} test samples)" * bool(group.test_samples())
    )
    head += f"; names of models without {prefix!r}" * bool(prefix)
    # Selection uses validation; a table for everyday use that shows it beside the test figures would be too wide.
    shown = [one for one in columns(group, task) if one.band != "validation" and not _says_the_same(one)]
    names = Column("model", [(group.short(model.name), "") for model in group.models], numeric=False)
    left_out = []
    for title in DISPENSABLE:
        if _width([names, *shown]) > WIDTH and title in [one.title for one in shown]:
            shown = [one for one in shown if one.title != title]
            left_out.append(title)
    blocks = [[one.title, *_aligned(one)] for one in (names, *shown)]
    widths = [max(len(cell) for cell in block) for block in blocks]
    numeric = [False, *(one.numeric for one in shown)]
    lines = []
    for row in zip(*blocks, strict=True):
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    remarks = [*explanations(group, task), *conclusions(group, task), *group.notes]
    if left_out:
        remarks.append(f"The page has more columns: {', '.join(left_out)}.")
    if group.models and not group.encodes and not any(model.latency for model in group.models):
        remarks.append(f"Latency is not measured: `python -m stages.latency {group.task}`, alone on the machine")
    wrapped = [textwrap.fill(remark, WIDTH, subsequent_indent="  ", break_on_hyphens=False) for remark in remarks]
    return "\n".join([head, "", *(lines if group.models else []), "", *wrapped])


def _says_the_same(column: Column) -> bool:
    """Numbers of rows, where all models that tell have the same: a terminal has no room for that."""
    return column.title == "rows" and len({figure for figure, _ in column.cells} - {NOTHING}) < 2


def _width(shown: list[Column]) -> int:
    """Of the table on a terminal."""
    return sum(max(len(cell) for cell in (one.title, *_aligned(one))) for one in shown) + 2 * (len(shown) - 1)


def html(group: Group, task: Any) -> Html:
    """The table for the page, and a second one with every metric."""
    shown = columns(group, task)
    bands: list[tuple[str, int]] = [("", 1)]
    for one in shown:
        if one.band == bands[-1][0]:
            bands[-1] = (one.band, bands[-1][1] + 1)
        else:
            bands.append((one.band, 1))
    rows = [[model.name, *(_cell(*one.cells[index]) for one in shown)] for index, model in enumerate(group.models)]
    places = list(enumerate(shown, 1))
    compared = table(
        ["model", *(one.title.removeprefix(one.band).strip() for one in shown)],
        rows,
        numeric=[at for at, one in places if one.numeric],
        bold=[at for at, one in places if one.bold],
        rule=[at for at, one in places if at > 1 and one.band != shown[at - 2].band],
        bands=bands,
    )
    said = [tag("p", line) for line in conclusions(group, task)]
    return join(
        [
            tag("div", *said, class_="verdict") if said else None,
            compared,
            *(tag("p", line, class_="small soft") for line in explanations(group, task)),
            tag("p", "Selection uses validation; test figures are read once.", class_="small soft"),
            *(note(line) for line in group.notes),
            tag("h4", "All metrics"),
            _all_metrics(group, task),
        ]
    )


def _all_metrics(group: Group, task: Any) -> Html:
    given = {name for model in group.models for split in SPLITS for name in model.metrics[split]}
    metrics = {name: metric for name, metric in task.METRICS.items() if name in given}
    main = 1 + list(metrics).index(main_metric(group, task)[0])
    parts = []
    for split in SPLITS:
        rows = [
            [
                model.name,
                *(
                    metric.show(model.metrics[split][name]) if name in model.metrics[split] else NOTHING
                    for name, metric in metrics.items()
                ),
            ]
            for model in group.models
        ]
        figures = table(
            [split, *(metric.label for metric in metrics.values())],
            rows,
            numeric=range(1, 1 + len(metrics)),
            bold=[main],
            rule=[1],
        )
        parts.append(figures)
    meanings = [f"{metric.label}: {metric.meaning}" for metric in metrics.values() if metric.meaning]
    return join([tag("div", *parts, class_="side"), tag("p", "; ".join(meanings), ".", class_="small soft")])


def explanations(group: Group, task: Any) -> list[str]:
    """What the signs in the table mean."""
    lines = []
    name, metric = main_metric(group, task)
    if any(error_of(model, name, "test") is not None for model in group.models):
        unit = "in per cent, " if metric.percent else ""
        found = [(task.relatives(model)[0], other) for model in group.models if (other := _nearest(group, model, task))]
        compared = ", ".join(sorted({other.name for _, other in found}))
        against = f"; vs {found[0][0]}: difference to {compared} on the same samples" if found else ""
        lines.append(
            f"{metric.label} {unit}\N{PLUS-MINUS SIGN} one standard error{against}. These errors cover the choice of "
            "test samples, not what another seed of the training would change."
        )
    if any(_agrees(group, model, task) != NOTHING for model in group.models):
        lines.append("agrees: test samples to which a model answers what its teacher answers, in per cent.")
    if any(model.role == PRETRAINED for model in group.models):
        lines.append(f"{PRETRAINED}: it has not learnt the task, others begin with it; its figures mean nothing.")
    if any(model.role == ENCODER for model in group.models):
        lines.append(f"{ENCODER}: another data set holds the features that it makes; how it answers is left behind.")
    if any(model.role == LAST_EPOCH for model in group.models):
        lines.append(
            f"{LAST_EPOCH}: a student at the end of its training; by the validation split another epoch was kept."
        )
    if any(model.role == "assistant" for model in group.models):
        lines.append("* an assistant only teaches: it is not deployed and not exported.")
    return lines


def conclusions(group: Group, task: Any) -> list[str]:
    """What the figures allow one to say about the teachers, about the method against its baselines, and about a
    teacher that learnt with its student against the one that learnt by itself.
    """
    lines = []
    name, metric = main_metric(group, task)
    for model in group.models:
        compared = "alone" in task.relatives(model)
        if model.role == "teacher" and compared and (found := _compare(group, model, "alone", name)):
            other, gap = found
            leads = gap.beyond(TEACHER_ERRORS) and gap.value > 0
            verdict = (
                f"a lead of more than {TEACHER_ERRORS} standard errors, so there is something to distil"
                if leads
                else f"no lead of more than {TEACHER_ERRORS} standard errors, so there is little to distil"
            )
            lines.append(f"{model.name} (teacher) is {_distance(gap, other, metric)}: {verdict}.")
    students = [model for model in group.models if model.role == "student"]
    for model in students or [model for model in group.models if model.method == "kd"]:
        methods = [method for method in task.relatives(model) if method != model.method]
        for figure in (name, task.BESIDE):
            if figure not in model.metrics["test"]:
                continue
            known = [found for method in methods if (found := _compare(group, model, method, figure))]
            if known:
                seeds = "one seed" if model.seeds == 1 else f"one of {model.seeds} seeds"
                meant = task.METRICS[figure]
                lead = f"In {meant.label}, " if figure != name else ""
                lines.append(f"{lead}{model.name} is {_weighed(known, meant)}; {seeds}.")
    for model in group.models:
        alone = group.fine_tuned(model) if model.role == CO_TRAINED else None
        apart = difference(model, alone, name, "test") if alone else None
        if alone and apart:
            lines.append(f"{model.name} ({CO_TRAINED}) is {_weighed([(alone, apart)], metric)}.")
    return lines


def _weighed(known: list[tuple[Model, Difference]], metric: Metric) -> str:
    """Distances to other models, and whether they are beyond noise; said once where it holds for all."""
    distances = [_distance(gap, other, metric) for other, gap in known]
    weights = [
        f"beyond {METHOD_ERRORS} standard errors"
        if gap.beyond(METHOD_ERRORS)
        else f"within {METHOD_ERRORS} standard errors, which is noise"
        for _, gap in known
    ]
    if len(set(weights)) == 1:
        return f"{' and '.join(distances)}: {'both ' * (len(known) == 2)}{weights[0]}"
    return "; and ".join(f"{distance}, {weight}" for distance, weight in zip(distances, weights, strict=True))


def _distance(gap: Difference, other: Model, metric: Metric) -> str:
    """As in "0.80 points below recognition-alone (paired s.e. 0.72)"."""
    error = metric.show(gap.error)
    if gap.value == 0:
        return f"level with {other.name} (paired s.e. {error})"
    unit = " points" if metric.percent else ""
    side = "above" if gap.value > 0 else "below"
    return f"{metric.show(abs(gap.value))}{unit} {side} {other.name} (paired s.e. {error})"


def _compare(group: Group, model: Model, method: str, metric: str) -> tuple[Model, Difference] | None:
    other = group.reference(model, method)
    gap = difference(model, other, metric, "test") if other else None
    return (other, gap) if other and gap else None


def _nearest(group: Group, model: Model, task: Any) -> Model | None:
    """What a model's difference is taken to: the first of its relatives, unless that is its own method."""
    method = next(iter(task.relatives(model)), model.method)
    return None if method is None or method == model.method else group.reference(model, method)


def _against(group: Group, model: Model, task: Any) -> tuple[str, str]:
    name, metric = main_metric(group, task)
    other = _nearest(group, model, task)
    gap = difference(model, other, name, "test") if other else None
    if gap is None:
        return NOTHING, ""
    return metric.show_difference(gap.value), metric.show(gap.error)


def _agrees(group: Group, model: Model, task: Any) -> str:
    """Agreement with its teacher. A teacher that learnt with its student has none, nor is one that learnt no task."""
    teacher = next((other for other in group.models if other.name == model.learnt_from), None)
    if task.ANSWER is None or teacher is None or PRETRAINED in (model.role, teacher.role):
        return NOTHING
    share = agreement(model, teacher, task.ANSWER, "test")
    return NOTHING if share is None else f"{100 * share:.1f}"


def _rows(rows: dict[str, int]) -> str:
    """As in "3,944 (+438 held out)": what was trained on, and what was used beside it."""
    beside = [f"+{count:,} {name.replace('_', ' ')}" for name, count in rows.items() if name != "train"]
    return f"{rows['train']:,}" + f" ({', '.join(beside)})" * bool(beside) if "train" in rows else NOTHING


def _figure(model: Model, task: Any, name: str, split: str) -> tuple[str, str]:
    if name not in model.metrics[split]:
        return NOTHING, ""
    metric, error = task.METRICS[name], error_of(model, name, split)
    return metric.show(model.metrics[split][name]), "" if error is None else metric.show(error)


def _origin(group: Group, model: Model) -> str:
    if model.learnt_from is not None:
        return group.short(model.learnt_from)
    recipe = model.description.recipe if model.description else {}
    if recipe.get("from"):
        return "elsewhere"
    return "texts" if model.role == PRETRAINED else "labels"


def _of(value: Any, show: Callable[[Any], str]) -> str:
    return NOTHING if value is None else show(value)


def _p50(latency: dict[str, Any]) -> str:
    return f"{latency['1']['p50']:.3f}"


def size_text(size: int) -> str:
    """Bytes with a decimal unit and three digits."""
    factor, unit = next((factor, unit) for factor, unit in UNITS if size >= factor or factor == 1)
    return f"{size / factor:.3g} {unit}"


def _aligned(column: Column) -> list[str]:
    """Cells as text: figures under figures, errors under errors."""
    figures = max(len(figure) for figure, _ in column.cells)
    errors = max(len(error) for _, error in column.cells)
    if errors == 0:
        return [figure for figure, _ in column.cells]
    return [
        figure.rjust(figures) + (f" \N{PLUS-MINUS SIGN}{error.rjust(errors)}" if error else " " * (errors + 2))
        for figure, error in column.cells
    ]


def _cell(figure: str, error: str) -> object:
    if not error:
        return figure
    return join([figure, " ", tag("span", f"\N{PLUS-MINUS SIGN}{error}", class_="error")])
