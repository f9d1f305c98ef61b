"""From a network to an ONNX file, and ONNX Runtime sessions with stated threads."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

FILE = "model.onnx"


def output_names(task: ModuleType, graph: nn.Module) -> tuple[str, ...]:
    """What a graph gives: the task's `OUTPUTS`, or those of them that `graph.outputs` names."""
    names: tuple[str, ...] = getattr(graph, "outputs", task.OUTPUTS)
    return names


def write_onnx(
    graph: nn.Module,
    example: Mapping[str, np.ndarray],
    output_names: tuple[str, ...],
    axes: tuple[str, ...],
    path: Path,
) -> None:
    """Export with a dynamic batch; all else is constant but other `axes` of the first input, without warnings.

    The exporter of TorchScript days is used on purpose: it takes 0.3 s where the newer one takes 5, and writes no
    stack traces, hence the same bytes on every machine.

    Args:
        example: what goes in, by name, (B, ...) each. axes: names of the first dimensions of the first input, which are
            dynamic; the batch is the first.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        torch.onnx.export(
            graph.eval(),
            tuple(map(torch.from_numpy, example.values())),
            path,
            dynamo=False,
            input_names=list(example),
            output_names=list(output_names),
            dynamic_axes={
                **{name: {0: axes[0]} for name in (*example, *output_names)},
                next(iter(example)): dict(enumerate(axes)),
            },
        )


def differences(fed: Mapping[str, np.ndarray], ours: list[np.ndarray], theirs: list[np.ndarray]) -> list[float]:
    """The largest absolute difference of each output.

    Args:
        fed: what went into both, for tasks that do it otherwise. ours, theirs: outputs in the same order.
    """
    return [float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)]


def session(path: Path, threads: int) -> Any:
    """An ONNX Runtime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
