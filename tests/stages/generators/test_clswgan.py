"""f-CLSWGAN's losses: the closed form against autograd's double backward, and the card's property 14."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.zero_shot import Critic
from stages.generators.clswgan import critic_loss

sys.path.insert(0, str(Path(__file__).parent))
from networks import ATTRIBUTES, CLASSES, FEATURES, HIDDEN, batch, build

Cotangents = tuple[float, float]


def plain(
    critic: Critic, real: Tensor, labels: Tensor, fake: Tensor, mix: Tensor, penalty: float
) -> tuple[Tensor, Tensor]:
    """The definition (card 3.2), left to autograd."""
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between, labels).sum(), between, create_graph=True)
    difference = critic(fake, labels).mean() - critic(real, labels).mean()
    return difference, penalty * (slope.norm(dim=1) - 1).square().mean()


def fresh(seed: int = 0) -> Critic:
    return build("clswgan", seed)[0].critic


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (-0.3, 2.5)])
@pytest.mark.parametrize("count", [1, 2, 9, 64])
def test_closed_form_equals_double_backward(weights: Cotangents, count: int) -> None:
    for seed in range(3):
        critic, data = fresh(seed), batch(count, seed)
        found = []
        for loss in (critic_loss, plain):
            values = loss(critic, *data, 10.0)
            total = weights[0] * values[0] + weights[1] * values[1]
            gradients = torch.autograd.grad(total, list(critic.parameters()), materialize_grads=True)
            found.append((*values, *gradients))
        torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-13)


def test_more_weights_than_are_multiplied_at_a_time() -> None:
    torch.manual_seed(0)
    critic, data = Critic(FEATURES, CLASSES, ATTRIBUTES, 1200).double(), batch()
    found = [torch.autograd.grad(sum(loss(critic, *data, 10.0)), critic.fc2.weight)[0] for loss in (critic_loss, plain)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_gradient_of_the_penalty_agrees_with_finite_differences() -> None:
    critic, data = fresh(), batch(4)
    weights = [critic.fc1.weight, critic.fc2.weight]

    def value(*values: Tensor) -> Tensor:
        kept = [weight.data for weight in weights]
        for weight, new in zip(weights, values, strict=True):
            weight.data = new
        penalty = critic_loss(critic, *data, 10.0)[1].detach()
        for weight, old in zip(weights, kept, strict=True):
            weight.data = old
        return penalty

    found = torch.autograd.grad(critic_loss(critic, *data, 10.0)[1], weights)
    for index, gradient in enumerate(found):
        for place in range(0, gradient.numel(), 7):
            shifted = []
            for step in (1e-6, -1e-6):
                values = [weight.detach().clone() for weight in weights]
                values[index].view(-1)[place] += step
                shifted.append(value(*values))
            slope = (shifted[0] - shifted[1]) / 2e-6
            assert gradient.flatten()[place].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-6)


def linear_critic(direction: Tensor) -> Critic:
    """D(x) = direction . x, from two hidden units of which one is always above 0 and the other below."""
    critic = Critic(FEATURES, CLASSES, ATTRIBUTES, 2).double()
    with torch.no_grad():
        critic.fc1.weight.zero_()
        critic.fc1.weight[0, :FEATURES], critic.fc1.weight[1, :FEATURES] = direction, direction
        critic.fc1.bias.copy_(torch.tensor([1e3, -1e3]))
        critic.fc2.weight.copy_(torch.full((1, 2), 1 / 1.2, dtype=torch.float64))
        critic.fc2.bias.fill_(5.0)
    return critic


@pytest.mark.parametrize(("length", "expected"), [(1.0, 0.0), (3.0, 40.0), (0.0, 10.0)])
def test_penalty_of_a_linear_critic(length: float, expected: float) -> None:
    direction = torch.zeros(FEATURES, dtype=torch.float64)
    direction[2] = length
    critic = linear_critic(direction)
    value = critic_loss(critic, *batch(), 10.0)[1]
    assert value.item() == pytest.approx(expected, abs=1e-12)
    gradients = torch.autograd.grad(value, list(critic.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    most = max(gradient.abs().max().item() for gradient in gradients)
    assert most > 1 if length == 3.0 else most < 1e-12


def test_a_critic_of_biases_alone_moves_by_its_difference_only() -> None:
    critic = fresh()
    with torch.no_grad():
        critic.fc1.weight.zero_()
    difference, penalty = critic_loss(critic, *batch(), 10.0)
    assert difference.item() == pytest.approx(0, abs=1e-14)
    assert penalty.item() == 10.0
    gradients = torch.autograd.grad(difference + penalty, list(critic.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].any()


def test_penalty_does_not_see_the_last_bias_nor_anything_but_the_point_between() -> None:
    critic, (real, labels, fake, mix) = fresh(), batch()
    value = critic_loss(critic, real, labels, fake, mix, 10.0)[1].item()
    critic.fc2.bias.data += 7
    assert critic_loss(critic, real, labels, fake, mix, 10.0)[1].item() == value
    between = mix * real + (1 - mix) * fake
    same = critic_loss(critic, between, labels, between, torch.rand_like(mix), 10.0)[1].item()
    assert same == pytest.approx(value, rel=1e-12)
    # One weight per sample: the ends are real (1) and fake (0).
    for weight, point in ((1.0, real), (0.0, fake)):
        at_end = critic_loss(critic, real, labels, fake, torch.full_like(mix, weight), 10.0)[1].item()
        assert at_end == pytest.approx(critic_loss(critic, point, labels, point, mix, 10.0)[1].item(), rel=1e-12)


def test_terms_are_those_of_the_card() -> None:
    networks, _ = build("clswgan", penalty=4.0)
    real, labels, fake, mix = batch()
    terms = networks.critic_terms(real, labels, fake, mix)
    expected = plain(networks.critic, real, labels, fake, mix, 4.0)
    torch.testing.assert_close((terms["critic"], terms["penalty"]), expected)
    assert terms.keys() == {"critic", "penalty"}
    own = networks.generator_terms(real, labels, fake)
    assert own.keys() == {"generator"}
    torch.testing.assert_close(own["generator"], -networks.critic(fake, labels).mean())


def test_half_precision_is_only_that_of_the_inputs() -> None:
    networks, _ = build("clswgan")
    networks.critic.float()
    real, labels, fake, mix = (x.float() if x.is_floating_point() else x for x in batch())
    fake = fake.bfloat16()
    expected = networks.critic_terms(real, labels, fake.float(), mix)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = networks.critic_terms(real, labels, fake, mix) | networks.generator_terms(real, labels, fake)
    torch.testing.assert_close(found, expected | networks.generator_terms(real, labels, fake.float()))
    assert {term.dtype for term in found.values()} == {torch.float32}


def test_critic_has_one_hidden_layer() -> None:
    """What the closed form takes for granted."""
    shapes = {name: tuple(parameter.shape) for name, parameter in fresh().named_parameters()}
    first = {"fc1.weight": (HIDDEN, FEATURES + ATTRIBUTES), "fc1.bias": (HIDDEN,)}
    assert shapes == {**first, "fc2.weight": (1, HIDDEN), "fc2.bias": (1,)}
