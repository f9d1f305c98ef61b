"""Networks for recognition: their shapes, their arithmetic, and torchvision's weights in their places."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data.errors import UserError
from models.layers import Normalise
from models.recognition import EfficientNetLite, Output, ResNet, TorchvisionNetwork, build

MEAN, STD = (0.2, 0.5, 0.7), (0.3, 0.1, 0.4)


SMALL = {"name": "resnet", "widths": [4, 6], "blocks": 1, "embedding": None}


def description(channels: int, classes: int, **network: Any) -> dict[str, Any]:
    interface = {
        "classes": [f"class {index}" for index in range(classes)],
        "channels": channels,
        "mean": list(MEAN[:channels]),
        "std": list(STD[:channels]),
    }
    return {"network": network, "interface": interface}


def resnet(channels: int = 3, classes: int = 4, seed: int = 0, **network: Any) -> ResNet:
    """With BatchNorm statistics that are not those of a fresh network, in eval mode."""
    torch.manual_seed(seed)
    built = build(description(channels, classes, **(SMALL | network)))
    assert isinstance(built, ResNet)
    stir(built)
    return built.eval()


def stir(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def numbers(output: Output) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in output]


@settings(deadline=None, max_examples=25)
@given(
    st.integers(2, 33), st.integers(2, 33), st.sampled_from([1, 3]), st.integers(2, 5),
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 2), st.none() | st.integers(1, 7),
)  # fmt: skip
def test_any_image_gives_the_features_that_are_promised(
    height: int, width: int, channels: int, classes: int, widths: list[int], blocks: int, embedding: int | None
) -> None:
    network = resnet(channels, classes, widths=widths, blocks=blocks, embedding=embedding)
    output = network(images(3, channels, height, width))
    assert network.features == {"pooled": widths[-1], "embedding": embedding or widths[-1]}
    assert {name: getattr(output, name).shape for name in network.features} == {
        name: (3, size) for name, size in network.features.items()
    }
    assert output.logits.shape == (3, classes)
    assert all(tensor.isfinite().all() for tensor in output)
    assert torch.equal(output.pooled, output.embedding) == (embedding is None)


def by_hand(state: dict[str, Tensor], x: Tensor, widths: list[int], blocks: int) -> Output:
    """The network once more, from its weights alone."""

    def normed(x: Tensor, name: str) -> Tensor:
        shape = (1, -1, 1, 1)
        mean, variance = state[f"{name}.running_mean"].view(shape), state[f"{name}.running_var"].view(shape)
        return (x - mean) / (variance + 1e-5).sqrt() * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(
            shape
        )

    mean, std = (torch.tensor(numbers).to(x.dtype).view(1, 3, 1, 1) for numbers in (MEAN, STD))
    x = (x - mean) / std
    x = normed(F.conv2d(x, state["stem.0.weight"], padding=1), "stem.1").relu()
    for index in range(len(widths) * blocks):
        name, stride = f"stages.{index}", 2 if index % blocks == 0 and index > 0 else 1
        y = normed(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1").relu()
        y = normed(F.conv2d(y, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        if f"{name}.shortcut.0.weight" in state:
            x = normed(F.conv2d(x, state[f"{name}.shortcut.0.weight"], stride=stride), f"{name}.shortcut.1")
        x = (x + y).relu()
    pooled = x.flatten(2).sum(2) / (x.shape[2] * x.shape[3])
    embedding = pooled
    if "embedding.weight" in state:
        embedding = pooled @ state["embedding.weight"].T + state["embedding.bias"]
    return Output(pooled, embedding, embedding @ state["classifier.weight"].T + state["classifier.bias"])


@pytest.mark.parametrize("embedding", [None, 5])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("widths", [[3], [4, 4], [3, 5, 7]])
def test_it_computes_what_its_weights_say(widths: list[int], blocks: int, embedding: int | None) -> None:
    network = resnet(widths=widths, blocks=blocks, embedding=embedding).double()
    x = images(4, 3, 9, 11).double()
    expected = by_hand(dict(network.state_dict()), x, widths, blocks)
    for found, wanted in zip(numbers(network(x)), numbers(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


def test_mean_and_spread_are_applied_and_are_no_weights() -> None:
    network = resnet(1)
    assert not [name for name in network.state_dict() if "normalise" in name or name.split(".")[-1] in ("mean", "std")]
    x = images(3, 1, 8, 8)
    plain = ResNet(Normalise([0.0], [1.0]), 1, 4, [4, 6], 1, None).eval()
    plain.load_state_dict(network.state_dict(), strict=True)
    np.testing.assert_allclose(network(x).logits.detach(), plain((x - MEAN[0]) / STD[0]).logits.detach(), atol=1e-5)
    assert not torch.allclose(network(x).logits, plain(x).logits, atol=1e-3)


def test_mean_and_spread_move_with_the_network() -> None:
    network = resnet().double()
    assert network.normalise.mean.dtype == torch.float64
    assert {buffer.dtype for name, buffer in network.named_buffers() if "tracked" not in name} == {torch.float64}


def test_evaluation_is_deterministic_and_one_image_at_a_time() -> None:
    network = resnet()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    x = images(6, 3, 12, 12)
    first = network(x)
    assert all(torch.equal(one, other) for one, other in zip(first, network(x), strict=True))
    for index in range(6):
        np.testing.assert_allclose(
            network(x[index : index + 1]).logits[0].detach(), first.logits[index].detach(), atol=1e-5
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not torch.equal(network.train()(x).logits, first.logits), "in training, BatchNorm looks at the batch"


def test_the_seed_decides_the_weights() -> None:
    def weights(seed: int) -> Tensor:
        return nn.utils.parameters_to_vector(resnet(seed=seed).parameters())

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("embedding", [None, 5])
def test_unit_scales_embeddings_and_nothing_else(embedding: int | None) -> None:
    x = images(4, 3, 9, 9)
    plain, scaled = (resnet(embedding=embedding, unit=unit) for unit in (False, True))
    assert plain.state_dict().keys() == scaled.state_dict().keys()
    before, found = plain(x), scaled(x)
    assert torch.equal(before.pooled, found.pooled)
    long = before.embedding.double()
    expected = long / long.square().sum(1, keepdim=True).sqrt()
    np.testing.assert_allclose(found.embedding.detach(), expected.detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(found.logits, scaled.classifier(found.embedding))  # type: ignore[misc]
    dead = resnet(embedding=None, unit=True)
    for parameter in dead.parameters():
        nn.init.zeros_(parameter)
    output = dead.train()(x)
    assert torch.equal(output.embedding, torch.zeros(4, 6))
    output.embedding.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in dead.parameters())


def test_without_classes_there_is_no_classifier_and_all_else_is_the_same() -> None:
    x = images(3, 3, 9, 9)
    some, none = (resnet(classes=classes, embedding=5) for classes in (4, 0))
    state = {key: value for key, value in some.state_dict().items() if not key.startswith("classifier")}
    assert state.keys() == none.state_dict().keys()
    none.load_state_dict(state)
    assert torch.equal(some(x).embedding, none(x).embedding)
    assert none(x).logits.shape == (3, 0)


# EfficientNet-Lite


@pytest.fixture(scope="module")
def lite() -> tuple[EfficientNetLite, Any]:
    """Ours with 1000 classes, and the package's own network with other weights; both in eval mode."""
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(0)
    ours = build(description(3, 1000, name="efficientnet_lite", variant="lite0", embedding=None, unit=False))
    assert isinstance(ours, EfficientNetLite)
    theirs = EfficientNet.from_name("efficientnet-lite0", image_size=64)
    stir(theirs)
    return ours.eval(), theirs.eval()


def test_every_weight_of_the_package_has_one_place_here(lite: tuple[EfficientNetLite, Any]) -> None:
    ours, theirs = lite
    mapped = {ours.own_key(key): tensor.shape for key, tensor in theirs.state_dict().items()}
    assert len(mapped) == len(theirs.state_dict())
    assert mapped == {key: tensor.shape for key, tensor in ours.state_dict().items()}


def test_the_packages_weights_give_its_outputs(lite: tuple[EfficientNetLite, Any]) -> None:
    ours, theirs = lite
    ours.load_state_dict({ours.own_key(key): tensor for key, tensor in theirs.state_dict().items()}, strict=True)
    x = images(2, 3, 64, 64)
    normalised = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.inference_mode():
        output, logits = ours(x), theirs(normalised)
        np.testing.assert_allclose(output.logits, logits, rtol=1e-4, atol=1e-4)
        assert logits.std() > 0.01
        assert output.pooled.shape == (2, 1280)
        assert ours(images(2, 3, 33, 47)).pooled.shape == (2, 1280)  # of any size


def test_its_embedding_and_classes_are_those_that_are_asked_for() -> None:
    fields = {"name": "efficientnet_lite", "variant": "lite0", "embedding": 7, "unit": True}
    network = build(description(3, 0, **fields)).eval()
    assert network.features == {"pooled": 1280, "embedding": 7}
    output = network(images(2, 3, 32, 32))
    assert (output.embedding.shape, output.logits.shape) == ((2, 7), (2, 0))
    np.testing.assert_allclose(output.embedding.norm(dim=1).detach(), 1, rtol=1e-5)
    with pytest.raises(UserError, match=r"'efficientnet_lite' \(lite0\) takes 3 channels, the images have 1"):
        build(description(1, 4, **fields))


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_statistics_stay_and_all_else_learns(frozen: bool) -> None:
    fields = {"name": "efficientnet_lite", "variant": "lite0", "embedding": 3, "freeze_batchnorm": frozen}
    torch.manual_seed(0)
    network = build(description(3, 0, **fields))
    stir(network)
    network.backbone._global_params = network.backbone._global_params._replace(drop_connect_rate=0.0)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    x = images(4, 3, 32, 32)
    expected = network.eval()(x).embedding
    for mode in (True, False, True):
        network.train(mode)
        assert network.training == network.backbone.training == mode
    output = network(x)
    assert torch.equal(output.embedding, expected) == frozen
    kept = [torch.equal(buffer, before[name]) for name, buffer in network.named_buffers() if "running" in name]
    assert kept
    assert set(kept) == {frozen}
    output.embedding.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


# torchvision


@pytest.fixture(scope="module")
def pair() -> tuple[TorchvisionNetwork, Any]:
    """Ours with 1000 classes, and torchvision's own resnet18 with other weights; both in eval mode."""
    torch.manual_seed(0)
    ours = build(description(3, 1000, name="torchvision", model="resnet18"))
    assert isinstance(ours, TorchvisionNetwork)
    from torchvision.models import resnet18  # importable once ours was built, whatever the pair of wheels

    theirs = resnet18(weights=None)
    stir(theirs)
    return ours.eval(), theirs.eval()


def test_a_network_of_torchvision_may_have_an_embedding() -> None:
    network = build(description(3, 5, name="torchvision", model="resnet18", embedding=6, unit=True)).eval()
    output = network(torch.rand(2, 3, 32, 32))
    assert [tuple(part.shape) for part in output] == [(2, 512), (2, 6), (2, 5)]
    assert torch.allclose(output.embedding, F.normalize(network.embedding(output.pooled)), atol=1e-6)
    assert network.features == {"pooled": 512, "embedding": 6}


def test_every_weight_of_torchvision_has_one_place_here(pair: tuple[TorchvisionNetwork, Any]) -> None:
    ours, theirs = pair
    state = theirs.state_dict()
    keys = [ours.own_key(key) for key in state]
    assert len(set(keys)) == len(keys)
    assert set(keys) == set(ours.state_dict())
    mapped = {ours.own_key(key): tensor for key, tensor in state.items()}
    assert {key: tensor.shape for key, tensor in mapped.items()} == {
        key: tensor.shape for key, tensor in ours.state_dict().items()
    }
    assert not [key for key in ours.state_dict() if "normalise" in key]


@pytest.mark.parametrize("size", [32, 45])
def test_the_same_weights_give_the_same_outputs(pair: tuple[TorchvisionNetwork, Any], size: int) -> None:
    ours, theirs = pair
    ours.load_state_dict({ours.own_key(key): tensor for key, tensor in theirs.state_dict().items()}, strict=True)
    x = images(2, 3, size, size)
    normalised = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.inference_mode():
        output, logits = ours(x), theirs(normalised)
        penultimate = nn.Sequential(*list(theirs.children())[:-1])(normalised).flatten(1)
    np.testing.assert_allclose(output.logits, logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(output.pooled, penultimate, rtol=1e-5, atol=1e-5)
    assert torch.equal(output.pooled, output.embedding)
    assert ours.features == {"pooled": 512, "embedding": 512}
    assert output.pooled.shape == (2, 512)
    assert logits.std() > 0.01


def test_grey_images_are_refused() -> None:
    with pytest.raises(UserError, match="'resnet18' of torchvision takes 3 channels, the images have 1"):
        build(description(1, 4, name="torchvision", model="resnet18"))


@pytest.mark.parametrize(
    ("wrong", "right"), [("resnet19", "resnet1[08]"), ("resnet_50", "resnet50"), ("wide_resnet50", "wide_resnet50_2")]
)
def test_an_unknown_network_is_refused_with_the_nearest_name(wrong: str, right: str) -> None:
    with pytest.raises(UserError, match=rf"torchvision has no network '{wrong}'; did you mean '{right}'\?"):
        build(description(3, 4, name="torchvision", model=wrong))
