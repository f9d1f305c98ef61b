"""What holds for every generator and its critics."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from stages.generators.generator import Backbone, backbone

sys.path.insert(0, str(Path(__file__).parent))
from networks import ATTRIBUTES, CLASSES, FEATURES, SEEN, WIDTH, batch, build, settings

NAMES = ("clswgan", "cegzsl")
each = pytest.mark.parametrize("name", NAMES)


def test_every_generator_of_the_schema_has_its_file() -> None:
    from typing import get_args

    from stages.parameters.zero_shot import D3GZSL

    union = D3GZSL.model_fields["generator"].annotation
    found = {get_args(part.model_fields["name"].annotation)[0] for part in get_args(union)}
    assert found == set(NAMES)
    for name in found:
        assert issubclass(backbone(name), Backbone)


@each
def test_generator_terms_reach_what_made_the_fakes_alone(name: str) -> None:
    networks, student = build(name)
    real, labels, _, _ = batch(12)
    real.requires_grad_()
    fake = networks.generator(torch.randn(12, ATTRIBUTES, dtype=torch.float64), labels)
    others = [real, *student.parameters()]
    others += [parameter for module in networks.critics.values() for parameter in module.parameters()]
    own = list(networks.generator.parameters())
    for term in networks.generator_terms(real, labels, fake).values():
        found = torch.autograd.grad(term, own + others, allow_unused=True, retain_graph=True)
        assert all(gradient is not None and gradient.any() for gradient in found[: len(own)])
        assert all(gradient is None for gradient in found[len(own) :])


@each
def test_critics_are_all_that_learns_from_fakes(name: str) -> None:
    """The generator that made them, and real features, get nothing; every critic gets something."""
    networks, student = build(name)
    real, labels, _, mix = batch(12)
    fake = networks.generator(torch.randn(12, ATTRIBUTES, dtype=torch.float64), labels)
    total = torch.stack(list(networks.critic_terms(real, labels, fake, mix).values())).sum()
    found = torch.autograd.grad(total, list(networks.generator.parameters()), allow_unused=True, retain_graph=True)
    assert all(gradient is None for gradient in found)
    for module in networks.critics.values():
        gradients = torch.autograd.grad(total, list(module.parameters()), retain_graph=True)
        assert any(gradient.any() for gradient in gradients)
    shared = torch.autograd.grad(total, list(student.embedding.parameters()), allow_unused=True)
    assert all((gradient is not None) == networks.shares_embedding for gradient in shared)


@each
def test_fresh_networks_are_those_of_the_card(name: str) -> None:
    """Noise as wide as the attributes unless told otherwise, N(0, 0.02^2), in the dtype of the attributes."""
    attributes = torch.rand(CLASSES, ATTRIBUTES, dtype=torch.float64)
    for noise in (None, 9):
        torch.manual_seed(0)
        chosen = settings(hidden=400, noise=noise)
        networks = backbone(name)(chosen, FEATURES, attributes, SEEN, nn.Identity(), WIDTH)
        assert networks.generator.noise == (noise or ATTRIBUTES)
        assert networks.generator.fc1.weight.shape == (400, (noise or ATTRIBUTES) + ATTRIBUTES)
        assert networks.critic.fc1.weight.shape == (400, FEATURES + ATTRIBUTES)
        for module in (networks.generator, *networks.critics.values()):
            assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float64}
        for module in (networks.generator, networks.critic):
            assert torch.equal(module.attributes, attributes)
            assert module.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert not module.fc1.bias.any()


@each
def test_training_one_phase_leaves_the_other_as_it_is(name: str) -> None:
    """A step on all parameters together, by the generator's terms, moves the generator alone."""
    networks, student = build(name)
    modules = {"generator": networks.generator, **networks.critics, "student": student}
    before = {key: [p.detach().clone() for p in module.parameters()] for key, module in modules.items()}
    optimizer = torch.optim.SGD([p for module in modules.values() for p in module.parameters()], lr=0.1)
    real, labels, _, _ = batch(12)
    fake = networks.generator(torch.randn(12, ATTRIBUTES, dtype=torch.float64), labels)
    torch.stack(list(networks.generator_terms(real, labels, fake).values())).sum().backward()
    optimizer.step()
    moved = {
        key
        for key, module in modules.items()
        if any(not torch.equal(new, old) for new, old in zip(module.parameters(), before[key], strict=True))
    }
    assert moved == {"generator"}
