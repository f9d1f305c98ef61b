"""Prepared demonstrations in miniature, environments that are told what comes out, and networks with random weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from data.avoiding import Outcome
from data.files import write_json
from models.artifacts import Description
from models.policy import build
from stages.parameters.policy import BESO, DDPM, Mixture

WINDOW = 3
LENGTHS = {"train": (6, 5), "validation": (4, 7, 5), "test": (5, 4, 8, 6)}
BACKBONES: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "width": 8, "layers": 2},
    "transformer": {"name": "transformer", "layers": 2, "heads": 2, "width": 8},
}
NETWORKS: dict[str, Any] = {"ddpm": DDPM, "beso": BESO, "mixture": Mixture}
HEADS = {"experts": 3, "heads": {"width": 8, "layers": 1}, "gate_head": {"width": 8, "layers": 0}}
SMALL: dict[str, dict[str, Any]] = {"ddpm": {"steps": 3}, "beso": {"steps": 3}, "mixture": HEADS}
# Of Avoiding, about: a network with random weights then acts on its scale.
SCALING = {
    "observation": {"mean": [0.5, 0.0, 0.5, 0.0], "std": [0.1, 0.2, 0.1, 0.2], "change": [0.1, 0.2, 0.1, 0.2]},
    "action": {"mean": [0.0, 0.009], "std": [0.006, 0.004], "low": [-0.0125, 0.0], "high": [0.0125, 0.0125]},
}


def write_prepared(folder: Path, environment: dict[str, Any] | None, modes: Sequence[str] = (), seed: int = 0) -> None:
    """Demonstrations that are noise, of the dimensions of Avoiding."""
    generator = np.random.default_rng(seed)
    split = np.repeat(list(LENGTHS), [len(lengths) for lengths in LENGTHS.values()])
    length = np.concatenate([*LENGTHS.values()])
    order = generator.permutation(len(split))
    split, length = split[order], length[order]
    steps = int(length.sum())
    folder.mkdir(parents=True, exist_ok=True)
    observations = np.array(SCALING["observation"]["mean"]) + 0.1 * generator.normal(size=(steps, 4))
    np.save(folder / "observations.npy", observations.astype(np.float32))
    np.save(folder / "actions.npy", generator.uniform(-0.012, 0.012, (steps, 2)).astype(np.float32))
    manifest = pd.DataFrame({"split": split, "mode": "", "start": length.cumsum() - length, "length": length})
    manifest.insert(0, "id", [f"episode-{number:05d}" for number in range(len(split))])
    if modes:
        manifest["mode"] = [modes[number % len(modes)] for number in range(len(split))]
    manifest.assign(sha256="").to_csv(folder / "manifest.csv", index=False)
    about = {
        "observations": 4,
        "actions": 2,
        "scaling": SCALING,
        "environment": environment,
        "modes": list(modes),
        "samples": {part: sum(lengths) for part, lengths in LENGTHS.items()},
        "episodes": {part: len(lengths) for part, lengths in LENGTHS.items()},
        "source": {"name": "toy", "licence": "none", "credit": "nobody", "redistributable": True},
    }
    write_json(folder / "dataset.json", about)


def describe(
    name: str, backbone: str = "mlp", environment: str | None = "avoiding", model: str = "toy", **settings: Any
) -> Description:
    """Of a model: `ddpm` and `beso` are teachers, `mixture` is a student."""
    section = NETWORKS[name](
        name=name, **{"window": WINDOW, "backbone": BACKBONES[backbone], **SMALL[name], **settings}
    )
    interface = {"observations": 4, "actions": 2, "scaling": SCALING, "environment": environment}
    kind = "student" if name == "mixture" else "teacher"
    return Description(model, "policy", kind, section.model_dump(mode="json"), interface, {}, {}, None, [])


def network(description: Description, seed: int = 0) -> Any:
    """In eval mode, with weights such that everything matters."""
    torch.manual_seed(seed)
    found = build({"network": description.network, "interface": description.interface})
    for parameter in found.parameters():
        parameter.data.normal_(std=0.4)
    return found.eval()


class Fated:
    """An environment in which it is settled beforehand what comes of a rollout, and when it ends.

    An observation is the rollout's seed, the step, and the action before it.
    """

    observations, actions = 4, 2

    def __init__(self, outcome: Outcome, limit: int, modes: Sequence[str]) -> None:
        self.fate, self.limit, self.modes = outcome, limit, list(modes)
        self.began: list[list[int]] = []
        self.taken: list[np.ndarray] = []

    @staticmethod
    def constants() -> dict[str, Any]:
        return {}

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        self.began.append(list(seeds))
        self.taken, self.ended = [], np.zeros(len(seeds), dtype=bool)
        self._steps = np.zeros(len(seeds), dtype=np.int64)
        return self._observation(np.zeros((len(seeds), 2)))

    def step(self, actions: np.ndarray) -> np.ndarray:
        self.taken.append(actions)
        self._steps += ~self.ended
        self.ended = self._steps >= self.fate.steps[: len(self.ended)]
        return self._observation(actions)

    def outcome(self) -> Outcome:
        return Outcome(*(part[: len(self.ended)] for part in self.fate._replace(steps=self._steps)))

    def _observation(self, actions: np.ndarray) -> np.ndarray:
        return np.column_stack([self.began[-1], self._steps, actions]).astype(np.float32)
