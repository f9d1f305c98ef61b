"""Networks for recognition: an image to a pooled feature, an embedding and class scores."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from data.errors import UserError, suggest
from models.layers import Block, Normalise, unit
from models.torchvision_import import import_torchvision


class Output(NamedTuple):
    """What every network for recognition returns.

    Attributes:
        pooled: (B, D) features after global pooling.
        embedding: (B, E) output of the linear embedding, or the pooled features where there is none; scaled to length 1
            where the network is told to (a zero embedding stays zero).
        logits: (B, classes); (B, 0) of a network that knows no classes.
    """

    pooled: Tensor
    embedding: Tensor
    logits: Tensor


class Network(nn.Module):
    """What follows the pooled features, alike in every network: embedding and classifier.

    Attributes:
        features: width of each place that a method may ask for.
        unit: whether the embedding is scaled to length 1.
    """

    features: dict[str, int]
    unit: bool
    embedding: nn.Module
    classifier: nn.Linear | None

    def _finish(self, pooled: int, embedding: int | None, unit: bool, classes: int) -> None:
        """Add the last layers, with weights that are drawn after all others."""
        self.unit = unit
        self.features = {"pooled": pooled, "embedding": embedding or pooled}
        self.embedding = nn.Linear(pooled, embedding) if embedding else nn.Identity()
        self.classifier = nn.Linear(self.features["embedding"], classes) if classes else None

    def _answer(self, pooled: Tensor) -> Output:
        """Pooled features (B, D) to all that the network returns."""
        embedding = self.embedding(pooled)
        if self.unit:
            embedding = unit(embedding)
        return Output(pooled, embedding, embedding[:, :0] if self.classifier is None else self.classifier(embedding))


class ResNet(Network):
    """A residual network for small images of any size: a 3x3 stem, then one stage per entry of `widths`."""

    def __init__(
        self,
        normalise: Normalise,
        channels: int,
        classes: int,
        widths: Sequence[int],
        blocks: int,
        embedding: int | None,
        unit: bool = False,
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        layers: list[nn.Module] = []
        before = widths[0]
        for index, width in enumerate(widths):
            for block in range(blocks):
                layers.append(Block(before, width, stride=2 if index > 0 and block == 0 else 1))
                before = width
        self.stages = nn.Sequential(*layers)
        self._finish(before, embedding, unit, classes)

    def forward(self, images: Tensor) -> Output:
        """(B, channels, H, W) in [0, 1]."""
        return self._answer(self.stages(self.stem(self.normalise(images))).mean((2, 3)))


class EfficientNetLite(Network):
    """EfficientNet-Lite (Tan and Le 2019, "EfficientNet", without squeeze and excitation, with ReLU6) of the package
    efficientnet-lite-pytorch; images of any size. While it trains, whole blocks are left out at random.

    `freeze_batchnorm`: means and variances stay as they are, and are used in training, too.
    """

    def __init__(
        self,
        normalise: Normalise,
        channels: int,
        classes: int,
        variant: str,
        embedding: int | None,
        unit: bool = False,
        freeze_batchnorm: bool = False,
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self._freezes = freeze_batchnorm
        _require_colour(f"'efficientnet_lite' ({variant})", channels)
        package = importlib.import_module("efficientnet_lite_pytorch")
        # Without a size the padding follows from each image; with one it would be that of this size alone.
        self.backbone = package.EfficientNet.from_name(f"efficientnet-{variant}", image_size=None)
        pooled = self.backbone._fc.in_features
        self.backbone._fc = nn.Identity()
        self._finish(pooled, embedding, unit, classes)

    def forward(self, images: Tensor) -> Output:
        """(B, 3, H, W) in [0, 1]."""
        return self._answer(self.backbone.extract_features(self.normalise(images)).mean((2, 3)))

    def train(self, mode: bool = True) -> "EfficientNetLite":
        """As of any module, but that frozen BatchNorm never looks at the batch."""
        super().train(mode)
        if self._freezes:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    @staticmethod
    def own_key(key: str) -> str:
        """The name here of a weight in the package's own state_dict."""
        return key.replace("_fc.", "classifier.") if key.startswith("_fc.") else f"backbone.{key}"


class TorchvisionNetwork(Network):
    """A ResNet of torchvision."""

    def __init__(
        self,
        normalise: Normalise,
        channels: int,
        classes: int,
        model: str,
        embedding: int | None = None,
        unit: bool = False,
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.backbone = _torchvision_model(model)
        _require_colour(f"{model!r} of torchvision", channels)
        pooled = self.backbone.fc.in_features
        self._finish(pooled, embedding, unit, classes)
        self.backbone.fc = nn.Identity()

    def forward(self, images: Tensor) -> Output:
        """(B, 3, H, W) in [0, 1]."""
        return self._answer(self.backbone(self.normalise(images)))

    @staticmethod
    def own_key(key: str) -> str:
        """The name here of a weight in torchvision's own state_dict."""
        return key.replace("fc.", "classifier.") if key.startswith("fc.") else f"backbone.{key}"


def build(description: Mapping[str, Any]) -> nn.Module:
    """A network with fresh weights from a model's description (`network` and `interface`).

    Raises:
        UserError: the network does not take images with this many channels.
    """
    interface, network = description["interface"], dict(description["network"])
    normalise = Normalise(interface["mean"], interface["std"])
    kinds: dict[str, type[Network]] = {
        "resnet": ResNet,
        "efficientnet_lite": EfficientNetLite,
        "torchvision": TorchvisionNetwork,
    }
    kind = kinds[network.pop("name")]
    return kind(normalise, interface["channels"], len(interface["classes"]), **network)


def _require_colour(network: str, channels: int) -> None:
    if channels != 3:
        raise UserError(
            f"network {network} takes 3 channels, the images have {channels} · set the data set's `channels` to 3: "
            "grey images are then read as colours"
        )


def _torchvision_model(name: str) -> Any:
    """An untrained ResNet of torchvision."""
    import_torchvision()
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        raise UserError(f"torchvision has no network {name!r}; {suggest(name, models.list_models())}")
    return models.get_model(name, weights=None)
