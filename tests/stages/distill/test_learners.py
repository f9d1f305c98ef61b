"""The learners on a small prepared data set: what moves, what is skipped, what two networks see."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data import recognition as data
from data.errors import UserError
from models.artifacts import Description, load_model, save_model
from models.recognition import build
from stages import relations
from stages.distill import alone, horkd, kd
from stages.parameters import recognition as schema
from stages.relations import compiled
from stages.teach.recognition import Recognition, for_student, for_teacher
from stages.training import Context, Run

NETWORK = {"name": "resnet", "widths": [4, 6]}
TRAINING: dict[str, Any] = {"epochs": 2, "batch": 12, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 images of 12 x 12 in three classes."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 30)
    pixels = generator.integers(0, 80, (90, 12, 12)) + 150 * (np.arange(12)[None, None] // 4 == labels[:, None, None])
    np.savetxt(folder / "x.csv", np.column_stack([pixels.reshape(90, -1), labels]), fmt="%d", delimiter=",")
    dataset = schema.Dataset.model_validate(
        {
            "task": "recognition",
            "source": "x",
            "encoder": "none",
            "format": "csv",
            "file": "x.csv",
            "image_size": 12,
            "channels": 1,
            "classes": ["a", "b", "c"],
            "split": {"validation": 15, "test": 15},
        }
    )
    output = folder / "prepared"
    output.mkdir()
    data.prepare(folder, dataset, output, {"name": "x", "licence": "", "credit": "", "redistributable": True})
    return output


@pytest.fixture
def run() -> Run:
    return Run(schema.Training.model_validate(TRAINING))


def describe(prepared: Path, widths: list[int], classes: int = 3) -> Description:
    interface = {"classes": ["a", "b", "c"][:classes], "channels": 1, "resolution": 12, "mean": [0.3], "std": [0.3]}
    network = {"name": "resnet", "widths": widths, "blocks": 1, "embedding": None}
    return Description("big", "recognition", "teacher", network, interface, {}, {}, None, None, [])


def teacher(prepared: Path, widths: tuple[int, ...] = (6, 10), classes: int = 3) -> tuple[nn.Module, Description]:
    description = describe(prepared, list(widths), classes)
    torch.manual_seed(1)
    return build({"network": description.network, "interface": description.interface}).eval(), description


def student(method: str, **fields: Any) -> Any:
    base = {"task": "recognition", "dataset": "x", "method": method, "teacher": "big", "resolution": 6}
    kinds = {"alone": schema.Alone, "kd": schema.KD, "horkd": schema.HORKD}
    if method == "alone":
        base["teacher"] = "none"
    return kinds[method].model_validate({**base, "network": NETWORK, "training": TRAINING, **fields})


def steps(learner: Any, run: Run, count: int = 5) -> dict[str, Tensor]:
    context = Context(learner, run, 0)
    for name, module in learner.modules.items():
        module.train(name not in learner.frozen)
    for step in range(count):
        context.begin(step)
        last = learner.step(context)
    return last


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def learner(method: str, prepared: Path, run: Run, **fields: Any) -> Any:
    entry = student(method, **fields)
    taught = None if method == "alone" else teacher(prepared)
    module = {"alone": alone, "kd": kd, "horkd": horkd}[method]
    return module.Learner(for_student(entry, prepared, run, taught), entry, run)


@pytest.mark.parametrize("method", ["kd", "horkd"])
def test_the_source_does_not_move_and_the_rest_does(method: str, prepared: Path, run: Run) -> None:
    ours = learner(method, prepared, run)
    before = {name: weights(module) for name, module in ours.modules.items()}
    steps(ours, run)
    for name, module in ours.modules.items():
        assert equal(before[name], weights(module)) == (name in ours.frozen), name
    frozen = [ours.modules[name] for name in ours.frozen]
    assert frozen
    assert all(parameter.grad is None for module in frozen for parameter in module.parameters())


def test_weights_of_zero_are_the_objective_alone_bit_for_bit(prepared: Path, run: Run) -> None:
    results = []
    for method, fields in (
        ("alone", {}),
        ("kd", {"alpha": 0.0}),
        ("horkd", {"weights": {"task": 1.0, "points": 0.0, "pairs": 0.0, "triplets": 0.0}}),
    ):
        ours = learner(method, prepared, run, **fields)
        steps(ours, run)
        results.append(weights(ours.student))
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


@pytest.mark.parametrize("order", ["points", "pairs", "triplets"])
def test_an_order_with_weight_zero_is_not_computed(
    order: str, prepared: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("it was computed")

    part, name = {
        "points": (horkd, "point_loss"),
        "pairs": (compiled, "pairs"),
        "triplets": (relations, "_triplets"),
    }[order]
    monkeypatch.setattr(part, name, refuse)
    last = steps(learner("horkd", prepared, run, weights={order: 0.0}), run, 1)
    others = [name for name in ("points", "pairs", "triplets") if name != order]
    figures = [*(f"loss/{name}" for name in ("task", *others)), *(f"gradient/{name}_to_task" for name in others)]
    assert list(last) == figures
    with pytest.raises(AssertionError, match="it was computed"):
        steps(learner("horkd", prepared, run), run, 1)


def test_a_projection_exists_only_where_widths_differ(prepared: Path, run: Run) -> None:
    different = learner("horkd", prepared, run)
    assert different.modules["projection"].weight.shape == (10, 6)
    assert different.modules["projection"].bias is None
    assert "projection" not in learner("horkd", prepared, run, weights={"points": 0.0}).modules
    same = student("horkd")
    task = for_student(same, prepared, run, teacher(prepared, (4, 6)))
    assert "projection" not in horkd.Learner(task, same, run).modules


WEIGHTS = {"task": 0.5, "points": 2.0, "pairs": 7.0, "triplets": 11.0}
RELATIVES = {
    "horkd": WEIGHTS,
    "fitnet": WEIGHTS | {"pairs": 0.0, "triplets": 0.0},
    "rkd": WEIGHTS | {"points": 0.0},
    "rkd, without labels": WEIGHTS | {"task": 0.0, "points": 0.0},
}


@pytest.mark.parametrize("relative", RELATIVES)
def test_the_terms_are_those_of_the_equations(relative: str, prepared: Path) -> None:
    """One step against the loss written down here, with torch's own optimiser; relatives are settings of it."""
    weigh = RELATIVES[relative]
    settings = {**TRAINING, "precision": "64-true"}
    run = Run(schema.Training.model_validate(settings))
    entry = student("horkd", weights=weigh, training=settings)
    ours = horkd.Learner(for_student(entry, prepared, run, teacher(prepared)), entry, run)
    twin = horkd.Learner(for_student(entry, prepared, run, teacher(prepared)), entry, run)
    projection = ours.modules.get("projection")
    assert (projection is None) == (not weigh["points"])
    weight = projection.weight.detach().clone() if projection else None
    last = steps(ours, run, 1)
    assert {name for name in last if name.startswith("loss/")} == {f"loss/{name}" for name in weigh if weigh[name]}
    context = Context(twin, run, 0)
    context.begin(0)
    for name, module in twin.modules.items():
        module.train(name not in twin.frozen)
    views = twin._task.views(context)
    with torch.no_grad():
        source = twin.modules["source"](views.teacher).pooled
    output = twin.modules["student"](views.student)
    projected = output.pooled if weight is None else output.pooled @ weight.T
    terms = {
        "task": lambda: nn.functional.cross_entropy(output.logits, views.target),
        "points": lambda: (projected - source).square().mean(),
        "pairs": lambda: horkd.pair_loss(output.pooled, source),
        "triplets": lambda: horkd.triplet_loss(output.pooled, source),
    }
    torch.stack([weigh[name] * term() for name, term in terms.items() if weigh[name]]).sum().backward()
    for group in twin.optimizers["student"].param_groups:
        group["lr"] = twin.schedules["student"](0)
    twin.optimizers["student"].step()
    for name, tensor in weights(twin.student).items():
        torch.testing.assert_close(weights(ours.student)[name], tensor, rtol=1e-9, atol=1e-12)


def by_hand(ours: Any, run: Run) -> tuple[Tensor, dict[str, Tensor]]:
    """The embeddings of the first step, and every term without its weight, by the dense definitions."""
    context = Context(ours, run, 0)
    context.begin(0)
    for name, module in ours.modules.items():
        module.train(name not in ours.frozen)
    views = ours._task.views(context)
    output, source = ours.student(views.student), ours.modules["source"](views.teacher).pooled.detach()
    terms = (
        {"task": nn.functional.cross_entropy(output.logits, views.target)} if ours._task.interface["classes"] else {}
    )
    terms |= {
        "points": (ours.modules["projection"](output.pooled) - source).square().mean(),
        "pairs": horkd.pair_loss(output.pooled, source),
        "triplets": horkd.triplet_loss(output.pooled, source),
    }
    return output.pooled, terms


def lengths(embedding: Tensor, terms: dict[str, Tensor]) -> dict[str, float]:
    """Norms of gradients, by autograd's way through the definitions."""
    found = {}
    for name, term in terms.items():
        embedding.grad = None
        embedding.retain_grad()
        term.backward(retain_graph=True)
        assert embedding.grad is not None
        found[name] = embedding.grad.double().norm().item()
    return found


def test_ratios_of_gradients_are_recorded(prepared: Path, run: Run) -> None:
    """At the embeddings, of the weighted terms; without a task they are measured by the first term."""
    for left_out, first in ((None, "task"), ("task", "points")):
        weigh = {name: weight for name, weight in WEIGHTS.items() if name != left_out}
        fields = {"weights": {**weigh, **({left_out: 0} if left_out else {})}}
        norms = lengths(*by_hand(learner("horkd", prepared, run, **fields), run))
        last = steps(learner("horkd", prepared, run, **fields), run, 1)
        for name in [name for name in weigh if name != first]:
            expected = weigh[name] * norms[name] / (weigh[first] * norms[first])
            assert last[f"gradient/{name}_to_{first}"].item() == pytest.approx(expected, rel=1e-4), name
    assert not [name for name in steps(learner("alone", prepared, run), run, 1) if "_to_" in name]


def test_a_share_is_that_of_the_tasks_gradient(prepared: Path, run: Run) -> None:
    """At every step, whatever the terms are worth; a weight of this size does the same."""
    shares = {"points": 0.5, "triplets": 2.0}
    settings = {"weights": {"task": 3.0, "pairs": 0.0}, "shares": shares}
    norms = lengths(*by_hand(learner("horkd", prepared, run), run))
    ours = learner("horkd", prepared, run, **settings)
    first = steps(ours, run, 1)
    weights_found = {name: first[f"weight/{name}"].item() for name in shares}
    for name, share in shares.items():
        assert weights_found[name] == pytest.approx(share * 3 * norms["task"] / norms[name], rel=1e-4)
    twin = learner("horkd", prepared, run, weights={"task": 3.0, "pairs": 0.0, **weights_found})
    steps(twin, run, 1)
    for name, tensor in weights(twin.student).items():
        torch.testing.assert_close(weights(ours.student)[name], tensor, rtol=1e-5, atol=1e-7)
    later = steps(learner("horkd", prepared, run, **settings), run, 4)
    for name, share in shares.items():
        assert later[f"gradient/{name}_to_task"].item() == pytest.approx(share, rel=1e-6)
        assert later[f"weight/{name}"].item() != pytest.approx(weights_found[name], rel=1e-3)


def test_a_share_of_what_has_no_gradient_is_no_weight(
    prepared: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = learner("horkd", prepared, run, shares={"points": 0.5})
    monkeypatch.setattr(horkd, "point_loss", lambda student, teacher, penalty: 0 * student.sum())
    last = steps(ours, run, 1)
    assert last["weight/points"].item() == 0
    assert last["gradient/points_to_task"].item() == 0
    assert all(tensor.isfinite().all() for tensor in weights(ours.student).values())


def test_some_vertices_are_drawn_anew_and_alike_in_every_process(prepared: Path, run: Run) -> None:
    seen = []
    for seed in (0, 0, 1):
        ours = learner("horkd", prepared, run, vertices=4, training={**TRAINING, "seed": seed})
        context = Context(ours, run, seed)
        found = []
        for step in range(3):
            context.begin(step)
            chosen = ours._vertices(12, context)
            assert len(set(chosen.tolist())) == 4
            found.append(chosen.tolist())
        assert found[0] != found[1]
        assert ours._vertices(4, context) is None
        seen.append(found)
    assert seen[0] == seen[1] != seen[2]
    few, every = (steps(learner("horkd", prepared, run, vertices=count), run, 1) for count in (4, None))
    assert few["loss/triplets"] != every["loss/triplets"]
    assert few["loss/pairs"] == every["loss/pairs"]


def test_the_form_is_chosen_and_kept(prepared: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = learner("horkd", prepared, run)
    assert fast.chosen == {"projection": "6 to 10", "relations": "compiled"}
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "stages.relations.compiled")
    plain = learner("horkd", prepared, run)
    assert plain.chosen == {"projection": "6 to 10", "relations": "blocks"}
    assert learner("horkd", prepared, run, weights={"points": 0.0, "triplets": 0.0}).chosen == {}
    steps(plain, run, 2)
    monkeypatch.undo()
    steps(fast, run, 2)
    for name, tensor in weights(plain.student).items():
        torch.testing.assert_close(weights(fast.student)[name], tensor, rtol=1e-4, atol=1e-6)


def test_both_networks_see_the_same_crop(prepared: Path, run: Run) -> None:
    entry = student("horkd", training={**TRAINING, "augment": {"shift": 3, "flip": True}})
    task = for_student(entry, prepared, run, teacher(prepared))
    ours = horkd.Learner(task, entry, run)
    context = Context(ours, run, 0)
    context.begin(0)
    views = task.views(context)
    assert views.teacher.shape == (12, 1, 12, 12)
    assert views.student.shape == (12, 1, 6, 6)
    torch.testing.assert_close(views.student, data.downsample(views.teacher, 6))
    difference = (views.student.mean((2, 3)) - views.teacher.mean((2, 3))).abs().max()
    assert difference < 0.05
    context.begin(1)
    assert not torch.equal(task.views(context).teacher, views.teacher)


def test_a_shuffled_pairing_costs(prepared: Path, run: Run) -> None:
    """A student that equals its source has a point loss of 0, and only with the right pairing."""
    taught = teacher(prepared, (4, 6))
    entry = student("horkd", resolution=12)
    task = for_student(entry, prepared, run, taught)
    task.student.load_state_dict(taught[0].state_dict())
    ours = horkd.Learner(task, entry, run)
    context = Context(ours, run, 0)
    context.begin(0)
    views = task.views(context)
    with torch.no_grad():
        task.student.normalise = taught[0].normalise
        a, b = task.student.eval()(views.student).pooled, taught[0](views.teacher).pooled
        assert horkd.point_loss(a, b) < 1e-10
        assert horkd.point_loss(a, b.roll(1, 0)) > 1e-6


@pytest.mark.parametrize("method", ["alone", "kd", "horkd"])
def test_the_student_is_the_plain_network(method: str, prepared: Path, run: Run, tmp_path: Path) -> None:
    ours = learner(method, prepared, run)
    steps(ours, run, 2)
    task = ours._task
    plain = build({"network": task.network, "interface": task.interface})
    assert ours.student.state_dict().keys() == plain.state_dict().keys()
    assert not any(module._forward_hooks for module in ours.student.modules())
    description = Description("s", "recognition", "student", task.network, task.interface, {}, {}, None, None, [])
    save_model(tmp_path, ours.student, description)
    loaded, _ = load_model(tmp_path)
    loaded = loaded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.rand(5, 1, 6, 6)
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, ours.student.eval()(images).logits)


def test_the_same_seed_gives_the_same_student(prepared: Path, run: Run) -> None:
    results = []
    for seed in (0, 0, 1):
        ours = learner("horkd", prepared, run, training={**TRAINING, "seed": seed})
        steps(ours, run, 2)
        results.append(weights(ours.student))
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


def test_bfloat16_keeps_the_losses_in_float32(prepared: Path) -> None:
    mixed = Run(schema.Training.model_validate({**TRAINING, "precision": "bf16-mixed"}))
    for method in ("kd", "horkd"):
        last = steps(learner(method, prepared, mixed), mixed, 3)
        assert all(value.dtype == torch.float32 and value.isfinite() for value in last.values()), last


def test_a_teacher_of_other_classes_is_refused(prepared: Path, run: Run) -> None:
    with pytest.raises(UserError, match=r"teacher 'big' .* differ in classes: 2 against 3 classes"):
        for_student(student("kd"), prepared, run, teacher(prepared, classes=2))


def test_a_batch_larger_than_the_data_is_refused(prepared: Path, run: Run) -> None:
    entry = student("alone", training={**TRAINING, "batch": 64})
    with pytest.raises(UserError, match=r"60 samples do not fill a batch of 64 .* lower training.batch"):
        for_student(entry, prepared, run, None)


@pytest.mark.parametrize("method", ["alone", "kd", "horkd"])
def test_clipping_bounds_the_step(method: str, prepared: Path, run: Run) -> None:
    """Without momentum and decay, a step is the rate times the clipped gradient."""
    moved = {}
    for clip in (None, 1e-3):
        settings = {**TRAINING, "momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0, "learning_rate": 1.0, "clip": clip}
        ours = learner(method, prepared, run, training=settings)
        before = [parameter.clone() for parameter in ours.student.parameters()]
        steps(ours, run, 1)
        change = [a - b for a, b in zip(ours.student.parameters(), before, strict=True)]
        moved[clip] = torch.stack([part.norm() for part in change]).norm().item()
    assert moved[1e-3] <= 1.001e-3
    assert moved[None] > 1e-2


def test_the_rate_rises_then_falls_to_zero(prepared: Path, run: Run) -> None:
    entry = student("alone", training={**TRAINING, "epochs": 20, "learning_rate": 0.2, "warmup": 0.1})
    task = for_student(entry, prepared, run, None)
    rates = [task.schedule(task.steps)(count) for count in range(task.steps)]
    assert task.steps == 100
    assert max(rates) == pytest.approx(0.2)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


def outside(file: Path, digest: str, **network: Any) -> schema.Teacher:
    return schema.Teacher.model_validate(
        {
            "task": "recognition",
            "dataset": "x",
            "start": "none",
            "from": {"file": str(file), "sha256": digest, "network": {**NETWORK, **network}},
        }
    )


def test_an_existing_model_is_taken_as_it_is(prepared: Path, run: Run, tmp_path: Path) -> None:
    from data.files import sha256

    network, description = teacher(prepared)
    save_model(tmp_path, network, description)
    file = tmp_path / "weights.safetensors"
    task: Recognition = for_teacher(outside(file, sha256(file), widths=[6, 10]), prepared, run)
    assert equal(weights(network), weights(task.student))
    with pytest.raises(
        UserError, match=r"stages.1.conv1.weight: \(10, 6, 3, 3\) in the file, \(12, 6, 3, 3\) in the network"
    ):
        for_teacher(outside(file, sha256(file), widths=[6, 12]), prepared, run)
    few = outside(file, sha256(file), widths=[6, 10])
    few = few.model_copy(update={"training": few.training.model_copy(update={"batch": 1000})})
    for_teacher(few, prepared, run)  # nothing is drawn, so nothing can be too few
    wrong = outside(file, sha256(file), widths=[6, 10])
    wrong = wrong.model_copy(update={"outside": wrong.outside.model_copy(update={"mean": [0.1, 0.2]})})
    with pytest.raises(UserError, match=r"have 1 channels, but mean has 2 values and std 1"):
        for_teacher(wrong, prepared, run)
    with pytest.raises(UserError, match="is not what is pinned"):
        for_teacher(outside(file, "0" * 64, widths=[6, 10]), prepared, run)


def beginner(**network: Any) -> schema.Teacher:
    base = {"task": "recognition", "dataset": "x", "start": "big", "training": TRAINING}
    return schema.Teacher.model_validate({**base, "network": {**NETWORK, "widths": [6, 10], **network}})


def test_a_teacher_begins_with_the_weights_of_another(prepared: Path, run: Run) -> None:
    first = teacher(prepared)
    before = weights(first[0])
    task = for_teacher(beginner(), prepared, run, first)
    assert equal(weights(task.student), before)
    entry: Any = beginner()
    steps(alone.Learner(task, entry, run), run, 2)
    assert equal(weights(first[0]), before)
    assert not equal(weights(task.student), before)


def test_with_other_classes_it_keeps_a_classifier_of_its_own(prepared: Path, run: Run) -> None:
    own = for_teacher(beginner(), prepared, run).student.state_dict()
    first = teacher(prepared, classes=2)
    found = for_teacher(beginner(), prepared, run, first).student.state_dict()
    for key, value in found.items():
        assert torch.equal(value, own[key] if key.startswith("classifier.") else first[0].state_dict()[key]), key


def test_a_teacher_of_another_shape_is_no_beginning(prepared: Path, run: Run) -> None:
    with pytest.raises(UserError) as caught:
        for_teacher(beginner(widths=[6, 12]), prepared, run, teacher(prepared))
    assert str(caught.value).startswith("`start`: the network of 'big' is another:\n  ")
    assert "stages.1.conv1.weight: (10, 6, 3, 3) in the file, (12, 6, 3, 3) in the network" in str(caught.value)
