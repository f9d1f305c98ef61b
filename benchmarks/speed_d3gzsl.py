"""D3GZSL against the official code, forward and backward, in one run: its losses, and a whole outer iteration.

Official are the forms that the D3GZSL card (section 8) describes, written anew: embeddings and codes compared pair by
pair, or by a matrix product; the comparator sample by sample; and an outer iteration (five updates of the critic and
one of the generator, with all losses of D3) by matrix products, with a generator's pass for seen and one for unseen
classes, the gradient penalty by double backward, the teacher on all rows every time, and Adam as torch has it by
default. In the critic's phase it keeps the graph of the synthesised rows and goes back through the generator for
nothing; `fixed` is the same without that. Ours is the learner itself.

Both sides get equal weights, batches and noise, and have to give equal values, which is checked before any time is
taken. Repetitions of all sides alternate; a figure is a ratio within one run, of medians and of the shortest times. The
floor is the time of the matrix products that our side makes, each of its shape and layout by itself, in the same run;
the distribution loss makes hardly any.
"""

import argparse
import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import agree, seconds
from models import zero_shot
from stages.distill.d3gzsl import Learner, distribution_loss, embedding_loss, unit
from stages.generators.cegzsl import class_loss, class_scores
from stages.parameters.zero_shot import D3GZSL
from stages.teach.zero_shot import Split, ZeroShot
from stages.training import Context, Run

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
Call = Callable[[], Sequence[Tensor]]
Layout = tuple[tuple[int, ...], tuple[int, ...]]


class Size(NamedTuple):
    """Of a batch and of the networks. `scored`: samples that the comparator scores."""

    batch: int
    per_class: int
    seen: int
    unseen: int
    features: int
    attributes: int
    hidden: int
    embedding: int
    scored: int

    @property
    def mixed(self) -> int:
        return self.batch + self.per_class * self.unseen


SIZES = {
    "cub": Size(256, 5, 150, 50, 2048, 312, 4096, 2048, 64),
    "bench": Size(256, 5, 75, 25, 512, 312, 1024, 1024, 64),
    "small": Size(64, 4, 40, 20, 128, 20, 256, 128, 32),
}


class Products(TorchDispatchMode):
    """Counts matrix products by the layout of their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Layout, Layout]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in PRODUCTS:
            first, second = args[-2:] if len(args) < 4 else args[1:3]
            self.found[(tuple(first.shape), first.stride()), (tuple(second.shape), second.stride())] += 1
        return function(*args, **(kwargs or {}))


def products(call: Call) -> list[tuple[Callable[[], Tensor], int]]:
    """Every matrix product of a call, by itself, and how often it is made."""
    with Products() as mode:
        call()
    made = []
    for layouts, count in mode.found.items():
        first, second = (torch.empty_strided(*layout).fill_(1 / 3) for layout in layouts)
        made.append((lambda a=first, b=second: a @ b, count))
    return made


def timed(calls: dict[str, Call], repetitions: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every call, and of the matrix products of `ours` as `floor`; all of them alternate."""
    parts = products(calls["ours"])

    def floor() -> float:
        return sum(count * seconds(product, clock) for product, count in parts)

    sides = {name: partial(seconds, call, clock) for name, call in calls.items()} | {"floor": floor}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, side in sides.items():
            times[name].append(side())
    return times


def pair_by_pair(rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
    """Every pair of rows side by side."""
    count = len(rows)
    cosines = F.cosine_similarity(rows.repeat_interleave(count, 0), columns.repeat(count, 1), eps=1e-8)
    same = (labels[:, None] == labels).flatten().to(cosines.dtype)
    return F.binary_cross_entropy_with_logits((1 + cosines) / 2, same)


def by_product(rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
    """Rows of length 1, then one matrix product."""
    rows, columns = (x / x.norm(dim=1, keepdim=True) for x in (rows, columns))
    similarity = (1 + rows @ columns.T) / 2
    same = (labels[:, None] == labels).to(rows.dtype)
    return (torch.log(1 + similarity.exp()) - same * similarity).mean()


def sample_by_sample(comparator: zero_shot.Comparator, hidden: Tensor, attributes: Tensor) -> Tensor:
    """Every sample with all classes through both layers."""
    found = []
    for sample in hidden:
        pairs = torch.cat([sample.expand(len(attributes), -1), attributes], 1)
        found.append(comparator.fc2(F.leaky_relu(comparator.fc1(pairs), zero_shot.SLOPE)).squeeze(1))
    return torch.stack(found)


def with_gradients(loss: Callable[..., Tensor], leaves: Sequence[Tensor], *inputs: Any) -> Call:
    def call() -> Sequence[Tensor]:
        value = loss(*inputs)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    return call


def embeddings(size: Size, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """Teacher's and student's, after a ReLU. What the teacher says of real rows is known from the beginning."""
    teacher, student = (torch.randn(size.batch, size.embedding, dtype=dtype).relu() for _ in range(2))
    labels, known = torch.randint(size.seen, (size.batch,)), unit(teacher)
    student.requires_grad_()
    return {
        "ours": with_gradients(lambda: embedding_loss(known, student, labels, unit_teacher=True), [student]),
        "pairs": with_gradients(pair_by_pair, [student], teacher, student, labels),
        "product": with_gradients(by_product, [student], teacher, student, labels),
    }


def codes(size: Size, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    student, teacher = ((2 * torch.randn(size.mixed, 2, dtype=dtype)).softmax(1).requires_grad_() for _ in range(2))
    labels = torch.randint(size.seen + size.unseen, (size.mixed,))
    return {
        "ours": with_gradients(distribution_loss, [student, teacher], student, teacher, labels),
        "pairs": with_gradients(pair_by_pair, [student, teacher], student, teacher, labels),
        "product": with_gradients(by_product, [student, teacher], student, teacher, labels),
    }


def scores(size: Size, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """Cross-entropy of the comparator's scores, as wide as the embedding."""
    comparator = zero_shot.Comparator(size.embedding, size.attributes, size.embedding).to(dtype)
    hidden = torch.rand(size.scored, size.embedding, dtype=dtype).requires_grad_()
    attributes, targets = torch.rand(size.seen, size.attributes, dtype=dtype), torch.randint(size.seen, (size.scored,))
    # Not the last bias: all classes share it, and its gradient is 0 but for rounding.
    leaves = [hidden, *comparator.fc1.parameters(), comparator.fc2.weight]

    def loss(score: Callable[..., Tensor]) -> Tensor:
        return class_loss(score(), targets, 0.1)

    return {
        "ours": with_gradients(loss, leaves, lambda: class_scores(comparator, hidden, attributes)),
        "loop": with_gradients(loss, leaves, lambda: sample_by_sample(comparator, hidden, attributes)),
    }


class Draw(NamedTuple):
    """What one update draws: real rows with labels, noise for a fake of each, where the slope is penalised, and noise
    for the synthesised rows of unseen classes."""

    real: Tensor
    labels: Tensor
    noise: Tensor
    mix: Tensor | None
    unseen: Tensor


class Official(nn.Module):
    """An outer iteration as the official matrix-product variant makes it; `steps` are six draws.

    What it returns is of the last update of each phase; that depends on all updates before.

    Networks are copies of the learner's. `fixed`: the generator's weights get no gradient in the critic's phase.
    """

    def __init__(
        self, networks: dict[str, nn.Module], seen: Tensor, unseen: Tensor, weight: float, fixed: bool
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(copy.deepcopy(networks))
        self.seen, self.unseen, self.weight, self.fixed = seen, unseen, weight, fixed
        parts = {name: list(module.parameters()) for name, module in self.networks.items() if name != "teacher"}
        embedding, classifier = parts.pop("student")[:2], self.networks["student"].classifier
        groups = [*parts.items(), ("embedding", embedding), ("classifier", list(classifier.parameters()))]
        self.optimizers = {name: torch.optim.Adam(group, 1e-4, (0.5, 0.999)) for name, group in groups}

    def forward(self, steps: Sequence[Draw]) -> list[Tensor]:
        generator, critic = self.networks["generator"], self.networks["critic"]
        for draw in steps[:-1]:
            generator.requires_grad_(not self.fixed)
            fake = self.synthesise(draw.noise, draw.labels)
            terms = [self.judge(fake.detach(), draw.labels).mean() - self.judge(draw.real, draw.labels).mean()]
            terms.append(self.penalty(draw, fake.detach()))
            (sum(terms) + 0).backward()
            self.distribute(draw)
            found = terms
            self.update("critic")
        generator.requires_grad_(True)
        critic.requires_grad_(False)
        draw = steps[-1]
        own = -self.judge(self.synthesise(draw.noise, draw.labels), draw.labels).mean()
        own.backward()
        found += [own, self.distribute(draw)]
        self.update("generator")
        critic.requires_grad_(True)
        return [term.detach() for term in found]

    def update(self, name: str) -> None:
        for each in (name, "embedding", "classifier", "head", "confidence"):
            self.optimizers[each].step()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def synthesise(self, noise: Tensor, labels: Tensor) -> Tensor:
        return through(self.networks["generator"], noise, labels).relu()

    def judge(self, features: Tensor, labels: Tensor) -> Tensor:
        return through(self.networks["critic"], features, labels)

    def penalty(self, draw: Draw, fake: Tensor) -> Tensor:
        between = (draw.mix * draw.real + (1 - draw.mix) * fake).requires_grad_()
        value = self.judge(between, draw.labels)
        (slope,) = torch.autograd.grad(value, between, torch.ones_like(value), create_graph=True)
        return 10 * (slope.norm(dim=1) - 1).square().mean()

    def distribute(self, draw: Draw) -> Tensor:
        """L_d3 of one mixed batch, and its gradients."""
        student, teacher = self.networks["student"], self.networks["teacher"]
        made = self.unseen.repeat_interleave(len(draw.unseen) // len(self.unseen))
        mixed = torch.cat([self.synthesise(draw.unseen, made), draw.real])
        labels = torch.cat([made, draw.labels])
        theirs, ours = teacher.embedding(mixed), student.embedding(mixed)
        known, logits = teacher.classifier(theirs), student.classifier(ours)
        real = slice(len(made), None)
        confidence = self.networks["confidence"](known.log_softmax(1).max(1).values)
        code = torch.stack([confidence, 1 - confidence], 1).softmax(1)
        inside = by_product(theirs[real], ours[real], draw.labels) + F.kl_div(
            logits[real][:, self.seen].log_softmax(1), known[real].softmax(1), reduction="batchmean"
        )
        own = self.networks["head"].fc(logits.log_softmax(1)).softmax(1)
        terms = F.nll_loss(logits.log_softmax(1), labels) + inside + by_product(own, code, labels)
        (self.weight * terms).backward()
        return terms


def through(network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Both layers of a generator or critic, with inputs and attributes side by side."""
    hidden = network.fc1(torch.cat([inputs, network.attributes[labels]], 1))
    return network.fc2(F.leaky_relu(hidden, zero_shot.SLOPE))


class Bare(ZeroShot):
    """A task without files: random samples, five batches of them, and untrained networks."""

    def __init__(self, size: Size, parameters: D3GZSL, dtype: torch.dtype) -> None:
        classes = size.seen + size.unseen
        self.seed, self.clip, self.training, self.network = 0, None, parameters.training, {}
        self.run = SimpleNamespace(device=torch.device("cpu"), dtype=dtype)
        self.interface = {"features": size.features, "classes": [str(label) for label in range(classes)]}
        self.seen, self.others = torch.arange(classes).split([size.seen, size.unseen])
        self.attributes = torch.rand(classes, size.attributes, dtype=dtype)
        self.teacher = zero_shot.MLP(size.features, size.seen, size.embedding).to(dtype).requires_grad_(False)
        self.student = zero_shot.MLP(size.features, classes, size.embedding).to(dtype)
        zero_shot.initialise(self.teacher, self.student.embedding)
        rows = 5 * size.batch
        self.train = Split(torch.rand(rows, size.features, dtype=dtype), torch.randint(size.seen, (rows,)))
        # So that nothing but steps is timed.
        self.steps = self.steps_per_epoch = 10**9


def iteration(size: Size, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """Fresh networks on both sides; every call is the next iteration of its side, over the same draws."""
    parameters = D3GZSL.model_validate(
        {
            "task": "zero_shot",
            "dataset": "bare",
            "method": "d3gzsl",
            "teacher": "bare",
            "network": {"name": "mlp", "hidden": size.embedding},
            "generator": {"name": "clswgan", "hidden": size.hidden},
            "distribution": {"per_class": size.per_class},
            "training": {"batch": size.batch, "accelerator": "cpu", "precision": f"{8 * dtype.itemsize}-true"},
        }
    )
    task, run = Bare(size, parameters, dtype), Run(parameters.training)
    learner = Learner(task, parameters, run)
    networks = {name: net for name, net in learner.modules.items() if name not in ("latest", "kept")}
    context, stream = Context(learner, run, task.seed), learner.streams["train"]

    def begin() -> None:
        stream.position = 0
        context.begin(0)

    def ours() -> list[Tensor]:
        begin()
        found = learner.step(context)
        terms = [found[f"loss/{name}"].detach() for name in ("classification", "embedding", "labels", "distribution")]
        own = [found[f"loss/{name}"].detach() for name in ("critics/critic", "critics/penalty", "generator/generator")]
        return [*own, torch.stack(terms).sum()]

    begin()
    steps, random = [], context.generator("noise")
    for update in range(6):
        if update < 5:
            real, labels, _ = context.draw("train")
        noise = torch.randn(size.mixed, size.attributes, generator=random, dtype=dtype)
        mix = torch.rand(size.batch, 1, generator=random, dtype=dtype) if update < 5 else None
        steps.append(Draw(real, labels, noise[: size.batch], mix, noise[size.batch :]))
    theirs = {
        name: Official(networks, task.seen, task.others, 1e-4, fixed)
        for name, fixed in (("product", False), ("product, generator fixed", True))
    }
    return {"ours": ours, **{name: partial(side, steps) for name, side in theirs.items()}}


CASES = {"embedding loss": embeddings, "distribution loss": codes, "class scores": scores, "outer iteration": iteration}


def main() -> None:
    """Print a table, a row per comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example, from the root of the project: PYTHONPATH=. python benchmarks/speed_d3gzsl.py --size bench "
        "--clock processor --threads 1 --repetitions 5",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--size", choices=SIZES, default="cub")
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    size = SIZES[arguments.size]
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, {torch.backends.cpu.get_cpu_capability()}, float32, "
        f"{arguments.repetitions} repetitions, {arguments.clock} clock\n{size}\n"
    )
    print("| what | against | theirs, ms | ours, ms | ratio (median) | (shortest) | floor, ms | ours / floor |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for case in arguments.cases:
        agree(CASES[case](SIZES["small"], torch.float64), 1e-9)
        calls = CASES[case](size)
        agree(calls, 1e-2)
        found = timed(calls, arguments.repetitions, CLOCKS[arguments.clock])
        middle, least = ({name: f(times) for name, times in found.items()} for f in (statistics.median, min))
        for name in list(calls)[1:]:
            cells = [
                *(case, name, f"{1e3 * middle[name]:.2f}", f"{1e3 * middle['ours']:.2f}"),
                *(f"{times[name] / times['ours']:.2f}" for times in (middle, least)),
                *(
                    f"{1e3 * middle['floor']:.2f}",
                    f"{middle['ours'] / middle['floor']:.2f}" if middle["floor"] else "-",
                ),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
