"""Measure latency, size and parameters of a task's teachers and exported students in ONNX Runtime.

Not a stage: it holds times. Run it while nothing else runs on the machine.
"""

import importlib
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError
from data.files import sha256, write_json
from models.artifacts import load_model, read_description
from stages import command, paths
from stages.export.onnx_graph import FILE, session, write_onnx
from stages.parameters import load, select

BATCHES = (1, 32)
WARM_UP, SECONDS, LEAST = 10, 1.0, 30


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
            if entry.task == key:
                network, description = load_model(paths.trained(key, name))
                inputs, _ = task.inputs(paths.prepared(key, entry.dataset), description)
                file = Path(folder) / f"{name}.onnx"
                write_onnx(task.Graph(network), inputs[:2], task.INPUT, task.OUTPUTS, file)
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
            "models": measured,
        },
    )
    for name, values in measured.items():
        cells = [f"batch {batch}: p50 {values['latency_ms'][str(batch)]['p50']:.2f} ms" for batch in BATCHES]
        print(f"{name:30s} {values['parameters']:>10,} parameters {values['bytes']:>12,} bytes  {', '.join(cells)}")


def _measure(file: Path, inputs: np.ndarray, threads: int, parameters: int) -> dict[str, Any]:
    runtime = session(file, threads)
    name = runtime.get_inputs()[0].name
    latency = {}
    for batch in BATCHES:
        feed = {name: np.resize(inputs, (batch, *inputs.shape[1:]))}
        for _ in range(WARM_UP):
            runtime.run(None, feed)
        times: list[float] = []
        until = time.perf_counter() + SECONDS
        while len(times) < LEAST or time.perf_counter() < until:
            begun = time.perf_counter()
            runtime.run(None, feed)
            times.append((time.perf_counter() - begun) * 1000)
        p50, p95 = np.percentile(times, (50, 95))
        latency[str(batch)] = {"p50": round(float(p50), 4), "p95": round(float(p95), 4), "runs": len(times)}
    return {
        "onnx_sha256": sha256(file),
        "parameters": parameters,
        "bytes": file.stat().st_size,
        "latency_ms": latency,
    }


def _processor() -> str:
    """The name of the processor, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    command.run("latency", __doc__, main, key="task", example="recognition")
