"""Export a deployable student to ONNX and check it against PyTorch on the validation split."""

import dataclasses
import importlib

import numpy as np
import torch

from data.errors import UserError
from data.files import new_directory, sha256, write_json
from models.artifacts import load_model
from stages import command, paths
from stages.export.onnx_graph import FILE, infer, session, write_onnx
from stages.parameters import load, select


def main(key: str) -> None:
    """Export the student `key` of params.yaml."""
    settings = select(load().exports, key, "exported student")
    torch.set_num_threads(settings.threads)
    task = importlib.import_module(f"stages.export.{settings.task}")
    network, description = load_model(paths.trained(settings.task, key))
    prepared = paths.prepared(settings.task, settings.dataset)
    graph = task.Graph(network)
    inputs, target = task.inputs(prepared, description)
    with new_directory(paths.exported(settings.task, key)) as output:
        write_onnx(graph, inputs[:2], task.INPUT, task.OUTPUTS, output / FILE)
        ours = infer(session(output / FILE, settings.threads), inputs)
        with torch.inference_mode():
            theirs = [tensor.numpy() for tensor in graph(torch.from_numpy(inputs))]
        difference = {name: float(np.abs(a - b).max()) for name, a, b in zip(task.OUTPUTS, ours, theirs, strict=True)}
        metric = {"onnx": task.metric(ours, target), "pytorch": task.metric(theirs, target)}
        if not max(difference.values()) <= settings.tolerance:
            raise UserError(
                f"the exported graph differs from PyTorch by {difference}, more than exports.{key}.tolerance = "
                f"{settings.tolerance} · nothing was written"
            )
        write_json(
            output / "model.json",
            {
                **dataclasses.asdict(description),
                "onnx_sha256": sha256(output / FILE),
                "input": {"name": task.INPUT, "shape": ["batch", *inputs.shape[1:]], "dtype": "float32"},
                "outputs": [
                    {"name": name, "shape": ["batch", *array.shape[1:]], "dtype": str(array.dtype)}
                    for name, array in zip(task.OUTPUTS, ours, strict=True)
                ],
                "parity": {
                    "samples": len(inputs),
                    "largest_difference": {name: float(f"{value:.3g}") for name, value in difference.items()},
                    "metric": metric,
                },
            },
        )


if __name__ == "__main__":
    command.run("export", __doc__, main, key="student", example="recognition-horkd")
