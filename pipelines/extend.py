"""More classes for a deployed student of zero-shot recognition, from their attributes alone: one command.

The new student answers with the classes of the old one and, after them, with the new ones: its generator synthesises
features of what no sample was ever seen of, and the last layer is trained anew. Everything is checked first; then the
new student gets its entries in params.yaml, the flow makes what is not there yet, its latency is measured where the
others' was, and it is registered as a new version. Typed again, the command does nothing new.

FILE is a CSV with a header: the attributes of the data set by their names (`attributes` in its dataset.json), in any
order, and a column `name`. Without --class every row is a new class. With --class it is the row of that name; the
column may then be left out where a file has one row.

Attributes are given in raw units. They are divided by the `divisors` of dataset.json; where all rows of the data set
have length 1, each new row is divided by its length, too.
"""

import argparse
import csv
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data import zero_shot as data
from data.errors import UserError, suggest
from data.files import write_file
from models.artifacts import read_description
from pipelines import distillation, registry
from pipelines.candidates import read_json
from pipelines.gates import DESCRIPTION
from stages import latency, paths
from stages.command import errors_told
from stages.parameters import Parameters, load, select
from stages.parameters.zero_shot import D3GZSL, Export, Extended

TASK = "zero_shot"
PARAMETERS = Path("params.yaml")
EPILOG = """examples:
  python -m pipelines.extend zero_shot-d3gzsl --name zero_shot-more --attributes "new classes.csv"
  python -m pipelines.extend zero_shot-d3gzsl --name zero_shot-more --class 5-dotted-bold --attributes one.csv
then:     python -m pipelines.registry promote zero_shot"""
NAME = "name"  # the column with the names of classes
LENGTH = 1e-4  # by how much a row of length 1 may differ from it
DIGITS = 7  # of float32, in which attributes are kept
WIDTH = 120  # of a line in params.yaml
WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}  # other things to some reader of YAML
SHOWN = 5  # names in a message
OPENING = (
    *(yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken),
    *(yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken),
)
CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


@dataclass(frozen=True)
class Known:
    """What is known of the student that gets more classes.

    Attributes:
        classes: names, in the order of its logits. attributes: (classes, A), as its generator has them.
        names: of the A attributes. divisors: what raw attributes (A,) were divided by, before the length of rows.
    """

    classes: list[str]
    attributes: np.ndarray
    names: list[str]
    divisors: np.ndarray


def extend(student: str, name: str, requests: Sequence[tuple[str | None, Path]]) -> None:
    """Make and register the student `name`: `student` with more classes.

    Args:
        requests: files of attributes, each with the class that is taken out of it; None: all of its rows.

    Raises:
        UserError: something does not fit, and nothing was changed; or what follows failed, and params.yaml has the
            new entries.
    """
    parameters = load(PARAMETERS)
    old, exported = _deployed(parameters, student)
    known = _known(student, old.dataset)
    rows: dict[str, list[float]] = {}
    for wanted, file in requests:
        for label, numbers in read(file, known.names, wanted).items():
            _check_name(label, known.classes, rows)
            rows[label] = numbers
    added, said = in_units(rows, known)
    for label, nearest, cosine in alike(added, known):
        print(f"{label}: nearest by its attributes is {nearest} (cosine {cosine:.3f})")
    print(f"attributes were {said}")
    entry = Extended(
        task=TASK, dataset=old.dataset, method="extended", teacher=student, added=added, **_classifier(old)
    )
    _write(parameters, name, entry, exported)
    if distillation.main(["--task", TASK]):
        raise UserError(
            "the flow failed, as said above · params.yaml keeps the new entries; mend what failed, and `dvc repro` or "
            f"the same command goes on, or remove students.{name} and exports.{name}"
        )
    _measure(name)
    registry.register(TASK)
    print(f"next: commit params.yaml and dvc.lock, then `python -m pipelines.registry promote {TASK}`")


def _deployed(parameters: Parameters, student: str) -> tuple[D3GZSL | Extended, Export]:
    """The entries of a student that can get more classes."""
    entry = select(parameters.students, student, "student")
    able = [name for name, other in parameters.students.items() if isinstance(other, D3GZSL | Extended)]
    if not isinstance(entry, D3GZSL | Extended):
        raise UserError(
            f"students.{student} is of method {entry.method!r}, which has no generator: what a new class looks like, "
            f"only students of 'd3gzsl' and 'extended' can tell ({', '.join(able) or 'there is none'}) · name one"
        )
    if student not in parameters.exports:
        raise UserError(f"{student} is not deployed: it has no entry under `exports` in params.yaml · add one")
    exported: Any = parameters.exports[student]
    return entry, exported


def _known(student: str, dataset: str) -> Known:
    """What the files say of a student, its generator and its data set."""
    from safetensors.numpy import load_file

    repair = f"run `dvc repro distill@{student}`"
    description = read_description(paths.trained(TASK, student))
    folder = paths.companions(TASK, student) / "generator"
    generator = read_description(folder)
    beside = (generator.beside or {}).get("weights_sha256")
    if beside != description.weights_sha256:
        raise UserError(
            f"the generator in {folder} was trained beside other weights than {student} has (sha256 {beside}, now "
            f"{description.weights_sha256}) · {repair}"
        )
    prepared = paths.prepared(TASK, dataset)
    if not (prepared / "dataset.json").is_file():
        raise UserError(f"{prepared / 'dataset.json'} is missing · run `dvc repro prepare@{dataset}`")
    described = data.describe(prepared)
    names = described["attributes"]
    attributes = load_file(folder / "weights.safetensors")["attributes"]
    classes = description.interface["classes"]
    if attributes.shape != (len(classes), len(names)):
        raise UserError(
            f"the generator in {folder} knows attributes of shape {attributes.shape}, and {student} has {len(classes)} "
            f"classes, {dataset!r} {len(names)} attributes · {repair}"
        )
    return Known(classes, attributes.astype(np.float64), names, np.array(described["divisors"]))


def read(file: Path, names: Sequence[str], wanted: str | None = None) -> dict[str, list[float]]:
    """Attributes by class out of a CSV, in the order of `names`.

    Args:
        wanted: the one class that is asked for; None: all of them.

    Raises:
        UserError: the file has other columns, or something else than finite numbers in them, or not the class.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            header, *lines = [line for line in csv.reader(opened, strict=True) if any(cell.strip() for cell in line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as CSV ({error})") from None
    except ValueError:
        raise UserError(f"{file} is empty · its first line names the attributes") from None
    header = [cell.strip() for cell in header]
    labelled = NAME in header and NAME not in names
    _check_header(file, [column for column in header if column != NAME or not labelled], names)
    if not labelled and wanted is None:
        raise UserError(f"{file} has no column {NAME!r} · add it, or say --class")
    found: dict[str, list[float]] = {}
    for number, line in enumerate(lines, start=2):
        where = f"{file}, row {number}"
        if len(line) != len(header):
            raise UserError(f"{where} has {len(line)} cells, the header has {len(header)}")
        cells = dict(zip(header, line, strict=True))
        label = cells[NAME].strip() if labelled else str(wanted)
        if label in found:
            again = f"class {label!r} stands there twice" if labelled else f"it has {len(lines)} rows, and no names"
            raise UserError(f"{where}: {again} · keep one")
        if wanted in (None, label):
            found[label] = [_number(cells[name], f"{where}, attribute {name!r}") for name in names]
    if not found:
        rows = f"no row of class {wanted!r}" if wanted is not None and labelled else "no row"
        raise UserError(f"{file} has {rows} below its header · add it")
    return found


def _check_header(file: Path, header: Sequence[str], names: Sequence[str]) -> None:
    """Every attribute stands there once, and nothing else."""
    unknown, missing = [c for c in header if c not in names], [name for name in names if name not in header]
    twice = sorted({column for column in header if header.count(column) > 1})
    said = [f"{column!r} stands there twice" for column in twice[:SHOWN]]
    said += [f"unknown {column!r}; {suggest(column, missing or names)}" for column in unknown[:SHOWN]]
    if missing:
        said.append(f"missing: {', '.join(missing[:SHOWN])}" + ", ..." * (len(missing) > SHOWN))
    if said:
        raise UserError(
            f"{file} has {len(header)} attributes, the data set has {len(names)}: {'; '.join(said)} · its header has "
            "to name every attribute once"
        )


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{where} is {text!r}, no number") from None
    if not math.isfinite(value):
        raise UserError(f"{where} is {value}; a finite number is expected")
    return value


def _check_name(label: str, classes: Sequence[str], others: Mapping[str, Any]) -> None:
    if not label or label != label.strip() or not label.isprintable() or "${" in label:
        raise UserError(f"{label!r} is no name of a class: printable characters are expected, without ${{")
    if label in classes or label in others:
        whose = "is known already" if label in classes else "is given twice"
        raise UserError(f"class {label!r} {whose} · give the new one another name")


def in_units(rows: Mapping[str, Sequence[float]], known: Known) -> tuple[dict[str, list[float]], str]:
    """Raw attributes as the data set has them, and what was done to them.

    Raises:
        UserError: all attributes of a class are 0, and rows have length 1.
    """
    unit = bool((np.abs(np.linalg.norm(known.attributes, axis=1) - 1) < LENGTH).all())
    found = {}
    for label, numbers in rows.items():
        row = np.array(numbers) / known.divisors
        length = np.linalg.norm(row) if unit else 1.0
        if length == 0:
            raise UserError(f"all attributes of class {label!r} are 0, and those of the data set have length 1")
        found[label] = [float(f"{value:.{DIGITS}g}") for value in row / length]
    said = ["divided by the divisors of the data set"] * bool((known.divisors != 1).any())
    said += ["divided by their length, as every row of the data set has length 1"] * unit
    return found, ", and ".join(said) or "taken as they are"


def alike(added: Mapping[str, Sequence[float]], known: Known) -> list[tuple[str, str, float]]:
    """Per new class the one before it, of the student or of the new ones, whose attributes point most nearly its way.

    Raises:
        UserError: they are the same: nothing tells the two apart.
    """
    found = []
    names, rows = list(known.classes), list(known.attributes)
    for label, numbers in added.items():
        row, table = np.array(numbers), np.array(rows)
        if (same := np.isclose(table, row, rtol=0, atol=1e-6).all(axis=1)).any():
            other = names[int(same.argmax())]
            raise UserError(f"classes {label!r} and {other!r} have the same attributes: nothing tells them apart")
        lengths = np.linalg.norm(table, axis=1) * np.linalg.norm(row)
        cosines = np.divide(table @ row, lengths, out=np.zeros(len(table)), where=lengths > 0)
        best = int(cosines.argmax())
        found.append((label, names[best], float(cosines[best])))
        names.append(label)
        rows.append(row)
    return found


def _classifier(old: D3GZSL | Extended) -> dict[str, Any]:
    """The settings of the old student's last layer, as far as its entry has any beside how it came about."""
    settings = {**old.classifier.model_dump(exclude_unset=True), "mode": "two_stage"}
    return {"classifier": settings} if len(settings) > 1 else {}


def _write(parameters: Parameters, name: str, entry: Extended, exported: Export) -> None:
    """The two new entries in params.yaml, unless they stand there."""
    if name in parameters.students and parameters.students[name] == entry:
        if name not in parameters.exports:
            raise UserError(f"students.{name} is there, without an entry under `exports` in params.yaml · add one")
        print(f"params.yaml has students.{name} and exports.{name} already")
        return
    if name in {**parameters.teachers, **parameters.students}:
        raise UserError(f"there is another model {name!r} in params.yaml · choose another --name")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name == "none":
        raise UserError(f"--name {name!r}: a name consists of letters, digits, '-' and '_', and is not 'none'")
    wanted = replace(
        parameters,
        students={**parameters.students, name: entry},
        exports={**parameters.exports, name: exported},
    )
    text = PARAMETERS.read_bytes().decode("utf-8")
    plain = entry.model_dump(mode="json", exclude_unset=True)
    new = insert(text, "students", name, plain)
    new = insert(new, "exports", name, exported.model_dump(mode="json", exclude_unset=True))
    with tempfile.TemporaryDirectory(prefix="distillery-") as folder:
        trial = Path(folder) / PARAMETERS.name
        trial.write_bytes(new.encode())
        if load(trial) != wanted:
            raise UserError(
                f"{PARAMETERS} is written in a way that new entries do not fit into; nothing was changed · add by "
                f"hand: {json.dumps({'students': {name: plain}}, ensure_ascii=False)}, and the same name to `exports`"
            )
    write_file(PARAMETERS, lambda file: file.write(new.encode()))
    print(f"params.yaml: students.{name} and exports.{name} are new")


def insert(text: str, section: str, name: str, entry: Mapping[str, Any]) -> str:
    """params.yaml with one more entry behind the last one of a section; no other character changes.

    Raises:
        UserError: the section is not there, or stands in braces.
    """
    place, column = _end_of(text, section)
    newline = "\r\n" if "\r\n" in text else "\n"
    indent = " " * column
    if "added" in entry:
        lines = [f"{indent}{_word(name)}:"]
        lines += [f"{indent * 2}{key}: {_flow(value)}" for key, value in entry.items() if key != "added"]
        lines += [f"{indent * 2}added:", *_table(entry["added"], indent)]
    else:
        lines = [f"{indent}{_word(name)}: {_flow(entry)}"]
    return text[:place] + "".join(newline + line for line in lines) + text[place:]


def _table(rows: Mapping[str, Sequence[float]], indent: str) -> list[str]:
    """Lines with a list of numbers per class, none too long."""
    lines = []
    for label, numbers in rows.items():
        line = f"{indent * 3}{json.dumps(label, ensure_ascii=False)}: ["
        for place, number in enumerate(numbers):
            word = _flow(number) + ("]" if place == len(numbers) - 1 else ",")
            if len(line) + len(word) > WIDTH:
                lines.append(line.rstrip())
                line = indent * 4
            line += f"{word} "
        lines.append(line.rstrip())
    return lines


def _end_of(text: str, section: str) -> tuple[int, int]:
    """Where the last line of a section ends, comments below its last entry included; the column of its entries.

    Raises:
        UserError: as `insert`.
    """
    tokens = list(yaml.scan(text))
    # What stands in the first column is a section: key, name, value, and what it begins with.
    keys = [place for place, token in enumerate(tokens) if isinstance(token, yaml.KeyToken) and not _column(token)]
    begin = next((place + 3 for place in keys if getattr(tokens[place + 1], "value", None) == section), None)
    if begin is None or not isinstance(tokens[begin], yaml.BlockMappingStartToken):
        raise UserError(f"params.yaml has no section `{section}` of lines, one entry below the other · write it so")
    depth, last = 0, tokens[begin]
    for token in tokens[begin:]:
        depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
        if depth == 0:
            break
        if not isinstance(token, yaml.BlockEndToken):
            last = token
    place = len(text[: last.end_mark.index].rstrip())
    rest = re.compile(r"[^\r\n]*(\r?\n[ \t]+#[^\r\n]*)*").match(text, place)
    return rest.end() if rest else place, _column(tokens[begin])


def _column(token: yaml.Token) -> int:
    return int(token.start_mark.column)


def _flow(value: Any) -> str:
    """A value of params.yaml in one line, as every reader of YAML takes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, float):
        text = repr(value)
        return text if "e" not in text or "." in text else text.replace("e", ".0e")
    return _word(value) if isinstance(value, str) else json.dumps(value)


def _word(text: str) -> str:
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", text) and text.lower() not in WORDS
    return text if plain else json.dumps(text, ensure_ascii=False)


def _measure(name: str) -> None:
    """Its latency, where that of others was measured."""
    file = paths.latency(TASK)
    if not file.is_file():
        return
    measured = read_json(file)["models"].get(name, {})
    described = read_json(paths.exported(TASK, name) / DESCRIPTION)
    if measured.get("onnx_sha256") != described["onnx_sha256"]:
        latency.main(TASK)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.extend",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("student", metavar="STUDENT", help="the deployed student, of method d3gzsl or extended")
    parser.add_argument("--name", required=True, help="of the new student")
    parser.add_argument(
        "--class", dest="classes", metavar="NAME", action="append", default=[], help="a new class; once per class"
    )
    parser.add_argument(
        "--attributes", metavar="FILE", type=Path, action="append", required=True, help="one file, or one per --class"
    )
    given = parser.parse_args(arguments)
    files, classes = given.attributes, given.classes
    if classes and len(files) not in (1, len(classes)):
        parser.error(f"{len(classes)} --class and {len(files)} --attributes: give one file, or one per class")
    if classes:
        requests = list(zip(classes, files * len(classes) if len(files) == 1 else files, strict=True))
    else:
        requests = [(None, file) for file in files]
    for name, value in registry.QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("distillery").setLevel(logging.INFO)
    with errors_told(f"extend {given.student}", registry.explain):
        extend(given.student, given.name, requests)


if __name__ == "__main__":
    main()
