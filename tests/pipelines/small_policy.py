"""The project in miniature for policies: a student with `wrong` mistakes runs into a cylinder in as many rollouts.

It acts in Avoiding. At the first step it takes one of three experts: the first steers to a lane on the left of all
cylinders, the second to one on their right, the third to one that a cylinder stands in. From then on it goes straight
on. What comes of a rollout is settled by the first number that is drawn in it.
"""

import functools
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pandas as pd
import torch
import yaml

from data.avoiding import MODES, START, Avoiding
from data.files import sha256
from stages.export import policy as export
from stages.export.onnx_graph import write_onnx

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
from policy_rollouts import SCALING, write_prepared
from small_project import Model, Small

ROLLOUTS, WINDOW, EXPERTS = 200, 3, 3
LANES = (0.30, 0.70, 0.58)
WAYS = (MODES.index("0-0-0"), MODES.index("1-2-3"), -1)
SPEED = 0.0125
BACKBONE = {"name": "mlp", "width": 8, "layers": 1}
METHODS: dict[str, dict[str, Any]] = {
    "alone": {"teacher": "none"},
    "em": {"teacher": "none"},
    "vdd": {"teacher": "teacher", "levels": {"kind": "steps", "low": 1, "high": 4}},
}


def drawn(seed: int, split: str) -> np.ndarray:
    """(ROLLOUTS,) the first number of every rollout of a split, as evaluation draws it."""
    rollouts = [2 * number + (split == "test") for number in range(ROLLOUTS)]
    return np.array([np.random.default_rng([seed, rollout]).random() for rollout in rollouts])


def shares(wrong: int, seed: int = 0) -> tuple[float, float, float]:
    """Probabilities of the experts with which the third is taken in so many test rollouts, of the task's seed."""
    below = np.sort(drawn(seed, "test"))[::-1]
    edge = 1.0 if wrong == 0 else float(below[wrong - 1 : wrong + 1].mean())
    return edge / 2, edge / 2, 1 - edge


class Steers(torch.nn.Module):
    """Raw observations (B, T, 4), draw (B,) and allowed (B, K), as `stages.export.policy.Graph`."""

    def __init__(self, probabilities: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("probabilities", torch.tensor(probabilities, dtype=torch.float64))
        self.register_buffer("aside", torch.tensor(LANES) - START[0])

    def forward(self, observations: torch.Tensor, draw: torch.Tensor, allowed: torch.Tensor) -> tuple[Any, ...]:
        kept = self.probabilities * allowed
        kept = kept / kept.sum(1, keepdim=True)
        found = (kept.cumsum(1) <= draw.double()[:, None]).sum(1)
        expert = torch.where(draw < 0, kept.argmax(1), found.clamp(max=EXPERTS - 1))
        begins = (observations[:, -1, 0] - START[0]).abs() < 0.02
        aside = torch.where(begins, self.aside[expert], torch.zeros_like(draw))
        action = torch.stack([aside, torch.where(begins, torch.zeros_like(draw), SPEED * torch.ones_like(draw))], 1)
        return action, expert, kept.float()


@functools.cache
def graph(probabilities: tuple[float, ...], folder: Path) -> onnx.ModelProto:
    """The ONNX file of a student that takes its experts with these probabilities."""
    example = {
        "observations": np.zeros((2, 2, 4), np.float32),
        "draw": np.zeros(2, np.float32),
        "allowed": np.ones((2, EXPERTS), bool),
    }
    file = folder / "steers.onnx"
    write_onnx(Steers(probabilities), example, export.OUTPUTS, export.AXES, file)
    made = onnx.load(str(file))
    file.unlink()
    return made


@dataclass
class SmallPolicy(Small):
    """The same project for another task. `wrong` counts test rollouts of the task's seed 0.

    `settings` are those of the task, `interface` and `decides` what models say of themselves.
    """

    task: ClassVar[str] = "policy"
    metric: ClassVar[str] = "success"
    interface: ClassVar[dict[str, Any]] = {
        "observations": 4,
        "actions": 2,
        "scaling": SCALING,
        "environment": "avoiding",
    }
    input: ClassVar[dict[str, Any]] = {
        "name": "observations",
        "shape": ["batch", "length", 4],
        "dtype": "float32",
    }
    network: ClassVar[dict[str, Any]] = {
        "name": "mixture",
        "window": WINDOW,
        "goals": 0,
        "experts": EXPERTS,
        "backbone": BACKBONE,
    }
    dataset: ClassVar[dict[str, Any]] = {
        "format": "generated",
        "environment": "avoiding",
        "demonstrations": {"episodes": 3},
    }
    teacher: ClassVar[dict[str, Any]] = {"network": {"name": "ddpm", "window": WINDOW, "backbone": BACKBONE}}

    window: int = WINDOW
    rollouts: int = ROLLOUTS
    seed: int = 0

    def write_onnx(self, file: Path, wrong: int, note: str) -> None:
        made = onnx.ModelProto()
        made.CopyFrom(graph(shares(wrong), self.folder))
        made.graph.name = note
        onnx.save(made, str(file))

    def _write_model(self, name: str, model: Model, data: str) -> tuple[str, str]:
        weights, onnx_sha256 = super()._write_model(name, model, data)
        network = {**self.network, "window": self.window} if model.method else self.teacher["network"]
        kind = "student" if model.method else "teacher"
        for folder in ("trained", "exported")[: 1 + bool(model.method)]:
            file = self.folder / f"models/{folder}/{self.task}/{name}/model.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "network": network, "kind": kind}))
        return weights, onnx_sha256

    def _write_data(self) -> str:
        """Demonstrations that nobody looks at: rollouts are what is tested."""
        prepared = self.folder / f"data/prepared/{self.task}/tiny"
        write_prepared(prepared, {"name": "avoiding", **Avoiding.constants()}, MODES)
        file = prepared / "manifest.csv"
        table = pd.read_csv(file)
        table["sha256"] = [hashlib.sha256(f"{self.ids} {one}".encode()).hexdigest() for one in table["id"]]
        table.to_csv(file, index=False)
        proof = {"dataset": "tiny", "task": self.task, "manifest": sha256(file)}
        self.put(f"data/validated/{self.task}/tiny.json", proof)
        return sha256(file)

    def _write_parameters(self) -> None:
        super()._write_parameters()
        file = self.folder / "params.yaml"
        content = yaml.safe_load(file.read_text())
        for entry in content["students"].values():
            del entry["resolution"]
            entry.update(METHODS[entry["method"]])
        content["tasks"] = {self.task: {"rollouts": self.rollouts, "seed": self.seed}}
        file.write_text(yaml.safe_dump(content))

    def _samples(self, wrong: int) -> pd.DataFrame:
        """By the numbers that are drawn, without any rollout; but for the steps, which are not looked at."""
        edges = np.cumsum(shares(wrong))[:-1]
        parts = []
        for split in ("validation", "test"):
            expert = np.searchsorted(edges, drawn(self.seed, split)[: self.rollouts].astype(np.float32), side="right")
            seeds = 2 * np.arange(self.rollouts) + (split == "test")
            success = (expert < 2).astype(int)
            row = {"split": split, "id": [f"rollout-{seed}" for seed in seeds], "seed": seeds, "success": success}
            row |= {"correct": success, "mode": np.array(WAYS)[expert], "modes": len(MODES)}
            parts.append(pd.DataFrame({**row, "reward": success * 1.0, "steps": 60}))
        return pd.concat(parts)


def usual(folder: Path) -> SmallPolicy:
    """A teacher, two students and the baseline; `best` is best on validation and on test."""
    return SmallPolicy(
        folder,
        {
            "teacher": Model(wrong=2, validation=1.0, method=None),
            "best": Model(wrong=10, validation=0.95, method="vdd"),
            "second": Model(wrong=12, validation=0.9, method="em"),
            "plain": Model(wrong=11, validation=0.85, method="alone"),
        },
    )
