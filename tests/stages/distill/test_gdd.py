"""GDD: noise and the generator's fused form, by the properties of the GDD card's section 7."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stages.distill.gdd import draw_noise, fused_share, generate
from stages.training import Generator, channel_divergence

KINDS = ["gaussian", "uniform", "laplace"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Noise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["shared", "independent"])
def test_property_08_shape_mean_and_spread_of_noise(mode: str, kind: str) -> None:
    like = torch.zeros(6, 3, 60, 50, dtype=torch.float64)
    z = draw_noise(like, 8, mode, kind, 0.7, source())
    assert z is not None
    assert z.shape == (6, 1 if mode == "shared" else 8, 60, 50)
    assert z.dtype == torch.float64
    assert abs(z.mean().item()) < 4 * 0.7 / math.sqrt(z.numel())
    assert z.std().item() == pytest.approx(0.7, rel=0.03)
    fourth = (z / 0.7).pow(4).mean().item()
    assert fourth == pytest.approx({"gaussian": 3.0, "uniform": 1.8, "laplace": 6.0}[kind], rel=0.2)
    rows = z.flatten(2).flatten(0, 1)
    between = torch.corrcoef(rows) - torch.eye(len(rows))
    assert between.abs().max() < 0.1  # samples differ, and so do independent channels


@pytest.mark.parametrize("kind", KINDS)
def test_property_08_the_same_state_repeats_noise_and_two_calls_differ(kind: str) -> None:
    like, generator = torch.zeros(2, 3, 4, 5), source(7)
    first, second = (draw_noise(like, 3, "shared", kind, 1.0, generator) for _ in range(2))
    again = draw_noise(like, 3, "shared", kind, 1.0, source(7))
    assert first is not None
    assert second is not None
    assert again is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert first.dtype == torch.float32


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_property_08_without_spread_nothing_is_drawn(kind: str, fused: bool) -> None:
    generator = source(7)
    before = generator.get_state()
    assert draw_noise(torch.zeros(2, 3, 4, 5), 3, "shared", kind, 0.0, generator) is None
    assert torch.equal(generator.get_state(), before)
    module, student = Generator(3, 5).double(), normal(2, 3, 4, 5)
    torch.testing.assert_close(
        generate(student, module, None, fused), module(module.align(student)), rtol=1e-12, atol=1e-13
    )
    assert torch.equal(generate(student, module), module(module.align(student)))


@pytest.mark.parametrize("fused", [False, True])
def test_property_09_the_first_convolution_is_linear_in_the_noise(fused: bool) -> None:
    """The generator's output with W2 = identity and without negative values is conv1(a) + conv_(sum over in W1)(z)."""
    module = Generator(3, 5).double()
    with torch.no_grad():
        assert module.first.bias is not None
        assert module.second.bias is not None
        module.first.bias.fill_(50)
        nn.init.dirac_(module.second.weight)
        module.second.bias.zero_()
    student, z = normal(2, 3, 6, 7), normal(2, 1, 6, 7, seed=1)
    with torch.no_grad():
        expected = module.first(module.align(student)) + F.conv2d(
            z, module.first.weight.sum(1, keepdim=True), padding=1
        )
        torch.testing.assert_close(generate(student, module, z, fused), expected, rtol=1e-12, atol=1e-12)


def test_property_09_shared_noise_can_be_cancelled_independent_noise_cannot() -> None:
    module = Generator(3, 5).double()
    with torch.no_grad():
        module.first.weight -= module.first.weight.mean(1, keepdim=True)
    student = normal(2, 3, 6, 7)
    quiet = generate(student, module)
    for fused in (False, True):
        torch.testing.assert_close(generate(student, module, normal(2, 1, 6, 7), fused), quiet, rtol=1e-10, atol=1e-12)
        assert (generate(student, module, normal(2, 5, 6, 7), fused) - quiet).abs().max() > 0.01


# The fused form


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
    channels=st.sampled_from(["none", "shared", "independent"]),
    last=st.booleans(),
    seed=st.integers(0, 9),
)
def test_fused_and_plain_are_equal_with_all_gradients(
    sizes: tuple[int, int, int, int, int], channels: str, last: bool, seed: int
) -> None:
    samples, ours, theirs, height, width = sizes
    torch.manual_seed(seed)
    module = Generator(ours, theirs).double()
    layout = torch.channels_last if last else torch.contiguous_format
    module.to(memory_format=layout)  # type: ignore[call-overload]
    student = normal(samples, ours, height, width, seed=seed).to(memory_format=layout).requires_grad_()
    teacher = normal(samples, theirs, height, width, seed=seed + 1)
    noise = {"none": None, "shared": normal(samples, 1, height, width), "independent": normal(*teacher.shape)}[channels]
    leaves = [student, *module.parameters()]
    outputs, gradients = [], []
    for fast in (False, True):
        outputs.append(generate(student, module, noise, fast))
        loss = channel_divergence(outputs[-1], teacher, 4.0, closed_form=fast)
        gradients.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_fused_form_keeps_less_for_backward() -> None:
    def kept(fast: bool) -> int:
        module, student = Generator(8, 32), torch.zeros(4, 8, 12, 12, requires_grad=True)
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            held.append(x)
            return x

        held: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            g = generate(student, module, normal(4, 1, 12, 12, dtype=torch.float32), fast)
            channel_divergence(g, torch.ones(4, 32, 12, 12), closed_form=fast)
        return sum(sizes.values())

    assert kept(True) < 0.7 * kept(False)


@pytest.mark.parametrize("fused", [False, True])
def test_property_14_under_autocast_convolutions_narrow_and_the_loss_is_wide(fused: bool) -> None:
    torch.manual_seed(0)
    module = Generator(6, 16)
    student, teacher, z = normal(2, 6, 8, 8).float(), normal(2, 16, 8, 8).float(), normal(2, 1, 8, 8).float()
    exact = channel_divergence(generate(student, module, z), teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        g = generate(student.bfloat16(), module, z, fused)
        value = channel_divergence(g, teacher)
    assert g.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=0.02, atol=0)


def test_the_fused_form_is_chosen_where_it_saves_multiply_adds() -> None:
    def count(positions: int, student: int, teacher: int) -> float:
        """Forward, by hand: align and two convolutions against kernel and two convolutions."""
        plain = positions * (student * teacher + 9 * teacher**2 + 9 * teacher**2)
        fused = 9 * teacher**2 * (student + 2) + positions * (9 * (student + 2) * teacher + 9 * teacher**2)
        return fused / plain

    for sizes in ((8192, 64, 256), (8192, 512, 2048), (10, 64, 256), (8192, 300, 256)):
        assert fused_share(*sizes) == pytest.approx(count(*sizes), rel=1e-12)
    assert fused_share(8192, 64, 256) == pytest.approx(1 / 1.6, rel=0.01)  # the card's count
    assert fused_share(8192, 256, 256) == 1
    assert fused_share(10, 64, 256) > 1
    assert fused_share(8192, 64, 256, independent=True) > 0.9


# Errors


def test_property_13_errors_name_shapes_and_values() -> None:
    module = Generator(3, 5)
    with pytest.raises(ValueError, match=r"\(2, 4, 6, 6\) does not have the declared channels \(N, 3, H, W\)"):
        generate(torch.zeros(2, 4, 6, 6), module)
    for wrong in ((2, 1, 6, 5), (2, 3, 6, 6), (1, 1, 6, 6)):
        with pytest.raises(ValueError, match="does not fit the student's map") as caught:
            generate(torch.zeros(2, 3, 6, 6), module, torch.zeros(wrong))
        assert f"{wrong}" in str(caught.value)
        assert "(2, 3, 6, 6)" in str(caught.value)
    with pytest.raises(ValueError, match=r"empty \(0, 3, 6, 6\)"):
        generate(torch.zeros(0, 3, 6, 6), module)
    g = generate(torch.zeros(2, 3, 6, 6), module)
    with pytest.raises(ValueError, match=r"student \(2, 5, 6, 6\), teacher \(2, 5, 6, 7\)"):
        channel_divergence(g, torch.zeros(2, 5, 6, 7))
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"standard deviation .*\({std}\)"):
            draw_noise(torch.zeros(2, 3, 4, 4), 5, std=std)
    with pytest.raises(ValueError, match="unknown mode of noise \\('both'\\)"):
        draw_noise(torch.zeros(2, 3, 4, 4), 5, mode="both")
    with pytest.raises(ValueError, match="unknown kind of noise \\('poisson'\\)"):
        draw_noise(torch.zeros(2, 3, 4, 4), 5, kind="poisson")
