"""How a flow is told: the plan, what stages say while they run, and the table at the end."""

import json
import sys
from collections.abc import Mapping, Sequence

from pipelines.execution import Result, counts
from pipelines.graph import Stage, Step
from stages import paths

MODELS = ("teach", "distill", "export")


def plan(steps: Sequence[Step]) -> str:
    """A line per stage: would it run, its threads and resource, and why."""
    rows = [("stage", "", "threads", "resource", "why")]
    for step in steps:
        stage = step.stage
        rows.append((stage.name, "run" if step.runs else "-", str(stage.threads), stage.resource, step.why))
    return aligned(rows)


def table(steps: Sequence[Step], results: Mapping[str, Result]) -> list[tuple[str, ...]]:
    """stage, status, time, main metric, MLflow run; a row per stage."""
    rows: list[tuple[str, ...]] = [("stage", "status", "time", "main metric", "MLflow run")]
    evaluated = {step.stage.task: results[step.stage.name].well for step in steps if step.stage.kind == "evaluate"}
    for step in steps:
        stage, result = step.stage, results[step.stage.name]
        status = f"{result.status}: {result.reason}" if result.reason else result.status
        time = f"{result.seconds:.1f} s" if result.seconds else ""
        # Figures of an older model would stand beside this one, were it not evaluated again.
        metric = main_metric(stage) if result.well and evaluated.get(stage.task, not step.runs) else ""
        rows.append((stage.name, status, time, metric, run_url(stage) or ""))
    return rows


def markdown(steps: Sequence[Step], results: Mapping[str, Result], seconds: float) -> str:
    """The table and one sentence, for Prefect."""
    head, *rows = table(steps, results)
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        *cells, url = (cell.replace("|", "\\|") for cell in row)
        lines.append(f"| {' | '.join([*cells, f'[run]({url})' if url else ''])} |")
    return "\n".join([*lines, "", f"{sentence(results)} in {seconds:.0f} s. Metrics are those of validation."])


def terminal(steps: Sequence[Step], results: Mapping[str, Result]) -> str:
    """The same as aligned text."""
    return aligned(table(steps, results))


def sentence(results: Mapping[str, Result]) -> str:
    """Such as `3 ran, 9 cached`."""
    return ", ".join(f"{count} {status}" for status, count in counts(results).items()) or "no stages"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns under each other; one that is empty all the way down is left out."""
    kept = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in kept]
    lines = zip(*kept, strict=True)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main_metric(stage: Stage) -> str:
    """The first figure that evaluation wrote for a model on validation; empty for other stages."""
    path = paths.metrics(stage.task or "") / f"{stage.key}.json"
    if stage.kind not in MODELS or not path.is_file():
        return ""
    figures: dict[str, float] = json.loads(path.read_text(encoding="utf-8")).get("validation", {})
    return next((f"{name} {value:.4g}" for name, value in figures.items()), "")


def run_url(stage: Stage) -> str | None:
    """Where MLflow shows the run of a stage; None where it has none."""
    try:
        from pipelines import records

        return records.run_url(stage.kind, stage.key)
    except Exception:  # nothing about MLflow may hide how the stages ended
        return None


def say(name: str, line: str) -> None:
    """One line of one stage among several that run side by side."""
    print(f"{name} | {line}", file=sys.stderr, flush=True)
