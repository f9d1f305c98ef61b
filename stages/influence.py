"""Print the training samples that harmed and that helped a student most, and list all for whoever cleans the data.

Not a stage: it reads what the training of the student left beside it. The influence of a sample is how much a step on
it lowers the student's loss on samples that are held out of training: below 0 it harms. `--export` writes every sample,
the most harmful first: what is labelled wrongly tends to stand on top.
"""

import argparse
import logging
import math
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data import text as data
from data.errors import UserError
from data.files import is_disk_full, sha256, write_file
from models.artifacts import DESCRIPTION, read_description
from stages import command, paths
from stages.parameters import Parameters, load, select
from stages.parameters.shared import Student

TABLE = "influence.csv"
COLUMNS = ("row", "visits", "mean")
TOP, NARROWEST, USUAL_WIDTH = 10, 40, 100
# A text is cut between words, unless the last of them is longer than this.
WORD = 16


@dataclass(frozen=True)
class Detection:
    """How well low influence finds labels that were flipped on purpose.

    Attributes:
        area, error: of the ROC curve, and its standard error. precision: share of flipped ones among the lowest
            `flipped`, as many as there are. samples: all of them.
    """

    area: float
    error: float
    precision: float
    flipped: int
    samples: int


def influences(task: str, student: str, dataset: str) -> pd.DataFrame | None:
    """A row per training sample that was met, the most harmful first; None where the student's method records none.

    Columns: those of the manifest (id, label, text, ...), `class` (the name of its label), `visits`, `mean` and
    `epoch_1` ... (its influence over all visits, and over those of one epoch).

    Raises:
        UserError: the student is not trained, its data set is not there, or it was trained on other data.
    """
    trained, prepared = paths.trained(task, student), paths.prepared(task, dataset)
    file, manifest = paths.companions(task, student) / TABLE, prepared / "manifest.csv"
    if not (trained / DESCRIPTION).is_file():
        raise UserError(f"{student} is not trained yet ({trained} is missing) · run `dvc repro distill@{student}`")
    if not file.is_file():
        return None
    if not manifest.is_file():
        raise UserError(f"{manifest} is missing · run `dvc repro prepare@{dataset}`")
    found = pd.read_csv(file)
    if missing := [name for name in COLUMNS if name not in found]:
        raise UserError(f"{file} has no column {missing[0]!r} · remove it and run `dvc repro distill@{student}`")
    samples = pd.read_csv(manifest, dtype={"id": str, "text": str, "pair": str}, keep_default_na=False, na_values=[""])
    before = read_description(trained).dataset["digest"]
    now = sha256(manifest)
    if before != now or not found["row"].isin(samples.index).all():
        raise UserError(
            f"{file} is about other data than is prepared now ({manifest}: sha256 {before} then, {now} now) · "
            f"run `dvc repro distill@{student}`"
        )
    found = found[found["visits"] > 0].join(samples, on="row")
    names = data.describe(prepared)["classes"]
    found["class"] = [names[label] for label in found["label"]]
    return found.sort_values(["mean", "row"], ignore_index=True)


def detection(found: pd.DataFrame) -> Detection | None:
    """How well influence finds flipped labels; None where none, or all, are known to be flipped.

    Args:
        found: of `influences`.
    """
    if "flipped" not in found or found["flipped"].nunique() < 2:
        return None
    flipped = found["flipped"].to_numpy() == 1
    area, error = roc_area(found["mean"].to_numpy(), flipped)
    count = int(flipped.sum())
    return Detection(area, error, float(flipped[:count].mean()), count, len(found))


def roc_area(values: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """The probability that one that is wanted has a lower value than one that is not, ties by half; standard error.

    This is the area under the ROC curve of a search from the lowest value on. The error is NaN where either kind has a
    single member.

    Args:
        values: (N,). wanted: (N,) bool, both kinds being there.

    Source: DeLong, DeLong and Clarke-Pearson 1988, "Comparing the areas under two or more correlated receiver operating
    characteristic curves", for one curve.
    """
    ranks = pd.Series(values).rank().to_numpy()
    # A rank less the rank among its own kind: how many of the other kind have a lower value.
    below = [ranks[kind] - pd.Series(values[kind]).rank().to_numpy() for kind in (wanted, ~wanted)]
    shares = [1 - below[0] / len(below[1]), below[1] / len(below[0])]
    error = math.sqrt(sum(part.var(ddof=1) / len(part) for part in shares)) if min(map(len, shares)) > 1 else math.nan
    return float(shares[0].mean()), error


def readable(sample: pd.Series, most: int) -> str:
    """The text of a sample, or both of a pair, in one line of at most `most` characters that can be printed."""
    parts = [str(sample[name]) for name in ("text", "pair") if name in sample and not pd.isna(sample[name])]
    line = _printable(" | ".join(parts) or str(sample["id"]))
    if len(line) <= most:
        return line
    space = line.rfind(" ", most - WORD, most)
    return line[: space if space > 0 else most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _printable(text: str) -> str:
    """In one line, without what a terminal would take for a command."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def main(key: str, top: int = TOP, export: Path | None = None) -> None:
    """Print, and list if wanted.

    Raises:
        UserError: the student is unknown, not trained or records no influence, or the list cannot be written.
    """
    parameters = load()
    entry = select(parameters.students, key, "student")
    found = influences(entry.task, key, entry.dataset)
    if found is None:
        raise UserError(f"{key} (method {entry.method!r}) records no influence of samples · {_others(parameters)}")
    if export is not None:
        _export(found, export)
    print(_text(key, entry, found, top))
    if export is not None:
        print(f"\nlist: {export} ({len(found):,} samples, the most harmful first)")


def _others(parameters: Parameters) -> str:
    """What to do about a student without a table."""
    known = [
        name for name, entry in parameters.students.items() if (paths.companions(entry.task, name) / TABLE).is_file()
    ]
    return f"these do: {', '.join(known)}" if known else "method 'lgtm' does, if its influence_scale is not 0"


def _text(key: str, entry: Student, found: pd.DataFrame, top: int) -> str:
    width = max(shutil.get_terminal_size((USUAL_WIDTH, 0)).columns, NARROWEST)
    marked = found.get("flipped", pd.Series(0, index=found.index)) == 1
    labels = [_printable(name) + " (flipped)" * mark for name, mark in zip(found["class"], marked, strict=True)]
    said = [
        f"{key} ({entry.method} on {entry.dataset}): influence of {len(found):,} training samples",
        f"{100 * (found['mean'] < 0).mean():.1f} % have a negative influence: steps on them harm held-out samples",
    ]
    if check := detection(found):
        said.append(
            f"{check.flipped:,} labels were flipped on purpose; low influence finds them with an ROC area of "
            f"{check.area:.3f} (s.e. {check.error:.3f}, DeLong), and {100 * check.precision:.1f} % of the lowest "
            f"{check.flipped:,} are flipped"
        )
    lines = [textwrap.fill(line, width) for line in said]
    harmful = found.index[:top]
    for title, rows in (("most harmful", harmful), ("most helpful", found.index[::-1][:top])):
        figures = [f"{found.loc[row, 'mean']:+.3g}" for row in rows]
        wide = [max(map(len, cells), default=0) for cells in (figures, [labels[row] for row in rows])]
        lines += ["", title]
        for figure, row in zip(figures, rows, strict=True):
            start = f"  {figure.rjust(wide[0])}  {labels[row].ljust(wide[1])}  "
            lines.append(start + readable(found.loc[row], max(width - len(start), NARROWEST // 2)))
    return "\n".join(lines)


def _export(found: pd.DataFrame, file: Path) -> None:
    columns = {"id": "id", "class": "label", "mean": "influence", "visits": "visits", "text": "text", "pair": "pair"}
    table = found[[name for name in columns if name in found]].rename(columns=columns)
    table.insert(0, "rank", range(1, len(table) + 1))
    try:
        write_file(file, lambda opened: opened.write(table.to_csv(index=False, lineterminator="\n").encode()))
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"--export {file} cannot be written ({error.strerror}) · name another file") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _command_line() -> None:
    command.end_with_parent()
    parser = argparse.ArgumentParser(
        prog="python -m stages.influence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m stages.influence text-lgtm --export to-check.csv",
    )
    parser.add_argument("key", metavar="STUDENT", help="name of a student in params.yaml")
    parser.add_argument("--export", metavar="FILE.csv", type=Path, help="write all samples there")
    parser.add_argument("--top", metavar="N", type=_positive, default=TOP, help=f"how many to print; {TOP} by default")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with command.errors_told(f"influence {given.key}"):
        main(given.key, given.top, given.export)


if __name__ == "__main__":
    _command_line()
