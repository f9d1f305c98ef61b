"""More classes for a student from their attributes alone: what stays, what is new, and that it recognises them."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from data.errors import UserError
from models.artifacts import Description, load_model, save_model
from models.zero_shot import MLP, Generator, build
from stages import paths
from stages.distill import extended
from stages.generators.two_stage import refit
from stages.teach.zero_shot import for_student
from stages.training import Run, derive_seed
from stages.training.fit import describe, fit

sys.path.insert(0, str(Path(__file__).parent))
import generative
import zero_shot_files
from generative import ATTRIBUTES, FEATURES, OTHERS, SEEN
from zero_shot_files import CLASSES

NEW, NEWER = [0.5, 0.5, 0.5, 0.5], [0.8, 0.6, 0.0, 0.0]
# A class each; all of length 1, so that each can be told from all others by a plane.
ROWS = np.array(
    [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0], [0, 1, 1, 0],
     [0, 0, 0, 1], [0, 1, 0, 1]], dtype=np.float32,
)  # fmt: skip
ROWS /= np.linalg.norm(ROWS, axis=1, keepdims=True)
Before = tuple[MLP, Description]


@pytest.fixture
def run() -> Run:
    return generative.run()


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stages look for it."""
    monkeypatch.chdir(tmp_path)
    return generative.prepare(paths.prepared("zero_shot", "toy"))


@pytest.fixture
def before(prepared: Path) -> Before:
    return generative.before(prepared)


def learner(prepared: Path, before: Before, run: Run, added: dict[str, list[float]], **classifier: Any) -> Any:
    entry = generative.extended(added, **classifier)
    return extended.Learner(for_student(entry, prepared, run, before), entry, run)


def written(
    prepared: Path, before: Before, run: Run, key: str, added: dict[str, list[float]], **classifier: Any
) -> Any:
    """Through all that the stage does, and read again: the student, its description, and its generator."""
    entry = generative.extended(added, **classifier)
    task = for_student(entry, prepared, run, before)
    fit(
        "distill",
        describe(key, entry, task, before[1]),
        task,
        extended.Learner(task, entry, run),
        run,
        before=before[1],
    )
    network, description = load_model(paths.trained("zero_shot", key))
    generator, told = load_model(paths.companions("zero_shot", key) / "generator")
    assert told.beside == {"name": key, "weights_sha256": description.weights_sha256}
    return network, description, generator


def test_all_but_the_last_layer_stays(prepared: Path, before: Before, run: Run) -> None:
    """To the bit, through training, writing and reading."""
    network, description, _ = written(prepared, before, run, "more", {"new": NEW})
    student, told = before
    assert description.network == told.network
    assert description.teacher == {"name": "before", "weights_sha256": told.weights_sha256}
    for name, tensor in student.state_dict().items():
        if not name.startswith("classifier."):
            assert torch.equal(network.state_dict()[name], tensor), name
    assert network.classifier.weight.shape == (len(CLASSES) + 1, generative.WIDTH)


def test_an_encoder_stays_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.chdir(tmp_path)
    prepared = generative.encode(paths.prepared("zero_shot", "toy"))
    _, told = generative.before(prepared)
    inside = {"widths": [4, FEATURES], "blocks": 1}
    told.network["encoder"], told.interface["images"] = inside, zero_shot_files.IMAGES
    student = build({"network": told.network, "interface": told.interface})
    for name, tensor in student.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_()
    network, description, _ = written(prepared, (student, told), run, "more", {"new": NEW})  # type: ignore[arg-type]
    assert description.network["encoder"] == inside
    kept = student.state_dict()
    for name, tensor in network.state_dict().items():
        if not name.startswith("classifier."):
            assert torch.equal(tensor, kept[name]), name
    pixels = torch.from_numpy(np.load(prepared / "images.npy")).float() / 255
    assert network(pixels).logits.shape == (len(pixels), len(CLASSES) + 1)


def test_old_classes_keep_their_columns(prepared: Path, before: Before, run: Run) -> None:
    """Of the network and of the generator; new ones follow in the order in which they are named."""
    network, description, generator = written(prepared, before, run, "more", {"new": NEW, "newer": NEWER})
    assert description.interface["classes"] == [*CLASSES, "new", "newer"]
    assert description.interface["seen"] == [CLASSES[label] for label in SEEN]
    assert network(torch.zeros(2, FEATURES)).logits.shape == (2, len(CLASSES) + 2)
    assert isinstance(generator, Generator)
    np.testing.assert_array_equal(generator.attributes[:-2], np.load(prepared / "attributes.npy"))
    assert generator.attributes[-2:].tolist() == torch.tensor([NEW, NEWER]).tolist()
    old, _ = load_model(paths.companions("zero_shot", "before") / "generator")
    for name, weight in old.named_parameters():
        assert torch.equal(generator.get_parameter(name), weight), name


def test_the_last_layer_is_that_of_the_two_stage_classifier(prepared: Path, before: Before, run: Run) -> None:
    """Real samples of seen classes, synthesised ones of all others: validation, unseen and new."""
    ours = learner(prepared, before, run, {"new": NEW}, samples=6)
    shown: list[Tensor] = []
    ours.modules["generator"].register_forward_pre_hook(lambda _, inputs: shown.append(inputs[1].clone()))
    (found,) = generative.steps(ours, run, 1)
    new = len(CLASSES)
    assert torch.cat(shown).tolist() == [label for label in [*OTHERS, new] for _ in range(6)]
    # The same by hand, on a student that was made anew.
    entry = generative.extended({"new": NEW}, samples=6)
    task = for_student(entry, prepared, run, before)
    generator = build({"network": task.taught_by().built_from, "interface": task.interface}).double()  # type: ignore[union-attr,operator]
    state = {name: weight.double() for name, weight in task.taught_by().state_dict().items() if name != "attributes"}
    generator.load_state_dict({**state, "attributes": task.attributes})
    features, labels = (torch.from_numpy(array) for array in generative.train(prepared))
    student = task.student
    assert isinstance(student, MLP)
    assert isinstance(generator, Generator)
    scaled = (features.double() - before[0].scale.minimum) / before[0].scale.divisor
    random = torch.Generator().manual_seed(derive_seed(0, "classifier", 0, 0))
    refit(student, (scaled, labels), generator, torch.tensor([*OTHERS, new]), entry.classifier, (0.5, 0.999), random)
    torch.testing.assert_close(ours.student.classifier.weight, student.classifier.weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.student.classifier.bias, student.classifier.bias, rtol=1e-9, atol=1e-12)
    logits = student(features.double()).logits
    assert found == {"loss/task": pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-9)}


def test_no_sample_but_the_training_split_is_used(prepared: Path, before: Before, run: Run) -> None:
    found = []
    for spoil in (False, True):
        if spoil:
            generative.spoil_other_samples(prepared)
        ours = learner(prepared, before, run, {"new": NEW})
        generative.steps(ours, run, 1)
        found.append(generative.weights(ours))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert all(tensor.isfinite().all() for tensor in found[1].values())


def test_the_teacher_of_an_extension_is_left_alone(prepared: Path, before: Before, run: Run) -> None:
    """The generator beside the new student is its own."""
    kept = {name: tensor.clone() for name, tensor in before[0].state_dict().items()}
    ours = learner(prepared, before, run, {"new": NEW})
    generative.steps(ours, run, 1)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before[0].state_dict().items())
    network, built_from, evaluated = ours.companions["generator"]
    assert set(ours.companions) == {"generator"}
    assert not evaluated
    assert built_from == {"name": "generator", "attributes": ATTRIBUTES, "noise": 4, "hidden": 9}
    assert network is not ours._task.taught_by()
    assert len(ours._task.taught_by().attributes) == len(CLASSES)


# That it recognises what it never saw


def plant(prepared: Path) -> tuple[Before, dict[str, np.ndarray]]:
    """Features that are attributes, and a generator that knows: noise moves what it writes a little."""
    labels = np.load(prepared / "labels.npy")
    random = np.random.default_rng(7)

    def features(rows: np.ndarray) -> np.ndarray:
        padded = np.pad(rows, ((0, 0), (0, FEATURES - ATTRIBUTES)))
        return (padded + 0.02 * random.random(padded.shape)).astype(np.float32)

    np.save(prepared / "attributes.npy", ROWS)
    np.save(prepared / "features.npy", features(ROWS[labels]))
    _, told = generative.before(prepared, hidden=None, name="planted")
    student = MLP(FEATURES, len(CLASSES), None)
    generator = Generator(FEATURES, len(CLASSES), ATTRIBUTES, 1, ATTRIBUTES)
    generator.attributes.copy_(torch.from_numpy(ROWS))
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.zero_()
        generator.fc1.weight[:, 0] = 0.01
        generator.fc1.weight[:, 1:] = torch.eye(ATTRIBUTES)
        generator.fc2.weight[:ATTRIBUTES] = torch.eye(ATTRIBUTES)
    folder = paths.companions("zero_shot", "planted") / "generator"
    _, about = load_model(folder)
    about.network.update(generator.built_from)
    save_model(folder, generator, about)
    real = {name: features(np.tile(np.float32(row), (20, 1))) for name, row in (("new", NEW), ("newer", NEWER))}
    return (student, told), real


LONG: dict[str, Any] = {"samples": 20, "epochs": 60, "batch": 32, "learning_rate": 0.1}


def test_real_samples_of_a_new_class_are_recognised(prepared: Path, run: Run) -> None:
    """And those of all classes that there were, seen or not."""
    before, real = plant(prepared)
    network, description, _ = written(prepared, before, run, "more", {"new": NEW}, **LONG)
    features, labels = np.load(prepared / "features.npy"), np.load(prepared / "labels.npy")
    assert set(labels.tolist()) == set(range(len(CLASSES)))
    place = description.interface["classes"].index("new")
    with torch.no_grad():
        assert network(torch.from_numpy(real["new"])).logits.argmax(1).tolist() == 20 * [place]
        np.testing.assert_array_equal(network(torch.from_numpy(features)).logits.argmax(1), labels)


def test_an_extended_student_can_be_extended(prepared: Path, run: Run) -> None:
    """All classes of the first extension stay, and are recognised beside the second."""
    before, real = plant(prepared)
    first = written(prepared, before, run, "more", {"new": NEW}, **LONG)
    network, description, generator = written(prepared, first[:2], run, "again", {"newer": NEWER}, **LONG)
    assert description.interface["classes"] == [*CLASSES, "new", "newer"]
    assert description.teacher == {"name": "more", "weights_sha256": first[1].weights_sha256}
    assert generator.attributes.tolist() == torch.cat([first[2].attributes, torch.tensor([NEWER])]).tolist()
    features, labels = np.load(prepared / "features.npy"), np.load(prepared / "labels.npy")
    with torch.no_grad():
        for place, name in enumerate(("new", "newer"), len(CLASSES)):
            assert network(torch.from_numpy(real[name])).logits.argmax(1).tolist() == 20 * [place]
        np.testing.assert_array_equal(network(torch.from_numpy(features)).logits.argmax(1), labels)
    with pytest.raises(UserError, match="more knows the class 'new' already"):
        learner(prepared, first[:2], run, {"new": NEWER})


def test_one_extension_by_two_classes_synthesises_what_two_by_one_do(prepared: Path, before: Before, run: Run) -> None:
    first = written(prepared, before, run, "more", {"new": NEW})
    twice = learner(prepared, first[:2], run, {"newer": NEWER})
    once = learner(prepared, before, run, {"new": NEW, "newer": NEWER})
    for ours in (twice, once):
        generative.steps(ours, run, 1)
    for name, tensor in once.modules["student"].state_dict().items():
        torch.testing.assert_close(twice.modules["student"].state_dict()[name], tensor, rtol=1e-9, atol=1e-12)


def test_data_that_changed_are_refused(prepared: Path, before: Before, run: Run) -> None:
    manifest = pd.read_csv(prepared / "manifest.csv")
    manifest[::-1].to_csv(prepared / "manifest.csv", index=False)
    with pytest.raises(UserError, match="before was made from 'toy' as it was before"):
        learner(prepared, before, run, {"new": NEW})


def test_what_is_written_names_its_parts(prepared: Path, before: Before, run: Run) -> None:
    written(prepared, before, run, "more", {"new": NEW})
    contents = json.loads((paths.companions("zero_shot", "more") / paths.CONTENTS).read_text())
    assert contents == {"models": ["generator"], "evaluated": [], "tables": []}
