"""MGD: mask, squared error, and the learner on a tiny task."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.errors import UserError
from stages.distill import alone, mgd
from stages.distill.mgd import generation_loss, keep
from stages.parameters import segmentation as schema
from stages.training import Context, Generator, Run

sys.path.insert(0, str(Path(__file__).parent))
import dense


@pytest.fixture(scope="module")
def run() -> Run:
    return dense.run()


def learner(run: Run, **fields: Any) -> mgd.Learner:
    return mgd.Learner(dense.Dense(run, (4, 6), dense.teacher((4, 10))), dense.entry(schema.MGD, **fields), run)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("masked", [0.0, 0.25, 0.75, 1.0])
def test_the_masked_share(masked: float) -> None:
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    mask = keep(uniform, masked)
    assert set(mask.unique().tolist()) == {0.0} - ({0.0} if masked == 0 else set()) | ({1.0} if masked < 1 else set())
    assert mask.mean().item() == pytest.approx(1 - masked, abs=4 * math.sqrt(masked * (1 - masked) / 40_000))
    assert torch.equal(mask, keep(uniform, masked))


@pytest.mark.parametrize("masked", [-0.1, 1.1, math.nan])
def test_a_share_without_meaning_is_named(masked: float) -> None:
    with pytest.raises(ValueError, match=rf"masked share .*\({masked}\)"):
        keep(torch.zeros(2), masked)


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 4), min_size=4, max_size=4), last=st.booleans())
def test_loss_and_gradient_agree_with_the_definition(shape: list[int], last: bool) -> None:
    student, teacher = normal(*shape, seed=1), normal(*shape, seed=2).requires_grad_()
    if last:
        student = student.to(memory_format=torch.channels_last)
    leaf = student.requires_grad_()
    value = generation_loss(leaf, teacher)
    expected = math.fsum(
        (a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    )
    assert value.item() == pytest.approx(expected / shape[0], rel=1e-12)
    value.backward()
    assert teacher.grad is None
    torch.testing.assert_close(leaf.grad, (2 / shape[0] * (student - teacher)).detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_arithmetic_is_float32_or_wider(dtype: torch.dtype) -> None:
    student, teacher = normal(2, 3, 4, 5, seed=1, dtype=dtype), normal(2, 3, 4, 5, seed=2, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = generation_loss(student, teacher)
    assert value.dtype == wide
    assert torch.equal(value, generation_loss(student.to(wide), teacher.to(wide)))


@pytest.mark.parametrize(
    ("student", "teacher"), [((2, 3, 4, 4), (2, 3, 4, 5)), ((2, 3, 4, 4), (2, 5, 4, 4)), ((0, 3, 4, 4), (0, 3, 4, 4))]
)
def test_shapes_that_do_not_fit_are_named(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"differ in shape|are empty") as caught:
        generation_loss(torch.zeros(student), torch.zeros(teacher))
    assert f"student {student}, teacher {teacher}" in str(caught.value)


@pytest.mark.parametrize("masked", [0.0, 0.65])
def test_the_terms_are_those_of_the_equations(masked: float) -> None:
    """One step against the loss written down here, with torch's own optimiser."""
    wide = dense.run("64-true")
    places: list[dict[str, str]] = [{}, {"student": "stage1", "teacher": "stage1"}]
    fields: dict[str, Any] = {"weight": 0.01, "masked": masked, "places": places}
    ours, twin = learner(wide, **fields), learner(wide, **fields)
    reported = dense.steps(ours, wide, 1)[0]
    context = Context(twin, wide, 0)
    for name, module in twin.modules.items():
        module.train(name != "teacher")
    context.begin(0)
    views = twin._task.views(context)
    with torch.no_grad():
        theirs = twin.modules["teacher"](views.teacher).features
    output = twin.modules["student"](views.student)
    loss = torch.zeros((), dtype=torch.float64)
    for place, module in zip(("last", "stage1"), twin.modules["adapters"].children(), strict=True):
        assert isinstance(module, Generator)
        a = module.align(output.features[place])
        mask = torch.ones(4, 1, *a.shape[2:])
        if masked:
            mask = (torch.rand(mask.shape, generator=context.generator("mask")) < 1 - masked).float()
            assert 0 < mask.mean() < 1
        g = module.second(module.first(a * mask.double()).relu())
        loss = loss + (g - theirs[place]).square().sum() / 4
    task = twin._task.objective(output, views.target)
    torch.testing.assert_close(reported, {"loss/task": task.detach(), "loss/features": loss.detach()})
    (task + 0.01 * loss).backward()
    twin.optimizers["student"].param_groups[0]["lr"] = twin.schedules["student"](0)
    twin.optimizers["student"].step()
    for part in ("student", "adapters"):
        for name, tensor in dense.weights(twin.modules[part]).items():
            torch.testing.assert_close(dense.weights(ours.modules[part])[name], tensor, rtol=1e-9, atol=1e-12)


def test_the_teacher_does_not_move_and_the_rest_does(run: Run) -> None:
    ours = learner(run, weight=1e-3)
    before = {name: dense.weights(module) for name, module in ours.modules.items()}
    dense.steps(ours, run)
    taught = ours.modules["teacher"]
    assert isinstance(taught, dense.Network)
    assert taught.heads_run == 0
    assert dense.equal(before["teacher"], dense.weights(taught))
    for part in ("student", "adapters"):
        after = dense.weights(ours.modules[part])
        still = [name for name, tensor in before[part].items() if torch.equal(tensor, after[name])]
        assert not still, "squared error trains the last bias too"


def test_weight_zero_is_the_training_without_a_teacher(run: Run) -> None:
    plain = alone.Learner(dense.Dense(run), dense.entry(schema.Alone), run)
    dense.steps(plain, run, 6)
    ours = learner(run, weight=0.0)
    dense.steps(ours, run, 6)
    assert dense.equal(dense.weights(plain.student), dense.weights(ours.student))


def test_places_that_do_not_fit_are_named(run: Run) -> None:
    with pytest.raises(UserError, match=r"the student has no place 'stage3' · places\[0\].student"):
        learner(run, places=[{"student": "stage3"}])
    with pytest.raises(UserError, match=r"student \(4, 6, 4, 3\), teacher \(4, 4, 8, 6\)\) · places\[0\]"):
        dense.steps(learner(run, places=[{"teacher": "stage1"}]), run, 1)


def test_bfloat16_keeps_the_losses_in_float32() -> None:
    mixed = dense.run("bf16-mixed")
    for step in dense.steps(learner(mixed), mixed, 2):
        assert all(value.dtype == torch.float32 and value.isfinite() for value in step.values()), step
