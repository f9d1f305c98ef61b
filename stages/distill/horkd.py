"""HORKD: hybrid-order relational distillation, that is points, pairs and triplets of embeddings.

The scheme (orders one, two and three, between a frozen network and the one being trained) is that of Ge et al., AAAI
2020, "Look One and More: Distilling Hybrid Order Relational Knowledge for Cross-Resolution Image Recognition". The
equations of that paper could not be read: pairs and triplets use the relation functions of RKD (Park et al., CVPR 2019,
"Relational Knowledge Distillation"), the point loss is this project's choice, and nothing here claims to reproduce the
HORKD paper.

"Card" is the HORKD method card. Its letters: v = student, u = teacher, L1, L2, L3 = point, pair and triplet loss,
h = Huber penalty with delta 1, d = distances, mu = their mean, psi = d / mu, C = cosines.

Every loss takes student (B, D) and teacher (B, D'), row i of both being the same sample, and returns a scalar. It is
computed and returned in float32, or in float64 if either input is, also under autocast; the gradient has the student's
dtype and none reaches the teacher. Inputs that are no matrices, are empty or differ in B raise ValueError with both
shapes. B = 1 gives order 2 and 3 the value 0, still attached to the graph. NaN and infinity come out, never a zero.

`pair_loss` and `triplet_loss` are the definitions, with an array of B * B * D differences; training takes
`relation_losses`, which is equal and needs memory of B * B.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import unit
from stages import relations
from stages.parameters.recognition import HORKD
from stages.training import Context, Method, Run, Task, derive_seed


def point_loss(student: Tensor, teacher: Tensor, penalty: str = "mse") -> Tensor:
    """Order 1: how far each embedding is from its counterpart (card 3.2, L1).

    Shapes: both (B, D); a student of another width is to be projected first. Reduction: mean over all B * D elements.
    Penalty: "mse" squares the difference, "huber" takes h of it, "mse_unit" squares the difference of the embeddings
    scaled to unit length (a zero embedding stays zero and gets no gradient).
    Raises: ValueError for unequal shapes or an unknown penalty.
    """
    student, teacher = _widen(student, teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"point loss needs equal widths (student {tuple(student.shape)}, teacher {tuple(teacher.shape)}) · "
            "project the student to the teacher's width with a bias-free linear layer"
        )
    if penalty == "mse":
        return F.mse_loss(student, teacher)
    if penalty == "huber":
        return F.smooth_l1_loss(student, teacher)
    if penalty == "mse_unit":
        return F.mse_loss(unit(student), unit(teacher))
    raise ValueError(f"unknown penalty of the point loss ({penalty!r}) · use mse, huber or mse_unit")


def pair_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Order 2: distances relative to the batch's mean distance (card 3.3, L2; RKD's distance-wise loss).

    Shapes: (B, D) and (B, D'), widths may differ. Reduction: mean of h(psi_student - psi_teacher) over all B * B
    ordered pairs, the diagonal of zeros included. O(B * B) memory.
    """
    student, teacher = _widen(student, teacher)
    return F.smooth_l1_loss(normalised_distances(student), normalised_distances(teacher))


def triplet_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Order 3: cosines of the angles that two samples span at a third (card 3.4, L3; RKD's angle-wise loss).

    Shapes: (B, D) and (B, D'), widths may differ. Reduction: mean of h(C_student - C_teacher) over all B * B * B
    ordered triplets, those with repeated samples included. Dense: O(B * B * (B + D)) memory.
    """
    student, teacher = _widen(student, teacher)
    return F.smooth_l1_loss(triplet_cosines(student), triplet_cosines(teacher))


def relation_losses(
    student: Tensor,
    teacher: Tensor,
    *,
    pairs: bool = True,
    triplets: bool = True,
    form: str = "blocks",
    vertices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Order 2 and order 3 at once, by closed forms of value and gradient (card 8; stages/relations).

    Shapes and reductions: those of `pair_loss` and `triplet_loss`. Differentiable once.

    Args:
        pairs, triplets: what is not asked for is 0, and not computed.
        form: compiled, blocks or fused (`stages.relations`).
        vertices: (K,) int64, at which samples angles are compared, each with all B * B pairs; None: at all of them.
            The mean over K evenly drawn ones is that over all on average.
    """
    student, teacher = _widen(student, teacher)
    return relations.losses(student, teacher, pairs=pairs, triplets=triplets, form=form, vertices=vertices)


def pairwise_distances(points: Tensor) -> Tensor:
    """Euclidean distances d (B, B) of points (B, D); coincident points have distance 0 and exchange no gradient.

    Differentiable once. Differences are taken before squaring, since the matrix-product route cancels digits as soon as
    the points lie far from the origin.
    """
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def normalised_distances(points: Tensor) -> Tensor:
    """psi (B, B): distances of points (B, D) divided by mu, the mean over the B * (B - 1) ordered pairs of two samples.

    The gradient flows through mu, which makes psi blind to scale. All points equal: psi = 0, without gradient.
    """
    distances = pairwise_distances(points)
    mean = distances.sum() / max(len(points) * (len(points) - 1), 1)
    return distances / torch.where(mean == 0, 1, mean)


def triplet_cosines(points: Tensor) -> Tensor:
    """C (B, B, B) of points (B, D): C[a, b, c] is the cosine at vertex a between the directions to b and to c.

    0 without gradient where a coincides with b or c. From explicit differences, hence exact also for points that nearly
    coincide or lie far from the origin, where Gram entries cancel.
    """
    directions = unit(points[None, :, :] - points[:, None, :])
    with torch.autocast(points.device.type, enabled=False):
        return directions @ directions.transpose(1, 2)


def _widen(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Refuse what are not two matrices of the same B > 0 samples; cast to float32 or wider, detach the teacher."""
    shapes = f"(student {tuple(student.shape)}, teacher {tuple(teacher.shape)})"
    if student.dim() != 2 or teacher.dim() != 2:
        raise ValueError(f"embeddings must be matrices {shapes} · pool or flatten them to (batch, width)")
    if len(student) != len(teacher):
        raise ValueError(f"batch sizes differ {shapes} · embed the same samples in the same order with both networks")
    if student.numel() == 0 or teacher.numel() == 0:
        raise ValueError(f"embeddings are empty {shapes} · leave empty batches out")
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def gradient_norms(terms: Mapping[str, Tensor], embedding: Tensor) -> dict[str, Tensor]:
    """Norm of every term's gradient with respect to the embeddings (B, D), float32 or wider (card 5: weights by norms).

    Networks are not touched, and the terms can still be differentiated.
    """
    found = {}
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad(term, embedding, retain_graph=True)
        found[name] = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).norm()
    return found


class Learner(Method):
    """The task's own objective + weighted losses of order 1, 2 and 3 towards a frozen source (card 3.6).

    Step one of the scheme (cross-structure) and step two (cross-resolution) are two students that differ in their
    source and in their resolution; `direct` is a student whose source is the teacher itself. With several processes
    the embeddings of the whole global batch are related to each other.

    Beside each loss, `gradient/NAME_to_task` says how long the gradient of the weighted term is at the embeddings, as a
    multiple of the task's (without a task, of the first term's), and `weight/NAME` which weight a share came to. Both
    are 0 where what they are divided by is.
    """

    frozen = frozenset({"source"})

    def __init__(self, task: Task, parameters: HORKD, run: Run) -> None:
        super().__init__()
        self._task, self._parameters = task, parameters
        source, student = task.taught_by(), task.student
        self.modules = {"student": student, "source": source}
        trained = list(student.parameters())
        ours, theirs = (task.features(network)[parameters.tap] for network in (student, source))
        if ours != theirs and parameters.wanted("points"):
            projection = nn.Linear(ours, theirs, bias=False, device=run.device, dtype=run.dtype)
            self.chosen["projection"] = f"{ours} to {theirs}"
            self.modules["projection"] = projection
            trained += projection.parameters()
        self.streams = task.streams()
        task.optimize(self, "student", trained)
        self._form = "blocks"
        if parameters.wanted("triplets"):
            self._form = self.chosen["relations"] = relations.choose(run.device)

    def step(self, context: Context) -> Mapping[str, Tensor]:
        wanted, tap = self._parameters.wanted, self._parameters.tap
        views = self._task.views(context)
        with torch.no_grad(), context.run.autocast():
            source = getattr(self.modules["source"](views.teacher), tap)
        with context.run.autocast():
            output = self.modules["student"](views.student)
            embedding = getattr(output, tap)
            projection = self.modules.get("projection")
            projected = projection(embedding) if projection else embedding
        terms = {}
        if wanted("task"):
            terms["task"] = self._task.objective(output, views.target)
        if wanted("points"):
            terms["points"] = point_loss(projected, source, self._parameters.point_penalty)
        if wanted("pairs") or wanted("triplets"):
            every, theirs = context.run.gather(embedding), context.run.gather(source)
            found = relation_losses(
                every,
                theirs,
                pairs=wanted("pairs"),
                triplets=wanted("triplets"),
                form=self._form,
                vertices=self._vertices(len(theirs), context),
            )
            named = zip(("pairs", "triplets"), found, strict=True)
            terms |= {name: term for name, term in named if wanted(name)}
        weights, figures = self._weigh(terms, embedding, context)
        context.update("student", {name: weights[name] * term for name, term in terms.items()})
        return {**{f"loss/{name}": term for name, term in terms.items()}, **figures}

    def _weigh(
        self, terms: Mapping[str, Tensor], embedding: Tensor, context: Context
    ) -> tuple[dict[str, Tensor | float], dict[str, Tensor]]:
        """The weight of every term, and figures about their gradients."""
        if len(terms) < 2:
            return {name: getattr(self._parameters.weights, name) for name in terms}, {}
        squares = {name: norm.square() for name, norm in gradient_norms(terms, embedding).items()}
        context.run.mean_(list(squares.values()))
        norms = {name: square.sqrt() for name, square in squares.items()}
        first, *others = terms
        weights: dict[str, Tensor | float] = {first: getattr(self._parameters.weights, first)}
        reference, figures = weights[first] * norms[first], {}
        for name in others:
            share = getattr(self._parameters.shares, name)
            if share is None:
                weights[name] = getattr(self._parameters.weights, name)
            else:
                weights[name] = figures[f"weight/{name}"] = _ratio(share * reference, norms[name])
            figures[f"gradient/{name}_to_{first}"] = _ratio(weights[name] * norms[name], reference)
        return weights, figures

    def _vertices(self, count: int, context: Context) -> Tensor | None:
        """Some samples of the global batch, the same in every process; None where all are to be taken."""
        wanted = self._parameters.vertices
        if wanted is None or wanted >= count:
            return None
        generator = torch.Generator().manual_seed(derive_seed(self._task.seed, "vertices", context.step))
        return torch.randperm(count, generator=generator)[:wanted].to(context.run.device)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """0 where what is below is 0."""
    zero = below == 0
    return torch.where(zero, 0, above / torch.where(zero, 1, below))
