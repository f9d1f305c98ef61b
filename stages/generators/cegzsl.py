"""CE-GZSL: f-CLSWGAN's generator, with contrastive losses between samples and between a sample and classes.

Source: Han, Fu, Chen, Yang, CVPR 2021, "Contrastive embedding for generalized zero-shot learning", and its official
code (card 3.3). "Card" is the D3GZSL method card. Its letters: h = what the embedding makes of features, z = its
projection of length 1, F = comparator, P(i) = other samples of the class of sample i, tau, tau_e =
`instance_temperature`, `class_temperature`, w_i, w_c = `instance_weight`, `class_weight`.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models import zero_shot
from stages.generators import clswgan
from stages.generators.generator import exactly, fixed
from stages.parameters.zero_shot import CEGZSL

CHUNK = 2**20  # hidden units at a time
STRAIGHT, BENT = (1 + zero_shot.SLOPE) / 2, (1 - zero_shot.SLOPE) / 2  # LeakyReLU(x) = STRAIGHT * x + BENT * |x|


def instance_loss(projections: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """L_ins: supervised contrastive (card 3.3; Khosla et al. 2020, "Supervised contrastive learning").

    Of each sample i: mean over P(i) of -log( exp(z_i z_p / tau) / sum over all q but i of exp(z_i z_q / tau) ). Samples
    with nobody else of their class are left out; where that leaves none, the loss is 0.

    Shapes: (N, width) of length 1, (N,) labels, a scalar, the mean over the samples that are left. In float32 or wider.
    """
    z = projections.to(torch.promote_types(projections.dtype, torch.float32))
    with exactly(z):
        similarities = (z / temperature) @ z.T
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels) & ~itself
    count = positive.sum(1)
    others = similarities.masked_fill(itself, -torch.inf).logsumexp(1)
    losses = others - torch.where(positive, similarities, 0).sum(1) / count.clamp_min(1)
    return torch.where(count > 0, losses, 0).sum() / (count > 0).sum().clamp_min(1)


def class_scores(
    comparator: zero_shot.Comparator, embedding: Tensor, attributes: Tensor, fixed: bool = False
) -> Tensor:
    """F of every sample with every class: what the comparator itself says, in less time and memory.

    Shapes: (B, width) and (C, attributes) to (B, C), in float32 or wider. Of the hidden units of all pairs, B * C times
    the comparator's width, never more than CHUNK are there at a time. Differentiable once. `fixed`: no gradient reaches
    the comparator.
    """
    weights = (comparator.fc1.weight, comparator.fc1.bias, comparator.fc2.weight, comparator.fc2.bias)
    first, bias, last, constant = (weight.detach() if fixed else weight for weight in weights)
    of_embedding, of_class = first.split([comparator.hidden, attributes.shape[1]], 1)
    with exactly(embedding):
        left, right = F.linear(embedding.to(first.dtype), of_embedding), F.linear(attributes, of_class, bias)
        return cast(Tensor, _Scores.apply(left, right, last[0])) + constant


class _Scores(torch.autograd.Function):
    """Sum over w of last_w * LeakyReLU(left_bw + right_cw), (B, W) and (C, W) to (B, C).

    LeakyReLU(x) is a x + c |x|, of which the first part needs no pairs. The derivative of the second is c sign(x);
    since |x| = sign(x) x, that of `last` follows from those of the other two.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, last: Tensor) -> Tensor:
        ctx.save_for_backward(left, right, last)
        bent = torch.cat([pairs.abs_() @ last for pairs in _pairs(left, right)])
        return STRAIGHT * ((left @ last)[:, None] + right @ last) + BENT * bent

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        left, right, last = ctx.saved_tensors
        of_left, of_right, begun = torch.empty_like(left), torch.zeros_like(right), 0
        for pairs in _pairs(left, right):
            rows = slice(begun, begun + len(pairs))
            pairs.sign_().mul_(gradient[rows, :, None])
            torch.sum(pairs, 1, out=of_left[rows])
            of_right += pairs.sum(0)
            begun = rows.stop
        of_left.mul_(BENT).add_(STRAIGHT * gradient.sum(1, keepdim=True))
        of_right.mul_(BENT).add_(STRAIGHT * gradient.sum(0)[:, None])
        of_last = (of_left * left).sum(0) + (of_right * right).sum(0)
        return of_left.mul_(last), of_right.mul_(last), of_last


def _pairs(left: Tensor, right: Tensor) -> Iterator[Tensor]:
    """left_bw + right_cw, (rows, C, W) at a time, in memory that is used again."""
    rows = max(1, CHUNK // right.numel())
    memory = left.new_empty(min(rows, len(left)), *right.shape)
    for part in left.split(rows):
        yield torch.add(part[:, None], right, out=memory[: len(part)])


def class_loss(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """L_cls: cross-entropy of the comparator's scores of the seen classes, divided by tau_e (card 3.3).

    Shapes: F(h_i, a_c) (B, n_s), (B,) int64 columns of the right class, a scalar, the mean over B. In float32 or wider.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return F.cross_entropy(wide / temperature, targets)


class Learned(clswgan.Learned):
    """L_D + L_ins + L_cls for critic, projection, comparator and the shared embedding; the generator's with weights."""

    shares_embedding = True

    def __init__(
        self, settings: CEGZSL, features: int, attributes: Tensor, seen: Tensor, embedding: nn.Module, width: int
    ) -> None:
        super().__init__(settings, features, attributes, seen, embedding, width)
        self._settings, self._embedding = settings, embedding
        self.projection = zero_shot.Projection(width, settings.embedding)
        self.comparator = zero_shot.Comparator(width, attributes.shape[1], settings.comparator)
        zero_shot.initialise(self.projection, self.comparator)
        self.critics |= {"projection": self.projection.to(attributes), "comparator": self.comparator.to(attributes)}
        self._described = attributes[seen]
        # A class that is not seen has no column, and no sample.
        self._column = torch.full((len(attributes),), -1, device=attributes.device)
        self._column[seen] = torch.arange(len(seen), device=attributes.device)

    def critic_terms(self, real: Tensor, labels: Tensor, fake: Tensor, mix: Tensor) -> dict[str, Tensor]:
        terms = super().critic_terms(real, labels, fake, mix)
        with exactly(real):
            hidden = self._embedding(real)
            terms["instance"] = instance_loss(self.projection(hidden), labels, self._settings.instance_temperature)
            scores = class_scores(self.comparator, hidden, self._described)
        terms["class"] = class_loss(scores, self._column[labels], self._settings.class_temperature)
        return terms

    def generator_terms(self, real: Tensor, labels: Tensor, fake: Tensor) -> dict[str, Tensor]:
        terms, settings = super().generator_terms(real, labels, fake), self._settings
        with exactly(real):
            hidden = fixed(self._embedding, fake.to(real.dtype))
            with torch.no_grad():
                theirs = self.projection(self._embedding(real))
            both = torch.cat([fixed(self.projection, hidden), theirs])
            instance = instance_loss(both, labels.repeat(2), settings.instance_temperature)
            scores = class_scores(self.comparator, hidden, self._described, fixed=True)
        terms["instance"] = settings.instance_weight * instance
        by_class = class_loss(scores, self._column[labels], settings.class_temperature)
        terms["class"] = settings.class_weight * by_class
        return terms
