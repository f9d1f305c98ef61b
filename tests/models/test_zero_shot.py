"""Networks for zero-shot recognition: their arithmetic by definition, in float64, and what they are built from."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.artifacts import Description, load_model, save_model
from models.layers import Normalise
from models.zero_shot import MLP, Comparator, Critic, Encoder, Generator, Projection, Scale, build, initialise

IMAGES = {"channels": 2, "size": 9, "mean": [0.2, 0.5], "std": [0.3, 0.1]}
EXACT: dict[str, float] = {"rtol": 1e-10, "atol": 1e-12}
Size = st.integers(1, 6)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stirred(module: Any, seed: int = 0) -> Any:
    """In float64, with weights that make units switch, and statistics that are not those of a fresh network."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, 0.7)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.3)  # type: ignore[arg-type]
            nn.init.uniform_(part.running_var, 0.5, 2)  # type: ignore[arg-type]
    return module.double().eval()


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def affine(x: Tensor, layer: nn.Linear) -> Tensor:
    """Row by row, by sums of products."""
    return torch.stack([(layer.weight * row).sum(1) + layer.bias for row in x])


# Scaling


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), Size, st.sets(st.integers(0, 5)), st.integers(0, 999))
def test_training_features_end_between_0_and_1(count: int, features: int, constant: set[int], seed: int) -> None:
    """Against plain Python; a constant feature ends as 0, and samples that come later may lie outside."""
    x = 10 * numbers(count, features, seed=seed)
    for column in constant & set(range(features)):
        x[:, column] = x[0, column]
    scale = Scale(features).double()
    scale.fit(x)
    rows = x.tolist()
    columns = list(zip(*rows, strict=True))
    wanted = [
        [
            (value - min(c)) / (max(c) - min(c)) if max(c) > min(c) else 0.0
            for value, c in zip(row, columns, strict=True)
        ]
        for row in rows
    ]
    torch.testing.assert_close(scale(x), torch.tensor(wanted, dtype=torch.float64), **EXACT)
    beyond = scale(x.max(0, keepdim=True).values + 1)
    assert (beyond > scale(x).max(0).values).all()
    assert beyond.isfinite().all()


def test_scaling_is_saved_and_does_not_learn() -> None:
    scale = Scale(3)
    assert set(scale.state_dict()) == {"minimum", "divisor"}
    assert not list(scale.parameters())
    x = torch.rand(4, 3)
    assert torch.equal(scale(x), x), "before it is fitted it changes nothing"
    scale.fit(x)
    other = Scale(3)
    other.load_state_dict(scale.state_dict())
    assert torch.equal(other(x), scale(x))


# Classifiers


@settings(deadline=None, max_examples=25)
@given(Size, Size, st.integers(1, 5), st.none() | Size)
def test_a_perceptron_is_its_definition(batch: int, features: int, classes: int, hidden: int | None) -> None:
    network = stirred(MLP(features, classes, hidden))
    network.scale.fit(numbers(7, features, seed=1))
    x = numbers(batch, features, seed=2)
    scaled = (x - network.scale.minimum) / network.scale.divisor
    embedding = scaled if hidden is None else affine(scaled, network.embedding[0]).clamp_min(0)
    output = network(x)
    assert output._fields == ("features", "embedding", "logits")
    torch.testing.assert_close(output.features, scaled, **EXACT)
    torch.testing.assert_close(output.embedding, embedding, **EXACT)
    torch.testing.assert_close(output.logits, affine(embedding, network.classifier), **EXACT)


def encoder(classes: int | None = 3, blocks: int = 1, widths: tuple[int, ...] = (4, 6)) -> Encoder:
    return stirred(Encoder(Normalise(IMAGES["mean"], IMAGES["std"]), 2, classes, widths, blocks))


def by_hand(network: Encoder, x: Tensor) -> Tensor:
    """Features from the weights alone."""

    def bn(y: Tensor, norm: Any) -> Tensor:
        shape = (1, -1, 1, 1)
        centred = (y - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
        return centred * norm.weight.view(shape) + norm.bias.view(shape)

    mean, std = (torch.tensor(IMAGES[key]).double().view(1, -1, 1, 1) for key in ("mean", "std"))
    x = bn(F.conv2d((x - mean) / std, network.stem[0].weight, None, 1, 1), network.stem[1]).relu()
    for number, block in enumerate(network.stages):
        stride = 2 if number > 0 else 1
        y = bn(F.conv2d(x, block.conv1.weight, None, stride, 1), block.bn1).relu()
        y = bn(F.conv2d(y, block.conv2.weight, None, 1, 1), block.bn2)
        x = (y + block.shortcut(x)).relu()
    return x.sum((2, 3)) / x.shape[2] / x.shape[3]


@pytest.mark.parametrize("size", [4, 9])
def test_an_encoder_is_its_definition(size: int) -> None:
    network = encoder(widths=(4, 6, 5))
    x = torch.rand(3, 2, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features, embedding, logits = network(x)
    torch.testing.assert_close(features, by_hand(network, x), rtol=1e-6, atol=1e-9)
    assert torch.equal(features, embedding)
    assert torch.equal(features, network.features(x))
    assert (features >= 0).all()
    torch.testing.assert_close(logits, affine(features, network.classifier), **EXACT)


def test_an_encoder_has_so_many_blocks_per_stage() -> None:
    network = encoder(blocks=2, widths=(4, 6, 5))
    assert [block.conv1.out_channels for block in network.stages] == [4, 4, 6, 6, 5, 5]
    assert [block.conv1.stride[0] for block in network.stages] == [1, 1, 2, 1, 2, 1]
    assert network.features(torch.rand(2, 2, 9, 9).double()).shape == (2, 5)


def test_a_perceptron_with_an_encoder_takes_images_and_features() -> None:
    inside = encoder(classes=None)
    network = stirred(MLP(6, 4, 5, inside))
    network.scale.fit(numbers(7, 6, seed=1))
    x = torch.rand(3, 2, 9, 9, dtype=torch.float64)
    by_images, by_features = network(x), network(inside.features(x))
    for one, other in zip(by_images, by_features, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    assert by_images.logits.shape == (3, 4)
    assert inside.classifier is None


# Generator and critics


@settings(deadline=None, max_examples=25)
@given(Size, Size, st.integers(1, 5), Size, Size, Size, st.integers(0, 99))
def test_a_generator_is_that_of_the_card(
    batch: int, features: int, classes: int, attributes: int, noise: int, hidden: int, seed: int
) -> None:
    """3.1: noise and attributes side by side, in this order, through two layers."""
    network = stirred(Generator(features, classes, attributes, noise, hidden), seed)
    network.attributes.copy_(numbers(classes, attributes, seed=seed))
    z, labels = numbers(batch, noise, seed=seed + 1), torch.arange(batch) * 7 % classes
    both = torch.cat([z, network.attributes[labels]], 1)
    wanted = affine(leaky(affine(both, network.fc1)), network.fc2).clamp_min(0)
    torch.testing.assert_close(network(z, labels), wanted, **EXACT)


@settings(deadline=None, max_examples=25)
@given(Size, Size, st.integers(1, 5), Size, Size, st.integers(0, 99))
def test_a_critic_is_that_of_the_card(
    batch: int, features: int, classes: int, attributes: int, hidden: int, seed: int
) -> None:
    """3.1: features and attributes side by side, in this order, to a number without bounds."""
    network = stirred(Critic(features, classes, attributes, hidden), seed)
    network.attributes.copy_(numbers(classes, attributes, seed=seed))
    x, labels = numbers(batch, features, seed=seed + 1), torch.arange(batch) * 7 % classes
    both = torch.cat([x, network.attributes[labels]], 1)
    wanted = affine(leaky(affine(both, network.fc1)), network.fc2)[:, 0]
    torch.testing.assert_close(network(x, labels), wanted, **EXACT)
    parts = network.of_features(x) + network.of_class(labels)
    torch.testing.assert_close(parts, affine(both, network.fc1), **EXACT)
    torch.testing.assert_close(network.from_hidden(parts), wanted, **EXACT)


def test_attributes_are_saved_and_do_not_learn() -> None:
    for network in (Generator(2, 3, 4, 5, 6), Critic(2, 3, 4, 6)):
        assert network.state_dict()["attributes"].shape == (3, 4)
        assert set(dict(network.named_parameters())) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


@settings(deadline=None, max_examples=25)
@given(Size, Size, Size, st.integers(0, 99))
def test_a_projection_has_length_1(batch: int, hidden: int, width: int, seed: int) -> None:
    network = stirred(Projection(hidden, width), seed)
    x = numbers(batch, hidden, seed=seed + 1)
    found, plain = network(x), affine(x, network.fc)
    torch.testing.assert_close(found, plain / plain.square().sum(1, keepdim=True).sqrt(), **EXACT)
    torch.testing.assert_close(found.square().sum(1), torch.ones(batch, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_that_no_hidden_unit_answers_to_moves_nothing(dtype: torch.dtype) -> None:
    """Before the bias has learnt it is projected to zeros: the gradient there is 0, and no multiple of 1e12."""
    network = stirred(Projection(4, 3)).to(dtype)
    nn.init.zeros_(network.fc.bias)
    x = numbers(3, 4).to(dtype)
    x[1] = 0
    x.requires_grad_()
    found = network(x)
    assert torch.equal(found[1], torch.zeros(3, dtype=dtype))
    (found * numbers(3, 3, seed=5).to(dtype)).sum().backward()
    alone = stirred(Projection(4, 3)).to(dtype)
    nn.init.zeros_(alone.fc.bias)
    (alone(x.detach()[[0, 2]]) * numbers(3, 3, seed=5)[[0, 2]].to(dtype)).sum().backward()
    for weight, other in zip(network.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, other.grad, rtol=1e-5, atol=1e-6)
    assert x.grad is not None
    assert not x.grad[1].any()
    assert x.grad[[0, 2]].any(1).all()


@settings(deadline=None, max_examples=25)
@given(Size, st.integers(1, 5), Size, Size, Size, st.integers(1, 200), st.integers(0, 99))
def test_a_comparator_is_that_of_the_card(
    batch: int, classes: int, hidden: int, attributes: int, width: int, chunk: int, seed: int
) -> None:
    """3.3: every sample beside every class, in this order; in parts of any size, gradients included."""
    network = stirred(Comparator(hidden, attributes, width), seed)
    h, a = numbers(batch, hidden, seed=seed + 1).requires_grad_(), numbers(classes, attributes, seed=seed + 2)
    rows = [torch.cat([h[i], a[c]]) for i in range(batch) for c in range(classes)]
    plain = affine(leaky(affine(torch.stack(rows), network.fc1)), network.fc2).reshape(batch, classes)
    inputs, weight = [h, *network.parameters()], numbers(batch, classes, seed=seed + 3)
    wanted = torch.autograd.grad((plain * weight).sum(), inputs)
    for size in (chunk, 2**24):
        found = network(h, a, chunk=size)
        torch.testing.assert_close(found, plain, **EXACT)
        gradients = torch.autograd.grad((found * weight).sum(), inputs)
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_a_comparator_holds_so_many_numbers_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    network, largest = Comparator(3, 2, 8), []
    plain = F.leaky_relu
    monkeypatch.setattr(F, "leaky_relu", lambda x, slope: (largest.append(x.numel()), plain(x, slope))[1])
    network(torch.rand(10, 3), torch.rand(4, 2), chunk=100)
    assert sum(largest) == 10 * 4 * 8
    assert max(largest) == 3 * 4 * 8


def test_weights_begin_small_and_biases_at_zero() -> None:
    torch.manual_seed(0)
    networks = (Generator(40, 3, 20, 30, 200), Critic(40, 3, 20, 200), nn.Sequential(nn.Linear(50, 90), nn.ReLU()))
    initialise(*networks)
    for network in networks:
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                assert not layer.bias.any()
                assert layer.weight.abs().max() < 0.12
        spread = torch.cat([weight.flatten() for weight in network.parameters() if weight.dim() == 2])
        assert spread.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(spread.mean().item()) < 1e-3


# Descriptions


NETWORKS: list[tuple[dict[str, Any], type[nn.Module]]] = [
    ({"name": "encoder", "widths": [4, 6], "blocks": 2}, Encoder),
    ({"name": "mlp", "hidden": 7, "encoder": None}, MLP),
    ({"name": "mlp", "hidden": None, "encoder": {"widths": [4, 6], "blocks": 1}}, MLP),
    ({"name": "snapshots", "hidden": 7, "count": 3}, nn.ModuleList),
    ({"name": "snapshots", "hidden": None, "count": 1}, nn.ModuleList),
    ({"name": "generator", "attributes": 4, "noise": 3, "hidden": 8}, Generator),
]


def description(network: dict[str, Any], classes: int = 5) -> dict[str, Any]:
    names = [f"class {label}" for label in range(classes)]
    return {"network": network, "interface": {"classes": names, "seen": names[:2], "features": 6, "images": IMAGES}}


@pytest.mark.parametrize(("network", "kind"), NETWORKS, ids=[str(number) for number in range(len(NETWORKS))])
def test_a_network_is_built_from_its_description(network: dict[str, Any], kind: Any, tmp_path: Any) -> None:
    """Written and read, it is the same to the bit; the description stays as it was."""
    told = json.loads(json.dumps(description(network)))
    built = stirred(build(told)).float()
    assert type(built) is kind
    assert told == description(network)
    save_model(tmp_path, built, Description("x", "zero_shot", "student", network, told["interface"], {}, {}, None, []))
    again, _ = load_model(tmp_path)
    state = again.state_dict()
    assert set(state) == set(built.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in built.state_dict().items())
    if isinstance(again, Generator):
        assert again.built_from == network
        assert again.attributes.shape == (5, 4)
        assert again(torch.rand(2, 3), torch.tensor([4, 0])).shape == (2, 6)
        return
    for part in again.children() if isinstance(again, nn.ModuleList) else [again]:
        if network["name"] == "encoder" or network.get("encoder"):
            assert part(torch.rand(2, 2, 9, 9)).logits.shape == (2, 5)
        if network["name"] != "encoder":
            assert part(torch.rand(2, 6)).logits.shape == (2, 5)
    if isinstance(again, nn.ModuleList):
        assert len(again) == network["count"]


@pytest.mark.parametrize(("network", "kind"), NETWORKS, ids=[str(number) for number in range(len(NETWORKS))])
def test_weights_of_another_number_of_classes_do_not_fit(network: dict[str, Any], kind: Any) -> None:
    del kind
    with pytest.raises(RuntimeError, match="size mismatch"):
        build(description(network, 5)).load_state_dict(build(description(network, 4)).state_dict())


def test_inputs_of_another_shape_are_refused() -> None:
    generator, critic = Generator(6, 5, 4, 3, 8), Critic(6, 5, 4, 8)
    labels = torch.tensor([0, 4])
    for wrong in (
        lambda: MLP(6, 5, 7)(torch.rand(2, 5)),
        lambda: generator(torch.rand(2, 4), labels),
        lambda: generator(torch.rand(3, 3), labels),
        lambda: generator(torch.rand(2, 3), torch.tensor([0, 5])),
        lambda: critic(torch.rand(2, 7), labels),
        lambda: Comparator(3, 2, 8)(torch.rand(4, 3), torch.rand(4, 3)),
        lambda: Projection(3, 2)(torch.rand(4, 4)),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            wrong()
