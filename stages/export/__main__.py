"""Export a deployable student to ONNX and check it against PyTorch on the validation split."""

import dataclasses
import importlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from data.errors import UserError
from data.files import new_directory, sha256, write_json
from models.artifacts import Description, load_model
from stages import command, paths
from stages.export.onnx_graph import FILE, differences, output_names, session, write_onnx
from stages.parameters import load, select

# The most that goes through both graphs at once: samples, and numbers in them.
BATCH, NUMBERS = 256, 2**20


def main(key: str) -> None:
    """Export the student `key` of params.yaml."""
    settings = select(load().exports, key, "exported student")
    torch.set_num_threads(settings.threads)
    task = importlib.import_module(f"stages.export.{settings.task}")
    network, description = load_model(paths.trained(settings.task, key))
    prepared = paths.prepared(settings.task, settings.dataset)
    graph = task.Graph(network)
    names = output_names(task, graph)
    inputs, target = task.inputs(prepared, description)
    files = travelling(task, description, prepared)
    with new_directory(paths.exported(settings.task, key)) as output:
        write_onnx(graph, {name: array[:2] for name, array in inputs.items()}, names, task.AXES, output / FILE)
        difference, metric, shapes = compare(task, session(output / FILE, settings.threads), graph, inputs, target)
        if not all(value <= settings.tolerance for value in difference.values()):
            raise UserError(
                f"the exported graph differs from PyTorch by {difference}, more than exports.{key}.tolerance = "
                f"{settings.tolerance} · nothing was written"
            )
        for file in files:
            shutil.copyfile(file, output / file.name)
        first, *further = (
            {"name": name, "shape": [*axes, *array.shape[len(axes) :]], "dtype": str(array.dtype)}
            for (name, array), axes in zip(inputs.items(), [task.AXES, *[task.AXES[:1]] * len(inputs)], strict=False)
        )
        write_json(
            output / "model.json",
            {
                **dataclasses.asdict(description),
                "onnx_sha256": sha256(output / FILE),
                "input": first,
                **({"further_inputs": further} if further else {}),
                "outputs": [
                    {"name": name, "shape": ["batch", *shape[1:]], "dtype": dtype}
                    for name, (shape, dtype) in shapes.items()
                ],
                "parity": {
                    "samples": len(target),
                    "largest_difference": {name: float(f"{value:.3g}") for name, value in difference.items()},
                    "metric": metric,
                },
            },
        )


def travelling(task: ModuleType, description: Description, prepared: Path) -> list[Path]:
    """The files of the prepared data set that the exported student needs beside its graph.

    Raises:
        UserError: a file is missing, or is not the one that the student was trained with.
    """
    found = []
    for name, key in task.FILES.items():
        file, wanted = prepared / name, description.interface[key]
        digest = sha256(file) if file.is_file() else "nothing"
        if digest != wanted:
            raise UserError(
                f"{file} is not what {description.name} was trained with: wanted sha256 {wanted}, got {digest} · "
                f"run `dvc repro` for the data set {prepared.name} and for {description.name}"
            )
        found.append(file)
    return found


def compare(
    task: ModuleType, runtime: Any, graph: nn.Module, inputs: Mapping[str, np.ndarray], target: np.ndarray
) -> tuple[dict[str, float], dict[str, float], dict[str, tuple[tuple[int, ...], str]]]:
    """The exported graph beside the network it was made of, batch by batch: outputs of dense tasks are large.

    Where the first input has a dynamic length too, every batch goes in a second time, cut to half of it: the
    differences count, the answers do not.

    Args:
        runtime: an ONNX Runtime session. inputs: what goes into both, by name. target: what the task's metric compares
            with.

    Returns:
        per output its largest absolute difference; the metric of both; per output the shape of a batch, and the dtype.
    """
    main, longest = next(iter(inputs)), max(array[0].size for array in inputs.values())
    batch = max(1, min(BATCH, NUMBERS // longest))
    apart, found = [], {"onnx": list[np.ndarray](), "pytorch": list[np.ndarray]()}
    for start in range(0, len(target), batch):
        whole = {name: array[start : start + batch] for name, array in inputs.items()}
        # The whole comes last: its answers count.
        shown = [whole]
        if len(task.AXES) > 1:
            half = max(getattr(graph, "shortest", 1), whole[main].shape[1] // 2)
            shown = [{**whole, main: whole[main][:, :half]}, whole]
        for fed in shown:
            ours = runtime.run(None, fed)
            with torch.inference_mode():
                theirs = [tensor.numpy() for tensor in graph(*map(torch.from_numpy, fed.values()))]
            apart.append(getattr(task, "differences", differences)(fed, ours, theirs))
        found["onnx"].append(task.answers(ours))
        found["pytorch"].append(task.answers(theirs))
    largest, names = np.max(apart, axis=0), output_names(task, graph)  # NaN stays NaN
    shapes = {name: (array.shape, str(array.dtype)) for name, array in zip(names, ours, strict=True)}
    return (
        dict(zip(names, largest.tolist(), strict=True)),
        {name: task.metric(np.concatenate(parts), target) for name, parts in found.items()},
        shapes,
    )


if __name__ == "__main__":
    command.run("export", __doc__, main, key="student", example="recognition-horkd")
