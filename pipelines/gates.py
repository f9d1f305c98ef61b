"""The gates of promotion: pure functions over files and figures, each giving one `Check`.

A gate never raises for what it is there to find: a missing file, a wrong digest or a figure that is too low is a check
that failed, with the figures it saw and what to do about it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.files import digest, sha256
from stages import paths
from stages.parameters.shared import Gates, LatencyBudget, ParityBudget
from stages.scores import Scores, bootstrap, comparable

WEIGHTS, ONNX, DESCRIPTION, RECORD = "weights.safetensors", "model.onnx", "model.json", "record.jsonl"
# Bounds and shares are sums of tenths and hundredths in floating point: a tie is a pass.
ROUNDING = 1e-9
# What callers of a policy rely on, of its interface and of its network.
ACTING, DECIDING = ("observations", "actions", "environment"), ("window", "goals", "experts")


@dataclass(frozen=True)
class Check:
    """What one gate found.

    Attributes:
        name: its name, as in a refusal. sentence: what was found, and what to do where it failed.
        figures: every number and digest that it saw.
        advisory: shown, but never a reason to refuse.
    """

    name: str
    passed: bool
    sentence: str
    figures: dict[str, Any] = field(default_factory=dict)
    advisory: bool = False

    @property
    def verdict(self) -> str:
        """One word: passed, warning or failed."""
        return "passed" if self.passed else "warning" if self.advisory else "failed"

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "verdict": self.verdict}


def refused(checks: list[Check]) -> list[Check]:
    """The checks that stand against a promotion."""
    return [check for check in checks if not check.passed and not check.advisory]


def not_worse(name: str, ours: Scores, theirs: Scores, other: str, gates: Gates) -> Check:
    """Not worse than another model by more than `gates.delta`, on the same test samples.

    What decides is the lower end of the one-sided percentile interval of the difference, by a bootstrap that draws the
    same samples for both models.
    """
    samples, others = len(ours.statistics), len(theirs.statistics)
    figures: dict[str, Any] = {"other": other, "samples": samples, "delta": gates.delta}
    if samples == 0 or not comparable(ours, theirs):
        common = len(set(ours.statistics.index) & set(theirs.statistics.index))
        return Check(
            name,
            False,
            f"evaluated on different test samples ({samples}, and {others} of {other}, {common} in common) · "
            "run `dvc repro` so that both are evaluated on the same data",
            {**figures, "other_samples": others, "common": common},
        )
    theirs = theirs.in_order_of(ours)
    resampled = bootstrap([ours, theirs], gates.resamples, gates.seed)
    bound = float(np.quantile(resampled[0] - resampled[1], 1 - gates.confidence))
    # The figure of every sample for itself: how often one model is better, however much.
    one_by_one = ours.figure(ours.rows), theirs.figure(theirs.rows)
    difference = ours.value - theirs.value
    figures |= {
        "score": ours.value,
        "other_score": theirs.value,
        "difference": difference,
        "lower_bound": bound,
        "confidence": gates.confidence,
        "resamples": gates.resamples,
        "seed": gates.seed,
        "samples_better": int((one_by_one[0] > one_by_one[1]).sum()),
        "samples_worse": int((one_by_one[0] < one_by_one[1]).sum()),
    }
    # Written so that NaN does not pass.
    passed = bound >= -gates.delta - ROUNDING
    sentence = (
        f"{gates.metric} {100 * ours.value:.2f} against {100 * theirs.value:.2f} of {other} (100 is perfect) on "
        f"{samples:,} test samples: difference {100 * difference:+.2f} points, at {100 * gates.confidence:g} % "
        f"no lower than {100 * bound:+.2f} "
        f"({'within' if passed else 'beyond'} the {100 * gates.delta:g} points that it may be worse)"
    )
    return Check(name, passed, sentence, figures)


def teacher_share(ours: float, theirs: float | None, teacher: str | None, least: float) -> Check:
    """The share of the teacher's figure that is kept; passes where no teacher answers the same question."""
    if teacher is None or theirs is None:
        return Check("teacher_share", True, "no teacher of this data set answers the same question", {"least": least})
    kept = ours / theirs if theirs > 0 else 1.0
    passed = kept >= least - ROUNDING
    return Check(
        "teacher_share",
        passed,
        f"keeps {_percent(kept)} of {teacher} ({ours:.4f} of {theirs:.4f}), "
        f"{'at least' if passed else 'less than the'} {_percent(least)} wanted",
        {"teacher": teacher, "score": ours, "teacher_score": theirs, "share": kept, "least": least},
    )


def parity(description: Mapping[str, Any], budget: ParityBudget) -> Check:
    """How far the ONNX file was from PyTorch when it was exported."""
    found = description["parity"]
    largest = max(found["largest_difference"].values())
    metric = abs(found["metric"]["onnx"] - found["metric"]["pytorch"])
    # Written so that NaN does not pass.
    passed = largest <= budget.outputs and metric <= budget.metric + ROUNDING
    return Check(
        "parity",
        passed,
        f"ONNX differs from PyTorch by at most {largest:.3g} (allowed {budget.outputs:g}) and by {metric:.4f} in the "
        f"metric (allowed {budget.metric:g}), on {found['samples']:,} validation samples",
        {**found, "outputs_allowed": budget.outputs, "metric_difference": metric, "metric_allowed": budget.metric},
    )


def latency(
    task: str, student: str, onnx_sha256: str, measured: Mapping[str, Any] | None, budget: LatencyBudget
) -> Check:
    """The measured latency of exactly this ONNX file.

    Args:
        measured: reports/latency/<task>.json, or None.
    """
    repair = f"run `python -m stages.latency {task}` while nothing else runs"
    wanted = {"batch": budget.batch, "percentile": budget.percentile, "budget_ms": budget.budget_ms}
    entry = (measured or {}).get("models", {}).get(student)
    if measured is None or entry is None:
        return Check("latency", False, f"the latency of {student} was not measured · {repair}", wanted)
    if entry["onnx_sha256"] != onnx_sha256:
        return Check(
            "latency",
            False,
            f"{student} was exported again since its latency was measured (measured ONNX {entry['onnx_sha256']}, now "
            f"{onnx_sha256}) · {repair}",
            {**wanted, "measured_onnx_sha256": entry["onnx_sha256"], "onnx_sha256": onnx_sha256},
        )
    if str(budget.batch) not in entry["latency_ms"]:
        return Check(
            "latency",
            False,
            f"batch {budget.batch} of {student} was too large to be measured (measured: batch "
            f"{', '.join(entry['latency_ms'])}) · set gates.{task}.latency.batch to one that was",
            {**wanted, "latency_ms": entry["latency_ms"]},
        )
    value = float(entry["latency_ms"][str(budget.batch)][budget.percentile])
    passed = value <= budget.budget_ms
    return Check(
        "latency",
        passed,
        f"{budget.percentile} at batch {budget.batch} is {value:g} ms with {measured.get('threads')} thread(s), "
        f"{'within' if passed else 'beyond'} the budget of {budget.budget_ms:g} ms",
        {
            **wanted,
            "ms": value,
            "latency_ms": entry["latency_ms"],
            "threads": measured.get("threads"),
            "machine": measured.get("machine"),
            "time": measured.get("time"),
        },
    )


def interface(description: Mapping[str, Any]) -> dict[str, Any]:
    """What a caller relies on: name, shape and type of the input, how many texts it is, what the answers mean.

    Of a policy also where it acts, how much of the past it may be shown, and how many experts may be switched off. How
    it scales what goes in and out is its own affair.
    """
    described, network = description["interface"], description.get("network", {})
    return {
        "input": description["input"],
        "classes": described.get("classes"),
        **{name: described[name] for name in ("pair", "seen", *ACTING) if name in described},
        **{name: network[name] for name in DECIDING if name in network},
    }


def signature(ours: Mapping[str, Any], champions: Mapping[str, Any], champion: str) -> Check:
    """The same input and the same labels as the champion's, so that no caller notices the change.

    Where both say which classes they were trained on (`seen`), labels may become more: no caller of the champion has
    to change if the labels it knows keep their order and others follow. Which ones these are is said.
    """
    changed = [key for key in sorted({*ours, *champions}) if ours.get(key) != champions.get(key)]
    figures: dict[str, Any] = {"ours": dict(ours), "champion": dict(champions)}
    if not changed:
        answers = "labels" if ours.get("classes") else "answers"
        return Check("signature", True, f"input and {answers} are those of {champion}", figures)
    if "seen" in ours and "seen" in champions and set(changed) <= {"classes", "seen"}:
        return _more_labels(ours, champions, champion, figures)
    found = "; ".join(f"{key}: {champions.get(key)} of {champion}, now {ours.get(key)}" for key in changed)
    return Check("signature", False, f"callers would have to change: {found}", figures)


def _more_labels(
    ours: Mapping[str, Any], champions: Mapping[str, Any], champion: str, figures: dict[str, Any]
) -> Check:
    """Two interfaces that differ in labels, or in which of them were trained on, and in nothing else."""
    before, now = list(champions["classes"]), list(ours["classes"])
    gone, added = [name for name in before if name not in now], [name for name in now if name not in before]
    figures |= {"gone": gone, "added": added}
    if now[: len(before)] != before:
        what = f"it no longer knows {', '.join(gone)}" if gone else "it has the labels in another order"
        return Check("signature", False, f"callers of {champion} would have to change: {what}", figures)
    said = [f"input and the {len(before)} labels of {champion} stay"]
    if added:
        said.append(f"{len(added)} more: {', '.join(added)}")
    for what, one, other in (("now", ours, champions), ("no longer", champions, ours)):
        if names := [name for name in before if name in one["seen"] and name not in other["seen"]]:
            said.append(f"{what} trained on: {', '.join(names)}")
    return Check("signature", True, "; ".join(said), figures)


def redistributable(sources: list[Mapping[str, Any]]) -> Check:
    """Whether everything that the student was made from may be passed on. Advisory."""
    kept = [str(source["name"]) for source in sources if not source["redistributable"]]
    return Check(
        "redistributable",
        not kept,
        f"not to be passed on, because of {', '.join(kept)}" if kept else "every source may be passed on",
        {"sources": [dict(source) for source in sources]},
        advisory=True,
    )


def tampering(trained: Path, exported: Path, files: Mapping[str, str]) -> list[str]:
    """A sentence, with both digests, per file of a student that is not what was described; missing ones included.

    Args:
        files: what is exported beside the ONNX file, and where the interface of the trained student has its sha256.
    """
    found = []
    try:
        ours = json.loads((trained / DESCRIPTION).read_text(encoding="utf-8"))
        theirs = json.loads((exported / DESCRIPTION).read_text(encoding="utf-8"))
        wanted = {trained / WEIGHTS: ours["weights_sha256"], exported / ONNX: theirs["onnx_sha256"]}
        wanted |= {exported / name: ours["interface"][key] for name, key in files.items()}
        if theirs["weights_sha256"] != ours["weights_sha256"]:
            found.append(
                f"{exported / ONNX} was exported from other weights: {theirs['weights_sha256']}, now "
                f"{ours['weights_sha256']} · run `dvc repro export@{trained.name}`"
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"the files of {trained.name} cannot be read ({error}) · run `dvc repro export@{trained.name}`"]
    for path, described in wanted.items():
        digest_found = sha256(path) if path.is_file() else "nothing"
        if digest_found != described:
            found.append(
                f"{path} is not the file that {DESCRIPTION} describes: wanted sha256 {described}, got {digest_found} · "
                f"remove {path.parent} and run `dvc checkout` or `dvc repro export@{trained.name}`"
            )
    return found


def untampered(trained: Path, exported: Path, registered: Mapping[str, str], files: Mapping[str, str]) -> Check:
    """Weights and exported files are what was described, and what was registered.

    Args:
        registered: sha256 of the registered version: `weights_sha256`, `onnx_sha256` and that of each of `files`; and
            those of the files which the registry holds, as `stored_onnx_sha256`.
        files: as in `tampering`.
    """
    problems = tampering(trained, exported, files)
    figures: dict[str, Any] = dict(registered)
    served = {ONNX: "onnx_sha256", **files}
    for path, key in ((trained / WEIGHTS, "weights_sha256"), *((exported / name, served[name]) for name in served)):
        found = sha256(path) if path.is_file() else "nothing"
        figures[f"found_{key}"] = found
        if not problems and found != registered[key]:
            problems.append(
                f"{path} is no longer what was registered: sha256 {registered[key]}, now {found} · "
                "run `python -m pipelines.registry register` again"
            )
    for name, key in served.items():
        if registered[f"stored_{key}"] != registered[key]:
            problems.append(
                f"the registry's own copy of {name} is not what was registered: wanted sha256 {registered[key]}, "
                f"got {registered[f'stored_{key}']} · do not serve it; delete this version and register the student "
                "again"
            )
    named = ", ".join(("weights", *served))
    said = "; ".join(problems) or f"{named} and the registry's copies have the digests that were registered"
    return Check("untampered", not problems, said, figures)


def validated(task: str, dataset: str, trained_on: str) -> Check:
    """The proof of validation is there, and it, the prepared data and the student speak of the same data."""
    proof, manifest = paths.validated(task, dataset), paths.prepared(task, dataset) / "manifest.csv"
    repair = f"run `dvc repro validate@{dataset}`"
    if not proof.is_file() or not manifest.is_file():
        missing = manifest if proof.is_file() else proof
        return Check("validated", False, f"data set {dataset!r}: {missing} is missing · {repair}", {})
    found = {"proof": _proof(proof), "manifest": sha256(manifest), "trained_on": trained_on}
    if found["proof"] != found["manifest"]:
        said = f"the proof is about other data (manifest {found['proof']}, now {found['manifest']}) · {repair}"
        return Check("validated", False, said, found)
    if trained_on != found["manifest"]:
        said = f"trained on other data than is prepared now ({trained_on}, now {found['manifest']}) · run `dvc repro`"
        return Check("validated", False, said, found)
    return Check("validated", True, f"data set {dataset!r} passed validation and is the one trained on", found)


def clean(revision: str | None, changes: list[str]) -> Check:
    """The tree is what the revision says, dvc.lock apart.

    Args:
        revision: the commit that is checked out; None outside git. changes: lines of `git status --porcelain`.
    """
    figures = {"revision": revision, "changes": changes}
    if revision is None:
        return Check(
            "clean", False, "there is no git commit to say what this was made from · commit the project", figures
        )
    if changes:
        named = ", ".join(line[3:] for line in changes[:5]) + (" ..." if len(changes) > 5 else "")
        said = (
            f"{len(changes)} uncommitted change(s): {named} · commit or stash them, and `dvc repro` if that asks for it"
        )
        return Check("clean", False, said, figures)
    return Check("clean", True, f"nothing but dvc.lock differs from commit {revision[:12]}", figures)


def evaluated(task: str, dataset: str, weights: Mapping[str, str]) -> Check:
    """The figures belong to the weights and to the data that are here now: names, pixels and labels of every sample.

    Args:
        dataset: the student's. weights: sha256 by model, every model of the task, in the order of params.yaml.
    """
    repair = f"run `dvc repro evaluate@{task}`"
    measured, seen = (_digests(paths.evaluation(task) / f"{what}.json") for what in ("models", "data"))
    manifest = paths.prepared(task, dataset) / "manifest.csv"
    wanted, found = digest(dict(weights)), digest(measured) if measured else None
    today, then = sha256(manifest) if manifest.is_file() else None, seen.get(dataset)
    figures = {"weights": wanted, "evaluated": found, "manifest": today, "evaluated_on": then}
    if found is None:
        return Check("evaluated", False, f"the models of task {task!r} were not evaluated yet · {repair}", figures)
    if found != wanted:
        said = f"models changed since they were evaluated ({found}, now {wanted}) · {repair}"
        return Check("evaluated", False, said, figures)
    if today is None:
        said = f"{manifest} is missing: nothing says what the figures are of · run `dvc repro prepare@{dataset}`"
        return Check("evaluated", False, said, figures)
    if then != today:
        said = f"the figures are of other data than {dataset!r} is now (manifest {then}, now {today}) · {repair}"
        return Check("evaluated", False, said, figures)
    return Check("evaluated", True, f"the figures are of these weights on {dataset!r} as it is now", figures)


def _proof(file: Path) -> str | None:
    """The digest that a proof of validation is about."""
    try:
        found: str | None = json.loads(file.read_text(encoding="utf-8")).get("manifest")
    except (ValueError, AttributeError):
        return None
    return found


def _digests(file: Path) -> dict[str, str]:
    """Digests by name; nothing where the file is missing or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def record_header(record: Path) -> dict[str, Any]:
    """The first line of a record; nothing where there is none."""
    try:
        with record.open(encoding="utf-8") as file:
            found: dict[str, Any] = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
