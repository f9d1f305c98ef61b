"""GDD's loss block, forward and backward: the plain form against the fast one, in one run.

The block is everything between the student's feature map and its loss: align layer, noise, generator, channel-wise KL,
and the gradients of the map and of every trained weight. Both forms are measured in both memory formats and compared
best with best; repetitions of all of them alternate, so that whatever else the machine does meets them alike. A figure
is a ratio within one run. On a machine that is busy otherwise, `--clock processor --threads 1` counts the processor's
time instead of the wall's. `share` is the multiply-adds of the fast form as a share of the plain form's; `auto` is what
`form: auto` chooses. Memory is what is kept for backward, and the most that is held at a time (inputs left out).
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from stages.distill.gdd import PAYS, draw_noise, fused_share, generate
from stages.training import Generator, channel_divergence

# samples, student's channels, teacher's channels, height, width
SIZES = (
    "8x64x256x32x32",
    "8x32x128x24x32",
    "8x16x64x12x12",
    "4x128x256x32x32",
    "4x64x128x48x48",
    "2x128x512x32x32",
    "4x192x256x32x32",
    "1x128x512x4x4",
)
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
MIB = 2**20


class Size(NamedTuple):
    samples: int
    student: int
    teacher: int
    height: int
    width: int

    @classmethod
    def read(cls, text: str) -> "Size":
        """From SAMPLESxSTUDENTxTEACHERxHEIGHTxWIDTH."""
        try:
            size = cls(*map(int, text.split("x")))
        except (ValueError, TypeError):
            raise argparse.ArgumentTypeError(f"{text!r} is not five numbers as in {SIZES[0]}") from None
        if min(size) < 1:
            raise argparse.ArgumentTypeError(f"{text!r}: every number must be at least 1")
        return size

    @property
    def share(self) -> float:
        return fused_share(self.samples * self.height * self.width, self.student, self.teacher)


def block(size: Size, layout: torch.memory_format, fast: bool) -> Callable[[], list[Tensor]]:
    """One call: loss and gradients of one step."""
    torch.manual_seed(0)
    generator = Generator(size.student, size.teacher).to(memory_format=layout)  # type: ignore[call-overload]
    generator.second.bias.requires_grad_(False)
    shape = (size.samples, size.height, size.width)
    student, teacher = (
        torch.rand(shape[0], channels, *shape[1:]).to(memory_format=layout) for channels in (size.student, size.teacher)
    )
    student.requires_grad_()
    leaves = [student, *(parameter for parameter in generator.parameters() if parameter.requires_grad)]
    random = torch.Generator()

    def step() -> list[Tensor]:
        noise = draw_noise(student, size.teacher, generator=random.manual_seed(0))
        loss = channel_divergence(generate(student, generator, noise, fast), teacher, closed_form=fast)
        return [loss, *torch.autograd.grad(loss, leaves)]

    return step


def kept(step: Callable[[], list[Tensor]]) -> int:
    """Bytes that one call keeps for backward: every storage once, weights and inputs included."""
    sizes: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        held.append(x)
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step()
    return sum(sizes.values())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Some builds of torch note on stderr that the profiler starts and stops, below Python."""
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak(step: Callable[[], list[Tensor]]) -> int:
    """The most bytes that one call holds at a time, by the allocator's own record; inputs and weights were there."""
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = step()
    del result
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def measure(size: Size, repetitions: int, clock: Callable[[], float]) -> str:
    """One row of the table."""
    steps = {
        (form, name): block(size, layout, form == "fast")
        for form in ("plain", "fast")
        for name, layout in FORMATS.items()
    }
    reference = [x.double() for x in steps["plain", "NCHW"]()]
    for key, step in steps.items():
        for found, expected in zip(step(), reference, strict=True):
            off = (found.double() - expected).abs().max() / expected.abs().max()
            assert off < 1e-3, f"{key} differs from the plain form by {off:.1g} of its largest value"
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(repetitions):
        for key, step in steps.items():
            start = clock()
            step()
            times[key].append(clock() - start)
    best = {
        form: min((key for key in steps if key[0] == form), key=lambda key: min(times[key]))
        for form in ("plain", "fast")
    }
    least = {form: min(times[key]) for form, key in best.items()}
    middle = {form: statistics.median(times[key]) for form, key in best.items()}
    memory = {form: (kept(steps[key]) / MIB, peak(steps[key]) / MIB) for form, key in best.items()}
    cells = [
        "x".join(map(str, size)),
        *(f"{1e3 * least[form]:.1f} {best[form][1]}" for form in ("plain", "fast")),
        f"{least['plain'] / least['fast']:.2f}",
        f"{middle['plain'] / middle['fast']:.2f}",
        f"{1 / size.share:.2f}",
        "fast" if size.share < PAYS else "plain",
        f"{memory['plain'][0]:.1f} / {memory['fast'][0]:.1f}",
        f"{memory['plain'][1]:.1f} / {memory['fast'][1]:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = """\
| size | plain, ms | fast, ms | speed-up (least) | (median) | (multiply-adds) | auto | kept, MiB | peak, MiB |
|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Print a table, a row per size."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example, from the root of the project: "
        "PYTHONPATH=. python benchmarks/speed_gdd.py --repetitions 20 --sizes 8x64x256x32x32 8x16x64x12x12",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument(
        "--sizes",
        type=Size.read,
        nargs="+",
        default=[Size.read(size) for size in SIZES],
        metavar="SIZE",
        help="samples x student's channels x teacher's channels x height x width",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"float32, {arguments.repetitions} repetitions, {arguments.clock} clock\n"
    )
    print(HEADER, flush=True)
    for size in arguments.sizes:
        print(measure(size, arguments.repetitions, CLOCKS[arguments.clock]), flush=True)


if __name__ == "__main__":
    main()
