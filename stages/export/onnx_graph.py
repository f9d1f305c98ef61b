"""From a network to an ONNX file, and ONNX Runtime sessions with stated threads."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

FILE = "model.onnx"


def write_onnx(
    graph: nn.Module,
    example: np.ndarray,
    input_name: str,
    output_names: tuple[str, ...],
    axes: tuple[str, ...],
    path: Path,
) -> None:
    """Export with a dynamic batch; all else is constant but the input's other `axes`, and that is no cause to warn.

    The exporter of TorchScript days is used on purpose: it takes 0.3 s where the newer one takes 5, and writes no
    stack traces, hence the same bytes on every machine.

    Args:
        example: (B, ...). axes: names of the input's first dimensions, which are dynamic; the batch is the first.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        torch.onnx.export(
            graph.eval(),
            (torch.from_numpy(example),),
            path,
            dynamo=False,
            input_names=[input_name],
            output_names=list(output_names),
            dynamic_axes={
                input_name: dict(enumerate(axes)),
                **{name: {0: axes[0]} for name in output_names},
            },
        )


def session(path: Path, threads: int) -> Any:
    """An ONNX Runtime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
