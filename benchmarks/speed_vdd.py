"""VDD against the form that one writes straight from its equations, the teacher's share of a step, and acting.

surrogate   samples, responsibilities, entropy, and gradients with respect to means and factors, without any network:
            by MultivariateNormal and autograd, against the closed form. 5120 states, 8 experts, 2 samples of each.
            `copied`: mean and factor for every pair of experts and every sample, as the official code has them;
            `broadcast`: torch is left to do what it can without copies.
scores      the teacher asked for all samples. `repeated`: with the observations of a window for each of its samples;
            ours: once.
iteration   a whole iteration of the learner (two updates of the experts, one of the gate), and how much of it the
            teacher and the surrogate take.
acting      an action for one window of observations in ONNX Runtime, as it is exported: by the teacher in 8 calls, by
            the student in one.

Equal values are checked before any time is taken. Repetitions of all sides alternate; a figure is a ratio within one
run, of medians and of the shortest times.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from benchmarks.timing import agree, seconds
from models import policy as models
from models.policy import Output
from stages.distill import vdd
from stages.distill.vdd import Learner, ascend, draw
from stages.export.onnx_graph import session, write_onnx
from stages.export.policy import AXES, INPUT, OUTPUTS, Graph
from stages.parameters.policy import VDD, Teacher
from stages.teach.policy import Policy, Windows
from stages.training import Context, Run

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
Call = Callable[[], Sequence[Tensor]]


class Size(NamedTuple):
    """Of windows and networks. `states`: of the surrogate alone."""

    states: int
    experts: int
    samples: int
    batch: int
    window: int
    backbone: dict[str, Any]
    heads: int


GPT = {"name": "transformer", "layers": 4, "heads": 4, "width": 72}
SIZES = {
    "gpt": Size(5120, 8, 2, 128, 5, GPT, 512),
    "mlp": Size(5120, 8, 2, 1024, 5, {"name": "mlp", "width": 256, "layers": 3}, 256),
    "small": Size(12, 3, 2, 4, 3, {"name": "transformer", "layers": 1, "heads": 2, "width": 8}, 8),
}


def timed(calls: dict[str, Call], repetitions: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every call; they alternate."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            times[name].append(seconds(call, clock))
    return times


# The surrogate


def plain(
    mean: Tensor, factor: Tensor, log_gate: Tensor, noise: Tensor, score: Tensor, copied: bool
) -> Sequence[Tensor]:
    """Loss and gradients by VDD card 3.2, word for word; what is `ascend` otherwise."""
    mean, factor = mean.requires_grad_(), factor.requires_grad_()
    samples = mean + (factor @ noise[..., None]).squeeze(-1)
    means, factors = mean.detach()[:, None], factor.detach()[:, None]
    if copied:
        pairs = (len(noise), -1, mean.shape[1], -1, -1)
        means, factors = means.expand(pairs), factors.expand(*pairs, -1)
    every = MultivariateNormal(means, scale_tril=factors)
    joint = log_gate[:, None] + every.log_prob(samples[:, :, :, None])
    log_responsibility = joint.diagonal(dim1=2, dim2=3) - joint.logsumexp(3)
    inner = (score.permute(2, 0, 1, 3) * samples).sum(3)
    entropy = MultivariateNormal(mean, scale_tril=factor).entropy()
    loss = -(log_gate.exp() * ((inner + log_responsibility).mean(0) + entropy)).sum(1).mean()
    of_mean, of_factor = torch.autograd.grad(loss, [mean, factor])
    mean.requires_grad_(False)
    factor.requires_grad_(False)
    return loss.detach(), of_mean, of_factor.tril()


def surrogate(size: Size, dtype: torch.dtype, actions: int) -> dict[str, Call]:
    shape = size.states, size.experts, actions
    mean, noise = torch.randn(shape, dtype=dtype), torch.randn(size.samples, *shape, dtype=dtype)
    factor = models.factors(0.3 * torch.randn(*shape[:2], actions * (actions + 1) // 2, dtype=dtype), 1.0, 1e-4)
    log_gate = torch.randn(shape[:2], dtype=dtype).log_softmax(1)
    score = torch.randn(*shape[:2], size.samples, actions, dtype=dtype)

    def ours() -> Sequence[Tensor]:
        samples = draw(mean, factor, noise)
        found = ascend(Output(mean, factor, log_gate), noise, samples, score)
        return found.loss, found.mean, found.factor

    official = partial(plain, mean, factor, log_gate, noise, score)
    return {"ours": ours, "copied": partial(official, copied=True), "broadcast": partial(official, copied=False)}


# Teacher and learner


class Bare(Policy):
    """A task without files: random demonstrations, and untrained networks."""

    def __init__(self, size: Size, actions: int, parameters: VDD, teacher: Teacher, run: Run) -> None:
        rows, zeros, ones = 4 * size.batch, [0.0] * 2 * actions, [1.0] * 2 * actions
        scaling = {
            "observation": {"mean": zeros, "std": ones, "change": ones},
            "action": {
                "mean": zeros[:actions],
                "std": ones[:actions],
                "low": [-9.0] * actions,
                "high": [9.0] * actions,
            },
        }
        self.interface = {"observations": 2 * actions, "actions": actions, "scaling": scaling, "environment": None}
        self.seed, self.clip, self._training, self._run = 0, None, parameters.training, run
        self._goals, self._ema, self.network = 0, None, parameters.network.model_dump(mode="json")
        built: list[Any] = []
        for entry in (teacher, parameters):
            description = {"network": entry.network.model_dump(mode="json"), "interface": self.interface}
            network = models.build(description).to(run.dtype)
            for weight in network.parameters():
                nn.init.normal_(weight, 0, 0.3 / max(weight.shape[-1], 1) ** 0.5)
            built.append(network)
        teacher_network, self.student = built
        self.teacher = teacher_network.eval().requires_grad_(False)
        random = partial(torch.randn, rows, dtype=run.dtype)
        places = torch.arange(rows - size.window)[:, None] + torch.arange(size.window)
        self._train = Windows(random(2 * actions), random(actions), places, places[:, 0] == 0)
        self._streams = ("train", "gate")
        # So that nothing but steps is timed.
        self.steps = self.steps_per_epoch = 10**9


def learner(size: Size, dtype: torch.dtype, name: str = "ddpm") -> tuple[Learner, Bare, Run]:
    """Of actions of two numbers."""
    base = {"task": "policy", "dataset": "bare"}
    network = {"window": size.window, "backbone": size.backbone}
    teacher = Teacher.model_validate({**base, "start": "none", "network": {"name": name, **network, "steps": 8}})
    levels = {"kind": "steps", "low": 1, "high": 4} if name == "ddpm" else {"kind": "uniform", "low": 0.2, "high": 0.5}
    heads = {"width": size.heads, "layers": 1}
    parameters = VDD.model_validate(
        {
            **base,
            "method": "vdd",
            "teacher": "bare",
            "network": {"name": "mixture", **network, "experts": size.experts, "heads": heads},
            "levels": levels,
            "samples": size.samples,
            "training": {"batch": size.batch, "accelerator": "cpu", "precision": f"{8 * dtype.itemsize}-true"},
        }
    )
    run = Run(parameters.training)
    task = Bare(size, 2, parameters, teacher, run)
    return Learner(task, parameters, run), task, run


def scores(size: Size, dtype: torch.dtype) -> dict[str, Call]:
    task = learner(size, dtype)[1]
    teacher: Any = task.teacher
    each = size.experts * size.samples
    observations = torch.randn(size.batch, size.window, 4, dtype=dtype)
    actions = torch.randn(size.batch * each, size.window, 2, dtype=dtype)
    level = torch.randint(1, 5, (len(actions),))

    def asked(shown: Callable[[], Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return [teacher.score(actions, shown(), level)]

    return {
        "ours": lambda: asked(lambda: observations),
        "repeated": lambda: asked(lambda: observations.repeat_interleave(each, 0)),
    }


@contextmanager
def counted(owner: Any, name: str, clock: Callable[[], float]) -> Iterator[list[float]]:
    """Seconds of every call of a function, wherever it is called from meanwhile."""
    inner, found = getattr(owner, name), []

    def outer(*arguments: Any, **named: Any) -> Any:
        begun = clock()
        result = inner(*arguments, **named)
        found.append(clock() - begun)
        return result

    setattr(owner, name, outer)
    yield found
    setattr(owner, name, inner)


def iteration(size: Size, repetitions: int, clock: Callable[[], float]) -> str:
    """A row: a whole iteration, and what teacher, surrogate and everything else take of it."""
    method, task, run = learner(size, torch.float32)
    for name, module in method.modules.items():
        module.train(name not in method.frozen)
    context = Context(method, run, 0)
    whole, parts = [], []
    for step in range(repetitions + 1):
        context.begin(step)
        with (
            counted(task.teacher, "score", clock) as score,
            counted(vdd, "draw", clock) as drawn,
            counted(vdd, "ascend", clock) as ascended,
        ):
            begun = clock()
            method.step(context)
            whole.append(clock() - begun)
        parts.append((sum(score), sum(drawn) + sum(ascended)))
    total = statistics.median(whole[1:])  # the first one sets up
    teacher, closed = (statistics.median(part) for part in zip(*parts[1:], strict=True))
    cells = [f"{1e3 * total:.1f}"]
    cells += [f"{1e3 * part:.1f} ({part / total:.0%})" for part in (teacher, closed, total - teacher - closed)]
    return "| " + " | ".join(cells) + " |"


def acting(size: Size, name: str, threads: int, folder: Path) -> dict[str, Call]:
    """Sessions of student and teacher, and one window."""
    task = learner(size, torch.float32, name)[1]
    random = np.random.default_rng(0)
    window = random.standard_normal((2, size.window, 4), dtype=np.float32)
    noise = random.standard_normal((2, 8, size.window, 2), dtype=np.float32)
    chosen = {"draw": np.array([0.3, -1.0], dtype=np.float32), "allowed": np.ones((2, size.experts), dtype=bool)}
    sides: dict[str, tuple[Any, dict[str, np.ndarray]]] = {
        "ours": (task.student, {INPUT: window, **chosen}),
        name: (task.teacher, {INPUT: window, "noise": noise}),
    }
    calls: dict[str, Call] = {}
    for side, (network, fed) in sides.items():
        graph, path = Graph(copy.deepcopy(network).eval()), folder / f"{name}-{side}.onnx"
        write_onnx(graph, fed, OUTPUTS, AXES, path)
        with torch.no_grad():
            wanted = graph(*map(torch.from_numpy, fed.values()))
        own = session(path, threads)
        for found, other in zip(own.run(None, fed), wanted, strict=True):
            np.testing.assert_allclose(found, other.numpy(), atol=1e-4)
        one = {key: value[:1] for key, value in fed.items()}
        calls[side] = lambda own=own, one=one: own.run(None, one)  # type: ignore[misc]
    return calls


def rows(name: str, times: dict[str, list[float]]) -> Iterator[str]:
    """Of a table: `ours` against every other side."""
    middle, least = ({side: f(found) for side, found in times.items()} for f in (statistics.median, min))
    for side in list(times)[1:]:
        cells = [name, side, f"{1e3 * middle[side]:.3g}", f"{1e3 * middle['ours']:.3g}"]
        cells += [f"{found[side] / found['ours']:.2f}" for found in (middle, least)]
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print two tables: what is compared, and where a step's time goes."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example, from the root of the project: PYTHONPATH=. python benchmarks/speed_vdd.py --size mlp "
        "--clock processor --threads 1 --repetitions 5",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--size", choices=SIZES, default="gpt")
    parser.add_argument("--actions", type=int, nargs="+", default=[2, 9])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    size, clock = SIZES[arguments.size], CLOCKS[arguments.clock]
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, {torch.backends.cpu.get_cpu_capability()}, float32, "
        f"{arguments.repetitions} repetitions, {arguments.clock} clock\n{size}\n"
    )
    print("| what | against | theirs, ms | ours, ms | ratio (median) | (shortest) |")
    print("|---|---|---|---|---|---|", flush=True)
    cases = {f"surrogate, A = {actions}": partial(surrogate, actions=actions) for actions in arguments.actions}
    for name, case in {**cases, "scores": scores}.items():
        agree(case(SIZES["small"], torch.float64), 1e-9)
        calls = case(size, torch.float32)
        agree(calls, 1e-2)
        print(*rows(name, timed(calls, arguments.repetitions, clock)), sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("ddpm", "beso"):
            calls = acting(size, name, arguments.threads, Path(folder))
            print(*rows("acting", timed(calls, arguments.repetitions, clock)), sep="\n", flush=True)
    print("\n| iteration, ms | teacher | surrogate | everything else |\n|---|---|---|---|")
    print(iteration(size, arguments.repetitions, clock))


if __name__ == "__main__":
    main()
