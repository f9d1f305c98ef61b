"""From a network to an ONNX file, and ONNX Runtime sessions with stated threads."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

FILE = "model.onnx"


def write_onnx(
    graph: nn.Module, example: np.ndarray, input_name: str, output_names: tuple[str, ...], path: Path
) -> None:
    """Export with a dynamic first dimension.

    The exporter of TorchScript days is used on purpose: it takes 0.3 s where the newer one takes 5, and writes no
    stack traces, hence the same bytes on every machine.

    Args:
        example: (B, ...) float32.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            graph.eval(),
            (torch.from_numpy(example),),
            path,
            dynamo=False,
            input_names=[input_name],
            output_names=list(output_names),
            dynamic_axes={name: {0: "batch"} for name in (input_name, *output_names)},
        )


def session(path: Path, threads: int) -> Any:
    """An ONNX Runtime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def infer(runtime: Any, inputs: np.ndarray, batch: int = 256) -> list[np.ndarray]:
    """All outputs over all inputs, batch by batch."""
    name = runtime.get_inputs()[0].name
    parts = [runtime.run(None, {name: inputs[start : start + batch]}) for start in range(0, len(inputs), batch)]
    return [np.concatenate(output) for output in zip(*parts, strict=True)]
