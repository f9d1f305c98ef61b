"""Expectations as plain data, against what pandas alone says of the same tables."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from data.expectations import ROWS_KEPT, Finding, plain, requirement, validate

NOT_NULL = "expect_column_values_to_not_be_null"
UNIQUE = "expect_column_values_to_be_unique"
IN_SET = "expect_column_values_to_be_in_set"
BETWEEN = "expect_column_values_to_be_between"
PAIR = "expect_column_pair_values_to_be_equal"
ROW_COUNT = "expect_table_row_count_to_equal"


def check(folder: Path, table: pd.DataFrame, *expectations: dict[str, Any]) -> list[Finding]:
    return validate("set", {"table": table}, {"table": list(expectations)}, folder)


def numbers(finding: Finding) -> list[int]:
    return [row.number for row in finding.rows]


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_those_that_pandas_finds(tmp_path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    size = int(generator.integers(20, 60))
    table = pd.DataFrame(
        {
            "id": [f"sample-{number}" for number in generator.integers(0, 2 * size, size)],
            "a": generator.integers(0, 6, size).astype(float),
            "b": generator.integers(0, 6, size).astype(float),
        }
    )
    table.loc[generator.random(size) < 0.2, "a"] = np.nan
    table = table.sample(frac=1, random_state=seed)
    before = table.copy()
    low, high = sorted(generator.integers(0, 6, 2).tolist())
    allowed = generator.choice(6, 3, replace=False).tolist()
    present = table["a"].notna()
    wrong = [
        table["a"].isna(),
        table["id"].duplicated(keep=False),
        present & ~table["a"].isin(allowed),
        present & ((table["a"] < low) | (table["a"] > high)),
        table["a"] != table["b"],
        pd.Series(False, index=table.index),
    ]
    findings = check(
        tmp_path,
        table,
        {"type": NOT_NULL, "column": "a"},
        {"type": UNIQUE, "column": "id"},
        {"type": IN_SET, "column": "a", "value_set": allowed},
        {"type": BETWEEN, "column": "a", "min_value": low, "max_value": high},
        {"type": PAIR, "column_A": "a", "column_B": "b"},
        {"type": ROW_COUNT, "value": size},
    )
    for finding, mask in zip(findings, wrong, strict=True):
        places = (np.flatnonzero(mask) + 1).tolist()
        assert numbers(finding) == places, finding.expectation
        assert [row.id for row in finding.rows] == table["id"].iloc[np.flatnonzero(mask)].tolist()
        assert finding.unexpected == len(places)
        assert finding.success == (not places)
    pd.testing.assert_frame_equal(table, before)


def test_expectations_of_one_type_on_one_column_stand_side_by_side(tmp_path: Path) -> None:
    table = pd.DataFrame({"id": ["p", "q", "r"], "a": [1, 5, 9]})
    findings = check(
        tmp_path,
        table,
        {"type": BETWEEN, "column": "a", "min_value": 2},
        {"type": ROW_COUNT, "value": 3},
        {"type": BETWEEN, "column": "a", "max_value": 8},
    )
    assert [numbers(finding) for finding in findings] == [[1], [], [3]]
    assert [finding.success for finding in findings] == [False, True, False]


def test_every_table_is_checked_and_documented(tmp_path: Path) -> None:
    tables = {"first": pd.DataFrame({"id": ["p"], "a": [1]}), "second": pd.DataFrame({"id": ["q"], "a": [2]})}
    expected = {name: [{"type": IN_SET, "column": "a", "value_set": [1]}] for name in tables}
    findings = validate("set", tables, expected, tmp_path)
    assert [(finding.table, finding.success) for finding in findings] == [("first", True), ("second", False)]
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    for name in tables:
        page = next(tmp_path.glob(f"validations/{name}/**/*.html")).relative_to(tmp_path)
        assert page.as_posix() in index
    assert str(tmp_path) not in index


def test_rows_are_capped_and_the_rest_is_counted(tmp_path: Path) -> None:
    size = ROWS_KEPT + 37
    table = pd.DataFrame({"id": [f"s{number}" for number in range(size)], "a": 7})
    (finding,) = check(tmp_path, table, {"type": IN_SET, "column": "a", "value_set": [1]})
    written = finding.plain()
    assert [row["id"] for row in written["rows"]] == [f"s{number}" for number in range(ROWS_KEPT)]
    assert (written["unexpected"], written["more"]) == (size, 37)
    assert finding.sentence == (
        f"table: a must be one of 1; {size} rows are not so: s0 (7), s1 (7), s2 (7), s3 (7), s4 (7) and {size - 5} more"
    )


def test_rows_that_their_ids_do_not_tell_apart_are_named_by_place(tmp_path: Path) -> None:
    table = pd.DataFrame({"id": ["p", "p", None, "q"], "a": [9, 9, 9, 9]})
    by_value, by_id, missing = check(
        tmp_path,
        table,
        {"type": IN_SET, "column": "a", "value_set": [1]},
        {"type": UNIQUE, "column": "id"},
        {"type": NOT_NULL, "column": "id"},
    )
    assert by_value.sentence.endswith(": row 1 (9), row 2 (9), row 3 (9), q (9)")
    assert by_id.sentence.endswith("2 rows are not so: row 1 (p), row 2 (p)")
    assert missing.sentence.endswith("1 row is not so: row 3 (missing)")


def test_odd_values_are_findings(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "id": ["p", "q", "r", "s"],
            "number": [0.5, np.inf, -np.inf, np.nan],
            "thing": ["text", ["list"], {"key": 1}, pd.Timestamp("2020-02-02")],
            "markup": ["<b>", "$name", "{brace}", "two\nlines"],
        }
    )
    findings = check(
        tmp_path,
        table,
        {"type": BETWEEN, "column": "number", "min_value": 0, "max_value": 1},
        {"type": NOT_NULL, "column": "number"},
        {"type": IN_SET, "column": "thing", "value_set": ["text"]},
        {"type": IN_SET, "column": "markup", "value_set": ["<b>"]},
        {"type": BETWEEN, "column": "thing", "min_value": 0},
        {"type": BETWEEN, "column": "number", "min_value": 2, "max_value": 1},
        {"type": NOT_NULL, "column": "absent"},
    )
    assert [numbers(finding) for finding in findings] == [[2, 3], [4], [2, 3, 4], [2, 3, 4], [], [], []]
    assert not any(finding.success for finding in findings)
    assert [finding.error is not None for finding in findings] == [False] * 4 + [True] * 3
    assert "absent" in findings[-1].sentence
    assert all("\n" not in finding.sentence for finding in findings)
    json.dumps([finding.plain() for finding in findings], allow_nan=False)


def test_a_table_without_rows_columns_or_ids(tmp_path: Path) -> None:
    tables = {
        "empty": pd.DataFrame({"id": [], "a": []}),
        "bare": pd.DataFrame(),
        "nameless": pd.DataFrame({"a": [1.0, None]}),
    }
    expected: dict[str, list[dict[str, Any]]] = {
        "empty": [{"type": ROW_COUNT, "value": 2}, {"type": NOT_NULL, "column": "a"}],
        "bare": [{"type": ROW_COUNT, "value": 1}, {"type": NOT_NULL, "column": "a"}],
        "nameless": [{"type": NOT_NULL, "column": "a"}],
    }
    findings = validate("set", tables, expected, tmp_path)
    assert [finding.success for finding in findings] == [False, True, False, False, False]
    assert findings[0].sentence == "empty: the number of rows must be 2; found 0"
    assert findings[4].sentence.endswith("1 row is not so: row 2 (missing)")


def test_a_share_of_exceptions_may_be_allowed(tmp_path: Path) -> None:
    table = pd.DataFrame({"id": list("pqrstuvwxy"), "a": [1] * 9 + [2]})
    lenient, strict = check(
        tmp_path,
        table,
        {"type": IN_SET, "column": "a", "value_set": [1], "mostly": 0.9},
        {"type": IN_SET, "column": "a", "value_set": [1], "mostly": 0.95},
    )
    assert (lenient.success, strict.success) == (True, False)
    assert numbers(lenient) == [10]


def test_a_description_takes_the_place_of_the_made_up_sentence(tmp_path: Path) -> None:
    table = pd.DataFrame({"id": ["p", "q"], "parts": [1, 2]})
    (finding,) = check(
        tmp_path,
        table,
        {"type": BETWEEN, "column": "parts", "max_value": 1, "description": "no image stands in two splits"},
    )
    assert finding.sentence == "table: no image stands in two splits; 1 row is not so: q (2)"
    page = next(tmp_path.glob("validations/**/*.html")).read_text(encoding="utf-8")
    assert "no image stands in two splits" in page


@pytest.mark.parametrize(
    ("expectation", "complaint"),
    [
        ({"type": "expect_column_valuez_to_not_be_null", "column": "a"}, "valuez"),
        ({"type": IN_SET, "column": "a", "value_sets": [1]}, "value_sets"),
    ],
)
def test_a_wrong_expectation_is_refused(tmp_path: Path, expectation: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)table 'table' is no expectation.*{complaint}"):
        check(tmp_path, pd.DataFrame({"id": ["p"], "a": [1]}), expectation)


def test_an_expectation_is_never_dropped_in_silence(tmp_path: Path) -> None:
    same = {"type": NOT_NULL, "column": "a"}
    with pytest.raises(ValueError, match="stated twice"):
        check(tmp_path, pd.DataFrame({"id": ["p"], "a": [1]}), same, dict(same))
    with pytest.raises(ValueError, match=r"'tabel'.*only table"):
        validate("set", {"table": pd.DataFrame({"id": ["p"]})}, {"tabel": []}, tmp_path)


def test_it_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        check(
            tmp_path,
            pd.DataFrame({"id": ["p"], "a": [1]}),
            {"type": NOT_NULL, "column": "absent"},
            {"type": IN_SET, "column": "a", "value_set": [2]},
        )
        assert capfd.readouterr() == ("", "")
        # The log of others, and its own afterwards, is as it was.
        logging.getLogger("great_expectations").warning("heard again")
    finally:
        logging.getLogger().removeHandler(handler)
    assert "heard again" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("expectation", "sentence"),
    [
        ({"type": BETWEEN, "column": "a", "min_value": 0, "max_value": 1}, "a must be between 0 and 1"),
        ({"type": BETWEEN, "column": "a", "min_value": 1, "max_value": 1}, "a must be 1"),
        ({"type": BETWEEN, "column": "a", "min_value": 1}, "a must be at least 1"),
        ({"type": BETWEEN, "column": "a", "max_value": 0}, "a must be at most 0"),
        ({"type": IN_SET, "column": "a", "value_set": list(range(100))}, "a must be one of 0, 1, 2, ..., 99"),
        (
            {"type": "expect_table_row_count_to_be_between", "min_value": 1, "max_value": 5},
            "the number of rows must be between 1 and 5",
        ),
        (
            {"type": "expect_column_values_to_match_regex", "column": "a", "regex": "^x"},
            "column values to match regex (column a, regex ^x)",
        ),
    ],
)
def test_expectations_in_words(expectation: dict[str, Any], sentence: str) -> None:
    assert requirement(expectation) == sentence


def test_plain_data_is_json_in_a_fixed_order() -> None:
    odd = {
        1: {"c", "a", "b"},
        "numbers": (np.int64(3), np.float32(0.5), np.nan, np.inf, range(2), np.array([1])),
        "missing": [None, pd.NA, pd.NaT],
        "flags": [np.bool_(True), False],
    }
    assert plain(odd) == {
        "1": ["a", "b", "c"],
        "numbers": [3, 0.5, None, "inf", [0, 1], [1]],
        "missing": [None, None, None],
        "flags": [True, False],
    }
