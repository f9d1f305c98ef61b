"""Decision records: why a student became champion, or did not. decisions/<task>/<time>-<what>.json and .md."""

import math
import time
from pathlib import Path
from typing import Any

from data.files import write_file, write_json
from pipelines.gates import Check

FOLDER = Path("decisions")


def write(task: str, decision: str, facts: dict[str, Any], checks: list[Check]) -> Path:
    """Write a record; returns the path of its readable form.

    Args:
        decision: promoted, refused or rolled-back. facts: what is decided about, name by name.
    """
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    folder = FOLDER / task
    stem = f"{when.replace(':', '')}-{decision}"
    taken = sum(1 for _ in folder.glob(f"{stem}*.json"))
    file = folder / (f"{stem}-{taken + 1}.md" if taken else f"{stem}.md")
    plain = {
        "task": task,
        "decision": decision,
        "time": when,
        **facts,
        "gates": {check.name: check.plain() for check in checks},
    }
    # The JSON last: whoever finds it finds both.
    write_file(file, lambda opened: opened.write(_readable(plain, checks).encode()))
    write_json(file.with_suffix(".json"), _finite(plain))
    return file


def _readable(plain: dict[str, Any], checks: list[Check]) -> str:
    lines = [f"# {plain['task']}: {plain['decision']}", ""]
    lines += [f"- {name}: {_cell(value)}" for name, value in plain.items() if name not in ("gates", "task", "decision")]
    if checks:
        lines += ["", "| gate | verdict | what was found |", "|---|---|---|"]
        lines += [f"| {check.name} | {check.verdict} | {_cell(check.sentence)} |" for check in checks]
        lines += ["", "## Figures", ""]
        for check in checks:
            lines += [f"### {check.name}", ""]
            lines += [f"- {name}: {_cell(value)}" for name, value in check.figures.items()] or ["- none"]
            lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _finite(value: Any) -> Any:
    """JSON knows no NaN; a figure that is none is written as a word."""
    if isinstance(value, dict):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
