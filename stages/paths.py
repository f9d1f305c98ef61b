"""Where everything lies, relative to the root. dvc.yaml names the same paths; a test compares."""

import json
from collections.abc import Collection, Iterable
from pathlib import Path

from data.errors import UserError
from data.files import sha256

CONTENTS = "contents.json"


def raw(source: str) -> Path:
    """What was fetched."""
    return Path("data/raw") / source


def prepared(task: str, dataset: str) -> Path:
    """Arrays and manifest."""
    return Path("data/prepared") / task / dataset


def validated(task: str, dataset: str) -> Path:
    """Proof that a data set met its expectations."""
    return Path("data/validated") / task / f"{dataset}.json"


def require_validated(task: str, dataset: str) -> None:
    """Nothing trains on data that did not meet its expectations, and nothing is measured on it.

    Raises:
        UserError: there is no proof that it did.
    """
    proof, manifest = validated(task, dataset), prepared(task, dataset) / "manifest.csv"
    if not proof.is_file():
        raise UserError(
            f"data set {dataset!r} has not passed validation ({proof} is missing) · run `dvc repro validate@{dataset}`"
        )
    if not manifest.is_file() or json.loads(proof.read_text(encoding="utf-8"))["manifest"] != sha256(manifest):
        raise UserError(
            f"data set {dataset!r} changed since it passed validation ({manifest}) · run `dvc repro validate@{dataset}`"
        )


def trained(task: str, model: str) -> Path:
    """A teacher or student."""
    return Path("models/trained") / task / model


def companions(task: str, student: str) -> Path:
    """What was trained beside a model: models in folders of their own, and tables. Nothing for most.

    `contents.json` names them; `evaluated` are those that answer the question of the task.
    """
    return Path("models/companions") / task / student


def models(task: str, names: Iterable[str]) -> dict[str, Path]:
    """Folders of trained models: those of params.yaml by `names`, each followed by its companions as NAME.COMPANION, if
    they are evaluated.

    No entry of params.yaml has a dot in its name.
    """
    found = {}
    for name in names:
        found[name] = trained(task, name)
        beside = companions(task, name)
        contents = beside / CONTENTS
        evaluated = json.loads(contents.read_text(encoding="utf-8"))["evaluated"] if contents.is_file() else []
        found |= {f"{name}.{companion}": beside / companion for companion in evaluated}
    return found


def refuse_strangers(task: str, names: Collection[str]) -> None:
    """What lies among the models of a task enters the digest of its evaluation; it has to be known.

    Raises:
        UserError: a folder that params.yaml does not name, left by a student that was renamed or removed.
    """
    for folder in (trained(task, "none").parent, companions(task, "none").parent):
        found = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
        if strangers := [name for name in found if name not in names and name != "none"]:
            raise UserError(
                f"{folder} holds models that params.yaml does not name: {', '.join(strangers)} · "
                f"name them there, or remove them: rm -r {' '.join(str(folder / name) for name in strangers)}"
            )


def exported(task: str, student: str) -> Path:
    """A deployable student as ONNX."""
    return Path("models/exported") / task / student


def curves(task: str, model: str) -> Path:
    """Training curves, a row per recorded step."""
    return Path("reports/curves") / task / f"{model}.csv"


def metrics(task: str) -> Path:
    """Folder with the figures of every model of a task."""
    return Path("reports/metrics") / task


def evaluation(task: str) -> Path:
    """Folder with the results of every model of a task on every sample and class, and their record."""
    return Path("reports/evaluation") / task


def validation_report(task: str, dataset: str) -> Path:
    """Findings and Data Docs of one data set."""
    return Path("reports/validation") / task / dataset


def latency(task: str) -> Path:
    """Measured latency of a task's models."""
    return Path("reports/latency") / f"{task}.json"


def checkpoints(stage: str, key: str) -> Path:
    """Training that is under way."""
    return Path(".checkpoints") / stage / key


def lock(stage: str, key: str) -> Path:
    """Held by the process that trains a model; outside of what is removed at the end."""
    return Path(".checkpoints") / stage / f"{key}.lock"
