"""What a generator of features and its critics offer to the methods that use them. "Card" is the D3GZSL method card."""

import importlib
from abc import ABC, abstractmethod
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from models import zero_shot


class Settings(Protocol):
    """What every generator has in params.yaml; stages/parameters/zero_shot.py says what each means."""

    @property
    def hidden(self) -> int: ...
    @property
    def noise(self) -> int | None: ...
    @property
    def penalty(self) -> float: ...


class Backbone(ABC):
    """How features are synthesised, and what criticises them.

    Two phases take turns: the critics' learns by `critic_terms`, the generator's by `generator_terms`. In both, `real`
    and `fake` are (B, D) scaled features of seen classes, row i of both of class `labels[i]`, (B,) int64 numbers of
    classes in the order of `attributes`. Terms are scalars, weighted already, in float32 or wider also under autocast.

    Attributes:
        generator, critic: made on the device and in the dtype of `attributes`, with fresh weights.
        critics: what learns in the critics' phase, by name: `critic`, and what else criticises.
        shares_embedding: whether the student's hidden layer learns from `critic_terms` too.
    """

    shares_embedding: ClassVar[bool]

    def __init__(
        self, settings: Settings, features: int, attributes: Tensor, seen: Tensor, embedding: nn.Module, width: int
    ) -> None:
        """
        Args:
            features: D.
            attributes: (n, A) of all classes. seen: (n_s,) int64 numbers of those that are trained on.
            embedding: the student's hidden layer, (B, D) to (B, width).
        """
        classes, known = attributes.shape
        self.generator = zero_shot.Generator(features, classes, known, settings.noise or known, settings.hidden)
        self.critic = zero_shot.Critic(features, classes, known, settings.hidden)
        zero_shot.initialise(self.generator, self.critic)
        for module in (self.generator, self.critic):
            module.to(attributes)
            module.attributes.copy_(attributes)
        self.critics: dict[str, nn.Module] = {"critic": self.critic}

    @abstractmethod
    def critic_terms(self, real: Tensor, labels: Tensor, fake: Tensor, mix: Tensor) -> dict[str, Tensor]:
        """For `critics`, and the student's embedding where it is shared; `fake` is taken without gradient.

        Args:
            mix: (B, 1) in [0, 1), uniform: the weight of real in the points at which the critic's slope is penalised.
        """

    @abstractmethod
    def generator_terms(self, real: Tensor, labels: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """For what `fake` was made by alone: no gradient reaches the critics, the embedding or `real`."""


def backbone(name: str) -> type[Backbone]:
    """The one that stages/generators/NAME.py holds."""
    return cast(type[Backbone], importlib.import_module(f"stages.generators.{name}").Learned)


def fixed(module: nn.Module, *inputs: Tensor) -> Tensor:
    """What a module makes of inputs; gradients reach these, and none of its weights."""
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return cast(Tensor, functional_call(module, weights, inputs))


def exactly(x: Tensor) -> torch.autocast:
    """Matrix products in the dtype of their inputs, also under autocast."""
    return torch.autocast(x.device.type, enabled=False)
