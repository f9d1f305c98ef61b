"""Networks for recognition: an image to a pooled feature, an embedding and class scores."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from data.errors import UserError, suggest
from models.layers import Block, Normalise
from models.torchvision_import import import_torchvision


class Output(NamedTuple):
    """What every network for recognition returns.

    Attributes:
        pooled: (B, D) features after global pooling.
        embedding: (B, E) output of the linear embedding; the pooled features where there is none.
        logits: (B, classes).
    """

    pooled: Tensor
    embedding: Tensor
    logits: Tensor


class ResNet(nn.Module):
    """A residual network for small images of any size: a 3x3 stem, then one stage per entry of `widths`.

    Attributes:
        features: width of each place that a method may ask for.
    """

    def __init__(
        self,
        normalise: Normalise,
        channels: int,
        classes: int,
        widths: Sequence[int],
        blocks: int,
        embedding: int | None,
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
        self.features = {"pooled": before, "embedding": embedding or before}
        self.embedding: nn.Module = nn.Linear(before, embedding) if embedding else nn.Identity()
        self.classifier = nn.Linear(self.features["embedding"], classes)

    def forward(self, images: Tensor) -> Output:
        """(B, channels, H, W) in [0, 1]."""
        pooled = self.stages(self.stem(self.normalise(images))).mean((2, 3))
        embedding = self.embedding(pooled)
        return Output(pooled, embedding, self.classifier(embedding))


class TorchvisionNetwork(nn.Module):
    """A ResNet of torchvision; its embedding is the pooled feature."""

    def __init__(self, normalise: Normalise, channels: int, classes: int, model: str) -> None:
        super().__init__()
        self.normalise = normalise
        self.backbone = _torchvision_model(model)
        if channels != 3:
            raise UserError(f"network {model!r} of torchvision takes 3 channels, the images have {channels}")
        self.features = dict.fromkeys(("pooled", "embedding"), self.backbone.fc.in_features)
        self.classifier = nn.Linear(self.backbone.fc.in_features, classes)
        self.backbone.fc = nn.Identity()

    def forward(self, images: Tensor) -> Output:
        """(B, 3, H, W) in [0, 1]."""
        pooled = self.backbone(self.normalise(images))
        return Output(pooled, pooled, self.classifier(pooled))

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
    kinds: dict[str, type[nn.Module]] = {"resnet": ResNet, "torchvision": TorchvisionNetwork}
    kind = kinds[network.pop("name")]
    return kind(normalise, interface["channels"], len(interface["classes"]), **network)


def _torchvision_model(name: str) -> Any:
    """An untrained ResNet of torchvision."""
    import_torchvision()
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        raise UserError(f"torchvision has no network {name!r}; {suggest(name, models.list_models())}")
    return models.get_model(name, weights=None)
