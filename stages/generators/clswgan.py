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
        found: tuple[Tensor, Tensor] = _CriticLoss.apply(*weights, *batch, labels, critic.attributes, penalty)
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
        labels: Tensor,
        attributes: Tensor,
        penalty: float,
    ) -> tuple[Tensor, Tensor]:
        batch, features = real.shape
        of_features, of_class = first[:, :features], first[:, features:]
        by_class = F.linear(attributes, of_class, bias)[labels]
        hidden = real.new_empty(3 * batch, len(first))
        pair = hidden[: 2 * batch]
        torch.mm(torch.cat([real, fake]), of_features.T, out=pair)
        torch.lerp(pair[batch:], pair[:batch], mix, out=hidden[2 * batch :])
        hidden.view(3, batch, -1).add_(by_class)
        critic = F.linear(F.leaky_relu(pair, SLOPE), last).view(2, batch).mean(1)
        slopes = torch.where(hidden > 0, hidden.new_tensor(1.0), hidden.new_tensor(SLOPE))
        gradient = (slopes[2 * batch :] * last) @ of_features
        lengths = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        beyond = lengths - 1
        # Over `gradient`.
        inner = gradient.mul_(torch.where(lengths > 0, 2 * penalty / batch * beyond / lengths, 0))
        ctx.save_for_backward(first, bias, last, constant, real, fake, labels, attributes, slopes, inner)
        return critic[1] - critic[0], penalty * beyond.square().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_difference: Tensor, of_penalty: Tensor) -> tuple[Tensor | None, ...]:
        first, bias, last, constant, real, fake, labels, attributes, slopes, inner = ctx.saved_tensors
        batch, features = real.shape
        share = of_difference / batch
        of_rows = torch.cat([real * -share, fake * share, inner * of_penalty])
        of_real, of_fake, _ = slopes.split(batch)
        signs = real.new_zeros(len(attributes), len(first))
        signs.index_add_(0, labels, (of_fake - of_real).mul_(share))
        found = torch.empty_like(first)
        torch.mm(slopes.T, of_rows, out=found[:, :features])
        torch.mm(signs.T, attributes, out=found[:, features:])
        of_bias = signs.sum(0)
        of_last = (first * found).sum(1) + bias * of_bias
        found *= last.T
        return (found, of_bias * last[0], of_last[None], torch.zeros_like(constant), *(6 * [None]))


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
