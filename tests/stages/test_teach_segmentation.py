"""Segmentation as a training task: the loss, what is refused, existing weights, one batch as every network sees it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data.errors import UserError
from data.files import sha256, write_json
from models.artifacts import Description, load_model, save_model
from models.segmentation import build
from stages.distill import alone, kd
from stages.parameters import segmentation as schema
from stages.teach.segmentation import IMAGENET, Segmentation, for_student, for_teacher, pixel_cross_entropy
from stages.training import Context, Run
from stages.training.fit import describe

CLASSES = ["road", "car", "sky"]
SIZE = [32, 40]
NETWORK: dict[str, Any] = {
    "name": "pspnet",
    "encoder": {"name": "resnet", "widths": [4, 6, 6, 8]},
    "width": 4,
    "auxiliary": 3,
}
TRAINING: dict[str, Any] = {"epochs": 2, "batch": 4, "accelerator": "cpu"}


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """24 images; the brightest channel is the class."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, (24, 2, 2)).repeat(16, 1).repeat(20, 2)
    images = generator.integers(0, 100, (24, 3, *SIZE)) + 150 * (labels[:, None] == np.arange(3)[:, None, None])
    labels[generator.random(labels.shape) < 0.1] = 255
    folder = tmp_path / "prepared"
    folder.mkdir()
    np.save(folder / "images.npy", images.astype(np.uint8))
    np.save(folder / "labels.npy", labels.astype(np.uint8))
    splits = ["train"] * 14 + ["validation"] * 6 + ["test"] * 4
    pd.DataFrame({"id": [str(n) for n in range(24)], "split": splits}).to_csv(folder / "manifest.csv", index=False)
    description = {
        "classes": CLASSES, "size": SIZE, "fit": "pad", "channels": 3, "mean": [0.4] * 3, "std": [0.3] * 3
    }  # fmt: skip
    source = {"name": "x", "licence": "", "credit": "", "redistributable": True}
    write_json(folder / "dataset.json", {**description, "source": source})
    return folder


@pytest.fixture
def run() -> Run:
    return Run(schema.Training.model_validate(TRAINING))


def student(method: str = "alone", training: dict[str, Any] | None = None, **fields: Any) -> Any:
    base = {"task": "segmentation", "dataset": "x", "method": method, "teacher": "none" if method == "alone" else "big"}
    kind: Any = {"alone": schema.Alone, "kd": schema.KD}[method]
    return kind.model_validate({**base, "network": NETWORK, "training": {**TRAINING, **(training or {})}, **fields})


def teacher(classes: list[str] = CLASSES) -> tuple[nn.Module, Description]:
    interface = {"classes": classes, "channels": 3, "size": SIZE, "mean": [0.3] * 3, "std": [0.3] * 3}
    interface |= {"fit": "pad", "resize": "bilinear with antialiasing"}
    network = schema.PSPNet.model_validate({**NETWORK, "width": 6}).model_dump(mode="json")
    torch.manual_seed(1)
    built = build({"network": network, "interface": interface}).eval()
    return built, Description("big", "segmentation", "teacher", network, interface, {}, {}, None, None, [])


def steps(learner: Any, run: Run, count: int) -> dict[str, Tensor]:
    context = Context(learner, run, 0)
    for name, module in learner.modules.items():
        module.train(name not in learner.frozen)
    for step in range(count):
        context.begin(step)
        last = learner.step(context)
    return last


# The loss


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3), st.integers(2, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9),
    st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 2**31),
)  # fmt: skip
def test_the_loss_is_a_mean_over_labelled_pixels(
    batch: int, classes: int, h: int, w: int, height: int, width: int, ignored: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, h, w, dtype=torch.float64, generator=generator).requires_grad_()
    target = torch.randint(0, classes, (batch, height, width), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = 255
    loss = pixel_cross_entropy(logits, target)
    total, count = 0.0, 0
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                label = int(target[b, y, x])
                if label != 255:
                    scores = at(logits.detach().numpy()[b], (y + 0.5) * h / height, (x + 0.5) * w / width)
                    total += math.log(sum(math.exp(score) for score in scores)) - scores[label]
                    count += 1
    assert loss.item() == pytest.approx(total / count if count else 0.0, rel=1e-9, abs=1e-12)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert bool(logits.grad.any()) == (count > 0)


def at(maps: np.ndarray, y: float, x: float) -> list[float]:
    """Maps (C, h, w) between the centres of their pixels."""

    def between(values: np.ndarray, place: float) -> np.ndarray:
        place = max(place - 0.5, 0)
        low = min(int(place), len(values) - 1)
        high = min(low + 1, len(values) - 1)
        found: np.ndarray = values[low] + (place - low) * (values[high] - values[low])
        return found

    return [float(between(between(each, y), x)) for each in maps]


def test_no_label_at_all_costs_nothing() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = pixel_cross_entropy(logits, torch.full((2, 8, 8), 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("given", "computed"), [("bfloat16", "float32"), ("float16", "float32"), ("float64", "float64")]
)
def test_the_loss_is_wide(given: str, computed: str) -> None:
    logits = torch.full((1, 2, 2, 2), 300.0).to(getattr(torch, given))
    loss = pixel_cross_entropy(logits, torch.zeros(1, 4, 4).long())
    assert loss.dtype == getattr(torch, computed)
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        ((2, 3, 4, 4), (1, 8, 8), r"logits \(2, 3, 4, 4\), labels \(1, 8, 8\)"),
        ((0, 3, 4, 4), (0, 8, 8), r"logits \(0, 3, 4, 4\), labels \(0, 8, 8\)"),
        ((2, 3, 4, 4), (2, 8), r"logits \(2, 3, 4, 4\), labels \(2, 8\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(logits: Any, target: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pixel_cross_entropy(torch.zeros(logits), torch.zeros(target).long())


@pytest.mark.parametrize("wrong", [3, 254, -1])
def test_a_label_outside_the_range_is_named(wrong: int) -> None:
    target = torch.zeros(1, 4, 4).long()
    target[0, 1, 2] = wrong
    with pytest.raises(ValueError, match=rf"below the number of classes or 255, found .*{wrong}.*\(1, 3, 2, 2\)"):
        pixel_cross_entropy(torch.zeros(1, 3, 2, 2), target)


def test_the_auxiliary_head_counts_with_its_weight(prepared: Path, run: Run) -> None:
    task = for_student(student(training={"auxiliary": 0.7}), prepared, run, None)
    output = task.student.train()(torch.rand(2, 3, *SIZE))
    target = torch.randint(0, 3, (2, *SIZE))
    expected = pixel_cross_entropy(output.logits, target) + 0.7 * pixel_cross_entropy(output.auxiliary, target)
    torch.testing.assert_close(task.objective(output, target), expected)
    plain = pixel_cross_entropy(output.logits, target)
    assert torch.equal(task.objective(output._replace(auxiliary=None), target), plain)


# Training


def test_the_interface_says_how_images_were_brought_to_their_size(prepared: Path, run: Run) -> None:
    assert for_student(student(), prepared, run, None).interface == {
        "classes": CLASSES, "channels": 3, "size": SIZE, "mean": [0.4] * 3, "std": [0.3] * 3,
        "fit": "pad", "resize": "bilinear with antialiasing",
    }  # fmt: skip


def test_both_networks_see_the_same_images(prepared: Path, run: Run) -> None:
    task = for_student(student("kd", {"augment": {"scale": [0.5, 2.0], "crop": [24, 32]}}), prepared, run, teacher())
    ours = kd.Learner(task, student("kd"), run)
    context = Context(ours, run, 0)
    context.begin(0)
    views = task.views(context)
    assert views.student is views.teacher
    assert views.student.shape == (4, 3, 24, 32)
    assert views.student.is_contiguous(memory_format=torch.channels_last)
    assert views.target.shape == (4, 24, 32)
    assert views.target.dtype == torch.int64
    steps(ours, run, 2)
    assert for_student(student(), prepared, run, None).views(context).teacher is None


def test_it_learns_and_the_teacher_does_not(prepared: Path, run: Run) -> None:
    training = {"learning_rate": 0.1, "epochs": 10}
    entry = student("kd", training, alpha=0.1)
    task = for_student(entry, prepared, run, teacher())
    learner = kd.Learner(task, entry, run)
    before = {name: tensor.clone() for name, tensor in learner.modules["teacher"].state_dict().items()}
    first = task.monitor(task.student.eval())
    steps(learner, run, task.steps)
    last = task.monitor(task.student.eval())
    assert set(last) == {"miou", "pixel_accuracy"}
    assert last["miou"] > first["miou"] + 0.2
    after = learner.modules["teacher"].state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_what_is_watched_is_what_is_evaluated(prepared: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.evaluate.segmentation import evaluate

    task = for_student(student(), prepared, run, None)
    steps(alone.Learner(task, student(), run), run, 3)
    network = task.student.eval()
    found = task.monitor(network)
    monkeypatch.setattr("stages.teach.segmentation.PIXELS", 1)
    assert task.monitor(network) == pytest.approx(found)
    description = Description("s", "segmentation", "student", task.network, task.interface, {}, {}, None, None, [])
    metrics = evaluate(network, description, prepared, "validation", schema.Task()).metrics
    assert {name: round(value, 6) for name, value in found.items()} == {name: metrics[name] for name in found}


def test_float64_and_bfloat16_train(prepared: Path) -> None:
    for precision, dtype in (("64-true", torch.float64), ("bf16-mixed", torch.float32)):
        run = Run(schema.Training.model_validate({**TRAINING, "precision": precision}))
        entry = student("kd", {"precision": precision})
        learner = kd.Learner(for_student(entry, prepared, run, teacher()), entry, run)
        last = steps(learner, run, 2)
        assert all(value.isfinite() for value in last.values())
        assert last["loss/task"].dtype == dtype


def test_the_rate_falls_to_its_floor(prepared: Path, run: Run) -> None:
    entry = student(training={"learning_rate": 0.2, "floor": 0.01, "power": 0.9, "epochs": 30})
    task = for_student(entry, prepared, run, None)
    assert task.steps == 90
    rates = [task.schedule(90)(count) for count in range(91)]
    assert rates[0] == 0.2
    assert rates[90] == 0.01
    assert rates[45] == pytest.approx(0.01 + 0.19 * 0.5**0.9)
    assert rates == sorted(rates, reverse=True)


def test_the_student_is_the_plain_network(prepared: Path, run: Run, tmp_path: Path) -> None:
    entry = student("kd")
    task = for_student(entry, prepared, run, teacher())
    learner = kd.Learner(task, entry, run)
    steps(learner, run, 2)
    (tmp_path / "model").mkdir()
    description = Description("s", "segmentation", "student", task.network, task.interface, {}, {}, None, None, [])
    save_model(tmp_path / "model", learner.student, description)
    loaded, _ = load_model(tmp_path / "model")
    images = torch.rand(2, 3, *SIZE).contiguous(memory_format=torch.channels_last)
    loaded = loaded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, learner.student.eval()(images).logits)


# What is refused


def test_a_teacher_of_other_classes_is_refused(prepared: Path, run: Run) -> None:
    with pytest.raises(UserError, match=r"teacher 'big' .* differ in classes: 2 against 3 classes"):
        for_student(student("kd"), prepared, run, teacher(["road", "car"]))


def test_a_batch_larger_than_the_data_is_refused(prepared: Path, run: Run) -> None:
    with pytest.raises(UserError, match=r"14 samples do not fill a batch of 64 .* lower training.batch"):
        for_student(student(training={"batch": 64}), prepared, run, None)


# Existing weights


def outside(file: Path, digest: str, **fields: Any) -> schema.Teacher:
    weights = {"file": str(file), "sha256": digest, "network": {**NETWORK, "width": 6, **fields}}
    return schema.Teacher.model_validate({"task": "segmentation", "dataset": "x", "start": "none", "from": weights})


def test_an_existing_model_is_taken_as_it_is(prepared: Path, run: Run, tmp_path: Path) -> None:
    network, description = teacher()
    save_model(tmp_path, network, description)
    file = tmp_path / "weights.safetensors"
    task: Segmentation = for_teacher(outside(file, sha256(file)), prepared, run)
    own = task.student.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in network.state_dict().items())
    assert task.interface["mean"] == [0.4] * 3
    with pytest.raises(UserError, match=r"levels.0.0.weight: \(6, 8, 1, 1\) in the file, \(5, 8, 1, 1\) in the"):
        for_teacher(outside(file, sha256(file), width=5), prepared, run)
    with pytest.raises(UserError, match="is not what is pinned"):
        for_teacher(outside(file, "0" * 64), prepared, run)


def encoder(file: Path, digest: str, **fields: Any) -> dict[str, Any]:
    widths = [64, 128, 256, 512]
    layers = {"name": "resnet", "widths": widths, "blocks": [2, 2, 2, 2], "stem": "wide"}
    return {**NETWORK, "encoder": {**layers, "weights": str(file), "sha256": digest, **fields}}


def test_an_encoder_takes_the_weights_of_torchvision(
    prepared: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import recognition

    theirs = recognition.build(
        {
            "network": {"name": "torchvision", "model": "resnet18"},
            "interface": {"classes": CLASSES, "channels": 3, "mean": [0.0], "std": [1.0]},
        }
    )
    state = {
        **theirs.get_submodule("backbone").state_dict(),
        "fc.weight": torch.zeros(1000, 512),
        "fc.bias": torch.zeros(1000),
    }
    file = tmp_path / "resnet18.pth"
    torch.save(state, file)
    monkeypatch.setenv("WEIGHTS", str(tmp_path))
    entry = student(network=encoder(Path("$WEIGHTS/resnet18.pth"), sha256(file)))
    task = for_student(entry, prepared, run, None)
    own = task.student.get_submodule("encoder").state_dict()
    assert torch.equal(own["stage3.0.shortcut.0.weight"], state["layer3.0.downsample.0.weight"])
    assert torch.equal(own["stem.0.weight"], state["conv1.weight"])
    assert (task.interface["mean"], task.interface["std"]) == IMAGENET
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/prepared/segmentation/x").mkdir(parents=True)
    (tmp_path / "data/prepared/segmentation/x/manifest.csv").touch()
    description = describe("s", entry, task)
    assert "resnet18.pth" not in str(description), "a path belongs to one machine"
    assert str(description).count(sha256(file)) == 2, "its digest stands in the network and in the recipe"
    build({"network": description.network, "interface": description.interface})
    for fields, message in (
        ({"widths": [64, 128, 256, 256]}, r"stage4.0.conv1.weight: \(512, 256, 3, 3\) in the file, \(256, 256, 3, 3\)"),
        ({"sha256": "0" * 64}, "is not what is pinned"),
        ({"weights": "$NOWHERE/x.pth"}, r"network.encoder.weights = '\$NOWHERE/x.pth' names the environment variable"),
    ):
        with pytest.raises(UserError, match=message):
            for_student(student(network=encoder(file, sha256(file)) | {"encoder": {
                **encoder(file, sha256(file))["encoder"], **fields}}), prepared, run, None)  # fmt: skip


# Beginning with another teacher


def beginner(**fields: Any) -> schema.Teacher:
    base = {"task": "segmentation", "dataset": "x", "start": "big", "training": TRAINING}
    return schema.Teacher.model_validate({**base, "network": {**NETWORK, "width": 6, **fields}})


def test_a_teacher_begins_with_the_weights_of_another(prepared: Path, run: Run) -> None:
    first = teacher()
    before = {key: value.clone() for key, value in first[0].state_dict().items()}
    task = for_teacher(beginner(), prepared, run, first)
    assert all(torch.equal(value, before[key]) for key, value in task.student.state_dict().items())
    entry: Any = beginner()
    steps(alone.Learner(task, entry, run), run, 2)
    assert all(torch.equal(value, before[key]) for key, value in first[0].state_dict().items())
    assert not all(torch.equal(value, before[key]) for key, value in task.student.state_dict().items())


@pytest.mark.parametrize("classes", [["road", "car"], ["car", "road", "sky"]])
@pytest.mark.parametrize("auxiliary", [3, None])
def test_with_other_classes_it_keeps_heads_of_its_own(
    prepared: Path, run: Run, classes: list[str], auxiliary: int | None
) -> None:
    """Also where only the other one has an auxiliary head."""
    own = for_teacher(beginner(auxiliary=auxiliary), prepared, run).student.state_dict()
    first = teacher(classes)
    found = for_teacher(beginner(auxiliary=auxiliary), prepared, run, first).student.state_dict()
    heads = {key for key in found if key.startswith(("head.", "auxiliary."))}
    assert heads
    assert len(heads) < len(found) / 2
    for key, value in found.items():
        assert torch.equal(value, own[key] if key in heads else first[0].state_dict()[key]), key


def test_a_teacher_of_another_shape_is_no_beginning(prepared: Path, run: Run) -> None:
    with pytest.raises(UserError) as caught:
        for_teacher(beginner(width=5), prepared, run, teacher())
    assert str(caught.value).startswith("`start`: the network of 'big' is another:\n  ")
    assert ": (6, 8, 1, 1) in the file, (5, 8, 1, 1) in the network" in str(caught.value)
