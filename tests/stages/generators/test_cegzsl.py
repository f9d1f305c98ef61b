"""CE-GZSL's losses: sample by sample in plain Python, and the card's property 15."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.zero_shot import Comparator
from stages.generators import cegzsl
from stages.generators.cegzsl import class_loss, class_scores, instance_loss

sys.path.insert(0, str(Path(__file__).parent))
from networks import CLASSES, SEEN, WIDTH, batch, build


def points(count: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, WIDTH, generator=random, dtype=torch.float64), dim=1)


def by_samples(z: Tensor, labels: Tensor, temperature: float) -> float:
    rows, anchors = z.tolist(), []
    for i, a in enumerate(rows):
        powers = {
            q: math.exp(sum(x * y for x, y in zip(a, b, strict=True)) / temperature)
            for q, b in enumerate(rows)
            if q != i
        }
        positive = [power for q, power in powers.items() if labels[q] == labels[i]]
        if positive:
            total = math.fsum(powers.values())
            anchors.append(-math.fsum(math.log(power / total) for power in positive) / len(positive))
    return math.fsum(anchors) / len(anchors) if anchors else 0.0


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("labels", [[0, 0], [0, 1, 0, 2, 1, 0, 3], [4] * 5, [0, 1, 1, 2, 3]], ids=str)
def test_instance_loss_is_the_mean_over_samples(labels: list[int], temperature: float) -> None:
    z, y = points(len(labels)), torch.tensor(labels)
    assert instance_loss(z, y, temperature).item() == pytest.approx(by_samples(z, y, temperature), rel=1e-12)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: instance_loss(z, y, temperature), z)


@pytest.mark.parametrize("count", [1, 4])
def test_nobody_of_the_same_class_is_no_loss(count: int) -> None:
    z = points(count).requires_grad_()
    loss = instance_loss(z, torch.arange(count), 0.1)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.item() == 0
    assert not gradient.any()


def test_samples_without_others_are_left_out_but_compared_with() -> None:
    z, labels = points(6), torch.tensor([0, 0, 1, 1, 2, 3])
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(instance_loss(leaf, labels, 0.1), leaf)
    assert gradient[4:].any()
    assert instance_loss(z, labels, 0.1) > instance_loss(z[:4], labels[:4], 0.1)


def test_instance_loss_is_blind_to_order_and_to_names() -> None:
    z, labels = points(9), torch.arange(9) % 4
    order = torch.randperm(9)
    value = instance_loss(z, labels, 0.1)
    torch.testing.assert_close(instance_loss(z[order], labels[order], 0.1), value)
    torch.testing.assert_close(instance_loss(z, 70 - 3 * labels, 0.1), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_temperatures_stay_finite(dtype: torch.dtype) -> None:
    z = torch.cat([points(3), points(3)]).to(dtype).requires_grad_()
    loss = instance_loss(z, torch.tensor([0, 1, 2, 1, 2, 0]), 1e-4)
    assert loss.dtype == torch.float32
    assert 1e3 < loss < 1e5
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_class_loss_tells_the_right_class_from_all_seen_ones() -> None:
    scores, targets = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    rows = zip((scores / 0.1).tolist(), targets.tolist(), strict=True)
    expected = math.fsum(math.log(math.fsum(math.exp(x - row[y]) for x in row)) for row, y in rows) / 5
    assert class_loss(scores, targets, 0.1).item() == pytest.approx(expected, rel=1e-12)


def scores_one_by_one(comparator: Any, hidden: Tensor, attributes: Tensor) -> Tensor:
    """Every pair of a sample and a class through both layers."""
    rows = []
    for sample in hidden:
        pairs = torch.cat([sample.expand(len(attributes), -1), attributes], 1)
        rows.append(comparator.fc2(F.leaky_relu(comparator.fc1(pairs), 0.2))[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("chunk", [1, 100, 2**20])
@pytest.mark.parametrize(("count", "width"), [(1, 1), (7, 5), (23, 6)])
def test_scores_are_those_of_every_pair(chunk: int, count: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample at a time, some, or all at once; also where the comparator's weights are fixed."""
    monkeypatch.setattr(cegzsl, "CHUNK", chunk)
    torch.manual_seed(count)
    comparator = Comparator(WIDTH, 3, width).double()
    hidden, attributes = torch.randn(count, WIDTH, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    hidden.requires_grad_()
    upstream = torch.randn(count, 4, dtype=torch.float64)
    leaves = [hidden, *comparator.parameters()]
    expected = scores_one_by_one(comparator, hidden, attributes)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for found in (class_scores(comparator, hidden, attributes), comparator(hidden, attributes)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(torch.autograd.grad(found, leaves, upstream), wanted, rtol=1e-11, atol=1e-12)
    fixed = class_scores(comparator, hidden, attributes, fixed=True)
    assert torch.equal(fixed, class_scores(comparator, hidden, attributes))
    own, *others = torch.autograd.grad(fixed, leaves, upstream, allow_unused=True)
    torch.testing.assert_close(own, wanted[0], rtol=1e-11, atol=1e-12)
    assert others == [None] * 4


def test_terms_are_those_of_the_card() -> None:
    """Weights belong to the generator's phase: the critics' sum is plain (card 3.3)."""
    networks, student = build("cegzsl")
    real, labels, fake, mix = batch(12)
    attributes = networks.critic.attributes[SEEN]
    projection = networks.critics["projection"]
    terms = networks.critic_terms(real, labels, fake, mix)
    assert terms.keys() == {"critic", "penalty", "instance", "class"}
    hidden = student.embedding(real)
    z = F.normalize(F.linear(hidden, projection.fc.weight, projection.fc.bias), dim=1)  # type: ignore[union-attr]
    columns = torch.searchsorted(SEEN, labels)
    scores = scores_one_by_one(networks.critics["comparator"], hidden, attributes)
    torch.testing.assert_close(terms["instance"].item(), by_samples(z, labels, 0.1))
    torch.testing.assert_close(terms["class"], F.cross_entropy(scores / 0.1, columns))

    own = networks.generator_terms(real, labels, fake)
    assert own.keys() == {"generator", "instance", "class"}
    hidden = student.embedding(torch.cat([fake, real]))
    z = F.normalize(F.linear(hidden, projection.fc.weight, projection.fc.bias), dim=1)  # type: ignore[union-attr]
    scores = scores_one_by_one(networks.critics["comparator"], hidden[:12], attributes)
    torch.testing.assert_close(own["instance"].item(), 1e-3 * by_samples(z, labels.repeat(2), 0.1))
    torch.testing.assert_close(own["class"], 1e-2 * F.cross_entropy(scores / 0.1, columns))


def test_the_shared_layer_learns_with_the_critics_and_not_with_the_generator() -> None:
    networks, student = build("cegzsl")
    real, labels, fake, mix = batch(12)
    hidden = list(student.embedding.parameters())
    terms = networks.critic_terms(real, labels, fake, mix)
    for name in ("instance", "class"):
        assert all(g.any() for g in torch.autograd.grad(terms[name], hidden, retain_graph=True))
    for name in ("critic", "penalty"):
        assert torch.autograd.grad(terms[name], hidden, retain_graph=True, allow_unused=True) == (None, None)
    fake.requires_grad_()
    own = networks.generator_terms(real, labels, fake)
    for term in own.values():
        assert torch.autograd.grad(term, hidden, retain_graph=True, allow_unused=True) == (None, None)
        assert torch.autograd.grad(term, fake, retain_graph=True)[0].any()
    assert networks.shares_embedding


def test_sizes_are_those_of_the_settings() -> None:
    networks, _ = build("cegzsl", embedding=3, comparator=11)
    assert networks.critics.keys() == {"critic", "projection", "comparator"}
    assert networks.critics["projection"].fc.weight.shape == (3, WIDTH)  # type: ignore[union-attr]
    assert networks.critics["comparator"].fc1.weight.shape == (11, WIDTH + 3)  # type: ignore[union-attr]
    assert len(networks.critic.attributes) == CLASSES
