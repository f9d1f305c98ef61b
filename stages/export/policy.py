"""Policies: what the exported graph takes and gives, and what it is checked with.

Of a window only its last step is decided, and of a mixture only the chosen expert is asked.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import policy as data
from models.artifacts import Description
from models.policy import LARGEST_DRAW, Diffusion

INPUT = "observations"
OUTPUTS = ("action", "expert", "probability")
AXES = ("batch", "length")
FILES: dict[str, str] = {}
MEASURED = "validation windows of full length"

# What is no choice of one side's: probabilities round differently, and where a number falls between two experts, or two
# are the likeliest, either may be taken.
TIE = 1e-5


class Graph(nn.Module):
    """A mixture: raw observations (B, G + T, O), T from 1 to the window's length; `draw` (B,), a number in [0, 1) that
    chooses an expert by probability, or a negative one for the likeliest; `allowed` (B, K) bool, which experts may be
    chosen, at least one. Gives the raw action (B, A), the expert (B,) int64, and probabilities (B, K).

    A history that has just begun is given as it is: shorter, not padded.

    A teacher takes noise (B, calls, T, A) in place of `draw` and `allowed`, and its whole sampling is in the graph. It
    counts as one expert.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.shortest = int(network.goals) + 1  # type: ignore[arg-type]

    def forward(
        self, observations: Tensor, draw_or_noise: Tensor, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(self.network, Diffusion):
            action = self.network.decide(observations, draw_or_noise.transpose(0, 1))
            one = torch.zeros_like(action[:, 0])
            return action, one.long(), one[:, None] + 1
        action, expert, probability = self.network.step(observations, draw_or_noise, allowed)  # type: ignore[operator]
        return action, expert, probability


def inputs(prepared: Path, description: Description) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """All windows of the validation split, float32 (N, G + T, O) raw, and what was demonstrated at the last step of
    each, (N, A) raw.

    Every other one asks for the likeliest expert. A third allows all experts, a third one, a third some.
    """
    network, episodes = description.network, data.load(prepared, "validation")
    steps = data.windows(episodes, network["window"])
    episode = torch.searchsorted(episodes.starts, steps[:, 0].contiguous(), right=True) - 1
    ends = (episodes.starts + episodes.lengths)[episode]
    goals = ends[:, None] - network["goals"] + torch.arange(network["goals"])
    seen = episodes.observations[torch.cat([goals, steps], 1)].numpy()
    target, count = episodes.actions[steps[:, -1]].numpy(), len(steps)
    generator = np.random.default_rng(0)
    if network["name"] != "mixture":
        shape = (count, network["steps"], network["window"], target.shape[1])
        return {INPUT: seen, "noise": generator.standard_normal(shape, dtype=np.float32)}, target
    places, experts = np.arange(count), network["experts"]
    draw = np.where(places % 2, generator.random(count), -1).astype(np.float32)
    allowed = (places % 3 == 0)[:, None] | (generator.random((count, experts)) < 0.5) & (places % 3 == 1)[:, None]
    allowed[places, generator.integers(experts, size=count)] = True
    return {INPUT: seen, "draw": draw, "allowed": allowed}, target


def differences(fed: Mapping[str, np.ndarray], ours: list[np.ndarray], theirs: list[np.ndarray]) -> list[float]:
    """The largest of actions and of probabilities, and 0 or 1 for experts: 1 where one was taken that the other side's
    probabilities do not allow for, ties aside. Actions of different experts are not compared.

    Args:
        fed: what went into both. ours, theirs: `OUTPUTS` of each.
    """
    (action, expert, probability), (other_action, other_expert, other) = ours, theirs
    rows, same = np.arange(len(expert)), expert == other_expert
    until = other.cumsum(1)
    point = np.minimum(fed["draw"], LARGEST_DRAW) * until[:, -1]
    above = point >= until[rows, expert] - other[rows, expert] - TIE
    drawn = above & (point <= until[rows, expert] + TIE) & fed["allowed"][rows, expert]
    likeliest = other[rows, expert] >= other.max(1) - TIE
    wrong = ~same & ~np.where(fed["draw"] < 0, likeliest, drawn)
    return [
        float(np.abs(action - other_action)[same].max(initial=0)),
        float(wrong.max(initial=False)),
        float(np.abs(probability - other).max()),
    ]


def answers(outputs: list[np.ndarray]) -> np.ndarray:
    """What the metric needs of the outputs: raw actions (B, A)."""
    return outputs[0]


def metric(found: np.ndarray, target: np.ndarray) -> float:
    """Root mean squared difference from the demonstrated actions, in standard deviations of these. Smaller is nearer,
    but a good policy often goes another way.
    """
    return float(np.sqrt((((found - target) / target.std(0)) ** 2).mean()))
