"""Records: what is written, cut back and refused."""

import json
from pathlib import Path

import pandas as pd
import pytest

from stages.records import Record, read, write_curves

HEADER = {"stage": "teach", "key": "x", "digest": "d"}


def test_a_record_starts_with_its_owner_and_holds_a_value_per_line(tmp_path: Path) -> None:
    record = Record(tmp_path / "a" / "record.jsonl", HEADER)
    record.write(3, {"loss": 0.123456789, "rate": 1e-9})
    first, *values = (tmp_path / "a" / "record.jsonl").read_text().splitlines()
    assert json.loads(first) == HEADER
    assert [json.loads(line) for line in values] == [
        {"step": 3, "name": "loss", "value": 0.123457},
        {"step": 3, "name": "rate", "value": 1e-9},
    ]
    assert list(read(record.path)) == [json.loads(line) for line in values]


def test_a_record_goes_on_after_an_earlier_length(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record = Record(path, HEADER)
    record.write(1, {"loss": 1.0})
    length = record.length()
    kept = path.read_bytes()
    record.write(2, {"loss": 2.0})
    again = Record(path, HEADER, length)
    assert path.read_bytes() == kept
    again.write(2, {"loss": 3.0})
    assert [line["value"] for line in read(path)] == [1.0, 3.0]


def test_a_new_record_forgets_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    Record(path, HEADER).write(1, {"loss": 1.0})
    Record(path, HEADER)
    assert list(read(path)) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_whole(value: float, tmp_path: Path) -> None:
    record = Record(tmp_path / "record.jsonl", HEADER)
    before = record.path.read_bytes()
    with pytest.raises(ValueError, match=r"loss is .* at step 4"):
        record.write(4, {"fine": 1.0, "loss": value})
    assert record.path.read_bytes() == before


def test_curves_are_a_table_that_dvc_plots(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.jsonl", HEADER)
    record.write(9, {"loss": 2.0})
    record.write(19, {"loss": 1.0, "validation/top_1": 0.5})
    write_curves(record.path, tmp_path / "curves.csv")
    table = pd.read_csv(tmp_path / "curves.csv")
    assert list(table.columns) == ["step", "loss", "validation/top_1"]
    assert table["loss"].tolist() == [2.0, 1.0]
    assert table["validation/top_1"].isna().tolist() == [True, False]
