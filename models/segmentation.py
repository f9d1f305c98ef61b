"""Networks for segmentation: ResNet encoders at stride 8, PSPNet and DeepLabV3 heads."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Block, Bottleneck, Normalise

# Of the four stages, behind a stem that reduces by 4; the light stem reduces by 2. In both, features are at stride 8.
STRIDES = {"deep": (1, 2, 1, 1), "wide": (1, 2, 1, 1), "light": (2, 2, 1, 1)}
DILATIONS = (1, 1, 2, 4)


class Output(NamedTuple):
    """What every network for segmentation returns.

    Attributes:
        logits: (B, classes, h, w) at stride 8 of the images.
        auxiliary: (B, classes, h, w) of the auxiliary head; None in eval mode, and where there is no such head.
        features: (B, width, ., .) by place: "stage1" to "stage4", and "last", which is the last stage.
    """

    logits: Tensor
    auxiliary: Tensor | None
    features: Mapping[str, Tensor]


class Encoder(nn.Module):
    """A ResNet whose last two stages dilate instead of reducing.

    Source: He et al. 2016 for the blocks; Chen et al. 2017, "Rethinking atrous convolution", section 3.1 for the
    dilation; GDD card 5.2 for its values. The first block of a stage keeps the dilation of the stage before, as in
    torchvision (`replace_stride_with_dilation`).

    Attributes:
        features: width of each place that a method may ask for.
    """

    def __init__(self, channels: int, widths: Sequence[int], blocks: Sequence[int], block: str, stem: str) -> None:
        super().__init__()
        kind = {"basic": Block, "bottleneck": Bottleneck}[block]
        before = widths[0] if block == "basic" else widths[0] // 4
        self.stem = _stem(stem, channels, before)
        dilation = 1
        for stage, (width, count, stride, wanted) in enumerate(
            zip(widths, blocks, STRIDES[stem], DILATIONS, strict=True), start=1
        ):
            layers = [kind(before, width, stride, dilation)]
            layers += [kind(width, width, 1, wanted) for _ in range(count - 1)]
            self.add_module(f"stage{stage}", nn.Sequential(*layers))
            before, dilation = width, wanted
        self.features = {f"stage{stage}": width for stage, width in enumerate(widths, start=1)}
        self.features["last"] = before

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, channels, H, W) to the features of every place."""
        x, features = self.stem(images), {}
        for stage in range(1, 5):
            x = features[f"stage{stage}"] = self.get_submodule(f"stage{stage}")(x)
        features["last"] = x
        return features

    @staticmethod
    def own_key(key: str) -> str | None:
        """The name here of a weight in the state_dict of a ResNet of torchvision; None for its classifier."""
        if key.startswith("fc."):
            return None
        key = re.sub(r"^conv1\.", "stem.0.", re.sub(r"^bn1\.", "stem.1.", key))
        return re.sub(r"^layer(\d)", r"stage\1", key).replace(".downsample.", ".shortcut.")


def _stem(kind: str, channels: int, width: int) -> nn.Sequential:
    half = (width + 1) // 2
    match kind:
        case "deep":
            layers = [
                *_convolution(channels, half, 3, stride=2),
                *_convolution(half, half, 3),
                *_convolution(half, width, 3),
                nn.MaxPool2d(3, 2, 1),
            ]
        case "wide":
            layers = [*_convolution(channels, width, 7, stride=2), nn.MaxPool2d(3, 2, 1)]
        case _:
            layers = [*_convolution(channels, half, 3, stride=2), *_convolution(half, width, 3)]
    return nn.Sequential(*layers)


def _convolution(channels: int, width: int, size: int, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
    """Convolution, BatchNorm, ReLU; keeps height and width but for the stride."""
    padding = dilation * (size // 2)
    return [
        nn.Conv2d(channels, width, size, stride, padding, dilation, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]


class PyramidPooling(nn.Module):
    """The features beside means of them over p x p cells, for every p of `pools`, enlarged again.

    Source: Zhao et al. 2017, "Pyramid scene parsing network", section 3.2; each level has as many channels as the head
    is wide (GDD card 8.1 counts it so).
    """

    def __init__(self, channels: int, width: int, pools: Sequence[int]) -> None:
        super().__init__()
        self.pools = list(pools)
        self.levels = nn.ModuleList(nn.Sequential(*_convolution(channels, width, 1)) for _ in pools)
        self.width = channels + len(self.pools) * width

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to (B, channels + len(pools) * width, h, w)."""
        means = adaptive_means(x, self.pools)
        levels = [upsample(level(mean), x.shape[-2:]) for level, mean in zip(self.levels, means, strict=True)]
        return torch.cat([x, *levels], dim=1)


class AtrousPyramid(nn.Module):
    """Convolutions of several dilations (1x1 for a dilation of 1) beside the mean over the whole map.

    Source: Chen et al. 2017, "Rethinking atrous convolution", section 3.3.
    """

    def __init__(self, channels: int, width: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.whole = nn.Sequential(*_convolution(channels, width, 1))
        self.branches = nn.ModuleList(
            nn.Sequential(*_convolution(channels, width, 1 if dilation == 1 else 3, dilation=dilation))
            for dilation in dilations
        )
        self.width = (1 + len(dilations)) * width

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to (B, (1 + len(dilations)) * width, h, w)."""
        whole = upsample(self.whole(x.mean((2, 3), keepdim=True)), x.shape[-2:])
        return torch.cat([whole, *(branch(x) for branch in self.branches)], dim=1)


class Segmenter(nn.Module):
    """Encoder, head and, for training, an auxiliary head on stage 3 (GDD card 3.5).

    Attributes:
        features: width of each place that a method may ask for.
    """

    def __init__(
        self,
        normalise: Normalise,
        encoder: Encoder,
        context: PyramidPooling | AtrousPyramid,
        classes: int,
        width: int,
        auxiliary: int | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.encoder = encoder
        self.features = encoder.features
        self.context = context
        self.head = _classifier(context.width, width, classes, dropout)
        self.auxiliary = (
            None if auxiliary is None else _classifier(self.features["stage3"], auxiliary, classes, dropout)
        )

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """The features of every place; no head runs. (B, 3, H, W) in [0, 1]."""
        features: dict[str, Tensor] = self.encoder(self.normalise(images))
        return features

    def forward(self, images: Tensor) -> Output:
        """(B, 3, H, W) in [0, 1]."""
        features = self.encode(images)
        auxiliary = None
        if self.training and self.auxiliary is not None:
            auxiliary = self.auxiliary(features["stage3"])
        return Output(self.head(self.context(features["last"])), auxiliary, features)


def _classifier(channels: int, width: int, classes: int, dropout: float) -> nn.Sequential:
    """One 3x3 convolution, dropout of whole channels, and class scores."""
    return nn.Sequential(*_convolution(channels, width, 3), nn.Dropout2d(dropout), nn.Conv2d(width, classes, 1))


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) to (B, C, *size): bilinear, corners not aligned (GDD card 3.5)."""
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def classify(network: nn.Module, images: Tensor) -> Tensor:
    """(B, H, W) int64: the class of every pixel of (B, 3, H, W) images in [0, 1].

    Logits are enlarged in float32, whatever precision the network computes in.
    """
    logits = network(images.contiguous(memory_format=torch.channels_last)).logits
    return upsample(logits.float(), images.shape[-2:]).argmax(1)


def confusion(truth: Tensor, found: Tensor, classes: int, ignore: int) -> Tensor:
    """(B, classes, classes) int64: how many pixels of each image have label i (rows) and are taken for j (columns).

    Shapes: truth and found (B, H, W) integers; pixels whose label is `ignore` are not counted.
    Raises: ValueError if the shapes differ, or a label is outside the range.
    """
    if truth.shape != found.shape:
        raise ValueError(f"labels {tuple(truth.shape)} and predictions {tuple(found.shape)} differ in shape")
    image = torch.arange(len(truth), device=truth.device).view(-1, 1, 1)
    labelled = truth != ignore
    places = ((image * classes + truth) * classes + found)[labelled]
    if places.numel() and not 0 <= int(truth[labelled].min()) <= int(truth[labelled].max()) < classes:
        raise ValueError(f"labels must be below {classes} or {ignore}, found {sorted(set(truth.unique().tolist()))}")
    return torch.bincount(places, minlength=len(truth) * classes**2).view(-1, classes, classes)


def intersection_and_union(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels of each class in both labels and prediction, and in either: (..., classes) each, of a confusion."""
    both = counts.diagonal(dim1=-2, dim2=-1)
    return both, counts.sum(-1) + counts.sum(-2) - both


def mean_iou(counts: Tensor) -> Tensor:
    """(...) float64 from a confusion (..., classes, classes): the mean over classes of intersection over union.

    Classes that stand neither in the labels nor in the prediction are left out; NaN where no class is left.
    """
    both, either = intersection_and_union(counts.double())
    return (both / either).nanmean(-1)


def adaptive_means(x: Tensor, pools: Sequence[int]) -> list[Tensor]:
    """Means of (B, C, h, w) over p x p cells that cover the map, a (B, C, p, p) for each p of `pools`.

    The same as `F.adaptive_avg_pool2d` for each p, but for the order of sums: cell i of p spans
    [floor(i * h / p), ceil((i + 1) * h / p)), so cells overlap where p does not divide h, and repeat where p is larger.
    As one matrix product it is deterministic on CUDA as well, and every ONNX exporter knows it for every size.
    """
    height, width = int(x.shape[-2]), int(x.shape[-1])
    cells = torch.cat([torch.kron(_cells(height, pool, x), _cells(width, pool, x)) for pool in pools])
    means = (x.flatten(2) @ cells.T).split([pool**2 for pool in pools], dim=2)
    return [mean.unflatten(2, (pool, pool)) for mean, pool in zip(means, pools, strict=True)]


def _cells(size: int, count: int, like: Tensor) -> Tensor:
    """(count, size): in each row the weights of the mean over one cell."""
    starts = [index * size // count for index in range(count)]
    ends = [-(-(index + 1) * size // count) for index in range(count)]
    rows = [
        [1 / (end - start) if start <= place < end else 0.0 for place in range(size)]
        for start, end in zip(starts, ends, strict=True)
    ]
    return torch.tensor(rows, dtype=like.dtype, device=like.device)


def build(description: Mapping[str, Any]) -> Segmenter:
    """A network with fresh weights from a model's description (`network` and `interface`)."""
    interface, network = description["interface"], dict(description["network"])
    settings = network.pop("encoder")
    encoder = Encoder(interface["channels"], *(settings[name] for name in ("widths", "blocks", "block", "stem")))
    width, channels = network["width"], encoder.features["last"]
    context: PyramidPooling | AtrousPyramid
    if network.pop("name") == "pspnet":
        context = PyramidPooling(channels, width, network.pop("pools"))
    else:
        context = AtrousPyramid(channels, width, network.pop("dilations"))
    normalise = Normalise(interface["mean"], interface["std"])
    return Segmenter(normalise, encoder, context, len(interface["classes"]), **network)
