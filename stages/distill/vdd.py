"""VDD: a diffusion policy distilled into a mixture of Gaussian experts, by its score.

Source: Zhou, Blessing, Li, Celik, Jia, Neumann, Lioutikov, NeurIPS 2024, "Variational Distillation of Diffusion
Policies into Mixture of Experts" (arXiv 2406.12538), and its official code. "Card" is the VDD method card. Its letters:
mu, L = mean and factor of an expert, pi = gate, eps = noise, a = mu + L eps, f = the teacher's score at a, r =
responsibility, H = entropy, O = an expert's objective, V = samples per expert. The steps of windows are states like any
others, N of them, with K experts each, in the scaled space of actions.

A factor is (N, K, A, A), lower triangular with a positive diagonal; or (N, K, A), that diagonal, where the rest is 0.
Everything is computed from logarithms, in the dtype of the inputs, which is float32 at least. The gradients are closed
forms: no graph is needed and none is left.
"""

import copy
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from models.policy import DDPM, Diffusion, Mixture, Output
from stages.experts import ByTurns, over_experts
from stages.parameters.policy import VDD, Anneal, Last, Steps, Uniform
from stages.teach.policy import Policy
from stages.training import Context, Run

TOGETHER = 8192  # experts of states that are looked at together, so that what they need stays in the cache


class Responsibility(NamedTuple):
    """Of the expert that drew a sample, for that sample.

    Attributes:
        log: log r, (N, K, V), at most 0. slope: d log r / d a, (N, K, V, A).
    """

    log: Tensor
    slope: Tensor


class Ascent(NamedTuple):
    """An update of the experts.

    Attributes:
        mean, factor: gradients of the loss that is descended; shapes of mean and factor.
        loss: its value, a scalar. objective: O, (N, K). Both are no likelihood and tell nothing of convergence: the
            inner product of score and sample in them is there for its gradient (card 3.2).
        log_responsibility: log r, (N, K, V). entropy: H, (N, K), in nats.
    """

    mean: Tensor
    factor: Tensor
    loss: Tensor
    objective: Tensor
    log_responsibility: Tensor
    entropy: Tensor


@torch.no_grad()
def draw(mean: Tensor, factor: Tensor, noise: Tensor) -> Tensor:
    """a = mu + L eps: noise (V, N, K, A) to samples (N, K, V, A) (card 2)."""
    if factor.dim() == 3:
        return torch.addcmul(mean[:, :, None], factor[:, :, None], noise.permute(1, 2, 0, 3))
    rows, means = noise.flatten(1, 2).transpose(0, 1), mean.flatten(0, 1)
    found = torch.baddbmm(means[:, None], rows, factor.flatten(0, 1).mT)
    return found.view(*mean.shape[:2], *rows.shape[1:])


@torch.no_grad()
def log_densities(points: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """log N of points (N, P, A) under every expert of their state, (N, K, P), in nats."""
    white, _ = _whiten(points, mean, factor)
    constant = 0.5 * mean.shape[2] * math.log(2 * math.pi)
    return -0.5 * white.square().sum(2) - (_scales(factor).log().sum(2) + constant)[..., None]


@torch.no_grad()
def entropies(factor: Tensor) -> Tensor:
    """H = sum_i log L_ii + A / 2 (1 + log 2 pi), (N, K), in nats (card 3.2)."""
    scales = _scales(factor)
    return scales.log().sum(2) + 0.5 * scales.shape[2] * (1 + math.log(2 * math.pi))


@torch.no_grad()
def responsibilities(samples: Tensor, experts: Output, noise: Tensor | None = None) -> Responsibility:
    """log r_k(a) for samples (N, K, V, A), the k-th expert's each, and its slope (card 3.2).

    Every factor is inverted once, and one matrix product per state whitens all samples for all experts.

    Args:
        experts: those that drew the samples, or any others: with lagged ones the bound is not tight (card 4, row 11).
        noise: (V, N, K, A) that these experts made the samples of, if it was they: what it says of their own densities
            is exact.
    """
    states = max(1, TOGETHER // experts.mean.shape[1])
    noises = itertools.repeat(None) if noise is None else noise.split(states, 1)
    pieces = zip(samples.split(states), *(part.split(states) for part in experts), noises, strict=False)
    found = [_explain(some, Output(*own), drawn) for some, *own, drawn in pieces]
    return Responsibility(*map(torch.cat, zip(*found, strict=True)))


@torch.no_grad()
def ascend(
    experts: Output,
    noise: Tensor,
    samples: Tensor,
    score: Tensor,
    *,
    lagged: Output | None = None,
    weight: str = "gate",
    reduction: str = "sum",
) -> Ascent:
    """Gradients, in mean and factor, of the experts' loss: - pi O over experts, mean over states (card 3.2).

    O = mean_v(f . a + log r) + H, in which f, pi and what r is computed with are constants:

        dO/dmu = mean_v d,    dO/dL = tril(mean_v d eps^T) + diag(1 / L_ii),    d = f + d log r / da

    Args:
        experts: (N, K, A), a factor, (N, K). noise: (V, N, K, A). samples: `draw` of these, (N, K, V, A).
        score: the teacher's at the samples, (N, K, V, A). lagged: other experts for r.
        weight: of an expert's objective: its probability (`gate`), or 1 (`none`; card 4, row 3).
        reduction: over experts, `sum` or `mean` (card 4, row 4).

    Raises:
        ValueError: shapes do not go together, a standard deviation is 0 or less, or an unknown weight or reduction.
    """
    mean, factor, log_gate = experts
    if samples.shape != score.shape or noise.permute(1, 2, 0, 3).shape != score.shape:
        raise ValueError(
            f"samples {tuple(samples.shape)}, scores {tuple(score.shape)} and noise {tuple(noise.shape)} do not go "
            "together · give (N, K, V, A) twice, and (V, N, K, A)"
        )
    if bool((_diagonal(factor) <= 0).any()):
        raise ValueError("a factor has 0 or less on its diagonal · an expert needs a covariance (`network.min_std`)")
    if weight not in ("gate", "none"):
        raise ValueError(f"unknown weight of experts ({weight!r}) · use gate or none")
    weights = log_gate.exp() if weight == "gate" else torch.ones_like(log_gate)
    log_responsibility, slope = responsibilities(samples, *((experts, noise) if lagged is None else (lagged, None)))
    entropy = entropies(factor)
    objective = (torch.linalg.vecdot(score, samples) + log_responsibility).mean(2) + entropy
    loss = -over_experts(weights * objective, reduction).mean()
    share = weights / -(len(mean) if reduction == "sum" else log_gate.numel())
    direction = slope.add_(score).mul_((share / samples.shape[2])[..., None, None])
    scales = share[..., None] / _scales(factor)
    if factor.dim() == 3:
        of_factor = (direction * noise.permute(1, 2, 0, 3)).sum(2).add_(scales)
    else:
        of_factor = _outer(direction, noise)
        of_factor.diagonal(dim1=2, dim2=3).add_(scales)
    return Ascent(direction.sum(2), of_factor, loss, objective, log_responsibility, entropy)


def _explain(samples: Tensor, experts: Output, noise: Tensor | None) -> Responsibility:
    """`responsibilities` of some states."""
    mean, factor, log_gate = experts
    states, count, size = mean.shape
    white, inverse = _whiten(samples.flatten(1, 2), mean, factor)
    by_owner = white.view(states, count, size, count, -1)
    if noise is not None:
        by_owner.diagonal(dim1=1, dim2=3).copy_(noise.permute(1, 3, 0, 2))
    heights = log_gate - _scales(factor).log().sum(2)
    logs = white.square().sum(2).mul_(-0.5).add_(heights[..., None]).log_softmax(1).view(states, count, count, -1)
    own = logs.diagonal(dim1=1, dim2=2).transpose(1, 2).contiguous()
    # The gradient of log N_j is -W_j^T z_j, so that of log r_k is the sum over j of (r_j - [j = k]) W_j^T z_j.
    weights = logs.exp_()
    weights.diagonal(dim1=1, dim2=2).sub_(1)
    by_owner *= weights[:, :, None]
    if factor.dim() == 3:
        slope = (white * inverse[..., None]).sum(1).mT
    else:
        slope = (inverse.flatten(1, 2).mT @ white.flatten(1, 2)).mT
    return Responsibility(own, slope.reshape(samples.shape))


def _diagonal(factor: Tensor) -> Tensor:
    """(N, K, A), of a factor in whichever shape it is."""
    return factor if factor.dim() == 3 else factor.diagonal(dim1=2, dim2=3)


def _scales(factor: Tensor) -> Tensor:
    """`_diagonal`, side by side in memory."""
    return _diagonal(factor).contiguous()


def _whiten(points: Tensor, mean: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """z = W (a - mu), (N, K, A, P), of points (N, P, A) for every expert, and W, the inverse of the factor.

    W (a - mu) = (-W mu, W) (1, a): one product.
    """
    if factor.dim() == 3:
        inverse = factor.reciprocal()
        return (points.mT[:, None] - mean[..., None]) * inverse[..., None], inverse
    affine = _inverse(factor, mean)
    white = affine.flatten(1, 2) @ F.pad(points, (1, 0), value=1.0).mT
    return white.view(*mean.shape, -1), affine[..., 1:]


def _inverse(factor: Tensor, mean: Tensor) -> Tensor:
    """-W mu and W side by side, (N, K, A, A + 1), for lower triangular (N, K, A, A) and (N, K, A).

    Row by row, many matrices at once: a library goes from matrix to matrix, which takes longer where they are small.
    """
    size = factor.shape[3]
    rows = factor.flatten(0, 1).flatten(1).t().contiguous().view(size, size, -1)
    solved = rows.new_zeros(size, size + 1, rows.shape[2])
    torch.neg(mean.flatten(0, 1).t(), out=solved[:, 0])
    solved[:, 1:].diagonal().fill_(1)
    for place in range(size):
        row = solved[place, : place + 2]
        row *= rows[place, place].reciprocal()
        solved[place + 1 :, : place + 2].addcmul_(rows[place + 1 :, place, None], row, value=-1)
    return solved.flatten(0, 1).t().contiguous().view(*mean.shape, size + 1)


def _outer(direction: Tensor, noise: Tensor) -> Tensor:
    """Lower triangles of sum_v d_v eps_v^T, (N, K, A, A), for d (N, K, V, A) and eps (V, N, K, A)."""
    size = noise.shape[3]
    found = noise.new_zeros(size, size, math.prod(noise.shape[1:3]))
    for d, eps in zip(direction.unbind(2), noise, strict=True):
        left, right = (x.flatten(0, 1).t().contiguous() for x in (d, eps))
        for row in range(size):
            found[row, : row + 1].addcmul_(left[row], right[: row + 1])
    return found.flatten(0, 1).t().contiguous().view(*noise.shape[1:], size)


def noise_levels(
    levels: Uniform | Last | Anneal | Steps,
    count: int,
    lowest: float,
    iteration: int,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """At which levels the teacher is asked for `count` scores (card 3.3).

    `uniform`: (count,) in [low, high]. `last`: (1,), the lowest that the teacher knows. `anneal`: (1,), in a line from
    high at iteration 0 to low at the given one, and low from then on. `steps`: (count,) int64, low to high, both count.
    """
    match levels:
        case Steps():
            return torch.randint(levels.low, levels.high + 1, (count,), generator=generator, device=device)
        case Uniform():
            drawn = torch.rand(count, generator=generator, device=device, dtype=dtype)
            return levels.low + (levels.high - levels.low) * drawn
        case Last():
            level = lowest
        case Anneal():
            done = min(1.0, iteration / levels.iterations)
            level = levels.high + done * (levels.low - levels.high)
    return torch.tensor([level], device=device, dtype=dtype)


def clean_score(teacher: DDPM, actions: Tensor, observations: Tensor, level: Tensor) -> Tensor:
    """f = sqrt(abar) s_t(sqrt(abar) a): the score of clean actions (M, T, A), widened by the noise (card 4, row 7).

    An expert that follows it finds the teacher's mean; with `teacher.score` of the actions as they are, which takes
    them for noisy ones, sqrt(abar) times it (card 3.3).
    """
    kept = teacher.kept[level].sqrt().view(-1, 1, 1)
    return kept * teacher.score(kept * actions, observations, level)


class Learner(ByTurns):
    """An iteration is `expert_steps` updates of the experts, then the gate's, each on a batch of its own (card 3.6).

    `modules` has, where `lag` is not 0, `lagged`: the student as it was when responsibilities were last renewed.
    """

    frozen = frozenset({"teacher", "lagged"})

    def __init__(self, task: Policy, parameters: VDD, run: Run) -> None:
        super().__init__(task, parameters)
        self._task, self._parameters = task, parameters
        self.modules["teacher"] = task.taught_by()
        if parameters.lag:
            self.modules["lagged"] = copy.deepcopy(task.student)

    def step(self, context: Context) -> Mapping[str, Tensor]:
        if self._parameters.lag and context.step % self._parameters.lag == 0:
            self.modules["lagged"].load_state_dict(self.modules["student"].state_dict())
        for _ in range(self._parameters.expert_steps):
            found = self._learn_experts(context)
        return {"surrogate": found.loss, "entropy/experts": found.entropy.mean(), **self._learn_gate(context)}

    def _learn_experts(self, context: Context) -> Ascent:
        parameters, views = self._parameters, self._task.views(context)
        student = cast(Mixture, self.modules["student"])
        with context.run.autocast():
            output = student(views.student)
        experts = _flat(output)
        noise = torch.randn(
            (parameters.samples, *experts.mean.shape),
            generator=context.generator("noise"),
            device=experts.mean.device,
            dtype=experts.mean.dtype,
        )
        samples = draw(experts.mean, experts.factor, noise)
        lagged = None
        with torch.no_grad(), context.run.autocast():
            score = self._score(samples, views.teacher, output.mean.shape[1], context).to(samples)
            if parameters.lag:
                lagged = _flat(self.modules["lagged"](views.student))
        found = ascend(
            experts, noise, samples, score, lagged=lagged, weight=parameters.weight, reduction=parameters.reduction
        )
        cotangents = [found.mean.view_as(output.mean), found.factor.view_as(output.factor)]
        context.update("experts", [output.mean, output.factor], cotangents)
        return found

    def _score(self, samples: Tensor, observations: Tensor, steps: int, context: Context) -> Tensor:
        """Of samples (B * T, K, V, A) in one call of the teacher; a window of T samples shares its level."""
        teacher, parameters = cast(Diffusion, self.modules["teacher"]), self._parameters
        windows = samples.unflatten(0, (-1, steps)).permute(0, 2, 3, 1, 4)
        actions = windows.flatten(0, 2)
        random, lowest = context.generator("levels"), teacher.levels[0]
        level = noise_levels(
            parameters.levels, len(actions), lowest, context.step, random, actions.device, actions.dtype
        )
        if parameters.vp_input == "scaled":
            score = clean_score(cast(DDPM, teacher), actions, observations, level)
        else:
            score = teacher.score(actions, observations, level)
        return score.view(windows.shape).permute(0, 3, 1, 2, 4).flatten(0, 1)


def _flat(output: Output) -> Output:
    """Windows and steps as one dimension of states, without a graph."""
    return Output(*(part.detach().flatten(0, 1) for part in output))
