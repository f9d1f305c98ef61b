"""D3GZSL: a generator for classes without samples, and a student that a teacher of the seen classes keeps in order.

Source: Wang, Hong, Huangfu, Huang, AAAI 2024, "Data Distribution Distilled Generative Model for Generalized Zero-Shot
Recognition" (arXiv 2402.11424), and its official code. Where the two disagree a setting decides (D3GZSL card, section
4). "Card" is the D3GZSL method card. Its letters: z, z^t = embeddings of student and teacher, v, v^t = their logits,
v_S = the student's logits of seen classes, in the teacher's order, K, R = cosines brought to [0, 1], T, W = 1 where two
samples are to agree, s = score, c = confidence, h, h^t = the codes (in, out of distribution) of student and teacher,
alpha, beta = slope and offset of the confidence.

Every loss computes and returns float32, or float64 if an input is, also under autocast. Inputs of other shapes than
said, unequal batches and empty ones raise ValueError.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stages.training import widen

SHORTEST = 1e-8  # embeddings that are shorter count as so long
TERMS = 14  # of the Chebyshev series of a softplus
NEAREST = 1e-6  # a similarity that is a probability stays so far from 0 and 1


def embedding_loss(
    teacher: Tensor, student: Tensor, labels: Tensor, *, form: str = "logits", unit_teacher: bool = False
) -> Tensor:
    """L_be: a sample's embedding by the student is to be near those by the teacher of its class (card 3.6 b).

    K_ij = (1 + cos(z^t_i, z_j)) / 2 is compared with T_ij, 1 where samples i and j share their label, by the binary
    cross-entropy; one matrix product makes all of them. No distance: it is not 0 where student and teacher are equal.

    Shapes: teacher and student (B, d), labels (B,), a scalar. Reduction: mean over all B * B pairs. `form`: "logits"
    takes K as a logit, as the official code does, "probabilities" as a probability (card 4, row 4). No gradient reaches
    the teacher. An embedding of zeros has cosine 0 with all others, and gets no gradient. `unit_teacher`: the teacher's
    rows have length 1 (or 0) already.
    """
    _alike("embeddings", teacher, student, labels)
    student, teacher = widen(student, teacher)
    with _exactly(student):
        if not unit_teacher:
            teacher = unit(teacher)
        # The product of what is not scaled yet: a row of cosines is shorter than one of an embedding.
        return _agreement((teacher @ student.T) / _lengths(student).T, labels, form)


def unit(rows: Tensor) -> Tensor:
    """(B, d) rows to length 1; zeros stay zeros and get no gradient."""
    return rows / _lengths(rows)


def label_loss(teacher_logits: Tensor, student_logits: Tensor, *, form: str = "single") -> Tensor:
    """L_kl: KL divergence of the teacher's distribution over the seen classes from the student's (card 3.6 c).

    Shapes: v^t and v_S, both (B, n_s), a scalar. Reduction: sum over classes, mean over samples. `form`: "single" takes
    one softmax, as the framework's figure has it, "double" a softmax of that again on both sides, as the official code
    does (card 4, row 3); it is less than 2. No gradient reaches the teacher.
    """
    _alike("logits of seen classes", teacher_logits, student_logits)
    student, teacher = widen(student_logits, teacher_logits)
    if form == "double":
        student, teacher = student.softmax(1), teacher.softmax(1)
    elif form != "single":
        raise ValueError(f"unknown form of the label loss ({form!r}) · use single or double")
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


def max_log_softmax(teacher_logits: Tensor) -> Tensor:
    """s: log of the largest probability, at most 0 and at least -log n_s (card 3.6 d). (N, n_s) to (N,)."""
    return _wide(teacher_logits).log_softmax(1).amax(1)


def energy(teacher_logits: Tensor) -> Tensor:
    """log sum exp, the negative of the energy (Liu et al. 2020, "Energy-based out-of-distribution detection").

    (N, n_s) to (N,).
    """
    return _wide(teacher_logits).logsumexp(1)


# (N, n_s) teacher's logits to (N,): the higher, the more like the seen classes.
SCORES = {"max_log_softmax": max_log_softmax, "energy": energy}


def teacher_codes(confidence: Tensor, renormalise: bool = True) -> Tensor:
    """h^t: (N,) confidence c to (N, 2) pairs (c, 1 - c), or the softmax of these, as the official code does."""
    pairs = torch.stack([confidence, 1 - confidence], 1)
    return pairs.softmax(1) if renormalise else pairs


def distribution_loss(student_codes: Tensor, teacher_codes: Tensor, groups: Tensor, *, form: str = "logits") -> Tensor:
    """L_od: a sample's code by the student is to be near those by the teacher of its group (card 3.6 d).

    R_ij = (1 + cos(h_i, h^t_j)) / 2 is compared with W_ij, 1 where samples i and j share their group, by the binary
    cross-entropy. Gradients reach both sides.

    Shapes: codes (N, 2), none of them (0, 0), groups (N,) int64, class labels or domain; a scalar. Reduction: mean over
    all N * N pairs. `form`: as in `embedding_loss`; "logits" takes time and memory in proportion to N.
    """
    _alike("codes", teacher_codes, student_codes, groups)
    student, teacher = _wide(student_codes), _wide(teacher_codes)
    with _exactly(student):
        if form == "logits":
            return cast(Tensor, _PlanarAgreement.apply(student, teacher, groups))
        return _agreement(unit(student) @ unit(teacher).T, groups, form)


class _PlanarAgreement(torch.autograd.Function):
    """`_agreement` with logits of the cosines of (N, 2) vectors, without a number for every pair.

    Vectors in a plane with angles a and b have the cosine cos(a - b). The mean of log(1 + exp((1 + cosine) / 2)) over
    all pairs is the sum over k of its Chebyshev coefficients times the mean of cos(k (a - b)) = cos(ka) cos(kb) +
    sin(ka) sin(kb), and so a sum of products of means. What pairs of the same group subtract is linear in 1 and in the
    cosine, which are the orders 0 and 1: sums over groups are enough. Exact to rounding, and differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, groups: Tensor) -> Tensor:
        both, count = torch.stack([rows, columns]), len(rows)
        orders = torch.arange(TERMS, device=both.device, dtype=both.dtype)
        angles = torch.atan2(both[..., 1], both[..., 0])[..., None] * orders
        waves = torch.cat([angles.cos(), angles.sin()], 2)  # (2, N, 2 * TERMS)
        means = waves.mean(1)
        weights = both.new_tensor(COEFFICIENTS).repeat(2) * means.flip(0)
        cosines, sines = (weights * orders.repeat(2)).split(TERMS, 1)
        turns = (waves @ torch.cat([sines, -cosines], 1)[..., None]).squeeze(2) / count
        # In the same group: how many, and the sum of the other side's vectors of length 1.
        squares = both.square().sum(2)
        units = both / squares.sqrt()[..., None]
        ranks, table = _ranks(groups), torch.cat([units[1], units[0], units.new_ones(count, 1)], 1)
        sums = torch.zeros_like(table).index_add_(0, ranks, table).index_select(0, ranks).mul_(0.5 / count**2)
        near = torch.stack([sums[:, :2], sums[:, 2:4]])
        turns += units[..., 1] * near[..., 0] - units[..., 0] * near[..., 1]
        turns /= squares
        ctx.save_for_backward(torch.stack([-both[..., 1] * turns, both[..., 0] * turns], 2))
        return (means[0] * weights[0]).sum() - (units[0] * near[0]).sum() - sums[:, 4].sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (*(slopes * gradient), None)


def _ranks(groups: Tensor) -> Tensor:
    """(N,) groups to their ranks among those that occur; unlike `unique` it has not to wait for their number."""
    ordered, order = groups.sort()
    ranks = F.pad(ordered[1:] != ordered[:-1], (1, 0)).cumsum(0)
    return torch.empty_like(ranks).scatter_(0, order, ranks)


def _chebyshev(function: Callable[[float], float], count: int) -> list[float]:
    """The first coefficients of a function on [-1, 1]: it is the sum of them times cos(k arccos x)."""
    nodes = [math.pi * (place + 0.5) / count for place in range(count)]
    values = [function(math.cos(node)) for node in nodes]
    found = [
        2 / count * math.fsum(value * math.cos(order * node) for value, node in zip(values, nodes, strict=True))
        for order in range(count)
    ]
    return [found[0] / 2, *found[1:]]


# Of log(1 + exp((1 + cosine) / 2)): they fall by a factor of 13 each.
COEFFICIENTS = _chebyshev(lambda cosine: math.log1p(math.exp((1 + cosine) / 2)), TERMS)


def _agreement(cosines: Tensor, groups: Tensor, form: str) -> Tensor:
    """Mean binary cross-entropy between (1 + cosines) / 2 (N, N) and whether row and column share their group."""
    similarity = 0.5 + 0.5 * cosines
    same = (groups[:, None] == groups).to(similarity.dtype)
    if form == "logits":
        return F.binary_cross_entropy_with_logits(similarity, same)
    if form == "probabilities":
        return F.binary_cross_entropy(similarity.clamp(NEAREST, 1 - NEAREST), same)
    raise ValueError(f"unknown form of similarities ({form!r}) · use logits or probabilities")


def _lengths(rows: Tensor) -> Tensor:
    """(B, 1) by which rows are divided; infinite for rows of zeros, which end as zeros that way, without gradient."""
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return lengths.clamp_min(SHORTEST).masked_fill(lengths == 0, math.inf)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _exactly(x: Tensor) -> torch.autocast:
    """Matrix products in the dtype of their inputs."""
    return torch.autocast(x.device.type, enabled=False)


def _alike(what: str, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> None:
    """Refuse what are not two matrices of the same B > 0 samples, with a label each."""
    shapes = f"(student {tuple(student.shape)}, teacher {tuple(teacher.shape)})"
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(f"{what} are not matrices of the same shape {shapes} · give both of the same samples")
    if student.numel() == 0:
        raise ValueError(f"{what} are empty {shapes} · leave empty batches out")
    if labels is not None and labels.shape != student.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} do not go with {what} {shapes} · give one label per row")


class Confidence(nn.Module):
    """c = sigmoid(alpha * (s + beta)), both learnable (card 3.6 d)."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, scores: Tensor) -> Tensor:
        """(N,) scores to (N,) in (0, 1)."""
        return torch.sigmoid(self.slope * (scores + self.offset))


class Head(nn.Module):
    """h: the student's own code, from what it says of all n classes (card 3.1)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(classes, 2)

    def forward(self, logits: Tensor) -> Tensor:
        """(N, n) to (N, 2), rows of sum 1."""
        with _exactly(logits):
            codes: Tensor = self.fc(_wide(logits).log_softmax(1))
            return codes.softmax(1)
