"""Zero-shot recognition as a training task: what networks are shown, what is asked of them, what is watched."""

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data.errors import UserError
from models.artifacts import load_model
from models.zero_shot import MLP, Generator, Output, build
from stages import paths
from stages.distill import alone
from stages.parameters.zero_shot import ESZSL
from stages.teach.zero_shot import Split, ZeroShot, for_student, for_teacher, give_encoder, require_same_features
from stages.training import Context, Run, derive_seed, train

sys.path.insert(0, str(Path(__file__).parent / "distill"))
import generative
import zero_shot_files
from generative import FEATURES, OTHERS, SEEN, WIDTH
from zero_shot_files import CLASSES, ROLES

ENCODER = {"name": "encoder", "widths": [4, 5], "blocks": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero shot")


@pytest.fixture(scope="module")
def prepared(folder: Path) -> Path:
    return generative.prepare(folder / "toy")


@pytest.fixture(scope="module")
def images(folder: Path) -> Path:
    zero_shot_files.write_prepared(folder / "images", 1, holds=("images",))
    return folder / "images"


@pytest.fixture(scope="module")
def encoded(folder: Path) -> Path:
    return generative.encode(folder / "encoded")


@pytest.fixture(scope="module")
def run() -> Run:
    return generative.run()


def rows_of(prepared: Path, split: str) -> np.ndarray:
    return np.flatnonzero(pd.read_csv(prepared / "manifest.csv")["split"] == split)


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


# What a network answers with


def test_a_teacher_answers_with_the_seen_classes(prepared: Path, images: Path, run: Run) -> None:
    for folder, network in ((prepared, None), (images, ENCODER)):
        task = for_teacher(generative.teaching(network), folder, run)
        names = [CLASSES[label] for label in SEEN]
        assert task.interface["classes"] == task.interface["seen"] == names
        assert task.student.classifier.out_features == len(SEEN)
        assert task.interface["features"] == (FEATURES if network is None else ENCODER["widths"][-1])
        assert task.interface["images"] == (None if network is None else zero_shot_files.IMAGES)
        assert task.features(task.student) == {"embedding": WIDTH if network is None else ENCODER["widths"][-1]}
        assert task.teacher is None
        again = build({"network": task.network, "interface": task.interface})
        again.load_state_dict(task.student.state_dict())


def test_a_student_answers_with_every_class(prepared: Path, run: Run) -> None:
    task = for_student(generative.alone(), prepared, run, None)
    assert task.interface["classes"] == CLASSES
    assert task.interface["seen"] == [CLASSES[label] for label in SEEN]
    assert task.student.classifier.out_features == len(CLASSES)
    assert task.network == {"name": "mlp", "hidden": WIDTH, "encoder": None}
    assert (task.seen.tolist(), task.others.tolist()) == (SEEN, OTHERS)
    assert sorted(SEEN + OTHERS) == list(range(len(ROLES)))
    np.testing.assert_array_equal(task.attributes, np.load(prepared / "attributes.npy"))


def test_weights_begin_as_the_card_says(prepared: Path, run: Run) -> None:
    """3.1: N(0, 0.02^2) and zeros, but for the student's last layer, which begins as torch begins."""
    teacher = for_teacher(generative.teaching({"name": "mlp", "hidden": 400}), prepared, run).student
    student = for_student(generative.alone(400), prepared, run, None).student
    for layer in (teacher.embedding[0], teacher.classifier, student.embedding[0]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not layer.bias.any()
    bound = 1 / math.sqrt(400)
    last = student.classifier
    assert bound * 0.95 < last.weight.abs().max().item() <= bound
    assert last.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert last.bias.any()


def test_the_seed_decides_how_weights_begin(prepared: Path, run: Run) -> None:
    first, second, other = (
        state_of(for_student(generative.alone(seed=seed), prepared, run, None).student) for seed in (0, 0, 1)
    )
    assert same(first, second)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


# What a network is shown


def test_features_are_shown_as_they_were_prepared(prepared: Path, run: Run) -> None:
    """Every training sample at most once per epoch; the network scales them, once, as it does when it is deployed."""
    task = for_student(generative.alone(), prepared, run, None)
    features, labels = np.load(prepared / "features.npy"), np.load(prepared / "labels.npy")
    places = rows_of(prepared, "train")
    context, drawn = Context(alone.Learner(task, generative.alone(), run), run, 0), []
    assert task.steps_per_epoch == len(places) // 8
    assert task.steps == 3 * task.steps_per_epoch
    for step in range(task.steps_per_epoch):
        context.begin(step)
        views = task.views(context)
        assert views.student is views.teacher
        chosen = places[views.rows]
        np.testing.assert_array_equal(views.student, features[chosen])
        np.testing.assert_array_equal(views.target, labels[chosen])
        assert views.target.tolist() == task.train.labels[views.rows].tolist()
        assert torch.equal(task.student(views.student).features, task.train.inputs[views.rows])
        drawn += views.rows.tolist()
    assert len(set(drawn)) == len(drawn) == 8 * task.steps_per_epoch
    assert task.train.inputs.min() == 0
    assert task.train.inputs.max() == 1
    with pytest.raises(UserError, match="needs samples that are held out of training"):
        task.held_out(context)


def test_images_are_shown_between_0_and_1(images: Path, run: Run) -> None:
    task = for_teacher(generative.teaching(ENCODER), images, run)
    pixels, labels = np.load(images / "images.npy"), np.load(images / "labels.npy")
    context = Context(alone.Learner(task, generative.teaching(ENCODER), run), run, 0)
    context.begin(0)
    views = task.views(context)
    chosen = rows_of(images, "train")[views.rows]
    assert views.student.dtype == torch.float64
    np.testing.assert_allclose(views.student, pixels[chosen] / 255, rtol=1e-6)
    np.testing.assert_array_equal(views.target, labels[chosen])


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_training_is_that_of_a_plain_loop(role: str, prepared: Path, run: Run) -> None:
    """Scaling by hand, torch's own layers and Adam, targets by their place among the classes of the network."""
    if role == "teacher":
        entry = generative.teaching(factor=0.05)
        task, classes, factor = for_teacher(entry, prepared, run), SEEN, 0.05
    else:
        entry = generative.alone()
        task, classes, factor = for_student(entry, prepared, run, None), list(range(len(ROLES))), 1.0
    learner = alone.Learner(task, entry, run)
    features, labels = (torch.from_numpy(array) for array in generative.train(prepared))
    low, high = features.double().min(0).values, features.double().max(0).values
    plain = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, len(classes))).double()
    ours = [*task.student.embedding.parameters(), *task.student.classifier.parameters()]
    with torch.no_grad():
        for theirs, weight in zip(plain.parameters(), ours, strict=True):
            theirs.copy_(weight)
    begun = [weight.clone() for weight in ours]
    adam = torch.optim.Adam(plain.parameters(), 1e-3, (0.5, 0.999))
    twin = task.streams()["train"]
    found = generative.steps(learner, run, 6)
    for step in range(6):
        rows = twin.draw(derive_seed(0, "train"), 0, 1)[2]
        logits = plain((features[rows].double() - low) / (high - low)).log_softmax(1)
        loss = -factor * sum(
            logits[i, classes.index(label)] for i, label in enumerate(labels[rows].tolist())
        ) / len(rows)  # fmt: skip
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert found[step]["loss/task"] == pytest.approx(loss.item(), rel=1e-9)
    for theirs, weight, before in zip(plain.parameters(), ours, begun, strict=True):
        torch.testing.assert_close(weight, theirs, rtol=1e-7, atol=1e-9)
        assert not torch.equal(weight, before)


# The objective


Numbers = st.floats(-30, 30)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_seen_label_is_its_place_among_the_logits_of_a_teacher(drawn: st.DataObject) -> None:
    classes = drawn.draw(st.integers(2, 8))
    seen = sorted(drawn.draw(st.sets(st.integers(0, classes - 1), min_size=1, max_size=classes)))
    answered = drawn.draw(st.sampled_from([seen, list(range(classes))]))
    count, factor = drawn.draw(st.integers(1, 4)), drawn.draw(st.sampled_from([1.0, 1e-3]))
    labels = drawn.draw(st.lists(st.sampled_from(seen), min_size=count, max_size=count))
    logits = [drawn.draw(st.lists(Numbers, min_size=len(answered), max_size=len(answered))) for _ in range(count)]
    task = SimpleNamespace(seen=torch.tensor(seen), attributes=torch.zeros(classes, 3), _factor=factor)
    output: Any = SimpleNamespace(logits=torch.tensor(logits, dtype=torch.float64))
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        highest = max(row)
        total += highest + math.log(math.fsum(math.exp(value - highest) for value in row)) - row[answered.index(label)]
    found = ZeroShot.objective(task, output, torch.tensor(labels))  # type: ignore[arg-type]
    assert found.item() == pytest.approx(factor * total / count, rel=1e-9, abs=1e-12)


def test_the_objective_is_in_float32_at_least(prepared: Path, run: Run) -> None:
    task = for_student(generative.alone(), prepared, run, None)
    labels = torch.tensor(SEEN)
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, None)):
        logits = torch.randn(len(SEEN), len(CLASSES)).to(dtype)
        assert task.objective(Output(logits, logits, logits), labels).dtype == (wanted or dtype)


def test_the_rate_is_constant(prepared: Path, run: Run) -> None:
    task = for_student(generative.alone(), prepared, run, None)
    assert {task.schedule(100)(count) for count in (0, 1, 99)} == {1e-3}
    assert {task.schedule(100, 0.5)(count) for count in (0, 1, 99)} == {0.5}


# What is watched


def averaged(labels: Iterable[int], answers: Iterable[int], classes: list[int]) -> float | None:
    """Mean over those of some classes that have samples of the share of these that is answered rightly."""
    pairs = list(zip(labels, answers, strict=True))
    shares = []
    for label in classes:
        theirs = [answer == label for own, answer in pairs if own == label]
        if theirs:
            shares.append(sum(theirs) / len(theirs))
    return math.fsum(shares) / len(shares) if shares else None


def watched(labels: Iterable[int], answers: Iterable[int], teacher: bool) -> dict[str, float]:
    labels, answers = list(labels), list(answers)
    seen, unseen = averaged(labels, answers, SEEN), averaged(labels, answers, OTHERS)
    figures = {} if seen is None else {"seen": seen}
    if unseen is not None and not teacher:
        figures["unseen"] = unseen
        if seen is not None:
            figures["harmonic_mean"] = 2 * seen * unseen / (seen + unseen) if seen + unseen > 0 else 0.0
    return figures


def says(answers: Tensor) -> nn.Module:
    """Answers sample number x[0] with answers[x[0]]: a place among the classes of the network."""

    class Says(nn.Module):
        def forward(self, inputs: Tensor) -> Output:
            logits = F.one_hot(answers[inputs[:, 0].long()], len(ROLES)).double()
            return Output(inputs, inputs, logits)

    return Says()


@pytest.fixture(scope="module")
def tasks(prepared: Path, run: Run) -> dict[str, ZeroShot]:
    return {
        "teacher": for_teacher(generative.teaching(), prepared, run),
        "student": for_student(generative.alone(), prepared, run, None),
    }


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["teacher", "student"]), st.data())
def test_figures_are_averages_over_classes(tasks: dict[str, ZeroShot], role: str, drawn: st.DataObject) -> None:
    """Against sums in plain Python; classes without samples are left out."""
    task = tasks[role]
    classes = SEEN if role == "teacher" else list(range(len(ROLES)))
    there = drawn.draw(st.lists(st.sampled_from(range(len(ROLES))), min_size=1, unique=True))
    labels = drawn.draw(st.lists(st.sampled_from(there), min_size=1, max_size=40))
    right = drawn.draw(st.sampled_from([0.0, 0.5, 1.0]))
    places = [
        classes.index(label)
        if label in classes and drawn.draw(st.floats(0, 1)) < right
        else drawn.draw(st.integers(0, len(classes) - 1))
        for label in labels
    ]
    wanted = watched(labels, [classes[place] for place in places], role == "teacher")
    inputs = torch.arange(len(labels), dtype=torch.float64)[:, None].expand(-1, FEATURES)
    task._validation = Split(inputs, torch.tensor(labels))
    found = task.monitor(says(torch.tensor(places)))
    assert found == pytest.approx(wanted, rel=1e-12)
    assert all(0 <= figure <= 1 for figure in found.values())
    if len(found) == 3:
        assert next(iter(found)) == "harmonic_mean", "the first is what a flow looks at"


def test_figures_of_many_samples(tasks: dict[str, ZeroShot]) -> None:
    random = np.random.default_rng(0)
    labels, answers = random.integers(0, len(ROLES), (2, 1203))
    inputs = torch.arange(1203, dtype=torch.float64)[:, None].expand(-1, FEATURES)
    tasks["student"]._validation = Split(inputs, torch.from_numpy(labels))
    found = tasks["student"].monitor(says(torch.from_numpy(answers)))
    assert found == pytest.approx(watched(labels.tolist(), answers.tolist(), False), rel=1e-12)


def test_nothing_right_is_a_harmonic_mean_of_0(tasks: dict[str, ZeroShot]) -> None:
    labels = torch.tensor([SEEN[0], OTHERS[0]])
    tasks["student"]._validation = Split(torch.tensor([[0.0], [1.0]]), labels)
    assert tasks["student"].monitor(says(labels.flip(0))) == {"harmonic_mean": 0, "seen": 0, "unseen": 0}
    assert tasks["student"].monitor(says(labels)) == {"harmonic_mean": 1, "seen": 1, "unseen": 1}


def test_what_is_watched_is_the_validation_split(folder: Path, run: Run) -> None:
    """Its unseen classes are the validation classes; a network says what it is shown."""
    manifest = zero_shot_files.write_prepared(folder / "watched", 3)
    task = for_student(generative.alone(), folder / "watched", run, None)
    random = np.random.default_rng(1)
    logits = random.normal(size=(len(manifest), len(ROLES)))
    rows = rows_of(folder / "watched", "validation")
    labels, answers = manifest["label"].to_numpy()[rows].tolist(), logits.argmax(1)[rows].tolist()
    assert {ROLES[label] for label in labels} == {"seen", "validation"}
    found = task.monitor(zero_shot_files.Lookup(logits))
    assert found == pytest.approx(watched(labels, answers, False), rel=1e-12)


def test_a_network_of_images_is_watched_on_images(images: Path, run: Run) -> None:
    task = for_teacher(generative.teaching(ENCODER), images, run)
    labels = np.load(images / "labels.npy")
    logits = np.random.default_rng(2).normal(size=(len(labels), len(SEEN)))
    rows = rows_of(images, "validation")
    network = zero_shot_files.Lookup(logits)
    found = task.monitor(network)
    assert found == pytest.approx(
        watched(labels[rows].tolist(), [SEEN[place] for place in logits.argmax(1)[rows]], True), rel=1e-12
    )
    assert set(found) == {"seen"}
    assert network.shown == [(len(rows), 1, 4, 4)]


# An encoder inside a student


def test_a_student_answers_images_as_it_answers_their_features(encoded: Path, run: Run) -> None:
    task = for_student(generative.alone(), encoded, run, None)
    network = task.student.eval()
    assert task.network["encoder"] == {"widths": [4, FEATURES], "blocks": 1}
    pixels = torch.from_numpy(np.load(encoded / "images.npy")).double() / 255
    features = torch.from_numpy(np.load(encoded / "features.npy")).double()
    with torch.no_grad():
        by_images, by_features = network(pixels), network(features)
    for one, other in zip(by_images, by_features, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert by_features.logits.std(0).min() > 1e-4, "samples differ"
    # Deployed, it is built from its description alone.
    again = build({"network": task.network, "interface": task.interface}).eval()
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(pixels.float()).logits.double(), by_images.logits, rtol=1e-3, atol=1e-4)


def test_its_classifier_is_left_behind(encoded: Path, run: Run) -> None:
    student, encoder = for_student(generative.alone(), encoded, run, None).student, load_model(encoded / "encoder")[0]
    state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    own = student.state_dict()
    assert {key for key in state if key not in own} == {"encoder.classifier.weight", "encoder.classifier.bias"}
    for key in own:
        if key.startswith("encoder."):
            assert torch.equal(own[key], state[key].to(own[key].dtype)), key


def test_all_of_an_encoder_has_to_be_given(encoded: Path, run: Run) -> None:
    student = for_student(generative.alone(), encoded, run, None).student
    state = load_model(encoded / "encoder")[0].state_dict()
    state.pop("stem.0.weight")
    with pytest.raises(RuntimeError, match=r"Missing key.*stem\.0\.weight"):
        give_encoder(student, state)


def test_training_leaves_an_encoder_alone(
    encoded: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, statistics of its BatchNorm included, through the loop that trains; all else learns."""
    monkeypatch.chdir(tmp_path)
    entry = generative.alone()
    task = for_student(entry, encoded, run, None)
    learner = alone.Learner(task, entry, run)
    held = {id(weight) for group in learner.optimizers["student"].param_groups for weight in group["params"]}
    assert not held & {id(weight) for weight in task.student.encoder.parameters()}
    before = state_of(task.student)
    looked = []

    def monitor() -> dict[str, float]:
        looked.append(task.monitor(task.student))
        return dict(looked[-1])

    train(
        learner, run, stage="distill", key="x", steps=task.steps, seed=0, identity={}, monitor=monitor, monitor_every=1
    )
    assert len(looked) == task.steps
    for key, value in task.student.state_dict().items():
        still = key.startswith(("encoder.", "scale."))
        assert torch.equal(value, before[key]) == still, key


def test_an_encoder_learns(images: Path, run: Run) -> None:
    entry = generative.teaching(ENCODER, factor=1.0, training={"learning_rate": 1e-2})
    task = for_teacher(entry, images, run)
    before = state_of(task.student)
    losses = [found["loss/task"] for found in generative.steps(alone.Learner(task, entry, run), run, 60)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert not torch.equal(before["stem.0.weight"], task.student.stem[0].weight)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"features": 7}, r"teacher 'teacher' and the data set 'toy' differ in features: 7 and 6 · choose one that"),
        ({"seen": [CLASSES[label] for label in SEEN[::-1]]}, r"differ in seen classes: \['class <7>', .* and \['class"),
        ({"seen": [CLASSES[label] for label in SEEN[1:]]}, "differ in seen classes"),
        ({"seen": CLASSES}, "differ in seen classes"),
    ],
)
def test_a_teacher_has_to_know_features_and_classes(
    changes: dict[str, Any], message: str | None, prepared: Path
) -> None:
    _, description = generative.teacher(prepared)
    description.interface.update(changes)
    dataset = json.loads((prepared / "dataset.json").read_text())
    if message is None:
        require_same_features(description, dataset, prepared)
    else:
        with pytest.raises(UserError, match=message):
            require_same_features(description, dataset, prepared)


def test_a_batch_that_cannot_be_filled_is_refused(prepared: Path, run: Run) -> None:
    count = len(rows_of(prepared, "train"))
    task = for_student(generative.alone(batch=count), prepared, run, None)
    assert task.steps_per_epoch == 1
    message = rf"{count} samples do not fill a batch of {count + 1} \(.*toy, training split\) · lower training\.batch"
    with pytest.raises(UserError, match=message):
        for_student(generative.alone(batch=count + 1), prepared, run, None)
    with pytest.raises(UserError, match=message):
        for_teacher(generative.teaching(training={"batch": count + 1}), prepared, run)


def test_what_is_in_closed_form_needs_no_batch(prepared: Path, run: Run) -> None:
    base = {"task": "zero_shot", "dataset": "toy", "method": "eszsl", "teacher": "none"}
    entry = ESZSL.model_validate({**base, "network": {"name": "mlp", "hidden": None}})
    assert entry.training.batch > len(rows_of(prepared, "train"))
    task = for_student(entry, prepared, run, None)
    assert (task.steps, task.steps_per_epoch) == (1, 1)


@pytest.fixture
def before(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return generative.before(prepared)


NEW = [0.1, 0.2, 0.3, 0.4]


def test_an_extended_student_is_asked_for_more_classes(before: Any, prepared: Path, run: Run) -> None:
    student, told = before
    task = for_student(generative.extended({"new": NEW, "newer": NEW[::-1]}), prepared, run, before)
    assert task.interface["classes"] == [*CLASSES, "new", "newer"]
    assert task.interface["seen"] == [CLASSES[label] for label in SEEN]
    assert task.network == told.network
    assert task.seen.tolist() == SEEN
    assert task.others.tolist() == [*OTHERS, len(CLASSES), len(CLASSES) + 1]
    torch.testing.assert_close(task.attributes[-2:], torch.tensor([NEW, NEW[::-1]]).to(run.dtype), rtol=1e-6, atol=0)
    np.testing.assert_array_equal(task.attributes[:-2], np.load(prepared / "attributes.npy"))
    assert isinstance(task.taught_by(), Generator)
    assert (task.steps, task.steps_per_epoch) == (1, 1)
    for key, value in student.state_dict().items():
        if not key.startswith("classifier."):
            assert torch.equal(task.student.state_dict()[key], value.double()), key
    features = torch.from_numpy(generative.train(prepared)[0]).double()
    assert torch.equal(task.train.inputs, task.student.scale(features))


def test_its_scaling_is_that_of_the_student_before(before: Any, prepared: Path, run: Run) -> None:
    student, _ = before
    student.scale.divisor.mul_(3)
    task = for_student(generative.extended({"new": NEW}), prepared, run, before)
    assert torch.equal(task.student.scale.divisor, student.scale.divisor.double())
    assert task.train.inputs.max().item() == pytest.approx(1 / 3, rel=1e-6)


def test_it_is_watched_over_all_its_classes(before: Any, prepared: Path, run: Run) -> None:
    """A new class has no samples; it may take those of others."""
    task = for_student(generative.extended({"new": NEW}), prepared, run, before)
    assert isinstance(task.student, MLP)
    nn.init.zeros_(task.student.classifier.weight)
    with torch.no_grad():
        task.student.classifier.bias.copy_(F.one_hot(torch.tensor(len(CLASSES)), len(CLASSES) + 1))
    assert task.monitor(task.student) == {"harmonic_mean": 0, "seen": 0, "unseen": 0}


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({CLASSES[2]: NEW}, r"students\.\*\.added: before knows the class 'class <2>' already · give the new one"),
        ({"fits": NEW, CLASSES[0]: NEW}, r"before knows the class 'class <0>' already"),
        ({"new": NEW[:3]}, r"class 'new' has 3 attributes, those of 'toy' have 4 · they are attribute 0, attribute 1,"),
        ({"new": [*NEW, 1.0]}, r"students\.\*\.added: class 'new' has 5 attributes"),
    ],
)
def test_a_class_that_does_not_fit_is_refused(
    added: dict[str, list[float]], message: str, before: Any, prepared: Path, run: Run
) -> None:
    with pytest.raises(UserError, match=message):
        for_student(generative.extended(added), prepared, run, before)


def test_a_student_of_other_data_is_refused(before: Any, prepared: Path, run: Run) -> None:
    before[1].dataset["digest"] = "0" * 64
    with pytest.raises(
        UserError, match=r"before was made from 'toy' as it was before \(digest 0{64}\), .* `dvc repro`"
    ):
        for_student(generative.extended({"new": NEW}), prepared, run, before)


def test_a_student_without_a_generator_is_refused(before: Any, prepared: Path, run: Run) -> None:
    (paths.companions("zero_shot", "before") / "generator" / "model.json").unlink()
    with pytest.raises(UserError, match=r"there is no model in .*before/generator · run `dvc repro`"):
        for_student(generative.extended({"new": NEW}), prepared, run, before)
