"""Measure latency, size and parameters of a task's teachers and exported students in ONNX Runtime.

Not a stage: it holds times. Run it while nothing else runs on the machine. What goes in are samples of the validation
split at their full size: texts are padded to the longest that their data set allows. A batch that would not fit into
memory is left out, and so is a teacher that has not learnt its task.
"""

import importlib
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError
from data.files import sha256, write_json
from models.artifacts import load_model, read_description
from stages import command, paths
from stages.export.onnx_graph import FILE, output_names, session, write_onnx
from stages.parameters import load, select

BATCHES = (1, 32)
# A batch beyond one is left out where its inputs and outputs hold more numbers than this: a gigabyte of float32, to
# which comes what lies between. (32 images of 1024x2048 with 19 classes are six.)
NUMBERS = 2**28
WARM_UP, SECONDS, LEAST = 10, 1.0, 30
# After so many seconds a few runs are enough: those of large images take seconds each and differ little.
LONGEST, FEW = 30.0, 5


def main(key: str) -> None:
    """Measure all models of the task `key` that are deployed, and their teachers."""
    parameters = load()
    select(parameters.tasks, key, "task")
    task = importlib.import_module(f"stages.export.{key}")
    exports = {name: export for name, export in parameters.exports.items() if export.task == key}
    for name in exports:
        if not (paths.exported(key, name) / FILE).is_file():
            raise UserError(f"{paths.exported(key, name) / FILE} is missing · run `dvc repro export@{name}`")
    threads = max((export.threads for export in exports.values()), default=1)
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="distillery-") as folder:
        for name, entry in parameters.teachers.items():
            if entry.task == key and not entry.pretrained:
                network, description = load_model(paths.trained(key, name))
                inputs, _ = task.inputs(paths.prepared(key, entry.dataset), description)
                file = Path(folder) / f"{name}.onnx"
                example = {given: array[:2] for given, array in inputs.items()}
                graph = task.Graph(network)
                write_onnx(graph, example, output_names(task, graph), task.AXES, file)
                measured[name] = _measure(file, inputs, threads, description.parameters)
        for name, export in exports.items():
            description = read_description(paths.trained(key, name))
            inputs, _ = task.inputs(paths.prepared(key, export.dataset), description)
            measured[name] = _measure(paths.exported(key, name) / FILE, inputs, threads, description.parameters)
    write_json(
        paths.latency(key),
        {
            "task": key,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": {"processor": _processor(), "cores": os.cpu_count()},
            "threads": threads,
            "inputs": task.MEASURED,
            "models": measured,
        },
    )
    for name, values in measured.items():
        cells = [f"batch {batch}: p50 {found['p50']:.2f} ms" for batch, found in values["latency_ms"].items()]
        print(f"{name:30s} {values['parameters']:>10,} parameters {values['bytes']:>12,} bytes  {', '.join(cells)}")


def _measure(file: Path, inputs: Mapping[str, np.ndarray], threads: int, parameters: int) -> dict[str, Any]:
    runtime = session(file, threads)
    latency = {}
    one = {name: array[:1] for name, array in inputs.items()}
    numbers = sum(array.size for array in [*one.values(), *runtime.run(None, one)])
    for batch in BATCHES:
        if batch > 1 and batch * numbers > NUMBERS:
            continue
        feed = {name: np.resize(array, (batch, *array.shape[1:])) for name, array in inputs.items()}
        run = partial(runtime.run, None, feed)
        _times(run, WARM_UP, 0)
        p50, p95 = np.percentile(times := _times(run, LEAST, SECONDS), (50, 95))
        latency[str(batch)] = {"p50": round(float(p50), 4), "p95": round(float(p95), 4), "runs": len(times)}
    return {
        "onnx_sha256": sha256(file),
        "parameters": parameters,
        "bytes": file.stat().st_size,
        "latency_ms": latency,
    }


def _times(run: Callable[[], object], least: int, seconds: float) -> list[float]:
    """Milliseconds of each of at least `least` runs in at least `seconds`, or of FEW once LONGEST is over."""
    times: list[float] = []
    start = now = time.perf_counter()
    while (len(times) < least or now - start < seconds) and (len(times) < FEW or now - start < LONGEST):
        begun = time.perf_counter()
        run()
        now = time.perf_counter()
        times.append((now - begun) * 1000)
    return times


def _processor() -> str:
    """The name of the processor, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    command.run("latency", __doc__, main, key="task", example="recognition")
