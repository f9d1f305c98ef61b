"""The loop: outer steps, checkpoints, records and progress."""

import contextlib
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.errors import UserError
from data.files import digest, write_file
from stages import paths
from stages.records import FILE, Record
from stages.training.method import Context, Method
from stages.training.run import Run

log = logging.getLogger("distillery")

CHECKPOINT = "checkpoint.pt"
RECORD_EVERY = 10
LOG_SECONDS = 15.0


class Stopped(SystemExit):
    """Training was asked to end (SIGTERM), has saved itself, and will go on when it is started again."""


def train(
    method: Method,
    run: Run,
    *,
    stage: str,
    key: str,
    steps: int,
    seed: int,
    identity: Mapping[str, Any],
    monitor: Callable[[], Mapping[str, float]] | None = None,
    monitor_every: int = 0,
    checkpoint_seconds: float | None = None,
) -> Path:
    """Train for `steps` outer steps, resuming where an earlier process of the same identity stopped.

    Args:
        stage, key: whose training this is; names the folder of the checkpoint.
        identity: parameters and digests of inputs and code. With the version of torch, threads, device and number of
            processes it decides which checkpoint may be resumed.
        monitor: figures on held-out data, asked for every `monitor_every` steps and at the end. It must not train.
        checkpoint_seconds: the time between two checkpoints, DISTILLERY_CHECKPOINT_SECONDS or 20 by default. It
            decides what a crash costs, never the result.

    Returns:
        the record, beside the checkpoint; both are the caller's to remove once the output is complete.

    Raises:
        UserError: a recorded value is not finite (step and term are named), or the disk is full.
        Stopped: SIGTERM or SIGINT arrived; the state is saved, the exit status is 128 + the signal's number.
    """
    if checkpoint_seconds is None:
        checkpoint_seconds = _checkpoint_seconds()
    name = digest({**identity, "steps": steps, "seed": seed, "environment": run.environment})
    folder = paths.checkpoints(stage, key) / name[:16]
    context = Context(method, run, seed)
    _prepare(method)
    lead = run.rank == 0
    state = _load(folder, run)
    run.barrier()
    header = {"stage": stage, "key": key, "digest": name}
    record = Record(folder / FILE, header, state["record"] if state else 0) if lead else None
    start = _restore(state, method, context) if state else 0
    if start and lead:
        log.info("%s %s: going on at step %d", stage, key, start)
    pending: list[tuple[int, dict[str, Tensor]]] = []
    saved_at = time.monotonic()
    progress = _Progress(f"{stage} {key}", start, steps) if lead else None
    with _termination() as terminated:
        for step in range(start, steps):
            context.begin(step)
            scalars = method.step(context)
            run.share_buffers([module for part, module in method.modules.items() if part not in method.frozen])
            norms = {f"gradient/{part}": norm for part, norm in context.norms.items()}
            pending.append((step, {part: value.detach() for part, value in {**scalars, **norms}.items()}))
            done = step + 1
            look_after = monitor is not None and bool(monitor_every) and (done % monitor_every == 0 or done == steps)
            # A look at the values costs an accelerator its head start: there they are looked at in groups.
            if not (run.device.type == "cpu" or done % RECORD_EVERY == 0 or done == steps or look_after):
                continue
            shown = _flush(pending, run, record, steps)
            if progress:
                progress.advance(done, shown)
            if monitor and look_after and record:
                figures = {f"validation/{part}": value for part, value in monitor().items()}
                record.write(step, figures)
                if progress:
                    progress.note(figures)
            # All processes have to agree, and their clocks do not.
            stop, due = run.any(bool(terminated), lead and time.monotonic() - saved_at > checkpoint_seconds)
            if done < steps and (stop or due):
                if record:
                    _save(folder / CHECKPOINT, method, context, record, done)
                saved_at = time.monotonic()
            if stop and done < steps:
                if progress:
                    progress.close(f"stopped after step {done} of {steps}; the same command goes on there")
                raise Stopped(128 + (terminated[0] if terminated else signal.SIGTERM))
    if progress:
        progress.close(f"{steps - start} steps")
    return folder / FILE


def _prepare(method: Method) -> None:
    for name, module in method.modules.items():
        frozen = name in method.frozen
        module.train(not frozen)
        if frozen:
            module.requires_grad_(False)


def _flush(
    pending: list[tuple[int, dict[str, Tensor]]],
    run: Run,
    record: Record | None,
    steps: int,
) -> dict[str, float]:
    """Check what steps returned, write down every RECORD_EVERY-th and the last; returns the newest values."""
    values: dict[str, float] = {}
    for step, scalars in pending:
        run.mean_(list(scalars.values()))
        stacked = torch.stack([value.to(run.device, run.dtype) for value in scalars.values()]).tolist()
        values = dict(zip(scalars, stacked, strict=True))
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{name} became {value} at step {step} of {steps}; the last checkpoint is from before · "
                    "lower the learning rate or the term's weight, or set training.clip"
                )
        if record and ((step + 1) % RECORD_EVERY == 0 or step + 1 == steps):
            record.write(step, values)
    pending.clear()
    return values


def _save(path: Path, method: Method, context: Context, record: Record, step: int) -> None:
    state = {
        "step": step,
        "counts": context.counts,
        "modules": {name: module.state_dict() for name, module in method.modules.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in method.optimizers.items()},
        "streams": {name: stream.position for name, stream in method.streams.items()},
        "method": method.state(),
        "record": record.length(),
    }
    write_file(path, lambda file: torch.save(state, file))


def _load(folder: Path, run: Run) -> dict[str, Any] | None:
    """The checkpoint; None if there is none, or if its record is gone: the whole is done again then, alike."""
    path, record = folder / CHECKPOINT, folder / FILE
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=run.device, weights_only=True)
    except Exception as error:  # a damaged file makes torch's reader fail in every way there is
        log.warning("%s cannot be read (%s): training starts anew", path, type(error).__name__)
        return None
    return state if record.is_file() and record.stat().st_size >= state["record"] else None


def _restore(state: dict[str, Any], method: Method, context: Context) -> int:
    """Put everything back as it was, in every process; returns the step to go on with."""
    for name, module in method.modules.items():
        module.load_state_dict(state["modules"][name])
    for name, optimizer in method.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    for name, stream in method.streams.items():
        stream.position = state["streams"][name]
    context.counts.update(state["counts"])
    method.load_state(state["method"])
    step: int = state["step"]
    return step


def _checkpoint_seconds() -> float:
    text = os.environ.get("DISTILLERY_CHECKPOINT_SECONDS", "20")
    try:
        return float(text)
    except ValueError:
        raise UserError(f"DISTILLERY_CHECKPOINT_SECONDS must be a number of seconds, got {text!r}") from None


@contextlib.contextmanager
def _termination() -> Iterator[list[int]]:
    """A list that is no longer empty once SIGTERM or SIGINT has arrived."""
    arrived: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        arrived.append(signum)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """A bar on a terminal; elsewhere a line every LOG_SECONDS, with the time left."""

    def __init__(self, title: str, start: int, steps: int) -> None:
        self._title, self._start, self._steps = title, start, steps
        self._begun = self._spoken = time.monotonic()
        self._figures = ""
        self._bar = tqdm(total=steps, initial=start, desc=title, unit="step") if sys.stderr.isatty() else None

    def advance(self, done: int, values: Mapping[str, float]) -> None:
        losses = ", ".join(f"{name} {value:.3g}" for name, value in values.items() if not name.startswith("gradient/"))
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, (losses, self._figures))), refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._spoken > LOG_SECONDS:
            self._spoken = now
            left = (now - self._begun) / (done - self._start) * (self._steps - done)
            text = ", ".join(filter(None, (losses, self._figures)))
            log.info("%s: step %d of %d, %s, %.0f s left", self._title, done, self._steps, text, left)

    def note(self, figures: Mapping[str, float]) -> None:
        self._figures = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())

    def close(self, outcome: str) -> None:
        if self._bar is not None:
            self._bar.close()
        seconds = f"{outcome}, {time.monotonic() - self._begun:.0f} s"
        log.info("%s: %s", self._title, ", ".join(filter(None, (seconds, self._figures))))
