"""Compare the models of a task: a table on the terminal, and one page, reports/index.html, that needs no network.

Not a stage: it holds times. It reads what the pipeline wrote, and trains nothing.
"""

import importlib
import io
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import write_file
from stages import command
from stages.parameters import Parameters, load, select
from stages.report import comparison, page, sections
from stages.report.results import Group, read_task

PAGE = Path("reports/index.html")


def main(key: str) -> None:
    """Report on the task `key`, or on all tasks of params.yaml where it is empty.

    Raises:
        UserError: the task is unknown, or there are no figures.
    """
    parameters = load()
    if key:
        select(parameters.tasks, key, "task")
    groups, notes = _read([key] if key else list(parameters.tasks), parameters)
    tasks = {group.task: importlib.import_module(f"stages.report.{group.task}") for group in groups}
    revision = _revision()
    generated = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    document = _document(groups, tasks, notes, revision, generated)
    write_file(PAGE, lambda file: file.write(document.encode()))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that knows only ASCII gets a question mark for a sign, not a failure.
        sys.stdout.reconfigure(errors="replace")
    for group in groups:
        print(comparison.text(group, tasks[group.task]), end="\n\n")
    for line in notes:
        print(line, end="\n\n")
    print(f"report: {PAGE}")


def _read(tasks: list[str], parameters: Parameters) -> tuple[list[Group], list[str]]:
    """Groups of all tasks that have figures, and a note for every other.

    Raises:
        UserError: no task has any.
    """
    groups: list[Group] = []
    problems: list[UserError] = []
    for task in tasks:
        try:
            groups.extend(read_task(task, parameters))
        except UserError as error:
            problems.append(error)
    if problems and not groups:
        raise problems[0]
    if not groups:
        raise UserError("params.yaml names no task · add one under `tasks`")
    return groups, [str(problem) for problem in problems]


def _document(
    groups: list[Group], tasks: dict[str, Any], notes: list[str], revision: str | None, generated: str
) -> page.Html:
    titles = [f"{group.task}: {group.dataset}" for group in groups]
    anchors = [f"{group.task}-{group.dataset}" for group in groups]
    links = [page.tag("a", title, href=f"#{anchor}") for title, anchor in zip(titles, anchors, strict=True)]
    parts: list[object] = []
    for group, title, anchor in zip(groups, titles, anchors, strict=True):
        parts.append(page.tag("h2", title, id=anchor))
        parts.extend(_group(group, tasks[group.task], revision))
    made = f"Generated {generated}" + (f" from git revision {revision}" if revision else "")
    return page.document(
        "distillery: report",
        page.tag(
            "header",
            page.tag("h1", "Distillery: what was distilled, and how well"),
            page.tag("p", "Teachers, students and baselines on the same data, side by side."),
            page.tag("p", f"{made}.", class_="small soft"),
            page.tag("nav", *links, aria_label="data sets") if len(links) > 1 else None,
        ),
        page.tag("main", *(page.note(line) for line in notes), *parts),
        page.tag("footer", "Everything on this page is inside this file; it loads nothing."),
    )


def _group(group: Group, task: Any, revision: str | None) -> list[page.Html]:
    """All sections about one data set."""
    facts = sections.facts(group)
    if not group.models:
        return [facts, *(page.note(line) for line in group.notes)]
    served = [("Export", sections.export(group, task)), ("Latency and size", sections.latency(group))]
    titled = [
        ("Comparison", comparison.html(group, task)),
        ("Who learns from whom", sections.chain(group, task)),
        ("Training", sections.curves(group, task)),
        *task.figures(group),
        *([] if group.encodes else served),
        ("Validation of the data", sections.validation(group, PAGE.parent)),
        ("Reproduce", sections.reproduce(group, revision)),
    ]
    return [facts, *(page.section(title, content) for title, content in titled)]


def _revision() -> str | None:
    """The commit that is checked out, and whether anything differs from it; None outside git."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head[:12] + " with changes" * bool(changes.strip())


if __name__ == "__main__":
    command.run("report", __doc__, main, key="task", example="recognition", optional=True)
