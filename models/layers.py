"""Layers that networks of several tasks are made of."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Normalise(nn.Module):
    """(images - mean) / std per channel. The numbers stand in the model's description, not among its weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1]."""
        return (images - self.mean) / self.std


def unit(vectors: Tensor) -> Tensor:
    """Vectors (..., D) scaled to length 1; zero vectors stay zero and get no gradient."""
    squared = vectors.square().sum(-1, keepdim=True)
    zero = squared == 0
    # One `where` on either side of the division: the branch not taken would send 0 * inf = NaN backwards otherwise.
    return vectors * torch.where(zero, 0, torch.where(zero, 1, squared).rsqrt())


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, "Deep residual learning", figure 2).

    The first convolution is the one that reduces or, in networks for dense prediction, is dilated.
    """

    def __init__(self, channels: int, width: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, width, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1 to a quarter of the width, 3x3, 1x1 back, and a shortcut (He et al. 2016, figure 5).

    The 3x3 convolution is the one that reduces or is dilated, as in torchvision.
    """

    def __init__(self, channels: int, width: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        narrow = width // 4
        self.conv1 = nn.Conv2d(channels, narrow, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = nn.Conv2d(narrow, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.shortcut = shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, width, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class Projection(nn.Conv2d):
    """A 1x1 convolution that takes every `stride`-th pixel; no bias.

    While gradients are wanted, the pixels are taken first: on processors, oneDNN's gradient of a strided 1x1
    convolution with few input channels writes outside its workspace (oneDNN issue 6035).
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, width, H / stride, W / stride)."""
        if not torch.is_grad_enabled() or self.stride == (1, 1):
            return super().forward(x)
        return F.conv2d(x[:, :, :: self.stride[0], :: self.stride[1]], self.weight)


def shortcut(channels: int, width: int, stride: int) -> nn.Module:
    """What a residual block adds: its input, or a 1x1 projection where the shape changes."""
    if stride == 1 and channels == width:
        return nn.Identity()
    return nn.Sequential(Projection(channels, width, stride), nn.BatchNorm2d(width))
