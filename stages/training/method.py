"""What a method offers to the loop, and what the loop offers to a method."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stages.training.run import Run
from stages.training.streams import Stream, derive_seed

if TYPE_CHECKING:
    import pandas as pd


class Companion(NamedTuple):
    """A network that was trained beside the student, and is kept.

    Attributes:
        built_from: `network` of its description; None: that of the teacher, whose network it has, or the student's.
        evaluated: whether it answers the question of the task; a generator does not.
    """

    network: nn.Module
    built_from: dict[str, Any] | None = None
    evaluated: bool = True


class Method(ABC):
    """How a student learns. One instance per process, built alike in all of them.

    How the five methods use it:

    - GDD, HORKD, `kd`: one optimiser over student and training-only modules (align, generator, projection); the
      frozen teacher is one of `modules`; a step is one `update` of named loss terms.
    - LGTM: optimisers `student` and `teacher`, streams `train` and `held_out`. The virtual student is a functional
      call with peeked weights, `gradient` gives the held-out gradient averaged over processes; the teacher's update is
      one `update("teacher", [auxiliary, logits], [one, cotangent])`, then the real student's `update`.
    - D3GZSL: optimisers for critic, embedding, classifiers, confidence and generator; a step draws five critic
      batches with an `update` each, then one for the generator.
    - VDD: `update("experts", [mean, factor], cotangents)` with gradients given by hand, then the gate's own update;
      each optimiser follows its own schedule, counted in its own updates; an EMA is a frozen module that the step
      moves itself.

    Attributes:
        modules: everything with weights, saved by name.
        frozen: names of modules that no gradient trains; they stay in eval mode. (An EMA may still be moved by hand;
            with several processes it is the step that keeps its buffers equal.)
        optimizers: together they hold every trained parameter once.
        schedules: per optimiser, the learning rate as a function of the number of its updates so far.
        streams: named data.
        clip: per optimiser, the largest norm of its gradient; none by default.
        look_every: outer steps between two looks at the validation split; None: an epoch.
        chosen: what no parameter says, such as the form of a computation on this machine, or a projection between two
            networks, by name: kept in the model's description. A training never goes on with another choice.
    """

    frozen: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Optimizer] = {}
        self.schedules: dict[str, Callable[[int], float]] = {}
        self.streams: dict[str, Stream] = {}
        self.clip: dict[str, float] = {}
        self.look_every: int | None = None
        self.chosen: dict[str, str] = {}

    @abstractmethod
    def step(self, context: "Context") -> Mapping[str, Tensor]:
        """One outer iteration: draws its own batches, updates, and returns named scalars, each at least finite."""

    @property
    def student(self) -> nn.Module:
        """The deployable network: no teacher, no hooks, no wrapper."""
        return self.modules["student"]

    @property
    def watched(self) -> nn.Module:
        """What is measured on the validation split on the way: the student, unless an earlier state of it is kept."""
        return self.student

    @property
    def companions(self) -> Mapping[str, Companion]:
        """Networks that were trained beside the student, and are kept: a teacher that learnt, a generator."""
        return {}

    def tables(self) -> Mapping[str, "pd.DataFrame"]:
        """What was found out about samples on the way, by name; kept beside the companions."""
        return {}

    def state(self) -> dict[str, Any]:
        """What is no module, optimiser or stream, and must survive a restart. Usually nothing."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - most methods have nothing to restore
        """The counterpart of `state`."""


class Context:
    """What a step may use. Every random number follows from (seed, step, rank): no generator's state is ever saved.

    Attributes:
        step: number of this outer step. run: device, precision, processes.
        counts: updates so far, per optimiser.
        norms: norm of the gradient in the last update of each optimiser, before clipping.
    """

    def __init__(self, method: Method, run: Run, seed: int) -> None:
        self.run = run
        self.step = 0
        self.counts = dict.fromkeys(method.optimizers, 0)
        self.norms: dict[str, Tensor] = {}
        self._method = method
        self._seed = seed
        self._named: dict[str, torch.Generator] = {}

    def begin(self, step: int) -> None:
        """Seed everything for one step."""
        self.step = step
        self._named.clear()
        self.norms = {}
        torch.manual_seed(derive_seed(self._seed, "default", step, self.run.rank))

    def generator(self, name: str = "method") -> torch.Generator:
        """A random stream of this step and rank, on the run's device; one name never disturbs another's numbers."""
        if name not in self._named:
            seed = derive_seed(self._seed, name, self.step, self.run.rank)
            self._named[name] = torch.Generator(self.run.device).manual_seed(seed)
        return self._named[name]

    def draw(self, stream: str) -> list[Tensor]:
        """The next batch of a stream, on the run's device."""
        batch = self._method.streams[stream].draw(derive_seed(self._seed, stream), self.run.rank, self.run.world)
        return [tensor.to(self.run.device, non_blocking=True) for tensor in batch]

    def gradient(
        self,
        outputs: Tensor | Sequence[Tensor],
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor] | None = None,
        *,
        retain: bool = False,
    ) -> list[Tensor | None]:
        """Gradients averaged over processes; touches no `.grad`.

        None for an input that the outputs do not depend on, which an update leaves alone.

        Args:
            retain: keep the graph for another pass.
        """
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        found = torch.autograd.grad(outputs, list(inputs), cotangents, retain_graph=retain, allow_unused=True)
        self.run.mean_([gradient for gradient in found if gradient is not None])
        return list(found)

    def update(
        self,
        names: str | Sequence[str],
        outputs: Mapping[str, Tensor] | Sequence[Tensor],
        cotangents: Sequence[Tensor] | None = None,
    ) -> None:
        """One autograd pass, then one step of each named optimiser, and of nothing else.

        Parameters that the outputs do not depend on are left alone, as torch's own optimisers leave those without a
        gradient.

        Args:
            outputs: named loss terms that are summed, or tensors that go with `cotangents`.
        """
        names = [names] if isinstance(names, str) else list(names)
        if isinstance(outputs, Mapping):
            outputs = [torch.stack([term.to(self.run.dtype) for term in outputs.values()]).sum()]
        groups = {name: _parameters(self._method.optimizers[name]) for name in names}
        parameters = [parameter for name in names for parameter in groups[name]]
        found = torch.autograd.grad(list(outputs), parameters, cotangents, allow_unused=True)
        used = [(x, g) for x, g in zip(parameters, found, strict=True) if g is not None]
        self.run.mean_([g for _, g in used])
        for parameter, gradient in used:
            parameter.grad = gradient
        for name in names:
            self._apply(name, groups[name])
        for parameter, _ in used:
            parameter.grad = None

    def _apply(self, name: str, parameters: Sequence[Tensor]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = self.norms[name] = nn.utils.get_total_norm(gradients)
        if name in self._method.clip:
            nn.utils.clip_grads_with_norm_(parameters, self._method.clip[name], norm)
        optimizer = self._method.optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = self._method.schedules[name](self.counts[name])
        optimizer.step()
        self.counts[name] += 1


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every submodule is back in the mode it had."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
