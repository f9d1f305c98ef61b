"""Recognition as metric learning: triplets against an oracle, models without classes, weights to begin with."""

import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from data import recognition as data
from data.errors import UserError
from data.files import sha256, write_json
from models.artifacts import Description, load_model, read_description, save_model
from models.recognition import EfficientNetLite, Output, ResNet, build
from stages import paths
from stages.distill import alone, horkd
from stages.neighbours import recall, same_class_rank
from stages.parameters import recognition as schema
from stages.teach.recognition import Recognition, for_student, for_teacher, triplet_objective
from stages.training import Context, Method, Run, Stopped
from stages.training.fit import describe, fit

NETWORK = {"name": "resnet", "widths": [4, 6], "embedding": 5}
TRAINING: dict[str, Any] = {
    "epochs": 3, "batch": 12, "per_class": 3, "optimizer": "adam", "learning_rate": 0.003, "accelerator": "cpu"
}  # fmt: skip
PROVENANCE = {"name": "x", "licence": "", "credit": "", "redistributable": True}
RELATIONS = {"task": 0, "points": 0, "pairs": 1, "triplets": 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 classes of 8 images, 12 x 12 in three colours; 6 are trained on, 2 validate, 3 test."""
    return prepare(tmp_path_factory.mktemp("classes"), {"by": "classes", "validation": 2, "test": 3})


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images, where samples are held out."""
    return prepare(tmp_path_factory.mktemp("samples"), {"validation": 22, "test": 22})


def prepare(folder: Path, split: dict[str, Any]) -> Path:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(11), 8)
    looks = generator.integers(30, 220, (11, 3, 3, 3)).repeat(4, 2).repeat(4, 3)
    pixels = np.clip(looks[labels] + generator.integers(-30, 30, (88, 3, 12, 12)), 0, 255)
    np.savetxt(folder / "x.csv", np.column_stack([pixels.reshape(88, -1), labels]), fmt="%d", delimiter=",")
    fields = {"task": "recognition", "source": "x", "encoder": "none", "format": "csv", "file": "x.csv"}
    shape = {"image_size": 12, "channels": 3, "classes": list("abcdefghijk"), "split": split}
    output = folder / "prepared"
    output.mkdir()
    data.prepare(folder, schema.Dataset.model_validate(fields | shape), output, PROVENANCE)
    return output


@pytest.fixture
def run() -> Run:
    return Run(schema.Training.model_validate(TRAINING))


def big(**fields: Any) -> schema.Teacher:
    base = {"task": "recognition", "dataset": "prepared", "start": "none", "network": NETWORK, "training": TRAINING}
    return schema.Teacher.model_validate({**base, "objective": "triplets", **fields})


def small(**fields: Any) -> schema.HORKD:
    base = {"task": "recognition", "dataset": "prepared", "method": "horkd", "teacher": "big", "resolution": 6}
    mine = {"network": {**NETWORK, "embedding": 4}, "training": TRAINING, "tap": "embedding", "weights": RELATIONS}
    return schema.HORKD.model_validate({**base, **mine, **fields})


def taught(classes: list[str], embedding: int = 5, channels: int = 3) -> tuple[nn.Module, Description]:
    statistics = {"mean": [0.5] * channels, "std": [0.2] * channels}
    interface = {"classes": classes, "channels": channels, "resolution": 12, **statistics}
    network = {"name": "resnet", "widths": [4, 6], "blocks": 1, "embedding": embedding, "unit": True}
    torch.manual_seed(1)
    made = build({"network": network, "interface": interface}).eval()
    return made, Description("big", "recognition", "teacher", network, interface, {}, {}, None, [])


def steps(learner: Method, run: Run, count: int) -> list[dict[str, float]]:
    context = Context(learner, run, 0)
    for name, module in learner.modules.items():
        module.train(name not in learner.frozen)
    found = []
    for step in range(count):
        context.begin(step)
        found.append({name: value.item() for name, value in learner.step(context).items()})
    return found


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- triplets ---------------------------------------------------------------------------------------------------------


def mined(monkeypatch: pytest.MonkeyPatch, triplets: list[tuple[int, int, int]]) -> None:
    """Let these be drawn."""
    from pytorch_metric_learning.utils import loss_and_miner_utils

    rows = torch.tensor(triplets, dtype=torch.int64).view(-1, 3).unbind(1)
    monkeypatch.setattr(loss_and_miner_utils, "get_random_triplet_indices", lambda labels, weights: rows)


def distance(a: list[float], b: list[float]) -> float:
    long_a, long_b = math.hypot(*a), math.hypot(*b)
    return math.hypot(*(x / long_a - y / long_b for x, y in zip(a, b, strict=True)))


@pytest.mark.parametrize("margin", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("width", [2, 7])
def test_the_loss_is_the_mean_over_triplets(margin: float, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points, labels = normal(9, width), torch.arange(9) // 3
    triplets = [(a, p, n) for a, p, n in itertools.product(range(9), repeat=3) if a // 3 == p // 3 != n // 3 and a != p]
    mined(monkeypatch, triplets)
    rows = points.tolist()
    each = [max(distance(rows[a], rows[p]) - distance(rows[a], rows[n]) + margin, 0) for a, p, n in triplets]
    found = triplet_objective(points, labels, margin, 0)
    assert any(value == 0 for value in each) or margin == 1.0
    # torch adds 1e-6 to every difference, so that equal points have a gradient.
    assert found.item() == pytest.approx(sum(each) / len(each), abs=5e-6)


def clustered(count: int, width: int, seed: int = 0, spread: float = 0.6) -> tuple[Tensor, Tensor]:
    """Classes of four, nearer to each other than chance would have them."""
    labels = torch.arange(count) // 4
    return normal(1, width, seed=seed + 1) + spread * normal(count, width, seed=seed), labels


def test_negatives_are_drawn_by_the_inverse_density_of_their_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the weights of Wu et al., section 4, written out: cut off at 0.5 and 1.4."""
    points, labels = clustered(12, 6)
    triplets = drawn(monkeypatch, points, labels, range(400))
    assert all(labels[a] == labels[p] != labels[n] and a != p for a, p, n in triplets)
    rows, width = points.tolist(), points.shape[1]
    for anchor in (0, 5, 11):
        weights = {}
        for other in range(12):
            d = max(distance(rows[anchor], rows[other]), 0.5)
            if labels[other] != labels[anchor] and d < 1.4:
                weights[other] = 1 / (d ** (width - 2) * (1 - d * d / 4) ** ((width - 3) / 2))
        found = Counter(n for a, _, n in triplets if a == anchor)
        total = sum(found.values())
        assert total == 400 * 4
        for other in range(12):
            share = weights.get(other, 0) / sum(weights.values())
            deviation = math.sqrt(share * (1 - share) / total)
            assert found[other] / total == pytest.approx(share, abs=5 * deviation + 1e-9)


def drawn(monkeypatch: pytest.MonkeyPatch, points: Tensor, labels: Tensor, seeds: Any) -> list[tuple[int, ...]]:
    """The triplets of these seeds: what the loss is asked of."""
    import torch.nn.functional as F

    seen: list[tuple[int, ...]] = []
    place = {tuple(row.tolist()): index for index, row in enumerate(points / points.norm(dim=1, keepdim=True))}
    keys = list(place)

    def note(*parts: Tensor, margin: float) -> Tensor:
        every = torch.tensor(keys, dtype=torch.float64)
        found = [torch.cdist(part.detach().double(), every).argmin(1).tolist() for part in parts]
        seen.extend(zip(*found, strict=True))
        return parts[0].sum()

    with monkeypatch.context() as patch:
        patch.setattr(F, "triplet_margin_loss", note)
        for seed in seeds:
            triplet_objective(points, labels, 0.2, seed)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [512, 1280, 2048])
def test_no_anchor_is_lost_in_many_dimensions(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of two anchors differ by hundreds of orders of magnitude; each has its triplets all the same."""
    points, labels = clustered(24, width, spread=0.45)
    points[:4] *= torch.linspace(0.2, 1.8, width)  # a class that is further from all others
    points = points.to(dtype)
    triplets = drawn(monkeypatch, points, labels, [0])
    assert {a for a, _, _ in triplets} == set(range(24))


def test_the_seed_decides_and_nothing_else_is_disturbed() -> None:
    points, labels = clustered(12, 6)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    values = [triplet_objective(points, labels, 0.2, seed).item() for seed in (1, 1, 2, 3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert values[0] == values[1]
    assert len(set(values)) == 3


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 5), st.integers(2, 40), st.integers(0, 2**31))
def test_length_and_rotation_of_embeddings_do_not_matter(classes: int, width: int, seed: int) -> None:
    points, labels = clustered(4 * classes, width, seed % 1000)
    basis = torch.linalg.qr(normal(width, width, seed=seed % 97))[0]
    scale = normal(4 * classes, 1, seed=3).abs() + 0.1
    plain = triplet_objective(points, labels, 0.2, seed)
    assert plain.item() == pytest.approx(triplet_objective(scale * points, labels, 0.2, seed).item(), abs=1e-5)
    assert plain.item() == pytest.approx(triplet_objective(points @ basis, labels, 0.2, seed).item(), abs=1e-5)


def test_its_gradient_is_that_of_the_triplets() -> None:
    points, labels = clustered(8, 5)
    points.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: triplet_objective(x, labels, 0.2, 7), (points,))


def test_what_is_no_number_is_the_loss() -> None:
    """The loop then stops, and names the term."""
    points, labels = clustered(12, 6)
    points[3, 1] = float("nan")
    assert math.isnan(triplet_objective(points, labels, 0.2, 0).item())


def test_where_nothing_is_mined_the_loss_is_zero_with_a_gradient_of_zero() -> None:
    """Two classes on opposite sides, further than 1.4."""
    points = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, 0.1]], requires_grad=True)
    loss = triplet_objective(points, torch.tensor([0, 0, 1, 1]), 0.2, 0)
    (gradient,) = torch.autograd.grad(loss, points)
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(points))


def test_narrow_and_zero_embeddings_are_answered_finitely() -> None:
    half = clustered(12, 6)[0].half().requires_grad_()
    loss = triplet_objective(half, torch.arange(12) // 4, 0.2, 0)
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss, half)
    assert gradient.dtype == torch.float16
    assert gradient.isfinite().all()
    dead = clustered(12, 6)[0].float()
    dead[:5] = 0
    (gradient,) = torch.autograd.grad(triplet_objective(dead.requires_grad_(), torch.arange(12) // 4, 0.2, 0), dead)
    assert torch.equal(gradient[:5], torch.zeros(5, 6))
    assert gradient.isfinite().all()


class Ranks:
    """One process as it meets another: what the other has is gathered behind, or before, its own."""

    def __init__(self, others: list[Tensor], rank: int) -> None:
        self._others, self._rank = others, rank

    def gather(self, tensor: Tensor) -> Tensor:
        both = [tensor, self._others.pop(0).to(tensor.dtype)]
        return torch.cat(both if self._rank == 0 else both[::-1])


def test_every_process_mines_the_same_triplets_of_the_global_batch() -> None:
    points, labels = clustered(16, 6)
    learning = SimpleNamespace(learns="triplets", margin=0.3)

    def value(points: Tensor, labels: Tensor, run: Any) -> Tensor:
        task: Any = SimpleNamespace(_run=run, _learning=learning)
        return Recognition.objective(task, Output(points, points, points[:, :0]), labels)

    torch.manual_seed(0)
    seed = torch.randint(2**31, (1,))
    torch.manual_seed(0)
    one = value(points, labels, SimpleNamespace(gather=lambda tensor: tensor))
    for rank in (0, 1):
        mine, theirs = slice(8 * rank, 8 * rank + 8), slice(8 - 8 * rank, 16 - 8 * rank)
        torch.manual_seed(rank)  # as the loop does: every process has random numbers of its own
        others = [seed if rank else torch.tensor([5]), points[theirs], labels[theirs]]
        assert torch.equal(value(points[mine], labels[mine], Ranks(others, rank)), one)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(1, 4), st.integers(1, 7))
def test_recall_at_1_by_hand(labels: list[int], width: int, chunk: int) -> None:
    """Small whole numbers, so that many are equally near."""
    points = normal(len(labels), width, seed=len(labels)).round()
    right = counted = 0
    for row, label in enumerate(labels):
        others = [k for k in range(len(labels)) if k != row]
        if not any(labels[k] == label for k in others):
            continue
        counted += 1
        nearest = min((points[row] - points[k]).norm().item() for k in others)
        right += all(labels[k] == label for k in others if (points[row] - points[k]).norm().item() == nearest)
    found = recall(same_class_rank(points, torch.tensor(labels), chunk))
    assert found == (pytest.approx(right / counted) if counted else None)


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_that_learns_no_classes_has_none(prepared: Path, run: Run) -> None:
    learnt = {
        "triplets": for_teacher(big(), prepared, run),
        "classes": for_teacher(big(objective="classes"), prepared, run),
        "relations": for_student(small(), prepared, run, taught([])),
        "both": for_student(small(objective="triplets", weights={"task": 1}), prepared, run, taught([])),
        "horkd": for_student(small(weights={"task": 1}), prepared, run, taught([])),
    }
    for name, task in learnt.items():
        known = list("abcdef") if name in ("classes", "horkd") else []
        assert task.interface["classes"] == known, name
        network = task.student
        assert isinstance(network, ResNet)
        assert any(key.startswith("classifier") for key in network.state_dict()) == bool(known)
        assert network.eval()(torch.rand(3, 3, 12, 12)).logits.shape == (3, len(known))


def test_relations_alone_train_what_is_deployed(prepared: Path, run: Run) -> None:
    """The embedding layer as well; and points of another width are compared through a projection, which is said."""
    entry = small(weights={**RELATIONS, "points": 1})
    learner = horkd.Learner(for_student(entry, prepared, run, taught([])), entry, run)
    assert learner.chosen["projection"] == "4 to 5"
    assert learner.modules["projection"].weight.shape == (5, 4)
    assert learner.modules["projection"].bias is None
    before = {name: value.clone() for name, value in learner.student.named_parameters()}
    for figures in steps(learner, run, 2):
        assert {"loss/points", "loss/pairs", "loss/triplets"} <= figures.keys()
        assert "loss/task" not in figures
    assert all(not torch.equal(value, before[name]) for name, value in learner.student.named_parameters())
    same = small(network=NETWORK, weights={**RELATIONS, "points": 1})
    assert "projection" not in horkd.Learner(for_student(same, prepared, run, taught([])), same, run).chosen


def test_who_has_learnt_what_is_held_out_is_refused(prepared: Path, run: Run, tmp_path: Path) -> None:
    """As a teacher, and as what another begins with."""
    prepared = Path(shutil.copytree(prepared, tmp_path / "held out"))
    described = json.loads((prepared / "dataset.json").read_text())
    held = [described["classes"].pop(), described["classes"].pop()]
    write_json(prepared / "dataset.json", described | {"held_out": held})
    knowing = taught([*described["classes"], held[1]])
    with pytest.raises(UserError, match=rf"'big' has learnt classes that .* holds out: {held[1]} · choose"):
        for_student(small(), prepared, run, knowing)
    with pytest.raises(UserError, match="'big' has learnt classes"):
        for_teacher(big(start="other"), prepared, run, knowing)
    assert for_student(small(), prepared, run, taught(["z"])).teacher is not None


def test_triplets_beside_relations(prepared: Path, run: Run) -> None:
    entry = small(objective="triplets", weights={"task": 1, "points": 0, "pairs": 1, "triplets": 2})
    learner = horkd.Learner(for_student(entry, prepared, run, taught([])), entry, run)
    (figures,) = steps(learner, run, 1)
    assert figures["loss/task"] > 0
    assert figures["gradient/pairs_to_task"] > 0


def test_who_knows_no_classes_may_teach_and_be_taught(prepared: Path, run: Run) -> None:
    task = for_student(small(), prepared, run, taught(["z"]))  # compared by embeddings alone
    assert task.teacher is not None
    with pytest.raises(UserError, match="differ in classes: 1 against 6 classes"):
        for_student(small(weights={"task": 1}), prepared, run, taught(["z"]))
    with pytest.raises(UserError, match="differ in channels"):
        for_student(small(), prepared, run, taught([], channels=1))


def test_a_start_keeps_all_but_what_depends_on_classes(prepared: Path, run: Run) -> None:
    network = {**NETWORK, "unit": True}
    for known in ([], list("abcdef")):
        first = taught(known)
        for objective in ("triplets", "classes"):
            begun = for_teacher(big(start="big", objective=objective, network=network), prepared, run, first)
            found, other = begun.student.state_dict(), first[0].state_dict()
            shared = [key for key in found if not key.startswith("classifier")]
            assert all(torch.equal(found[key], other[key]) for key in shared)
            assert ("classifier.weight" in found) == (objective == "classes")


def test_what_is_watched(prepared: Path, sampled: Path, run: Run) -> None:
    """Top-1 of known classes; neighbours where classes are held out or none are known."""
    for place, objective, wanted in (
        (sampled, "classes", "top_1"),
        (sampled, "triplets", "recall_at_1"),
        (prepared, "classes", "recall_at_1"),
        (prepared, "triplets", "recall_at_1"),
    ):
        task = for_teacher(big(objective=objective), place, run)
        found = task.monitor(task.student.eval())
        assert list(found) == [wanted]
        _, images, labels = data.load(place, "validation")
        with torch.inference_mode():
            output = task.student(data.to_unit(images))
        if wanted == "top_1":
            expected = (output.logits.argmax(1) == labels).double().mean().item()
        else:
            expected = recall(same_class_rank(output.embedding, labels))
        assert found[wanted] == pytest.approx(expected)


def test_the_optimiser_has_the_settings_of_the_training(prepared: Path, run: Run) -> None:
    decayed = for_teacher(big(training={**TRAINING, "weight_decay": 0.25}), prepared, run)
    optimizer = decayed.optimizer(decayed.student.parameters())
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.003, 0.25)
    plain = for_teacher(big(training={**TRAINING, "optimizer": "sgd", "momentum": 0.5}), prepared, run)
    sgd = plain.optimizer(plain.student.parameters())
    assert type(sgd) is torch.optim.SGD
    assert (sgd.param_groups[0]["momentum"], sgd.param_groups[0]["nesterov"]) == (0.5, True)


def test_batches_are_whole_classes_and_epochs_as_long_as_ever(prepared: Path, run: Run) -> None:
    task = for_teacher(big(), prepared, run)
    learner = alone.Learner(task, big(), run)
    assert task.steps_per_epoch == 48 // 12
    assert task.steps == 12
    context = Context(learner, run, 0)
    for step in range(5):
        context.begin(step)
        target = task.views(context).target.view(4, 3)
        assert (target == target[:, :1]).all()
        assert len(target[:, 0].unique()) == 4
    many = big(training={**TRAINING, "batch": 14, "per_class": 2})
    with pytest.raises(
        UserError, match=r"needs 7 classes, and there are 6 \(.*training split\) · lower training.batch"
    ):
        for_teacher(many, prepared, run)


class Interrupted(alone.Learner):
    """Stopped before a step, once."""

    stop: int | None = None

    def step(self, context: Context) -> Any:
        if context.step == self.stop:
            raise Stopped(1)
        return super().step(context)


class InterruptedRelations(horkd.Learner):
    stop: int | None = None

    def step(self, context: Context) -> Any:
        if context.step == self.stop:
            raise Stopped(1)
        return super().step(context)


@pytest.mark.parametrize("kind", ["teacher", "student", "efficientnet"])
def test_resumed_equals_uninterrupted(
    kind: str, prepared: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole classes, mined triplets, Adam, and the blocks that EfficientNet leaves out at random."""
    monkeypatch.setenv("DISTILLERY_CHECKPOINT_SECONDS", "0")
    augmented = {**TRAINING, "epochs": 1 if kind == "efficientnet" else 3, "augment": {"shift": 2, "flip": True}}

    def trained(place: Path, stop: int | None) -> tuple[str, list[str]]:
        place.mkdir(exist_ok=True)
        monkeypatch.chdir(place)
        where = paths.prepared("recognition", "prepared")
        where.parent.mkdir(parents=True, exist_ok=True)
        if not where.exists():
            where.symlink_to(prepared)
        if kind == "student":
            entry: Any = small(objective="triplets", weights={"task": 1}, training=augmented)
            source = taught([])
            task = for_student(entry, where, run, source)
            learner: Any = InterruptedRelations(task, entry, run)
            about = describe("it", entry, task, source[1])
        else:
            network = {"name": "efficientnet_lite", "variant": "lite0", "embedding": 8, "unit": True}
            entry = big(training=augmented, network=network if kind == "efficientnet" else NETWORK)
            task = for_teacher(entry, where, run)
            learner = Interrupted(task, entry, run)
            about = describe("it", entry, task)
        type(learner).stop = stop
        fit("teach", about, task, learner, run)
        folder = paths.trained("recognition", "it")
        lines = (folder / "record.jsonl").read_text().splitlines()[1:]
        return read_description(folder).weights_sha256, lines

    whole = trained(tmp_path / "whole", None)
    for stop in (1, 3):
        with pytest.raises(Stopped):
            trained(tmp_path / "parts", stop)
    assert list((tmp_path / "parts").glob(".checkpoints/*/*/*/checkpoint.pt"))
    assert trained(tmp_path / "parts", None) == whole
    assert any("validation/recall_at_1" in line for line in whole[1])
    network, description = load_model(paths.trained("recognition", "it"))
    assert description.interface["classes"] == []
    assert network(torch.rand(2, 3, 12, 12)).logits.shape == (2, 0)
    if kind == "student":
        assert description.chosen["projection"] == "4 to 5"


# --- weights to begin with --------------------------------------------------------------------------------------------


def initial(file: Path, **fields: Any) -> dict[str, Any]:
    return {"file": str(file), "sha256": sha256(file), **fields}


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Weights as the package writes them, its own classifier for ten classes among them."""
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(3)
    state = EfficientNet.from_name("efficientnet-lite0", num_classes=10).state_dict()
    file = tmp_path_factory.mktemp("lite") / "lite0.pth"
    torch.save(state, file)
    return file, state


def test_a_network_begins_with_weights_of_the_package(
    prepared: Path, run: Run, lite: tuple[Path, dict[str, Tensor]]
) -> None:
    file, state = lite
    network = {"name": "efficientnet_lite", "variant": "lite0", "embedding": 16}
    origin = {"name": "lite0", "licence": "Apache-2.0", "credit": "them", "redistributable": True}
    fields = initial(file, origin=origin, mean=[0.498] * 3, std=[0.502] * 3)
    fresh = for_teacher(big(network=network), prepared, run)
    entry = big(network=network, initial=fields)
    task = for_teacher(entry, prepared, run)
    found, random = task.student.state_dict(), fresh.student.state_dict()
    assert isinstance(task.student, EfficientNetLite)
    for key, value in state.items():
        if not key.startswith("_fc."):
            assert torch.equal(found[f"backbone.{key}"], value), key
    assert torch.equal(found["embedding.weight"], random["embedding.weight"])
    assert (task.interface["mean"], task.interface["std"]) == ([0.498] * 3, [0.502] * 3)
    assert fresh.interface["mean"] == data.describe(prepared)["mean"]
    assert torch.equal(task.student.normalise.mean.flatten(), torch.tensor([0.498] * 3))
    assert entry.origins[0].model_dump() == origin


def test_a_description_names_what_it_began_with_and_no_path(
    prepared: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, description = taught([])
    save_model(tmp_path, first, description)
    origin = {"name": "elsewhere", "licence": "x", "credit": "y", "redistributable": False}
    monkeypatch.chdir(tmp_path)
    where = paths.prepared("recognition", "prepared")
    where.parent.mkdir(parents=True)
    where.symlink_to(prepared)
    file = tmp_path / "weights.safetensors"
    entry = small(initial=initial(file, origin=origin), network=NETWORK, objective="triplets", weights={"task": 1})
    task = for_student(entry, where, run, taught([]))
    found = describe("it", entry, task, description)
    assert found.sources == [PROVENANCE, origin]
    assert found.recipe["initial"] == {"sha256": sha256(file), "origin": origin, "mean": None, "std": None}
    assert str(tmp_path) not in str(found.recipe)
    state, given_state = task.student.state_dict(), first.state_dict()
    for key, value in state.items():
        same = torch.equal(value, given_state[key])
        assert same == (not key.startswith("embedding.")), key


def test_weights_that_do_not_fit_are_named(prepared: Path, run: Run, tmp_path: Path) -> None:
    first = taught([])[0].state_dict()
    odd = {key: value.contiguous() for key, value in first.items() if key != "stem.0.weight"} | {"more": torch.ones(1)}
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(UserError) as caught:
        for_teacher(big(initial=initial(tmp_path / "odd.safetensors")), prepared, run)
    assert "odd.safetensors does not fit the network" in str(caught.value)
    assert "stem.0.weight: missing in the file" in str(caught.value)
    assert "more: unknown to the network" in str(caught.value)
    save_file({key: value.contiguous() for key, value in first.items()}, tmp_path / "right.safetensors")
    with pytest.raises(UserError, match="have 3 channels, but mean has 1 values and std 3 · correct `initial`"):
        for_teacher(big(initial=initial(tmp_path / "right.safetensors", mean=[0.5])), prepared, run)
    with pytest.raises(UserError, match="is not what is pinned"):
        for_teacher(big(initial={"file": str(tmp_path / "right.safetensors"), "sha256": "0" * 64}), prepared, run)
    wide = big(network={**NETWORK, "widths": [4, 7]}, initial=initial(tmp_path / "right.safetensors"))
    with pytest.raises(UserError, match=r"\(6, 4, 3, 3\) in the file, \(7, 4, 3, 3\) in the network"):
        for_teacher(wide, prepared, run)
