"""HORKD's losses against the definitions, forward and backward, in one run; then beside a student's step.

The whole loss is L1 (with its projection) + 25 L2 + 50 L3 of one batch, float32, 512 wide on the teacher's side and 128
on the student's. `dense` is written straight from the definitions, with arrays of B x B x D differences and B x B x B
cosines; `compiled` and `blocks` are the forms of `stages/relations`. All get equal embeddings and have to give equal
values and gradients, in float64 and in float32, before any time is taken. Repetitions of all sides alternate; a figure
is a ratio within one run, of medians and of the shortest times.

The floor is the time of the matrix products that our side makes, each by itself, and of 8 multiplications for each of
B^3 / 2 triplets at the rate of multiply-adds in a matrix product, all in the same run. Memory is what a process of its
own holds at most during one call, above what it held before, after a call of half the batch (Linux with glibc alone).

The student's step is that of a ResNet with the widths of ResNet-18 on images of 32x32: forward, cross-entropy, backward
and SGD, without relations. `relations` are L2 and L3 of its 512 pooled features, compiled; `source` is a forward pass
of the same network on images of 64x64, as an assistant makes it.
"""

import argparse
import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed_d3gzsl import CLOCKS, Call, timed
from benchmarks.timing import agree
from models.recognition import build
from stages.distill.horkd import point_loss, relation_losses

TEACHER, STUDENT = 512, 128
PAIRS, TRIPLETS = 25, 50
FORMS = ("compiled", "blocks")
MULTIPLICATIONS = 8  # of a triplet: 2 for each cosine, 2 for the penalty, 1 each for its weight and its share of a norm
RESNET18 = {"name": "resnet", "widths": [64, 128, 256, 512], "blocks": 2, "embedding": None}


def definitions(student: Tensor, teacher: Tensor, projection: Tensor) -> Tensor:
    """The whole loss, as one writes it down."""
    count = len(student)
    sides = []
    for points in (student, teacher):
        differences = points[None] - points[:, None]
        distances = differences.norm(dim=2)
        directions = F.normalize(differences, dim=2)
        sides.append((distances / (distances.sum() / (count * (count - 1))), directions @ directions.mT))
    (psi, cosines), (their_psi, their_cosines) = sides
    points = F.mse_loss(student @ projection.T, teacher)
    return points + PAIRS * F.smooth_l1_loss(psi, their_psi) + TRIPLETS * F.smooth_l1_loss(cosines, their_cosines)


def ours(form: str, student: Tensor, teacher: Tensor, projection: Tensor) -> Tensor:
    """The whole loss, as the learner computes it."""
    pairs, triplets = relation_losses(student, teacher, form=form)
    return point_loss(student @ projection.T, teacher) + PAIRS * pairs + TRIPLETS * triplets


def sides(batch: int, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """Every call: value, and gradients of embeddings and projection. `ours` is the compiled form."""
    torch.manual_seed(0)
    student, teacher = torch.randn(batch, STUDENT, dtype=dtype), torch.randn(batch, TEACHER, dtype=dtype)
    projection = torch.randn(TEACHER, STUDENT, dtype=dtype) / STUDENT**0.5
    leaves = [student.requires_grad_(), projection.requires_grad_()]

    def call(form: str) -> Sequence[Tensor]:
        loss = definitions if form == "dense" else partial(ours, form)
        value = loss(student, teacher, projection)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    return {"ours": partial(call, "compiled"), "blocks": partial(call, "blocks"), "dense": partial(call, "dense")}


def rate(repetitions: int) -> float:
    """Multiply-adds per second in a float32 matrix product."""
    matrix, times = torch.rand(512, 512), []
    for _ in range(5 * repetitions):
        begun = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - begun)
    return 512**3 / min(times)


def held(what: str) -> int:
    """KiB that this process holds (VmRSS), or has held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1])


def added(form: str, batch: int) -> float:
    """MiB that one call adds at most, in this process; a call of half the batch has loaded what is loaded once."""
    name = "ours" if form == "compiled" else form
    sides(batch // 2)[name]()
    call = sides(batch)[name]
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back
    Path("/proc/self/clear_refs").write_text("5")  # the most held so far is forgotten
    before = held("VmRSS")
    call()
    return (held("VmHWM") - before) / 2**10


def losses(batches: Sequence[int], repetitions: int, threads: int, clock: str) -> None:
    """Print the table of losses."""
    print(
        "| B | form | median, ms (least) | dense / form (median) | (least) | floor, ms | least / floor | added, MiB |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    agree(sides(24, torch.float64), 1e-9)
    for batch in batches:
        calls = sides(batch)
        agree(calls, 1e-4)
        found = timed(calls, repetitions, CLOCKS[clock])
        floor = min(found.pop("floor")) + MULTIPLICATIONS * batch**3 / 2 / rate(repetitions)
        middle, least = ({name: f(times) for name, times in found.items()} for f in (statistics.median, min))
        for name in calls:
            form = "compiled" if name == "ours" else name
            options = ["--added", form, "--batches", str(batch), "--threads", str(threads)]
            memory = "-"
            if Path("/proc/self/clear_refs").exists():
                done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=True)
                memory = done.stdout.strip()
            cells = [
                *(str(batch), form, f"{1e3 * middle[name]:.2f} ({1e3 * least[name]:.2f})"),
                *(f"{times['dense'] / times[name]:.1f}" for times in (middle, least)),
                *(f"{1e3 * floor:.2f}", f"{least[name] / floor:.1f}", memory),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


def step(repetitions: int, clock: str, batch: int = 128) -> None:
    """Print what relations add to a student's step."""
    torch.manual_seed(0)
    interface = {"classes": list(range(100)), "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
    network = build({"network": RESNET18, "interface": interface}).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    small, large = (torch.rand(batch, 3, s, s).contiguous(memory_format=torch.channels_last) for s in (32, 64))
    labels = torch.randint(100, (batch,))

    def student() -> None:
        F.cross_entropy(network.train()(small).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def source() -> Tensor:
        with torch.no_grad():
            pooled: Tensor = network.eval()(large).pooled
        return pooled

    theirs = source()
    embeddings = (theirs + theirs.std() * torch.randn_like(theirs)).requires_grad_()

    def relations() -> None:
        pairs, triplets = relation_losses(embeddings, theirs, form="compiled")
        torch.autograd.grad(PAIRS * pairs + TRIPLETS * triplets, embeddings)

    parts = {"relations": relations, "student's step": student, "source": source}
    times: dict[str, list[float]] = {name: [] for name in parts}
    now = CLOCKS[clock]
    relations()
    for _ in range(repetitions):
        for name, part in parts.items():
            begun = now()
            part()
            times[name].append(now() - begun)
    whole = {f: f(times["student's step"]) for f in (statistics.median, min)}
    print(f"\nB {batch}, {sum(p.numel() for p in network.parameters()):,} parameters\n")
    print("| part | median, ms | least, ms | share of a step (median) | (least) |\n|---|---|---|---|---|")
    for name, found in times.items():
        cells = [f"{1e3 * f(found):.1f}" for f in whole] + [f"{f(found) / seconds:.2%}" for f, seconds in whole.items()]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example, from the root of the project: "
        "PYTHONPATH=. python benchmarks/speed_horkd.py --batches 64 128 --repetitions 15",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--added", choices=("dense", *FORMS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.added:
        print(f"{added(arguments.added, arguments.batches[0]):.1f}")
        return
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, {torch.backends.cpu.get_cpu_capability()}, float32, "
        f"{arguments.repetitions} repetitions, {arguments.clock} clock\n"
    )
    losses(arguments.batches, arguments.repetitions, arguments.threads, arguments.clock)
    step(max(3, arguments.repetitions // 3), arguments.clock)


if __name__ == "__main__":
    main()
