"""A task of classes that holds samples out: small networks, and LGTM's steps on them."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from stages.distill import lgtm
from stages.parameters import text as schema
from stages.training import AdamW, Context, Run, Stream, Task, Views

Rows = tuple[Tensor, Tensor]


class Tanh(nn.Module):
    """Linear layers with tanh between them, then dropout and the last one."""

    def __init__(self, widths: Sequence[int], dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(widths[1]) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers[:-1]):
            x = torch.tanh(layer(x) if index else self.norm(layer(x)))
        return self.layers[-1](self.dropout(x))

    def zero_head(self) -> None:
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)


def samples(seed: int, count: int, inputs: int, classes: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
    return x, (x[:, :classes] + 0.5 * torch.randn(count, classes, generator=generator)).argmax(1)


class Toy(Task):
    """Arrays with labels, trained on and held out; AdamW or any other optimiser, and any schedule."""

    seed = 0

    def __init__(
        self,
        run: Run,
        student: nn.Module,
        teacher: nn.Module,
        train: Rows,
        held_out: Rows | None,
        *,
        batch: int,
        shuffle: bool = True,
        steps: int = 12,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = AdamW,
        rate: float = 0.01,
        falls: bool = True,
        clip: float | None = None,
    ) -> None:
        self.student, self.teacher = (x.to(run.device, run.dtype) for x in (student, teacher))
        self.clip, self.steps = clip, steps
        self.run, self.rate, self.falls, self._optimizer = run, rate, falls, optimizer
        self._streams = {"train": Stream([*train, torch.arange(len(train[1]))], batch, shuffle=shuffle)}
        if held_out is not None:
            self._streams["held_out"] = Stream(held_out, min(batch, len(held_out[1]) // run.world), shuffle=False)
        self.steps_per_epoch = self._streams["train"].batches(run.world)

    def streams(self) -> dict[str, Stream]:
        return dict(self._streams)

    def _see(self, x: Tensor) -> Tensor:
        return x.to(self.run.dtype) if x.is_floating_point() else x

    def views(self, context: Context) -> Views:
        x, y, rows = context.draw("train")
        return Views(self._see(x), self._see(x), y, rows)

    def held_out(self, context: Context) -> Views:
        if "held_out" not in self._streams:
            return super().held_out(context)
        x, y = context.draw("held_out")
        return Views(self._see(x), self._see(x), y)

    def objective(self, output: Any, target: Tensor) -> Tensor:
        logits = self.logits(output)
        return F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, target)

    def logits(self, output: Any) -> Tensor:
        return output if isinstance(output, Tensor) else output.logits

    def features(self, network: nn.Module) -> Mapping[str, int]:
        return {}

    def optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        return self._optimizer(parameters)

    def schedule(self, steps: int, learning_rate: float | None = None) -> Callable[[int], float]:
        highest = learning_rate or self.rate
        return lambda count: highest * (1 - count / steps) if self.falls else highest

    def monitor(self, network: nn.Module) -> Mapping[str, float]:
        return {}


TRAINING = {"accelerator": "cpu"}


def run(precision: str = "64-true", devices: int = 1) -> Run:
    return Run(schema.Training.model_validate({**TRAINING, "precision": precision, "devices": devices}))


def entry(**fields: Any) -> schema.LGTM:
    network = {"name": "bert", "layers": 1, "hidden": 4, "heads": 1}
    base = {"task": "text", "dataset": "x", "method": "lgtm", "teacher": "big", "network": network}
    return schema.LGTM.model_validate({**base, "zero_heads": False, **fields})


def networks(dropout: float = 0.0, norm: bool = False, seed: int = 0) -> tuple[Tanh, Tanh]:
    """A student and a teacher, of 6 features and 4 classes."""
    torch.manual_seed(seed)
    return Tanh((6, 7, 4), dropout, norm), Tanh((6, 12, 8, 4), dropout, norm)


def toy(run: Run, *, dropout: float = 0.0, norm: bool = False, batch: int = 8, **options: Any) -> Toy:
    student, teacher = networks(dropout, norm)
    return Toy(run, student, teacher, samples(1, 24, 6, 4), samples(2, 16, 6, 4), batch=batch, **options)


def learner(run: Run, task: Toy | None = None, **fields: Any) -> lgtm.Learner:
    return lgtm.Learner(task or toy(run), entry(**fields), run)


def steps(learner: lgtm.Learner, run: Run, count: int = 3, context: Context | None = None) -> list[dict[str, Tensor]]:
    """What every one of some steps returned."""
    context = context or Context(learner, run, 0)
    for module in learner.modules.values():
        module.train()
    found = []
    for step in range(count):
        context.begin(step)
        found.append({name: value.detach().clone() for name, value in learner.step(context).items()})
    return found


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
