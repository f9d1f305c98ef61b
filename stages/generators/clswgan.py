"""f-CLSWGAN without its classification term: a conditional Wasserstein GAN with gradient penalty.

Source: Xian, Lorenz, Schiele, Akata, CVPR 2018, "Feature generating networks for zero-shot learning"; D3GZSL's official
code, which leaves the classification term out (card 3.2). "Card" is the D3GZSL method card. Its letters: D = critic,
a = attributes, x = features, xi = points between real and fake, lambda = `penalty`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from models.zero_shot import SLOPE, Critic
from stages.generators.generator import Backbone, Settings, exactly, fixed

ROWS = 512  # of weights at a time


def critic_loss(
    critic: Critic, real: Tensor, labels: Tensor, fake: Tensor, mix: Tensor, penalty: float
) -> tuple[Tensor, Tensor]:
    """Both parts of L_D (card 3.2): mean D(fake, a) - mean D(real, a), and the gradient penalty.

    The penalty is lambda * mean_i (|gradient of D at (xi_i, a_i) over xi_i| - 1)^2 with xi_i = mix_i * real_i +
    (1 - mix_i) * fake_i; where the gradient is 0 it is lambda, and passes no gradient on.

    The critic has one hidden layer, so that all is closed form: the first layer of xi is made of those of real and
    fake, the gradient over xi is a product of weights, and those over the weights take one product of the hidden
    slopes with features and gradients of the penalty for both layers at once, since a critic is linear in each of them.
    Gradients reach the critic's weights alone, once.

    Shapes: real and fake (B, D), labels (B,) int64, mix (B, 1); two scalars, means over B. In float32 or wider.
    """
    dtype = torch.promote_types(critic.fc1.weight.dtype, torch.float32)
    weights = (critic.fc1.weight, critic.fc1.bias, critic.fc2.weight, critic.fc2.bias)
    batch = (real.detach().to(dtype), fake.detach().to(dtype), mix.to(dtype))
    with exactly(real):
        found: tuple[Tensor, Tensor] = _CriticLoss.apply(*weights, *batch, critic.attributes[labels], penalty)
    return found


class _CriticLoss(torch.autograd.Function):
    """`critic_loss` of weights and a batch. With S the slopes (1 or 0.2) of the hidden units, W and w the weights of
    the first and the last layer, D's gradient over xi is (S * w) W, and D itself S * (W [x, a] + b) summed with w."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        first: Tensor,
        bias: Tensor,
        last: Tensor,
        constant: Tensor,
        real: Tensor,
        fake: Tensor,
        mix: Tensor,
        attributes: Tensor,
        penalty: float,
    ) -> tuple[Tensor, Tensor]:
        batch, features = real.shape
        of_features, of_class = first.split([features, attributes.shape[1]], 1)
        hidden = real.new_empty(3, batch, len(first))
        for rows, part in ((real, hidden[0]), (fake, hidden[1])):
            torch.mm(rows, of_features.T, out=part)
        torch.lerp(hidden[1], hidden[0], mix, out=hidden[2])
        hidden += F.linear(attributes, of_class, bias)
        critic = F.linear(F.leaky_relu(hidden[:2], SLOPE), last).mean((1, 2))
        # Over `hidden`, which is not needed any more.
        slopes = hidden.gt_(0).mul_(1 - SLOPE).add_(SLOPE)
        gradient = (slopes[2] * last) @ of_features
        lengths = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        inner = gradient.mul_(torch.where(lengths > 0, 2 * penalty / batch * (1 - 1 / lengths), 0))
        ctx.save_for_backward(first, bias, last, constant, real, fake, attributes, slopes, inner)
        return critic[1] - critic[0], penalty * (lengths - 1).square().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_difference: Tensor, of_penalty: Tensor) -> tuple[Tensor | None, ...]:
        first, bias, last, constant, real, fake, attributes, slopes, inner = ctx.saved_tensors
        batch, features = real.shape
        share = of_difference / batch
        rows = torch.stack([real * -share, fake * share, inner * of_penalty])
        change = (slopes[1] - slopes[0]).mul_(share)
        found, of_bias = torch.empty_like(first), change.sum(0)
        torch.mm(slopes.flatten(0, 1).T, rows.flatten(0, 1), out=found[:, :features])
        torch.mm(change.T, attributes, out=found[:, features:])
        # In parts: one product of all weights at once is as much memory again.
        parts = zip(first.split(ROWS), found.split(ROWS), strict=True)
        of_last = torch.cat([torch.linalg.vecdot(*part) for part in parts]) + bias * of_bias
        found *= last.T
        return (found, of_bias * last[0], of_last[None], torch.zeros_like(constant), *(5 * [None]))


class Learned(Backbone):
    """L_D for the critic and L_G for the generator (card 3.2)."""

    shares_embedding = False

    def __init__(
        self, settings: Settings, features: int, attributes: Tensor, seen: Tensor, embedding: nn.Module, width: int
    ) -> None:
        super().__init__(settings, features, attributes, seen, embedding, width)
        self._penalty = settings.penalty

    def critic_terms(self, real: Tensor, labels: Tensor, fake: Tensor, mix: Tensor) -> dict[str, Tensor]:
        critic, penalty = critic_loss(self.critic, real, labels, fake, mix, self._penalty)
        return {"critic": critic, "penalty": penalty}

    def generator_terms(self, real: Tensor, labels: Tensor, fake: Tensor) -> dict[str, Tensor]:
        with exactly(fake):
            return {"generator": -fixed(self.critic, fake.to(real.dtype), labels).mean()}
