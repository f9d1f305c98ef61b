"""Soft-target loss: an oracle in plain Python, then its properties."""

import math

import pytest
import torch
from torch import Tensor

from stages.distill.kd import soft_target_loss

SHAPES = [(5, 4), (1, 2), (3, 4, 6), (2, 3, 4, 5), (2, 3, 2, 2, 2), (4, 1)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def value_and_gradient(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = soft_target_loss(leaf, teacher, temperature)
    gradient: Tensor = torch.autograd.grad(value, leaf)[0]
    return value.detach(), gradient


def slow_softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(z / temperature) for z in logits]
    return [power / math.fsum(powers) for power in powers]


def slow_loss(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """Walk over samples and positions; each is one column of logits."""
    columns = [x.movedim(1, -1).reshape(-1, x.shape[1]).tolist() for x in (student, teacher)]
    divergences = []
    for column_student, column_teacher in zip(*columns, strict=True):
        q, p = slow_softmax(column_student, temperature), slow_softmax(column_teacher, temperature)
        divergences.append(math.fsum(pc * math.log(pc / qc) for pc, qc in zip(p, q, strict=True)))
    return temperature**2 * math.fsum(divergences) / len(divergences)


@each_shape
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_agrees_with_the_definition(shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = normal(*shape, seed=1), normal(*shape, seed=2)
    expected = slow_loss(student, teacher, temperature)
    assert soft_target_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@each_shape
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradient_is_the_difference_of_probabilities(shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = normal(*shape, seed=1), normal(*shape, seed=2)
    _, gradient = value_and_gradient(student, teacher, temperature)
    q, p = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    expected = temperature * (q - p) / (student.numel() / shape[1])
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


def test_gradient_agrees_with_finite_differences() -> None:
    student, teacher = normal(2, 3, 2, seed=1).requires_grad_(), normal(2, 3, 2, seed=2)
    assert torch.autograd.gradcheck(lambda z: soft_target_loss(z, teacher, 3.0), (student,))
    assert torch.autograd.gradgradcheck(lambda z: soft_target_loss(z, teacher, 3.0), (student,))


@each_shape
def test_logits_equal_up_to_a_constant_per_position_cost_nothing(shape: tuple[int, ...]) -> None:
    teacher = normal(*shape, seed=2)
    student = teacher + normal(shape[0], 1, *shape[2:], seed=3)
    value, gradient = value_and_gradient(student, teacher, 4.0)
    assert abs(value.item()) < 1e-14
    assert gradient.abs().max().item() < 1e-14


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 6), (2, 3, 4, 5)], ids=str)
def test_any_other_difference_costs_something(shape: tuple[int, ...]) -> None:
    teacher = normal(*shape, seed=2)
    one_logit = teacher.clone()
    one_logit.view(-1)[-1] += 0.1
    constant_per_class = teacher + normal(1, shape[1], *(1 for _ in shape[2:]), seed=3)
    for student in (one_logit, constant_per_class, -teacher):
        assert soft_target_loss(student, teacher, 4.0).item() > 1e-6


def test_only_the_student_learns_and_the_sides_differ() -> None:
    student, teacher = normal(5, 4, seed=1).requires_grad_(), normal(5, 4, seed=2).requires_grad_()
    value = soft_target_loss(student, teacher, 2.0)
    value.backward()
    assert student.grad is not None
    assert student.grad.abs().max().item() > 0
    assert teacher.grad is None
    assert soft_target_loss(teacher, student, 2.0).item() != pytest.approx(value.item(), rel=1e-3)


def test_high_temperature_matches_centred_logits() -> None:
    """Hinton et al., section 2.1: in the limit, half the variance over classes of the logits' difference remains."""
    student, teacher = normal(6, 5, seed=1), normal(6, 5, seed=2)
    expected = (student - teacher).var(1, correction=0).mean().item() / 2
    assert soft_target_loss(student, teacher, 1e4).item() == pytest.approx(expected, rel=1e-3)


def test_memory_layout_does_not_matter() -> None:
    student, teacher = normal(2, 3, 4, 5, seed=1), normal(2, 3, 4, 5, seed=2)
    strided = student.to(memory_format=torch.channels_last), teacher.transpose(2, 3).contiguous().transpose(2, 3)
    expected = soft_target_loss(student, teacher)
    torch.testing.assert_close(soft_target_loss(*strided), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_logits_of_magnitude_300_stay_finite(dtype: torch.dtype) -> None:
    student = 300 * torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0]], dtype=dtype)
    teacher = -student
    value, gradient = value_and_gradient(student, teacher, 1.0)
    # Row 0: all of p is on class 1, 600 below the student's best. Row 1: p is on class 0, 600 below two equal bests.
    assert value.item() == pytest.approx((600 + 600 + math.log(2)) / 2, rel=1e-6)
    expected = torch.tensor([[1, -1, 0], [-1, 0.5, 0.5]], dtype=dtype) / 2
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_arithmetic_is_float32_or_wider(dtype: torch.dtype, autocast: bool) -> None:
    student, teacher = normal(5, 4, 3, seed=1, dtype=dtype), normal(5, 4, 3, seed=2, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected_value, expected_gradient = value_and_gradient(student.to(wide), teacher.to(wide), 4.0)
    leaf = student.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = soft_target_loss(leaf, teacher, 4.0)
    value.backward()
    assert value.dtype == wide
    assert torch.equal(value.detach(), expected_value)
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    assert torch.equal(leaf.grad, expected_gradient.to(dtype))


@pytest.mark.parametrize("side", [0, 1])
def test_a_value_that_is_not_a_number_is_not_swallowed(side: int) -> None:
    logits = normal(5, 4, seed=1), normal(5, 4, seed=2)
    logits[side][2, 1] = math.nan
    assert not soft_target_loss(*logits).isfinite()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_without_meaning_is_named(temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"temperature .*\({temperature}\)"):
        soft_target_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((4, 3), (4, 1), "differ in shape"),
        ((4, 3, 2), (4, 3), "differ in shape"),
        ((4, 3, 8, 8), (4, 3, 4, 4), "differ in shape"),
        ((3,), (3,), "non-empty"),
        ((0, 3), (0, 3), "non-empty"),
        ((2, 3, 0), (2, 3, 0), "non-empty"),
    ],
)
def test_shapes_that_do_not_fit_are_named(student: tuple[int, ...], teacher: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        soft_target_loss(torch.zeros(student), torch.zeros(teacher))
    assert f"student {student}, teacher {teacher}" in str(caught.value)
