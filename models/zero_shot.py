"""Networks for generalized zero-shot recognition: encoder, classifiers, generator, and what criticises it.

All but the encoder are small perceptrons on features, as D3GZSL and CE-GZSL have them (D3GZSL card 3.1 and 3.3).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Block, Normalise

SLOPE = 0.2  # of LeakyReLU below 0
SPREAD = 0.02  # of initial weights


class Output(NamedTuple):
    """What every classifier returns.

    Attributes:
        features: (B, D) not negative; scaled where the network scales.
        embedding: (B, E) what the last layer sees.
        logits: (B, classes).
    """

    features: Tensor
    embedding: Tensor
    logits: Tensor


class Scale(nn.Module):
    """(features - minimum) / divisor per feature; nothing is cut off (D3GZSL card 3.11)."""

    minimum: Tensor
    divisor: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("minimum", torch.zeros(features))
        self.register_buffer("divisor", torch.ones(features))

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Min-max over (N, D) training features; a constant feature is divided by 1, and all by the largest result."""
        low, high = features.min(0).values, features.max(0).values
        spread = torch.where(high > low, high - low, 1)
        largest = ((features - low) / spread).max()
        self.minimum.copy_(low)
        self.divisor.copy_(spread * torch.where(largest > 0, largest, 1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D)."""
        return (features - self.minimum) / self.divisor


class Encoder(nn.Module):
    """Small images to features: a 3x3 stem, then residual stages, the mean over positions of what their ReLU gives.

    Args:
        classes: of the linear classifier that it learns with; None leaves it out, where features are all that is asked.
    """

    def __init__(
        self, normalise: Normalise, channels: int, classes: int | None, widths: Sequence[int], blocks: int
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        before = [widths[0], *(width for width in widths for _ in range(blocks))]
        strides = [2 if block == 0 and stage > 0 else 1 for stage in range(len(widths)) for block in range(blocks)]
        self.stages = nn.Sequential(*map(Block, before[:-1], before[1:], strides))
        self.classifier = None if classes is None else nn.Linear(widths[-1], classes)

    def features(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) in [0, 1] to (B, widths[-1])."""
        found: Tensor = self.stages(self.stem(self.normalise(images))).mean((2, 3))
        return found

    def forward(self, images: Tensor) -> Output:
        """(B, channels, H, W) in [0, 1]."""
        features = self.features(images)
        return Output(features, features, cast(nn.Linear, self.classifier)(features))


class MLP(nn.Module):
    """Scaled features, a hidden layer with ReLU (none where `hidden` is None), and a linear classifier.

    With an `encoder` it takes images too: a batch of four dimensions goes through it first.
    """

    def __init__(self, features: int, classes: int, hidden: int | None, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.scale = Scale(features)
        self.embedding: nn.Module = (
            nn.Identity() if hidden is None else nn.Sequential(nn.Linear(features, hidden), nn.ReLU())
        )
        self.classifier = nn.Linear(hidden or features, classes)

    def forward(self, inputs: Tensor) -> Output:
        """(B, D) features as they were prepared, or (B, channels, H, W) images in [0, 1]."""
        if inputs.dim() == 4:
            inputs = cast(Encoder, self.encoder).features(inputs)
        scaled = self.scale(inputs)
        embedding = self.embedding(scaled)
        return Output(scaled, embedding, self.classifier(embedding))


class Generator(nn.Module):
    """Noise and the attributes of a class to scaled features of it; it knows the attributes of all classes."""

    attributes: Tensor

    def __init__(self, features: int, classes: int, attributes: int, noise: int, hidden: int) -> None:
        super().__init__()
        self.noise = noise
        self.fc1 = nn.Linear(noise + attributes, hidden)
        self.fc2 = nn.Linear(hidden, features)
        self.register_buffer("attributes", torch.zeros(classes, attributes))

    @property
    def built_from(self) -> dict[str, Any]:
        """`network` of its description."""
        width = {"attributes": self.attributes.shape[1], "noise": self.noise, "hidden": self.fc1.out_features}
        return {"name": "generator", **width}

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """(B, noise) and (B,) int64 to (B, D).

        The first layer is linear in noise and attributes: what the latter give is computed once per class.
        """
        of_noise, of_class = self.fc1.weight.split([self.noise, self.attributes.shape[1]], 1)
        by_class = F.linear(self.attributes, of_class, self.fc1.bias)
        hidden = F.leaky_relu(F.linear(noise, of_noise) + by_class[labels], SLOPE)
        return F.relu(self.fc2(hidden))


class Critic(nn.Module):
    """Scaled features and the attributes of a class to how real they are together, a number without bounds."""

    attributes: Tensor

    def __init__(self, features: int, classes: int, attributes: int, hidden: int) -> None:
        super().__init__()
        self.features = features
        self.fc1 = nn.Linear(features + attributes, hidden)
        self.fc2 = nn.Linear(hidden, 1)
        self.register_buffer("attributes", torch.zeros(classes, attributes))

    def of_class(self, labels: Tensor) -> Tensor:
        """(B, hidden): what the attributes of (B,) labels give to the first layer, bias included."""
        return F.linear(self.attributes, self.fc1.weight[:, self.features :], self.fc1.bias)[labels]

    def of_features(self, features: Tensor) -> Tensor:
        """(B, hidden): what (B, D) features give to the first layer."""
        return F.linear(features, self.fc1.weight[:, : self.features])

    def from_hidden(self, hidden: Tensor) -> Tensor:
        """(B, hidden) sums of the two to (B,)."""
        return self.fc2(F.leaky_relu(hidden, SLOPE)).squeeze(1)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """(B, D) and (B,) int64 to (B,)."""
        return self.from_hidden(self.of_features(features) + self.of_class(labels))


class Projection(nn.Module):
    """CE-GZSL's second embedding layer: (B, hidden) to (B, width) of length 1; zeros stay, and pass no gradient on."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(hidden, width)

    def forward(self, embedding: Tensor) -> Tensor:
        """(B, hidden) to (B, width)."""
        found = self.fc(embedding)
        lengths = torch.linalg.vector_norm(found, dim=1, keepdim=True)
        return found / lengths.masked_fill(lengths == 0, torch.inf)


class Comparator(nn.Module):
    """CE-GZSL's comparator: how well an embedding goes with each of some classes."""

    def __init__(self, hidden: int, attributes: int, width: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.fc1 = nn.Linear(hidden + attributes, width)
        self.fc2 = nn.Linear(width, 1)

    def forward(self, embedding: Tensor, attributes: Tensor, chunk: int = 2**24) -> Tensor:
        """(B, hidden) and (C, attributes) to (B, C).

        The first layer is linear in both: each part is computed once and the sums are made by broadcasting, in chunks
        of at most `chunk` numbers.
        """
        of_embedding, of_class = self.fc1.weight.split([self.hidden, attributes.shape[1]], 1)
        left, right = F.linear(embedding, of_embedding), F.linear(attributes, of_class, self.fc1.bias)
        rows = max(1, chunk // right.numel())
        parts = [self.fc2(F.leaky_relu(part[:, None] + right, SLOPE)).squeeze(2) for part in left.split(rows)]
        return torch.cat(parts)


def initialise(*modules: nn.Module) -> None:
    """Weights of all linear layers from N(0, 0.02^2), biases 0 (card 3.1)."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, SPREAD)
                nn.init.zeros_(layer.bias)


def build(description: Mapping[str, Any]) -> nn.Module:
    """A network with fresh weights from a model's description (`network` and `interface`)."""
    interface, network = description["interface"], dict(description["network"])
    classes, images = len(interface["classes"]), interface["images"]
    name = network.pop("name")
    if name == "encoder":
        return _encoder(network, images, classes)
    if name == "mlp":
        encoder = network.pop("encoder")
        inside = None if encoder is None else _encoder(encoder, images, None)
        return MLP(interface["features"], classes, network["hidden"], inside)
    if name == "snapshots":
        return nn.ModuleList(MLP(interface["features"], classes, network["hidden"]) for _ in range(network["count"]))
    return Generator(interface["features"], classes, **network)


def _encoder(network: Mapping[str, Any], images: Mapping[str, Any], classes: int | None) -> Encoder:
    normalise = Normalise(images["mean"], images["std"])
    return Encoder(normalise, images["channels"], classes, network["widths"], network["blocks"])
