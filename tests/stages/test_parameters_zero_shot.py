"""Mistakes in entries of the task zero_shot: each is found, named by its path, and answered with what is right."""

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
from stages.parameters.zero_shot import CEGZSL, D3GZSL, ESZSL, Dataset, Extended, Teacher

DIGEST = "0123456789abcdef" * 4
ABSENT = object()
RIGHTS = "licence: none, credit: nobody, redistributable: true"

# Every kind of entry, and every key that there is.
FULL = f"""
sources:
  digits: {{kind: url, {RIGHTS}, url: "https://example.org/digits.csv", sha256: {DIGEST}}}
  birds: {{kind: folder, {RIGHTS}, path: $DATA/birds, tree_digest: {DIGEST}}}
datasets:
  images:
    {{task: zero_shot, source: digits, encoder: none, format: renderings, file: digits.csv, unseen: [0-plain],
      split: {{validation: 0.1, test: 0.2, validation_classes: [1-plain], seed: 1}},
      expect: {{samples: 100, smallest_class: 0.1, largest_class: 0.6}}}}
  features: {{task: zero_shot, source: digits, encoder: encoder, format: encoded}}
  awa: {{task: zero_shot, source: birds, encoder: none, format: xlsa17, folder: AWA2, split: {{}}}}
  cub:
    {{task: zero_shot, source: birds, encoder: none, format: arrays, file: cub.npz, split: {{validation_classes: 3}}}}
teachers:
  encoder: {{task: zero_shot, dataset: images, start: none, network: {{name: encoder, widths: [8, 16], blocks: 2}}}}
  seen:
    task: zero_shot
    dataset: features
    start: none
    network: {{name: mlp, hidden: 16}}
    factor: 0.01
    outside: null
    training: {{epochs: 2, batch: 8, learning_rate: 0.1, betas: [0.5, 0.9], clip: 1.0, seed: 1, threads: 1,
                accelerator: cpu, devices: 1, precision: 64-true}}
students:
  single: {{task: zero_shot, dataset: features, method: alone, teacher: none, network: {{name: mlp, hidden: 8}}}}
  ridge:
    {{task: zero_shot, dataset: cub, method: eszsl, teacher: none, network: {{name: mlp, hidden: null}},
      feature_penalty: 10.0, attribute_penalty: 0.1}}
  wide:
    {{task: zero_shot, dataset: features, method: d3gzsl, teacher: seen, network: {{name: mlp, hidden: 16}},
      generator: {{name: clswgan, hidden: 32, noise: 4, critic_steps: 2, penalty: 5.0}}, select_every: 5,
      test_best: false,
      distribution: {{per_class: 2, classification: 1.0e-3, in_distribution: 0, out_of_distribution: 0, kl: double,
                      similarity: probabilities, renormalise: false, target: domain, score: energy,
                      scores_growth: 1.0, student_growth: 1.0}},
      classifier: {{mode: two_stage, samples: 10, epochs: 2, batch: 8, learning_rate: 0.1}},
      training: {{growth: 1.09, growth_every: 10}}}}
  contrastive:
    {{task: zero_shot, dataset: features, method: d3gzsl, teacher: none, network: {{name: mlp, hidden: 16}},
      generator: {{name: cegzsl, hidden: 32, embedding: 8, comparator: 8, instance_weight: 0, class_weight: 0,
                   instance_temperature: 1.0, class_temperature: 1.0}},
      distribution: null, classifier: {{mode: two_stage}}}}
  more: {{task: zero_shot, dataset: features, method: extended, teacher: wide, added: {{seven: [0.5, -1]}}}}
exports:
  wide: {{task: zero_shot, dataset: features, tolerance: 0.001, threads: 2}}
tasks:
  zero_shot: {{batch: 64, threads: 1}}
gates:
  zero_shot:
    {{metric: unseen_only, dataset: features, baseline: eszsl, delta: 0.01, confidence: 0.95, resamples: 10000, seed: 1,
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
    wide, contrastive = parameters.students["wide"], parameters.students["contrastive"]
    assert isinstance(wide, D3GZSL)
    assert wide.distribution is not None
    assert isinstance(contrastive, D3GZSL)
    assert isinstance(contrastive.generator, CEGZSL)
    assert (wide.generator.noise, contrastive.generator.noise) == (4, None)
    assert list(parameters.models("zero_shot")) == [
        "encoder", "seen", "single", "ridge", "wide", "contrastive", "more"
    ]  # fmt: skip


def test_defaults_are_the_released_ones(file: Path) -> None:
    """D3GZSL card 3.2, 3.5, 3.6, 3.8 and 5, and the decisions of its section 4."""
    parameters = read(file, edited(("teachers.seen.factor", ABSENT), ("teachers.seen.training", ABSENT),
                                   ("students.wide.distribution", ABSENT), ("students.wide.training", ABSENT),
                                   ("students.wide.classifier", ABSENT),
                                   ("students.wide.generator", {"name": "clswgan"})))  # fmt: skip
    seen, wide, images = parameters.teachers["seen"], parameters.students["wide"], parameters.datasets["awa"]
    assert isinstance(seen, Teacher)
    assert (seen.factor, seen.training.epochs, seen.training.batch) == (1e-3, 30, 128)
    assert (seen.training.learning_rate, seen.training.betas) == (1e-4, (0.5, 0.999))
    assert isinstance(wide, D3GZSL)
    found = wide.distribution
    assert found is not None
    assert (found.per_class, found.classification, found.in_distribution, found.out_of_distribution) == (
        5, 1e-4, 1e-4, 1e-4
    )  # fmt: skip
    assert (found.kl, found.similarity, found.renormalise, found.target, found.score) == (
        "single", "logits", True, "class", "max_log_softmax"
    )  # fmt: skip
    assert (wide.generator.critic_steps, wide.generator.penalty, wide.generator.hidden) == (5, 10, 4096)
    assert (wide.classifier.mode, wide.classifier.samples, wide.classifier.epochs, wide.classifier.batch) == (
        "end_to_end", 300, 20, 256
    )  # fmt: skip
    assert (wide.training.epochs, wide.training.batch, wide.training.learning_rate) == (2000, 256, 1e-4)
    assert (wide.training.growth, wide.training.growth_every) == (1.0, 20)
    assert isinstance(images, Dataset)
    assert images.split is not None
    assert (images.split.test, images.split.validation_classes) == (None, 0)


def test_who_needs_a_teacher_and_who_has_not_learnt_the_task(file: Path) -> None:
    parameters = read(file, edited())
    needs = {name: student.needs_teacher for name, student in parameters.students.items()}
    assert needs == {"single": False, "ridge": False, "wide": True, "contrastive": False, "more": True}
    assert {name: teacher.pretrained for name, teacher in parameters.teachers.items()} == {
        "encoder": True, "seen": False
    }  # fmt: skip
    assert isinstance(parameters.students["ridge"], ESZSL)
    assert isinstance(parameters.students["more"], Extended)


MISTAKES: list[tuple[str, Any, str]] = [
    # Data.
    ("datasets.images.format", "rendering", "input should be 'renderings', 'encoded', 'xlsa17' or 'arrays', got"),
    ("datasets.images.unseen", [], "list should have at least 1 item"),
    ("datasets.images.split.validation", -0.1, "must be >= 0, got -0.1"),
    ("datasets.images.split.validation", 1, "must be < 1, got 1"),
    ("datasets.images.split.test", 0, "must be > 0, got 0"),
    ("datasets.images.split.test", 1.0, "must be < 1, got 1.0"),
    ("datasets.images.split.seed", -1, "must be >= 0, got -1"),
    ("datasets.images.split.tset", 0.1, "unknown key; did you mean 'test'?"),
    ("datasets.images.expect.samples", 0, "must be > 0, got 0"),
    ("datasets.images.expect.smallest_class", 1.1, "must be <= 1, got 1.1"),
    ("datasets.images.expect.largest_class", True, "must be a number, got true"),
    ("datasets.images.encoder", ABSENT, "is missing"),
    ("datasets.images.source", "digit", "unknown source 'digit'; did you mean 'digits'?"),
    ("datasets.features.source", "digit", "unknown source 'digit'; did you mean 'digits'?"),
    ("datasets.features.encoder", "encodre", "unknown encoder 'encodre' of task zero_shot; did you mean 'encoder'?"),
    ("datasets.features.encoder", "seen", "unknown encoder 'seen' of task zero_shot; known: encoder"),
    ("datasets.features.source", "birds", "must be that of the images, datasets.images.source = 'digits'"),
    # Networks and training.
    ("teachers.encoder.network.name", "resnet", "unknown name 'resnet'; known: encoder, mlp"),
    ("teachers.encoder.network.widths", [], "list should have at least 1 item"),
    ("teachers.encoder.network.widths", [8, 0], "[1]: must be > 0, got 0"),
    ("teachers.encoder.network.blocks", 0, "must be > 0, got 0"),
    ("teachers.encoder.network.hidden", 8, "unknown key; known: blocks, name, widths"),
    ("teachers.seen.network.hidden", 0, "must be > 0, got 0"),
    ("teachers.seen.factor", 0, "must be > 0, got 0"),
    ("teachers.seen.start", "encoder", "input should be 'none', got 'encoder'"),
    ("teachers.seen.training.batch", 1, "must be >= 2, got 1"),
    ("teachers.seen.training.betas", [0.5, 1], "[1]: must be < 1, got 1"),
    ("teachers.seen.training.clip", 0, "must be > 0, got 0"),
    ("students.single.network.name", "encoder", "input should be 'mlp', got 'encoder'"),
    ("students.single.training.growth", 1.1, "unknown key; known: accelerator, "),
    ("students.ridge.feature_penalty", 0, "must be > 0, got 0"),
    ("students.ridge.attribute_penalty", -1, "must be > 0, got -1"),
    # Methods.
    ("students.wide.method", "d3gszl", "unknown method 'd3gszl'; did you mean 'd3gzsl'?"),
    ("students.wide.teacher", "none", "method 'd3gzsl' needs a teacher"),
    ("students.wide.teacher", "seeen", "unknown model 'seeen' of task zero_shot; did you mean 'seen'?"),
    ("students.wide.generator", ABSENT, "is missing"),
    ("students.wide.generator.name", "clswgn", "unknown name 'clswgn'; did you mean 'clswgan'?"),
    ("students.wide.generator.embedding", 8, "unknown key; known: critic_steps, hidden, name, noise, penalty"),
    ("students.wide.generator.noise", 0, "must be > 0, got 0"),
    ("students.wide.generator.critic_steps", 0, "must be > 0, got 0"),
    ("students.wide.generator.penalty", 0, "must be > 0, got 0"),
    ("students.wide.distribution.per_class", 0, "must be > 0, got 0"),
    ("students.wide.distribution.classification", -1, "must be >= 0, got -1"),
    ("students.wide.distribution.kl", "triple", "input should be 'single' or 'double', got 'triple'"),
    ("students.wide.distribution.similarity", "logit", "input should be 'logits' or 'probabilities', got 'logit'"),
    ("students.wide.distribution.target", "ood", "input should be 'class' or 'domain', got 'ood'"),
    ("students.wide.distribution.score", "max", "input should be 'max_log_softmax' or 'energy', got 'max'"),
    ("students.wide.distribution.scores_growth", 0, "must be > 0, got 0"),
    ("students.wide.classifier.mode", "both", "input should be 'end_to_end' or 'two_stage', got 'both'"),
    ("students.wide.classifier.mode", ABSENT, "is missing"),
    ("students.wide.classifier.samples", 0, "must be > 0, got 0"),
    ("students.wide.select_every", -1, "must be >= 0, got -1"),
    ("students.wide.test_best", 2, "input should be a valid boolean"),
    ("students.wide.training.growth", 0, "must be > 0, got 0"),
    ("students.wide.training.batch", 1, "must be >= 2, got 1"),
    ("students.contrastive.generator.instance_weight", -1, "must be >= 0, got -1"),
    ("students.contrastive.generator.class_temperature", 0, "must be > 0, got 0"),
    ("students.contrastive.generator.comparator", 0, "must be > 0, got 0"),
    ("students.more.added", {}, "dictionary should have at least 1 item"),
    ("students.more.added", ABSENT, "is missing"),
    ("students.more.added.seven", "x", "input should be a valid list, got 'x'"),
    ("students.more.added.seven", [1, True], "[1]: must be a number, got true"),
    ("students.more.teacher", "wid", "unknown model 'wid' of task zero_shot; did you mean 'wide'?"),
    ("students.more.teacher", "none", "method 'extended' needs a teacher"),
    # What learns from what.
    ("students.single.dataset", "images", "'images' holds images; students learn from a data set of format 'encoded'"),
    ("students.wide.teacher", "single", "'single' is no teacher: it has to know the seen classes only"),
    ("students.more.teacher", "ridge", "'ridge' has no generator: name a student of method 'd3gzsl' or 'extended'"),
    ("students.more.teacher", "seen", "'seen' has no generator: name a student of method 'd3gzsl' or 'extended'"),
    ("gates.zero_shot.metric", "top_1", "input should be 'harmonic_mean', "),
    ("tasks.zero_shot.batch", 0, "must be > 0, got 0"),
    ("exports.wide.tolerance", 0, "must be > 0, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "message"), MISTAKES, ids=[f"{path}={str(value)[:12]}" for path, value, _ in MISTAKES]
)
def test_one_mistake_is_answered_in_one_line(file: Path, path: str, value: Any, message: str) -> None:
    (line,) = mistakes(file, (path, value))
    if message.startswith("["):
        path, message = path + message.partition(":")[0], message.partition(": ")[2]
    assert line.startswith(f"{path}: {message}")


ENCODER = {"name": "encoder", "widths": [8]}
PUBLISHED = {"task": "zero_shot", "source": "birds", "encoder": "none", "format": "arrays", "file": "cub.npz",
             "split": {}}  # fmt: skip
OF_IMAGES = {"task": "zero_shot", "dataset": "images", "start": "none", "network": {"name": "mlp"}}
RULES: list[tuple[list[tuple[str, Any]], str]] = [
    *(
        ([(f"datasets.{name}.{field}", ABSENT)], f"datasets.{name}: format {kind!r} needs {field!r}")
        for name, kind, fields in [
            ("images", "renderings", ("file", "unseen", "split")),
            ("awa", "xlsa17", ("folder", "split")),
            ("cub", "arrays", ("file", "split")),
        ]
        for field in fields
    ),
    *(
        ([(f"datasets.{name}.{field}", value)], f"datasets.{name}: format {kind!r} takes no {field!r}")
        for name, kind, fields in [
            ("images", "renderings", ("folder",)),
            ("features", "encoded", ("file", "folder", "unseen", "split")),
            ("awa", "xlsa17", ("file", "unseen")),
            ("cub", "arrays", ("folder", "unseen")),
        ]
        for field in fields
        for value in [{"file": "x", "folder": "x", "unseen": ["x"], "split": {}}[field]]
    ),
    ([("datasets.features.encoder", "none")], "datasets.features: 'encoder' names a teacher for format 'encoded', and"),
    ([("datasets.cub.encoder", "encoder")], "datasets.cub: 'encoder' names a teacher for format 'encoded', and"),
    ([("datasets.images.split.test", ABSENT)], "datasets.images: format 'renderings' needs 'split.test', the share"),
    ([("datasets.cub.split.test", 0.1)], "datasets.cub: format 'arrays' takes no 'split.test', the share of seen"),
    ([("datasets.awa.split.test", 0.1)], "datasets.awa: format 'xlsa17' takes no 'split.test', the share of seen"),
    ([("students.ridge.network.hidden", 8)], "students.ridge: 'eszsl' is linear and in closed form: 'network.hidden'"),
    ([("students.ridge.training", {"epochs": 1})], "students.ridge: 'eszsl' is linear and in closed form"),
    ([("students.wide.distribution", None)], "students.wide: without 'distribution' nobody teaches: 'teacher' is none"),
    ([("students.wide.distribution", None), ("students.wide.teacher", "none"),
      ("students.wide.classifier.mode", "end_to_end")],
     "students.wide: without 'distribution' no student learns along: 'classifier.mode' is two_stage"),
    ([("students.wide.distribution", None), ("students.wide.teacher", "none")],
     "students.wide: without 'distribution' nothing trains a hidden layer: 'network.hidden' is null"),
    ([("students.contrastive.network.hidden", None)],
     "students.contrastive: generator 'cegzsl' shares the hidden layer of the student: 'network.hidden' is a number"),
    ([("students.more.network", {"name": "mlp"})], "students.more: 'extended' takes neither 'network' nor 'training'"),
    ([("students.more.training", {"epochs": 1})], "students.more: 'extended' takes neither 'network' nor 'training'"),
    ([("students.more.classifier", {"mode": "end_to_end"})],
     "students.more: 'extended' takes neither 'network' nor 'training', and its classifier is two_stage"),
    ([("teachers.other", OF_IMAGES)],
     "teachers.other.network.name: data set 'images' holds images, and an 'encoder' learns from them"),
    ([("datasets.other", PUBLISHED), ("teachers.seen.dataset", "other")],
     "students.wide.teacher: 'seen' is of data set 'other', and this student of 'features': name one of the same data "
     "set, or set 'dataset' to 'other'"),
    ([("students.more.dataset", "awa")],
     "students.more.teacher: 'wide' is of data set 'features', and this student of 'awa': name one of the same data "
     "set, or set 'dataset' to 'features'"),
    ([("students.wide.generator", {"nane": "clswgan", "noise": 4})],
     "students.wide.generator.nane: unknown key; did you mean 'name'?"),
    ([("students.wide.generator", {"noise": 4})], "students.wide.generator.name: is missing"),
    ([("students.wide.mehod", "d3gzsl"), ("students.wide.method", ABSENT)],
     "students.wide.mehod: unknown key; did you mean 'method'?"),
    ([("students.wide.method", ABSENT)], "students.wide.method: is missing"),
    ([("students.more.tsk", "zero_shot"), ("students.more.task", ABSENT)],
     "students.more.tsk: unknown key; did you mean 'task'?"),
    ([("students.more.task", ABSENT)], "students.more.task: is missing; known: recognition, segmentation, text, zero"),
    ([("teachers.seen.network", ENCODER)],
     "teachers.seen.network.name: data set 'features' holds features, and an 'mlp' learns from them"),
    ([("datasets.other", PUBLISHED), ("teachers.encoder.dataset", "features"), ("teachers.encoder.network", ENCODER)],
     "datasets.features.encoder: 'encoder' learns from 'features', which has to be another data set"),
]  # fmt: skip


@pytest.mark.parametrize(("edits", "message"), RULES, ids=[message[:70] for _, message in RULES])
def test_what_does_not_go_together_is_answered_for_the_whole_entry(
    file: Path, edits: list[tuple[str, Any]], message: str
) -> None:
    found = mistakes(file, *edits)
    assert found[0].startswith(message)
    # An encoder that learns from what it makes contradicts itself in a second place.
    assert len(found) == (2 if "which has to be another" in message else 1)


@pytest.mark.parametrize("value", [["1-plain", 2], "three", -1, [], 1.5])
def test_validation_classes_are_names_or_a_number(file: Path, value: Any) -> None:
    lines = mistakes(file, ("datasets.images.split.validation_classes", value))
    assert all(line.startswith("datasets.images.split.validation_classes") for line in lines), lines


@pytest.mark.parametrize("hidden", [None, 16])
def test_a_generator_without_d3_has_a_hidden_layer_where_it_trains_one(file: Path, hidden: int | None) -> None:
    alone = [("students.wide.distribution", None), ("students.wide.teacher", "none"), ("students.more", ABSENT)]
    if hidden is None:
        read(file, edited(*alone, ("students.wide.network.hidden", None)))
    else:
        raw = edited(("students.contrastive.network.hidden", hidden))
        assert read(file, raw).students["contrastive"].network.hidden == hidden  # type: ignore[attr-defined]


def test_added_classes_may_be_added_to(file: Path) -> None:
    again = {"task": "zero_shot", "dataset": "features", "method": "extended", "teacher": "more",
             "added": {"eight": [1, 0.25]}}  # fmt: skip
    found = read(file, edited(("students.again", again))).students["again"]
    assert isinstance(found, Extended)
    assert found.added == {"eight": [1.0, 0.25]}


def known_keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all keys that the schema knows: the names of entries and of added classes are the user's own."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(key, str) and len(path) > 1 and path[-1] != "added":
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
    above = ".".join(map(str, path[:-1])) + "."
    assert f"{above}{wrong}: unknown key; did you mean '{right}'?" in found


def test_every_key_of_the_schema_is_misspelt_somewhere() -> None:
    """FULL names every field, so that the test above leaves none out."""
    from stages.parameters import _models, shared, zero_shot

    kinds = [zero_shot.Dataset, zero_shot.Teacher, zero_shot.Student, zero_shot.Export, zero_shot.Task, zero_shot.Gates]
    models, fields = [model for kind in kinds for model in _models(kind)], set()
    while models:
        for name, field in models.pop().model_fields.items():
            fields.add(field.alias or name)
            models += _models(field.annotation)
    named = {path[-1] for path in PLACES if path[0] != "sources"}
    assert fields == named, "a new field has to stand in FULL"
    assert shared.UrlSource.model_fields.keys() >= {path[-1] for path in PLACES if path[:2] == ("sources", "digits")}
