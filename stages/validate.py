"""Check a prepared data set against what is expected of it, and keep the proof."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import UserError
from data.files import new_directory, sha256, write_json
from stages import command, paths
from stages.parameters import load, select

if TYPE_CHECKING:
    import pandas as pd

    from data.expectations import Finding

FINDINGS_NAMED = 5


def main(key: str) -> None:
    """Validate the data set `key` of params.yaml.

    The proof (paths.validated) exists only if every expectation is met. The report (paths.validation_report) holds
    findings.json in every case, and Data Docs wherever the prepared files could be read.

    Raises:
        UserError: an expectation is not met, or the prepared files are absent or damaged.
    """
    dataset = select(load().datasets, key, "data set")
    proof, report = paths.validated(dataset.task, key), paths.validation_report(dataset.task, key)
    # An old proof must not outlive data that are no longer sound, whatever happens below.
    proof.unlink(missing_ok=True)
    task = importlib.import_module(f"data.{dataset.task}")
    prepared = paths.prepared(dataset.task, key)
    summary: dict[str, Any] = {"dataset": key, "task": dataset.task}
    try:
        tables, expected = _read(task, prepared, dataset, key)
    except UserError as error:
        with new_directory(report) as output:
            write_json(
                output / "findings.json", {**summary, "success": False, "error": str(error), "rows": {}, "findings": []}
            )
        raise
    rows = {name: len(table) for name, table in tables.items()}
    findings = _check(key, tables, expected, report, {**summary, "rows": rows})
    if failed := [finding for finding in findings if not finding.success]:
        raise UserError(_failure(key, failed, len(findings), report))
    write_json(
        proof,
        {
            **summary,
            "manifest": sha256(prepared / "manifest.csv"),
            "rows": rows,
        },
    )


def _read(
    task: Any, prepared: Path, dataset: Any, key: str
) -> tuple[dict[str, "pd.DataFrame"], dict[str, list[dict[str, Any]]]]:
    """The tables of a prepared data set, and what is expected of them."""
    if not (prepared / "manifest.csv").is_file():
        raise UserError(f"there is no prepared data set in {prepared} · run `python -m stages.prepare {key}` first")
    try:
        return task.tables(prepared), task.expectations(dataset, task.describe(prepared))
    except (OSError, ValueError, KeyError, TypeError) as error:
        # A file or a column that is absent, or text that is no table: damage that leaves nothing to look at.
        raise UserError(
            f"the prepared data set in {prepared} cannot be read ({type(error).__name__}: {error}) · "
            f"prepare it again: `python -m stages.prepare {key}`"
        ) from error


def _check(
    key: str,
    tables: dict[str, "pd.DataFrame"],
    expected: dict[str, list[dict[str, Any]]],
    report: Path,
    summary: dict[str, Any],
) -> list["Finding"]:
    """Check the tables and write the report."""
    from data.expectations import validate

    with new_directory(report) as output:
        findings = validate(key, tables, expected, output)
        write_json(
            output / "findings.json",
            {
                **summary,
                "success": all(finding.success for finding in findings),
                "error": None,
                "findings": [finding.plain() for finding in findings],
            },
        )
    return findings


def _failure(key: str, failed: list["Finding"], total: int, report: Path) -> str:
    more = len(failed) - FINDINGS_NAMED
    return (
        f"data set {key!r} does not meet {len(failed)} of {total} expectations: "
        + " | ".join(finding.sentence for finding in failed[:FINDINGS_NAMED])
        + (f" | and {more} more" if more > 0 else "")
        + f" · all findings: {report / 'findings.json'}, to read: {report / 'index.html'} · mend the source and "
        f"`python -m stages.prepare {key}` again, or correct what is expected (datasets.{key} in params.yaml)"
    )


if __name__ == "__main__":
    command.run("validate", __doc__, main, key="data set", example="mnist")
