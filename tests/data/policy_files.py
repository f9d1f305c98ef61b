"""Small sets of demonstrations in the formats that the task `policy` reads, and their entries in params.yaml."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data import policy
from stages.parameters.policy import Dataset

PROVENANCE = {"name": "toy", "licence": "none", "credit": "invented", "redistributable": True}
LENGTHS = (7, 4, 9, 5, 6, 8, 4, 5, 10, 6, 7, 5)


def dataset(**fields: Any) -> Dataset:
    return Dataset.model_validate({"task": "policy", "source": "toy", "encoder": "none", **fields})


def generated(episodes: int = 3, **fields: Any) -> Dataset:
    entry = {"format": "generated", "environment": "avoiding", "demonstrations": {"episodes": episodes}}
    return dataset(**{**entry, **fields})


def arrays(**fields: Any) -> Dataset:
    entry = {"format": "arrays", "environment": "none", "file": "demos.npz", "keys": {"mode": "mode"}}
    return dataset(**{**entry, **fields})


def demos(lengths: Sequence[int] = LENGTHS, modes: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Smooth walks in three dimensions with actions in two; ways are numbered in turn."""
    generator = np.random.default_rng(seed)
    steps = sum(lengths)
    return {
        "observation": np.cumsum(generator.normal(0, 0.1, (steps, 3)), axis=0).astype(np.float32),
        "action": generator.uniform(-1, 1, (steps, 2)).astype(np.float32),
        "episode_ends": np.cumsum(lengths),
        "mode": np.arange(len(lengths)) % modes,
    }


def write_arrays(file: Path, content: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **content)


def write_zarr(folder: Path, content: dict[str, np.ndarray], rows: int = 20) -> None:
    """A replay buffer of zarr's version 2, byte by byte: chunks of `rows` rows, without compression."""
    for path in (folder, folder / "data", folder / "meta"):
        path.mkdir(parents=True, exist_ok=True)
        (path / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
    for name, array in content.items():
        own = folder / ("meta" if name in ("episode_ends", "mode") else "data") / name
        own.mkdir()
        chunk = [rows, *array.shape[1:]]
        description = {
            "zarr_format": 2,
            "shape": list(array.shape),
            "chunks": chunk,
            "dtype": array.dtype.str,
            "compressor": None,
            "filters": None,
            "fill_value": 0,
            "order": "C",
        }
        (own / ".zarray").write_text(json.dumps(description))
        for number, first in enumerate(range(0, len(array), rows)):
            part = np.zeros(chunk, dtype=array.dtype)  # the last one is as long as the others
            part[: len(array[first : first + rows])] = array[first : first + rows]
            (own / ".".join(map(str, [number] + [0] * (array.ndim - 1)))).write_bytes(part.tobytes())


def prepared(raw: Path, entry: Dataset, output: Path) -> Path:
    output.mkdir(parents=True)
    policy.prepare(raw, entry, output, PROVENANCE)
    return output
