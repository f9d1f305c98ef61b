"""Losses of D3GZSL: pair by pair in plain Python, then what the card says of them (its section 7)."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.zero_shot import MLP, initialise
from stages.distill.d3gzsl import (
    SCORES,
    Confidence,
    Head,
    distribution_loss,
    embedding_loss,
    label_loss,
    max_log_softmax,
    teacher_codes,
    unit,
)

FORMS = ("logits", "probabilities")
KINDS = ("single", "double")
each_form = pytest.mark.parametrize("form", FORMS)
each_kind = pytest.mark.parametrize("kind", KINDS)
few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(count: int, seed: int = 0, kinds: int = 3) -> Tensor:
    return torch.randint(kinds, (count,), generator=torch.Generator().manual_seed(seed))


def codes(count: int, seed: int = 0) -> Tensor:
    return (3 * normal(count, 2, seed=seed)).softmax(1)


def by_pairs(rows: Tensor, columns: Tensor, groups: Tensor, form: str) -> float:
    """The definition, a pair at a time."""
    total = 0.0
    for i, a in enumerate(rows.tolist()):
        for j, b in enumerate(columns.tolist()):
            lengths = [max(math.sqrt(math.fsum(x * x for x in v)), 1e-8) for v in (a, b)]
            cosine = math.fsum(x * y for x, y in zip(a, b, strict=True)) / math.prod(lengths)
            similarity, same = (1 + cosine) / 2, float(groups[i] == groups[j])
            if form == "logits":
                total += math.log1p(math.exp(similarity)) - same * similarity
            else:
                similarity = min(max(similarity, 1e-6), 1 - 1e-6)
                total -= same * math.log(similarity) + (1 - same) * math.log(1 - similarity)
    return total / len(rows) ** 2


def by_samples(teacher: Tensor, student: Tensor, kind: str) -> float:
    def softmax(row: list[float]) -> list[float]:
        powers = [math.exp(x - max(row)) for x in row]
        return [power / math.fsum(powers) for power in powers]

    total = 0.0
    for t, s in zip(teacher.tolist(), student.tolist(), strict=True):
        p, q = softmax(t), softmax(s)
        if kind == "double":
            p, q = softmax(p), softmax(q)
        total += math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(teacher)


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)


# Against the definition


@each_form
@pytest.mark.parametrize(("count", "width"), [(1, 1), (1, 4), (5, 3), (17, 8)])
def test_embedding_loss_is_the_mean_over_pairs(form: str, count: int, width: int) -> None:
    teacher, student, labels = normal(count, width, seed=1), normal(count, width, seed=2), classes(count)
    expected = by_pairs(teacher, student, labels, form)
    assert embedding_loss(teacher, student, labels, form=form).item() == pytest.approx(expected, rel=1e-12)
    known = embedding_loss(unit(teacher), student, labels, form=form, unit_teacher=True)
    assert known.item() == pytest.approx(expected, rel=1e-12)


@each_form
@pytest.mark.parametrize("count", [1, 2, 13])
def test_distribution_loss_is_the_mean_over_pairs(form: str, count: int) -> None:
    student, teacher, labels = codes(count, 1), codes(count, 2), classes(count)
    expected = by_pairs(student, teacher, labels, form)
    assert distribution_loss(student, teacher, labels, form=form).item() == pytest.approx(expected, rel=1e-12)


@each_kind
@pytest.mark.parametrize(("count", "width"), [(1, 2), (6, 5), (3, 40)])
def test_label_loss_is_the_mean_divergence(kind: str, count: int, width: int) -> None:
    teacher, student = 4 * normal(count, width, seed=1), 4 * normal(count, width, seed=2)
    expected = by_samples(teacher, student, kind)
    assert label_loss(teacher, student, form=kind).item() == pytest.approx(expected, rel=1e-11)


@few
@given(seed=seeds, count=st.integers(1, 40))
def test_sums_over_angles_equal_pairs(seed: int, count: int) -> None:
    """For vectors of any direction and length, and any numbers as groups."""
    rows, columns = normal(count, 2, seed=seed).requires_grad_(), normal(count, 2, seed=seed + 1).requires_grad_()
    groups = 1000 * classes(count, seed, kinds=5) - 2000
    found = distribution_loss(rows, columns, groups)
    similarity = 0.5 + 0.5 * F.cosine_similarity(rows[:, None], columns, dim=2)
    expected = F.binary_cross_entropy_with_logits(similarity, (groups[:, None] == groups).double())
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    wanted, ours = (torch.stack(torch.autograd.grad(3 * loss, [rows, columns])) for loss in (expected, found))
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-13)


@each_form
def test_gradients_agree_with_finite_differences(form: str) -> None:
    teacher, student, labels = normal(4, 3, seed=1), normal(4, 3, seed=2).requires_grad_(), classes(4)
    assert torch.autograd.gradcheck(lambda z: embedding_loss(teacher, z, labels, form=form), student)
    pair = codes(4, 1).requires_grad_(), codes(4, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda *both: distribution_loss(*both, labels, form=form), pair)


@each_kind
def test_gradient_of_the_label_loss_agrees_with_finite_differences(kind: str) -> None:
    teacher, student = normal(4, 3, seed=1), normal(4, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: label_loss(teacher, v, form=kind), student)


# Label loss: properties 6 and 7


@each_kind
@few
@given(seed=seeds)
def test_label_loss_is_no_less_than_0_and_blind_to_a_constant_per_row(kind: str, seed: int) -> None:
    teacher, student = 3 * normal(6, 5, seed=seed), 3 * normal(6, 5, seed=seed + 1)
    loss = label_loss(teacher, student, form=kind)
    assert loss > 1e-6
    moved = label_loss(teacher + normal(6, 1, seed=seed + 2), student + normal(6, 1, seed=seed + 3), form=kind)
    torch.testing.assert_close(moved, loss, rtol=1e-10, atol=0)
    same = label_loss(teacher, teacher + normal(6, 1, seed=seed), form=kind)
    assert abs(same.item()) < 1e-12


def test_double_softmax_bounds_the_label_loss() -> None:
    """Of p one-hot and q uniform the log-ratios are furthest apart; a single softmax has no bound."""
    teacher, student = torch.zeros(1, 50, dtype=torch.float64), torch.zeros(1, 50, dtype=torch.float64)
    teacher[0, 0], student[0, 1] = 1e4, 1e4
    assert label_loss(teacher, student, form="single") > 9e3
    assert 0 < label_loss(teacher, student, form="double") < 2
    assert label_loss(teacher, student, form="double") < 0.1


# Matching: properties 8 to 10, and 12

BINARY = [("embedding", form) for form in FORMS] + [("distribution", form) for form in FORMS]
each_matching = pytest.mark.parametrize(("what", "form"), BINARY)


def matching(what: str, form: str, count: int, seed: int) -> tuple[Loss, Tensor, Tensor]:
    """A loss of (rows, columns, labels), and both for it."""
    if what == "embedding":
        rows, columns = normal(count, 5, seed=seed), normal(count, 5, seed=seed + 1)
        return lambda a, b, y: embedding_loss(a, b, y, form=form), rows, columns
    return lambda a, b, y: distribution_loss(a, b, y, form=form), codes(count, seed), codes(count, seed + 1)


@each_matching
@few
@given(seed=seeds)
def test_matching_is_blind_to_order_and_to_lengths(what: str, form: str, seed: int) -> None:
    loss, rows, columns = matching(what, form, 8, seed)
    labels = torch.arange(8) % 3
    value = loss(rows, columns, labels)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss(rows[order], columns[order], labels[order]), value, rtol=1e-12, atol=0)
    longer = [torch.rand(8, 1, dtype=torch.float64) * 50 + 0.02 for _ in range(2)]
    # Probabilities near 1 have a steep logarithm.
    torch.testing.assert_close(loss(rows * longer[0], columns * longer[1], labels), value, rtol=1e-9, atol=0)
    turned = torch.arange(8).roll(1)
    assert abs(loss(rows, columns[turned], labels) - value) > 1e-9


@few
@given(seed=seeds, above=st.booleans())
def test_matching_with_logits_has_a_floor_and_a_ceiling(seed: int, above: bool) -> None:
    """Also where student and teacher are equal: it is no distance."""
    student, teacher, labels = normal(7, 4, seed=seed), normal(7, 4, seed=seed + 1), classes(7, seed)
    if above:
        student, teacher = student.relu(), teacher.relu()
    same = (labels[:, None] == labels).double().mean().item()
    # Least for cosines 1 where labels agree and -1 (0 after a ReLU) elsewhere, most for the opposite.
    low = math.log1p(math.exp(1)) - 1, math.log1p(math.exp(0.5)) if above else math.log(2)
    high = math.log1p(math.exp(0.5)) - 0.5 if above else math.log(2), math.log1p(math.exp(1))
    for first in (teacher, student):
        value = embedding_loss(first, student, labels).item()
        assert low[0] * same + low[1] * (1 - same) <= value + 1e-12
        assert value <= high[0] * same + high[1] * (1 - same) + 1e-12


def test_a_single_class_is_best_matched_where_all_point_the_same_way() -> None:
    labels, same = torch.zeros(6, dtype=torch.int64), normal(1, 4).expand(6, 4) * torch.arange(1, 7)[:, None]
    best = embedding_loss(same, same, labels)
    assert best.item() == pytest.approx(math.log1p(math.exp(1)) - 1, rel=1e-12)
    assert embedding_loss(same, normal(6, 4), labels) > best
    assert embedding_loss(same, same, labels, form="probabilities") == pytest.approx(0, abs=2e-6)


def test_equal_student_and_teacher_do_not_make_the_losses_0() -> None:
    z, h, labels = normal(9, 4), codes(9), classes(9)
    assert embedding_loss(z, z, labels) > 0.31
    assert distribution_loss(h, h, labels) > 0.31


def test_what_pairs_have_in_common_is_what_they_are_grouped_by() -> None:
    """Real or synthesised gives another loss than classes do, and the value of every pair follows its own."""
    student, teacher = codes(6, 1), codes(6, 2)
    labels, domain = torch.tensor([7, 7, 3, 0, 1, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert distribution_loss(student, teacher, domain) != distribution_loss(student, teacher, labels)
    again = distribution_loss(student, teacher, domain == 1)
    torch.testing.assert_close(again, distribution_loss(student, teacher, domain), rtol=0, atol=0)


# What is not finite, or not wide


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_zeros_have_a_value_and_no_gradient(form: str, dtype: torch.dtype) -> None:
    teacher, student = normal(6, 4, seed=1).to(dtype), normal(6, 4, seed=2).to(dtype)
    teacher[2], student[3], student[4] = 0, 0, 1e-30
    student.requires_grad_()
    labels = classes(6)
    loss = embedding_loss(teacher, student, labels, form=form)
    assert loss.item() == pytest.approx(by_pairs(teacher, student, labels, form), rel=1e-6)
    (gradient,) = gradients(loss, student)
    assert gradient.isfinite().all()
    assert not gradient[3].any()
    assert gradient[0].any()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_of_0_and_1_have_finite_gradients(sign: float, dtype: torch.dtype) -> None:
    teacher = normal(5, 3).to(dtype)
    student = (sign * teacher).requires_grad_()
    for labels in (torch.arange(5), torch.zeros(5, dtype=torch.int64)):
        loss = embedding_loss(teacher, student, labels, form="probabilities")
        (gradient,) = gradients(loss, student)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 1e4


@each_form
def test_half_precision_is_only_that_of_the_inputs(form: str) -> None:
    """Under autocast as without: not even the matrix product is in less than float32."""
    teacher, student, labels = normal(9, 6, seed=1), normal(9, 6, seed=2), classes(9)
    head, confidence = Head(6), Confidence()

    def losses(dtype: torch.dtype) -> list[Tensor]:
        t, s = teacher.bfloat16().to(dtype), student.bfloat16().to(dtype)
        code = teacher_codes(confidence(max_log_softmax(t)))
        return [
            embedding_loss(t, s, labels, form=form),
            label_loss(t, s),
            label_loss(t, s, form="double"),
            distribution_loss(head(s), code, labels, form=form),
        ]

    expected = losses(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found in (losses(torch.float32), losses(torch.bfloat16)):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert {loss.dtype for loss in expected} == {torch.float32}


# Scores, confidence, codes: properties 11 and 13


@few
@given(seed=seeds, scale=st.floats(0, 100))
def test_codes_of_a_fresh_confidence_lie_in_their_range(seed: int, scale: float) -> None:
    logits = scale * normal(8, 5, seed=seed)
    scores = max_log_softmax(logits)
    assert (scores <= 0).all()
    assert (scores >= -math.log(5) - 1e-12).all()
    confidence = Confidence().double()(scores)
    assert (confidence <= 0.5).all()
    plain, renormalised = teacher_codes(confidence, False), teacher_codes(confidence)
    torch.testing.assert_close(plain.sum(1), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(renormalised.sum(1), torch.ones(8, dtype=torch.float64))
    assert torch.equal(plain[:, 0], confidence)
    torch.testing.assert_close(renormalised[:, 0], torch.sigmoid(2 * confidence - 1))
    assert (renormalised[:, 0] > 0.2689).all()
    assert (renormalised[:, 0] <= 0.5).all()


def test_scores_rise_with_what_is_known() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    for score in SCORES.values():
        found = score(logits)
        assert found[0] > found[1] > found[2]
    lowest = SCORES["max_log_softmax"](logits)[2].item(), SCORES["energy"](logits)[2].item()
    assert lowest == pytest.approx((-math.log(3), math.log(3)))
    # The energy knows how large logits are, probabilities do not.
    assert torch.allclose(SCORES["max_log_softmax"](logits + 5), SCORES["max_log_softmax"](logits))
    assert torch.allclose(SCORES["energy"](logits + 5), SCORES["energy"](logits) + 5)


def test_head_reads_probabilities() -> None:
    head, logits = Head(7).double(), normal(5, 7)
    found = head(logits)
    torch.testing.assert_close(found, head(logits + normal(5, 1, seed=1)))
    assert torch.equal(found, F.linear(logits.log_softmax(1), head.fc.weight, head.fc.bias).softmax(1))


def test_who_gets_which_gradient() -> None:
    """Real rows tie the student alone; codes reach the synthesised rows through student and through fixed teacher."""
    teacher, student, head, confidence = MLP(6, 3, 5), MLP(6, 5, 5), Head(5), Confidence()
    for module in (teacher, student, head, confidence):
        module.double()
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    made, real = normal(4, 6, seed=1).abs().requires_grad_(), normal(6, 6, seed=2).abs()
    labels = torch.tensor([3, 3, 4, 4, 0, 1, 2, 0, 1, 2])
    mixed = torch.cat([made, real])
    ours, theirs = student(mixed), teacher(mixed)
    inside = embedding_loss(theirs.embedding[4:], ours.embedding[4:], labels[4:])
    inside = inside + label_loss(theirs.logits[4:], ours.logits[4:, :3])
    given = [*head.parameters(), *confidence.parameters()]
    assert all(gradient is None for gradient in gradients(inside, *given))
    assert not gradients(inside, made)[0].any()
    assert all(gradient.any() for gradient in gradients(inside, *student.parameters()))

    answers, knowledge = head(ours.logits), teacher_codes(confidence(max_log_softmax(theirs.logits)))
    outside = distribution_loss(answers, knowledge, labels)
    assert all(gradient.any() for gradient in gradients(outside, made, *given, *student.embedding.parameters()))
    paths = [
        gradients(distribution_loss(*pair, labels), made)[0]
        for pair in ((answers, knowledge.detach()), (answers.detach(), knowledge))
    ]
    assert all(path.any() for path in paths)
    torch.testing.assert_close(paths[0] + paths[1], gradients(outside, made)[0])


def test_no_gradient_reaches_the_teacher_of_real_rows() -> None:
    teacher, student, labels = normal(4, 3, seed=1).requires_grad_(), normal(4, 3, seed=2).requires_grad_(), classes(4)
    for loss in (embedding_loss(teacher, student, labels), label_loss(teacher, student)):
        assert gradients(loss, teacher) == (None,)


# Property 16


@pytest.mark.parametrize("count", [10, 200])
def test_fresh_classifiers_know_nothing(count: int) -> None:
    torch.manual_seed(0)
    student = MLP(64, count, 128)
    initialise(student.embedding)
    features, labels = torch.rand(500, 64), torch.randint(count, (500,))
    assert F.cross_entropy(student(features).logits, labels).item() == pytest.approx(math.log(count), rel=0.02)
    initialise(student)
    assert F.cross_entropy(student(features).logits, labels).item() == pytest.approx(math.log(count), rel=0.02)


# What is refused


def test_inputs_that_do_not_go_together_are_refused() -> None:
    a, b, labels = normal(4, 3), normal(5, 3), classes(4)
    for call, words in (
        (lambda: embedding_loss(a, b, labels), r"\(5, 3\).*\(4, 3\)"),
        (lambda: embedding_loss(a, normal(4, 2), labels), r"\(4, 2\).*\(4, 3\)"),
        (lambda: embedding_loss(a, a, classes(5)), r"labels \(5,\)"),
        (lambda: embedding_loss(a[0], a[0], labels), "not matrices"),
        (lambda: embedding_loss(a[:0], a[:0], labels[:0]), "empty"),
        (lambda: embedding_loss(a, a, labels, form="prob"), "prob"),
        (lambda: label_loss(a, b), r"\(5, 3\).*\(4, 3\)"),
        (lambda: label_loss(a, a, form="triple"), "triple"),
        (lambda: distribution_loss(codes(4), codes(3), labels), r"\(4, 2\).*\(3, 2\)"),
        (lambda: distribution_loss(codes(4), codes(4), labels[:, None]), r"labels \(4, 1\)"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
