"""A whole training step of every student of a task, against what its multiply-adds cost at the machine's rate.

Students, data and teachers are those of params.yaml in the working directory, so `dvc repro` comes first. Steps of all
students alternate, so that whatever else the machine does meets them alike; a figure is a ratio within one run. The
rate is that of a 3x3 convolution of 64 channels on maps of 64x64 in the better memory format, forward and backward.
`floor` is the multiply-adds of a step (forward and backward, counted by torch) at this rate: what no form of the same
mathematics beats. A student with a `form` is measured in both.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.artifacts import load_model
from stages import paths
from stages.command import errors_told
from stages.parameters import TASKS, load
from stages.training import Context, Method, Run


def learner(name: str, entry: Any) -> Method:
    """As `python -m stages.distill` makes it."""
    run = Run(entry.training)
    teacher = None if entry.teacher == "none" else load_model(paths.trained(entry.task, entry.teacher))
    task = importlib.import_module(f"stages.teach.{entry.task}")
    method = importlib.import_module(f"stages.distill.{entry.method}")
    prepared = paths.prepared(entry.task, entry.dataset)
    found: Method = method.Learner(task.for_student(entry, prepared, run, teacher), entry, run)
    for part, module in found.modules.items():
        module.train(part not in found.frozen)
        if part in found.frozen:
            module.requires_grad_(False)
    return found


def stepper(method: Method, entry: Any) -> Callable[[], None]:
    """One call: one step."""
    context = Context(method, Run(entry.training), entry.training.seed)
    count = iter(range(10**9))

    def step() -> None:
        context.begin(next(count))
        method.step(context)

    return step


def stale(error: Exception) -> str | None:
    """What data or a teacher that is missing, or of older code, looks like."""
    if isinstance(error, KeyError | OSError):
        return f"data or a teacher is missing, or of older code ({error!r}) · run `dvc repro` first"
    return None


def rate(repetitions: int) -> float:
    """Multiply-adds per second of a convolution, forward and backward; the better of both memory formats."""
    best = 0.0
    for layout in (torch.contiguous_format, torch.channels_last):
        layer = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=layout)  # type: ignore[call-overload]
        images = torch.rand(8, 64, 64, 64).to(memory_format=layout).requires_grad_()
        for _ in range(repetitions):
            begun = time.perf_counter()
            layer(images).sum().backward()
            seconds = time.perf_counter() - begun
            best = max(best, 3 * 8 * 64 * 64 * 64 * 64 * 9 / seconds)
    return best


def main() -> None:
    """Print a table, a row per student."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example, from the root of the project: PYTHONPATH=. python benchmarks/speed_step.py segmentation",
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=40)
    arguments = parser.parse_args()
    students: dict[str, Any] = {}
    for name, student in load().students.items():
        if student.task == arguments.task:
            settings = student.training.model_copy(update={"threads": arguments.threads, "accelerator": "cpu"})
            entry: Any = student.model_copy(update={"training": settings})
            for form in ("plain", "fast") if hasattr(entry, "form") else (None,):
                key = f"{name} ({form})" if form else name
                students[key] = entry.model_copy(update={"form": form}) if form else entry
    with errors_told(f"speed_step {arguments.task}", stale):
        steps = {key: stepper(learner(key, entry), entry) for key, entry in students.items()}
    torch.set_num_threads(arguments.threads)
    counts = {}
    for key, step in steps.items():
        step()
        with FlopCounterMode(display=False) as counter:
            step()
        counts[key] = counter.get_total_flops() / 2
    speed = rate(10)
    times: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(arguments.repetitions):
        for key, step in steps.items():
            begun = time.perf_counter()
            step()
            times[key].append(time.perf_counter() - begun)
    print(f"torch {torch.__version__}, {arguments.threads} threads, {speed / 1e9:.1f} GMAC/s in a convolution\n")
    print("| student | median, ms | least, ms | multiply-adds, GMAC | floor, ms | least / floor |")
    print("|---|---|---|---|---|---|")
    for key, found in times.items():
        floor = counts[key] / speed
        print(
            f"| {key} | {1e3 * statistics.median(found):.1f} | {1e3 * min(found):.1f} | {counts[key] / 1e9:.3f} "
            f"| {1e3 * floor:.1f} | {min(found) / floor:.1f} |"
        )


if __name__ == "__main__":
    main()
