"""LGTM: a teacher that learns beside its student, and whose soft labels are fitted to the student's level.

Source: Ren et al., ACL 2023, "Tailoring Instructions to Student's Learning Levels Boosts Knowledge Distillation", as
its official code has it. "Card" is the LGTM method card. Its letters: z_S, z_T = logits of student and teacher on the
training batch, p_S, p_T = their softmax at temperature tau, a, a_t = `alpha`, `teacher_alpha`, th_s = the student's
weights, v = the gradient of the held-out loss at the virtual student, r = `influence_radius`, eps = r / |v|,
u = the derivative of z_S along v, I = influence, lambda = what multiplies the influence term.

The influence of a sample is the dot product of v and the gradient of the sample's distillation loss: where it is
positive, a step on the sample lowers the held-out loss. The teacher descends on its own loss minus lambda times the
influence of the batch.

Every function of logits takes (B, classes) arrays of the same B samples, computes and returns float32, or float64 if an
input is, also under autocast. Unequal shapes or other dimensions, empty batches, and temperatures that are not
positive and finite raise ValueError.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.errors import UserError
from stages.training import Companion, Context, Method, Run, Task, Views, evaluating, peek, widen

if TYPE_CHECKING:
    import pandas as pd

Loss = Literal["teacher_kl", "student_kl"]


class Relative(Protocol):
    """`influence_scale` in proportion to the teacher's own gradient."""

    @property
    def ratio(self) -> float: ...
    @property
    def every(self) -> int: ...


class Parameters(Protocol):
    """What is read of `students.KEY`; stages.parameters.text.LGTM says what each means."""

    @property
    def temperature(self) -> float: ...
    @property
    def alpha(self) -> float: ...
    @property
    def teacher_alpha(self) -> float: ...
    @property
    def teacher_learning_rate(self) -> float | None: ...
    @property
    def influence_scale(self) -> Literal["teacher_lr", "student_lr"] | float | Relative: ...
    @property
    def influence_loss(self) -> Loss: ...
    @property
    def influence_form(self) -> Literal["difference", "exact"]: ...
    @property
    def influence_radius(self) -> float: ...
    @property
    def dropout(self) -> Literal["official", "shared"]: ...
    @property
    def zero_heads(self) -> bool: ...


def soft_label_loss(learner: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p_target || p_learner): the soft labels of L_s and, with the student as target, of L_aux (card 3.1).

    Reduction: sum over classes, mean over the batch; a scalar. No factor temperature^2, unlike `kd`. The gradient,
    (p_learner - p_target) / (temperature * B), reaches the learner alone.
    """
    learner, target = _compare(learner, target, temperature)
    log_learner, log_target = (F.log_softmax(x / temperature, dim=1) for x in (learner, target))
    return F.kl_div(log_learner, log_target, reduction="batchmean", log_target=True)


class Motion(NamedTuple):
    """How the student's answers to a batch change while its weights move along v; derivatives over eps, at 0.

    Attributes:
        probabilities, logarithms: (B, classes) of p_S and log p_S. negentropy: (B,) of the sum over p_S log p_S.
    """

    probabilities: Tensor
    logarithms: Tensor
    negentropy: Tensor


def difference(plus: Tensor, minus: Tensor, epsilon: float, temperature: float = 1.0) -> Motion:
    """By central difference, of the student's logits at th_s + epsilon v and th_s - epsilon v (card 3.3).

    Exact but for O(epsilon^2). In float32 the difference of two close answers loses digits: a too small radius shows.
    """
    plus, minus = _compare(plus, minus, temperature)
    logs = [F.log_softmax(x / temperature, dim=1) for x in (plus, minus)]
    ends = [(log.exp(), log, (log.exp() * log).sum(1)) for log in logs]
    return Motion(*((after - before) / (2 * epsilon) for after, before in zip(*ends, strict=True)))


def derivative(student: Tensor, tangent: Tensor, temperature: float = 1.0) -> Motion:
    """In closed form, of the student's logits and of u, both (B, classes) (card 3.3; `dp` there is `probabilities`)."""
    student, tangent = _compare(student, tangent, temperature)
    log = F.log_softmax(student / temperature, dim=1)
    logarithms = (tangent - (log.exp() * tangent).sum(1, keepdim=True)) / temperature
    probabilities = log.exp() * logarithms
    return Motion(probabilities, logarithms, (probabilities * log).sum(1))


def influence(motion: Motion, teacher: Tensor, loss: Loss = "student_kl", temperature: float = 1.0) -> Tensor:
    """I, (B,): how every sample's distillation loss changes along v (card 3.2). Neither a nor a_t is in it.

    `student_kl` is the student's loss KL(p_T || p_S), with I = sum((p_S - p_T) * u) / temperature in the closed form;
    `teacher_kl` the teacher's KL(p_S || p_T). A motion by difference gives the central difference of that loss.
    """
    teacher, logarithms = _compare(teacher, motion.logarithms, temperature)
    log_teacher = F.log_softmax(teacher.detach() / temperature, dim=1)
    if loss == "student_kl":
        return -(log_teacher.exp() * logarithms).sum(1)
    return motion.negentropy - (motion.probabilities * log_teacher).sum(1)


def influence_cotangent(
    motion: Motion, teacher: Tensor, weight: float, loss: Loss = "teacher_kl", temperature: float = 1.0
) -> Tensor:
    """The gradient over z_T of weight * mean(I), (B, classes): one product with the teacher's Jacobian makes it g_inf.

    Since the gradient of a KL over its logits is linear in the target, this equals, at any epsilon, what the official
    code gets from two more backward passes of the teacher (card 3.3; 3.2 for the mixed second derivatives). Rows sum
    to 0. `weight` is a_t for `teacher_kl` (official code), a for `student_kl` (the true bilevel direction).
    """
    teacher, logarithms = _compare(teacher, motion.logarithms, temperature)
    if loss == "teacher_kl":
        slope = motion.probabilities
    else:
        p = F.softmax(teacher.detach() / temperature, dim=1)
        slope = p * (logarithms - (p * logarithms).sum(1, keepdim=True))
    return slope * (-weight / (temperature * len(slope)))


def _compare(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Refuse what is not alike; cast to float32 or wider, and take the second from its graph."""
    shapes = f"({tuple(first.shape)} and {tuple(second.shape)})"
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite ({temperature}) · 1 is usual")
    if first.shape != second.shape:
        raise ValueError(f"logits differ in shape {shapes} · give both networks the same input and the same classes")
    if first.dim() != 2 or first.numel() == 0:
        raise ValueError(f"logits must be non-empty (B, classes) arrays {shapes} · leave empty batches out")
    return widen(first, second)


class Ledger:
    """Sum and number of what was found out about every sample, per epoch. Grows with the rows it meets.

    Attributes:
        sums: (rows, epochs) float64. visits: alike, int64.
    """

    def __init__(self, epochs: int) -> None:
        self.sums = torch.zeros(0, epochs, dtype=torch.float64)
        self.visits = torch.zeros(0, epochs, dtype=torch.int64)

    def add(self, rows: Tensor, epoch: int, values: Tensor) -> None:
        """One value for each of some rows, both (B,); a row may be there twice."""
        rows, values = rows.cpu(), values.detach().to("cpu", torch.float64)
        if (missing := int(rows.max()) + 1 - len(self.sums)) > 0:
            self.sums, self.visits = (F.pad(x, (0, 0, 0, missing)) for x in (self.sums, self.visits))
        self.sums[:, epoch].index_add_(0, rows, values)
        self.visits[:, epoch].index_add_(0, rows, torch.ones_like(rows))

    def table(self) -> "pd.DataFrame":
        """row, visits, mean and epoch_1, ..., one line per row that was met; six significant digits, NaN for never."""
        import pandas as pd

        rows = self.visits.sum(1).nonzero().squeeze(1)
        sums, visits = self.sums[rows], self.visits[rows]
        means = {"mean": sums.sum(1) / visits.sum(1)}
        means |= {f"epoch_{epoch + 1}": sums[:, epoch] / visits[:, epoch] for epoch in range(sums.shape[1])}
        rounded = {name: [float(f"{value:.6g}") for value in column.tolist()] for name, column in means.items()}
        return pd.DataFrame({"row": rows.numpy(), "visits": visits.sum(1).numpy(), **rounded})


def changes_in_training(network: nn.Module) -> bool:
    """Whether train mode may give another answer than eval mode: an active dropout, or statistics of batches.

    Known by their attributes, a positive float `p` or one whose name holds "drop", and rather found too often.
    """
    return any(
        getattr(part, "track_running_stats", False)
        or any(isinstance(x, float) and x > 0 and (name == "p" or "drop" in name) for name, x in vars(part).items())
        for part in network.modules()
    )


class Learner(Method):
    """Teacher and student learn together, in the order of the card, 3.4.

    One backward pass of the teacher serves both terms of its gradient where train mode and eval mode are the same for
    both networks, and with `dropout: shared`; then one pass of each network over the training batch serves everything
    before the teacher's update, and the student's also its own update. With dropout as in the official code the teacher
    runs once more for the influence, forward and backward, and the student once more for its update. Where a relative
    scale is measured, both terms have a backward pass of their own.

    Every pass with random numbers has its own seed: the same masks are drawn whether there is an influence or not. The
    perturbed students run in float32 also with mixed precision, whose rounding is larger than the perturbation. They
    and the virtual student have copies of the buffers: only the student itself collects statistics. The exact form
    needs plain attention, whose masks on an accelerator may be others than those of the fused kernels.

    With `influence_scale: 0` nothing is held out and nothing computed but online distillation, to the same bits as with
    an influence times 0.
    """

    def __init__(self, task: Task, parameters: Parameters, run: Run) -> None:
        super().__init__()
        self._task, self._parameters = task, parameters
        self.modules = {"student": task.student, "teacher": task.taught_by()}
        self.streams = task.streams()
        if parameters.zero_heads:
            for name, network in self.modules.items():
                _zero_head(name, network)
        # Of networks on which a task may freeze a part.
        trained = {
            name: {key: weight for key, weight in network.named_parameters() if weight.requires_grad}
            for name, network in self.modules.items()
        }
        task.optimize(self, "student", trained["student"].values())
        task.optimize(self, "teacher", trained["teacher"].values(), parameters.teacher_learning_rate)
        self._names = list(trained["student"])
        self._weights = {name: list(weights.values()) for name, weights in trained.items()}
        self._steady = not any(changes_in_training(network) for network in self.modules.values())
        self._reuse = self._steady or parameters.dropout == "shared"
        self._factor = 0.0
        self._ledger = Ledger(math.ceil(task.steps / task.steps_per_epoch))

    @property
    def companions(self) -> Mapping[str, Companion]:
        return {"teacher": Companion(self.modules["teacher"])}

    def tables(self) -> Mapping[str, "pd.DataFrame"]:
        """`influence`: of every sample that was trained on, the mean of all its visits and of each epoch's."""
        return {"influence": self._ledger.table()} if len(self._ledger.sums) else {}

    def state(self) -> dict[str, Any]:
        return {"factor": self._factor, "sums": self._ledger.sums, "visits": self._ledger.visits}

    def load_state(self, state: dict[str, Any]) -> None:
        self._factor = state["factor"]
        self._ledger.sums, self._ledger.visits = state["sums"].cpu(), state["visits"].cpu()

    def step(self, context: Context) -> Mapping[str, Tensor]:
        task, parameters = self._task, self._parameters
        online = parameters.influence_scale == 0
        views = task.views(context)
        held_out = None if online else task.held_out(context)
        self._draw_seeds()
        taught = self._forward("teacher", views.teacher, context)
        with torch.set_grad_enabled(self._reuse or not online):
            found = self._forward("student", views.student, context)
            own = task.objective(found, views.target)
        logits, student = task.logits(taught), task.logits(found)
        auxiliary = parameters.teacher_alpha * soft_label_loss(logits, student, parameters.temperature)
        auxiliary = auxiliary + (1 - parameters.teacher_alpha) * task.objective(taught, views.target)
        scalars = {"loss/teacher": auxiliary}
        if held_out is None:
            context.update("teacher", [auxiliary])
        else:
            soft = soft_label_loss(student, logits, parameters.temperature)
            loss = parameters.alpha * soft + (1 - parameters.alpha) * own
            direction, scalars["loss/held_out"] = self._direction(loss, held_out, context)
            scalars |= self._teach(auxiliary, logits, direction, views, context)
            del soft, loss, direction
        # What the graphs keep is not needed any more; the student's is, where its update comes from it.
        del taught, auxiliary, logits
        with torch.no_grad(), evaluating(self.modules["teacher"]):
            instruction = task.logits(self._forward("teacher", views.teacher, context))
        if not self._reuse:
            del found, own, student
            found = self._forward("student", views.student, context, "student again")
            own, student = task.objective(found, views.target), task.logits(found)
        soft = soft_label_loss(student, instruction, parameters.temperature)
        terms = {"soft": parameters.alpha * soft, "task": (1 - parameters.alpha) * own}
        context.update("student", terms)
        total = terms["soft"] + terms["task"]
        return {**scalars, "loss/soft": soft, "loss/task": own, "loss/student": total}

    def _direction(self, loss: Tensor, held_out: Views, context: Context) -> tuple[list[Tensor | None], Tensor]:
        """v, and the held-out loss: at the student that a step on this loss would make (card 3.4, steps 3 and 5)."""
        gradients = context.gradient(loss, self._weights["student"], retain=self._reuse)
        if "student" in self.clip:
            _clip(gradients, self.clip["student"])
        rate = self.schedules["student"](context.counts["student"])
        virtual = peek(self.optimizers["student"], self._weights["student"], gradients, rate)
        del gradients
        leaves = [weight.detach().requires_grad_() for weight in virtual]
        self._reseed("held out")
        with context.run.autocast():
            output = self._call(leaves, held_out.student)
        value = self._task.objective(output, held_out.target)
        # With its graph it would keep the virtual student.
        return context.gradient(value, leaves), value.detach()

    def _teach(
        self,
        auxiliary: Tensor,
        logits: Tensor,
        direction: list[Tensor | None],
        views: Views,
        context: Context,
    ) -> dict[str, Tensor]:
        """The teacher's update, with influence (card 3.4, steps 6 and 7).

        `influence/logit_ratio` is the norm of the influence term over that of the teacher's own, both as gradients over
        its logits; over its weights the two take another backward pass, which `influence_scale.ratio` is measured by.

        Args:
            auxiliary: the teacher's own loss, of these logits.
        """
        parameters, tau = self._parameters, self._parameters.temperature
        (slope,) = torch.autograd.grad(auxiliary, logits, retain_graph=True)
        norm = float(nn.utils.get_total_norm([v for v in direction if v is not None]))
        # A norm that is not finite is recorded as it is, which stops the training by that name.
        epsilon = parameters.influence_radius / norm if 0 < norm < math.inf else 0.0
        with contextlib.nullcontext() if self._reuse else evaluating(*self.modules.values()):
            motion = self._motion(direction, epsilon, logits, views.student)
            if not self._reuse:
                logits = self._task.logits(self._forward("teacher", views.teacher, context))
        weight = parameters.teacher_alpha if parameters.influence_loss == "teacher_kl" else parameters.alpha
        cotangent = influence_cotangent(motion, logits, weight, parameters.influence_loss, tau)
        found = context.run.gather(influence(motion, logits, temperature=tau))
        if views.rows is not None:
            epoch = context.step // self._task.steps_per_epoch
            self._ledger.add(context.run.gather(views.rows), epoch, found)
        scale = self._apply(auxiliary, logits, cotangent, context)
        own = slope.to(cotangent.dtype).norm()
        return {
            "influence/mean": found.mean(),
            "influence/lowest": found.min(),
            "influence/highest": found.max(),
            "influence/negative": (found < 0).to(found.dtype).mean(),
            "influence/norm": found.new_tensor(norm),
            "influence/epsilon": found.new_tensor(epsilon),
            "influence/scale": found.new_tensor(scale),
            "influence/logit_ratio": torch.where(own > 0, scale * cotangent.norm() / own, 0),
        }

    def _motion(self, direction: Sequence[Tensor | None], epsilon: float, logits: Tensor, view: Any) -> Motion:
        """Of the student's answers to the training batch, along v; logits of their shape. None where v is 0."""
        tau, weights = self._parameters.temperature, self._weights["student"]

        def answers(*weights: Tensor) -> Tensor:
            self._reseed("student")
            return self._task.logits(self._call(weights, view))

        if not epsilon:
            still = torch.zeros_like(logits)
            return Motion(still, still, still[:, 0])
        with torch.no_grad():
            if self._parameters.influence_form == "difference":
                plus, minus = (
                    answers(
                        *(
                            w if v is None else torch.add(w, v, alpha=shift)
                            for w, v in zip(weights, direction, strict=True)
                        )
                    )
                    for shift in (epsilon, -epsilon)
                )
                return difference(plus, minus, epsilon, tau)
            tangents = tuple(torch.zeros_like(w) if v is None else v for w, v in zip(weights, direction, strict=True))
            # Fused kernels of attention have no forward derivative.
            with sdpa_kernel(SDPBackend.MATH):
                student, tangent = jvp(answers, tuple(weight.detach() for weight in weights), tangents)[:2]
            return derivative(student, tangent, tau)

    def _apply(self, auxiliary: Tensor, logits: Tensor, cotangent: Tensor, context: Context) -> float:
        """Step on the teacher's own loss minus lambda * influence; returns lambda."""
        cotangent = cotangent.to(logits.dtype)
        scale = self._parameters.influence_scale
        if isinstance(scale, str):
            name = scale.removesuffix("_lr")
            factor = self.schedules[name](context.counts[name])
        elif isinstance(scale, int | float):
            factor = float(scale)
        elif context.step % scale.every:
            factor = self._factor
        else:
            weights = self._weights["teacher"]
            own = context.gradient(auxiliary, weights, retain=True)
            other = context.gradient(logits, weights, [cotangent])
            norms = [float(nn.utils.get_total_norm([g for g in part if g is not None])) for part in (own, other)]
            if norms[1]:
                self._factor = scale.ratio * norms[0] / norms[1]
            used = [(w, g) for w, g in zip(weights, own, strict=True) if g is not None]
            total = [
                g if h is None else torch.add(g, h, alpha=-self._factor)
                for g, h in zip(own, other, strict=True)
                if g is not None
            ]
            # The gradient of a weight over itself is 1: this hands over what is known already.
            context.update("teacher", [w for w, _ in used], total)
            return self._factor
        context.update("teacher", [auxiliary, logits], [torch.ones_like(auxiliary), -factor * cotangent])
        return factor

    def _forward(self, name: str, view: Any, context: Context, seed: str | None = None) -> Any:
        self._reseed(seed or name)
        with context.run.autocast():
            return self.modules[name](view)

    def _call(self, weights: Sequence[Tensor], view: Any) -> Any:
        """The student with these weights."""
        student = self.modules["student"]
        buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
        return functional_call(student, {**dict(zip(self._names, weights, strict=True)), **buffers}, (view,))

    def _draw_seeds(self) -> None:
        passes = () if self._steady else ("teacher", "student", "held out", "student again")
        seeds = torch.empty(len(passes), dtype=torch.int64).random_()
        self._seeds = dict(zip(passes, seeds.tolist(), strict=True))

    def _reseed(self, name: str) -> None:
        if self._seeds:
            torch.manual_seed(self._seeds[name])


def _clip(gradients: Sequence[Tensor | None], limit: float) -> None:
    """In place, as the update does it."""
    used = [gradient for gradient in gradients if gradient is not None]
    factor = torch.clamp(limit / (nn.utils.get_total_norm(used) + 1e-6), max=1.0)
    torch._foreach_mul_(used, factor)


def _zero_head(name: str, network: nn.Module) -> None:
    zero = getattr(network, "zero_head", None)
    if zero is None:
        raise UserError(
            f"zero_heads = true, but the {name} ({type(network).__name__}) has no classifier that could be set to zero "
            "· set zero_heads: false"
        )
    zero()
