"""A step of LGTM: one backward pass of the teacher against three, beside KD and online KD, in one run.

Every form trains copies of the same two BERTs with random weights on the same random tokens; their steps alternate, so
that whatever else the machine does meets them alike.

    kd              a frozen teacher
    online          online KD as one writes it: 2 forward and 1 backward pass of the teacher, 2 and 1 of the student
    online, ours    the learner with `influence_scale: 0`
    three           the influence as its definition says: copies of the student and of its moments, the student moved in
                    place, a forward and a backward pass of the teacher for either side
    ours            the learner

`floor` is what the passes that a form needs would take, measured by themselves, `share` the floor's share of the time.
`off` is the largest difference between the weights of a form and those of the form before it that computes the same,
after all steps; with dropout their masks differ, and so do they. Peak memory is that of a process of its own. On a
machine that is busy otherwise, `--clock processor --threads 1` counts the processor's time instead of the wall's.
"""

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from models.text import Bert
from stages.distill import kd, lgtm
from stages.parameters import text as schema
from stages.training import AdamW, Context, Method, Run, Stream, Task, Views

TEACHER_ALPHA, RADIUS, RATE = 0.4, 0.01, 5e-5
PAD, SEPARATOR = 0, 1


class Size(NamedTuple):
    teacher: int
    student: int
    width: int
    heads: int
    batch: int
    length: int
    vocabulary: int = 30522


SIZES = {
    "minilm-2": Size(6, 2, 384, 12, 32, 48),
    "minilm-3": Size(6, 3, 384, 12, 32, 48),
    "small": Size(4, 2, 96, 4, 16, 32),
}
# Forward and backward passes: of the teacher, of the student (card 3.6).
PASSES = {
    "kd": (1, 0, 1, 1),
    "online": (2, 1, 2, 1),
    "online, ours": (2, 1, 1, 1),
    "three": (4, 3, 5, 3),
    "ours": (2, 1, 4, 3),
}
WITH_DROPOUT = {**PASSES, "online, ours": (2, 1, 2, 1), "ours": (3, 2, 5, 3)}
TWINS = {"online, ours": "online", "ours": "three"}


class Tokens(Task):
    """Random texts of random length with random labels, trained on and held out."""

    def __init__(self, size: Size, dropout: float, run: Run) -> None:
        torch.manual_seed(0)
        self.teacher, self.student = (
            Bert(
                2,
                size.vocabulary,
                PAD,
                SEPARATOR,
                layers=layers,
                hidden=size.width,
                heads=size.heads,
                intermediate=None,
                positions=size.length,
                dropout=dropout,
            )
            for layers in (size.teacher, size.student)
        )
        self.seed, self.clip, self.steps, self.steps_per_epoch = 0, None, 1000, 1000
        self._streams = {name: self._stream(size) for name in ("train", "held_out")}

    def _stream(self, size: Size) -> Stream:
        count = 4 * size.batch
        tokens = torch.randint(2, size.vocabulary, (count, size.length))
        ends = torch.randint(size.length // 4, size.length, (count, 1))
        places = torch.arange(size.length)
        tokens = torch.where(places < ends, tokens, torch.where(places == ends, SEPARATOR, PAD))
        return Stream([tokens, torch.randint(2, (count,)), torch.arange(count)], size.batch)

    def streams(self) -> dict[str, Stream]:
        return self._streams

    def _draw(self, context: Context, name: str) -> Views:
        tokens, labels, rows = context.draw(name)
        return Views(tokens, tokens, labels, rows)

    def views(self, context: Context) -> Views:
        return self._draw(context, "train")

    def held_out(self, context: Context) -> Views:
        return self._draw(context, "held_out")

    def objective(self, output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(output.logits, target)

    def logits(self, output: Any) -> Tensor:
        logits: Tensor = output.logits
        return logits

    def features(self, network: nn.Module) -> Mapping[str, int]:
        return {}

    def optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        return AdamW(parameters)

    def schedule(self, steps: int, learning_rate: float | None = None) -> Callable[[int], float]:
        return lambda count: RATE

    def monitor(self, network: nn.Module) -> Mapping[str, float]:
        return {}


class Plain(Method):
    """Both networks and their optimisers, for the forms that are written down here. tau = 1, a = 1, lambda = 1."""

    def __init__(self, task: Tokens) -> None:
        super().__init__()
        self.task = task
        self.modules = {"student": task.student, "teacher": cast(nn.Module, task.teacher)}
        self.streams = task.streams()
        for name, network in self.modules.items():
            task.optimize(self, name, network.parameters())

    def losses(self, teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
        """The teacher's own loss."""
        soft = F.kl_div(teacher.log_softmax(1), student.detach().softmax(1), reduction="batchmean")
        return TEACHER_ALPHA * soft + (1 - TEACHER_ALPHA) * F.cross_entropy(teacher, labels)

    def learn(self, name: str, gradients: Iterable[Tensor | None]) -> None:
        optimizer = self.optimizers[name]
        for parameter, gradient in zip(self.modules[name].parameters(), gradients, strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = RATE
        optimizer.step()
        optimizer.zero_grad()

    def learn_from_the_teacher(self, tokens: Tensor) -> dict[str, Tensor]:
        teacher, student = self.modules["teacher"], self.modules["student"]
        teacher.eval()
        with torch.no_grad():
            labels = teacher(tokens).logits.softmax(1)
        teacher.train()
        loss = F.kl_div(student(tokens).logits.log_softmax(1), labels, reduction="batchmean")
        self.learn("student", torch.autograd.grad(loss, list(student.parameters())))
        return {"loss": loss.detach()}


class Online(Plain):
    def step(self, context: Context) -> Mapping[str, Tensor]:
        teacher, student = self.modules["teacher"], self.modules["student"]
        views = self.task.views(context)
        with torch.no_grad():
            answers = student(views.student).logits
        loss = self.losses(teacher(views.teacher).logits, answers, views.target)
        self.learn("teacher", torch.autograd.grad(loss, list(teacher.parameters())))
        return self.learn_from_the_teacher(views.student)


class Three(Plain):
    """Card 3.4, word for word; no graphs of the moved students, which the official code builds and throws away."""

    def step(self, context: Context) -> Mapping[str, Tensor]:
        teacher, student = self.modules["teacher"], self.modules["student"]
        of_teacher, of_student = list(teacher.parameters()), list(student.parameters())
        views, held_out = self.task.views(context), self.task.held_out(context)
        z_t, z_s = teacher(views.teacher).logits, student(views.student).logits
        loss = F.kl_div(z_s.log_softmax(1), z_t.detach().softmax(1), reduction="batchmean")
        gradients = torch.autograd.grad(loss, of_student)
        virtual = copy.deepcopy(student)
        optimizer = AdamW(virtual.parameters(), lr=RATE)
        optimizer.load_state_dict(copy.deepcopy(self.optimizers["student"].state_dict()))
        for group in optimizer.param_groups:
            group["lr"] = RATE
        for parameter, gradient in zip(virtual.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        own = torch.autograd.grad(self.losses(z_t, z_s, views.target), of_teacher)
        value = F.cross_entropy(virtual(held_out.student).logits, held_out.target)
        direction = torch.autograd.grad(value, list(virtual.parameters()))
        epsilon = RADIUS / float(torch.cat([v.flatten() for v in direction]).norm())
        teacher.eval()
        student.eval()
        sides = []
        for shift in (epsilon, -2 * epsilon):
            torch._foreach_add_([p.data for p in of_student], direction, alpha=shift)
            with torch.no_grad():
                moved = student(views.student).logits
            loss = self.losses(teacher(views.teacher).logits, moved, views.target)
            sides.append(torch.autograd.grad(loss, of_teacher))
        torch._foreach_add_([p.data for p in of_student], direction, alpha=epsilon)
        teacher.train()
        student.train()
        total = [g - (a - b) / (2 * epsilon) for g, a, b in zip(own, *sides, strict=True)]
        self.learn("teacher", total)
        return self.learn_from_the_teacher(views.student)


def build(form: str, size: Size, dropout: float, threads: int) -> Callable[[], Method]:
    """One form; every call makes one step and returns the method."""
    run = Run(schema.Training(accelerator="cpu", threads=threads))
    task = Tokens(size, dropout, run)
    network = {"name": "bert", "layers": size.student, "hidden": size.width, "heads": size.heads}
    entry = {"task": "text", "dataset": "random", "teacher": "random", "network": network}
    method: Method
    if form == "kd":
        soft = schema.KD.model_validate({**entry, "method": "kd", "temperature": 1.0, "alpha": 1.0})
        method = kd.Learner(task, soft, run)
        cast(nn.Module, task.teacher).requires_grad_(False)
    elif form in ("online", "three"):
        method = {"online": Online, "three": Three}[form](task)
    else:
        scale = 0.0 if form == "online, ours" else 1.0
        fields = {"method": "lgtm", "influence_scale": scale, "zero_heads": False, "teacher_alpha": TEACHER_ALPHA}
        method = lgtm.Learner(task, schema.LGTM.model_validate({**entry, **fields}), run)
    for name, module in method.modules.items():
        module.train(name not in method.frozen)
    context = Context(method, run, 0)
    count = 0

    def step() -> Method:
        nonlocal count
        context.begin(count)
        method.step(context)
        count += 1
        return method

    return step


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
Clock = Callable[[], float]


def passes(size: Size, dropout: float, repetitions: int, threads: int, clock: Clock) -> list[float]:
    """Seconds of a forward and a backward pass of the teacher, and of the student."""
    task = Tokens(size, dropout, Run(schema.Training(accelerator="cpu", threads=threads)))
    tokens = task.streams()["train"].tensors[0][: size.batch]
    times: list[list[float]] = [[], [], [], []]
    for _ in range(repetitions):
        for index, network in enumerate((cast(nn.Module, task.teacher), task.student)):
            start = clock()
            loss = network.train()(tokens).logits.logsumexp(1).mean()
            middle = clock()
            torch.autograd.grad(loss, list(network.parameters()))
            times[2 * index].append(middle - start)
            times[2 * index + 1].append(clock() - middle)
    return [statistics.median(part) for part in times]


def weights(method: Method) -> Tensor:
    return torch.cat([p.detach().flatten() for module in method.modules.values() for p in module.parameters()])


def held() -> float:
    """MiB that this process has held at most."""
    status = Path("/proc/self/status")
    if status.is_file():
        # On Linux getrusage counts in what the process was that started this one.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def peak(form: str, name: str, dropout: float, threads: int) -> float:
    """MiB that a process needs at most for three steps of one form."""
    options = ["--peak", form, "--sizes", name, "--dropout", str(dropout), "--threads", str(threads)]
    done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure(name: str, dropout: float, repetitions: int, threads: int, clock: Clock) -> str:
    """The table of one size."""
    size = SIZES[name]
    counts = WITH_DROPOUT if dropout else PASSES
    forms = {form: build(form, size, dropout, threads) for form in counts}
    for step in forms.values():
        step()
    times: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(repetitions):
        for form, step in forms.items():
            start = clock()
            step()
            times[form].append(clock() - start)
    middle = {form: statistics.median(found) for form, found in times.items()}
    ends = {form: weights(step()) for form, step in forms.items()}
    del forms
    single = passes(size, dropout, repetitions, threads, clock)
    lines = []
    for form in counts:
        floor = sum(count * seconds for count, seconds in zip(counts[form], single, strict=True))
        twin = TWINS.get(form)
        off = f"{(ends[form] - ends[twin]).abs().max():.1g}" if twin else ""
        cells = [
            form,
            f"{1e3 * middle[form]:.0f} ({1e3 * min(times[form]):.0f})",
            f"{middle['three'] / middle[form]:.2f}",
            f"{middle[form] / middle['online']:.2f}",
            f"{1e3 * floor:.0f}",
            f"{floor / middle[form]:.0%}",
            off,
            f"{peak(form, name, dropout, threads):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    cost = ", ".join(f"{1e3 * seconds:.0f}" for seconds in single)
    title = f"{name}, dropout {dropout:g}: forward and backward of the teacher, of the student {cost} ms"
    return "\n".join([title, "", HEADER, *lines, ""])


HEADER = """\
| form | median, ms (least) | three / form | form / online | floor, ms | share | off | peak, MiB |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Print a table per size and dropout."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example, from the root of the project: "
        "PYTHONPATH=. python benchmarks/speed_lgtm.py --repetitions 5 --sizes small",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=list(SIZES))
    parser.add_argument("--peak", choices=PASSES, help="print the memory of one form alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        step = build(arguments.peak, SIZES[arguments.sizes[0]], arguments.dropout[0], arguments.threads)
        for _ in range(3):
            step()
        print(held())
        return
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"float32, {arguments.repetitions} repetitions, {arguments.clock} clock\n"
    )
    for dropout in arguments.dropout:
        for name in arguments.sizes:
            print(measure(name, dropout, arguments.repetitions, arguments.threads, CLOCKS[arguments.clock]), flush=True)


if __name__ == "__main__":
    main()
