"""VDD's equations against automatic differentiation and quadrature, and the properties of its card (section 7)."""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from models.policy import BESO, DDPM, Output, cosine_schedule, factors, log_components
from stages.distill import em
from stages.distill.vdd import ascend, clean_score, draw, entropies, log_densities, noise_levels, responsibilities
from stages.experts import data_responsibilities, gate_loss
from stages.parameters.policy import Anneal, Last, Steps, Uniform

sys.path.insert(0, str(Path(__file__).parent))
from gaussians import Gaussians, plain_ascent, square

few = settings(max_examples=30, deadline=None)
sizes = st.fixed_dictionaries({
    "states": st.integers(1, 4),
    "experts": st.integers(1, 5),
    "samples": st.integers(1, 3),
    "actions": st.integers(1, 10),
    "diagonal": st.booleans(),
    "seed": st.integers(0, 2**31),
})  # fmt: skip
Score = Callable[[Tensor], Tensor]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """More only wait for each other with arrays as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Problem(NamedTuple):
    """Experts, noise and scores of a random problem, in float64."""

    experts: Output
    noise: Tensor
    score: Tensor

    @property
    def samples(self) -> Tensor:
        return draw(self.experts.mean, self.experts.factor, self.noise)


def problem(
    states: int = 3, experts: int = 4, samples: int = 2, actions: int = 3, diagonal: bool = False, seed: int = 0
) -> Problem:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    shape = states, experts, actions
    factor = (0.5 * normal(*shape)).exp()
    if not diagonal:
        factor = torch.diag_embed(factor) + 0.5 * normal(*shape, actions).tril(-1)
    output = Output(normal(*shape), factor, normal(states, experts).log_softmax(1))
    return Problem(output, normal(samples, *shape), normal(states, experts, samples, actions))


def close(actual: Tensor, expected: Tensor, relative: float = 1e-9, message: str = "") -> None:
    """Within a share of the largest expected number."""
    scale = max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * scale, msg=lambda text: f"{message}: {text}")


def quadrature() -> tuple[Tensor, Tensor]:
    """Nodes and weights of expectations over a standard normal number, by the trapezoidal rule."""
    nodes = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    return nodes, (-0.5 * nodes**2).softmax(0)


# The closed forms (card 3.2, property 3)


@given(sizes, st.sampled_from(["gate", "none"]), st.sampled_from(["sum", "mean"]), st.booleans())
@few
def test_property_3_gradients_are_those_of_automatic_differentiation(
    size: dict[str, Any], weight: str, reduction: str, lagging: bool
) -> None:
    found = problem(**size)
    lagged = problem(**{**size, "seed": size["seed"] + 1}).experts if lagging else None
    ours = ascend(*found[:2], found.samples, found.score, lagged=lagged, weight=weight, reduction=reduction)
    plain = plain_ascent(*found, lagged, weight, reduction)
    for name, value in plain.items():
        # Conditioned badly, ten dimensions cost some digits on both sides.
        close(getattr(ours, name), value, 1e-8, name)


@given(sizes)
@few
def test_densities_and_entropies_are_those_of_torch(size: dict[str, Any]) -> None:
    found = problem(**size)
    mean, factor, _ = found.experts
    torch_own = MultivariateNormal(mean, scale_tril=square(factor))
    points = found.samples.flatten(1, 2)
    expected = torch.stack([torch_own.log_prob(point[:, None].expand_as(mean)) for point in points.unbind(1)], 2)
    close(log_densities(points, mean, factor), expected)
    close(entropies(factor), torch_own.entropy())
    one = points[:, 0]
    close(log_components(found.experts, one), expected[..., 0])


@given(sizes)
@few
def test_samples_are_mean_and_factor_times_noise(size: dict[str, Any]) -> None:
    experts, noise, _ = found = problem(**size)
    for v, n, k in itertools.product(*map(range, noise.shape[:3])):
        expected = experts.mean[n, k] + square(experts.factor)[n, k] @ noise[v, n, k]
        close(found.samples[n, k, v], expected)


def test_property_3_the_expected_gradient_is_that_of_the_divergence() -> None:
    """J = KL(q || teacher) by quadrature, differentiated by finite differences, in one dimension."""
    experts = problem(states=1, experts=3, actions=1, seed=4).experts
    truth = mixture([0.3, 0.7], [[-1.0], [1.5]], [[0.5], [0.8]])
    nodes, shares = quadrature()
    noise = nodes[:, None, None, None].expand(-1, 1, 3, 1)

    def divergence(mean: Tensor, factor: Tensor) -> float:
        points = draw(mean, factor, noise).flatten(1, 2)
        joint = experts.log_gate[..., None] + log_densities(points, mean, factor)
        gap = joint.logsumexp(1)[0] - truth.log_density(points[0])
        return float(((gap.view(3, -1) * shares).sum(1) * experts.log_gate[0].exp()).sum())

    def moved(which: int, expert: int, by: float) -> float:
        parts = [part.clone() for part in experts[:2]]
        parts[which][0, expert] += by
        return divergence(*parts)

    # Every node is a state with one sample, and the mean over states has their shares.
    many = Output(*(part.expand(len(nodes), *part.shape[1:]) for part in experts))
    each = nodes[None, :, None, None].expand(1, -1, 3, 1)
    points = draw(many.mean, many.factor, each)
    step = ascend(many, each, points, truth.score(points))
    for which, found in enumerate((step.mean, step.factor)):
        expected = [(moved(which, k, 1e-4) - moved(which, k, -1e-4)) / 2e-4 for k in range(3)]
        assert (len(nodes) * shares @ found.view(len(nodes), 3)).tolist() == pytest.approx(expected, abs=1e-7)


# The bound (properties 1 and 2)


@given(sizes)
@few
def test_property_1_responsibilities_are_probabilities(size: dict[str, Any]) -> None:
    found = problem(**size)
    own = responsibilities(found.samples, found.experts, found.noise)
    assert (own.log <= 0).all()
    points = found.samples.flatten(1, 2)
    joint = found.experts.log_gate[..., None] + log_densities(points, *found.experts[:2])
    every = joint.softmax(1)
    close(every.sum(1), torch.ones_like(every[:, 0]), 1e-12)
    shaped = joint.log_softmax(1).unflatten(2, found.samples.shape[1:3])
    close(own.log, shaped.diagonal(dim1=1, dim2=2).movedim(2, 1))
    for action in points.unbind(1):
        shares = data_responsibilities(found.experts, action)
        close(shares.sum(1), torch.ones_like(shares[:, 0]), 1e-12)


@given(sizes)
@few
def test_property_2_the_tight_bound_is_the_divergence_at_every_sample(size: dict[str, Any]) -> None:
    """log q_k - log r_k + log pi_k = log q, whatever the teacher."""
    found = problem(**size)
    mean, factor, log_gate = found.experts
    joint = log_gate[..., None] + log_densities(found.samples.flatten(1, 2), mean, factor)
    own = joint.unflatten(2, found.samples.shape[1:3]).diagonal(dim1=1, dim2=2).movedim(2, 1)
    tight = own - responsibilities(found.samples, found.experts, found.noise).log
    close(tight, joint.logsumexp(1).view_as(tight), 1e-12)


@given(st.integers(1, 5), st.integers(0, 2**31))
@few
def test_property_2_other_responsibilities_loosen_it_by_a_divergence(count: int, seed: int) -> None:
    """U(rt) - J = E_q KL(q(z|a) || rt(z|a)), which is not negative, by quadrature in one dimension."""
    experts, other = (problem(1, count, 1, 1, seed=each).experts for each in (seed, seed + 1))
    nodes, shares = quadrature()
    noise = nodes[:, None, None, None].expand(-1, 1, count, 1)
    samples = draw(experts.mean, experts.factor, noise)
    points = samples.flatten(1, 2)
    ours, theirs = (
        (each.log_gate[..., None] + log_densities(points, *each[:2])).log_softmax(1) for each in (experts, other)
    )
    divergence = (ours.exp() * (ours - theirs)).sum(1).view(count, -1)
    gap = responsibilities(samples, experts, noise).log[0] - responsibilities(samples, other).log[0]
    weights = experts.log_gate[0].exp()[:, None] * shares
    assert (divergence >= -1e-12).all()
    torch.testing.assert_close((weights * gap).sum(), (weights * divergence).sum(), rtol=0, atol=1e-9)


# Symmetries, one expert, far samples (properties 5, 10, 13)


def test_property_5_one_expert_explains_everything() -> None:
    found = problem(experts=1)
    own = responsibilities(found.samples, found.experts, found.noise)
    assert not own.log.any()
    assert not own.slope.any()
    gate = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
    loss = gate_loss(gate.log_softmax(1), data_responsibilities(found.experts, found.samples[:, 0, 0]))
    assert loss == 0
    assert not torch.autograd.grad(loss, gate)[0].any()


@given(sizes)
@few
def test_property_10_permuted_experts_permute_everything(size: dict[str, Any]) -> None:
    (experts, noise, score) = found = problem(**size)
    order = torch.randperm(size["experts"], generator=torch.Generator().manual_seed(size["seed"]))
    other = Output(*(part[:, order] for part in experts))
    step = ascend(experts, noise, found.samples, score)
    permuted = ascend(other, noise[:, :, order], found.samples[:, order], score[:, order])
    close(permuted.loss, step.loss)
    for name in ("mean", "factor", "objective", "log_responsibility", "entropy"):
        close(getattr(permuted, name), getattr(step, name)[:, order], message=name)
    actions = found.samples[:, 0, 0]
    close(data_responsibilities(other, actions), data_responsibilities(experts, actions)[:, order])


def test_property_10_shifted_logits_change_nothing() -> None:
    experts, noise, score = found = problem()
    shifted = experts._replace(log_gate=(experts.log_gate + 7).log_softmax(1))
    steps = [ascend(each, noise, found.samples, score) for each in (experts, shifted)]
    for one, other in zip(*steps, strict=True):
        close(other, one, 1e-12)


@given(sizes, st.floats(0.1, 10))
@few
def test_property_10_in_another_unit_of_actions_responsibilities_stay(size: dict[str, Any], unit: float) -> None:
    (experts, noise, score) = found = problem(**size)
    other = experts._replace(mean=unit * experts.mean, factor=unit * experts.factor)
    step = ascend(experts, noise, found.samples, score)
    scaled = ascend(other, noise, unit * found.samples, score / unit)
    close(scaled.log_responsibility, step.log_responsibility, 1e-8)
    close(unit * scaled.mean, step.mean, 1e-8)
    close(unit * scaled.factor, step.factor, 1e-8)


@pytest.mark.parametrize("diagonal", [False, True])
def test_property_13_far_samples_are_right_in_single_precision(diagonal: bool) -> None:
    """Samples of two experts 20 deviations from all others: e^-200 is 0 in float32."""
    experts, noise, score = problem(states=2, experts=4, actions=2, diagonal=diagonal)
    deviation = square(experts.factor).diagonal(dim1=2, dim2=3).amax()
    places = 20 * deviation * torch.tensor([[0.0, 0], [0, 0.01], [1, 0], [0, 1]], dtype=torch.float64)
    experts = experts._replace(mean=places.expand(2, -1, -1).clone())
    far = draw(experts.mean, experts.factor, noise)[:, [2, 3, 0, 1]]  # each expert is asked about another's samples
    for samples in (far, draw(experts.mean, experts.factor, noise)):
        narrow = responsibilities(samples.float(), Output(*(part.float() for part in experts)))
        wide = responsibilities(samples, experts)
        assert all(part.isfinite().all() for part in narrow)
        for one, other in zip(narrow, wide, strict=True):
            close(one.double(), other, 1e-4)
    assert wide.log.amin() < -1e-3, "two experts overlap"
    assert wide.slope.abs().amax() > 1e-3
    assert (responsibilities(far, experts).log < -100).any()
    step = ascend(*(Output(*(part.float() for part in experts)), noise.float(), far.float(), score.float()))
    assert all(part.isfinite().all() for part in step)


# Teachers (property 11) and noise levels (card 3.3)


class Known(nn.Module):
    """What the network of a BESO or a DDPM says if it knows the truth of the only state."""

    def __init__(self, truth: Gaussians, kept: Tensor | None) -> None:
        super().__init__()
        self.truth, self.kept = truth, kept

    def forward(self, observations: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        points = noisy[:, 0]
        if self.kept is not None:
            own, noise = self.kept[level].sqrt(), 1 - self.kept[level]
            clean = self.truth.clean(points, own, noise)
            return ((points - own[:, None] * clean) / noise.sqrt()[:, None])[:, None]
        total = (level**2 + 0.25).sqrt()[:, None]
        clean = self.truth.clean(points * total, torch.ones_like(level), level**2)
        return ((clean - 0.25 / total * points) * total / (0.5 * level[:, None]))[:, None]


def known(name: str, truth: Gaussians) -> Any:
    """Scaled actions are raw ones."""
    size = truth.mean.shape[2]
    scaling = {
        "observation": {"mean": [0.0], "std": [1.0], "change": [1.0]},
        "action": {"mean": [0.0] * size, "std": [1.0] * size, "low": [-99.0] * size, "high": [99.0] * size},
    }
    interface = {"observations": 1, "actions": size, "scaling": scaling, "environment": None}
    network: dict[str, Any] = {"window": 1, "goals": 0, "backbone": BACKBONE}
    if name == "beso":
        karras = {"sigma_min": 0.1, "sigma_max": 1.0, "sigma_data": 0.5, "spread": 0.5, "rho": 5.0}
        teacher: Any = BESO(interface, {**network, **karras, "steps": 3, "sampler": "ddim"}).double()
        teacher.network = Known(truth, None)
    else:
        teacher = DDPM(interface, {**network, "steps": 8})
        teacher.kept = cosine_schedule(8)[1]
        teacher.network = Known(truth, teacher.kept)
    return teacher


BACKBONE = {"name": "mlp", "width": 2, "layers": 0, "dropout": 0.0, "residual": False}
NOTHING = torch.zeros(1, 1, 1, dtype=torch.float64)


def mixture(weights: list[float], means: Any, deviations: Any) -> Gaussians:
    """One state, in float64; independent coordinates."""
    covariance = torch.diag_embed(torch.tensor(deviations, dtype=torch.float64) ** 2)
    mean = torch.tensor(means, dtype=torch.float64)
    return Gaussians.make(torch.tensor([weights], dtype=torch.float64).log(), mean[None], covariance[None])


THREE = mixture([0.2, 0.5, 0.3], [[-1.5, 0.0], [1.0, 1.0], [0.5, -1.5]], [[0.3, 0.2], [0.25, 0.4], [0.4, 0.25]])


def slope(density: Score, points: Tensor) -> Tensor:
    points = points.clone().requires_grad_()
    return torch.autograd.grad(density(points).sum(), points)[0]


def test_property_11_scores_are_gradients_of_what_the_teacher_says() -> None:
    points = torch.randn(20, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.linspace(0.1, 1, 20, dtype=torch.float64)
    blurred = THREE.noisy(torch.ones(20), sigma**2)
    beso = known("beso", THREE)
    score = beso.score(points, NOTHING, sigma)
    close(score[:, 0], slope(blurred.log_density, points[:, 0]))
    close(points + sigma[:, None, None] ** 2 * score, beso.denoise(points, NOTHING, sigma))
    clean = THREE.clean(points[:, 0], torch.ones(20), sigma**2)
    close(points[:, 0] + sigma[:, None] ** 2 * score[:, 0], clean)

    ddpm, level = known("ddpm", THREE), torch.arange(20) % 7
    kept = ddpm.kept[level]
    noisy = THREE.noisy(kept.sqrt(), 1 - kept)
    close(ddpm.score(points, NOTHING, level)[:, 0], slope(noisy.log_density, points[:, 0]))
    widened = THREE.noisy(torch.ones(20), (1 - kept) / kept)
    close(clean_score(ddpm, points, NOTHING, level)[:, 0], slope(widened.log_density, points[:, 0]))


def test_levels_are_drawn_as_the_settings_say() -> None:
    random = torch.Generator().manual_seed(0)
    uniform = noise_levels(Uniform(kind="uniform", low=0.2, high=0.5), 20_000, 0.1, 0, random)
    assert 0.2 <= uniform.min() < 0.201
    assert 0.499 < uniform.max() <= 0.5
    assert uniform.mean() == pytest.approx(0.35, abs=0.003)
    assert noise_levels(Last(kind="last"), 9, 0.1, 5).tolist() == pytest.approx([0.1])
    anneal = Anneal(kind="anneal", low=0.2, high=1.0, iterations=4)
    found = [noise_levels(anneal, 9, 0.1, iteration).item() for iteration in range(7)]
    assert found == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    steps = noise_levels(Steps(kind="steps", low=1, high=4), 8000, 0, 0, random)
    assert steps.dtype == torch.int64
    counts = steps.bincount(minlength=6).tolist()
    assert counts[0] == counts[5] == 0
    assert all(1850 < count < 2150 for count in counts[1:5]), "both ends count"
    same = noise_levels(Steps(kind="steps", low=3, high=3), 10, 0, 0)
    assert same.tolist() == [3] * 10


# What it finds (properties 5 to 9)


def follow(
    score: Score,
    mean: Tensor,
    steps: int,
    samples: int,
    *,
    std: float = 1.0,
    rate: float = 0.05,
    demonstrations: Tensor | None = None,
    seed: int = 0,
) -> Output:
    """Experts (N, K, A) that follow a score by Adam, each state for itself, with a rate that falls linearly to 0.

    The gate follows demonstrations (D, A) of the only state; without them it stays uniform.
    """
    random = torch.Generator().manual_seed(seed)
    states, count, size = mean.shape
    raw = torch.zeros(states, count, size * (size + 1) // 2, dtype=torch.float64)
    logits = torch.zeros(states, count, dtype=torch.float64)
    leaves = [part.clone().requires_grad_() for part in (mean, raw, logits)]
    optimizer = torch.optim.Adam(leaves, lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        mean, factor = leaves[0], factors(leaves[1], std, 1e-4)
        experts = Output(mean.detach(), factor.detach(), leaves[2].detach().log_softmax(1))
        noise = torch.randn(samples, *mean.shape, generator=random, dtype=torch.float64)
        points = draw(experts.mean, experts.factor, noise)
        found = ascend(experts, noise, points, score(points), weight="none")
        gradients = torch.autograd.grad([mean, factor], leaves[:2], [found.mean, found.factor])
        for leaf, gradient in zip(leaves, gradients, strict=False):
            leaf.grad = gradient
        if demonstrations is not None:
            chosen = demonstrations[torch.randint(len(demonstrations), (256,), generator=random)]
            every = Output(*(part.expand(len(chosen), *part.shape[1:]) for part in experts))
            shares = data_responsibilities(every, chosen)
            (leaves[2].grad,) = torch.autograd.grad(
                gate_loss(leaves[2].log_softmax(1).expand(256, -1), shares), leaves[2]
            )
        optimizer.step()
    with torch.no_grad():
        return Output(leaves[0].detach(), factors(leaves[1], std, 1e-4), leaves[2].log_softmax(1))


def asked(teacher: Any, levels: Any, form: str = "raw") -> Score:
    random = torch.Generator().manual_seed(1)

    def score(points: Tensor) -> Tensor:
        actions = points.flatten(0, 2)[:, None]
        level = noise_levels(levels, len(actions), 0.1, 0, random, dtype=torch.float64)
        if form == "scaled":
            return clean_score(teacher, actions, NOTHING, level).view_as(points)
        return teacher.score(actions, NOTHING, level).view_as(points)

    return score


def test_property_5_one_expert_finds_the_moments_of_a_gaussian_and_the_biased_ones_of_noise() -> None:
    """All fixed points of card 3.3 at once: a state each."""
    centre, covariance = torch.tensor([0.8, -0.5]), torch.tensor([[0.2, 0.06], [0.06, 0.1]])
    centre, covariance = centre.double(), covariance.double()
    truth = Gaussians.make(torch.zeros(1, 1, dtype=torch.float64), centre[None, None], covariance[None, None])
    beso, ddpm = known("beso", truth), known("ddpm", truth)
    level, kept = 1, cosine_schedule(8)[1][1].item()
    still, moving = Uniform(kind="uniform", low=0.5, high=0.5), Uniform(kind="uniform", low=0.2, high=0.5)
    step, unit = Steps(kind="steps", low=level, high=level), torch.eye(2, dtype=torch.float64)
    precision = sum(torch.linalg.inv(covariance + s**2 * unit) for s in np.linspace(0.2, 0.5, 2001)) / 2001
    cases: list[tuple[Score, Tensor, Tensor]] = [
        (truth.score, centre, covariance),
        (asked(beso, still), centre, covariance + 0.25 * unit),
        (asked(beso, moving), centre, torch.linalg.inv(precision)),
        (asked(ddpm, step), math.sqrt(kept) * centre, kept * covariance + (1 - kept) * unit),
        (asked(ddpm, step, "scaled"), centre, covariance + (1 - kept) / kept * unit),
    ]

    def score(points: Tensor) -> Tensor:
        return torch.cat([case[0](part[None]) for case, part in zip(cases, points, strict=True)])

    found = follow(score, torch.zeros(len(cases), 1, 2, dtype=torch.float64), 500, 64, rate=0.02)
    spread = (found.factor @ found.factor.mT)[:, 0]
    for place, (_, mean, wanted) in enumerate(cases):
        torch.testing.assert_close(found.mean[place, 0], mean, rtol=0, atol=2e-2)
        torch.testing.assert_close(spread[place], wanted, rtol=0, atol=2e-2)


def demonstrated(truth: Gaussians, count: int = 4000) -> Tensor:
    return truth.draw(count, torch.Generator().manual_seed(7))


def masses(found: Output, truth: Gaussians) -> list[float]:
    """Weight of the experts next to each mode."""
    nearest = torch.cdist(found.mean[0], truth.mean[0]).argmin(1)
    return [found.log_gate[0, nearest == mode].exp().sum().item() for mode in range(truth.mean.shape[1])]


def test_property_6_a_mixture_is_recovered_from_near_its_modes() -> None:
    start = THREE.mean + 0.3 * torch.randn(1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = follow(THREE.score, start, 500, 32, std=0.5, demonstrations=demonstrated(THREE))
    torch.testing.assert_close(found.mean, THREE.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(found.factor @ found.factor.mT, THREE.covariance, rtol=0, atol=0.05)
    torch.testing.assert_close(found.log_gate.exp(), THREE.log_weight.exp(), rtol=0, atol=0.03)


def random_start(count: int, seed: int) -> Tensor:
    return torch.randn(1, count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [8, 16])
def test_property_7_more_experts_than_modes_find_the_mass_of_each(count: int) -> None:
    found = follow(THREE.score, random_start(count, 0), 500, 8, demonstrations=demonstrated(THREE))
    assert masses(found, THREE) == pytest.approx([0.2, 0.5, 0.3], abs=0.05)


def test_property_8_as_many_experts_as_modes_may_miss_one() -> None:
    """No error: reverse KL is content without a mode, and tests have to begin near all of them."""
    found = follow(THREE.score, random_start(3, 2), 500, 8, demonstrations=demonstrated(THREE))
    assert min(masses(found, THREE)) == 0


def test_property_9_one_expert_seeks_a_mode_by_score_and_the_mean_by_likelihood() -> None:
    truth = mixture([0.5, 0.5], [[-2.0, 0.0], [2.0, 0.0]], [[0.3, 0.3], [0.3, 0.3]])
    start = torch.tensor([[[0.5, 0.3]]], dtype=torch.float64)
    found = follow(truth.score, start, 300, 16, std=0.5)
    torch.testing.assert_close(found.mean[0, 0], truth.mean[0, 1], rtol=0, atol=0.05)

    actions = demonstrated(truth)
    leaves = [start.clone().requires_grad_(), torch.zeros(1, 1, 3, dtype=torch.float64).requires_grad_()]
    optimizer = torch.optim.Adam(leaves, lr=0.05)
    for _ in range(300):
        experts = Output(leaves[0], factors(leaves[1], 0.5, 1e-4), torch.zeros(1, 1, dtype=torch.float64))
        optimizer.zero_grad()
        em.expert_loss(Output(*(part.expand(len(actions), *part.shape[1:]) for part in experts)), actions).backward()
        optimizer.step()
    torch.testing.assert_close(leaves[0][0, 0].detach(), actions.mean(0), rtol=0, atol=0.01)
    assert leaves[0].abs().max() < 0.1


# EM (card 3.8), and what is refused


@pytest.mark.parametrize("diagonal", [False, True])
def test_em_descends_the_likelihood(diagonal: bool) -> None:
    """Its gradients are those of the negative log-likelihood, divided by K for the mean over experts (Fisher)."""
    experts = problem(diagonal=diagonal).experts
    actions = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [part.clone().requires_grad_() for part in experts[:2]]
    logits = experts.log_gate.clone().requires_grad_()
    output = Output(leaves[0], leaves[1], logits.log_softmax(1))
    likelihood = -torch.logsumexp(output.log_gate + log_components(output, actions), 1).mean()
    expected = torch.autograd.grad(likelihood, [*leaves, logits], retain_graph=True)
    for reduction, share in (("sum", 1), ("mean", 4)):
        found = torch.autograd.grad(em.expert_loss(output, actions, reduction), leaves, retain_graph=True)
        gate = gate_loss(output.log_gate, data_responsibilities(output, actions), reduction)
        found = (*found, *torch.autograd.grad(gate, logits, retain_graph=True))
        for one, other in zip(found, expected, strict=True):
            close(share * one, other)


def test_the_gate_follows_the_responsibilities() -> None:
    """d / d logits = (pi - r) / N (card 3.4), and nothing reaches the experts."""
    experts = problem().experts
    logits = experts.log_gate.clone().requires_grad_()
    mean = experts.mean.clone().requires_grad_()
    output = Output(mean, experts.factor, logits.log_softmax(1))
    shares = data_responsibilities(output, mean.detach()[:, 0] + 0.5)
    assert not shares.requires_grad
    loss = gate_loss(output.log_gate, shares)
    slopes = torch.autograd.grad(loss, [logits, mean], allow_unused=True)
    close(slopes[0], (output.log_gate.exp() - shares) / 3, 1e-12)
    assert slopes[1] is None


def test_what_does_not_go_together_is_refused() -> None:
    experts, noise, score = found = problem()
    with pytest.raises(ValueError, match="do not go together"):
        ascend(experts, noise[:1], found.samples, score)
    with pytest.raises(ValueError, match="do not go together"):
        ascend(experts, noise, found.samples, score[..., :1])
    with pytest.raises(ValueError, match="unknown weight of experts"):
        ascend(experts, noise, found.samples, score, weight="soft")
    with pytest.raises(ValueError, match="unknown reduction over experts"):
        ascend(experts, noise, found.samples, score, reduction="max")
    with pytest.raises(ValueError, match="differ"):
        gate_loss(experts.log_gate, experts.log_gate[:, :1])
    for diagonal in (False, True):
        experts = problem(diagonal=diagonal).experts
        for value in (0.0, -0.5):
            factor = experts.factor.clone()
            (factor if diagonal else factor.diagonal(dim1=2, dim2=3))[1, 2, 0] = value
            with pytest.raises(ValueError, match=r"0 or less on its diagonal .* needs a covariance"):
                ascend(experts._replace(factor=factor), noise, found.samples, score)
