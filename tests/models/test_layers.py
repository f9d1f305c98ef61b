"""The projection of a shortcut: a strided 1x1 convolution that is safe to train on processors."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers import Block, Projection, shortcut


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_projection_is_a_strided_convolution(size: tuple[int, int], stride: int) -> None:
    torch.manual_seed(0)
    projection = Projection(3, 5, stride).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)

    def gradients(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((output * output).sum(), [images, projection.weight])

    plain = F.conv2d(images, projection.weight, stride=stride)
    torch.testing.assert_close(projection(images), plain, rtol=0, atol=1e-14)
    for ours, theirs in zip(gradients(projection(images)), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(projection(images), plain, rtol=0, atol=1e-14)


def test_a_shortcut_projects_only_where_the_shape_changes() -> None:
    assert list(shortcut(4, 4, 1).parameters()) == []
    assert next(iter(Block(4, 6, 2).shortcut.state_dict())) == "0.weight"


def test_training_with_few_channels_keeps_out_of_foreign_memory() -> None:
    """A strided convolution in its place ends this process by a signal, within the ten rounds."""
    code = (
        "import torch; from models.layers import Projection; torch.set_num_threads(1)\n"
        "layer = Projection(12, 16, 2).to(memory_format=torch.channels_last)\n"
        "images = torch.rand(8, 12, 72, 96).contiguous(memory_format=torch.channels_last).requires_grad_()\n"
        "for _ in range(10):\n"
        "    layer(images).sum().backward(); kept = [torch.rand(1000) for _ in range(50)]\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
