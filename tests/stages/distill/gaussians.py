"""Mixtures of Gaussians whose answers are known, for tests of VDD; and its expert loss as the card writes it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from models.policy import Output


class Gaussians(NamedTuple):
    """A mixture per state, or one for all (B = 1).

    Attributes:
        log_weight: (B, M). mean: (B, M, A). axes: (B, M, A, A), of the covariances, side by side.
        variance: (B, M, A), along these. So noise, which is alike along all axes, costs no inversion.
    """

    log_weight: Tensor
    mean: Tensor
    axes: Tensor
    variance: Tensor

    @classmethod
    def make(cls, log_weight: Tensor, mean: Tensor, covariance: Tensor) -> "Gaussians":
        variance, axes = torch.linalg.eigh(covariance)
        return cls(log_weight, mean, axes, variance)

    @property
    def covariance(self) -> Tensor:
        """(B, M, A, A)."""
        return self.axes * self.variance[..., None, :] @ self.axes.mT

    def noisy(self, own: Tensor, noise: Tensor) -> "Gaussians":
        """Of own * a + sqrt(noise) * eps; (B,) each."""
        own, noise = own[:, None, None], noise[:, None, None]
        return self._replace(mean=own * self.mean, variance=own**2 * self.variance + noise)

    def _posterior(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density of every component together with its weight (B, M), and a - m along its axes, (B, M, A)."""
        off = ((points[:, None] - self.mean)[..., None, :] @ self.axes)[..., 0, :]
        spread = (off.square() / self.variance + (2 * math.pi * self.variance).log()).sum(2)
        return self.log_weight - 0.5 * spread, off

    def log_density(self, points: Tensor) -> Tensor:
        """(B, A) to (B,)."""
        return self._posterior(points)[0].logsumexp(1)

    def score(self, points: Tensor) -> Tensor:
        """(..., A) to the same; more than (B, A) for B = 1 only."""
        flat = points.reshape(-1, points.shape[-1])
        logs, off = self._posterior(flat)
        pulled = (self.axes @ (off / self.variance)[..., None])[..., 0]
        return -(logs.softmax(1)[..., None] * pulled).sum(1).view(points.shape)

    def clean(self, points: Tensor, own: Tensor, noise: Tensor) -> Tensor:
        """E[a | own * a + sqrt(noise) * eps = point], (B, A)."""
        blurred = self.noisy(own, noise)
        logs, off = blurred._posterior(points)
        moved = (self.axes @ (off * self.variance / blurred.variance)[..., None])[..., 0] * own[:, None, None]
        return (logs.softmax(1)[..., None] * (self.mean + moved)).sum(1)

    def repeat(self, count: int) -> "Gaussians":
        """Every state `count` times in a row."""
        return Gaussians(*(part.repeat_interleave(count, 0) for part in self))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, A) of the first state."""
        chosen = torch.multinomial(self.log_weight[0].exp(), count, replacement=True, generator=generator)
        noise = torch.randn(count, self.mean.shape[2], generator=generator, dtype=self.mean.dtype)
        scaled = self.variance[0, chosen].sqrt() * noise
        return self.mean[0, chosen] + (self.axes[0, chosen] @ scaled[..., None])[..., 0]


def square(factor: Tensor) -> Tensor:
    """A factor as a matrix, (N, K, A, A), where it is a vector."""
    return torch.diag_embed(factor) if factor.dim() == 3 else factor


def plain_ascent(
    experts: Output,
    noise: Tensor,
    score: Tensor,
    lagged: Output | None = None,
    weight: str = "gate",
    reduction: str = "sum",
) -> dict[str, Tensor]:
    """The expert loss of card 3.2 by MultivariateNormal, and its gradients by autograd; arguments as `vdd.ascend`."""
    mean, factor = (part.detach().clone().requires_grad_() for part in experts[:2])
    states, count = mean.shape[:2]
    samples = mean + (square(factor) @ noise[..., None]).squeeze(-1)
    fixed = Output(*(part.detach() for part in (experts if lagged is None else lagged)))
    every = MultivariateNormal(
        fixed.mean[None, :, None].expand(len(noise), -1, count, -1, -1),
        scale_tril=square(fixed.factor)[None, :, None].expand(len(noise), -1, count, -1, -1, -1),
    )
    joint = fixed.log_gate[None, :, None] + every.log_prob(samples[:, :, :, None].expand(-1, -1, -1, count, -1))
    log_responsibility = (joint.diagonal(dim1=2, dim2=3) - joint.logsumexp(3)).movedim(0, 2)
    entropy = MultivariateNormal(mean, scale_tril=square(factor)).entropy()
    inner = (score.detach() * samples.movedim(0, 2)).sum(3)
    objective = (inner + log_responsibility).mean(2) + entropy
    weights = experts.log_gate.detach().exp() if weight == "gate" else torch.ones_like(objective)
    loss = -(weights * objective).sum() / (states * (count if reduction == "mean" else 1))
    of_mean, of_factor = torch.autograd.grad(loss, [mean, factor])
    return {
        "mean": of_mean,
        "factor": of_factor if factor.dim() == 3 else of_factor.tril(),
        "loss": loss.detach(),
        "objective": objective.detach(),
        "log_responsibility": log_responsibility.detach(),
        "entropy": entropy.detach(),
    }
