"""Where everything lies, relative to the root. dvc.yaml names the same paths; a test compares."""

from pathlib import Path

from data.errors import UserError


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
    if not validated(task, dataset).is_file():
        raise UserError(
            f"data set {dataset!r} has not passed validation ({validated(task, dataset)} is missing) · "
            f"run `dvc repro validate@{dataset}`"
        )


def trained(task: str, model: str) -> Path:
    """A teacher or student."""
    return Path("models/trained") / task / model


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
