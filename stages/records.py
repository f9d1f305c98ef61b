"""What trainings and evaluations write down: JSON lines, complete without any server.

The first line says whose record it is: {"stage": ..., "key": ..., "digest": ...}; every other line is one value:
{"step": ..., "name": ..., "value": ...}. No line holds a time: the same work writes the same bytes.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from data.files import write_file

FILE = "record.jsonl"


class Record:
    """A growing record.

    Args:
        length: bytes of an earlier record in the same place that are kept, when training resumes from a checkpoint;
            0 starts anew.
    """

    def __init__(self, path: Path, header: Mapping[str, str], length: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if length:
            os.truncate(path, length)
        else:
            path.write_text(json.dumps(dict(header)) + "\n", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append values, six significant digits each.

        Raises:
            ValueError: a value is not finite.
        """
        for name, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value} at step {step}")
        lines = [json.dumps({"step": step, "name": name, "value": float(f"{x:.6g}")}) for name, x in values.items()]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))

    def length(self) -> int:
        """Bytes written so far, all of them on disk."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        return self.path.stat().st_size


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The values of a record, without its header."""
    with path.open(encoding="utf-8") as file:
        next(file)
        for line in file:
            yield json.loads(line)


def write_curves(record: Path, curves: Path) -> None:
    """The record as a table that DVC plots: a row per step, a column per name."""
    table = pd.DataFrame(read(record)).pivot(index="step", columns="name", values="value")
    write_file(curves, lambda file: file.write(table.to_csv(lineterminator="\n").encode()))
