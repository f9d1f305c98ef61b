"""Mistakes in params.yaml: each is found, named by its full path, and answered with what would be right."""

import copy
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from data.errors import UserError, suggest
from stages.parameters import CODE, PER_TASK, SECTIONS, TASKS, Parameters, load, schema, select
from stages.parameters.recognition import HORKD, KD, Alone, TorchvisionNetwork
from stages.parameters.shared import AnySource

STAGED = [section for section in SECTIONS if section not in ("sources", "gates")]  # what stages read

ROOT = Path(__file__).resolve().parents[2]
DIGEST = "0123456789abcdef" * 4

# Every kind of entry, and every key that there is.
FULL = f"""
code: ..
sources:
  wheel: {{kind: wheel, licence: none, credit: nobody, redistributable: true,
           wheels: [{{package: some-data==1.0, files: [a/b.csv], sha256: {DIGEST}}},
                    {{package: other==2.0, python: "3.11", platform: manylinux_2_28_x86_64, files: [c.jpg],
                      sha256: {DIGEST}}}]}}
  file: {{kind: url, url: "https://example.org/a.zip", sha256: {DIGEST},
          licence: none, credit: nobody, redistributable: false}}
  tree: {{kind: folder, path: $DATA/images, tree_digest: {DIGEST},
          licence: none, credit: nobody, redistributable: false}}
  rules: {{kind: none, licence: none, credit: nobody, redistributable: true}}
  several: {{kind: parts, licence: none, credit: nobody, redistributable: true,
             parts: [{{kind: url, url: "https://example.org/b.zip", sha256: {DIGEST}}},
                     {{kind: wheel, wheels: [{{package: other==2.0, files: [d.jpg], sha256: {DIGEST}}}]}}]}}
datasets:
  digits:
    {{task: recognition, source: wheel, encoder: none, format: csv, file: b.csv, image_size: 28, channels: 1,
      classes: ["0", "1"],
      split: {{validation: 10, test: 10, seed: 1}},
      expect: {{samples: 100, smallest_class: 0.4, largest_class: 0.6}}}}
  photos:
    {{task: recognition, source: tree, encoder: none, format: folder, folder: images, image_size: 64, channels: 3,
      split: {{by: classes, validation: 5, test: 5}}, verification: {{folds: 2, pairs: pairs.txt}}}}
  faces:
    {{task: recognition, source: tree, encoder: none, format: arrays, file: f.npz, keys: {{images: x, labels: y}},
      image_size: 64, channels: 1, split: {{by: classes, validation: 10, test: 10}}, verification: {{folds: 5}}}}
teachers:
  large:
    task: recognition
    dataset: digits
    start: none
    network: {{name: resnet, widths: [16, 32], blocks: 2, embedding: 8, unit: true}}
    training: {{epochs: 2, batch: 8, learning_rate: 0.1, momentum: 0.5, weight_decay: 0.0, warmup: 0.2, clip: 1.0,
                seed: 1, threads: 1, accelerator: cpu, devices: 1, precision: 64-true, per_class: 4, optimizer: sgd,
                augment: {{shift: 1, flip: true}}}}
  taken:
    task: recognition
    dataset: photos
    start: none
    from: {{file: model.pth, sha256: {DIGEST}, network: {{name: torchvision, model: resnet18}},
            origin: {{name: x, licence: none, credit: nobody, redistributable: true}},
            mean: [0.4, 0.4, 0.4], std: [0.2, 0.2, 0.2]}}
students:
  assistant:
    {{task: recognition, dataset: digits, method: horkd, teacher: large, resolution: 28,
      network: {{name: resnet, widths: [8]}}, tap: pooled, point_penalty: huber,
      weights: {{task: 1, points: 2, pairs: 3, triplets: 4}}, vertices: 100}}
  shared:
    {{task: recognition, dataset: digits, method: horkd, teacher: large, resolution: 7,
      network: {{name: resnet, widths: [8]}}, tap: embedding, weights: {{points: 0}},
      shares: {{pairs: 0.5, triplets: 2}}}}
  small:
    {{task: recognition, dataset: digits, method: kd, teacher: assistant, resolution: 7,
      network: {{name: resnet, widths: [8, 16]}}, temperature: 4.0, alpha: 0.9, training: {{epochs: 1}}}}
  light:
    {{task: recognition, dataset: photos, method: alone, teacher: none, resolution: 64,
      network: {{name: efficientnet_lite, variant: lite0, embedding: 16, unit: false, freeze_batchnorm: true}},
      objective: triplets, margin: 0.3, training: {{batch: 20, per_class: 5, optimizer: adam, learning_rate: 0.001}},
      initial: {{file: lite0.pth, sha256: {DIGEST}, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5],
                 origin: {{name: y, licence: none, credit: nobody, redistributable: true}}}}}}
  single:
    {{task: recognition, dataset: photos, method: alone, teacher: none, resolution: 64,
      network: {{name: torchvision, model: resnet18}}}}
exports:
  small: {{task: recognition, dataset: digits, tolerance: 0.001, threads: 2}}
tasks:
  recognition: {{batch: 128, threads: 1, seed: 0, resolutions: [7, 14]}}
gates:
  recognition:
    {{metric: top_1, dataset: digits, baseline: alone, delta: 0.01, confidence: 0.95, resamples: 10000, seed: 1,
      teacher_share: 0.9, latency: {{batch: 1, percentile: p95, budget_ms: 2.0}},
      parity: {{outputs: 0.0001, metric: 0.001}}}}
"""

Keys = tuple[str | int, ...]
ABSENT = object()


def edited(*edits: tuple[str, Any], text: str = FULL) -> dict[str, Any]:
    """The parameters with some values set (or removed) by their path, as in `a.b[0].c`."""
    raw: dict[str, Any] = copy.deepcopy(yaml.safe_load(text))
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


def read(content: Any) -> Parameters:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
        path.write_text(text, encoding="utf-8")
        return load(path)


def mistakes(content: Any) -> list[str]:
    """The lines of the message, one for each mistake."""
    with pytest.raises(UserError) as caught:
        read(content)
    first, *lines = str(caught.value).splitlines()
    assert re.search(rf"params.yaml has {len(lines)} mistake{'s' * (len(lines) > 1)}:$", first)
    return [line.removeprefix("  ") for line in lines]


# What is right


def test_the_shipped_file_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parameters = load()
    assert parameters.sources
    assert parameters.exports.keys() <= parameters.students.keys()
    assert {model.task for model in parameters.students.values()} == parameters.tasks.keys()


def test_values_arrive_where_they_belong() -> None:
    parameters = read(FULL)
    raw = yaml.safe_load(FULL)
    for section in SECTIONS:
        assert getattr(parameters, section).keys() == raw[section].keys()
    small, assistant, single = (parameters.students[name] for name in ("small", "assistant", "single"))
    assert isinstance(small, KD)
    assert isinstance(assistant, HORKD)
    assert isinstance(single, Alone)
    assert (small.temperature, small.alpha, small.training.epochs, small.training.momentum) == (4.0, 0.9, 1, 0.9)
    assert assistant.weights.model_dump() == {"task": 1, "points": 2, "pairs": 3, "triplets": 4}
    shared = parameters.students["shared"]
    assert isinstance(shared, HORKD)
    assert shared.shares.model_dump() == {"points": None, "pairs": 0.5, "triplets": 2}
    assert [shared.wanted(term) for term in ("task", "points", "pairs", "triplets")] == [True, False, True, True]
    taken = parameters.teachers["taken"]
    assert taken.outside is not None
    assert taken.outside.file == "model.pth"
    assert isinstance(single.network, TorchvisionNetwork)
    light = parameters.students["light"]
    assert isinstance(light, Alone)
    assert (light.learns, light.margin, light.training.per_class, light.training.optimizer) == (
        "triplets",
        0.3,
        5,
        "adam",
    )
    assert [origin.name for origin in light.origins] == ["y"]
    assert [origin.name for origin in taken.origins] == ["x"]
    names = ["large", "taken", "assistant", "shared", "small", "light", "single"]
    assert list(parameters.models("recognition")) == names
    assert parameters.models("other") == {}
    with pytest.raises(ValueError, match="frozen"):
        small.temperature = 1.0


def test_select_suggests_the_nearest_name() -> None:
    parameters = read(FULL)
    assert select(parameters.students, "small", "student") is parameters.students["small"]
    with pytest.raises(UserError, match=r"^unknown student 'smal'; did you mean 'small'\?$"):
        select(parameters.students, "smal", "student")
    with pytest.raises(UserError, match=r"^unknown student 'x'; known: assistant, light, shared, single, small$"):
        select(parameters.students, "x", "student")
    assert suggest("x", []) == "none is known"


# What is wrong: one edit, and the one line that answers it

TAKEN = {"file": "x", "sha256": DIGEST, "network": {"name": "resnet", "widths": [8]}}
WRONG: list[tuple[str, Any, str]] = [
    # Unknown keys, everywhere.
    ("student", {}, "unknown section; did you mean 'students'?"),
    ("students.small.temprature", 3, "unknown key; did you mean 'temperature'?"),
    ("students.single.temperature", 3, "unknown key; known: dataset, initial, margin, method, "),
    ("students.small.training.epoch", 3, "unknown key; did you mean 'epochs'?"),
    ("students.small.training.augment.flp", 1, "unknown key; did you mean 'flip'?"),
    ("students.small.network.width", [1], "unknown key; did you mean 'widths'?"),
    ("students.single.network.widths", [1], "unknown key; known: embedding, model, name, unit"),
    ("students.assistant.weights.pair", 1, "unknown key; did you mean 'pairs'?"),
    ("students.shared.shares.task", 1, "unknown key; known: pairs, points, triplets"),
    ("students.small.kd", 1, "unknown key; known: alpha, dataset, "),
    ("teachers.taken.from.fil", 1, "unknown key; did you mean 'file'?"),
    ("teachers.taken.outside", {}, "unknown key; known: dataset, from, initial, margin, "),
    ("teachers.taken.from.network.modl", 1, "unknown key; did you mean 'model'?"),
    ("teachers.large.network.block", 1, "unknown key; did you mean 'blocks'?"),
    ("sources.wheel.wheels[1].file", "x", "unknown key; did you mean 'files'?"),
    ("sources.tree.sha256", DIGEST, "unknown key; known: credit, kind, licence, path, "),
    ("datasets.digits.image_sizes", 4, "unknown key; did you mean 'image_size'?"),
    ("datasets.digits.split.sed", 4, "unknown key; did you mean 'seed'?"),
    ("datasets.faces.keys.label", "y", "unknown key; did you mean 'labels'?"),
    ("datasets.faces.verification.fold", 5, "unknown key; did you mean 'folds'?"),
    ("datasets.faces.verification.folds", 1, "must be >= 2, got 1"),
    ("datasets.faces.split.by", "class", "input should be 'samples' or 'classes', got 'class'"),
    ("datasets.digits.expect.sample", 4, "unknown key; did you mean 'samples'?"),
    ("exports.small.tolerence", 4, "unknown key; did you mean 'tolerance'?"),
    ("tasks.recognition.thread", 4, "unknown key; did you mean 'threads'?"),
    ("sources.file.urls", "x", "unknown key; did you mean 'url'?"),
    ("sources.several.parts[0].urls", "x", "unknown key; did you mean 'url'?"),
    ("sources.several.parts[1].wheels[0].file", "x", "unknown key; did you mean 'files'?"),
    ("sources.several.parts[0].licence", "x", "unknown key; known: kind, sha256, url"),
    ("gates.recognition.detla", 0.1, "unknown key; did you mean 'delta'?"),
    ("gates.recognition.latency.budget", 1, "unknown key; did you mean 'budget_ms'?"),
    # Missing keys.
    ("sources.file.url", ABSENT, "is missing"),
    ("sources.file.sha256", ABSENT, "is missing"),
    ("students.small.network", ABSENT, "is missing"),
    ("students.small.network.widths", ABSENT, "is missing"),
    ("students.small.network.name", ABSENT, "is missing"),
    ("students.small.method", ABSENT, "is missing"),
    ("students.small.task", ABSENT, "is missing; known: "),
    ("exports.small.task", ABSENT, "is missing; known: "),
    ("teachers.taken.from.sha256", ABSENT, "is missing"),
    ("teachers.taken.start", ABSENT, "is missing"),
    ("sources.wheel.kind", ABSENT, "is missing"),
    ("sources.wheel.licence", ABSENT, "is missing"),
    ("datasets.digits.split.test", ABSENT, "is missing"),
    # Values outside their bounds.
    ("students.small.temperature", -1, "must be > 0, got -1"),
    ("students.small.temperature", 0, "must be > 0, got 0"),
    ("students.small.alpha", 2, "must be <= 1, got 2"),
    ("students.small.alpha", -0.1, "must be >= 0, got -0.1"),
    ("students.small.resolution", 1, "must be >= 2, got 1"),
    ("students.small.training.epochs", 0, "must be > 0, got 0"),
    ("students.small.training.momentum", 1, "must be < 1, got 1"),
    ("students.small.training.learning_rate", 0, "must be > 0, got 0"),
    ("students.small.network.widths", [8, 0, 4], "[1]: must be > 0, got 0"),
    ("students.small.network.widths", [], "list should have at least 1 item"),
    ("students.assistant.weights.pairs", -1, "must be >= 0, got -1"),
    ("students.shared.shares.pairs", 0, "must be > 0, got 0"),
    ("students.assistant.vertices", 0, "must be > 0, got 0"),
    ("students.assistant.training.batch", 1, "must be >= 2, got 1"),
    ("datasets.digits.image_size", 3, "must be >= 4, got 3"),
    ("tasks.recognition.resolutions", [8, 1], "[1]: must be >= 2, got 1"),
    ("gates.recognition.resamples", 9999, "must be >= 10000, got 9999"),
    ("gates.recognition.confidence", 0.5, "must be > 0.5, got 0.5"),
    ("gates.recognition.metric", "top_2", "input should be 'top_1' or 'recall_at_1', got 'top_2'"),
    ("gates.recognition.dataset", "photos", "no exported student is of data set 'photos'; known: digits"),
    ("datasets.digits.expect.largest_class", 60, "must be <= 1, got 60"),
    ("teachers.taken.from.std", [0.2, 0.0], "[1]: must be > 0, got 0.0"),
    ("students.small.temperature", float("inf"), "input should be a finite number, got inf"),
    ("students.small.alpha", float("nan"), "input should be a finite number, got nan"),
    ("teachers.taken.from.mean", [float("nan")], "[0]: input should be a finite number"),
    # Values of another type.
    ("students.small.temperature", "hot", "input should be a valid number"),
    ("students.small.training.epochs", 1.5, "input should be a valid integer"),
    ("students.small.network.widths", 8, "input should be a valid list, got 8"),
    ("students.small.network", 8, "input should be a valid dictionary"),
    ("students.small.training", "long", "input should be a valid dictionary"),
    ("datasets.digits.classes", ["0", 1], "[1]: input should be a valid string, got 1"),
    ("datasets.digits.channels", 2, "input should be 1 or 3, got 2"),
    ("datasets.digits.format", "cvs", "input should be 'csv', 'folder' or 'arrays', got 'cvs'"),
    ("sources.wheel.redistributable", "perhaps", "input should be a valid boolean"),
    ("sources.wheel.wheels[0].sha256", "abc", "string should match pattern"),
    ("sources.wheel.wheels[1].python", 3.1, "input should be a valid string, got 3.1"),
    ("sources.wheel.wheels[1].platform", "--index-url x", "string should match pattern"),
    ("sources.wheel.wheels", [], "list should have at least 1 item"),
    ("sources.wheel.wheels[0].package", "some-data", "string should match pattern"),
    ("sources.wheel.wheels[0].package", "--index-url http://x==1", "string should match pattern"),
    ("sources.wheel.wheels[0].package", "--index-url==http://x", "string should match pattern"),
    ("sources.wheel.wheels[0].package", "-r==x", "string should match pattern"),
    ("sources.file.url", "example.org/a.zip", "string should match pattern"),
    ("students.small", 3, "must be a mapping, got 3"),
    ("students.small", None, "must be a mapping, got None"),
    # Names that lead nowhere.
    ("students.small.method", "hrkd", "unknown method 'hrkd'; did you mean 'horkd'?"),
    ("students.small.method", ["kd"], "unknown method ['kd']; known: alone, "),
    ("students.small.network.name", "resnt", "unknown name 'resnt'; did you mean 'resnet'?"),
    ("students.small.teacher", "larg", "unknown model 'larg' of task recognition; did you mean 'large'?"),
    ("students.small.teacher", "small", "a student cannot teach itself"),
    ("students.single.dataset", "photo", "unknown data set 'photo' of task recognition; did you mean 'photos'?"),
    ("teachers.large.dataset", "nothing", "unknown data set 'nothing' of task recognition; known: digits, faces, "),
    ("datasets.digits.source", "whel", "unknown source 'whel'; did you mean 'wheel'?"),
    ("sources.wheel.kind", "weel", "unknown kind 'weel'; did you mean 'wheel'?"),
    ("sources.several.parts[0].kind", "parts", "unknown kind 'parts'; known: folder, url, wheel"),
    ("teachers.large.start", "take", "unknown teacher 'take' of task recognition; did you mean 'taken'?"),
    ("teachers.large.start", "single", "unknown teacher 'single' of task recognition; known: taken"),
    ("teachers.large.start", "large", "a teacher cannot begin with itself"),
    ("students.small.task", "recognitoin", "unknown task 'recognitoin'; did you mean 'recognition'?"),
    ("students.small.task", ["a"], "unknown task ['a']; known: "),
    ("tasks.recogniton", {}, "unknown task 'recogniton'; did you mean 'recognition'?"),
    ("exports.smal", {"task": "recognition", "dataset": "digits"}, "unknown student; did you mean 'small'?"),
    ("exports.large", {"task": "recognition", "dataset": "digits"}, "unknown student; "),
    # Values that contradict each other; ELSEWHERE has those that are answered for the whole entry.
    ("students.small.resolution", 29, "must be at most the size of its images, datasets.digits.image_size = 28"),
    ("students.small.teacher", "none", "method 'kd' needs a teacher"),
    ("students.single.teacher", "small", "input should be 'none', got 'small'"),
    ("exports.small.dataset", "photos", "must be the student's own, 'digits', got 'photos'"),
    ("students.light.training.per_class", ABSENT, "objective 'triplets' needs it: how many images of a class"),
    ("students.light.training.batch", 5, "objective 'triplets' needs images of two classes at least, 2 * per_class = "
     "10, got 5"),
    # Names that cannot be names.
    ("students.a/b", {}, "a name consists of letters, digits, '-' and '_', and is not 'none'"),
    ("students.none", {}, "a name consists of letters, digits, '-' and '_', and is not 'none'"),
    ("students.-x", {}, "a name consists of letters"),
    ("students.a b", {}, "a name consists of letters"),
    # Sections that are no sections.
    ("exports", [], "must be a mapping of names, got []"),
    ("exports", False, "must be a mapping of names, got False"),
]  # fmt: skip


ELSEWHERE: list[tuple[str, Any, str]] = [
    ("sources.wheel.wheels[0].python", "3.11", "sources.wheel.wheels[0]: 'python' and 'platform' go together"),
    ("sources.wheel.wheels[1].python", ABSENT, "sources.wheel.wheels[1]: 'python' and 'platform' go together"),
    ("teachers.large.from", TAKEN, "teachers.large: needs either 'network' (it is trained here) or 'from' "),
    ("teachers.large.network", ABSENT, "teachers.large: needs either 'network' (it is trained here) or 'from' "),
    ("datasets.digits.classes", ["a", "b", "a"], "datasets.digits: 'classes' names a class twice"),
    ("datasets.digits.classes", ABSENT, "datasets.digits: format 'csv' needs 'file' and 'classes'"),
    ("students.light.training.batch", 21, "students.light.training: 'batch' = 21 must be a multiple of "),
    ("students.light.training.momentum", 0.9, "students.light.training: 'momentum' goes with optimizer 'sgd'"),
    ("students.light.training.learning_rate", ABSENT, "students.light.training: optimizer 'adam' needs "),
    ("students.light.objective", "classes", "students.light: 'margin' goes with objective 'triplets'"),
    ("teachers.taken.objective", "triplets", "teachers.taken: takes neither 'training', 'objective' nor 'initial', "),
    ("teachers.taken.initial", {"file": "x", "sha256": DIGEST}, "teachers.taken: takes neither 'training', "),
    ("students.shared.weights.pairs", 1, "students.shared: weights.pairs and shares.pairs exclude each other"),
    ("students.assistant.weights", {"triplets": 0}, "students.assistant: 'vertices' is about triplets, whose weight "),
    ("students.shared.weights.task", 0, "students.shared: shares.pairs = 0.5 is a share of the task's gradient, and "),
    ("students.assistant.weights", dict.fromkeys(("task", "points", "pairs", "triplets"), 0),
     "students.assistant: at least one of 'weights' must be greater than 0"),
    ("datasets.photos.file", "x.csv", "datasets.photos: format 'folder' takes no 'file'"),
    ("datasets.faces.file", ABSENT, "datasets.faces: format 'arrays' needs 'file'"),
    ("datasets.faces.folder", "x", "datasets.faces: format 'arrays' takes no 'folder'"),
    ("datasets.photos.keys", {}, "datasets.photos: format 'folder' takes no 'keys'"),
    ("datasets.digits.keys", {}, "datasets.digits: format 'csv' takes no 'keys'"),
    ("datasets.faces.split.by", "samples", "datasets.faces: 'verification' needs 'split.by: classes', or "),
    ("datasets.faces.verification.pairs", "p.txt", "datasets.faces: 'verification.pairs' needs format 'folder'"),
    ("tasks.recognition.resolutions", [8, 16, 8], "tasks.recognition: 'resolutions' names one twice"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "message"), WRONG, ids=[f"{path}={str(value)[:12]}" for path, value, _ in WRONG]
)
def test_one_mistake_is_answered_in_one_line(path: str, value: Any, message: str) -> None:
    (line,) = mistakes(edited((path, value)))
    assert line.startswith(path + message if message.startswith("[") else f"{path}: {message}")


@pytest.mark.parametrize(("path", "value", "message"), ELSEWHERE)
def test_keys_that_do_not_go_together_are_answered_for_the_whole_entry(path: str, value: Any, message: str) -> None:
    (line,) = mistakes(edited((path, value)))
    assert line.startswith(message)


RELATIONS_ALONE = ("students.assistant.weights.task", 0)


def test_what_the_task_is_needs_a_task() -> None:
    objective = ("students.assistant.objective", "triplets")
    for edits, name in (([objective], "objective"), ([objective, ("students.assistant.margin", 0.3)], "margin")):
        wanted = f"students.assistant: '{name}' says what the task is, and weights.task is 0"
        assert mistakes(edited(*edits, RELATIONS_ALONE))[0].startswith(wanted)


def test_kd_needs_a_teacher_that_knows_classes() -> None:
    """An assistant that learns from relations alone, or a teacher that learns from triplets."""
    found = mistakes(edited(RELATIONS_ALONE))
    wanted = "students.small.teacher: method 'kd' compares class scores, and 'assistant' learns no classes; use 'horkd'"
    assert found == [wanted]
    metric = (("objective", "triplets"), ("training.batch", 8))
    edits = [(f"teachers.large.{key}", value) for key, value in metric]
    assert read(edited(*edits)).teachers["large"].learns == "triplets"  # HORKD asks for embeddings only
    found = mistakes(edited(*edits, ("students.small.teacher", "large")))
    assert found == [wanted.replace("assistant", "large")]


def test_kd_learns_classes() -> None:
    edits = [("objective", "triplets"), ("training.per_class", 4)]
    (line,) = mistakes(edited(*((f"students.small.{key}", value) for key, value in edits)))
    assert line == "students.small.objective: method 'kd' compares class scores, and so needs 'classes', got 'triplets'"


def test_without_the_task_what_is_deployed_has_to_be_compared() -> None:
    """The layer after pooling would keep its first weights."""
    edits = [RELATIONS_ALONE, ("students.small.teacher", "large")]
    read(edited(*edits))
    (line,) = mistakes(edited(*edits, ("students.assistant.network.embedding", 4)))
    assert line.startswith("students.assistant.tap: without the task (weights.task = 0) nothing after the pooled ")
    edits += [("students.assistant.network.embedding", 4), ("students.assistant.tap", "embedding")]
    assert read(edited(*edits)).students["assistant"].learns is None


def test_a_teacher_begins_in_one_way() -> None:
    edits = [("teachers.large.start", "taken"), ("teachers.large.initial", {"file": "x", "sha256": DIGEST})]
    read(edited(*edits[1:]))
    assert mistakes(edited(*edits)) == ["teachers.large: begins either with 'initial' or with 'start'"]


def test_the_base_of_these_edits_is_right() -> None:
    read(edited())


def test_a_student_that_is_named_like_a_teacher() -> None:
    raw = edited()
    raw["students"]["large"] = raw["students"]["small"]
    assert "students.large: a teacher has this name too" in mistakes(raw)


def test_teachers_in_a_circle_are_named() -> None:
    found = mistakes(edited(("students.assistant.teacher", "small")))
    assert sorted(found) == [
        "students.assistant.teacher: goes round in a circle: assistant <- small <- assistant",
        "students.small.teacher: goes round in a circle: small <- assistant <- small",
    ]


def test_a_model_of_a_task_that_is_not_there() -> None:
    found = mistakes(edited(("tasks", None)))
    assert "tasks.recognition: is missing, and students.small belongs to this task" in found
    assert len(found) == 7


def test_all_of_several_mistakes_are_told() -> None:
    chosen = {path: (value, message) for path, value, message in WRONG if "unknown key; did you mean" in message}
    assert len(chosen) > 8
    assert len({path.split(".")[0] for path in chosen}) == len(SECTIONS)
    found = mistakes(edited(*((path, value) for path, (value, _) in chosen.items())))
    assert sorted(found) == sorted(f"{path}: {message}" for path, (_, message) in chosen.items())


def test_two_mistakes_in_one_entry_and_one_elsewhere() -> None:
    found = mistakes(edited(("students.small.temperature", -1), ("students.small.network.widths", []), ("exprts", {})))
    assert sorted(line.split(":")[0] for line in found) == [
        "exprts",
        "students.small.network.widths",
        "students.small.temperature",
    ]


@pytest.mark.parametrize("key", [1, True, 2.5])
def test_keys_that_are_no_text(key: Any) -> None:
    def with_key(place: Callable[[dict[str, Any]], Any]) -> list[str]:
        raw = edited()
        place(raw)[key] = {}
        return mistakes(raw)

    assert with_key(lambda raw: raw) == [f"{key}: unknown section; known: {', '.join(sorted((CODE, *SECTIONS)))}"]
    assert with_key(lambda raw: raw["students"])[0].startswith(f"students.{key}: a name consists of letters")
    (line,) = with_key(lambda raw: raw["students"]["small"])
    assert line.startswith("students.small")
    assert "keys should be strings" in line


@pytest.mark.parametrize("text", ["", "# a comment\n", "- a\n- b\n", "just text\n", "3\n"])
def test_a_file_without_sections(text: str) -> None:
    with pytest.raises(UserError, match=r"params.yaml must be a mapping of sources, datasets, teachers, students, "):
        read(text)


@pytest.mark.parametrize(
    "text", ["students: {a: 1\n", "a:\n\t- b\n", "a: [1, 2\nb: 3\n", "a: !!python/object/apply:os.getcwd []\n"]
)
def test_a_file_that_is_no_yaml(text: str) -> None:
    with pytest.raises(UserError, match=r"params.yaml is not YAML: "):
        read(text)


@pytest.mark.parametrize("text", ["students: {a: 1, b: 2, a: 3}\n", "tasks: {}\nstudents: {}\ntasks: {}\n"])
def test_a_key_that_stands_there_twice(text: str) -> None:
    """YAML readers take the later one without a word, and the earlier student would be gone."""
    with pytest.raises(UserError, match=r"'(a|tasks)' stands here twice"):
        read(text)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"credit: M\xfcller\n")
    with pytest.raises(UserError, match=r"params.yaml is not YAML: "):
        load(tmp_path / "params.yaml")


def test_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^params.yaml is missing · run commands from the root of the project$"):
        load()


def test_the_command_line(tmp_path: Path) -> None:
    def check() -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-m", "stages.parameters"]
        environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
        return subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    (tmp_path / "params.yaml").write_text(FULL)
    done = check()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (tmp_path / "params.yaml").write_text(FULL.replace("temperature: 4.0", "temprature: 4.0"))
    done = check()
    assert done.returncode == 1
    assert "students.small.temprature: unknown key; did you mean 'temperature'?" in done.stderr
    assert "Traceback" not in done.stderr


# Any known key, with any one letter too many or too few


def known_keys(raw: dict[str, Any]) -> list[Keys]:
    """Paths of all keys that the schema knows: the names of entries are the user's own."""
    found: list[Keys] = [(section,) for section in raw]

    def walk(value: Any, path: Keys) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                found.append((*path, key))
                walk(inner, (*path, key))
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                walk(inner, (*path, index))

    for section, entries in raw.items():
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            walk(entry, (section, name))
    return found


TEXTS = {"full": FULL, "shipped": (ROOT / "params.yaml").read_text(encoding="utf-8")}
PLACES = [(name, path) for name, text in TEXTS.items() for path in known_keys(yaml.safe_load(text))]
LETTERS = "abcdefghijklmnopqrstuvwxyz_"


@st.composite
def misspellings(draw: st.DrawFn) -> tuple[str, Keys, str]:
    """A file, a place in it, and what is written there instead of the right key."""
    name, path = draw(st.sampled_from(PLACES))
    right = str(path[-1])
    position = draw(st.integers(0, len(right) - 1))
    inserted = right[:position] + draw(st.sampled_from(LETTERS)) + right[position:]
    wrong = draw(st.sampled_from([right[:position] + right[position + 1 :], inserted]))
    return name, path, wrong


@settings(deadline=None, max_examples=150)
@given(misspellings())
def test_a_misspelt_key_is_answered_with_the_right_one(case: tuple[str, Keys, str]) -> None:
    name, path, wrong = case
    raw = yaml.safe_load(TEXTS[name])
    place = raw
    for key in path[:-1]:
        place = place[key]
    right = str(path[-1])
    if wrong in place:
        return
    place[wrong] = place.pop(right)
    found = mistakes(raw)
    above = re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, path[:-1]))) + "."
    if len(path) == 1:
        assert f"{wrong}: unknown section; did you mean '{right}'?" in found
    else:
        assert f"{above}{wrong}: unknown key; did you mean '{right}'?" in found


def test_every_key_of_the_schema_is_misspelt_somewhere() -> None:
    """FULL names every field, so that the test above leaves none out."""
    from stages.parameters import _models, schema, shared

    module = schema("recognition")
    kinds = [shared.AnySource, module.Dataset, module.Teacher, module.Student, module.Export, module.Task, module.Gates]
    models, fields = [model for kind in kinds for model in _models(kind)], set()
    while models:
        model = models.pop()
        for name, field in model.model_fields.items():
            fields.add(field.alias or name)
            models += _models(field.annotation)
    named = {path[-1] for path in known_keys(yaml.safe_load(FULL)) if len(path) > 2}
    assert fields == named, "a new field has to stand in FULL"


@pytest.mark.parametrize("task", TASKS)
def test_no_key_is_one_that_the_run_cache_of_dvc_leaves_out(task: str) -> None:
    """Its key is made without whatever is called `size` or `nfiles`, parameters included (DVC issue 10296)."""
    kinds = [AnySource, *(getattr(schema(task), PER_TASK.get(name, name.rstrip("s").capitalize())) for name in STAGED)]
    names: set[str | None] = set()
    seen: set[Any] = set()
    while kinds:
        kind = kinds.pop()
        kinds += get_args(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in seen:
            seen.add(kind)
            for name, field in kind.model_fields.items():
                names |= {name, field.alias}
                kinds.append(field.annotation)
    assert {"sha256", "licence", "dataset", "network", "method", "training", "threads"} <= names
    assert not names & {"size", "nfiles"}
