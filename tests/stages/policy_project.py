"""A prepared data set of demonstrations in miniature: each step goes left or right, either as likely."""

from pathlib import Path
from typing import Any

import numpy as np

from data.policy import prepare
from models.artifacts import Description
from models.policy import build
from stages.parameters import policy as schema

PROVENANCE = {"name": "toy", "licence": "none", "credit": "invented", "redistributable": True}
TRANSFORMER: dict[str, Any] = {
    "name": "transformer", "layers": 1, "heads": 2, "width": 8, "attention_dropout": 0.0, "dropout": 0.0,
    "init_std": None,
}  # fmt: skip
TRAINING: dict[str, Any] = {"iterations": 20, "batch": 8, "accelerator": "cpu", "look_every": 10}
DIFFUSION: dict[str, Any] = {"name": "ddpm", "window": 3, "backbone": TRANSFORMER}
MIXTURE: dict[str, Any] = {"name": "mixture", "window": 3, "experts": 3, "backbone": TRANSFORMER,
                           "heads": {"width": 8, "layers": 1}, "gate_head": {"width": 8, "layers": 1}}  # fmt: skip
LEVELS = {"kind": "steps", "low": 1, "high": 4}


def write(folder: Path, lengths: list[int] | None = None, actions: int = 2, scale: float = 10.0) -> Path:
    """A prepared data set in `folder`/prepared. The first number of an action is -1 or 1, the others are the first of
    the observation, all a little off, times `scale`.
    """
    generator = np.random.default_rng(0)
    lengths = lengths or [5 + number % 4 for number in range(40)]
    rows = sum(lengths)
    observations = generator.uniform(-1, 1, (rows, 2))
    side = np.where(generator.random(rows) < 0.5, -1, 1)
    done = np.stack([side, *[observations[:, 0]] * (actions - 1)], 1) + generator.normal(0, 0.1, (rows, actions))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / "toy.npz",
        observation=observations.astype(np.float32),
        action=(scale * done + 3).astype(np.float32),
        episode_ends=np.cumsum(lengths),
    )
    entry = {
        "task": "policy",
        "source": "toy",
        "encoder": "none",
        "format": "arrays",
        "file": "toy.npz",
        "keys": {},
        "environment": "none",
        "split": {"validation": 0.2, "test": 0.1},
    }
    output = folder / "prepared"
    output.mkdir()
    prepare(folder, schema.Dataset.model_validate(entry), output, PROVENANCE)
    return output


def teacher(training: dict[str, Any] | None = None, **network: Any) -> schema.Teacher:
    entry = {"task": "policy", "dataset": "prepared", "start": "none", "network": {**DIFFUSION, **network}}
    return schema.Teacher.model_validate({**entry, "training": {**TRAINING, **(training or {})}})


def student(method: str = "alone", training: dict[str, Any] | None = None, **fields: Any) -> Any:
    kind: Any = {"alone": schema.Alone, "em": schema.EM, "vdd": schema.VDD}[method]
    base = {"task": "policy", "dataset": "prepared", "method": method, "teacher": "none", "network": MIXTURE}
    if method == "vdd":
        base |= {"teacher": "big", "levels": LEVELS}
    return kind.model_validate({**base, "training": {**TRAINING, **(training or {})}, **fields})


def description(task: Any, name: str = "big") -> Description:
    """Of what a task trains, as if it had been trained."""
    return Description(
        name=name,
        task="policy",
        kind="teacher",
        network=task.network,
        interface=task.interface,
        recipe={},
        dataset={"name": "prepared", "digest": ""},
        teacher=None,
        sources=[PROVENANCE],
    )


def trained(task: Any) -> tuple[Any, Description]:
    """A fresh network of the kind that a task trains, with its description."""
    made = description(task)
    return build({"network": made.network, "interface": made.interface}), made
