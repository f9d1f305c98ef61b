"""Policies' networks: schedules, samplers and densities against closed forms; what a step may see; acting."""

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn

from models import policy as models
from stages.parameters.policy import BESO, DDPM, Mixture

pytestmark = pytest.mark.usefixtures("one_thread")
REFERENCE = Path(__file__).resolve().parents[1] / "reference/vdd/aux.npz"
ACTIONS, OBSERVATIONS, WINDOW = 2, 3, 4
INTERFACE = {
    "observations": OBSERVATIONS,
    "actions": ACTIONS,
    "environment": None,
    "scaling": {
        "observation": {"mean": [1.0, -2.0, 0.0], "std": [2.0, 0.5, 0.0], "change": [0.4, 0.3, 0.0]},
        "action": {"mean": [0.5, -1.0], "std": [0.1, 4.0], "low": [0.2, -13.0], "high": [0.7, 7.0]},
    },
}
TRANSFORMER = {"name": "transformer", "layers": 2, "heads": 2, "width": 8}
BACKBONES: dict[str, dict[str, Any]] = {
    "transformer": TRANSFORMER,
    "one layer": {**TRANSFORMER, "layers": 1},
    "mlp": {"name": "mlp", "width": 8, "layers": 2},
    "residual": {"name": "mlp", "width": 8, "layers": 2, "residual": True},
    "waves": {"name": "mlp", "width": 8, "layers": 2, "frequencies": [2.0, 5.0]},
}
SECTIONS: dict[str, Any] = {"ddpm": DDPM, "beso": BESO, "mixture": Mixture}
backbones = pytest.mark.parametrize("backbone", BACKBONES)
teachers = pytest.mark.parametrize("name", ["ddpm", "beso"])


def build(name: str, backbone: str = "transformer", fresh: bool = False, **settings: Any) -> Any:
    """A network in float64 and eval mode; unless it is `fresh`, its weights are so that everything matters."""
    torch.manual_seed(0)
    settings = {"window": WINDOW, **settings}
    if name == "mixture":
        settings = {"experts": 3, "heads": {"width": 8, "layers": 1}, **settings}
    section = SECTIONS[name](name=name, backbone=BACKBONES[backbone], **settings)
    network: Any = models.build({"network": section.model_dump(mode="json"), "interface": INTERFACE})
    if not fresh:
        for parameter in network.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, 0, 0.3)
            else:
                nn.init.normal_(parameter, 0, 1.5 / math.sqrt(parameter.shape[1]))
    if name == "mixture" and not fresh and network.gate is not None:
        network.gate.last.weight.data *= 0.1  # no expert is as good as certain
    return network.double().eval()


def seen(count: int = 2, steps: int = WINDOW, seed: int = 0) -> Tensor:
    return torch.randn(count, steps, OBSERVATIONS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def done(count: int = 2, steps: int = WINDOW, seed: int = 1) -> Tensor:
    return torch.randn(count, steps, ACTIONS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def levels(network: models.Diffusion, count: int) -> Tensor:
    """Different ones, from the lowest to the highest."""
    uniform = torch.linspace(0, 0.999, count, dtype=torch.float64)
    return network.level_at(uniform)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """More only wait for each other in networks as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Schedules and heads against the reference vectors.


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(REFERENCE) as file:
        return {name: file[name] for name in file}


@pytest.mark.parametrize("steps", [4, 8, 16])
def test_the_cosine_schedule_is_that_of_the_reference(reference: dict[str, np.ndarray], steps: int) -> None:
    beta, kept = models.cosine_schedule(steps)
    np.testing.assert_allclose(beta, reference[f"cosine_T{steps}_beta"], rtol=1e-12)
    np.testing.assert_allclose(kept, reference[f"cosine_T{steps}_abar"], rtol=1e-12)
    network = build("ddpm", steps=steps)
    np.testing.assert_allclose(network.kept, reference[f"cosine_T{steps}_abar"], rtol=1e-6)
    assert network.levels == (0, steps - 1)


def test_the_preconditioning_is_that_of_the_reference(reference: dict[str, np.ndarray]) -> None:
    found = models.karras(torch.from_numpy(reference["karras_sigma"]), float(reference["karras_sigma_data"]))
    for name, values in zip(("c_skip", "c_out", "c_in"), found, strict=True):
        np.testing.assert_allclose(values, reference[f"karras_{name}"], rtol=1e-12)


def test_heads_are_those_of_the_reference(reference: dict[str, np.ndarray]) -> None:
    stds = float(reference["head_init_std"]), float(reference["head_min_std"])
    full = models.factors(torch.from_numpy(reference["head_raw"]), *stds)
    np.testing.assert_allclose(full, reference["head_chol_rowmajor"], rtol=1e-12, atol=1e-15)
    diagonal = models.deviations(torch.from_numpy(reference["head_raw_diag"]), *stds)
    np.testing.assert_allclose(diagonal, reference["head_std_diag"], rtol=1e-12)


@pytest.mark.parametrize("actions", [1, 2, 5])
def test_factors_are_lower_triangular_with_a_floor_under_the_diagonal(actions: int) -> None:
    raw = torch.linspace(-200, 200, 7 * actions * (actions + 1) // 2).view(7, -1)
    found = models.factors(raw, 1.0, 1e-4)
    assert found.shape == (7, actions, actions)
    assert torch.equal(found, found.tril())
    assert (found.diagonal(dim1=1, dim2=2) >= 1e-4).all()
    rows, columns = np.tril_indices(actions)
    for place, (row, column) in enumerate(zip(rows, columns, strict=True)):
        if row != column:
            assert torch.equal(found[:, row, column], raw[:, place])
    start = models.factors(torch.zeros(1, raw.shape[1], dtype=torch.float64), 0.3, 1e-4)
    torch.testing.assert_close(start[0], 0.3 * torch.eye(actions, dtype=torch.float64), atol=1e-15, rtol=1e-12)


def test_levels_between_are_even_in_their_root() -> None:
    found = models.karras_levels(5, 0.1, 2.0, 5.0)
    assert (found[0], found[-1]) == (pytest.approx(2.0), pytest.approx(0.1))
    np.testing.assert_allclose(np.diff(np.array(found) ** (1 / 5), 2), 0, atol=1e-12)
    assert models.karras_levels(1, 0.1, 2.0, 5.0) == [pytest.approx(2.0)]


def test_levels_in_training_are_log_logistic_between_the_bounds() -> None:
    network = build("beso")
    uniform = torch.linspace(0, 1, 101, dtype=torch.float64)
    found = network.level_at(uniform).numpy()
    law = scipy.stats.fisk(c=1 / 0.5, scale=0.5)
    low, high = law.cdf(network.levels)
    np.testing.assert_allclose(law.cdf(found), low + (high - low) * uniform.numpy(), rtol=1e-12)
    assert found[0] == pytest.approx(0.1)
    assert found[-1] == pytest.approx(1.0)


def test_steps_in_training_are_equally_frequent() -> None:
    network = build("ddpm", steps=8)
    found = network.level_at(torch.arange(800, dtype=torch.float64) / 800)
    assert found.dtype == torch.int64
    assert found.bincount().tolist() == [100] * 8


# What a step may see.


@backbones
def test_a_student_sees_nothing_of_later_steps(backbone: str) -> None:
    network, observations = build("mixture", backbone), seen(1)
    network.gate_trains_trunk = True
    for part in range(3):
        found = torch.autograd.functional.jacobian(lambda x, part=part: network(x)[part], observations)
        sizes = found.abs().flatten(2, -4).amax((0, 2, -3, -1))
        assert torch.equal(sizes > 0, torch.ones(WINDOW, WINDOW, dtype=torch.bool).tril())


@teachers
@backbones
def test_a_teacher_sees_nothing_of_later_steps(name: str, backbone: str) -> None:
    network, level = build(name, backbone), torch.tensor([2]) if name == "ddpm" else torch.tensor([0.3]).double()
    by_actions, by_observations = torch.autograd.functional.jacobian(
        lambda actions, observations: network(actions, observations, level), (done(1), seen(1))
    )
    earlier = torch.ones(WINDOW, WINDOW, dtype=torch.bool).tril()
    assert torch.equal(by_observations[0].abs().amax((1, 2, 4)) > 0, earlier)
    own = torch.eye(WINDOW, dtype=torch.bool)
    wanted = earlier if BACKBONES[backbone]["name"] == "transformer" else own
    assert torch.equal(by_actions[0].abs().amax((1, 2, 4)) > 0, wanted)


@backbones
def test_a_short_history_is_the_beginning_of_a_long_one(backbone: str) -> None:
    student, teacher, observations, actions = build("mixture", backbone), build("beso", backbone), seen(), done()
    level = levels(teacher, 2)
    for steps in range(1, WINDOW + 1):
        for short, long in zip(student(observations[:, :steps]), student(observations), strict=True):
            torch.testing.assert_close(short, long[:, :steps], atol=1e-12, rtol=1e-10)
        short = teacher.score(actions[:, :steps], observations[:, :steps], level)
        long = teacher.score(actions, observations, level)
        torch.testing.assert_close(short, long[:, :steps], atol=1e-12, rtol=1e-10)


@backbones
@pytest.mark.parametrize("goals", [1, 2])
def test_goals_come_first_and_are_seen_by_every_step(backbone: str, goals: int) -> None:
    student, teacher = build("mixture", backbone, goals=goals), build("beso", backbone, goals=goals)
    observations = seen(2, goals + 3)
    mean = student(observations).mean
    assert mean.shape == (2, 3, 3, ACTIONS)
    assert teacher.act(observations).shape == (2, ACTIONS)
    for place in range(goals):
        other = observations.clone()
        other[:, place] += 1
        assert ((student(other).mean - mean).abs().amax((0, 2, 3)) > 0).all()
    torch.testing.assert_close(student.features(observations, last=True), student.features(observations)[:, -1:])


@teachers
@backbones
def test_many_actions_of_one_observation_are_as_one_by_one(name: str, backbone: str) -> None:
    network, observations, actions = build(name, backbone), seen(2), done(6)
    level = levels(network, 6)
    found = network.score(actions, observations, level)
    for place in range(6):
        one = network.score(actions[place : place + 1], observations[place // 3][None], level[place : place + 1])
        torch.testing.assert_close(found[place], one[0], atol=1e-12, rtol=1e-10)


# Noise, and what is behind it.


@teachers
def test_a_network_that_gives_its_target_knows_actions_and_score(name: str) -> None:
    """corrupt, target, denoise and score belong together, at every level."""
    network, actions = build(name), 0.1 * done(8)
    noise, level = done(8, seed=2), levels(build(name), 8)
    target = network.target(actions, noise, level)
    network.network.register_forward_hook(lambda *_: target)
    noisy = network.corrupt(actions, noise, level)
    torch.testing.assert_close(network.denoise(noisy, seen(8), level), actions, atol=1e-9, rtol=1e-9)
    own, others = network._weights(level) if name == "ddpm" else (1, level.view(-1, 1, 1))
    torch.testing.assert_close(noisy, own * actions + others * noise, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(network.score(noisy, seen(8), level), -noise / others, atol=1e-9, rtol=1e-9)
    assert network.loss(actions, seen(8), noise, level) < 1e-20


@pytest.mark.parametrize("sigma", [1e-3, 0.1, 0.5, 1.0])
def test_a_ve_score_leads_to_the_denoised_actions(sigma: float) -> None:
    """a + sigma^2 f = D(a; sigma) (VDD card 7.11)."""
    network, level = build("beso"), torch.full((2,), sigma, dtype=torch.float64)
    found = done() + sigma**2 * network.score(done(), seen(), level)
    torch.testing.assert_close(found, network.denoise(done(), seen(), level), atol=1e-12, rtol=1e-10)


def test_a_vp_score_leads_to_the_denoised_actions() -> None:
    """(a + (1 - abar) f) / sqrt(abar) is the expected clean action; here within the bounds, so that nothing is cut."""
    network = build("ddpm", fresh=True)
    kept = torch.tensor(network._kept[2], dtype=torch.float64)
    level, noisy = torch.tensor([2, 2]), 0.1 * done()
    found = (noisy + (1 - kept) * network.score(noisy, seen(), level)) / kept.sqrt()
    torch.testing.assert_close(found, network.denoise(noisy, seen(), level), atol=1e-6, rtol=1e-6)
    far = network.denoise(100 * done(), seen(), level)
    assert torch.equal(far, network.scaling.clip(far))


# Samplers, with exact denoisers.

MEANS, WEIGHTS, STD = torch.tensor([[-1.0, 0.5], [1.0, -0.5]]).double(), torch.tensor([0.3, 0.7]).double(), 0.2


def posterior_mean(noisy: Tensor, own: float, variance: float) -> Tensor:
    """E[a | own a + sqrt(variance) noise] for a mixture of two round Gaussians, (N, 2)."""
    total = own**2 * STD**2 + variance
    log_weight = WEIGHTS.log() - (noisy[:, None] - own * MEANS).square().sum(2) / (2 * total)
    each = MEANS + own * STD**2 / total * (noisy[:, None] - own * MEANS)
    return (log_weight.softmax(1)[..., None] * each).sum(1)


def check_moments(samples: Tensor, tolerance: float) -> None:
    near = (samples[:, None] - MEANS).square().sum(2).argmin(1)
    torch.testing.assert_close(near.bincount() / len(near), WEIGHTS, atol=tolerance, rtol=0, check_dtype=False)
    for mode in (0, 1):
        own = samples[near == mode]
        torch.testing.assert_close(own.mean(0), MEANS[mode], atol=tolerance, rtol=0)
        torch.testing.assert_close(own.std(0), torch.full((2,), STD).double(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("sampler", [models.euler_ancestral, models.ddim])
def test_ve_samplers_give_the_mixture_back(sampler: Any) -> None:
    sigmas = models.karras_levels(60, 0.01, 20.0, 5.0)
    noise = torch.randn(60, 8000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = sampler(lambda noisy, call: posterior_mean(noisy, 1.0, sigmas[call] ** 2), noise, sigmas)
    check_moments(found, 0.03)


def test_the_vp_sampler_gives_the_mixture_back() -> None:
    kept = models.cosine_schedule(100)[1].flip(0).tolist()
    noise = torch.randn(100, 8000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = models.ancestral(
        lambda noisy, call: posterior_mean(noisy, math.sqrt(kept[call]), 1 - kept[call]), noise, kept
    )
    check_moments(found, 0.02)


def gains(sampler: Any, denoise: models.Denoise, schedule: list[float]) -> Tensor:
    """What a sample is multiplied with, per noise, where the sampler is linear: (calls,)."""
    count = len(schedule)
    return sampler(denoise, torch.eye(count, dtype=torch.float64)[..., None], schedule)[:, 0]


@pytest.mark.parametrize("std", [0.3, 1.5])
def test_ddim_of_a_gaussian_is_its_closed_form(std: float) -> None:
    """Each step multiplies by s'/s + (1 - s'/s) std^2 / (std^2 + s^2); many steps by std / sqrt(std^2 + s^2) in all."""
    for count, tolerance in ((3, None), (4000, 2e-3)):
        sigmas = models.karras_levels(count, 0.01, 2.0, 5.0)

        def denoise(noisy: Tensor, call: int, sigmas: list[float] = sigmas) -> Tensor:
            return std**2 / (std**2 + sigmas[call] ** 2) * noisy

        found = gains(models.ddim, denoise, sigmas)
        wanted = sigmas[0]
        for now, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
            wanted *= after / now + (1 - after / now) * std**2 / (std**2 + now**2)
        assert found[0].item() == pytest.approx(wanted, rel=1e-12)
        assert not found[1:].any()
        if tolerance:
            assert wanted == pytest.approx(2.0 * std / math.hypot(std, 2.0), rel=tolerance)


@pytest.mark.parametrize("std", [0.3, 1.5])
def test_ancestral_samplers_give_a_gaussian_its_variance(std: float) -> None:
    """The last call is without noise: what is left of it is the posterior's own variance, about nothing here."""
    sigmas = models.karras_levels(4000, 0.01, 100.0, 5.0)
    found = gains(models.euler_ancestral, lambda noisy, call: std**2 / (std**2 + sigmas[call] ** 2) * noisy, sigmas)
    assert found.square().sum().sqrt().item() == pytest.approx(std, rel=1e-2)
    kept = models.cosine_schedule(1000)[1].flip(0).tolist()
    found = gains(
        models.ancestral,
        lambda noisy, call: math.sqrt(kept[call]) * std**2 / (kept[call] * std**2 + 1 - kept[call]) * noisy,
        kept,
    )
    assert found.square().sum().sqrt().item() == pytest.approx(std, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "settings", "steps"),
    [("ddpm", {}, None), ("ddpm", {}, 1), ("ddpm", {}, 3), ("beso", {}, None), ("beso", {}, 1),
     ("beso", {"sampler": "ddim", "steps": 3}, None)],
)  # fmt: skip
def test_acting_takes_the_stated_number_of_calls(name: str, settings: dict[str, Any], steps: int | None) -> None:
    network, calls = build(name, **settings), []
    network.network.register_forward_hook(lambda *_: calls.append(1))
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    found, again = (network.act(seen(5, 2), generator, steps) for generator in generators)
    assert len(calls) == 2 * (steps or network.steps)
    assert torch.equal(found, again)
    assert not torch.equal(found, network.act(seen(5, 2), generators[0], steps))
    action = INTERFACE["scaling"]["action"]  # type: ignore[index]
    low, high = (torch.tensor(action[bound]).double() for bound in ("low", "high"))
    assert (found >= low - 1e-6).all()
    assert (found <= high + 1e-6).all()


def test_one_call_of_a_beso_is_its_denoiser_at_the_highest_level() -> None:
    network, noise = build("beso"), done(2)[None]
    wanted = network.denoise(noise[0], seen(), torch.tensor([1.0]).double())
    torch.testing.assert_close(network.sample(seen(), noise), network.scaling.clip(wanted))


def test_a_ddpm_has_no_more_calls_than_steps() -> None:
    with pytest.raises(ValueError, match="9 calls, and the schedule has 8 steps"):
        build("ddpm").act(seen(), steps=9)


# The mixture.


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@backbones
def test_a_student_begins_with_experts_spread_out_and_of_the_stated_width(backbone: str, covariance: str) -> None:
    network = build("mixture", backbone, fresh=True, covariance=covariance, experts=50, bias=0.7, init_std=0.4)
    mean, factor, log_gate = network(seen(8))
    assert mean.abs().max() <= 0.7
    assert mean[0, 0].max() > 0.5
    assert mean[0, 0].min() < -0.5
    assert torch.equal(mean, mean[:1, :1].expand_as(mean))
    full = factor if covariance == "full" else torch.diag_embed(factor)
    torch.testing.assert_close(full, 0.4 * torch.eye(2).expand_as(full).double(), atol=0.02, rtol=0)
    assert factor.shape == ((8, WINDOW, 50, 2, 2) if covariance == "full" else (8, WINDOW, 50, 2))
    torch.testing.assert_close(log_gate, torch.full_like(log_gate, -math.log(50)), atol=0.05, rtol=0)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_log_likelihoods_are_those_of_scipy(covariance: str) -> None:
    network, observations = build("mixture", covariance=covariance), seen()
    raw = network.scaling.raw(done())
    output = network(observations)
    full = output.factor if covariance == "full" else torch.diag_embed(output.factor)
    scale = np.diag(network.scaling.action_std.numpy())
    components, density = models.log_components(output, done()), network.log_density(observations, raw)
    for place in np.ndindex(2, WINDOW):
        each = []
        for expert in range(3):
            mean, factor = (part[place][expert].detach().numpy() for part in (output.mean, full))
            scaled = scipy.stats.multivariate_normal(mean, factor @ factor.T)
            assert components[place][expert].item() == pytest.approx(scaled.logpdf(done()[place]), rel=1e-9)
            centre = network.scaling.raw(torch.from_numpy(mean)).numpy()
            law = scipy.stats.multivariate_normal(centre, scale @ factor @ factor.T @ scale)
            each.append(output.log_gate[place][expert].item() + law.logpdf(raw[place].numpy()))
        assert density[place].item() == pytest.approx(scipy.special.logsumexp(each), rel=1e-9)


def test_far_actions_have_a_finite_likelihood_and_gradient_in_single_precision() -> None:
    output = build("mixture").float()(seen().float())
    loss = -models.log_likelihood(output, 1e3 + done().float()).mean()
    gradients = torch.autograd.grad(loss, list(output))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].abs().max() > 0


def test_a_loss_of_the_gate_reaches_the_trunk_only_where_it_is_wanted() -> None:
    network = build("mixture")
    loss = network(seen()).log_gate[..., 0].sum()
    trunk, gate = list(network.trunk.parameters()), network.gate_parameters()
    found = torch.autograd.grad(loss, [*trunk, *gate], allow_unused=True)
    assert all(gradient is None for gradient in found[: len(trunk)])
    assert all(gradient is not None and gradient.any() for gradient in found[len(trunk) :][:-1])
    network.gate_trains_trunk = True
    found = torch.autograd.grad(network(seen()).log_gate[..., 0].sum(), trunk, allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in found)


def test_every_parameter_belongs_to_experts_or_gate() -> None:
    for gate in ("learned", "uniform"):
        network = build("mixture", gate=gate)
        groups = [*network.expert_parameters(), *network.gate_parameters()]
        assert {id(x) for x in groups} == {id(x) for x in network.parameters()}
        assert len(groups) == len({id(x) for x in groups})
        assert bool(network.gate_parameters()) == (gate == "learned")
    torch.testing.assert_close(network(seen()).log_gate.exp(), torch.full((2, WINDOW, 3), 1 / 3).double())


@backbones
@pytest.mark.parametrize("steps", [1, 3, WINDOW])
@pytest.mark.parametrize("gate", ["learned", "uniform"])
def test_a_step_is_the_last_of_the_whole(backbone: str, steps: int, gate: str) -> None:
    network, observations = build("mixture", backbone, gate=gate), seen(20, steps)
    mean, _, log_gate = (part[:, -1] for part in network(observations))
    probability = log_gate.exp()
    draw = torch.linspace(0, 0.99, 20, dtype=torch.float64)
    drawn, likeliest = (probability.cumsum(1) <= draw[:, None]).sum(1), probability.argmax(1)
    assert drawn.unique().tolist() == [0, 1, 2], "the test has to see every expert"
    for found, wanted in (
        (network.step(observations, draw), drawn),
        (network.step(observations), likeliest),
        (network.step(observations, torch.full((20,), -1.0).double()), likeliest),
        (network.act(observations, greedy=True), likeliest),
    ):
        torch.testing.assert_close(found.probability, probability, atol=1e-12, rtol=1e-10)
        assert torch.equal(found.expert, wanted)
        chosen = network.scaling.raw(network.scaling.clip(mean[torch.arange(20), wanted]))
        torch.testing.assert_close(found.action, chosen, atol=1e-12, rtol=1e-10)


def test_experts_are_drawn_as_often_as_they_are_probable() -> None:
    network, count = build("mixture"), 10_000
    observations = seen(1).expand(count, -1, -1)
    found = network.act(observations, torch.Generator().manual_seed(0))
    share = found.expert.bincount(minlength=3) / count
    torch.testing.assert_close(share.double(), found.probability[0], atol=0.02, rtol=0)
    assert found.probability[0].min() > 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("allowed", [(0,), (2,), (0, 1), (0, 2), (0, 1, 2)])
def test_experts_that_are_not_allowed_are_never_chosen(allowed: tuple[int, ...], dtype: torch.dtype) -> None:
    network, observations = build("mixture").to(dtype), seen(6).to(dtype)
    mask = torch.zeros(1, 3, dtype=torch.bool)
    mask[0, list(allowed)] = True
    free = network.step(observations).probability
    wanted = torch.where(mask, free, 0)
    draw = torch.tensor([0.0, 0.3, 0.999999, 1 - 2**-24, torch.finfo(dtype).eps, -1.0], dtype=dtype)
    found = network.step(observations, draw, mask)
    assert set(found.expert.tolist()) <= set(allowed)
    torch.testing.assert_close(found.probability, wanted / wanted.sum(1, keepdim=True), atol=1e-6, rtol=1e-5)


def test_one_expert_at_least_is_allowed() -> None:
    with pytest.raises(ValueError, match="no expert is allowed"):
        build("mixture").step(seen(2), allowed=torch.tensor([[True, False, False], [False, False, False]]))


def test_actions_stay_within_the_data_and_a_tenth_beyond_with_goals() -> None:
    for goals, margin in ((0, 1.0), (1, 1.1)):
        network = build("mixture", goals=goals)
        network.mean_head.last.bias.data = torch.linspace(-1e6, 1e6, 6, dtype=torch.float64)
        found = torch.cat([network.step(seen(2), allowed=torch.eye(3, dtype=torch.bool)[[k]]).action for k in range(3)])
        action = INTERFACE["scaling"]["action"]  # type: ignore[index]
        for bound, extreme in (("low", found.amin(0)), ("high", found.amax(0))):
            middle, limit = torch.tensor(action["mean"]).double(), torch.tensor(action[bound]).double()
            torch.testing.assert_close(extreme, middle + margin * (limit - middle), atol=1e-5, rtol=1e-6)


# Parts.


def test_perceptrons_are_what_the_card_says() -> None:
    x = done(1)[0]
    plain = models.Perceptron(2, 3, 4, 2).double()
    act = nn.Mish()
    wanted = plain.last(act(plain.layers[1](act(plain.layers[0](x)))))  # type: ignore[misc]
    torch.testing.assert_close(plain(x), wanted)
    residual = models.Perceptron(2, 3, 4, 4, residual=True).double()
    h = residual.layers[0](x)
    for first in (1, 3):
        h = h + residual.layers[first + 1](act(residual.layers[first](act(h))))
    torch.testing.assert_close(residual(x), residual.last(h))  # type: ignore[misc]
    assert sum(isinstance(part, nn.PReLU) for part in models.Perceptron(2, 3, 4, 4, activation="prelu").modules()) == 4
    bare = models.Perceptron(2, None, 4, 0)
    assert bare.features == 2
    assert torch.equal(bare(x), x)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_network_is_built_again_from_its_description(name: str) -> None:
    network = build(name)
    text = json.dumps({"network": SECTIONS[name](name=name, window=WINDOW, backbone=TRANSFORMER).model_dump(),
                       "interface": INTERFACE})  # fmt: skip
    if name == "mixture":
        text = text.replace('"experts": 8', '"experts": 3').replace('"width": 512', '"width": 8')
    again = models.build(json.loads(text)).double().eval()
    again.load_state_dict(network.state_dict())
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    found, wanted = (x.act(seen(), generator) for x, generator in zip((again, network), generators, strict=True))
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    assert not any("scaling" in key for key in network.state_dict())


# Deployment.


class Step(nn.Module):
    def __init__(self, network: models.Mixture) -> None:
        super().__init__()
        self.network = network

    def forward(self, observations: Tensor, draw: Tensor, allowed: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network.step(observations, draw, allowed))


class Decide(nn.Module):
    def __init__(self, network: models.Diffusion) -> None:
        super().__init__()
        self.network = network

    def forward(self, observations: Tensor, noise: Tensor) -> Tensor:
        return self.network.decide(observations, noise)


def export(graph: nn.Module, inputs: dict[str, Tensor], axes: dict[str, Any], file: Path) -> Any:
    import onnxruntime

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        names = list(inputs)
        torch.onnx.export(
            graph.eval(), tuple(inputs.values()), file, dynamo=False, input_names=names, dynamic_axes=axes
        )
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("backbone", ["transformer", "mlp"])
def test_a_step_as_onnx_takes_any_history_and_has_no_covariance(backbone: str, tmp_path: Path) -> None:
    import onnx

    network = build("mixture", backbone).float()
    inputs = {"observations": seen().float(), "draw": torch.rand(2), "allowed": torch.ones(1, 3, dtype=torch.bool)}
    axes = {"observations": {0: "batch", 1: "steps"}, "draw": {0: "batch"}, "allowed": {0: "rows"}}
    session = export(Step(network), inputs, axes, tmp_path / "step.onnx")
    names = {item.name for item in onnx.load(str(tmp_path / "step.onnx")).graph.initializer}
    assert not any("covariance" in name for name in names)
    draw, allowed = torch.tensor([-1.0, 0.1, 0.9]), torch.tensor([[True, False, True]])
    for steps in range(1, WINDOW + 1):
        observations = seen(3, steps).float()
        with torch.no_grad():
            wanted = network.step(observations, draw, allowed)
        found = session.run(
            None, {"observations": observations.numpy(), "draw": draw.numpy(), "allowed": allowed.numpy()}
        )
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other.numpy(), atol=1e-5)


@teachers
def test_a_teacher_as_onnx_takes_its_noise(name: str, tmp_path: Path) -> None:
    network = build(name).float()
    noise = torch.randn(3, 2, WINDOW, ACTIONS, generator=torch.Generator().manual_seed(0))
    axes = {"observations": {0: "batch"}, "noise": {1: "batch"}}
    session = export(Decide(network), {"observations": seen().float(), "noise": noise}, axes, tmp_path / "act.onnx")
    noise, observations = torch.cat([noise, -noise], 1), seen(4).float()
    with torch.no_grad():
        wanted = network.decide(observations, noise)
    (found,) = session.run(None, {"observations": observations.numpy(), "noise": noise.numpy()})
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("goals", [0, 2])
@pytest.mark.parametrize("window", [1, 2, WINDOW])
@pytest.mark.parametrize("backbone", ["mlp", "waves"])
def test_a_perceptron_sees_the_latest_observation_and_the_changes_before_it(
    backbone: str, window: int, goals: int
) -> None:
    """Value by value: each in standard deviations, 0 before the window begins, then the waves of the latest."""
    network = build("mixture", backbone, window=window, goals=goals)
    network.trunk.network = nn.Identity()
    mean, std, change = [1.0, -2.0, 0.0], [2.0, 0.5, 1.0], [0.4, 0.3, 1.0]
    frequencies = BACKBONES[backbone].get("frequencies", [])
    for steps in range(1, window + 1):
        raw = seen(2, goals + steps)
        found = network.features(raw)
        for row, time in np.ndindex(2, steps):
            value = raw[row].tolist()
            latest = [(value[goals + time][i] - mean[i]) / std[i] for i in range(OBSERVATIONS)]
            wanted = [(value[goal][i] - mean[i]) / std[i] for goal in range(goals) for i in range(OBSERVATIONS)]
            wanted += latest
            for back in range(window - 2, -1, -1):
                now, before = max(time - back, 0), max(time - back - 1, 0)
                wanted += [(value[goals + now][i] - value[goals + before][i]) / change[i] for i in range(OBSERVATIONS)]
            for wave in (math.sin, math.cos):
                wanted += [wave(frequency * x) for frequency in frequencies for x in latest]
            np.testing.assert_allclose(found[row, time], wanted, rtol=1e-5, atol=1e-6)
