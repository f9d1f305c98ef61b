"""Relation losses of HORKD: an oracle in plain Python, then the properties of the method card's section 7."""

import math
import shutil
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages import relations
from stages.distill.horkd import (
    pair_loss,
    pairwise_distances,
    point_loss,
    relation_losses,
    triplet_cosines,
    triplet_loss,
)
from stages.relations import blocks, compiled

Loss = Callable[[Tensor, Tensor], Tensor]
Rows = Sequence[Sequence[float]]


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    return point_loss(student, teacher, "mse")


def huber(student: Tensor, teacher: Tensor) -> Tensor:
    return point_loss(student, teacher, "huber")


def mse_unit(student: Tensor, teacher: Tensor) -> Tensor:
    return point_loss(student, teacher, "mse_unit")


def fast(form: str, order: int) -> Loss:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return relation_losses(student, teacher, pairs=order == 2, triplets=order == 3, form=form)[order - 2]

    loss.__name__ = f"{form}_{order}"
    return loss


POINTS: list[Loss] = [mse, huber, mse_unit]
FAST: list[Loss] = [fast(form, order) for order in (2, 3) for form in ("blocks", "compiled")]
PAIRS: list[Loss] = [pair_loss, *FAST[:2]]
TRIPLETS: list[Loss] = [triplet_loss, *FAST[2:]]
RELATIONS: list[Loss] = PAIRS + TRIPLETS
each_loss = pytest.mark.parametrize("loss", POINTS + RELATIONS)
each_relation = pytest.mark.parametrize("loss", RELATIONS)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(width: int, seed: int, reflection: bool) -> Tensor:
    basis: Tensor = torch.linalg.qr(normal(width, width, seed=seed))[0]
    if (torch.linalg.det(basis) < 0) != reflection:
        basis[:, 0] = -basis[:, 0]
    return basis


def value_and_gradient(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher)
    gradient: Tensor = torch.autograd.grad(value, leaf)[0]
    return value.detach(), gradient


# --- the definitions, one number at a time ----------------------------------------------------------------------------


def slow_huber(z: float) -> float:
    return z * z / 2 if abs(z) <= 1 else abs(z) - 0.5


def slow_unit(x: Sequence[float]) -> list[float]:
    length = math.sqrt(math.fsum(xk * xk for xk in x))
    return [xk / length if length else 0.0 for xk in x]


def slow_points(v: Rows, u: Rows, element: Callable[[float], float]) -> float:
    return math.fsum(element(a - b) for x, y in zip(v, u, strict=True) for a, b in zip(x, y, strict=True)) / (
        len(v) * len(v[0])
    )


def slow_mse(v: Rows, u: Rows) -> float:
    return slow_points(v, u, lambda z: z * z)


def slow_point_huber(v: Rows, u: Rows) -> float:
    return slow_points(v, u, slow_huber)


def slow_mse_unit(v: Rows, u: Rows) -> float:
    return slow_mse([slow_unit(x) for x in v], [slow_unit(x) for x in u])


def slow_psi(x: Rows) -> list[list[float]]:
    size = len(x)
    distances = [[math.dist(x[i], x[j]) for j in range(size)] for i in range(size)]
    mean = math.fsum(distances[i][j] for i in range(size) for j in range(size) if i != j) / (size * (size - 1))
    return [[d / mean if mean else 0.0 for d in row] for row in distances]


def slow_pair(v: Rows, u: Rows) -> float:
    size, psi_v, psi_u = len(v), slow_psi(v), slow_psi(u)
    return math.fsum(slow_huber(psi_v[i][j] - psi_u[i][j]) for i in range(size) for j in range(size)) / size**2


def slow_cosine(x: Rows, a: int, b: int, c: int) -> float:
    to_b = slow_unit([xb - xa for xa, xb in zip(x[a], x[b], strict=True)])
    to_c = slow_unit([xc - xa for xa, xc in zip(x[a], x[c], strict=True)])
    return math.fsum(p * q for p, q in zip(to_b, to_c, strict=True))


def slow_triplet(v: Rows, u: Rows) -> float:
    r = range(len(v))
    return (
        math.fsum(slow_huber(slow_cosine(v, a, b, c) - slow_cosine(u, a, b, c)) for a in r for b in r for c in r)
        / len(v) ** 3
    )


SLOW: dict[Loss, Callable[[Rows, Rows], float]] = {
    mse: slow_mse,
    huber: slow_point_huber,
    mse_unit: slow_mse_unit,
    **dict.fromkeys(PAIRS, slow_pair),
    **dict.fromkeys(TRIPLETS, slow_triplet),
}


def random_case(loss: Loss, seed: int) -> tuple[Tensor, Tensor]:
    """Random sizes; a heavy-tailed student, so that the penalty's linear branch is met in every order."""
    generator = torch.Generator().manual_seed(1000 + seed)
    size, width, width_teacher = (int(torch.randint(low, 7, (), generator=generator)) for low in (2, 1, 1))
    student = normal(size, width, seed=seed) * torch.exp(normal(size, 1, seed=seed + 100))
    return student, normal(size, width if loss in POINTS else width_teacher, seed=seed + 200)


def finite_differences(loss: Callable[[Rows, Rows], float], student: Tensor, teacher: Tensor) -> Tensor:
    gradient, step, target = torch.zeros_like(student), 1e-5, teacher.tolist()
    for i, k in torch.cartesian_prod(torch.arange(student.shape[0]), torch.arange(student.shape[1])).tolist():
        ahead, behind = student.clone(), student.clone()
        ahead[i, k] += step
        behind[i, k] -= step
        gradient[i, k] = (loss(ahead.tolist(), target) - loss(behind.tolist(), target)) / (2 * step)
    return gradient


@each_loss
@pytest.mark.parametrize("seed", range(12))
def test_value_and_gradient_agree_with_the_definitions(loss: Loss, seed: int) -> None:
    student, teacher = random_case(loss, seed)
    value, gradient = value_and_gradient(loss, student, teacher)
    assert value.item() == pytest.approx(SLOW[loss](student.tolist(), teacher.tolist()), rel=1e-12, abs=1e-15)
    torch.testing.assert_close(gradient, finite_differences(SLOW[loss], student, teacher), rtol=1e-6, atol=1e-8)


def quadratic_points(v: Rows, u: Rows) -> float:
    return slow_mse(v, u) / 2


def quadratic_pair(v: Rows, u: Rows) -> float:
    return slow_mse(slow_psi(v), slow_psi(u)) / 2


def quadratic_triplet(v: Rows, u: Rows) -> float:
    r = range(len(v))
    return slow_mse(*([[slow_cosine(x, a, b, c) for c in r] for a in r for b in r] for x in (v, u))) / 2


@pytest.mark.parametrize(
    ("loss", "quadratic"), [(huber, quadratic_points), (pair_loss, quadratic_pair), (triplet_loss, quadratic_triplet)]
)
def test_random_cases_meet_the_linear_branch_of_the_penalty(
    loss: Loss, quadratic: Callable[[Rows, Rows], float]
) -> None:
    cases = [random_case(loss, seed) for seed in range(12)]
    assert any(loss(v, u).item() < 0.99 * quadratic(v.tolist(), u.tolist()) for v, u in cases)


def test_the_vertex_is_the_first_index() -> None:
    right_angle_at_1 = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    cosines = triplet_cosines(right_angle_at_1)
    assert cosines[1, 0, 2].item() == pytest.approx(0.0, abs=1e-15)
    assert cosines[0, 1, 2].item() == pytest.approx(3 / 5)
    assert cosines[2, 0, 1].item() == pytest.approx(4 / 5)


# --- invariances: properties 2 to 8 -----------------------------------------------------------------------------------


def similar(points: Tensor, seed: int, reflection: bool) -> Tensor:
    return 3.7 * points @ orthogonal(points.shape[1], seed, reflection).T + normal(points.shape[1], seed=seed + 1)


@each_relation
@pytest.mark.parametrize("reflection", [False, True])
@pytest.mark.parametrize("size", [2, 3, 9])
def test_similar_embeddings_have_no_relation_loss(loss: Loss, reflection: bool, size: int) -> None:
    teacher = normal(size, 6, seed=size)
    student = similar(teacher, seed=1, reflection=reflection)
    value, gradient = value_and_gradient(loss, student, teacher)
    assert value.item() < 1e-20
    assert gradient.abs().max().item() < 1e-12
    assert point_loss(student, teacher).item() > 0.1


@each_relation
@pytest.mark.parametrize("reflection", [False, True])
def test_a_similarity_of_either_side_changes_nothing(loss: Loss, reflection: bool) -> None:
    student, teacher = normal(8, 5, seed=1), normal(8, 7, seed=2)
    expected = loss(student, teacher)
    torch.testing.assert_close(loss(similar(student, 3, reflection), teacher), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss(student, similar(teacher, 4, reflection)), expected, rtol=1e-10, atol=0)


@each_relation
def test_zero_columns_change_nothing(loss: Loss) -> None:
    student, teacher = normal(8, 5, seed=1), normal(8, 7, seed=2)
    expected = loss(student, teacher)
    wider = torch.nn.functional.pad(student, (0, 3)), torch.nn.functional.pad(teacher, (0, 2))
    torch.testing.assert_close(loss(wider[0], teacher), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss(student, wider[1]), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("loss", POINTS)
def test_point_loss_sees_similarities_and_is_zero_only_for_equal_embeddings(loss: Loss) -> None:
    student, teacher = normal(8, 5, seed=1), normal(8, 5, seed=2)
    assert loss(teacher, teacher).item() == 0
    moved = [teacher @ orthogonal(5, 3, False).T, teacher + 0.5, student]
    assert all(loss(points, teacher).item() > 1e-3 for points in moved)
    if loss is not mse_unit:
        assert loss(2 * teacher, teacher).item() > 1e-3
    one_element = teacher.clone()
    one_element[4, 2] += 1e-3
    assert 0 < loss(one_element, teacher).item() < 1e-6


def test_unit_penalty_ignores_lengths_and_nothing_else() -> None:
    student, teacher = normal(8, 5, seed=1), normal(8, 5, seed=2)
    lengths = normal(8, 1, seed=3).exp()
    expected = mse_unit(student, teacher)
    torch.testing.assert_close(mse_unit(student * lengths, teacher), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(mse_unit(student, teacher * lengths), expected, rtol=1e-10, atol=0)
    value, gradient = value_and_gradient(mse_unit, student, teacher)
    torch.testing.assert_close((gradient * student).sum(1), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-15)
    assert value.item() > 0.01


@each_relation
@pytest.mark.parametrize("seed", range(3))
def test_gradient_neither_translates_scales_nor_rotates(loss: Loss, seed: int) -> None:
    student, teacher = normal(9, 4, seed=seed), normal(9, 6, seed=seed + 10)
    _, gradient = value_and_gradient(loss, student, teacher)
    size = gradient.abs().max().item()
    assert size > 1e-4
    assert gradient.sum(0).abs().max().item() < 1e-12 * size
    assert abs((gradient * student).sum().item()) < 1e-12 * size
    moment = student.T @ gradient
    torch.testing.assert_close(moment, moment.T, rtol=0, atol=1e-12 * size)


@each_loss
def test_permuting_the_batch(loss: Loss) -> None:
    student, teacher = normal(7, 5, seed=1), normal(7, 5, seed=2)
    order = torch.tensor([3, 0, 6, 5, 1, 2, 4])
    value, gradient = value_and_gradient(loss, student, teacher)
    permuted_value, permuted_gradient = value_and_gradient(loss, student[order], teacher[order])
    torch.testing.assert_close(permuted_value, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(permuted_gradient, gradient[order], rtol=1e-9, atol=1e-15)
    assert abs(loss(student[order], teacher).item() - value.item()) > 1e-3 * value.item()


@each_loss
def test_both_sides_play_the_same_part_but_only_the_student_learns(loss: Loss) -> None:
    student, teacher = normal(7, 5, seed=1).requires_grad_(), normal(7, 5, seed=2).requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert student.grad is not None
    assert student.grad.abs().max().item() > 0
    assert teacher.grad is None
    torch.testing.assert_close(loss(teacher, student), value, rtol=1e-12, atol=0)


@each_loss
def test_values_are_bounded(loss: Loss) -> None:
    values = torch.stack([loss(*random_case(loss, seed)) for seed in range(12)])
    assert values.min().item() >= 0
    assert loss not in TRIPLETS or values.max().item() <= 1.5
    assert values.max().item() > 0


def test_huber_penalty_is_at_most_half_the_square() -> None:
    student, teacher = 3 * normal(9, 5, seed=1), normal(9, 5, seed=2)
    assert huber(student, teacher).item() < 0.9 * mse(student, teacher).item() / 2
    near = teacher + 0.1 * normal(9, 5, seed=3)
    torch.testing.assert_close(huber(near, teacher), mse(near, teacher) / 2, rtol=1e-12, atol=0)


# --- degenerate batches and numerics: properties 9 to 12, 15, 22 ------------------------------------------------------


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_duplicates_neither_explode_nor_attract(loss: Loss, dtype: torch.dtype, where: str) -> None:
    student, teacher = normal(8, 5, seed=1, dtype=dtype), normal(8, 5, seed=2, dtype=dtype)
    if where != "teacher":
        student[1] = student[4]
    if where != "student":
        teacher[1] = teacher[4]
    value, gradient = value_and_gradient(loss, student, teacher)
    assert value.item() == pytest.approx(SLOW[loss](student.tolist(), teacher.tolist()), rel=1e-5)
    assert gradient.isfinite().all()
    assert gradient.abs().max().item() < 1
    if where == "both":
        torch.testing.assert_close(gradient[1], gradient[4])


@each_relation
def test_a_duplicate_edge_adds_nothing_to_the_gradient(loss: Loss) -> None:
    """With one pair of the student coincident, the rest of the sum is smooth, and its slope is the whole gradient."""
    student, teacher = normal(6, 4, seed=1), normal(6, 4, seed=2)
    student[1] = student[4]

    def rest(v: Rows, u: Rows) -> float:
        r, edge = range(6), {1, 4}
        if loss in PAIRS:
            return slow_pair(v, u)
        smooth = [(a, b, c) for a in r for b in r for c in r if edge not in ({a, b}, {a, c})]
        return math.fsum(slow_huber(slow_cosine(v, *i) - slow_cosine(u, *i)) for i in smooth) / 6**3

    _, gradient = value_and_gradient(loss, student, teacher)
    torch.testing.assert_close(gradient, finite_differences(rest, student, teacher), rtol=1e-6, atol=1e-8)


def test_a_zero_embedding_has_no_direction_and_no_gradient() -> None:
    student, teacher = normal(4, 3, seed=1), normal(4, 3, seed=2)
    student[2] = 0
    teacher[0] = 0
    value, gradient = value_and_gradient(mse_unit, student, teacher)
    assert value.item() == pytest.approx(slow_mse_unit(student.tolist(), teacher.tolist()), rel=1e-12)
    assert gradient[2].abs().max().item() == 0
    assert gradient.abs().max().item() < 1


@each_relation
def test_one_sample_has_no_relations(loss: Loss) -> None:
    value, gradient = value_and_gradient(loss, normal(1, 3), normal(1, 4))
    assert value.item() == 0
    assert torch.equal(gradient, torch.zeros(1, 3, dtype=torch.float64))


def test_two_samples_are_always_alike() -> None:
    student, teacher = normal(2, 3, seed=1), 100 * normal(2, 4, seed=2)
    assert pair_loss(student, teacher).item() == 0
    assert triplet_loss(student, teacher).item() < 1e-30


@each_relation
@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("constant", [0.0, 0.1, 1e3])
def test_collapse_is_finite_and_has_no_gradient(loss: Loss, size: int, constant: float) -> None:
    collapsed, spread = torch.full((size, 3), constant, dtype=torch.float64), normal(size, 4, seed=2)
    value, gradient = value_and_gradient(loss, collapsed, spread)
    assert value.item() == pytest.approx(SLOW[loss](collapsed.tolist(), spread.tolist()), rel=1e-12)
    assert value.item() > 0
    assert gradient.abs().max().item() == 0
    value, gradient = value_and_gradient(loss, spread, collapsed)
    assert value.item() > 0
    assert gradient.isfinite().all()


@each_relation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_does_not_matter(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher = normal(16, 8, seed=1, dtype=dtype), normal(16, 8, seed=2, dtype=dtype)
    value, gradient = value_and_gradient(loss, student, teacher)
    large_value, large_gradient = value_and_gradient(loss, 1e3 * student, 1e-3 * teacher)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(large_value, value, rtol=tolerance, atol=0)
    scale = gradient.abs().max().item()
    torch.testing.assert_close(1e3 * large_gradient, gradient, rtol=0, atol=tolerance * scale)


@each_relation
def test_an_offset_of_80_deviations_costs_no_digits(loss: Loss) -> None:
    student, teacher = normal(24, 32, seed=1).float() + 80, normal(24, 48, seed=2).float() - 80
    value, gradient = value_and_gradient(loss, student, teacher)
    exact_value, exact_gradient = value_and_gradient(loss, student.double(), teacher.double())
    assert value.item() == pytest.approx(exact_value.item(), rel=1e-5)
    scale = exact_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=1e-5 * scale)


@each_relation
def test_near_duplicates_cost_no_digits(loss: Loss) -> None:
    student, teacher = normal(12, 8, seed=1).float(), normal(12, 8, seed=2).float()
    student[3] = student[7] + 1e-5 * normal(8, seed=3).float()
    value, gradient = value_and_gradient(loss, student, teacher)
    exact_value, exact_gradient = value_and_gradient(loss, student.double(), teacher.double())
    assert value.item() == pytest.approx(exact_value.item(), rel=1e-5)
    scale = exact_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=1e-5 * scale)


@each_loss
def test_derivatives(loss: Loss) -> None:
    student, teacher = normal(5, 4, seed=1).requires_grad_(), normal(5, 4, seed=2)
    assert torch.autograd.gradcheck(lambda v: loss(v, teacher), (student,))
    if loss is pair_loss or loss in FAST:
        (gradient,) = torch.autograd.grad(loss(student, teacher), student, create_graph=True)
        with pytest.raises((NotImplementedError, RuntimeError), match=r"derivative|does not require grad"):
            gradient.square().sum().backward()
    else:
        assert torch.autograd.gradgradcheck(lambda v: loss(v, teacher), (student,))


@each_loss
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_arithmetic_is_float32_or_wider(loss: Loss, dtype: torch.dtype, autocast: bool) -> None:
    student, teacher = normal(6, 5, seed=1, dtype=dtype), normal(6, 5, seed=2, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected_value, expected_gradient = value_and_gradient(loss, student.to(wide), teacher.to(wide))
    leaf = student.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = loss(leaf, teacher)
    value.backward()
    assert value.dtype == wide
    assert torch.equal(value.detach(), expected_value)
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    assert torch.equal(leaf.grad, expected_gradient.to(dtype))


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_near_the_limit_of_float16_stay_finite(loss: Loss, dtype: torch.dtype) -> None:
    student = (6e4 * torch.tanh(normal(8, 64, seed=1))).to(dtype)
    teacher = (6e4 * torch.tanh(normal(8, 64, seed=2))).to(dtype)
    value, gradient = value_and_gradient(loss, student, teacher)
    assert value.isfinite()
    assert gradient.isfinite().all()


@each_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_value_that_is_not_finite_is_not_swallowed(loss: Loss, bad: float, side: int) -> None:
    embeddings = normal(5, 4, seed=1), normal(5, 4, seed=2)
    embeddings[side][2, 1] = bad
    assert not loss(*embeddings).isfinite()


@each_loss
def test_equal_inputs_give_equal_bits(loss: Loss) -> None:
    student, teacher = normal(16, 8, seed=1).float(), normal(16, 8, seed=2).float()
    first, second = (value_and_gradient(loss, student, teacher) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


# --- what the losses lead to: property 20 -----------------------------------------------------------------------------


def descend(objective: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, float]:
    points = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [points],
        max_iter=1000,
        history_size=50,
        tolerance_grad=1e-8,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(points)
        value.backward()
        return value

    optimizer.step(closure)
    return points.detach(), objective(points).item()


@pytest.mark.parametrize("seed", range(3))
def test_relations_determine_the_embeddings_up_to_similarity(seed: int) -> None:
    teacher = normal(16, 8, seed=seed)
    points, value = descend(
        lambda v: 1e3 * (pair_loss(v, teacher) + triplet_loss(v, teacher)), normal(16, 8, seed=seed + 10)
    )
    assert value < 1e-12
    centred, target = points - points.mean(0), teacher - teacher.mean(0)
    left, scales, right = torch.linalg.svd(centred.T @ target)
    fitted = centred @ left @ right * scales.sum() / centred.square().sum()
    assert ((fitted - target).norm() / target.norm()).item() < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_points_and_relations_together_determine_the_embeddings(seed: int) -> None:
    teacher = normal(16, 8, seed=seed)
    # With a lighter point loss some starts end in another orientation, to which the relations are blind.
    points, _ = descend(
        lambda v: 1e2 * point_loss(v, teacher) + 1e3 * (pair_loss(v, teacher) + triplet_loss(v, teacher)),
        normal(16, 8, seed=seed + 10),
    )
    torch.testing.assert_close(points, teacher, rtol=0, atol=1e-6)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((4, 3), (5, 3), "batch sizes differ"),
        ((4, 3, 2), (4, 3), "must be matrices"),
        ((4, 3), (4,), "must be matrices"),
        ((0, 3), (0, 3), "empty"),
        ((4, 0), (4, 0), "empty"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    loss: Loss, student: tuple[int, ...], teacher: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        loss(torch.zeros(student), torch.zeros(teacher))
    assert f"student {student}, teacher {teacher}" in str(caught.value)


@pytest.mark.parametrize("loss", POINTS)
def test_points_need_equal_widths(loss: Loss) -> None:
    with pytest.raises(ValueError, match=r"student \(4, 3\), teacher \(4, 1\).*linear"):
        loss(torch.zeros(4, 3), torch.zeros(4, 1))


def test_an_unknown_penalty_is_named() -> None:
    with pytest.raises(ValueError, match=r"'l1'.*mse, huber or mse_unit"):
        point_loss(torch.zeros(4, 3), torch.zeros(4, 3), "l1")


def test_distances_stay_exact_far_from_the_origin() -> None:
    points = normal(40, 16, seed=1).float() + 1e3
    torch.testing.assert_close(
        pairwise_distances(points).double(), pairwise_distances(points.double()), rtol=1e-6, atol=0
    )


# --- the lean forms -------------------------------------------------------------------------------------------------


FORMS = ("blocks", "compiled")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [3, 17, 40, 130])
def test_property_13_lean_equals_dense(form: str, size: int) -> None:
    """Sizes at which a block holds all vertices, a few, and does not divide their number."""
    student, teacher = normal(size, 6, seed=size), normal(size, 9, seed=size + 1)
    for order, dense in enumerate((pair_loss, triplet_loss)):
        expected = value_and_gradient(dense, student, teacher)
        found = value_and_gradient(lambda v, u, order=order: relation_losses(v, u, form=form)[order], student, teacher)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-12 * float(expected[1].abs().max()))


@pytest.mark.parametrize("form", FORMS)
def test_some_vertices_are_their_rows_of_all_triplets(form: str) -> None:
    student, teacher = normal(9, 4, seed=1).requires_grad_(), normal(9, 5, seed=2)
    chosen = torch.tensor([7, 0, 3])
    value = relation_losses(student, teacher, pairs=False, form=form, vertices=chosen)[1]
    cosines = triplet_cosines(student)[chosen], triplet_cosines(teacher)[chosen]
    expected = torch.nn.functional.smooth_l1_loss(*cosines)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    found, wanted = (torch.autograd.grad(x, student)[0] for x in (value, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-14)
    every = torch.stack(
        [relation_losses(student, teacher, form=form, vertices=torch.tensor([place]))[1] for place in range(9)]
    )
    torch.testing.assert_close(every.mean(), triplet_loss(student, teacher), rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_nearly_equal_embeddings_cost_no_digits_in_float32(form: str) -> None:
    student, teacher = normal(12, 5, seed=1), normal(12, 5, seed=2)
    student[3] = student[8] + 1e-5 * normal(5, seed=3)
    narrow = student.float(), teacher.float()
    for order, dense in enumerate((pair_loss, triplet_loss)):
        expected = value_and_gradient(dense, *(side.double() for side in narrow))
        found = value_and_gradient(lambda v, u, order=order: relation_losses(v, u, form=form)[order], *narrow)
        torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(
            found[1].double(), expected[1], rtol=1e-5, atol=1e-6 * float(expected[1].abs().max())
        )


@pytest.mark.parametrize("vertices", [1, 3, 8, 13])
def test_blocks_of_any_number_of_vertices_are_equal(vertices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Property 13: one vertex at a time, a number that does not divide B, all, and more than there are."""
    student, teacher = normal(8, 5, seed=1), normal(8, 6, seed=2)
    expected = value_and_gradient(triplet_loss, student, teacher)
    monkeypatch.setattr(blocks, "NUMBERS", vertices * 8**2)
    found = value_and_gradient(fast("blocks", 3), student, teacher)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=1e-15)


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_threads_share_out_vertices(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = normal(10, 5, seed=1), normal(10, 6, seed=2)
    expected = value_and_gradient(triplet_loss, student, teacher)
    monkeypatch.setattr(compiled, "SMALLEST", 1)
    first, second = (value_and_gradient(fast("compiled", 3), student, teacher) for _ in range(2))
    torch.testing.assert_close(first[0], expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(first[1], expected[1], rtol=1e-9, atol=1e-15)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_samples_are_alike_in_every_form(form: str, dtype: torch.dtype) -> None:
    """Property 10; in float32 the cosine of a direction with itself is 1 but for rounding."""
    student, teacher = normal(2, 3, seed=1, dtype=dtype).requires_grad_(), 100 * normal(2, 4, seed=2, dtype=dtype)
    pairs, triplets = relation_losses(student, teacher, form=form)
    assert pairs.item() == 0
    assert triplets.item() < torch.finfo(dtype).eps ** 2
    (gradient,) = torch.autograd.grad(pairs + triplets, student)
    assert gradient.abs().max().item() < torch.finfo(dtype).eps


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [128, 256])
def test_memory_grows_as_the_square_of_the_batch(form: str, size: int) -> None:
    """Property 21. Neither B * B * D nor B * B * B numbers are ever held; tracemalloc counts arrays of numpy."""
    student, teacher = normal(size, 32, seed=1).float().requires_grad_(), normal(size, 64, seed=2).float()
    relation_losses(student, teacher, form=form)
    tracemalloc.start()
    try:
        with Largest() as seen:
            sum(relation_losses(student, teacher, form=form)).backward()  # type: ignore[union-attr]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen.elements <= max(size**2, blocks.NUMBERS)
    assert peak < 60 * size**2
    with Largest() as seen:
        triplet_loss(student[:64], teacher[:64])
    assert seen.elements == 64**3


def test_without_numba_blocks_do_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "stages.relations.compiled")
    form = relations.choose(torch.device("cpu"))
    assert form == "blocks"
    assert "compared more slowly (import of numba halted" in caplog.text
    student, teacher = normal(9, 5, seed=1), normal(9, 6, seed=2)
    found = value_and_gradient(fast(form, 3), student, teacher)
    torch.testing.assert_close(found, value_and_gradient(triplet_loss, student, teacher), rtol=1e-9, atol=1e-15)


def test_where_nothing_compiled_can_be_kept_blocks_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(form: str) -> ModuleType:
        if form == "compiled":
            raise RuntimeError("cannot cache function: no locator available")
        return blocks

    monkeypatch.setattr(relations, "_module", refuse)
    assert relations.choose(torch.device("cpu")) == "blocks"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e18])
def test_scale_does_not_matter_in_float32(form: str, scale: float) -> None:
    """Squares of such distances are beyond what float32 holds."""
    student, teacher = normal(12, 5, seed=1).float(), normal(12, 6, seed=2).float()
    expected = value_and_gradient(fast(form, 3), student, teacher)
    found = value_and_gradient(fast(form, 3), scale * student, teacher)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(scale * found[1].double(), expected[1].double(), rtol=1e-4, atol=1e-9)


def test_with_numba_the_loop_is_compiled() -> None:
    assert relations.choose(torch.device("cpu")) == "compiled"
    assert relations.choose(torch.device("mps")) == "compiled"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler of C++ on a processor")
def test_the_form_of_gpus_is_equal_on_a_processor() -> None:
    """Of two sizes of batch and of some vertices: what torch.compile has made serves them all."""
    for size, vertices in ((20, None), (33, None), (33, torch.arange(7))):
        student, teacher = normal(size, 5, seed=1), normal(size, 6, seed=2)
        found, expected = (
            value_and_gradient(
                lambda v, u, form=form, vertices=vertices: relation_losses(v, u, form=form, vertices=vertices)[1],
                student,
                teacher,
            )
            for form in ("fused", "blocks")
        )
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)


def test_what_is_not_asked_for_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(relations, "_triplets", refuse)
    pairs, triplets = relation_losses(normal(5, 3), normal(5, 3, seed=1), triplets=False)
    assert pairs.item() > 0
    assert triplets.item() == 0
