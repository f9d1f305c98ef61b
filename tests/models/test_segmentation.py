"""Networks for segmentation: shapes, arithmetic against torchvision and slow forms, cost, counting of pixels."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import recognition
from models.segmentation import (
    AtrousPyramid,
    Encoder,
    Output,
    PyramidPooling,
    Segmenter,
    adaptive_means,
    build,
    classify,
    confusion,
    intersection_and_union,
    mean_iou,
    upsample,
)

MEAN, STD = [0.2, 0.5, 0.7], [0.3, 0.1, 0.4]
ENCODER = {"name": "resnet", "widths": [4, 8, 8, 12], "blocks": [1, 1, 1, 1], "block": "basic", "stem": "light"}
HEADS: dict[str, dict[str, Any]] = {
    "pspnet": {"name": "pspnet", "pools": [1, 2, 3, 6]},
    "deeplabv3": {"name": "deeplabv3", "dilations": [1, 12, 24, 36]},
}


def description(head: str = "pspnet", classes: int = 5, encoder: dict[str, Any] | None = None, **network: Any) -> Any:
    return {
        "network": {
            "encoder": ENCODER | {"sha256": None} | (encoder or {}),
            "width": 6,
            "auxiliary": 3,
            "dropout": 0.1,
            **HEADS[head],
            **network,
        },
        "interface": {"classes": [str(index) for index in range(classes)], "channels": 3, "mean": MEAN, "std": STD},
    }


def segmenter(*arguments: Any, **settings: Any) -> Segmenter:
    """With BatchNorm statistics that are not those of a fresh network, in eval mode."""
    torch.manual_seed(0)
    network = build(description(*arguments, **settings))
    stir(network)
    return network.eval()


def stir(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# Shapes


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(HEADS)), st.sampled_from(["deep", "wide", "light"]),
    st.sampled_from(["basic", "bottleneck"]), st.integers(16, 70), st.integers(16, 70), st.integers(1, 3),
    st.lists(st.integers(1, 2), min_size=4, max_size=4), st.none() | st.integers(1, 4), st.integers(2, 6),
)  # fmt: skip
def test_any_image_gives_the_maps_that_are_promised(
    head: str, stem: str, block: str, height: int, width: int, count: int, blocks: list[int],
    auxiliary: int | None, classes: int,
) -> None:  # fmt: skip
    encoder = {"stem": stem, "block": block, "blocks": blocks}
    network = segmenter(head, classes, encoder, auxiliary=auxiliary)
    x = images(count, 3, height, width)
    eighth, quarter = ((math.ceil(height / n), math.ceil(width / n)) for n in (8, 4))
    for training in (False, True):
        if training and count == 1:
            continue
        output = network.train(training)(x)
        assert output.logits.shape == (count, classes, *eighth)
        assert (output.auxiliary is not None) == (training and auxiliary is not None)
        if output.auxiliary is not None:
            assert output.auxiliary.shape == output.logits.shape
        assert {place: tuple(found.shape) for place, found in output.features.items()} == {
            place: (count, width, *(quarter if place == "stage1" else eighth))
            for place, width in network.features.items()
        }
        assert list(network.features) == ["stage1", "stage2", "stage3", "stage4", "last"]
        assert output.features["last"] is output.features["stage4"]
        assert all(found.isfinite().all() for found in (output.logits, *output.features.values()))
        assert upsample(output.logits, (height, width)).shape == (count, classes, height, width)


def test_the_encoder_runs_without_a_head() -> None:
    network = segmenter()
    x = images(2, 3, 24, 32)
    whole = network(x)
    for head in (network.context, network.head, network.auxiliary):
        head.register_forward_hook(lambda *_: pytest.fail("a head ran"))  # type: ignore[union-attr]
    features = network.encode(x)
    assert features.keys() == whole.features.keys()
    assert all(torch.equal(features[place], whole.features[place]) for place in features)


def test_evaluation_is_one_image_at_a_time_and_changes_nothing() -> None:
    for head in HEADS:
        network = segmenter(head)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        x = images(4, 3, 40, 24)
        first = network(x)
        assert torch.equal(first.logits, network(x).logits)
        for index in range(4):
            one = network(x[index : index + 1]).logits[0]
            np.testing.assert_allclose(one.detach(), first.logits[index].detach(), atol=1e-5)
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_mean_and_spread_are_applied_and_are_no_weights() -> None:
    network = segmenter()
    assert not [name for name in network.state_dict() if "normalise" in name]
    x = images(2, 3, 32, 32)
    plain = description()
    plain["interface"] |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    twin = build(plain).eval()
    twin.load_state_dict(network.state_dict(), strict=True)
    normalised = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    np.testing.assert_allclose(network(x).logits.detach(), twin(normalised).logits.detach(), atol=1e-5)
    assert not torch.allclose(network(x).logits, twin(x).logits, atol=1e-3)


# Arithmetic


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 20), st.integers(1, 20), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**31)
)
def test_means_over_cells_are_those_of_adaptive_pooling(height: int, width: int, pools: list[int], seed: int) -> None:
    """Also where the map is smaller than the number of cells, or no multiple of it."""
    x = torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for layout in (x, x.contiguous(memory_format=torch.channels_last)):
        for pool, found in zip(pools, adaptive_means(layout, pools), strict=True):
            torch.testing.assert_close(found, F.adaptive_avg_pool2d(x, pool), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("size", [64, 45])
def test_the_encoder_is_that_of_torchvision(block: str, size: int) -> None:
    """torchvision refuses dilated basic blocks, so there the strides of its network are turned into dilations here."""
    recognition.build({"network": {"name": "torchvision", "model": "resnet18"}, "interface": INTERFACE})
    from torchvision.models import resnet18, resnet50  # importable now, whatever the pair of wheels

    torch.manual_seed(0)
    if block == "bottleneck":
        theirs = resnet50(weights=None, replace_stride_with_dilation=[False, True, True])
        ours = Encoder(3, [256, 512, 1024, 2048], [3, 4, 6, 3], block, "wide")
    else:
        theirs = resnet18(weights=None)
        ours = Encoder(3, [64, 128, 256, 512], [2, 2, 2, 2], block, "wide")
        for layer, dilations in ((theirs.layer3, (1, 2)), (theirs.layer4, (2, 4))):
            layer[0].conv1.stride = layer[0].downsample[0].stride = (1, 1)
            for part, dilation in zip(layer, dilations, strict=True):
                part.conv1.dilation = part.conv1.padding = (dilation, dilation)
    stir(theirs)
    keys = {key: Encoder.own_key(key) for key in theirs.state_dict()}
    assert [key for key, own in keys.items() if own is None] == ["fc.weight", "fc.bias"]
    state = {own: theirs.state_dict()[key] for key, own in keys.items() if own is not None}
    assert len(state) == len(keys) - 2
    ours.load_state_dict(state, strict=True)
    theirs.eval()
    x = images(2, 3, size, size)
    with torch.inference_mode():
        found = ours.eval()(x)
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for stage in range(1, 5):
            y = theirs.get_submodule(f"layer{stage}")(y)
            torch.testing.assert_close(found[f"stage{stage}"], y, rtol=1e-5, atol=1e-5)
    assert found["last"].shape[-1] == math.ceil(size / 8)
    assert y.std() > 0.1


INTERFACE = {"classes": ["a"], "channels": 3, "mean": MEAN, "std": STD}


@pytest.mark.parametrize("model", ["resnet34", "resnet101"])
def test_every_weight_of_torchvision_has_a_place(model: str) -> None:
    with torch.device("meta"):
        theirs = recognition.build({"network": {"name": "torchvision", "model": model}, "interface": INTERFACE})
        small = model == "resnet34"
        widths = [64, 128, 256, 512] if small else [256, 512, 1024, 2048]
        blocks = [3, 4, 6, 3] if small else [3, 4, 23, 3]
        ours = Encoder(3, widths, blocks, "basic" if small else "bottleneck", "wide")
    state = {Encoder.own_key(key): value.shape for key, value in theirs.get_submodule("backbone").state_dict().items()}
    assert state == {key: value.shape for key, value in ours.state_dict().items()}


def test_the_pyramid_stands_beside_the_features() -> None:
    torch.manual_seed(0)
    pyramid = PyramidPooling(5, 2, [1, 4]).double().eval()
    stir(pyramid)
    x = images(2, 5, 9, 7).double()
    found = pyramid(x)
    assert torch.equal(found[:, :5], x)
    for index, pool in enumerate([1, 4]):
        level = F.interpolate(pyramid.levels[index](F.adaptive_avg_pool2d(x, pool)), (9, 7), mode="bilinear")
        torch.testing.assert_close(found[:, 5 + 2 * index : 7 + 2 * index], level, rtol=1e-12, atol=1e-12)


def test_branches_have_their_dilations() -> None:
    torch.manual_seed(0)
    pyramid = AtrousPyramid(3, 2, [1, 2, 5]).double().eval()
    stir(pyramid)
    x = images(2, 3, 8, 9).double()
    found = pyramid(x)
    parts = [pyramid.whole(x.mean((2, 3), keepdim=True)).expand(-1, -1, 8, 9)]
    for branch, dilation in zip(pyramid.branches, [1, 2, 5], strict=True):
        weight = branch[0].weight  # type: ignore[index]
        padding = 0 if dilation == 1 else dilation
        parts.append(branch[2](branch[1](F.conv2d(x, weight, dilation=dilation, padding=padding))))  # type: ignore[index]
    torch.testing.assert_close(found, torch.cat(parts, 1), rtol=1e-12, atol=1e-12)
    assert [tuple(branch[0].weight.shape[2:]) for branch in pyramid.branches] == [(1, 1), (3, 3), (3, 3)]  # type: ignore[index]


def test_dropout_takes_whole_channels_and_only_in_training() -> None:
    network = segmenter(dropout=0.5)
    seen: list[tuple[Tensor, Tensor]] = []
    network.head[3].register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    network.train()(images(4, 3, 32, 32))
    network.eval()(images(4, 3, 32, 32))
    (before, after), (plain, same) = seen
    assert torch.equal(plain, same)
    kept = (after == 2 * before).flatten(2).all(2)
    assert (kept | (after == 0).flatten(2).all(2)).all()
    assert 0 < kept.float().mean() < 1


# Cost, as counted in the GDD method card, section 8.1, at 512x512


def macs(network: dict[str, Any], run: Any) -> float:
    with torch.device("meta"):
        built, x = build(network).eval(), torch.empty(1, 3, 512, 512)
    with FlopCounterMode(display=False) as counter:
        run(built, x)
    return counter.get_total_flops() / 2e9


R18 = {"widths": [64, 128, 256, 512], "blocks": [2, 2, 2, 2], "stem": "deep"}
R101 = {"widths": [256, 512, 1024, 2048], "blocks": [3, 4, 23, 3], "block": "bottleneck", "stem": "deep"}


def test_it_costs_what_the_papers_networks_cost() -> None:
    student, atrous = (description(head, 19, R18, width=128, auxiliary=64) for head in ("pspnet", "deeplabv3"))
    teacher = description("pspnet", 19, R101, width=512, auxiliary=256)
    assert macs(student, Segmenter.encode) == pytest.approx(49.4, abs=0.05)
    assert macs(teacher, Segmenter.encode) == pytest.approx(178.5, abs=0.05)
    # Means over cells as a matrix product cost 0.1 and 0.4 of these; the card leaves them out.
    assert macs(teacher, Segmenter.__call__) == pytest.approx(255.9 + 0.42, abs=0.05)
    assert macs(atrous, Segmenter.__call__) == pytest.approx(59.9, abs=0.05)
    with_auxiliary = macs(student, lambda network, x: (network(x), network.auxiliary(network.encode(x)["stage3"])))
    assert with_auxiliary - macs(student, Segmenter.encode) == pytest.approx(54.8 + 0.1, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_class_of_a_pixel_is_that_of_the_enlarged_logits(dtype: torch.dtype) -> None:
    """Enlarged in float32: in bfloat16 many of these classes would be equally likely between two positions."""
    logits = torch.randn(2, 4, 3, 4, generator=torch.Generator().manual_seed(0)).mul(0.01).add(1).to(dtype)

    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Output:
            assert images.is_contiguous(memory_format=torch.channels_last)
            return Output(logits, None, {})

    found = classify(Fixed(), torch.zeros(2, 3, 24, 30))
    wanted = F.interpolate(logits.double(), (24, 30), mode="bilinear", align_corners=False)
    assert (found.shape, found.dtype) == ((2, 24, 30), torch.int64)
    assert (wanted.gather(1, found[:, None])[:, 0] >= wanted.amax(1) - 1e-6).all()


# Counting pixels


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(2, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31), st.booleans())
def test_iou_is_that_of_a_loop_over_pixels(
    count: int, classes: int, height: int, width: int, seed: int, mostly_ignored: bool
) -> None:
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, classes, (count, height, width))
    truth[generator.random(truth.shape) < (0.9 if mostly_ignored else 0.2)] = 255
    found = generator.integers(0, classes, truth.shape)
    counts = confusion(torch.from_numpy(truth.astype(np.uint8)), torch.from_numpy(found), classes, 255)
    both, either = intersection_and_union(counts)
    for index in range(count):
        ratios = []
        for label in range(classes):
            pixels = [
                (int(t), int(p)) for t, p in zip(truth[index].ravel(), found[index].ravel(), strict=True) if t != 255
            ]
            together = sum(t == label and p == label for t, p in pixels)
            anyone = sum(label in (t, p) for t, p in pixels)
            assert (int(both[index, label]), int(either[index, label])) == (together, anyone)
            for other in range(classes):
                assert counts[index, label, other] == sum(pair == (label, other) for pair in pixels)
            if anyone:
                ratios.append(together / anyone)
        expected = sum(ratios) / len(ratios) if ratios else math.nan
        assert mean_iou(counts)[index].item() == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_a_label_outside_the_range_is_refused() -> None:
    found = torch.zeros(1, 2, 2).long()
    with pytest.raises(ValueError, match=r"below 3 or 255, found \[0, 3\]"):
        confusion(torch.tensor([[[0, 3], [0, 0]]]), found, 3, 255)
    with pytest.raises(ValueError, match=r"\(1, 2, 2\) and predictions \(1, 2, 3\) differ"):
        confusion(found, torch.zeros(1, 2, 3).long(), 3, 255)
