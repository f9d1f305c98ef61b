"""The registry: which students there are, which one is champion, and how it became that.

    register    every exported student of a task becomes a version of the registered model TASK, once; the best one on
                validation, of those that know the most classes, gets the alias `challenger`
    promote     the challenger becomes `champion` if it passes every gate (`gates` in params.yaml); exit code 1 if not
    rollback    the champion before this one is champion again
    show        versions, aliases, figures and the last decision

Everything is read from files that `dvc repro` wrote and `python -m stages.latency` measured. Decisions are written to
decisions/TASK/, as text to read and as JSON.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import UserError
from pipelines import gates, tracking
from pipelines.candidates import (
    Candidate,
    best,
    candidates,
    digest_of_question,
    gates_of,
    origin,
    read_json,
    samples_of_test,
)
from pipelines.decisions import FOLDER
from pipelines.promotion import promote, rollback
from pipelines.versions import (
    CHALLENGER,
    SAMPLES,
    TAG_LENGTH,
    aliases,
    ensure_model,
    key,
    locked,
    task_module,
    versions,
)
from stages.command import errors_told
from stages.parameters import Parameters, load, select

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger("distillery")

SERVING = Path(__file__).parent / "serving"
QUIET = {"MLFLOW_LOGGING_LEVEL": "ERROR", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
# What a server of any model has to have, beside what its task asks for; the versions are those that are installed here.
REQUIREMENTS = ("mlflow", "numpy", "onnxruntime")


def register(task: str) -> None:
    """Register every exported student, and name the challenger.

    Raises:
        UserError: a file is not what was described; nothing is registered then.
    """
    parameters = _parameters(task)
    with locked():
        found, notes = candidates(task, parameters)
        client = tracking.connect()
        ensure_model(client, task)
        settings = gates_of(task, parameters)
        known = {key(task, version.tags): version for version in versions(client, task)}
        chosen = best(found)
        for candidate in found:
            own = key(task, _digests(task, candidate.description))
            if new := own not in known:
                known[own] = _register(client, task, candidate, settings.metric, parameters)
            version = known[own]
            mark = f", {CHALLENGER}" if candidate is chosen else ""
            print(
                f"version {version.version}: {candidate.name} ({'new' if new else 'registered before'}{mark}), "
                f"{settings.metric} {candidate.validation:.4f} on validation"
            )
            if candidate is chosen:
                client.set_registered_model_alias(task, CHALLENGER, version.version)
    for note in notes:
        print(f"note: {note}")


def show(task: str) -> None:
    """Print what is registered."""
    settings = gates_of(task, _parameters(task))
    client = tracking.connect()
    found = versions(client, task)
    if not found:
        print(f"nothing is registered for task {task!r} · run `python -m pipelines.registry register {task}`")
        return
    held = aliases(client, task)
    rows = [["version", "student", "method", "aliases", f"validation {settings.metric}", "test", "last decision", ""]]
    for version in sorted(found, key=lambda one: int(one.version)):
        tags = version.tags
        own = ", ".join(sorted(alias for alias, number in held.items() if number == str(version.version)))
        figures = [tags.get("validation", "-"), tags.get("test", "-")]
        decided = [tags.get("decision", "-"), tags.get("decision_time", "")]
        rows.append([str(version.version), tags.get("student", "?"), tags.get("method", "?"), own or "-"])
        rows[-1] += figures + decided
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    records = sorted((FOLDER / task).glob("*.json"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    if records:
        last = read_json(records[-1])
        failed = [name for name, check in last["gates"].items() if check["verdict"] == "failed"]
        print(f"\nlast decision: {last['decision']}, {last['time']}, version {last['version']} ({last['student']})")
        print("".join(f"  failed  {name}: {last['gates'][name]['sentence']}\n" for name in failed), end="")
        print(f"record: {records[-1].with_suffix('.md')}")


def _register(
    client: "MlflowClient", task: str, candidate: Candidate, metric: str, parameters: Parameters
) -> "ModelVersion":
    """A new version, with its files and tags."""
    import mlflow

    description = candidate.description
    module = task_module(task)
    experiment = _experiment(client, task)
    mlflow.set_experiment(experiment_id=experiment)
    with tempfile.TemporaryDirectory(prefix="distillery-") as folder:
        samples = Path(folder) / SAMPLES
        samples_of_test(task, candidate.name).to_csv(samples, index=False, lineterminator="\n")
        logged = mlflow.pyfunc.log_model(
            name=candidate.name,
            python_model=str(SERVING / f"{task}.py"),
            artifacts={
                "onnx": str(candidate.onnx),
                "description": str(candidate.exported / gates.DESCRIPTION),
                "samples": str(samples),
                **{Path(name).stem: str(candidate.exported / name) for name in module.FILES},
            },
            signature=module.signature(description),
            input_example=module.example(description),
            pip_requirements=_requirements(module.REQUIREMENTS),
            metadata={"request": module.REQUEST, **gates.interface(description)},
        )
    tags = _tags(task, candidate, metric, parameters)
    run = _run(client, experiment, candidate.stage)
    if run:
        tags["run"] = run
    # With its tags from the first moment on: a version is never there without the digest by which it is found.
    return client.create_model_version(
        task,
        source=logged.artifact_path,
        run_id=run,
        model_id=logged.model_id,
        tags=tags,
        description=f"{candidate.name} ({candidate.entry.method}); request: {module.REQUEST}",
    )


def _tags(task: str, candidate: Candidate, metric: str, parameters: Parameters) -> dict[str, str]:
    description, made = candidate.description, origin()
    teacher = description["teacher"] or {"name": "none", "weights_sha256": "none"}
    sources = description["sources"]
    tags = {
        "task": task,
        "student": candidate.name,
        "method": candidate.entry.method,
        "teacher": teacher["name"],
        **_digests(task, description),
        "teacher_sha256": teacher["weights_sha256"],
        "dataset": description["dataset"]["name"],
        "data_sha256": description["dataset"]["digest"],
        "test_sha256": digest_of_question(task, description["dataset"]["name"], parameters),
        "metric": metric,
        "validation": f"{candidate.validation:.6g}",
        "parameters": str(description["parameters"]),
        "licences": "; ".join(f"{source['name']}: {source['licence']}" for source in sources),
        "redistributable": str(all(source["redistributable"] for source in sources)).lower(),
        "git_revision": made.revision or "none",
        "git_clean": str(made.revision is not None and not made.changes).lower(),
        "dvc_lock_sha256": made.lock_sha256,
        "registered": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return {name: value[:TAG_LENGTH] for name, value in tags.items()}


def _digests(task: str, description: dict[str, Any]) -> dict[str, str]:
    """sha256 of weights and of what is served, as a version's tags have them."""
    own = {tag: description["interface"][tag] for tag in task_module(task).FILES.values()}
    return {"weights_sha256": description["weights_sha256"], "onnx_sha256": description["onnx_sha256"], **own}


def _requirements(own: tuple[str, ...]) -> list[str]:
    from importlib.metadata import version

    return [f"{name}=={version(name)}" for name in (*REQUIREMENTS, *own)]


def _experiment(client: "MlflowClient", task: str) -> str:
    """The experiment of a task, in which its runs lie too."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(task):
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(task))
    except MlflowException as error:  # the writer of records was faster
        if found := client.get_experiment_by_name(task):
            return str(found.experiment_id)
        raise UserError(tracking.explain(error)) from error


def _run(client: "MlflowClient", experiment: str, stage: str) -> str | None:
    """The run of the training that made a student, if its record has been brought to MLflow."""
    if not stage:
        return None
    found = client.search_runs([experiment], f"tags.digest = '{stage}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def _parameters(task: str) -> Parameters:
    parameters = load()
    select(parameters.tasks, task, "task")
    return parameters


def main() -> None:
    """The command line."""
    actions: dict[str, Callable[[str], Any]] = {
        "register": register,
        "promote": promote,
        "rollback": rollback,
        "show": show,
    }
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.registry",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m pipelines.registry register recognition\n"
        "then:    python -m pipelines.registry promote recognition\n"
        "serve:   MLFLOW_TRACKING_URI=sqlite:///mlflow.db mlflow models serve -m models:/recognition@champion "
        "--env-manager local",
    )
    parser.add_argument("action", choices=actions, help="what to do")
    parser.add_argument("task", metavar="TASK", help="name of a task in params.yaml")
    given = parser.parse_args()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with errors_told(f"registry {given.action} {given.task}", explain):
        passed = actions[given.action](given.task)
    sys.exit(1 if passed is False else 0)


def explain(error: Exception) -> str | None:
    """What a user can mend in an error of MLflow's; None for any other."""
    from mlflow.exceptions import MlflowException

    return tracking.explain(error) if isinstance(error, MlflowException) else None


if __name__ == "__main__":
    main()
