"""Small generators with their critics, in float64."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from models.zero_shot import MLP
from stages.generators.generator import Backbone, backbone

CLASSES, ATTRIBUTES, FEATURES, HIDDEN, WIDTH = 7, 3, 6, 10, 5
SEEN = torch.tensor([0, 2, 3, 5])


def settings(**fields: Any) -> Any:
    base = {"hidden": HIDDEN, "noise": None, "penalty": 10.0, "embedding": 4, "comparator": 8}
    temperatures = {"instance_temperature": 0.1, "class_temperature": 0.1}
    return SimpleNamespace(**{**base, **temperatures, "instance_weight": 1e-3, "class_weight": 1e-2, **fields})


def build(name: str, seed: int = 0, **fields: Any) -> tuple[Backbone, MLP]:
    """With weights large enough that units switch, and the student whose hidden layer may be shared."""
    torch.manual_seed(seed)
    student = MLP(FEATURES, CLASSES, WIDTH).double()
    attributes = torch.rand(CLASSES, ATTRIBUTES, dtype=torch.float64)
    networks = backbone(name)(settings(**fields), FEATURES, attributes, SEEN, student.embedding, WIDTH)
    for module in (networks.generator, *networks.critics.values()):
        for parameter in module.parameters():
            nn.init.normal_(parameter, 0, 0.7)
    return networks, student


def batch(count: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """real, labels, fake, mix."""
    random = torch.Generator().manual_seed(seed)
    real, fake = (torch.rand(count, FEATURES, generator=random, dtype=torch.float64) for _ in range(2))
    labels = SEEN[torch.randint(len(SEEN), (count,), generator=random)]
    return real, labels, fake, torch.rand(count, 1, generator=random, dtype=torch.float64)
