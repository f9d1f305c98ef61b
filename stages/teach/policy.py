"""Policies as a training task: windows of demonstrations, and two ways to learn from them, by likelihood or denoising.

A student is a mixture of experts and learns by likelihood, unless a method says otherwise. A teacher learns to take
noise away from actions, and the moving average of its weights is what is kept.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from data import policy as data
from data.errors import UserError
from models import policy as models
from models.artifacts import Description
from stages.parameters.policy import Alone, Alternating, AnyStudent, Network, Teacher, Training
from stages.training import Context, Method, Run, Stream, Task, Views, derive_seed
from stages.training.existing import require_same_question

Taught = tuple[nn.Module, Description]
PART = 500  # windows that are looked at together on the validation split


class Windows(NamedTuple):
    """All windows of the episodes of one split.

    Attributes:
        observations: (N, O) raw, all steps one after the other. actions: (N, A) scaled.
        rows: (W, G + T) int64: of every window the goals, the last observations of its episode, then its steps.
        first: (W,) bool: whether it is the first of its episode.
    """

    observations: Tensor
    actions: Tensor
    rows: Tensor
    first: Tensor


class Policy(Task):
    """Windows of demonstrations. Teacher and student see the same raw observations and the same scaled actions.

    Args:
        prepared: the prepared data set. network: what is trained.
        teacher: a trained network and its description, or None; actions are scaled as it scales them.
        by_turns: whether gate and experts learn by turns, from windows of their own.
        ema: of a diffusion policy, how much of the moving average of its weights stays at an update; else None.

    Raises:
        UserError: teacher and data set differ in the width of observations or actions, an episode is shorter than a
            window, or there are too few windows for a batch.
    """

    def __init__(
        self,
        prepared: Path,
        network: Network,
        training: Training,
        run: Run,
        teacher: Taught | None = None,
        by_turns: bool = False,
        ema: float | None = None,
    ) -> None:
        description = data.describe(prepared)
        environment = description["environment"]
        self.network = network.model_dump(mode="json")
        self.interface = {
            "observations": description["observations"],
            "actions": description["actions"],
            "scaling": description["scaling"],
            "environment": None if environment is None else environment["name"],
        }
        self.teacher = None
        if teacher is not None:
            require_same_question(teacher[1], description, prepared, ("observations", "actions"))
            # Scores are gradients in scaled actions: another scale would be another space.
            self.interface["scaling"] = teacher[1].interface["scaling"]
            self.teacher = teacher[0].to(run.device, run.dtype)
        self.source = description["source"]
        self.seed, self.clip = training.seed, training.clip
        self._training = training
        self._run = run
        self._goals, self._ema = network.goals, ema
        torch.manual_seed(derive_seed(training.seed, "weights"))
        self.student: models.Diffusion | models.Mixture = cast(
            Any, models.build({"network": self.network, "interface": self.interface}).to(run.device, run.dtype)
        )
        self._train, self._validation = (self._load(prepared, part, network.window) for part in ("train", "validation"))
        self._streams = ("train", "gate") if by_turns else ("train",)
        try:
            self.streams()["train"].batches(run.world)
        except ValueError as error:
            raise UserError(f"{error} ({prepared}, windows of the training split) · lower training.batch") from None
        self.steps = training.iterations
        self.steps_per_epoch = min(training.look_every, training.iterations)

    def _load(self, prepared: Path, part: str, window: int) -> Windows:
        episodes = data.load(prepared, part)
        rows = data.windows(episodes, window)
        episode = torch.searchsorted(episodes.starts, rows[:, 0].contiguous(), right=True) - 1
        begins, ends = episodes.starts[episode], (episodes.starts + episodes.lengths)[episode]
        goals = ends[:, None] - self._goals + torch.arange(self._goals)
        if bool((goals < begins[:, None]).any()):
            shortest = int(episodes.lengths.min())
            raise UserError(
                f"network.goals = {self._goals}, but the shortest episode of {prepared.name!r} has {shortest} steps · "
                "ask for fewer goals"
            )
        device, dtype = self._run.device, self._run.dtype
        observations, actions = (x.to(device, dtype) for x in (episodes.observations, episodes.actions))
        found = Windows(
            observations, self.student.scaling.actions(actions), torch.cat([goals, rows], 1), rows[:, 0] == begins
        )
        return found._replace(rows=found.rows.to(device), first=found.first.to(device))

    def streams(self) -> dict[str, Stream]:
        """ "train", and "gate" where gate and experts learn by turns: the same windows, drawn on their own."""
        return {name: Stream([self._train.rows], self._training.batch) for name in self._streams}

    def views(self, context: Context, stream: str = "train") -> Views:
        """Raw observations (B, G + T, O) for both networks, scaled actions (B, T, A) as target."""
        return self._view(self._train, context.draw(stream)[0])

    def _view(self, windows: Windows, rows: Tensor) -> Views:
        observations = windows.observations[rows]
        return Views(observations, observations, windows.actions[rows[:, self._goals :]])

    def objective(self, output: models.Output, target: Tensor) -> Tensor:
        """-log q(a | s) of scaled actions in nats, the mean over B and T (a student's)."""
        return -models.log_likelihood(output, target).mean()

    def logits(self, output: models.Output) -> Tensor:
        raise UserError("this method compares class scores, which a policy does not have")

    def features(self, network: nn.Module) -> Mapping[str, int]:
        return {}

    def optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        rate, decay = self._training.learning_rate, self._training.weight_decay
        if decay:
            return AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
        return Adam(parameters, lr=rate, fused=True)

    def schedule(self, steps: int, learning_rate: float | None = None) -> Callable[[int], float]:
        """From the highest rate linearly to 0 after `steps` updates, and 0 from then on; or the highest throughout."""
        peak = learning_rate or self._training.learning_rate
        if self._training.decay == "none":
            return lambda count: peak
        return lambda count: peak * max(0, steps - count) / steps

    def pretraining(self) -> Method | None:
        return None if self._ema is None else Denoising(self, self._ema)

    def monitor(self, network: nn.Module) -> Mapping[str, float]:
        """Of a student the negative log-likelihood of demonstrated actions, in nats per action and in raw units: every
        step of the validation split once, seen with all of the window there is. Of a teacher its own loss on windows of
        that split, with the same noise every time.
        """
        windows = self._validation
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "monitor"))
        total, count = 0.0, 0
        with torch.inference_mode():
            for rows, first in zip(windows.rows.split(PART), windows.first.split(PART), strict=True):
                observations, _, actions = self._view(windows, rows)[:3]
                if isinstance(network, models.Diffusion):
                    noise = torch.randn(actions.shape, generator=generator).to(actions)
                    level = network.level_at(torch.rand(len(rows), generator=generator).to(actions))
                    total += len(rows) * network.loss(actions, observations, noise, level).item()
                    count += len(rows)
                else:
                    mixture = cast(models.Mixture, network)
                    density = mixture.log_density(observations, mixture.scaling.raw(actions))
                    once = torch.cat([density[:, -1], density[first, :-1].flatten()])
                    total, count = total - once.double().sum().item(), count + len(once)
        name = "denoising_loss" if isinstance(network, models.Diffusion) else "negative_log_likelihood"
        return {name: total / count}


class Denoising(Method):
    """How a diffusion policy learns: noise of a random level is put on actions, and the network finds it.

    The moving average of its weights is kept; it moves faster in the first updates, (1 + n) / (10 + n) of it staying
    after n (VDD card 5; the averaging of D3IL and BESO).

    Args:
        ema: share of the average that stays at an update, later on.
    """

    frozen = frozenset({"average"})

    def __init__(self, task: Policy, ema: float) -> None:
        super().__init__()
        self._task, self._ema = task, ema
        self.modules = {"student": task.student, "average": copy.deepcopy(task.student)}
        self.streams = task.streams()
        task.optimize(self, "student", task.student.parameters())

    @property
    def student(self) -> nn.Module:
        return self.modules["average"]

    @property
    def watched(self) -> nn.Module:
        return self.modules["average"]

    def step(self, context: Context) -> Mapping[str, Tensor]:
        observations, _, actions = self._task.views(context)[:3]
        network = cast(models.Diffusion, self.modules["student"])
        generator = context.generator("noise")
        noise, uniform = (
            draw(shape, generator=generator, device=actions.device, dtype=actions.dtype)
            for draw, shape in ((torch.randn, actions.shape), (torch.rand, actions.shape[:1]))
        )
        with context.run.autocast():
            loss = network.loss(actions, observations, noise, network.level_at(uniform))
        context.update("student", {"task": loss})
        updates = context.counts["student"]
        stays = min(self._ema, (1 + updates) / (10 + updates))
        with torch.no_grad():
            averages, weights = ([*module.parameters()] for module in (self.modules["average"], network))
            torch._foreach_lerp_(cast(list[Tensor], averages), cast(list[Tensor], weights), 1 - stays)
        return {"loss/task": loss}


def for_teacher(entry: Teacher, prepared: Path, run: Run, start: Taught | None = None) -> Policy:
    """The task as a diffusion policy meets it."""
    return Policy(prepared, entry.network, entry.training, run, ema=entry.ema)


def for_student(entry: AnyStudent, prepared: Path, run: Run, teacher: Taught | None) -> Policy:
    """The task as a mixture of experts meets it. By likelihood alone, its gate trains the trunk too."""
    task = Policy(prepared, entry.network, entry.training, run, teacher, by_turns=isinstance(entry, Alternating))
    cast(models.Mixture, task.student).gate_trains_trunk = isinstance(entry, Alone)
    return task
