"""LGTM by its card's section 7, against definitions worked out in full, in float64; then its learner."""

import copy
import hashlib
import io
import itertools
import math
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jvp

from data.errors import UserError
from models.text import Bert
from stages.distill import lgtm
from stages.distill.lgtm import Loss, Motion, derivative, difference, influence, influence_cotangent, soft_label_loss
from stages.training import AdamW, Companion, Context, Run, Stopped, evaluating, peek, train

sys.path.insert(0, str(Path(__file__).parent))
import mutual

LOSSES: tuple[Loss, ...] = ("teacher_kl", "student_kl")
TAU, ALPHA, TEACHER_ALPHA = 1.7, 0.8, 0.4


@pytest.fixture(scope="module")
def run() -> Run:
    return mutual.run()


class Case:
    """Two small networks, a training batch, a held-out batch, and v."""

    def __init__(self, seed: int = 0, samples: int = 5) -> None:
        self.student, self.teacher = (network.double() for network in mutual.networks(seed=seed))
        self.x, self.y = mutual.samples(seed + 10, samples, 6, 4)
        self.held_x, self.held_y = mutual.samples(seed + 20, 7, 6, 4)
        self.theirs, self.ours = list(self.teacher.parameters()), list(self.student.parameters())
        self.v = torch.autograd.grad(F.cross_entropy(self.student(self.held_x), self.held_y), self.ours)
        self.norm = mutual.flat(self.v).norm().item()

    def moved(self, epsilon: float) -> Tensor:
        names = [name for name, _ in self.student.named_parameters()]
        weights = [w.detach() + epsilon * v for w, v in zip(self.ours, self.v, strict=True)]
        return functional_call(self.student, dict(zip(names, weights, strict=True)), (self.x,))

    def difference(self, epsilon: float) -> Motion:
        return difference(self.moved(epsilon), self.moved(-epsilon), epsilon, TAU)

    def derivative(self, temperature: float = TAU) -> Motion:
        names = [name for name, _ in self.student.named_parameters()]

        def answers(*weights: Tensor) -> Tensor:
            return functional_call(self.student, dict(zip(names, weights, strict=True)), (self.x,))

        return derivative(*jvp(answers, tuple(w.detach() for w in self.ours), self.v), temperature)

    def product(self, motion: Motion, loss: Loss) -> Tensor:
        """g_inf by one product with the teacher's Jacobian."""
        logits = self.teacher(self.x)
        cotangent = influence_cotangent(motion, logits, self.weight(loss), loss, TAU)
        return mutual.flat(torch.autograd.grad(logits, self.theirs, cotangent))

    @staticmethod
    def weight(loss: Loss) -> float:
        return TEACHER_ALPHA if loss == "teacher_kl" else ALPHA

    def losses(self, loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
        """Of every sample, both graphs attached."""
        log_s, log_t = (x.div(TAU).log_softmax(1) for x in (student, teacher))
        target, learner = (log_s, log_t) if loss == "teacher_kl" else (log_t, log_s)
        return (target.exp() * (target - learner)).sum(1)

    def truth(self, loss: Loss) -> Tensor:
        """g_inf by differentiating twice."""
        value = self.weight(loss) * self.losses(loss, self.student(self.x), self.teacher(self.x)).mean()
        first = torch.autograd.grad(value, self.ours, create_graph=True)
        along = sum((v * g).sum() for v, g in zip(self.v, first, strict=True))
        return mutual.flat(torch.autograd.grad(along, self.theirs))


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("loss", LOSSES)
def test_property_1_the_difference_converges_with_the_square_of_the_radius(loss: Loss) -> None:
    case = Case()
    truth = case.truth(loss)
    radii = (0.1, 0.03, 0.01, 0.003)
    errors = [relative(case.product(case.difference(r / case.norm), loss), truth) for r in radii]
    for (r, error), (s, smaller) in itertools.pairwise(zip(radii, errors, strict=True)):
        assert math.log(error / smaller) / math.log(r / s) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("epsilon", [1e-4, 1e-2, 0.3, 5.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_property_2_one_product_is_the_difference_of_two_passes_at_any_epsilon(loss: Loss, epsilon: float) -> None:
    case = Case()
    sides = []
    for shift in (epsilon, -epsilon):
        logits = case.teacher(case.x)
        value = case.weight(loss) * case.losses(loss, case.moved(shift), logits).mean()
        # The labels' part of the teacher's loss is the same on both sides.
        value = value + (1 - TEACHER_ALPHA) * F.cross_entropy(logits, case.y)
        sides.append(mutual.flat(torch.autograd.grad(value, case.theirs)))
    expected = (sides[0] - sides[1]) / (2 * epsilon)
    found = case.product(case.difference(epsilon), loss)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13 / epsilon)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", LOSSES)
def test_property_3_the_closed_form_is_the_second_derivative(loss: Loss, seed: int) -> None:
    case = Case(seed)
    motion = case.derivative()
    torch.testing.assert_close(case.product(motion, loss), case.truth(loss), rtol=1e-10, atol=1e-15)
    for rows in (motion.probabilities, influence_cotangent(motion, case.teacher(case.x), 1.0, loss, TAU)):
        assert rows.sum(1).abs().max() < 1e-15


def test_property_4_the_students_influence_is_the_bilevel_gradient() -> None:
    """d L_val(th_s - eta grad L_s) / d th_t, with the virtual step in the graph, against -eta g_inf."""
    case, eta = Case(), 0.3
    names = [name for name, _ in case.student.named_parameters()]
    logits = case.student(case.x)
    soft = case.losses("student_kl", logits, case.teacher(case.x)).mean()
    loss = ALPHA * soft + (1 - ALPHA) * F.cross_entropy(logits, case.y)
    gradient = torch.autograd.grad(loss, case.ours, create_graph=True)
    virtual = [w - eta * g for w, g in zip(case.ours, gradient, strict=True)]
    value = F.cross_entropy(
        functional_call(case.student, dict(zip(names, virtual, strict=True)), (case.held_x,)), case.held_y
    )
    case.v = torch.autograd.grad(value, virtual, retain_graph=True)
    expected = mutual.flat(torch.autograd.grad(value, case.theirs))
    found = -eta * case.product(case.derivative(), "student_kl")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", LOSSES)
def test_the_influence_is_that_of_every_samples_own_gradient(loss: Loss, seed: int) -> None:
    case = Case(seed)
    expected, central = [], []
    epsilon = 0.01
    for index in range(len(case.x)):
        one = case.losses(loss, case.student(case.x), case.teacher(case.x))[index]
        gradient = torch.autograd.grad(one, case.ours)
        expected.append(sum((v * g).sum() for v, g in zip(case.v, gradient, strict=True)))
        ends = [case.losses(loss, case.moved(e), case.teacher(case.x))[index] for e in (epsilon, -epsilon)]
        central.append((ends[0] - ends[1]) / (2 * epsilon))
    logits = case.teacher(case.x)
    torch.testing.assert_close(influence(case.derivative(), logits, loss, TAU), torch.stack(expected))
    found = influence(case.difference(epsilon), logits, loss, TAU)
    torch.testing.assert_close(found, torch.stack(central), rtol=1e-9, atol=1e-12)


def test_the_closed_form_of_the_influence() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t, u = (torch.randn(9, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = (((s / TAU).softmax(1) - (t / TAU).softmax(1)) * u).sum(1) / TAU
    torch.testing.assert_close(influence(derivative(s, u, TAU), t, temperature=TAU), expected)


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 7), st.floats(0.3, 5))
@settings(max_examples=40, deadline=None)
def test_soft_labels_against_their_definition(seed: int, samples: int, classes: int, tau: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    learner, target = (3 * torch.randn(samples, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    learner.requires_grad_()
    target.requires_grad_()
    loss = soft_label_loss(learner, target, tau)
    q, p = ([[math.exp(z / tau) for z in row] for row in x.tolist()] for x in (target, learner))
    q, p = ([[e / sum(row) for e in row] for row in x] for x in (q, p))
    expected = sum(b * math.log(b / a) for x, y in zip(p, q, strict=True) for a, b in zip(x, y, strict=True)) / samples
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    loss.backward()
    assert target.grad is None
    slope = ((learner / tau).softmax(1) - (target / tau).softmax(1)) / (tau * samples)
    torch.testing.assert_close(learner.grad, slope.detach())


@pytest.mark.parametrize(
    ("shapes", "tau", "message"),
    [
        (((2, 3), (2, 4)), 1.0, r"differ in shape \(\(2, 3\) and \(2, 4\)\)"),
        (((2, 3, 4), (2, 3, 4)), 1.0, r"non-empty \(B, classes\) arrays"),
        (((0, 3), (0, 3)), 1.0, r"non-empty \(B, classes\) arrays"),
        (((2, 3), (2, 3)), 0.0, r"positive and finite \(0.0\)"),
        (((2, 3), (2, 3)), math.nan, r"positive and finite \(nan\)"),
    ],
)
def test_wrong_logits_are_named(shapes: tuple[tuple[int, ...], ...], tau: float, message: str) -> None:
    a, b = (torch.zeros(shape) for shape in shapes)
    for function in (soft_label_loss, derivative, lambda a, b, tau: difference(a, b, 0.1, tau)):
        with pytest.raises(ValueError, match=message):
            function(a, b, tau)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_values_are_in_float32_or_wider(dtype: torch.dtype) -> None:
    a, b = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype), torch.zeros(3, 4, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for motion in (derivative(a, b + 1), difference(a, b, 0.1)):
        values = [*motion, influence(motion, b), influence_cotangent(motion, b, 1.0), soft_label_loss(a, b)]
        assert all(value.dtype == wide for value in values)


@pytest.mark.parametrize("right", [True, False])
def test_property_6_the_sign_says_whether_a_sample_helps(right: bool) -> None:
    """One sample, also held out, and a teacher that is sure of class 2: its gradient is v where that is the label."""
    case = Case(samples=1)
    label = torch.tensor([2 if right else 0])
    case.v = torch.autograd.grad(F.cross_entropy(case.student(case.x), label), case.ours)
    sure = torch.tensor([[0.0, 0.0, 60.0, 0.0]], dtype=torch.float64)
    found = influence(case.derivative(temperature=1.0), sure).item()
    if right:
        assert found == pytest.approx(mutual.flat(case.v).norm().item() ** 2)
    else:
        assert found < 0


def test_property_7_first_order() -> None:
    """The held-out loss falls by eta times the mean influence, for a small plain step."""
    case, eta = Case(), 1e-5
    soft = case.losses("student_kl", case.student(case.x), case.teacher(case.x)).mean()
    gradient = torch.autograd.grad(soft, case.ours)
    before = F.cross_entropy(case.student(case.held_x), case.held_y)
    with torch.no_grad():
        torch._foreach_add_(case.ours, gradient, alpha=-eta)
        change = F.cross_entropy(case.student(case.held_x), case.held_y) - before
        torch._foreach_add_(case.ours, gradient, alpha=eta)
    expected = -eta * influence(case.derivative(), case.teacher(case.x), temperature=TAU).mean().item()
    assert change.item() == pytest.approx(expected, rel=1e-3)


def test_property_8_equal_answers_make_both_losses_alike() -> None:
    case = Case()
    logits = case.student(case.x).detach() + 3.0  # a shift that softmax does not see
    motion = case.derivative()
    a, b = (influence_cotangent(motion, logits, 0.7, loss, TAU) for loss in LOSSES)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-16)
    for loss in LOSSES:
        assert influence(motion, logits, loss, TAU).abs().max() < 1e-15


@pytest.mark.parametrize("loss", LOSSES)
def test_property_13_order_and_repetition_of_samples(loss: Loss) -> None:
    case = Case()
    order = torch.tensor([3, 0, 4, 1, 2])
    whole = influence(case.derivative(), case.teacher(case.x), loss, TAU), case.product(case.derivative(), loss)
    x = case.x
    case.x = x[order]
    torch.testing.assert_close(influence(case.derivative(), case.teacher(case.x), loss, TAU), whole[0][order])
    torch.testing.assert_close(case.product(case.derivative(), loss), whole[1])
    case.x = torch.cat([x, x])
    torch.testing.assert_close(case.product(case.derivative(), loss), whole[1])


# --- optimisers


def optimizers() -> list[Any]:
    sgd = partial(torch.optim.SGD, lr=9.0)
    return [
        pytest.param(AdamW, id="adamw"),
        pytest.param(partial(AdamW, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-3), id="adamw, decay"),
        pytest.param(sgd, id="sgd"),
        pytest.param(partial(sgd, weight_decay=0.1, momentum=0.9), id="sgd, momentum"),
        pytest.param(partial(sgd, momentum=0.9, nesterov=True), id="sgd, nesterov"),
        pytest.param(partial(sgd, momentum=0.9, dampening=0.3, maximize=True), id="sgd, dampening"),
    ]


def parts(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((37, 5), (5,), (3, 4, 2), ())
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", optimizers())
def test_property_10_peek_is_the_next_update_bit_for_bit(build: Callable[..., Any], dtype: torch.dtype) -> None:
    parameters = [part.requires_grad_() for part in parts(dtype, 0)]
    optimizer = build(parameters)
    for step in range(4):
        rate = 0.1 / (step + 1)
        gradients: list[Tensor | None] = list(parts(dtype, 10 + step))
        gradients[0] = parts(dtype, 20 + step)[0].t().contiguous().t()  # as autograd gives those of linear layers
        gradients[1] = gradients[1].mean().expand(5) if step == 2 else gradients[1]  # type: ignore[union-attr]
        gradients[step % 2 + 1] = None
        before = digest((optimizer.state_dict(), parameters))
        peeked = peek(optimizer, parameters, gradients, rate)
        assert digest((optimizer.state_dict(), parameters)) == before
        assert not any(x.requires_grad for x in peeked)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for ours, real, gradient in zip(peeked, parameters, gradients, strict=True):
            assert torch.equal(ours, real)
            # An untouched one is not copied.
            assert (ours.data_ptr() == real.data_ptr()) == (gradient is None)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_that_of_the_card(decay: float) -> None:
    """Card 3.5, written down here; a parameter without gradient now and then counts its own updates."""
    parameters = [part.requires_grad_() for part in parts(torch.float64, 0)]
    optimizer = AdamW(parameters, weight_decay=decay)
    mine = [[p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p), 0] for p in parameters]
    for step in range(6):
        rate = 0.1 / (step + 1)
        optimizer.param_groups[0]["lr"] = rate
        for index, (parameter, gradient) in enumerate(zip(parameters, parts(torch.float64, 5 + step), strict=True)):
            parameter.grad = None
            if index == 1 and step in (0, 3):
                continue
            parameter.grad = gradient
            p, m, v, t = mine[index]
            t, m, v = t + 1, 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            p = p - rate * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (v.sqrt() + 1e-6)
            mine[index] = [p - rate * decay * p, m, v, t]
        optimizer.step()
        if step == 3:  # as a checkpoint does it
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = AdamW(parameters, weight_decay=decay)
            optimizer.load_state_dict(saved)
    for parameter, (p, *_) in zip(parameters, mine, strict=True):
        torch.testing.assert_close(parameter.detach(), p, rtol=1e-12, atol=1e-14)


def test_what_cannot_be_peeked_at_is_named() -> None:
    (parameter,) = parts(torch.float32, 0)[:1]
    with pytest.raises(TypeError, match=r"Adam cannot be peeked at · use stages.training.AdamW or torch.optim.SGD"):
        peek(torch.optim.Adam([parameter]), [parameter], [parameter], 0.1)
    with pytest.raises(TypeError, match="takes no closure"):
        AdamW([parameter]).step(lambda: 0.0)


# --- the learner


def literally(  # noqa: PLR0915 - as the card has it, from top to bottom
    ours: lgtm.Learner, context: Context, *, shared: bool = False
) -> None:
    """One step as the card's 3.3 and 3.4 say it, with copies, a student that is moved in place and three backward
    passes of the teacher; masks are drawn as the learner draws them.
    """
    task, parameters = ours._task, ours._parameters
    a, a_t, tau = parameters.alpha, parameters.teacher_alpha, parameters.temperature
    teacher, student = ours.modules["teacher"], ours.modules["student"]
    theirs, mine = list(teacher.parameters()), list(student.parameters())
    views, held = task.views(context), task.held_out(context)
    ours._draw_seeds()

    def run(network: nn.Module, x: Tensor, seed: str) -> Tensor:
        ours._reseed(seed)
        return network(x)

    def kl(target: Tensor, learner: Tensor) -> Tensor:
        p, q = (target.detach() / tau).softmax(1), (learner / tau).softmax(1)
        return (p * (p.log() - q.log())).sum(1).mean()

    def teachers(z_t: Tensor, z_s: Tensor) -> Tensor:
        return a_t * kl(z_s, z_t) + (1 - a_t) * F.cross_entropy(z_t, views.target)

    def students(z_s: Tensor, z_t: Tensor) -> Tensor:
        return a * kl(z_t, z_s) + (1 - a) * F.cross_entropy(z_s, views.target)

    def learn(name: str, gradients: Any) -> None:
        for parameter, gradient in zip(ours.modules[name].parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer = ours.optimizers[name]
        optimizer.param_groups[0]["lr"] = ours.schedules[name](context.counts[name])
        optimizer.step()
        optimizer.zero_grad()
        context.counts[name] += 1

    # Only the networks themselves collect statistics.
    z_t, z_s = run(teacher, views.teacher, "teacher"), run(student, views.student, "student")
    virtual = copy.deepcopy(student)
    optimizer = AdamW(virtual.parameters())
    optimizer.load_state_dict(copy.deepcopy(ours.optimizers["student"].state_dict()))
    optimizer.param_groups[0]["lr"] = ours.schedules["student"](context.counts["student"])
    for parameter, gradient in zip(
        virtual.parameters(), torch.autograd.grad(students(z_s, z_t), mine, retain_graph=True), strict=True
    ):
        parameter.grad = gradient
    optimizer.step()
    own = torch.autograd.grad(teachers(z_t, z_s), theirs, retain_graph=True)
    value = F.cross_entropy(run(virtual, held.student, "held out"), held.target)
    v = torch.autograd.grad(value, list(virtual.parameters()))
    epsilon = parameters.influence_radius / mutual.flat(v).norm().item()
    moved = copy.deepcopy(student)
    if not shared:
        moved.eval()
    sides = []
    for shift in (epsilon, -epsilon):
        with torch.no_grad():
            for place, weight, direction in zip(moved.parameters(), mine, v, strict=True):
                place.copy_(weight + shift * direction)
            answer = run(moved, views.student, "student")
        if shared:
            sides.append(torch.autograd.grad(teachers(z_t, answer), theirs, retain_graph=True))
        else:
            with evaluating(teacher):
                sides.append(torch.autograd.grad(teachers(teacher(views.teacher), answer), theirs))
    scale = ours.schedules["teacher"](context.counts["teacher"])
    if not isinstance(parameters.influence_scale, str):
        scale = parameters.influence_scale
    learn("teacher", [g - scale * (p - m) / (2 * epsilon) for g, p, m in zip(own, *sides, strict=True)])
    with torch.no_grad(), evaluating(teacher):
        instruction = teacher(views.teacher)
    if not shared:
        z_s = run(student, views.student, "student again")
    learn("student", torch.autograd.grad(students(z_s, instruction), mine))


@pytest.mark.parametrize("scale", ["teacher_lr", 1.0])
@pytest.mark.parametrize(
    ("dropout", "norm", "how"),
    [(0.0, False, "official"), (0.4, False, "official"), (0.4, False, "shared"), (0.2, True, "official")],
)
def test_a_step_is_that_of_the_card(dropout: float, norm: bool, how: str, scale: Any, run: Run) -> None:
    fields = {"influence_scale": scale, "temperature": TAU, "alpha": ALPHA, "dropout": how}
    ours, plain = (mutual.learner(run, mutual.toy(run, dropout=dropout, norm=norm), **fields) for _ in range(2))
    mutual.steps(ours, run, 4)
    context = Context(plain, run, 0)
    for step in range(4):
        context.begin(step)
        literally(plain, context, shared=how == "shared")
    for name, module in ours.modules.items():
        expected = mutual.weights(plain.modules[name])
        for key, tensor in mutual.weights(module).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-8, atol=1e-9, msg=f"{name}.{key}")


@pytest.mark.parametrize("form", ["difference", "exact"])
def test_the_shorter_way_gives_the_same(form: str, run: Run) -> None:
    """Without dropout fewer passes are needed; all of them give the same."""
    ours, long = (mutual.learner(run, influence_form=form, influence_scale=1.0) for _ in range(2))
    assert ours._steady
    long._steady = long._reuse = False
    mutual.steps(ours, run)
    mutual.steps(long, run)
    for name, module in ours.modules.items():
        for key, tensor in mutual.weights(module).items():
            torch.testing.assert_close(tensor, mutual.weights(long.modules[name])[key], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("dropout", "how", "expected"),
    [
        (0.0, "official", (2, 4)),
        (0.0, "shared", (2, 4)),
        (0.3, "shared", (2, 4)),
        (0.3, "official", (3, 5)),
    ],
)
def test_passes_are_not_made_twice(dropout: float, how: str, expected: tuple[int, int], run: Run) -> None:
    ours = mutual.learner(run, mutual.toy(run, dropout=dropout), dropout=how)
    counts = dict.fromkeys(ours.modules, 0)
    for name, module in ours.modules.items():
        module.register_forward_hook(lambda *_, name=name: counts.__setitem__(name, counts[name] + 1))
    mutual.steps(ours, run, 1)
    assert (counts["teacher"], counts["student"]) == expected


class Muted(lgtm.Learner):
    """All of the method, and then an influence of exactly 0."""

    def _apply(self, auxiliary: Tensor, logits: Tensor, cotangent: Tensor, context: Context) -> float:
        return super()._apply(auxiliary, logits, 0 * cotangent, context)


@pytest.mark.parametrize("how", ["official", "shared"])
@pytest.mark.parametrize(("dropout", "norm"), [(0.0, False), (0.3, False), (0.3, True)])
def test_property_5_without_influence_it_is_online_distillation_bit_for_bit(
    dropout: float, norm: bool, how: str, run: Run
) -> None:
    task = mutual.toy(run, dropout=dropout, norm=norm)
    muted = Muted(task, mutual.entry(influence_scale=1.0, dropout=how), run)
    mutual.steps(muted, run)
    other = mutual.toy(run, dropout=dropout, norm=norm)
    del other._streams["held_out"]
    online = mutual.learner(run, other, influence_scale=0, dropout=how)
    recorded = mutual.steps(online, run)
    for name in muted.modules:
        assert mutual.equal(mutual.weights(muted.modules[name]), mutual.weights(online.modules[name])), name
    assert recorded[0].keys() == {"loss/teacher", "loss/soft", "loss/task", "loss/student"}
    assert online.tables() == {}


def test_property_5_without_soft_labels_the_teacher_is_alone(run: Run) -> None:
    ends = []
    for seed in (0, 1):
        student, teacher = mutual.networks(seed=seed)[0], mutual.networks()[1]
        rows = mutual.samples(1, 24, 6, 4)
        task = mutual.Toy(run, student, teacher, rows, rows, batch=8)
        ours = mutual.learner(run, task, teacher_alpha=0.0, influence_scale=1.0)
        scalars = mutual.steps(ours, run)
        assert scalars[-1]["influence/logit_ratio"] == 0
        assert scalars[-1]["influence/mean"] != 0
        ends.append(mutual.weights(ours.modules["teacher"]))
    assert mutual.equal(*ends)


def digest(state: Any) -> str:
    """Of every bit of nested containers of tensors and numbers."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


class Watching(Context):
    """Calls back before and after every update, and keeps its gradients."""

    def __init__(self, learner: lgtm.Learner, run: Run) -> None:
        super().__init__(learner, run, 0)
        self.around: Callable[[str, bool], None] = lambda name, after: None
        self.gradients: dict[str, Tensor] = {}

    def update(self, names: Any, *rest: Any) -> None:
        self.around(names, False)
        super().update(names, *rest)
        self.around(names, True)

    def _apply(self, name: str, parameters: Any) -> None:
        self.gradients[name] = mutual.flat(p.grad for p in parameters if p.grad is not None)
        super()._apply(name, parameters)


@pytest.mark.parametrize("form", ["difference", "exact"])
@pytest.mark.parametrize(("dropout", "norm"), [(0.0, False), (0.3, True)])
def test_property_9_each_update_touches_its_own_network(form: str, dropout: float, norm: bool, run: Run) -> None:
    ours = mutual.learner(run, mutual.toy(run, dropout=dropout, norm=norm), influence_scale=1.0, influence_form=form)
    context = Watching(ours, run)

    def state(name: str, buffers: bool) -> str:
        module = ours.modules[name]
        tensors = dict(module.state_dict() if buffers else module.named_parameters())
        return digest((tensors, ours.optimizers[name].state_dict(), [p.grad for p in module.parameters()]))

    kept: dict[str, str] = {}
    seen = []

    def around(name: str, after: bool) -> None:
        if not seen:  # whatever comes before the teacher's update moves no weight, no moment and no .grad
            assert all(state(part, False) == before[part] for part in before)
        seen.append((name, after))
        other = "student" if name == "teacher" else "teacher"
        if after:
            assert state(other, True) == kept[other]
            assert state(name, True) != kept[name]
        else:
            kept.update({part: state(part, True) for part in ours.modules})
        assert all(p.grad is None for module in ours.modules.values() for p in module.parameters())
        assert all(part.training for module in ours.modules.values() for part in module.modules())

    mutual.steps(ours, run, 1)
    before = {name: state(name, False) for name in ours.modules}
    context.around = around
    context.begin(1)
    ours.step(context)
    assert seen == [("teacher", False), ("teacher", True), ("student", False), ("student", True)]
    if norm:
        # The student's own two passes, per step; the virtual and the perturbed ones leave no trace.
        assert int(dict(ours.student.named_buffers())["norm.num_batches_tracked"]) == 4


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("build", [AdamW, partial(AdamW, weight_decay=0.1)])
def test_property_10_the_virtual_student_is_what_a_real_step_would_make(
    build: Any, clip: float | None, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real update, made on a copy with the old teacher, at the first and at later steps."""
    ours = mutual.learner(run, mutual.toy(run, optimizer=build, clip=clip), alpha=ALPHA, temperature=TAU)
    seen: list[list[Tensor]] = []

    def spy(*arguments: Any) -> list[Tensor]:
        seen.append(peek(*arguments))
        return seen[-1]

    monkeypatch.setattr(lgtm, "peek", spy)
    context = Context(ours, run, 0)
    for step in range(3):
        context.begin(step)
        twin = mutual.learner(run, mutual.toy(run, optimizer=build, clip=clip), alpha=ALPHA, temperature=TAU)
        for name, module in ours.modules.items():
            twin.modules[name].load_state_dict(module.state_dict())
            twin.optimizers[name].load_state_dict(copy.deepcopy(ours.optimizers[name].state_dict()))
        other = Context(twin, run, 0)
        other.begin(step)
        other.counts.update(context.counts)
        twin.streams["train"].position = ours.streams["train"].position
        views = twin._task.views(other)
        logits = twin.student(views.student)
        soft = soft_label_loss(logits, twin.modules["teacher"](views.teacher), TAU)
        other.update("student", {"all": ALPHA * soft + (1 - ALPHA) * F.cross_entropy(logits, views.target)})
        ours.step(context)
        for virtual, real in zip(seen[-1], twin.student.parameters(), strict=True):
            torch.testing.assert_close(virtual, real.detach(), rtol=1e-12, atol=1e-15)


def test_property_12_zero_heads(run: Run) -> None:
    ours = mutual.learner(run, zero_heads=True, influence_scale=1.0)
    for module in ours.modules.values():
        assert not any(parameter.any() for parameter in module.layers[-1].parameters())
    directions = []
    teach = ours._teach
    ours._teach = lambda *a: (directions.append(a[2]), teach(*a))[1]  # type: ignore[method-assign]
    before = {name: mutual.weights(module) for name, module in ours.modules.items()}
    context = Watching(ours, run)
    context.begin(0)
    scalars = ours.step(context)
    assert scalars["loss/teacher"].item() == pytest.approx(0.6 * math.log(4))
    assert scalars["loss/held_out"].item() == pytest.approx(math.log(4))
    head = len(directions[0]) - 2
    # The two heads' probabilities are equal but for rounding, which is all that moves the virtual student.
    sizes = [v.abs().max().item() for v in directions[0]]
    assert max(sizes[:head]) < 1e-11
    assert sizes[head] > 1e-2
    weights = mutual.flat(ours.modules["teacher"].layers[-1].parameters()).numel()
    assert not context.gradients["teacher"][:-weights].any()
    assert context.gradients["teacher"][-weights:].any()
    for name, module in ours.modules.items():
        moved = {key for key, value in mutual.weights(module).items() if not torch.equal(value, before[name][key])}
        assert moved == {key for key in before[name] if key.startswith(f"layers.{len(module.layers) - 1}.")}, name


def test_a_network_without_a_head_is_named(run: Run) -> None:
    task = mutual.toy(run)
    task.teacher = nn.Linear(6, 4).double()
    with pytest.raises(UserError, match=r"zero_heads = true, but the teacher \(Linear\) has no classifier"):
        mutual.learner(run, task, zero_heads=True)


@pytest.mark.parametrize("form", ["difference", "exact"])
def test_property_15_no_direction_is_no_influence(form: str, run: Run) -> None:
    ours, online = mutual.learner(run, influence_scale=1.0, influence_form=form), mutual.learner(run, influence_scale=0)
    found = ours._direction
    ours._direction = lambda *a: (  # type: ignore[method-assign]
        [torch.zeros_like(v) for v in found(*a)[0]],
        torch.tensor(1.0),
    )
    scalars = mutual.steps(ours, run)
    mutual.steps(online, run)
    assert all(value.isfinite() for step in scalars for value in step.values())
    assert all(step["influence/epsilon"] == 0 and step["influence/mean"] == 0 for step in scalars)
    for name in ours.modules:
        assert mutual.equal(mutual.weights(ours.modules[name]), mutual.weights(online.modules[name]))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_direction_that_is_not_finite_stops_the_training(
    value: float, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ours = mutual.learner(run)
    found = ours._direction
    ours._direction = lambda *a: ([v * value for v in found(*a)[0]], torch.tensor(1.0))  # type: ignore[method-assign]
    with pytest.raises(UserError, match=rf"influence/norm became {value} at step 0 of 3"):
        train(ours, run, stage="distill", key="x", steps=3, seed=0, identity={})
    assert all(torch.isfinite(p).all() for module in ours.modules.values() for p in module.parameters())


@pytest.mark.parametrize("form", ["difference", "exact"])
def test_property_15_frozen_and_unused_weights_are_left_alone(form: str, run: Run) -> None:
    task = mutual.toy(run, optimizer=partial(AdamW, weight_decay=0.5))
    for network in (task.student, task.teacher):
        network.layers[0].requires_grad_(False)
        network.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    before = {name: mutual.weights(network) for name, network in (("student", task.student), ("teacher", task.teacher))}
    ours = mutual.learner(run, task, influence_form=form, influence_scale={"ratio": 0.5})
    mutual.steps(ours, run)
    for name, module in ours.modules.items():
        moved = {key for key, value in mutual.weights(module).items() if not torch.equal(value, before[name][key])}
        assert moved == {key for key in before[name] if not key.startswith(("layers.0", "unused"))}


def test_the_scale_is_what_is_asked_for(run: Run) -> None:
    for scale, expected in (("teacher_lr", 0.03), ("student_lr", 0.01), (2.5, 2.5)):
        ours = mutual.learner(run, influence_scale=scale, teacher_learning_rate=0.03)
        scalars = mutual.steps(ours, run)
        falls = [1.0, 1.0, 1.0] if scale == 2.5 else [1 - step / 12 for step in range(3)]
        assert [x["influence/scale"].item() for x in scalars] == pytest.approx([expected * part for part in falls])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_relative_scale_is_measured_and_held(dropout: float, run: Run) -> None:
    """On a step of measurement the two terms stand in the ratio that is asked for; then lambda stays as it is."""
    ours = mutual.learner(run, mutual.toy(run, dropout=dropout), influence_scale={"ratio": 0.25, "every": 3})
    context = Watching(ours, run)
    apply, norms, totals = ours._apply, [], []

    def measured(auxiliary: Tensor, logits: Tensor, cotangent: Tensor, context: Context) -> float:
        weights = list(ours.modules["teacher"].parameters())
        own = mutual.flat(torch.autograd.grad(auxiliary, weights, retain_graph=True))
        other = mutual.flat(torch.autograd.grad(logits, weights, cotangent, retain_graph=True))
        scale = apply(auxiliary, logits, cotangent, context)
        norms.append((own.norm().item(), scale * other.norm().item()))
        totals.append(own - scale * other)
        return scale

    ours._apply = measured  # type: ignore[method-assign]
    scales = []
    for step in range(5):
        context.begin(step)
        scales.append(ours.step(context)["influence/scale"].item())
        torch.testing.assert_close(context.gradients["teacher"], totals[-1], rtol=1e-10, atol=1e-14)
    for step in (0, 3):
        assert norms[step][1] == pytest.approx(0.25 * norms[step][0])
    assert scales[0] == scales[1] == scales[2] != scales[3] == scales[4]


def test_the_influence_of_every_sample_is_kept(run: Run) -> None:
    """Against sums written down here; what is written is rounded to six digits."""
    ours = mutual.learner(run, mutual.toy(run, steps=9), influence_scale=1.0)
    assert ours._task.steps_per_epoch == 3
    kept: dict[tuple[int, int], float] = {}
    seen: list[Any] = []
    views, measure = ours._task.views, ours._motion

    def look(context: Context) -> Any:
        seen.append(views(context))
        return seen[-1]

    def motion(*arguments: Any) -> Motion:
        seen.append((measure(*arguments), arguments[2]))
        return seen[-1][0]

    ours._task.views, ours._motion = look, motion  # type: ignore[method-assign]
    mutual.steps(ours, run, 7)
    for step, (batch, (found, logits)) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        values = influence(found, logits)
        kept |= {(int(row), step // 3): float(value) for row, value in zip(batch.rows, values, strict=True)}
    table = ours.tables()["influence"]
    assert list(table.columns) == ["row", "visits", "mean", "epoch_1", "epoch_2", "epoch_3"]
    assert sorted(table["row"]) == list(range(24))
    for line in table.to_dict("records"):
        mine = [kept.get((line["row"], epoch)) for epoch in range(3)]
        present = [value for value in mine if value is not None]
        assert line["visits"] == len(present)
        assert line["mean"] == float(f"{sum(present) / len(present):.6g}")
        for epoch, value in enumerate(mine):
            found = line[f"epoch_{epoch + 1}"]
            assert math.isnan(found) if value is None else found == float(f"{value:.6g}")
    assert ours.companions == {"teacher": Companion(ours.modules["teacher"])}


def test_a_row_twice_in_a_batch_counts_twice() -> None:
    ledger = lgtm.Ledger(2)
    ledger.add(torch.tensor([5, 2, 5]), 1, torch.tensor([1.0, 2.0, 4.0]))
    ledger.add(torch.tensor([7]), 0, torch.tensor([1.0]))
    table = ledger.table().set_index("row")
    assert list(table.index) == [2, 5, 7]
    assert table.loc[5, "visits"] == 2
    assert table.loc[5, "mean"] == table.loc[5, "epoch_2"] == 2.5


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (nn.Linear(2, 2), False),
        (nn.LayerNorm(2), False),
        (nn.Dropout(0.0), False),
        (nn.Dropout(0.1), True),
        (nn.MultiheadAttention(4, 2, dropout=0.1), True),
        (nn.MultiheadAttention(4, 2), False),
        (nn.LSTM(2, 2, num_layers=2, dropout=0.1), True),
        (nn.BatchNorm1d(2), True),
    ],
)
def test_what_train_mode_changes_is_found(part: nn.Module, expected: bool) -> None:
    assert lgtm.changes_in_training(nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"x": part}))) is expected


def bert(layers: int, dropout: float) -> Bert:
    return Bert(3, 40, 0, 1, layers=layers, hidden=8, heads=2, intermediate=16, positions=10, dropout=dropout)


def of_texts(run: Run, dropout: float) -> mutual.Toy:
    torch.manual_seed(3)
    tokens = torch.randint(2, 40, (24, 10))
    places, ends = torch.arange(10), torch.randint(3, 10, (24, 1))
    tokens = torch.where(places < ends, tokens, (places == ends).long())
    rows = tokens, torch.randint(3, (24,))
    return mutual.Toy(run, bert(1, dropout), bert(2, dropout), rows, rows, batch=8)


@pytest.mark.parametrize(("dropout", "how"), [(0.0, "official"), (0.2, "official"), (0.2, "shared")])
def test_on_transformers_both_forms_agree(dropout: float, how: str, run: Run) -> None:
    found, detected = {}, dropout > 0
    for form in ("difference", "exact"):
        fields = {"influence_form": form, "influence_radius": 1e-3, "dropout": how, "influence_scale": 1.0}
        ours = mutual.learner(run, of_texts(run, dropout), **fields)
        assert ours._steady is not detected
        found[form] = mutual.steps(ours, run, 1)[0]
    for name, value in found["difference"].items():
        torch.testing.assert_close(value, found["exact"][name], rtol=1e-4, atol=1e-7, msg=name)
    assert found["exact"]["influence/highest"] > found["exact"]["influence/lowest"]


@pytest.mark.parametrize("form", ["difference", "exact"])
@pytest.mark.parametrize("how", ["official", "shared"])
def test_bfloat16_keeps_what_is_recorded_in_float32(form: str, how: str) -> None:
    mixed, plain = mutual.run("bf16-mixed"), mutual.run("32-true")
    found, passes = [], []
    for where in (mixed, plain):
        ours = mutual.learner(where, of_texts(where, 0.0), influence_form=form, dropout=how, influence_scale=1.0)
        ours.student.register_forward_hook(lambda *a: passes.append((torch.is_grad_enabled(), a[2].logits.dtype)))
        found.append(mutual.steps(ours, where, 2)[0])
    assert all(value.dtype == torch.float32 and value.isfinite() for value in found[0].values())
    # The perturbed students are not rounded: 8 bits would leave little of a change this small.
    kinds = set(passes[: len(passes) // 2])
    assert kinds == {(True, torch.bfloat16), (False, torch.float32)}
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=0.05, atol=1e-3, msg=name)


@pytest.mark.parametrize("scale", ["teacher_lr", {"ratio": 0.5, "every": 4}])
def test_resumed_equals_uninterrupted(scale: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def fresh() -> lgtm.Learner:
        return mutual.learner(run, mutual.toy(run, dropout=0.3), influence_scale=scale, zero_heads=True)

    def trained(ours: lgtm.Learner, key: str) -> lgtm.Learner:
        train(ours, run, stage="distill", key=key, steps=12, seed=7, identity={})
        return ours

    whole = trained(fresh(), "whole")
    stopped = fresh()
    step = stopped.step

    def stop_at_five(context: Context) -> Any:
        if context.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(context)

    stopped.step = stop_at_five  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        trained(stopped, "stopped")
    resumed = trained(fresh(), "stopped")
    for name, module in whole.modules.items():
        assert mutual.equal(mutual.weights(module), mutual.weights(resumed.modules[name]))
    assert whole.tables()["influence"].equals(resumed.tables()["influence"])
    assert whole.tables()["influence"]["visits"].sum() == 12 * 8
