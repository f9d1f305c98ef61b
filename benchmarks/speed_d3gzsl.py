"""D3GZSL against the official code, forward and backward, in one run: its losses, and a whole outer iteration.

Official are the forms that the D3GZSL card (section 8) describes, written anew: embeddings and codes compared pair by
pair, or by a matrix product; the comparator sample by sample; and an outer iteration (five updates of the critic and
one of the generator, with all losses of D3) by matrix products, with a generator's pass for seen and one for unseen
classes, the gradient penalty by double backward, the teacher on all rows every time, and Adam as torch has it by
default. In the critic's phase it keeps the graph of the synthesised rows and goes back through the generator for
nothing; `fixed` is the same without that. Ours is the learner itself.

Both sides get equal weights, batches and noise, and have to give equal values, which is checked before any time is
taken. Repetitions of all sides alternate; times are medians, and a figure is a ratio within one run. `floor` is the time
of the matrix products that our side makes, each of its shape and layout by itself, in the same run.
"""

import argparse
import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import zero_shot
from stages.distill.d3gzsl import distribution_loss, embedding_loss, unit
from stages.generators.cegzsl import class_loss

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


def timed(calls: dict[str, Call], repetitions: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of every call, and of the matrix products of `ours` as `floor`; all of them alternate."""
    parts = products(calls["ours"])
    times: dict[str, list[float]] = {name: [] for name in (*calls, "floor")}
    for _ in range(repetitions):
        for name, call in calls.items():
            begun = clock()
            call()
            times[name].append(clock() - begun)
        floor = 0.0
        for product, count in parts:
            product()
            begun = clock()
            product()
            floor += count * (clock() - begun)
        times["floor"].append(floor)
    return {name: statistics.median(found) for name, found in times.items()}


def agree(calls: dict[str, Call], relative: float) -> None:
    """Refuse to compare what does not compute the same; each value within a share of its largest number."""
    expected = calls["ours"]()
    for name, call in calls.items():
        for found, wanted in zip(call(), expected, strict=True):
            off = (found - wanted).abs().max().item()
            assert off <= relative * wanted.abs().max().item(), f"{name} differs by {off:.2g}"


def same(labels: Tensor) -> Tensor:
    return (labels[:, None] == labels).float()


def pair_by_pair(rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
    """Every pair of rows side by side."""
    count = len(rows)
    cosines = F.cosine_similarity(rows.repeat_interleave(count, 0), columns.repeat(count, 1), eps=1e-8)
    return F.binary_cross_entropy_with_logits((1 + cosines) / 2, same(labels).flatten())


def by_product(rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
    """Rows of length 1, then one matrix product."""
    rows, columns = (x / x.norm(dim=1, keepdim=True) for x in (rows, columns))
    similarity = (1 + rows @ columns.T) / 2
    return (torch.log(1 + similarity.exp()) - same(labels) * similarity).mean()


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


def embeddings(size: Size) -> dict[str, Call]:
    """Teacher's and student's, after a ReLU. What the teacher says of real rows is known from the beginning."""
    teacher, student = (torch.randn(size.batch, size.embedding).relu() for _ in range(2))
    labels, known = torch.randint(size.seen, (size.batch,)), unit(teacher)
    student.requires_grad_()
    return {
        "ours": with_gradients(lambda: embedding_loss(known, student, labels, unit_teacher=True), [student]),
        "pairs": with_gradients(pair_by_pair, [student], teacher, student, labels),
        "product": with_gradients(by_product, [student], teacher, student, labels),
    }


def codes(size: Size) -> dict[str, Call]:
    student, teacher = ((2 * torch.randn(size.mixed, 2)).softmax(1).requires_grad_() for _ in range(2))
    labels = torch.randint(size.seen + size.unseen, (size.mixed,))
    return {
        "ours": with_gradients(distribution_loss, [student, teacher], student, teacher, labels),
        "pairs": with_gradients(pair_by_pair, [student, teacher], student, teacher, labels),
        "product": with_gradients(by_product, [student, teacher], student, teacher, labels),
    }


def scores(size: Size) -> dict[str, Call]:
    comparator = zero_shot.Comparator(size.embedding, size.attributes, size.embedding)
    hidden, attributes = torch.rand(size.scored, size.embedding).requires_grad_(), torch.rand(size.seen, size.attributes)
    targets = torch.randint(size.seen, (size.scored,))
    leaves = [hidden, *comparator.parameters()]

    def loss(score: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: class_loss(score(), targets, 0.1)

    return {
        "ours": with_gradients(loss(lambda: comparator(hidden, attributes)), leaves),
        "loop": with_gradients(loss(lambda: sample_by_sample(comparator, hidden, attributes)), leaves),
    }
