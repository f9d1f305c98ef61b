"""The gates: each passes and fails for its own reason; bounds against the normal law and a loop."""

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from data.files import digest, sha256, write_json
from pipelines import decisions, gates
from pipelines.candidates import digest_of_test, origin
from pipelines.gates import Check
from pipelines.tasks import recognition
from stages.parameters.recognition import Gates
from stages.parameters.shared import LatencyBudget, ParityBudget
from stages.parameters.text import Gates as TextGates
from stages.scores import Scores, scores
from stages.scores import recognition as recognition_scores

sys.path.insert(0, str(Path(__file__).parent))
from small_project import TASK, Faces, Small, usual

GATES = Gates(delta=0.02)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    monkeypatch.chdir(tmp_path)
    small = usual(tmp_path)
    small.write()
    return small


def means(values: list[int] | list[float] | np.ndarray) -> Scores:
    """Scores whose figure is a mean."""
    table = pd.DataFrame({"hits": np.asarray(values, dtype=float), "questions": 1.0})
    table.index = pd.Index([f"id-{row}" for row in range(len(table))])
    return Scores(table, partial(recognition_scores.figure, metric="top_1"))


def renamed(model: Scores, change: Any) -> Scores:
    """The same rows under changed names, or in another order."""
    return Scores(change(model.statistics), model.figure)


def lower_bound(ours: Scores, theirs: Scores, **settings: Any) -> float:
    bound = gates.not_worse("champion", ours, theirs, "other", Gates(**settings)).figures["lower_bound"]
    assert isinstance(bound, float)
    return bound


# Bootstrap


@pytest.mark.parametrize(("better", "worse"), [(30, 30), (50, 20), (20, 60), (0, 40)])
def test_the_bound_of_paired_proportions_is_the_analytic_one(better: int, worse: int) -> None:
    """b and c of n pairs differ: the mean difference has variance (b + c - (b - c)^2 / n) / n^2."""
    n = 1000
    ours = means([1] * better + [0] * (n - better))
    theirs = means([0] * better + [1] * worse + [0] * (n - better - worse))
    error = math.sqrt((better + worse - (better - worse) ** 2 / n) / n**2)
    expected = (better - worse) / n - 1.6448536 * error
    bound = lower_bound(ours, theirs, resamples=40_000)
    assert bound == pytest.approx(expected, abs=0.0011)
    assert lower_bound(ours, theirs, resamples=40_000, confidence=0.99) < bound


def test_the_bound_of_a_mean_is_that_of_the_normal_law() -> None:
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(0.1, 1, 2000), generator.normal(0, 0.5, 2000)
    gap = ours - theirs
    bound = lower_bound(means(ours), means(theirs))
    assert bound == pytest.approx(gap.mean() - 1.6449 * gap.std() / math.sqrt(len(gap)), abs=0.003)
    assert bound == lower_bound(means(ours), means(theirs))
    assert bound != lower_bound(means(ours), means(theirs), seed=1)


def segmented(seed: int, wrong: float, images: int = 30, classes: int = 3) -> Scores:
    """Scores of a model whose pixels are wrong at random; a class is in few images."""
    truth = np.random.default_rng(99).integers(0, 2, (images, 20))
    truth[:2] += 1
    generator = np.random.default_rng(seed)
    answer = np.where(generator.random(truth.shape) < wrong, generator.integers(0, classes, truth.shape), truth)
    rows: dict[str, Any] = {"id": [f"id-{image}" for image in range(images)]}
    for label in range(classes):
        one, other = truth == label, answer == label
        rows |= {f"intersection_{label}": (one & other).sum(axis=1), f"union_{label}": (one | other).sum(axis=1)}
    return scores("segmentation", pd.DataFrame(rows), "miou")


def test_a_figure_that_is_no_mean_over_samples() -> None:
    ours, theirs = segmented(1, 0.3), segmented(2, 0.3)
    check = gates.not_worse("champion", ours, theirs, "other", Gates(delta=0.2))
    assert check.figures["score"] == ours.value
    assert check.figures["difference"] == pytest.approx(ours.value - theirs.value)
    # A loop over resamples, in which the rows of the drawn images are added up for both models.
    generator, gaps = np.random.default_rng(5), []
    for _ in range(5000):
        drawn = generator.integers(30, size=30)
        one, other = (model.figure(model.rows[drawn].sum(axis=0)) for model in (ours, theirs))
        gaps.append(float(one - other))
    assert check.figures["lower_bound"] == pytest.approx(np.quantile(gaps, 0.05), abs=0.1 * float(np.std(gaps)))
    shuffled = renamed(theirs, lambda table: table.sample(frac=1, random_state=1))
    assert gates.not_worse("champion", ours, shuffled, "other", Gates(delta=0.2)) == check
    same = gates.not_worse("champion", ours, renamed(ours, lambda table: table.iloc[::-1]), "other", Gates(delta=0))
    assert same.passed
    assert same.figures["lower_bound"] == same.figures["difference"] == 0
    assert (same.figures["samples_better"], same.figures["samples_worse"]) == (0, 0)
    assert not gates.not_worse("champion", segmented(1, 0.9), theirs, "other", Gates(delta=0.02)).passed


def test_figures_of_nothing_do_not_pass() -> None:
    ours = segmented(1, 0.3)
    nothing = renamed(ours, lambda table: table * 0)
    assert not gates.not_worse("champion", nothing, nothing, "other", Gates(delta=1)).passed


# Not worse than another


def test_equal_is_not_worse_and_much_worse_is() -> None:
    right = [1] * 90 + [0] * 10
    same = gates.not_worse("champion", means(right), means(right), "other", GATES)
    assert same.passed
    assert same.figures["lower_bound"] == same.figures["difference"] == 0
    worse = gates.not_worse("champion", means([1] * 80 + [0] * 20), means(right), "other", GATES)
    assert not worse.passed
    assert worse.figures["difference"] == pytest.approx(-0.1)
    assert (worse.figures["samples_better"], worse.figures["samples_worse"]) == (0, 10)
    assert "other" in worse.sentence
    better = gates.not_worse("champion", means(right), means([1] * 80 + [0] * 20), "other", GATES)
    assert better.passed
    assert better.figures["difference"] == pytest.approx(0.1)


def test_an_uncertain_difference_is_refused_even_if_its_mean_is_within_delta() -> None:
    """25 of 200 pairs each way: the mean is 0, its error 0.035."""
    ours, theirs = [1] * 25 + [0] * 25 + [1] * 150, [0] * 25 + [1] * 25 + [1] * 150
    assert not gates.not_worse("baseline", means(ours), means(theirs), "other", GATES).passed
    assert gates.not_worse("baseline", means(ours), means(theirs), "other", Gates(delta=0.1)).passed


def test_delta_is_allowed_exactly() -> None:
    """Ten values that all lose a tenth: every resample has the same mean."""
    ours, theirs = means([0.6] * 10), means([0.7] * 10)
    assert gates.not_worse("champion", ours, theirs, "other", Gates(delta=0.1)).passed
    assert not gates.not_worse("champion", ours, theirs, "other", Gates(delta=0.0999)).passed


def test_samples_are_paired_by_name_not_by_place() -> None:
    ours = means([1, 0, 1, 1, 0] * 40)
    check = gates.not_worse(
        "champion", ours, renamed(ours, lambda table: table.sample(frac=1, random_state=1)), "other", Gates(delta=0)
    )
    assert check.passed
    assert check.figures["lower_bound"] == 0


def correlated(right: int) -> Scores:
    """Scores whose figure is a correlation from -1 to 1."""
    truth = np.random.default_rng(0).normal(size=400)
    found = np.where(np.arange(400) < right, truth, -truth)
    table = pd.DataFrame({"xy": truth * found, "xx": truth**2, "yy": found**2})
    return Scores(table, lambda totals: totals[..., 0] / np.sqrt(totals[..., 1] * totals[..., 2]))


def test_a_metric_that_is_no_share() -> None:
    settings = TextGates(metric="matthews", delta=0.02)
    ours, theirs = correlated(100), correlated(150)
    assert -1 < ours.value < theirs.value < 0
    worse = gates.not_worse("champion", ours, theirs, "other", settings)
    assert not worse.passed
    named = f"matthews {100 * ours.value:.2f} against {100 * theirs.value:.2f} of other (100 is perfect)"
    assert named in worse.sentence
    assert gates.not_worse("champion", theirs, ours, "other", settings).passed
    assert gates.teacher_share(0.4, -0.1, "t", 0.9).passed


@pytest.mark.parametrize(
    "theirs", [means([1, 1]), renamed(means([1, 1, 1]), lambda table: table.rename({"id-0": "x"})), means([])]
)
def test_other_samples_cannot_be_compared(theirs: Scores) -> None:
    check = gates.not_worse("champion", means([1, 1, 1]), theirs, "other", GATES)
    assert not check.passed
    assert "different test samples" in check.sentence
    assert not gates.not_worse("champion", means([]), means([]), "other", GATES).passed


# Share of the teacher, parity, latency, signature, licences, tree


def test_share_of_the_teacher() -> None:
    assert gates.teacher_share(0.95, 1.0, "t", 0.95).passed
    assert 0.045 / 0.05 < 0.9
    assert gates.teacher_share(0.045, 0.05, "t", 0.9).passed
    refused = gates.teacher_share(0.949, 1.0, "t", 0.95)
    assert not refused.passed
    assert refused.figures["share"] == pytest.approx(0.949)
    assert gates.teacher_share(0.1, None, None, 0.95).passed
    assert gates.teacher_share(0.0, 0.0, "t", 0.95).passed


def exported(largest: float, onnx: float = 0.9) -> dict[str, Any]:
    differences = {"logits": largest, "embedding": 0.0}
    metric = {"onnx": onnx, "pytorch": 0.9}
    return {"parity": {"samples": 10, "largest_difference": differences, "metric": metric}}


def test_parity() -> None:
    budget = ParityBudget(outputs=1e-4, metric=0.01)
    assert gates.parity(exported(1e-4), budget).passed
    assert not gates.parity(exported(1.1e-4), budget).passed
    assert not gates.parity(exported(float("nan")), budget).passed
    assert gates.parity(exported(0, onnx=0.89), budget).passed
    assert not gates.parity(exported(0, onnx=0.88), budget).passed
    assert not gates.parity(exported(0, onnx=0.92), budget).passed


def test_latency() -> None:
    times = {"1": {"p50": 1.0, "p95": 2.0}, "32": {"p50": 10.0, "p95": 20.0}}
    measured = {"threads": 1, "models": {"small": {"onnx_sha256": "a", "latency_ms": times}}}

    def check(onnx: str = "a", file: Any = measured, student: str = "small", **budget: Any) -> Check:
        return gates.latency(TASK, student, onnx, file, LatencyBudget(**budget))

    assert check(budget_ms=2.0).passed
    assert not check(budget_ms=1.99).passed
    assert check(budget_ms=1.0, percentile="p50").passed
    assert not check(budget_ms=19.0, batch=32).passed
    command = f"`python -m stages.latency {TASK}`"
    for missing in (check(file=None), check(student="other"), check(onnx="b"), check(file={})):
        assert not missing.passed
        assert command in missing.sentence
    assert "a" in check(onnx="b").figures["measured_onnx_sha256"]
    large = {"threads": 1, "models": {"small": {"onnx_sha256": "a", "latency_ms": {"1": times["1"]}}}}
    assert check(file=large).passed
    refused = check(file=large, batch=32, budget_ms=1e9)
    assert not refused.passed
    assert "batch 32 of small was too large" in refused.sentence
    assert f"gates.{TASK}.latency.batch" in refused.sentence
    assert refused.figures["latency_ms"] == {"1": times["1"]}


def test_signature() -> None:
    ours = {"input": {"name": "images", "shape": ["batch", 1, 7, 7], "dtype": "float32"}, "classes": ["a", "b"]}
    assert gates.signature(ours, json.loads(json.dumps(ours)), "version 1").passed
    for changed in (
        {**ours, "pair": True},
        {**ours, "classes": ["b", "a"]},
        {**ours, "classes": []},
        {**ours, "input": {**ours["input"], "shape": ["batch", 1, 8, 8]}},  # type: ignore[dict-item]
        {"input": ours["input"]},
    ):
        check = gates.signature(changed, ours, "version 1")
        assert not check.passed
        assert "version 1" in check.sentence
    embeds = {**ours, "classes": []}
    assert gates.signature(embeds, dict(embeds), "version 1").sentence == "input and answers are those of version 1"
    assert not gates.signature(ours, embeds, "version 1").passed


def test_licences_warn_and_never_refuse() -> None:
    free, kept = {"name": "x", "redistributable": True}, {"name": "y", "redistributable": False}
    assert gates.redistributable([free]).verdict == "passed"
    warned = gates.redistributable([free, kept])
    assert (warned.verdict, warned.passed) == ("warning", False)
    assert "y" in warned.sentence
    assert gates.refused([warned]) == []


def test_only_required_gates_refuse() -> None:
    good, bad = Check("a", True, ""), Check("b", False, "")
    assert gates.refused([good, bad]) == [bad]
    assert (good.verdict, bad.verdict) == ("passed", "failed")


def test_clean(project: Small) -> None:
    def check() -> Check:
        state = origin()
        return gates.clean(state.revision, state.changes)

    assert not check().passed  # outside git
    project.commit()
    assert check().passed
    project.put("dvc.lock", "locked")
    assert check().passed
    assert origin().lock_sha256 == sha256(Path("dvc.lock"))
    project.put("new file.py", "")
    assert not check().passed
    assert "new file.py" in check().sentence
    project.commit()
    assert check().passed
    project.put("sub/dvc.lock", "another one")
    assert not check().passed
    project.commit()
    project.put("sub/dvc.lock", "another one, changed")
    assert not check().passed
    project.commit()
    project.put("params.yaml", "edited")
    assert not check().passed


def test_clean_where_the_project_is_a_folder_of_the_repository(
    project: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code beside it counts, and so does another project's dvc.lock."""

    def changes() -> list[str]:
        state = origin()
        assert state.revision
        return sorted(line[3:] for line in state.changes)

    project.put("benchmarks/params.yaml", "")
    project.commit()
    monkeypatch.chdir(tmp_path / "benchmarks")
    project.put("benchmarks/dvc.lock", "not yet committed")
    assert changes() == []
    project.commit()
    project.put("benchmarks/dvc.lock", "changed by dvc repro")
    assert changes() == []
    assert origin().lock_sha256 == sha256(Path("dvc.lock"))
    project.put("benchmarks/params.yaml", "edited")
    project.put("code.py", "")
    project.put("dvc.lock", "of the other project")
    assert changes() == ["benchmarks/params.yaml", "code.py", "dvc.lock"]


# Files


def paths_of(name: str) -> tuple[Path, Path]:
    return Path(f"models/trained/{TASK}/{name}"), Path(f"models/exported/{TASK}/{name}")


def untampered(name: str = "best", **registered: str) -> Check:
    trained, exported = paths_of(name)
    onnx = json.loads((exported / "model.json").read_text())["onnx_sha256"]
    weights = json.loads((trained / "model.json").read_text())["weights_sha256"]
    wanted = {"weights_sha256": weights, "onnx_sha256": onnx, "stored_onnx_sha256": onnx}
    return gates.untampered(trained, exported, {**wanted, **registered}, {})


@pytest.mark.parametrize("which", ["weights.safetensors", "model.onnx"])
def test_a_tampered_file_is_told_with_both_digests(project: Small, which: str) -> None:
    assert untampered().passed
    trained, exported = paths_of("best")
    file = (trained if which.startswith("weights") else exported) / which
    before = sha256(file)
    assert gates.tampering(trained, exported, {}) == []
    file.write_bytes(file.read_bytes() + b"x")
    (said,) = gates.tampering(trained, exported, {})
    assert before in said
    assert sha256(file) in said
    check = untampered()
    assert not check.passed
    assert before in check.sentence
    assert sha256(file) in check.sentence
    file.unlink()
    assert not untampered().passed
    assert before in untampered().sentence


def test_what_is_served_beside_the_onnx_file_is_guarded_as_well(project: Small) -> None:
    """Against the trained student: whoever changes a file changes its digest beside it, too."""
    files = {"tokenizer.json": "tokenizer_sha256"}
    trained, exported = paths_of("best")
    tokenizer = exported / "tokenizer.json"
    tokenizer.write_text("{}")
    described = sha256(tokenizer)
    for folder in (trained, exported):
        description = json.loads((folder / "model.json").read_text())
        description["interface"]["tokenizer_sha256"] = described
        (folder / "model.json").write_text(json.dumps(description))
    registered = {key: description[key] for key in ("weights_sha256", "onnx_sha256")}
    registered |= {"stored_onnx_sha256": registered["onnx_sha256"]}
    registered |= dict.fromkeys(("tokenizer_sha256", "stored_tokenizer_sha256"), described)

    def check(**other: str) -> Check:
        return gates.untampered(trained, exported, {**registered, **other}, files)

    assert check().passed
    assert "tokenizer.json" in check().sentence
    assert "no longer what was registered" in check(tokenizer_sha256="0" * 64).sentence
    assert "own copy of tokenizer.json" in check(stored_tokenizer_sha256="0" * 64).sentence
    tokenizer.write_text("{ }")
    description["interface"]["tokenizer_sha256"] = sha256(tokenizer)
    (exported / "model.json").write_text(json.dumps(description))
    for wanted in (described, sha256(tokenizer), str(tokenizer)):
        assert wanted in check().sentence
    assert not check().passed
    tokenizer.unlink()
    assert "got nothing" in check().sentence


def test_weights_that_were_not_exported_are_told(project: Small) -> None:
    trained, exported = paths_of("best")
    description = json.loads((exported / "model.json").read_text())
    (exported / "model.json").write_text(json.dumps({**description, "weights_sha256": "0" * 64}))
    assert not untampered().passed
    assert "export@best" in untampered().sentence
    (exported / "model.json").write_text("{")
    assert "cannot be read" in gates.tampering(trained, exported, {})[0]


@pytest.mark.parametrize("key", ["weights_sha256", "onnx_sha256", "stored_onnx_sha256"])
def test_files_that_are_not_those_registered(project: Small, key: str) -> None:
    check = untampered(**{key: "0" * 64})
    assert not check.passed
    assert "0" * 64 in check.sentence


def test_validated(project: Small) -> None:
    manifest = Path(f"data/prepared/{TASK}/tiny/manifest.csv")
    proof = Path(f"data/validated/{TASK}/tiny.json")
    trained_on = sha256(manifest)
    assert gates.validated(TASK, "tiny", trained_on).passed
    assert not gates.validated(TASK, "tiny", "0" * 64).passed
    kept = proof.read_text()
    proof.write_text("{")
    assert not gates.validated(TASK, "tiny", trained_on).passed
    proof.unlink()
    missing = gates.validated(TASK, "tiny", trained_on)
    assert not missing.passed
    assert "dvc repro validate@tiny" in missing.sentence
    proof.write_text(kept)
    manifest.write_text(manifest.read_text() + "\n")
    assert not gates.validated(TASK, "tiny", trained_on).passed
    assert not gates.validated(TASK, "tiny", sha256(manifest)).passed  # retrained, but not validated again


def test_evaluated(project: Small) -> None:
    weights = {name: sha256(paths_of(name)[0] / "weights.safetensors") for name in project.models}
    folder, manifest = Path(f"reports/evaluation/{TASK}"), Path(f"data/prepared/{TASK}/tiny/manifest.csv")

    def check(**changed: str) -> Check:
        return gates.evaluated(TASK, "tiny", {**weights, **changed})

    assert check().passed
    assert check().figures["evaluated_on"] == sha256(manifest)
    other = check(best="0" * 64)
    assert not other.passed
    assert digest(weights) in other.sentence
    assert f"dvc repro evaluate@{TASK}" in other.sentence
    before, kept = sha256(manifest), manifest.read_text()
    table = pd.read_csv(manifest)
    table.loc[table.index[-1], "label"] = 2
    table.to_csv(manifest, index=False)
    moved = check()
    assert not moved.passed
    for wanted in (before, sha256(manifest), f"dvc repro evaluate@{TASK}"):
        assert wanted in moved.sentence
    manifest.unlink()
    assert not check().passed
    assert "dvc repro prepare@tiny" in check().sentence
    manifest.write_text(kept)
    assert check().passed
    for damage in ("{", "[]", "{}", json.dumps({"other": before})):
        (folder / "data.json").write_text(damage)
        assert not check().passed
    (folder / "data.json").unlink()
    assert not check().passed
    (folder / "models.json").unlink()
    assert "not evaluated yet" in check().sentence


# Samples and data


def test_an_onnx_file_is_evaluated_as_the_stage_does(project: Small) -> None:
    exported = paths_of("best")[1]
    description = json.loads((exported / "model.json").read_text())
    found = recognition.evaluate(exported, description, Path(f"data/prepared/{TASK}/tiny"))
    table = pd.read_csv(f"reports/evaluation/{TASK}/best.samples.csv")
    wanted = table[table["split"] == "test"].reset_index(drop=True)
    columns = ["id", "label", "prediction", "correct"]
    pd.testing.assert_frame_equal(found[columns], wanted[columns], check_dtype=False)


@pytest.mark.parametrize(("kind", "held_out"), [(Small, ["d"]), (Faces, []), (Faces, ["d"])])
def test_unseen_classes_are_found_by_the_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Small], held_out: list[str]
) -> None:
    """The embedding of the small project is the image itself; images and labels are drawn anew."""
    monkeypatch.chdir(tmp_path)
    usual(tmp_path, kind).write()
    prepared, exported = Path(f"data/prepared/{TASK}/tiny"), paths_of("best")[1]
    write_json(prepared / "dataset.json", {"classes": ["a", "b", "c"], "held_out": held_out})
    generator, shape = np.random.default_rng(0), np.load(prepared / "images.npy").shape
    images, labels = generator.integers(0, 256, shape, dtype=np.uint8), generator.integers(0, 3, shape[0])
    np.save(prepared / "images.npy", images)
    np.save(prepared / "labels.npy", labels)
    found = recognition.evaluate(exported, json.loads((exported / "model.json").read_text()), prepared)
    test = (pd.read_csv(prepared / "manifest.csv")["split"] == "test").to_numpy()
    points, labels = images[test].reshape(test.sum(), -1).astype(float), labels[test]
    for row, (prediction, rank) in enumerate(found[["prediction", "same_class_rank"]].to_numpy().tolist()):
        distance = np.linalg.norm(points - points[row], axis=1)
        others = sorted(
            (other for other in range(len(labels)) if other != row),
            key=lambda other: (distance[other], labels[other] == labels[row], other),
        )
        assert prediction == labels[others[0]]
        own = min(distance[other] for other in others if labels[other] == labels[row])
        assert rank == 1 + sum(distance[other] <= own for other in others if labels[other] != labels[row])
    assert found["correct"].tolist() == (found["prediction"] == found["label"]).astype(int).tolist()
    assert list(found.columns) == recognition.COLUMNS


def test_the_digest_of_test_data_moves_with_it_alone(project: Small) -> None:
    manifest = pd.read_csv(f"data/prepared/{TASK}/tiny/manifest.csv")
    before = digest_of_test(manifest)
    assert digest_of_test(manifest.sample(frac=1, random_state=0)) == before
    other = manifest.copy()
    other.loc[other["split"] == "validation", "label"] = 2
    assert digest_of_test(other) == before
    other.loc[other.index[-1], "label"] = 2
    assert digest_of_test(other) != before
    assert digest_of_test(manifest.iloc[:-1]) != before
    # Where a label is a map, its own digest stands for it.
    maps = manifest.drop(columns="label").assign(labels_sha256="a")
    moved = maps.assign(labels_sha256=["a"] * (len(maps) - 1) + ["b"])
    assert digest_of_test(moved) != digest_of_test(maps) == digest_of_test(maps.assign(ignored=0.5))
    assert digest_of_test(maps) != before
    # Where there are scores, they are what is predicted.
    scored = manifest.assign(score=1.5)
    moved = scored.assign(score=[1.5] * (len(scored) - 1) + [2.5])
    assert digest_of_test(moved) != digest_of_test(scored)


# Records


def test_a_record_holds_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checks = [Check("one", True, "fine | really", {"a": 1.5}), Check("two", False, "not", {"b": float("nan")})]
    record = decisions.write(TASK, "refused", {"version": "3"}, checks)
    text, plain = record.read_text(), json.loads(record.with_suffix(".json").read_text())
    assert {"passed | fine \\| really", "failed | not"} <= {line[8:-2] for line in text.splitlines()}
    assert "- a: 1.5" in text
    assert plain["gates"]["one"]["figures"] == {"a": 1.5}
    assert plain["gates"]["two"]["figures"] == {"b": "nan"}
    assert (plain["decision"], plain["version"]) == ("refused", "3")
    others = {decisions.write(TASK, "refused", {"version": "3"}, checks) for _ in range(3)}
    assert len({record, *others}) == 4
