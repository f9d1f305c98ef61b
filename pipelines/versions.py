"""What stands in the registry: versions of a task's registered model, their aliases and files, one change at a time."""

import contextlib
import fcntl
import importlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import UserError
from data.files import sha256
from pipelines import gates
from pipelines.decisions import FOLDER

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger("distillery")

CHAMPION, CHALLENGER = "champion", "challenger"
SAMPLES = "test.samples.csv"
TAG_LENGTH = 4900  # MLflow keeps 5,000 characters


def served(task: str) -> dict[str, str]:
    """The files that a version of a task is served from, each with the tag that holds its sha256."""
    return {gates.ONNX: "onnx_sha256", **task_module(task).FILES}


def key(task: str, tags: Mapping[str, str]) -> tuple[str, ...]:
    """What makes a version the same student: its weights, and the files that are served."""
    return tuple(tags.get(name, "") for name in ("weights_sha256", *served(task).values()))


def versions(client: "MlflowClient", task: str) -> list["ModelVersion"]:
    """Every registered version of a task."""
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name='{task}'", max_results=200, page_token=token)
        found.extend(page)
        token = page.token
        if not token:
            return found


def aliases(client: "MlflowClient", task: str) -> dict[str, str]:
    """Version by alias; nothing where nothing is registered."""
    from mlflow.exceptions import MlflowException

    try:
        return {alias: str(number) for alias, number in client.get_registered_model(task).aliases.items()}
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise


def stored(task: str, version: str, model: str = "") -> Path:
    """The folder with the artifacts of a version: model.json, test.samples.csv, and what it is served from.

    Args:
        model: name of the registered model, where it is not the task's: one that versions were copied into.

    Raises:
        UserError: they are gone.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    model = model or task
    try:
        folder = Path(download_artifacts(artifact_uri=f"models:/{model}/{version}")) / "artifacts"
    except (MlflowException, OSError) as error:
        raise UserError(
            f"the files of version {version} of {model!r} cannot be read from the registry ({error}) · bring the "
            "artifact store back, or delete the version and register the student again"
        ) from None
    for name in (*served(task), gates.DESCRIPTION, SAMPLES):
        if not (folder / name).is_file():
            raise UserError(
                f"version {version} of {model!r} has no {name} in the registry · delete it and register again"
            )
    return folder


def changed(version: "ModelVersion", folder: Path) -> str:
    """What is said of the first file in the registry that is not what was registered; nothing where all are.

    Args:
        folder: as `stored` found it.
    """
    for name, tag in served(version.tags["task"]).items():
        found, wanted = sha256(folder / name), version.tags[tag]
        if found != wanted:
            return f"{name} in the registry is not what was registered: wanted sha256 {wanted}, got {found}"
    return ""


@contextlib.contextmanager
def locked(path: Path = FOLDER / ".lock", what: str = "the registry") -> Iterator[None]:
    """One command at a time changes the registry of this project; the kernel lets go when the process ends.

    Args:
        path: the file that is locked. what: is changed, if something else than the registry.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another command that changes %s", what)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ensure_model(client: "MlflowClient", task: str) -> None:
    """The registered model of a task."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(task, description=f"Deployable students of the task {task!r}.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def task_module(task: str) -> Any:
    """What the registry has to know of a task: `pipelines.tasks.<task>`."""
    return importlib.import_module(f"pipelines.tasks.{task}")
