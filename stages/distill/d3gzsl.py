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

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from data.errors import UserError
from models.zero_shot import MLP, build
from stages.generators.generator import backbone
from stages.generators.two_stage import refit
from stages.parameters.zero_shot import D3GZSL, Distribution
from stages.teach.zero_shot import ZeroShot
from stages.training import Companion, Context, Method, Run, derive_seed, widen

log = logging.getLogger("distillery")

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


class Known(NamedTuple):
    """What the teacher says of every real training sample, once and for all.

    Attributes:
        embedding: z^t, (N, width), of length 1. logits: v^t, (N, n_s). scores: s, (N,).
    """

    embedding: Tensor
    logits: Tensor
    scores: Tensor


class Draw(NamedTuple):
    """A batch: (B, D) scaled features, (B,) labels, (B,) places in the training split."""

    real: Tensor
    labels: Tensor
    rows: Tensor


class Learner(Method):
    """Generator, critics and student learn together; without `distribution` the student is a two-stage classifier.

    A step is `critic_steps` updates of critics and student, each on a batch of its own, then one of generator and
    student on the last of these batches with new noise (card 3.8). A pass of the generator synthesises seen and unseen
    classes at once, and the teacher sees synthesised samples only: what it says of real ones is known. With several
    processes each compares the samples of its own batch.

    `modules` has, beside what learns: `latest`, the student as it would have been deployed when it was last looked at;
    `kept`, the best of these by harmonic mean on the validation split; `snapshots`, all of them.
    """

    frozen = frozenset({"teacher", "latest", "kept", "snapshots"})

    def __init__(self, task: ZeroShot, parameters: D3GZSL, run: Run) -> None:
        super().__init__()
        self._task, self._parameters = task, parameters
        settings, student = parameters.generator, cast(MLP, task.student)
        torch.manual_seed(derive_seed(task.seed, "generator"))
        self._backbone = backbone(settings.name)(
            settings,
            task.interface["features"],
            task.attributes,
            task.seen,
            student.embedding,
            student.classifier.in_features,
        )
        if self._backbone.shares_embedding and parameters.training.batch < len(task.seen):
            log.warning(
                "batches of %d hold few samples of the same class (there are %d): %s learns by comparing these",
                parameters.training.batch,
                len(task.seen),
                settings.name,
            )
        self.modules = {"student": student, "generator": self._backbone.generator, **self._backbone.critics}
        self.streams = task.streams()
        growth = parameters.training.growth
        self._optimize("generator", self._backbone.generator.parameters(), growth, 1)
        for name, module in self._backbone.critics.items():
            self._optimize(name, module.parameters(), growth, settings.critic_steps)
        self._criticise, self._learn = list(self._backbone.critics), list[str]()
        if parameters.distribution is not None:
            self._distil(student, parameters.distribution)
        elif self._backbone.shares_embedding:
            self._optimize("embedding", student.embedding.parameters(), growth, settings.critic_steps)
            self._criticise.append("embedding")
        self._every = self.look_every = parameters.select_every * task.steps_per_epoch or task.steps
        self._best, self._kept_at, self._looked_at = -1.0, 0, 0
        self.modules["latest"] = copy.deepcopy(student)
        if parameters.select_every:
            self.modules["kept"] = copy.deepcopy(student)
            if parameters.test_best:
                looks = -(-task.steps // self._every)
                network = {"name": "snapshots", "hidden": parameters.network.hidden, "count": looks}
                self._snapshots = network
                self.modules["snapshots"] = build({"network": network, "interface": task.interface}).to(task.attributes)

    def _optimize(self, name: str, parameters: Iterable[Tensor], growth: float, updates: int) -> None:
        """A rate that is multiplied by `growth` every `growth_every` epochs of so many updates per step."""
        training = self._parameters.training
        self._task.optimize(self, name, parameters)
        period = training.growth_every * self._task.steps_per_epoch * updates
        self.schedules[name] = lambda count: training.learning_rate * growth ** (count // period)

    def _distil(self, student: MLP, settings: Distribution) -> None:
        """What D3 adds: teacher, head, confidence, and optimisers for the student's parts."""
        task = self._task
        teacher = cast(MLP, task.taught_by())
        widths = [network.classifier.in_features for network in (teacher, student)]
        if widths[0] != widths[1]:
            raise UserError(
                f"the embeddings of teacher and student are compared, and have widths {widths[0]} and {widths[1]} · "
                "give both the same network.hidden"
            )
        self.modules["teacher"] = teacher
        with torch.no_grad():
            parts = [teacher.embedding(part) for part in task.train.inputs.split(4096)]
            embedding = torch.cat(parts)
            logits = teacher.classifier(embedding)
            self._known = Known(unit(embedding), logits, SCORES[settings.score](logits))
        self._made = task.others.repeat_interleave(settings.per_class)
        self._weights = {
            "classification": settings.classification,
            "embedding": settings.in_distribution,
            "labels": settings.in_distribution,
            "distribution": settings.out_of_distribution,
        }
        updates = self._parameters.generator.critic_steps + 1
        last: list[nn.Module] = [student.classifier]
        if settings.out_of_distribution:
            self.modules["head"] = Head(student.classifier.out_features).to(task.attributes)
            self.modules["confidence"] = Confidence().to(task.attributes)
            last.append(self.modules["head"])
            self._optimize("confidence", self.modules["confidence"].parameters(), settings.scores_growth, updates)
        if self._parameters.network.hidden is not None:
            self._optimize("embedding", student.embedding.parameters(), settings.student_growth, updates)
        weights = [weight for module in last for weight in module.parameters()]
        self._optimize("classifier", weights, settings.student_growth, updates)
        self._learn = [name for name in ("embedding", "classifier", "confidence") if name in self.optimizers]

    @property
    def student(self) -> nn.Module:
        return self.modules["kept" if self._parameters.select_every else "latest"]

    @property
    def watched(self) -> nn.Module:
        return self.modules["latest"]

    @property
    def companions(self) -> Mapping[str, Companion]:
        generator = self._backbone.generator
        found = {"generator": Companion(generator, generator.built_from, evaluated=False)}
        if self._parameters.select_every and self._kept_at != self._looked_at:
            found["last"] = Companion(self.modules["latest"], self._task.network)
        if "snapshots" in self.modules:
            found["snapshots"] = Companion(self.modules["snapshots"], self._snapshots, evaluated=False)
        return found

    def state(self) -> dict[str, Any]:
        return {"best": self._best, "kept_at": self._kept_at, "looked_at": self._looked_at}

    def load_state(self, state: dict[str, Any]) -> None:
        self._best, self._kept_at, self._looked_at = state["best"], state["kept_at"], state["looked_at"]

    def step(self, context: Context) -> Mapping[str, Tensor]:
        backbone, random = self._backbone, context.generator("noise")
        for _ in range(self._parameters.generator.critic_steps):
            draw = Draw(*context.draw("train"))
            with torch.no_grad():
                fake, made = self._synthesise(draw, context)
            mix = torch.rand(len(fake), 1, generator=random, device=fake.device, dtype=draw.real.dtype)
            criticism = backbone.critic_terms(draw.real, draw.labels, fake, mix)
            self._update([*self._criticise, *self._learn], criticism, self._compare(made, draw, context), context)
        fake, made = self._synthesise(draw, context)
        terms, compared = backbone.generator_terms(draw.real, draw.labels, fake), self._compare(made, draw, context)
        self._update(["generator", *self._learn], terms, compared, context)
        done = context.step + 1
        if done % self._every == 0 or done == self._task.steps:
            self._look(done, context)
        return {
            **{f"loss/{name}": term for name, term in compared.items()},
            **{f"loss/critics/{name}": term for name, term in criticism.items()},
            **{f"loss/generator/{name}": term for name, term in terms.items()},
        }

    def _synthesise(self, draw: Draw, context: Context) -> tuple[Tensor, Tensor]:
        """(B, D) features of the classes of a batch, and (M, D) of all classes that have no samples."""
        generator = self._backbone.generator
        labels = torch.cat([draw.labels, self._made]) if self._learn else draw.labels
        random, like = context.generator("noise"), draw.real
        noise = torch.randn(len(labels), generator.noise, generator=random, device=like.device, dtype=like.dtype)
        with context.run.autocast():
            features: Tensor = generator(noise, labels)
        return features[: len(like)], features[len(like) :]

    def _compare(self, made: Tensor, draw: Draw, context: Context) -> dict[str, Tensor]:
        """The terms of L_d3 on one mixed batch, without their weights (card 3.6); those of weight 0 are left out.

        Synthesised samples come first, then the real ones.
        """
        settings = self._parameters.distribution
        if settings is None:
            return {}
        student, count, weights, terms = cast(MLP, self.modules["student"]), len(made), self._weights, {}
        with context.run.autocast():
            embedding = student.embedding(torch.cat([made.to(draw.real.dtype), draw.real]))
            logits = student.classifier(embedding)
        labels = torch.cat([self._made, draw.labels])
        if weights["classification"]:
            terms["classification"] = F.cross_entropy(_wide(logits), labels)
        if weights["embedding"]:
            theirs, ours = self._known.embedding[draw.rows], embedding[count:]
            form = settings.similarity
            terms["embedding"] = embedding_loss(theirs, ours, draw.labels, form=form, unit_teacher=True)
            known, own = self._known.logits[draw.rows], logits[count:][:, self._task.seen]
            terms["labels"] = label_loss(known, own, form=settings.kl)
        if weights["distribution"]:
            teacher = cast(MLP, self.modules["teacher"])
            with context.run.autocast():
                of_made = SCORES[settings.score](teacher.classifier(teacher.embedding(made)))
            scores = torch.cat([of_made, self._known.scores[draw.rows].to(of_made)])
            codes = teacher_codes(self.modules["confidence"](scores), settings.renormalise)
            groups = labels if settings.target == "class" else (torch.arange(len(labels), device=labels.device) < count)
            own = self.modules["head"](logits)
            terms["distribution"] = distribution_loss(own, codes, groups.long(), form=settings.similarity)
        return terms

    def _update(
        self, names: list[str], terms: dict[str, Tensor], compared: dict[str, Tensor], context: Context
    ) -> None:
        weighted = {f"d3/{name}": self._weights[name] * term for name, term in compared.items()}
        context.update(names, {**terms, **weighted})

    def _look(self, done: int, context: Context) -> None:
        """Take the student as it would be deployed now, and keep it if it is the best so far."""
        task, parameters, latest = self._task, self._parameters, cast(MLP, self.modules["latest"])
        latest.load_state_dict(self.modules["student"].state_dict())
        if parameters.classifier.mode == "two_stage":
            settings, betas, random = parameters.classifier, parameters.training.betas, context.generator("classifier")
            refit(latest, task.train, self._backbone.generator, task.others, settings, betas, random)
        self._looked_at = done
        if not parameters.select_every:
            return
        if "snapshots" in self.modules:
            state = {key: value for key, value in latest.state_dict().items() if not key.startswith("encoder.")}
            place = -(-done // self._every) - 1
            cast(nn.ModuleList, self.modules["snapshots"])[place].load_state_dict(state)
        figure = task.monitor(latest)["harmonic_mean"]
        if figure > self._best:
            self._best, self._kept_at = figure, done
            self.modules["kept"].load_state_dict(latest.state_dict())
