"""Channel-wise KL, align layer and generator: an oracle, then the properties of the GDD card's section 7."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stages.training import Align, Generator, channel_divergence

SHAPES = [(2, 3, 4, 5), (1, 1, 2, 2), (3, 2, 1, 7), (2, 4, 6), (2, 2, 2, 3, 2)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_form = pytest.mark.parametrize("closed", [False, True], ids=["autograd", "closed form"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return normal(*shape, seed=1, dtype=dtype), normal(*shape, seed=2, dtype=dtype)


def value_and_gradient(student: Tensor, teacher: Tensor, temperature: float, closed: bool) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = channel_divergence(leaf, teacher, temperature, closed)
    gradient: Tensor = torch.autograd.grad(value, leaf)[0]
    return value.detach(), gradient


def slow_loss(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """Channel after channel, in plain Python."""
    total, rows = 0.0, student.shape[0] * student.shape[1]
    for g, f in zip(student.reshape(rows, -1).tolist(), teacher.reshape(rows, -1).tolist(), strict=True):
        q, p = ([math.exp(x / temperature) for x in row] for row in (g, f))
        q, p = ([x / math.fsum(row) for x in row] for row in (q, p))
        total += math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / rows


@each_form
@each_shape
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_agrees_with_the_definition(shape: tuple[int, ...], temperature: float, closed: bool) -> None:
    student, teacher = pair(*shape)
    value = channel_divergence(student, teacher, temperature, closed).item()
    assert value == pytest.approx(slow_loss(student, teacher, temperature), rel=1e-11, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=3, max_size=5),
    temperature=st.floats(0.3, 30),
    scale=st.floats(0.01, 30),
    last=st.booleans(),
)
def test_both_forms_are_equal(shape: list[int], temperature: float, scale: float, last: bool) -> None:
    student, teacher = (scale * x for x in pair(*shape))
    if last and len(shape) == 4:
        student = student.to(memory_format=torch.channels_last)
    plain, fast = (value_and_gradient(student, teacher, temperature, closed) for closed in (False, True))
    for a, b in zip(plain, fast, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-13 * (1 + scale) * max(1, temperature**2))
    assert fast[0] >= -1e-13 * temperature**2  # property 1


@each_form
def test_property_01_equal_up_to_a_constant_per_channel_costs_nothing(closed: bool) -> None:
    teacher = normal(2, 3, 4, 5, seed=2)
    student = teacher + normal(2, 3, 1, 1, seed=3)
    value, gradient = value_and_gradient(student, teacher, 4.0, closed)
    assert abs(value.item()) < 1e-13
    assert gradient.abs().max().item() < 1e-13
    for other in (teacher + normal(2, 1, 4, 5, seed=3), -teacher, teacher.roll(1, 3)):
        assert channel_divergence(other, teacher, 4.0, closed).item() > 1e-3


@each_form
@pytest.mark.parametrize("side", [0, 1])
def test_property_02_a_constant_per_channel_changes_nothing(side: int, closed: bool) -> None:
    maps = list(pair(2, 3, 4, 5))
    expected = value_and_gradient(maps[0], maps[1], 3.0, closed)
    maps[side] = maps[side] + normal(2, 3, 1, 1, seed=9)
    for a, b in zip(value_and_gradient(maps[0], maps[1], 3.0, closed), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@each_form
def test_property_02_the_last_bias_of_a_generator_has_no_gradient(closed: bool) -> None:
    torch.manual_seed(0)
    generator = Generator(3, 4).double()
    student, teacher = normal(2, 3, 5, 6, seed=1), normal(2, 4, 5, 6, seed=2)
    channel_divergence(generator(generator.align(student)), teacher, 4.0, closed).backward()
    assert generator.second.bias is not None
    assert generator.second.bias.grad is not None
    assert generator.second.bias.grad.abs().max().item() < 1e-14
    others = [parameter.grad for name, parameter in generator.named_parameters() if name != "second.bias"]
    assert all(gradient is not None and gradient.abs().max() > 1e-6 for gradient in others)


@each_form
@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_property_03_joint_scaling(factor: float, closed: bool) -> None:
    student, teacher = pair(2, 3, 4, 5)
    value = channel_divergence(factor * student, factor * teacher, factor * 4.0, closed)
    torch.testing.assert_close(value, factor**2 * channel_divergence(student, teacher, 4.0, closed), rtol=1e-11, atol=0)


@each_form
def test_property_04_at_high_temperature_half_the_variance_of_the_difference(closed: bool) -> None:
    student, teacher = pair(2, 3, 6, 5)
    limit = (student - teacher).flatten(2).var(2, correction=0).mean() / 2
    torch.testing.assert_close(channel_divergence(student, teacher, 1e4, closed), limit, rtol=1e-3, atol=0)


@each_form
@each_shape
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_property_05_the_gradient_is_the_difference_of_distributions(
    shape: tuple[int, ...], temperature: float, closed: bool
) -> None:
    student, teacher = (10 * x for x in pair(*shape))
    _, gradient = value_and_gradient(student, teacher, temperature, closed)
    q, p = ((x.flatten(2) / temperature).softmax(2).reshape(shape) for x in (student, teacher))
    expected = temperature * (q - p) / (shape[0] * shape[1])
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)
    assert gradient.flatten(2).sum(2).abs().max().item() < 1e-13
    assert gradient.abs().sum().item() <= 2 * temperature * (1 + 1e-12)


def test_property_05_the_gradient_agrees_with_finite_differences() -> None:
    student, teacher = normal(2, 2, 3, 2, seed=1).requires_grad_(), normal(2, 2, 3, 2, seed=2)
    last = student.detach().to(memory_format=torch.channels_last).requires_grad_()
    for leaf in (student, last):
        assert torch.autograd.gradcheck(lambda g: 7 * channel_divergence(g, teacher, 3.0), (leaf,))


@each_form
def test_property_06_invariances(closed: bool) -> None:
    student, teacher = pair(3, 4, 2, 5)
    expected, gradient = value_and_gradient(student, teacher, 2.0, closed)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    places = [x.flatten(2)[..., order].reshape(x.shape) for x in (student, teacher)]
    channels = [x[:, [2, 0, 3, 1]] for x in (student, teacher)]
    twice = [torch.cat([x, x]) for x in (student, teacher)]
    for a, b in (places, channels, twice):
        torch.testing.assert_close(channel_divergence(a, b, 2.0, closed), expected, rtol=1e-11, atol=0)
    _, moved = value_and_gradient(places[0], places[1], 2.0, closed)
    torch.testing.assert_close(moved.flatten(2), gradient.flatten(2)[..., order], rtol=1e-10, atol=1e-14)


@each_form
def test_property_06_the_size_of_a_map_does_not_count(closed: bool) -> None:
    """Near the limit of property 4, the same map in four times the resolution costs the same."""
    small = pair(2, 3, 6, 6)
    large = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in small]
    values = [channel_divergence(a, b, 4.0, closed) for a, b in (small, large)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-11, atol=0)


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_property_07_one_position_costs_exactly_nothing(dtype: torch.dtype, closed: bool) -> None:
    value, gradient = value_and_gradient(*pair(2, 5, 1, 1, dtype=dtype), 4.0, closed)
    assert value.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_property_13_a_temperature_without_meaning_is_named(temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"temperature .*\({temperature}\)"):
        channel_divergence(*pair(2, 3, 4, 4), temperature)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 3, 4, 4), (2, 3, 4, 5), "differ in shape"),
        ((2, 3, 8, 2), (2, 3, 4, 4), "differ in shape"),
        ((2, 3, 4, 4), (2, 5, 4, 4), "differ in shape"),
        ((2, 3, 4, 4), (1, 3, 4, 4), "differ in shape"),
        ((2, 3), (2, 3), "non-empty"),
        ((0, 3, 4, 4), (0, 3, 4, 4), "non-empty"),
        ((2, 3, 0, 4), (2, 3, 0, 4), "non-empty"),
    ],
)
def test_property_13_shapes_that_do_not_fit_are_named(
    student: tuple[int, ...], teacher: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        channel_divergence(torch.zeros(student), torch.zeros(teacher))
    assert f"student {student}, teacher {teacher}" in str(caught.value)


def test_property_13_channels_unlike_the_declared_are_named() -> None:
    for layer in (Align(3, 5), Align(4, 4)):
        with pytest.raises(ValueError, match=rf"\(2, 6, 4, 4\) .* declared channels \(N, {layer.inputs}, H, W\)"):
            layer(torch.zeros(2, 6, 4, 4))


@each_form
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_property_14_arithmetic_is_float32_or_wider(dtype: torch.dtype, autocast: bool, closed: bool) -> None:
    student, teacher = pair(2, 3, 4, 5, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected_value, expected_gradient = value_and_gradient(student.to(wide), teacher.to(wide), 4.0, closed)
    leaf = student.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = channel_divergence(leaf, teacher, 4.0, closed)
    value.backward()
    assert value.dtype == wide
    assert torch.equal(value.detach(), expected_value)
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    assert torch.equal(leaf.grad, expected_gradient.to(dtype))


def test_property_14_one_side_in_float64_is_enough() -> None:
    student, teacher = pair(2, 3, 4, 5)
    assert channel_divergence(student.float(), teacher).dtype == torch.float64
    assert channel_divergence(student, teacher.float()).dtype == torch.float64


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_property_14_features_of_magnitude_300_stay_finite(dtype: torch.dtype, closed: bool) -> None:
    student = 300 * torch.tensor([[[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0]]], dtype=dtype)
    value, gradient = value_and_gradient(student, -student, 1.0, closed)
    # Channel 0: all of p is where q is 600 below its best. Channel 1: the same, below two equal bests.
    assert value.item() == pytest.approx((600 + 600 + math.log(2)) / 2, rel=1e-6)
    expected = torch.tensor([[[1, -1, 0], [-1, 0.5, 0.5]]], dtype=dtype) / 2
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


@each_form
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_property_14_a_value_that_is_not_a_number_is_not_swallowed(side: int, poison: float, closed: bool) -> None:
    maps = pair(2, 3, 4, 5)
    maps[side][1, 2, 3, 0] = poison
    assert not channel_divergence(*maps, 4.0, closed).isfinite()


@each_form
def test_property_15_memory_layout_does_not_matter(closed: bool) -> None:
    student, teacher = pair(2, 3, 4, 5)
    expected = value_and_gradient(student, teacher, 4.0, closed)
    wide = torch.zeros(2, 3, 4, 10, dtype=torch.float64)
    wide[..., ::2] = student
    for a in (student.to(memory_format=torch.channels_last), student.mT.contiguous().mT, wide[..., ::2]):
        for b in (teacher, teacher.to(memory_format=torch.channels_last), teacher.mT.contiguous().mT):
            for found, truth in zip(value_and_gradient(a, b, 4.0, closed), expected, strict=True):
                torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 5), (5, 3), (4, 4)])
def test_property_17_an_align_layer_exists_only_where_widths_differ(inputs: int, outputs: int) -> None:
    generator = Generator(inputs, outputs)
    align = sum(parameter.numel() for parameter in generator.align.parameters())
    assert align == (0 if inputs == outputs else inputs * outputs + outputs)
    everything = sum(parameter.numel() for parameter in generator.parameters())
    assert everything - align == 2 * (9 * outputs**2 + outputs)
    student = normal(2, inputs, 4, 5, dtype=torch.float32)
    aligned = generator.align(student)
    assert (aligned is student) == (inputs == outputs)
    assert generator(aligned).shape == (2, outputs, 4, 5)


def test_property_17_align_and_generator_are_what_the_card_says() -> None:
    """Against a walk over positions and neighbours."""
    torch.manual_seed(0)
    generator = Generator(2, 3).double()
    student = normal(1, 2, 3, 4)

    def walk(x: Tensor, layer: nn.Conv2d) -> Tensor:
        reach = layer.kernel_size[0] // 2
        weight, bias = layer.weight, layer.bias
        assert bias is not None
        out = torch.zeros(1, len(weight), *x.shape[2:], dtype=x.dtype)
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                out[0, :, i, j] = bias
                for di in range(-reach, reach + 1):
                    for dj in range(-reach, reach + 1):
                        if 0 <= i + di < x.shape[2] and 0 <= j + dj < x.shape[3]:
                            out[0, :, i, j] += weight[:, :, di + reach, dj + reach] @ x[0, :, i + di, j + dj]
        return out

    assert generator.align.convolution is not None
    with torch.no_grad():
        expected = walk(walk(walk(student, generator.align.convolution), generator.first).relu(), generator.second)
        torch.testing.assert_close(generator(generator.align(student)), expected, rtol=1e-11, atol=1e-13)


def saved(act: Any) -> list[Tensor]:
    """Tensors that a computation keeps for backward, parameters and inputs of the network left out."""
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        act()
    return kept


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_closed_form_keeps_one_tensor(layout: torch.memory_format) -> None:
    student, teacher = (x.to(memory_format=layout) for x in pair(2, 8, 6, 5, dtype=torch.float32))
    leaf = student.requires_grad_()
    fast = saved(lambda: channel_divergence(leaf, teacher))
    plain = saved(lambda: channel_divergence(leaf, teacher, closed_form=False))
    assert [x.shape for x in fast] == [leaf.shape]
    assert len({x.untyped_storage().data_ptr() for x in plain if x.numel() == leaf.numel()}) > 1
    assert saved(lambda: channel_divergence(leaf.detach(), teacher)) == []
