"""What is expected of data, checked by Great Expectations.

An expectation is plain data: Great Expectations' name of its type, and its arguments, as in

    {"type": "expect_column_values_to_be_in_set", "column": "label", "value_set": [0, 1]}

An optional `description` says in words what must hold; sentences and Data Docs then use it. This module alone knows
Great Expectations, and imports it only where it is used: the import takes seconds.
"""

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ROWS_KEPT = 100
ROWS_NAMED = 5
ROW_NUMBER = "row_number"
NOT_ARGUMENTS = ("type", "description")


@dataclass(frozen=True)
class Row:
    """A row that does not meet an expectation.

    Attributes:
        id: its `id`, or None where that is missing.
        number: its place in the table, counting from 1.
        values: what stands in the columns that the expectation looks at.
    """

    id: str | None
    number: int
    values: dict[str, Any]

    def name(self, ambiguous: bool = False) -> str:
        """Its id, or its place where the id is missing or does not tell it apart."""
        return f"row {self.number}" if ambiguous or self.id is None else self.id


@dataclass(frozen=True)
class Finding:
    """What came of one expectation.

    Attributes:
        table: the table that was looked at.
        expectation: what was expected, as plain data.
        success: whether it was met.
        unexpected: how many values do not meet it.
        rows: the first ROWS_KEPT of the rows that hold these values, in the order of the table.
        observed: the figure that was found, where the table as a whole is looked at.
        error: why it could not be checked, or None.
    """

    table: str
    expectation: dict[str, Any]
    success: bool
    unexpected: int = 0
    rows: list[Row] = field(default_factory=list)
    observed: Any = None
    error: str | None = None

    @property
    def sentence(self) -> str:
        """What was expected and, if that is not so, what was found, with the first rows by name."""
        expected = f"{self.table}: {requirement(self.expectation)}"
        if self.success:
            return expected
        if self.error is not None:
            return f"{expected}; this could not be checked ({self.error})"
        if not self.rows:
            return f"{expected}; " + ("it is not so" if self.observed is None else f"found {_short(self.observed)}")
        return (
            f"{expected}; {self.unexpected} {'row is' if self.unexpected == 1 else 'rows are'} not so: {self._named()}"
        )

    def _named(self) -> str:
        ids = [row.id for row in self.rows]
        shown = [
            f"{row.name(ambiguous=ids.count(row.id) > 1)} ({', '.join(_short(value) for value in row.values.values())})"
            for row in self.rows[:ROWS_NAMED]
        ]
        more = self.unexpected - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more > 0 else "")

    def plain(self) -> dict[str, Any]:
        """The finding as plain data."""
        return {
            "table": self.table,
            "expectation": self.expectation,
            "success": self.success,
            "sentence": self.sentence,
            "unexpected": self.unexpected,
            "rows": [{"id": row.id, "row": row.number, "values": row.values} for row in self.rows],
            "more": max(self.unexpected - len(self.rows), 0),
            "observed": self.observed,
            "error": self.error,
        }


def requirement(expectation: Mapping[str, Any]) -> str:
    """An expectation in words: its `description`, or a sentence made of its type and arguments."""
    if expectation.get("description"):
        return str(expectation["description"])
    column = expectation.get("column")
    match expectation["type"]:
        case "expect_column_values_to_not_be_null":
            return f"{column} must not be missing"
        case "expect_column_values_to_be_unique":
            return f"{column} must be unique"
        case "expect_column_values_to_be_in_set":
            return f"{column} must be one of {_short(plain(expectation['value_set']))}"
        case "expect_column_values_to_be_between":
            return f"{column} must be {_range(expectation)}"
        case "expect_column_pair_values_to_be_equal":
            return f"{expectation['column_A']} must equal {expectation['column_B']}"
        case "expect_table_row_count_to_equal":
            return f"the number of rows must be {expectation['value']}"
        case "expect_table_row_count_to_be_between":
            return f"the number of rows must be {_range(expectation)}"
        case other:
            arguments = ", ".join(
                f"{name} {_short(value)}" for name, value in expectation.items() if name not in NOT_ARGUMENTS
            )
            return f"{other.removeprefix('expect_').replace('_', ' ')} ({arguments})"


def validate(
    name: str,
    tables: Mapping[str, pd.DataFrame],
    expected: Mapping[str, Sequence[Mapping[str, Any]]],
    docs: Path,
) -> list[Finding]:
    """Check tables against what is expected of them.

    Args:
        name: of the data set, for the pages.
        tables: by name; a column `id` names the rows. They are left as they are.
        expected: per table, expectations as plain data.
        docs: an existing folder, where Data Docs are written (`index.html` and what it needs).

    Returns:
        A finding per expectation, in the order of `expected`. An expectation that cannot be checked, because its
        column is absent, say, is a finding too.

    Raises:
        ValueError: an expectation names an unknown table, an unknown type or unknown arguments, or is stated twice.
    """
    for table in expected:
        if table not in tables:
            raise ValueError(f"expectations for the table {table!r}, but there are only {', '.join(tables) or 'none'}")
    # Read once, while the package is imported.
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _validate(name, tables, expected, docs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Great Expectations' log from the screen: what goes wrong in an expectation stands in its finding."""
    # Some of its modules set a level of their own, so that the level of the package does not silence them.
    logger = logging.getLogger("great_expectations")
    handler, propagate = logging.NullHandler(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)


def _validate(
    name: str,
    tables: Mapping[str, pd.DataFrame],
    expected: Mapping[str, Sequence[Mapping[str, Any]]],
    docs: Path,
) -> list[Finding]:
    import great_expectations as gx
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    # Everything in memory: a context of files is not safe where several stages run at a time.
    site: Any = {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())},
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
    }
    configuration = DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(),
        data_docs_sites={"findings": site},
        progress_bars=ProgressBarsConfig(globally=False),
        analytics_enabled=False,
    )
    context = gx.get_context(mode="ephemeral", project_config=configuration)
    source = context.data_sources.add_pandas(name)
    run = gx.RunIdentifier(run_name=name)
    findings = []
    for table, expectations in expected.items():
        # The place of a row names it where its id is missing or appears twice.
        frame = tables[table].reset_index(drop=True)
        frame[ROW_NUMBER] = np.arange(1, len(frame) + 1)
        index = [column for column in ("id", ROW_NUMBER) if column in frame]
        definition = context.validation_definitions.add(
            gx.ValidationDefinition(
                name=table,
                data=source.add_dataframe_asset(table).add_batch_definition_whole_dataframe("all"),
                suite=context.suites.add(_suite(table, expectations)),
            )
        )
        outcome = definition.run(
            batch_parameters={"dataframe": frame},
            result_format={
                "result_format": "COMPLETE",
                "unexpected_index_column_names": index,
                "return_unexpected_index_query": False,
            },
            run_id=run,
        )
        # Results come grouped by column.
        results: list[Any] = list(outcome.results)
        results.sort(key=lambda result: result.expectation_config.meta["order"])
        findings += [
            _finding(table, expectation, result) for expectation, result in zip(expectations, results, strict=True)
        ]
    context.build_data_docs()
    return findings


def _suite(table: str, expectations: Sequence[Mapping[str, Any]]) -> Any:
    import great_expectations as gx
    from great_expectations.exceptions.exceptions import GreatExpectationsError
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    suite = gx.ExpectationSuite(name=table)
    for order, expectation in enumerate(expectations):
        try:
            configuration = ExpectationConfiguration(
                type=expectation["type"],
                kwargs={name: value for name, value in expectation.items() if name not in NOT_ARGUMENTS},
                meta={"order": order},
                description=expectation.get("description"),
            )
            # Not add_expectation_configuration: it replaces an expectation of the same type on the same column.
            suite.add_expectation(configuration.to_domain_obj())
        except (GreatExpectationsError, ValueError) as error:
            raise ValueError(f"{expectation!r} of the table {table!r} is no expectation: {error}") from error
        if len(suite.expectations) <= order:
            raise ValueError(f"{expectation!r} of the table {table!r} is stated twice")
    return suite


def _finding(table: str, expectation: Mapping[str, Any], outcome: Any) -> Finding:
    result = outcome.result or {}
    looked_at = [expectation[name] for name in ("column", "column_A", "column_B") if name in expectation]
    looked_at += expectation.get("column_list", [])
    entries = result.get("unexpected_index_list") or []
    rows = [
        Row(
            id=None if (identity := plain(entry.get("id"))) is None else str(identity),
            number=int(entry[ROW_NUMBER]),
            values={column: plain(entry.get(column)) for column in looked_at},
        )
        for entry in entries[:ROWS_KEPT]
    ]
    return Finding(
        table=table,
        expectation=plain(expectation),
        success=bool(outcome.success),
        unexpected=int(result.get("unexpected_count") or 0),
        rows=rows,
        observed=plain(result.get("observed_value")),
        error=_error(outcome.exception_info or {}),
    )


def _error(information: Mapping[str, Any]) -> str | None:
    """Why an expectation could not be checked. The information stands alone, or once per metric."""
    if "raised_exception" in information:
        information = {"": information}
    messages = [str(one["exception_message"]) for one in information.values() if one.get("raised_exception")]
    return "; ".join(sorted(set(messages))) or None


def plain(value: Any) -> Any:
    """A value as JSON can hold it: numpy's numbers as Python's, what is missing as None, what is odd as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        # The order of a set of texts differs from process to process.
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, list | tuple | range | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _range(expectation: Mapping[str, Any]) -> str:
    low, high = expectation.get("min_value"), expectation.get("max_value")
    if low is not None and low == high:
        return f"{low}"
    if high is None:
        return f"at least {low}"
    return f"at most {high}" if low is None else f"between {low} and {high}"


def _short(value: Any) -> str:
    """A value for a sentence."""
    if value is None:
        return "missing"
    if isinstance(value, float):
        return f"{value:.8g}"
    if isinstance(value, list | tuple):
        items = [_short(item) for item in value]
        return ", ".join(items if len(items) <= 12 else [*items[:3], "...", items[-1]])
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:12]}..."
