"""The students that may be registered, read from the files that the pipeline wrote; and what they were made from."""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from data.errors import UserError
from data.files import digest, sha256
from pipelines.gates import DESCRIPTION, ONNX, RECORD, evaluated, record_header, tampering
from pipelines.versions import task_module
from stages import paths
from stages.parameters import Parameters
from stages.parameters.shared import Gates, Student


@dataclass(frozen=True)
class Candidate:
    """A deployable student.

    Attributes:
        entry: its entry under `students`. description: model.json of its export.
        trained, exported: its folders. validation: its main metric on the validation split.
        stage: digest of the training that made it, as in its record; empty where there is none.
    """

    name: str
    entry: Student
    description: dict[str, Any]
    trained: Path
    exported: Path
    validation: float
    stage: str

    @property
    def onnx(self) -> Path:
        """Its ONNX file."""
        return self.exported / ONNX


@dataclass(frozen=True)
class Origin:
    """What is checked out: commit (None outside git), uncommitted changes but dvc.lock, sha256 of dvc.lock."""

    revision: str | None
    changes: list[str]
    lock_sha256: str


def origin() -> Origin:
    """The state of the working tree."""
    lock = Path("dvc.lock")
    found = sha256(lock) if lock.is_file() else "none"
    try:
        head = _git("rev-parse", "--verify", "HEAD").strip()
        # The whole repository, whose code runs here, but for the dvc.lock of this folder, which may be one inside it.
        where = ("--", ":/", ":(exclude)dvc.lock")
        changes = _git("status", "--porcelain", "--untracked-files=normal", *where).splitlines()
    except (OSError, subprocess.CalledProcessError):
        return Origin(None, [], found)
    return Origin(head, changes, found)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout


def gates_of(task: str, parameters: Parameters) -> Gates:
    """The gates of a task.

    Raises:
        UserError: it has none.
    """
    if task not in parameters.gates:
        raise UserError(f"gates.{task} is missing in params.yaml: nothing says what a champion has to pass · add it")
    return parameters.gates[task]


def candidates(task: str, parameters: Parameters) -> tuple[list[Candidate], list[str]]:
    """Every deployable student of a task, and a note for each that is not made yet.

    Raises:
        UserError: a file is not what was described, the figures are of other weights or data, the data set is
            ambiguous, or there is no student at all.
    """
    gates = gates_of(task, parameters)
    names = [name for name, export in parameters.exports.items() if export.task == task]
    datasets = sorted({parameters.exports[name].dataset for name in names})
    if gates.dataset is None and len(datasets) > 1:
        raise UserError(
            f"gates.{task}.dataset is missing: the exported students are of {len(datasets)} data sets "
            f"({', '.join(datasets)}), and their figures cannot be compared · name one"
        )
    wanted = [name for name in names if gates.dataset in (None, parameters.exports[name].dataset)]
    made = [name for name in wanted if (paths.exported(task, name) / DESCRIPTION).is_file()]
    notes = [
        f"{name} is not exported yet and is left out · run `dvc repro export@{name}`"
        for name in wanted
        if name not in made
    ]
    if not made:
        repair = "; ".join(notes) or "name one under `exports` in params.yaml"
        raise UserError(f"task {task!r} has no exported student · {repair}")
    files = task_module(task).FILES
    folders = [(paths.trained(task, name), paths.exported(task, name)) for name in made]
    problems = [said for trained, exported in folders for said in tampering(trained, exported, files)]
    if problems:
        raise UserError("nothing was registered: " + " | ".join(problems))
    # Selection on figures of other weights or data would be none.
    fresh = evaluated(task, parameters.exports[made[0]].dataset, weights(task, parameters))
    if not fresh.passed:
        raise UserError(f"nothing was registered: {fresh.sentence}")
    return [_candidate(task, name, parameters.students[name], gates.metric) for name in made], notes


def best(found: list[Candidate]) -> Candidate:
    """The challenger: the highest figure on validation; among equals the smaller, then the first by name.

    Where classes may be added (`seen`), it is one of those that know the most: one that knows fewer cannot take the
    place of one that knows more, since its callers would miss answers.
    """
    return min(
        found,
        key=lambda one: (
            -len(one.description["interface"]["classes"]) if "seen" in one.description["interface"] else 0,
            -one.validation,
            one.description["parameters"],
            one.name,
        ),
    )


def weights(task: str, parameters: Parameters) -> dict[str, str]:
    """sha256 of the weights of every model of a task that is here, companions included."""
    folders = paths.models(task, parameters.models(task))
    return {
        name: read_json(folder / DESCRIPTION)["weights_sha256"]
        for name, folder in folders.items()
        if (folder / DESCRIPTION).is_file()
    }


def digest_of_test(manifest: pd.DataFrame) -> str:
    """Digest of the test samples: name, label, score and content of each, whatever their order."""
    rows = manifest[manifest["split"] == "test"].sort_values("id")
    columns = [name for name in rows.columns if name in ("id", "label", "score") or name.endswith("sha256")]
    text = rows[columns].to_csv(index=False, lineterminator="\n")
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_question(task: str, dataset: str, parameters: Parameters) -> str:
    """`digest_of_test` of a prepared data set; where models are tested by acting, also of where and how they act."""
    samples = digest_of_test(manifest(task, dataset))
    settings = {name: getattr(parameters.tasks[task], name) for name in task_module(task).TESTED}
    if not settings:
        return samples
    environment = read_json(paths.prepared(task, dataset) / "dataset.json")["environment"]
    return digest({"samples": samples, "environment": environment, "settings": settings})


def manifest(task: str, dataset: str) -> pd.DataFrame:
    """The manifest of a prepared data set.

    Raises:
        UserError: it is not there.
    """
    file = paths.prepared(task, dataset) / "manifest.csv"
    if not file.is_file():
        raise UserError(f"{file} is missing · run `dvc repro prepare@{dataset}`")
    return _table(file)


def samples_of_test(task: str, model: str) -> pd.DataFrame:
    """What a model answered to every test sample.

    Raises:
        UserError: it was not evaluated.
    """
    file = paths.evaluation(task) / f"{model}.samples.csv"
    if not file.is_file():
        raise UserError(f"{file} is missing · run `dvc repro evaluate@{task}`")
    table = _table(file)
    return table[table["split"] == "test"].reset_index(drop=True)


def read_json(file: Path) -> dict[str, Any]:
    """A file of plain data.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{file} is missing · run `dvc repro`") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}) · remove it and run `dvc repro`") from None
    return found


def _table(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, dtype={"id": str}, keep_default_na=False, na_values=[""])


def _candidate(task: str, name: str, entry: Student, metric: str) -> Candidate:
    figures: Mapping[str, Any] = read_json(paths.metrics(task) / f"{name}.json")
    trained, exported = paths.trained(task, name), paths.exported(task, name)
    validation = figures["validation"].get(metric)
    if validation is None:
        raise UserError(
            f"gates.{task}.metric is {metric!r}, which evaluation did not give for {name} (it gave "
            f"{', '.join(figures['validation'])}) · choose another"
        )
    return Candidate(
        name=name,
        entry=entry,
        description=read_json(exported / DESCRIPTION),
        trained=trained,
        exported=exported,
        validation=validation,
        stage=str(record_header(trained / RECORD).get("digest", "")),
    )
