"""Mistakes in entries of the task text: each is found, named by its path, and answered with what would be right."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from stages.parameters import Parameters, load
from stages.parameters.text import LGTM

DIGEST = "0123456789abcdef" * 4
ABSENT = object()
RIGHTS = "licence: none, credit: nobody, redistributable: true"

# Every kind of entry, and every key that there is.
FULL = f"""
sources:
  both: {{kind: parts, {RIGHTS}, parts: [{{kind: url, url: "https://example.org/vocab.txt", sha256: {DIGEST}}},
          {{kind: wheel, wheels: [{{package: a==1, files: [r8.tab], sha256: {DIGEST}}}]}},
          {{kind: folder, path: $DATA/glue, tree_digest: {DIGEST}}}]}}
datasets:
  r8:
    {{task: text, source: both, encoder: none, format: orange, files: {{train: r8.tab}},
      columns: {{text: text, label: Class}}, classes: [acq, earn],
      length: 64, rows: 500, metric: macro_f1, flip: {{share: 0.1, seed: 1}},
      tokenizer: {{kind: wordpiece, pieces: 2000, normalise: letters}},
      split: {{validation: 10, test: 10, held_out: 0.2, seed: 1}},
      expect: {{samples: 100, smallest_class: 0.1, largest_class: 0.6, duplicates: 0.1, truncated: 0.1}}}}
  pairs:
    {{task: text, source: both, encoder: none, format: table, files: {{train: a.tsv, validation: b.tsv, test: c.tsv}},
      separator: tab, columns: {{text: a, pair: b, label: c}}, tokenizer: {{kind: wordpiece}}}}
  scores:
    {{task: text, source: both, encoder: none, format: glue, glue: STS-B, folder: STS-B, metric: spearman,
      split: {{validation: 10}}, tokenizer: {{kind: vocabulary, file: vocab.txt, normalise: bert}}}}
teachers:
  taken:
    task: text
    dataset: scores
    start: none
    objective: none
    from: {{file: $DATA/model.safetensors, sha256: {DIGEST},
            origin: {{name: MiniLM, licence: Apache-2.0, credit: somebody, redistributable: true}},
            network: {{name: bert, layers: 6, hidden: 384, heads: 12, intermediate: 1536, positions: 512,
                       dropout: 0.1}}}}
  pretrained:
    {{task: text, dataset: r8, start: none, objective: mlm, masked: 0.2, network: {{name: bert, layers: 2, hidden: 32,
      heads: 2}}}}
  large:
    task: text
    dataset: r8
    start: pretrained
    objective: task
    network: {{name: bert, layers: 2, hidden: 32, heads: 2}}
    training: {{epochs: 2, batch: 8, learning_rate: 0.1, weight_decay: 0.1, warmup: 0.2, clip: 1.0, seed: 1, threads: 1,
                accelerator: cpu, devices: 1, precision: 64-true}}
students:
  single:
    {{task: text, dataset: r8, method: alone, teacher: none, network: {{name: bert, layers: 1, hidden: 32, heads: 2}},
      initial: {{layers: [0], file: a.safetensors, sha256: {DIGEST}}}}}
  small:
    {{task: text, dataset: r8, method: kd, teacher: large, temperature: 2.0, alpha: 0.5, initial: {{layers: [1]}},
      network: {{name: bert, layers: 1, hidden: 32, heads: 2}}}}
  fitted:
    {{task: text, dataset: r8, method: lgtm, teacher: pretrained, temperature: 1.0, alpha: 1.0, teacher_alpha: 0.4,
      network: {{name: bert, layers: 1, hidden: 32, heads: 2}}, teacher_learning_rate: 0.1,
      influence_scale: {{ratio: 0.1, every: 4}}, influence_loss: student_kl, influence_form: exact,
      influence_radius: 0.1, dropout: shared, zero_heads: false, hold_out: true}}
exports:
  fitted: {{task: text, dataset: r8, tolerance: 0.001, threads: 2}}
tasks:
  text: {{batch: 64, threads: 1}}
gates:
  text:
    {{metric: macro_f1, dataset: r8, baseline: alone, delta: 0.01, confidence: 0.95, resamples: 10000, seed: 1,
      teacher_share: 0.9, latency: {{batch: 1, percentile: p95, budget_ms: 2.0}},
      parity: {{outputs: 0.0001, metric: 0.001}}}}
"""


def edited(*edits: tuple[str, Any]) -> dict[str, Any]:
    """The parameters with some values set (or removed) by their path, as in `a.b[0].c`."""
    raw: dict[str, Any] = copy.deepcopy(yaml.safe_load(FULL))
    for path, value in edits:
        *above, last = [int(step) if step.isdigit() else step for step in re.findall(r"[^.\[\]]+", path)]
        place: Any = raw
        for key in above:
            place = place[key] if isinstance(place, list) else place.setdefault(key, {})
        if value is ABSENT:
            del place[last]
        else:
            place[last] = value
    return raw


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parameters") / "params.yaml"


def read(file: Path, raw: dict[str, Any]) -> Parameters:
    file.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return load(file)


def mistakes(file: Path, *edits: tuple[str, Any]) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(file, edited(*edits))
    return [line.removeprefix("  ") for line in str(caught.value).splitlines()[1:]]


def test_the_base_of_these_edits_is_right(file: Path) -> None:
    parameters = read(file, edited())
    fitted = parameters.students["fitted"]
    assert isinstance(fitted, LGTM)
    assert fitted.influence_scale.model_dump() == {"ratio": 0.1, "every": 4}  # type: ignore[union-attr]
    assert list(parameters.models("text")) == ["taken", "pretrained", "large", "single", "small", "fitted"]


MISTAKES: list[tuple[str, Any, str]] = [
    # Another teacher to begin with.
    ("teachers.large.start", "pretraind", "unknown teacher 'pretraind' of task text; did you mean 'pretrained'?"),
    ("teachers.large.start", "small", "unknown teacher 'small' of task text; known: pretrained, taken"),
    ("teachers.large.start", "large", "a teacher cannot begin with itself"),
    ("teachers.large.start", ABSENT, "is missing"),
    # Shares strictly between 0 and 1.
    ("datasets.r8.split.held_out", 0, "must be > 0, got 0"),
    ("datasets.r8.split.held_out", 1, "must be < 1, got 1"),
    ("datasets.r8.flip.share", 0, "must be > 0, got 0"),
    ("datasets.r8.flip.share", 1.0, "must be < 1, got 1.0"),
    ("teachers.pretrained.masked", 0.0, "must be > 0, got 0.0"),
    ("teachers.pretrained.masked", 1, "must be < 1, got 1"),
    # Data.
    ("datasets.r8.length", 7, "must be >= 8, got 7"),
    ("datasets.r8.length", 513, "must be <= 512, got 513"),
    ("datasets.r8.rows", 0, "must be > 0, got 0"),
    ("datasets.r8.tokenizer.pieces", 99, "must be >= 100, got 99"),
    ("datasets.r8.tokenizer.kind", "wordpeace", "unknown kind 'wordpeace'; did you mean 'wordpiece'?"),
    ("datasets.r8.tokenizer.file", "x", "unknown key; known: kind, normalise, pieces"),
    ("datasets.r8.classes", ["a"], "list should have at least 2 items"),
    ("datasets.r8.format", "csv", "input should be 'table', 'orange' or 'glue', got 'csv'"),
    ("datasets.scores.glue", "SST2", "input should be 'CoLA', "),
    # Networks and training.
    ("teachers.large.network.name", "bart", "input should be 'bert', got 'bart'"),
    ("teachers.large.network.dropout", 1, "must be < 1, got 1"),
    ("students.small.training.warmup", 1.5, "must be <= 1, got 1.5"),
    ("students.small.initial.layers", [], "list should have at least 1 item"),
    ("students.small.initial.layers", [-1], "[0]: must be >= 0, got -1"),
    ("students.small.network.positions", 32,
     "must be at least the length of its texts, datasets.r8.length = 64, got 32"),
    ("teachers.taken.from.network.positions", 100,
     "must be at least the length of its texts, datasets.scores.length = 128, got 100"),
    ("students.fitted.method", "lgmt", "unknown method 'lgmt'; did you mean 'lgtm'?"),
    ("students.fitted.teacher", "none", "method 'lgtm' needs a teacher"),
    ("students.fitted.influence_radius", 0, "must be > 0, got 0"),
    ("students.fitted.influence_scale", "teacher", "input should be 'teacher_lr' or 'student_lr', got 'teacher'"),
    ("students.fitted.influence_scale", -1, "must be >= 0, got -1"),
    ("students.fitted.influence_scale", [1], "input should be a valid number, got [1]"),
    ("students.fitted.influence_scale.ratio", ABSENT, "is missing"),
    ("students.fitted.influence_scale.ratoi", 1, "unknown key; did you mean 'ratio'?"),
    ("students.fitted.influence_scale.every", 0, "must be > 0, got 0"),
    # A teacher that has not learnt the task has nothing to say; one that has would lose it.
    ("students.small.teacher", "pretrained", "'pretrained' has objective 'mlm': it has not learnt the task"),
    ("students.fitted.teacher_alpha", 1.1, "must be <= 1, got 1.1"),
    ("students.fitted.dropout", 0.1, "input should be 'official' or 'shared', got 0.1"),
    ("gates.text.metric", "top_1", "input should be 'accuracy', "),
    # Sources of several parts.
    ("sources.both.parts[0].kind", "parts", "unknown kind 'parts'; known: folder, url, wheel"),
    ("sources.both.parts[0].licence", "x", "unknown key; known: kind, sha256, url"),
    ("sources.both.parts[1].wheels[0].fils", "x", "unknown key; did you mean 'files'?"),
    ("sources.both.parts[2].tree_digest", ABSENT, "is missing"),
    ("sources.both.parts[2].tree_digest", "x", "string should match pattern"),
    ("sources.both.licence", ABSENT, "is missing"),
    ("sources.both.parts", [{"kind": "folder", "path": "x", "tree_digest": DIGEST}], "list should have at least 2"),
    ("sources.both.url", "https://x", "unknown key; known: credit, kind, licence, parts, redistributable"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "message"), MISTAKES, ids=[f"{path}={str(value)[:12]}" for path, value, _ in MISTAKES]
)
def test_one_mistake_is_answered_in_one_line(file: Path, path: str, value: Any, message: str) -> None:
    (line,) = mistakes(file, (path, value))
    assert line.startswith(path + message if message.startswith("[") else f"{path}: {message}")


NETWORK = {"name": "bert", "layers": 1, "hidden": 8, "heads": 2}
RULES: list[tuple[list[tuple[str, Any]], str]] = [
    ([("datasets.scores.folder", ABSENT)], "datasets.scores: format 'glue' needs 'glue' (the task) and 'folder'"),
    ([("datasets.scores.glue", ABSENT), ("datasets.scores.metric", "accuracy")],
     "datasets.scores: format 'glue' needs 'glue' (the task) and 'folder'"),
    ([("datasets.scores.files", {"train": "x"})], "datasets.scores: format 'glue' takes no 'files', "),
    ([("datasets.scores.classes", ["a", "b"])], "datasets.scores: format 'glue' takes no 'files', "),
    ([("datasets.scores.split.test", 5)], "datasets.scores: format 'glue' takes no 'split.test'"),
    ([("datasets.scores.split", ABSENT)], "datasets.scores: format 'glue' needs 'split.validation'"),
    ([("datasets.scores.metric", "accuracy")], "datasets.scores: metric 'spearman' is for scores, and goes with"),
    ([("datasets.r8.metric", "spearman")], "datasets.r8: metric 'spearman' is for scores, and goes with"),
    ([("datasets.scores.columns", {"text": "x"})], "datasets.scores: format 'glue' takes no 'files', 'columns' and"),
    ([("datasets.scores.separator", "tab")], "datasets.scores: format 'glue' takes no 'separator': its columns are"),
    ([("datasets.r8.separator", "comma")], "datasets.r8: format 'orange' takes no 'separator': its columns are"),
    ([("datasets.r8.glue", "RTE")], "datasets.r8: format 'orange' takes no 'glue' and no 'folder'"),
    ([("datasets.pairs.folder", "x")], "datasets.pairs: format 'table' takes no 'glue' and no 'folder'"),
    ([("datasets.r8.files", ABSENT)], "datasets.r8: format 'orange' needs 'files' ('train' at least)"),
    ([("datasets.r8.files.test", "t.tab")], "datasets.r8: needs either 'files.test' or 'split.test', how many"),
    ([("datasets.r8.split.validation", ABSENT)], "datasets.r8: needs either 'files.validation' or 'split.validation'"),
    ([("datasets.pairs.files.test", ABSENT)], "datasets.pairs: needs either 'files.test' or 'split.test'"),
    ([("datasets.r8.classes", ["a", "b", "a"])], "datasets.r8: 'classes' names a class twice"),
    ([("students.small.network.heads", 3)], "students.small.network: 'hidden' = 32 must be a multiple of 'heads' = 3"),
    ([("teachers.large.network", ABSENT)], "teachers.large: needs either 'network' (it is trained here) or 'from'"),
    ([("teachers.taken.network", NETWORK)], "teachers.taken: needs either 'network' (it is trained here) or 'from'"),
    ([("teachers.large.objective", "none")], "teachers.large: 'from' goes with objective 'none'; to train it further"),
    ([("teachers.taken.objective", "task")], "teachers.taken: 'from' goes with objective 'none'; to train it further"),
    ([("teachers.taken.training", {"epochs": 1})], "teachers.taken: takes neither 'training' nor 'start'"),
    ([("teachers.taken.start", "large")], "teachers.taken: takes neither 'training' nor 'start'"),
    ([("students.single.initial.file", ABSENT)], "students.single.initial: 'file' and 'sha256' go together"),
    ([("students.single.initial", {"layers": [0]})], "students.single: 'initial' needs 'file': there is no teacher"),
    ([("students.small.initial.layers", [0, 1])], "students.small: 'initial.layers' names 2 layers, 'network.layers'"),
    ([("datasets.r8.metric", "f1"), ("datasets.r8.classes", ["a", "b", "c"])],
     "datasets.r8: metric 'f1' is for two classes"),
    ([("datasets.scores.glue", "MNLI"), ("datasets.scores.metric", "f1")],
     "datasets.scores: metric 'f1' is for two classes"),
    ([("datasets.scores.flip", {"share": 0.1})], "datasets.scores: 'flip' changes labels, and STS-B has scores"),
    ([("teachers.large.masked", 0.2)], "teachers.large: 'masked' goes with objective 'mlm'"),
    ([("students.fitted.teacher", "large"), ("students.fitted.zero_heads", ABSENT)],
     "students.fitted.zero_heads: teacher 'large' has learnt the task, and would lose its classifier"),
    ([("students.fitted.hold_out", False)], "students.fitted: 'hold_out: false' goes with 'influence_scale: 0' only"),
]  # fmt: skip


@pytest.mark.parametrize(("edits", "message"), RULES, ids=[message[:60] for _, message in RULES])
def test_keys_that_do_not_go_together_are_answered_for_the_whole_entry(
    file: Path, edits: list[tuple[str, Any]], message: str
) -> None:
    (line,) = mistakes(file, *edits)
    assert line.startswith(message)


@pytest.mark.parametrize("value", [True, False])
def test_whoever_says_so_may_set_the_head_of_a_taught_teacher_to_zero(file: Path, value: bool) -> None:
    read(file, edited(("students.fitted.teacher", "large"), ("students.fitted.zero_heads", value)))


def test_beginnings_in_a_circle_are_named(file: Path) -> None:
    assert sorted(mistakes(file, ("teachers.pretrained.start", "large"))) == [
        "teachers.large.start: goes round in a circle: large <- pretrained <- large",
        "teachers.pretrained.start: goes round in a circle: pretrained <- large <- pretrained",
    ]


def test_a_teacher_of_another_task_is_no_beginning(file: Path) -> None:
    """Nor is one of this task for a teacher of another."""
    digits = {"task": "recognition", "source": "both", "encoder": "none", "format": "folder", "image_size": 8,
              "channels": 1, "split": {"validation": 1, "test": 1}}  # fmt: skip
    other = {"task": "recognition", "dataset": "digits", "start": "none", "network": {"name": "resnet", "widths": [4]}}
    base = [("datasets.digits", digits), ("tasks.recognition", {})]
    assert mistakes(file, *base, ("teachers.other", other), ("teachers.large.start", "other")) == [
        "teachers.large.start: unknown teacher 'other' of task text; known: pretrained, taken"
    ]
    assert mistakes(file, *base, ("teachers.other", {**other, "start": "large"})) == [
        "teachers.other.start: unknown teacher 'large' of task recognition; none is known"
    ]
    read(file, edited(*base, ("teachers.other", other)))


@pytest.mark.parametrize(
    ("scale", "hold_out", "expected"),
    [
        ("teacher_lr", None, True),
        ("student_lr", None, True),
        (0.5, None, True),
        ({"ratio": 0.5}, None, True),
        (0, None, False),
        (0.0, None, False),
        (0, True, True),
        (0, False, False),
    ],
)
def test_who_holds_samples_out(file: Path, scale: Any, hold_out: bool | None, expected: bool) -> None:
    edits = [("students.fitted.influence_scale", scale), ("students.fitted.hold_out", hold_out)]
    fitted = read(file, edited(*edits)).students["fitted"]
    assert isinstance(fitted, LGTM)
    assert fitted.holds_out is expected


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ("teacher", ": input should be"),
        (-1, ": must be >= 0, got -1"),
        (True, ": must be a number, got true"),
        ({"ratio": 0}, ".ratio: must be > 0, got 0"),
        ({"ratio": 1, "every": 0}, ".every: must be > 0, got 0"),
        ({"ratio": 1, "evry": 2}, ".evry: unknown key; did you mean 'every'?"),
    ],
)
def test_a_wrong_scale_is_answered_where_it_is_wrong(file: Path, scale: Any, message: str) -> None:
    found = mistakes(file, ("students.fitted.influence_scale", scale))
    assert any(line.startswith(f"students.fitted.influence_scale{message}") for line in found), found
    assert all(line.startswith("students.fitted.influence_scale") for line in found)


def known_keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all keys that the schema knows: the names of entries are the user's own."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(key, str) and len(path) > 1:
            yield (*path, key)
        yield from known_keys(inner, (*path, key))


PLACES = list(known_keys(yaml.safe_load(FULL)))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(PLACES), st.data())
def test_a_misspelt_key_is_answered_with_the_right_one(file: Path, path: tuple[Any, ...], drawn: st.DataObject) -> None:
    right = str(path[-1])
    position = drawn.draw(st.integers(0, len(right) - 1))
    letter = drawn.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
    inserted = right[:position] + letter + right[position:]
    wrong = drawn.draw(st.sampled_from([right[:position] + right[position + 1 :], inserted]))
    place = raw = edited()
    for key in path[:-1]:
        place = place[key]
    if wrong in place:
        return
    place[wrong] = place.pop(right)
    with pytest.raises(UserError) as caught:
        read(file, raw)
    found = [line.removeprefix("  ") for line in str(caught.value).splitlines()[1:]]
    above = re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, path[:-1]))) + "."
    assert f"{above}{wrong}: unknown key; did you mean '{right}'?" in found


def test_every_key_of_the_schema_is_misspelt_somewhere() -> None:
    """FULL names every field, so that the test above leaves none out."""
    from stages.parameters import _models, shared, text

    kinds = [shared.PartsSource, text.Dataset, text.Teacher, text.Student, text.Export, text.Task, text.Gates]
    models, fields = [model for kind in kinds for model in _models(kind)], set()
    while models:
        for name, field in models.pop().model_fields.items():
            fields.add(field.alias or name)
            models += _models(field.annotation)
    named = {path[-1] for path in PLACES}
    assert fields - named <= {"python", "platform"}, "a new field has to stand in FULL"
    assert named <= fields
