"""Promotion and rollback. Tags and decision record are written first; the alias, which alone decides, is moved last.

Former champions stand in the tag `champions` of the registered model, oldest first. A process that was killed between
tag and alias leaves a name too many at its end; `history` leaves it out, so that nothing has to be repaired.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from data.errors import UserError
from data.files import sha256
from pipelines import decisions, gates, tracking
from pipelines.candidates import digest_of_question, gates_of, origin, read_json, samples_of_test, weights
from pipelines.gates import Check
from pipelines.versions import (
    CHALLENGER,
    CHAMPION,
    SAMPLES,
    TAG_LENGTH,
    aliases,
    changed,
    locked,
    served,
    stored,
    task_module,
    versions,
)
from stages import paths
from stages.parameters import Parameters, load, select
from stages.parameters.shared import Gates, Student
from stages.scores import Scores, scores

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

HISTORY = "champions"
KEPT = 200


def promote(task: str) -> bool:
    """Make the challenger champion if it passes every gate; returns whether it is champion now.

    Raises:
        UserError: there is no challenger, or what the gates need is not here.
    """
    parameters = load()
    select(parameters.tasks, task, "task")
    with locked():
        client = tracking.connect()
        held = aliases(client, task)
        if CHALLENGER not in held:
            raise UserError(
                f"task {task!r} has no challenger · run `python -m pipelines.registry register {task}` first"
            )
        if held.get(CHAMPION) == held[CHALLENGER]:
            print(f"version {held[CHAMPION]} is champion of {task} already; nothing to decide")
            return True
        challenger = client.get_model_version(task, held[CHALLENGER])
        champion = client.get_model_version(task, held[CHAMPION]) if CHAMPION in held else None
        checks, score = examine(task, parameters, challenger, champion)
        failed = gates.refused(checks)
        facts = {**_facts(challenger), "champion_before": held.get(CHAMPION), "test_score": score}
        record = decisions.write(task, "refused" if failed else "promoted", facts, checks)
        _tag(client, challenger, record, checks, score)
        if not failed:
            before = history(client, task, held.get(CHAMPION))
            client.set_registered_model_tag(task, HISTORY, json.dumps([*before, str(challenger.version)][-KEPT:]))
            client.set_registered_model_alias(task, CHAMPION, challenger.version)
    _print(task, challenger, held.get(CHAMPION), checks, record)
    return not failed


def rollback(task: str) -> None:
    """Make the champion before this one champion again.

    Raises:
        UserError: there is none, or its files are not what was registered.
    """
    select(load().tasks, task, "task")
    with locked():
        client = tracking.connect()
        now = aliases(client, task).get(CHAMPION)
        before = history(client, task, now)
        if now is None or len(before) < 2:
            raise UserError(
                f"task {task!r} has no champion before "
                + (f"version {now}, which stays" if now else "this moment: none was promoted yet")
            )
        there = {str(version.version): version for version in versions(client, task)}
        target = there.get(before[-2])
        if target is None:
            raise UserError(f"version {before[-2]}, champion before version {now}, was deleted from the registry")
        if said := changed(target, stored(task, target.version)):
            raise UserError(f"version {target.version} is not restored: its {said}")
        record = decisions.write(task, "rolled-back", {**_facts(target), "champion_before": now}, [])
        _tag(client, target, record, [], None)
        # Shortened to what holds now: a champion that stood twice would be found in its later place otherwise.
        client.set_registered_model_tag(task, HISTORY, json.dumps(before))
        client.set_registered_model_alias(task, CHAMPION, target.version)
    print(f"version {target.version} ({target.tags['student']}) is champion of {task} again, instead of version {now}")
    print(f"record: {record}")


def history(client: "MlflowClient", task: str, champion: str | None) -> list[str]:
    """Every champion up to the present one, oldest first; what a killed process wrote too much is left out."""
    if champion is None:
        return []
    written = json.loads(client.get_registered_model(task).tags.get(HISTORY, "[]"))
    if champion not in written:  # its alias was set by hand
        return [*written, champion]
    while written[-1] != champion:
        written.pop()
    return list(written)


def examine(
    task: str, parameters: Parameters, challenger: "ModelVersion", champion: "ModelVersion | None"
) -> tuple[list[Check], float | None]:
    """Every gate, and the challenger's figure on the test split.

    Raises:
        UserError: the student is not in params.yaml any more, or what it is compared with is missing.
    """
    settings = gates_of(task, parameters)
    name = challenger.tags["student"]
    if name not in parameters.exports:
        raise UserError(
            f"version {challenger.version} is {name!r}, which params.yaml exports no more · "
            f"run `python -m pipelines.registry register {task}` again"
        )
    entry = parameters.students[name]
    trained, exported = paths.trained(task, name), paths.exported(task, name)
    kept = stored(task, challenger.version)
    description = read_json(kept / gates.DESCRIPTION)
    state, today = origin(), digest_of_question(task, entry.dataset, parameters)
    samples = samples_of_test(task, name)
    registered = {"weights_sha256": challenger.tags["weights_sha256"]}
    for file, tag in served(task).items():
        registered |= {tag: challenger.tags[tag], f"stored_{tag}": sha256(kept / file)}
    ours = scores(task, samples, settings.metric)
    checks = [
        gates.untampered(trained, exported, registered, task_module(task).FILES),
        gates.validated(task, entry.dataset, description["dataset"]["digest"]),
        gates.evaluated(task, entry.dataset, weights(task, parameters)),
        _baseline(task, parameters, name, ours, settings),
        _champion(task, entry.dataset, ours, champion, settings, today),
        _teacher(task, parameters, name, ours.value, description, settings),
        gates.parity(description, settings.parity),
        gates.latency(task, name, challenger.tags["onnx_sha256"], _measured(task), settings.latency),
        _signature(task, description, champion),
        gates.redistributable(description["sources"]),
        gates.clean(state.revision, state.changes),
    ]
    return [check for check in checks if check is not None], None if math.isnan(ours.value) else ours.value


def _baseline(task: str, parameters: Parameters, name: str, ours: Scores, settings: Gates) -> Check:
    """Against the same student without what its method adds."""
    entry = parameters.students[name]
    if entry.method == settings.baseline:
        return Check("baseline", True, f"{name} is itself the baseline ({settings.baseline})", {"score": ours.value})
    others = [
        other
        for other, student in parameters.students.items()
        if student.task == task and student.dataset == entry.dataset and student.method == settings.baseline
    ]
    if not others:
        raise UserError(
            f"gates.{task}.baseline: data set {entry.dataset!r} has no student of method {settings.baseline!r} to "
            "compare with · add one to params.yaml"
        )
    # The nearest one: it shares most of its settings, network and resolution among them.
    chosen = max(others, key=lambda other: _alike(entry, parameters.students[other]))
    theirs = scores(task, samples_of_test(task, chosen), settings.metric)
    return gates.not_worse("baseline", ours, theirs, chosen, settings)


def _alike(one: Student, other: Student) -> int:
    ours, theirs = one.model_dump(exclude={"training"}), other.model_dump(exclude={"training"})
    return sum(ours[key] == theirs[key] for key in ours.keys() & theirs.keys())


def _champion(
    task: str,
    dataset: str,
    ours: Scores,
    champion: "ModelVersion | None",
    settings: Gates,
    today: str,
) -> Check:
    """Against the champion, on the same test samples: on today's, if they moved since it was registered.

    Args:
        today: `digest_of_question`.
    """
    if champion is None:
        return Check("champion", True, "there is no champion yet", {})
    label = f"version {champion.version} ({champion.tags['student']})"
    kept = stored(task, champion.version)
    if said := changed(champion, kept):
        return Check("champion", False, f"{label}: {said} · `python -m pipelines.registry rollback {task}`")
    moved = today != champion.tags["test_sha256"]
    if moved:
        try:
            description = read_json(kept / gates.DESCRIPTION)
            table = task_module(task).evaluate(kept, description, paths.prepared(task, dataset))
        except Exception as error:  # whatever ONNX Runtime says about data of another kind
            said = f"{label} cannot answer today's test data: {type(error).__name__}: {str(error)[:300]}"
            return Check("champion", False, said, {"test_sha256": today, "registered": champion.tags["test_sha256"]})
    else:
        table = pd.read_csv(kept / SAMPLES, dtype={"id": str}, keep_default_na=False, na_values=[""])
    check = gates.not_worse("champion", ours, scores(task, table, settings.metric), label, settings)
    figures = {**check.figures, "test_sha256": today, "evaluated_again": moved}
    sentence = check.sentence + "; the champion was evaluated again, because the test data moved" * moved
    return Check(check.name, check.passed, sentence, figures)


def _teacher(
    task: str, parameters: Parameters, name: str, score: float, description: dict[str, Any], settings: Gates
) -> Check:
    """Against the teacher at the end of the chain; a student of labels alone, against the best of its data set.

    A teacher that learnt together with a student (its companion `teacher`) stands for the one that it began as. One
    that never learnt the task is nothing to compare with.
    """
    folders = paths.models(task, parameters.models(task))
    chain = [name]
    while chain[-1] in parameters.students:
        together = f"{chain[-1]}.teacher"
        chain.append(together if together in folders else parameters.students[chain[-1]].teacher)
    dataset, last = parameters.students[name].dataset, chain[-1]
    learnt = {other: entry.dataset for other, entry in parameters.teachers.items() if not entry.pretrained}
    alone = [other for other, theirs in learnt.items() if theirs == dataset]
    teachers = [last] if last in learnt or "." in last else alone
    classes = gates.interface(description)["classes"]
    comparable = {}
    for teacher in teachers:
        theirs = read_json(folders[teacher] / gates.DESCRIPTION)
        asked = theirs["interface"].get("classes")
        # Embeddings are asked for neighbours, whether classes were learnt beside them or not.
        if theirs["dataset"]["name"] == dataset and (asked == classes or [] in (asked, classes)):
            figures = read_json(paths.metrics(task) / f"{teacher}.json")
            comparable[teacher] = figures["validation"].get(settings.metric, 0.0)
    if not comparable:
        return gates.teacher_share(score, None, None, settings.teacher_share)
    best = max(comparable, key=lambda teacher: comparable[teacher])
    value = scores(task, samples_of_test(task, best), settings.metric).value
    return gates.teacher_share(score, value, best, settings.teacher_share)


def _signature(task: str, description: dict[str, Any], champion: "ModelVersion | None") -> Check:
    if champion is None:
        return Check(
            "signature", True, "there is no champion yet whose callers would notice", gates.interface(description)
        )
    theirs = gates.interface(read_json(stored(task, champion.version) / gates.DESCRIPTION))
    return gates.signature(gates.interface(description), theirs, f"version {champion.version}")


def _measured(task: str) -> dict[str, Any] | None:
    return read_json(paths.latency(task)) if paths.latency(task).is_file() else None


def _facts(version: "ModelVersion") -> dict[str, Any]:
    state = origin()
    names = ("student", "method", "teacher", "weights_sha256", "onnx_sha256", "data_sha256", "metric", "validation")
    return {
        "version": str(version.version),
        **{name: version.tags.get(name) for name in names},
        "git_revision": state.revision,
        "git_changes": state.changes,
        "dvc_lock_sha256": state.lock_sha256,
    }


def _tag(
    client: "MlflowClient", version: "ModelVersion", record: Path, checks: list[Check], score: float | None
) -> None:
    """The decision, where the UI shows it."""
    plain = read_json(record.with_suffix(".json"))
    tags = {"decision": plain["decision"], "decision_time": plain["time"], "decision_record": record.as_posix()}
    # One tag for all gates: each costs a server several queries.
    tags["gates"] = "\n".join(f"{check.verdict} {check.name}: {check.sentence}" for check in checks) or "none"
    tags |= {f"decision_{name}": str(plain[name]) for name in ("dvc_lock_sha256", "git_revision")}
    if score is not None:
        tags["test"] = f"{score:.6g}"
    for name, value in tags.items():
        client.set_model_version_tag(version.name, version.version, name, value[:TAG_LENGTH])


def _print(task: str, version: "ModelVersion", before: str | None, checks: list[Check], record: Path) -> None:
    failed = gates.refused(checks)
    who = f"version {version.version} ({version.tags['student']})"
    if failed:
        print(f"refused: {who} does not become champion of {task}, because of {', '.join(c.name for c in failed)}")
    else:
        print(f"promoted: {who} is champion of {task}" + (f", after version {before}" if before else ""))
    for check in sorted(checks, key=lambda one: one.verdict):
        print(f"  {check.verdict:8s} {check.name}: {check.sentence}")
    print(f"record: {record}")
