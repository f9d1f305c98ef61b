"""Policies: how many rollouts succeed, in how many ways, and how likely demonstrations are (VDD card 3.7 and 6).

Every model begins in the same states. A rollout has random numbers of its own, by its seed and step: what comes of it
does not depend on how many others there are, but for rounding.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from data import policy as data
from data.avoiding import UNKNOWN, Outcome, mode_entropy
from models import policy as models
from models.artifacts import Description
from stages.evaluate.result import Result
from stages.parameters.policy import Task

# The expert of whoever has none.
NONE = -1
# Windows that are looked at together.
PART = 500
# The figures of fewer calls: one_step_success, 4_step_success.
WORDS = {1: "one"}
CLASSES = ("split", "class", "label", "successes", "share")


@dataclass(frozen=True)
class Rollouts:
    """What a model did in R rollouts, S steps at most.

    Attributes:
        observations: (R, S + 1, O) float32; once a rollout has ended, its last one again and again.
        experts: (R, S) int64, whose mean was taken at each step; NONE of a teacher, and after the end.
        probabilities: (R, S, K) float32 of every expert, 0 after the end; K is 0 of a teacher.
    """

    outcome: Outcome
    observations: np.ndarray
    experts: np.ndarray
    probabilities: np.ndarray


def roll_out(
    network: nn.Module,
    description: Description,
    place: data.Environment,
    seeds: list[int],
    settings: Task,
    calls: int | None = None,
    goals: Tensor | None = None,
) -> Rollouts:
    """A rollout for each seed, all side by side. The model sees as much of its window as there has been.

    Args:
        network: in eval mode. place: is begun anew. calls: of a teacher per action; its own number by default.
        goals: (R, G, O) raw, for a model that is told what is wanted.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device)
    window, limit = description.network["window"], min(settings.steps or place.limit, place.limit)
    streams = [np.random.default_rng([settings.seed, seed]) for seed in seeds]
    experts = np.full((limit, len(seeds)), NONE, dtype=np.int64)
    probabilities = np.zeros((limit, len(seeds), getattr(network, "count", 0)), dtype=np.float32)
    seen = [place.reset(seeds)]
    with torch.inference_mode():
        for step in range(limit):
            going = np.flatnonzero(~place.ended)
            if not len(going):
                break
            observations = torch.from_numpy(np.stack(seen[-window:], axis=1)[going])
            if goals is not None:
                observations = torch.cat([goals[going], observations], 1)
            observations = observations.to(device)
            actions = np.zeros((len(seeds), place.actions), dtype=np.float32)
            if isinstance(network, models.Diffusion):
                shape = (calls or network.steps, min(window, len(seen)), place.actions)
                noise = np.stack([streams[one].standard_normal(shape, dtype=np.float32) for one in going], axis=1)
                actions[going] = network.decide(observations, torch.from_numpy(noise).to(device)).cpu().numpy()
            else:
                draw = torch.tensor([streams[one].random() for one in going], dtype=torch.float32, device=device)
                found = cast(models.Mixture, network).step(observations, None if settings.greedy else draw)
                actions[going] = found.action.cpu().numpy()
                experts[step, going] = found.expert.cpu().numpy()
                probabilities[step, going] = found.probability.cpu().numpy()
            seen.append(place.step(actions))
    steps = len(seen) - 1
    by_rollout = (rows.swapaxes(0, 1) for rows in (np.stack(seen), experts[:steps], probabilities[:steps]))
    return Rollouts(place.outcome(), *by_rollout)


def evaluate(network: nn.Module, description: Description, prepared: Path, split: str, settings: Task) -> Result:
    """All figures of one model on one split.

    With an environment: `success`, `entropy` of the ways that successful rollouts took (where it knows ways), mean
    `reward`, mean `steps` of those that succeeded, `calls` of the network per action; of a student `nll`; of a teacher
    `one_step_success` and so on, where fewer calls are asked for than its own. Without: `loss`, of a student its `nll`
    again, of a teacher the error of its denoising, which do not compare.

    `nll` is the mean of -log q(a | s) over all steps of the split's demonstrations, in nats per action, raw units.

    Args:
        network: in eval mode.
    """
    dataset = data.describe(prepared)
    student = isinstance(network, models.Mixture)
    demonstrated = None
    if student or dataset["environment"] is None:
        demonstrated = losses(network, description, prepared, split, settings)
    if dataset["environment"] is None:
        return _without_environment(cast(pd.DataFrame, demonstrated), split, student)
    place = data.environment(dataset["environment"]["name"])
    seeds = data.seeds(split, settings.rollouts)
    goals = goals_of(prepared, split, len(seeds), description.network["goals"])
    outcome = roll_out(network, description, place, seeds, settings, goals=goals).outcome
    metrics = _shares(outcome, len(place.modes)) | {"reward": float(outcome.reward.mean())}
    if outcome.success.any():
        metrics["steps"] = float(outcome.steps[outcome.success].mean())
    metrics["calls"] = 1 if student else cast(models.Diffusion, network).steps
    if demonstrated is not None:
        metrics["nll"] = _mean(demonstrated)
    for calls in settings.fewer_calls:
        if not student and calls < metrics["calls"]:
            fewer = roll_out(network, description, place, seeds, settings, calls, goals).outcome
            prefix = f"{WORDS.get(calls, calls)}_step"
            metrics |= {f"{prefix}_{name}": value for name, value in _shares(fewer, len(place.modes)).items()}
    metrics = {name: round(float(value), 6) for name, value in metrics.items()}
    return Result(metrics, table(split, seeds, outcome, len(place.modes)), _ways(split, outcome, place.modes))


def table(split: str, seeds: list[int], outcome: Outcome, modes: int) -> pd.DataFrame:
    """A row per rollout.

    Args:
        modes: how many ways the environment knows.
    """
    return pd.DataFrame(
        {
            "split": split,
            "id": [f"rollout-{seed}" for seed in seeds],
            "seed": seeds,
            "success": outcome.success.astype(int),
            "correct": outcome.success.astype(int),
            "mode": outcome.mode,
            "modes": modes,
            "reward": outcome.reward.round(6),
            "steps": outcome.steps,
        }
    )


def losses(network: nn.Module, description: Description, prepared: Path, split: str, settings: Task) -> pd.DataFrame:
    """What the model's own loss is on the demonstrations of a split: a row per episode of id, loss and count.

    Of a student the mean of -log q(a | s) over the episode's steps, each seen once with all of the window there is, in
    nats per action and raw units. Of a teacher the mean over the episode's windows of the squared error of what it
    gives, with noise and levels that are always the same.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device)
    episodes = data.load(prepared, split)
    rows = data.windows(episodes, description.network["window"])
    episode = torch.searchsorted(episodes.starts, rows[:, 0].contiguous(), right=True) - 1
    first = rows[:, 0] == episodes.starts[episode]
    goals = _last(episodes, description.network["goals"])
    generator = torch.Generator().manual_seed(settings.seed)
    total, count = (torch.zeros(len(episodes.ids), dtype=torch.float64) for _ in range(2))
    with torch.inference_mode():
        for part, of, begins in zip(rows.split(PART), episode.split(PART), first.split(PART), strict=True):
            observations = episodes.observations[torch.cat([goals[of], part], 1)].to(device)
            actions = episodes.actions[part].to(device)
            if isinstance(network, models.Diffusion):
                noise = torch.randn(actions.shape, generator=generator).to(device)
                level = network.level_at(torch.rand(len(part), generator=generator).to(device))
                scaled = network.scaling.actions(actions)
                found = network(network.corrupt(scaled, noise, level), observations, level)
                loss = (found - network.target(scaled, noise, level)).square().mean((1, 2))[:, None]
                once = torch.ones(len(part), 1)
            else:
                loss = -cast(models.Mixture, network).log_density(observations, actions)
                once = begins[:, None].repeat(1, part.shape[1]).double()
                once[:, -1] = 1
            total.index_add_(0, of, (loss.cpu().double() * once).sum(1))
            count.index_add_(0, of, once.double().sum(1))
    return pd.DataFrame({"id": episodes.ids, "loss": (total / count).numpy(), "count": count.int().numpy()})


def _last(episodes: data.Episodes, goals: int) -> Tensor:
    """(E, goals) int64: rows of the last observations of every episode, which say what is wanted."""
    return (episodes.starts + episodes.lengths)[:, None] - goals + torch.arange(goals)


def goals_of(prepared: Path, split: str, count: int, goals: int) -> Tensor | None:
    """(count, goals, O): rollouts want what the demonstrations of the split end with, one after the other."""
    if not goals:
        return None
    episodes = data.load(prepared, split)
    wanted = episodes.observations[_last(episodes, goals)]
    return wanted[torch.arange(count) % len(wanted)]


def _shares(outcome: Outcome, modes: int) -> dict[str, float]:
    """Success, and where there are ways the entropy of those that successful rollouts took."""
    found = {"success": float(outcome.success.mean())}
    if modes:
        found["entropy"] = mode_entropy(outcome.mode, outcome.success & (outcome.mode != UNKNOWN), modes)
    return found


def _ways(split: str, outcome: Outcome, modes: list[str]) -> pd.DataFrame:
    """A row per way: how many successful rollouts took it, and their share; no share where none succeeded."""
    taken = outcome.mode[outcome.success & (outcome.mode != UNKNOWN)]
    counts = np.bincount(taken, minlength=len(modes))
    with np.errstate(invalid="ignore"):
        share = (counts / counts.sum()).round(6)
    values = (split, modes, range(len(modes)), counts, share)
    return pd.DataFrame(dict(zip(CLASSES, values, strict=True)))


def _mean(found: pd.DataFrame) -> float:
    """Over all that was counted, of `losses`."""
    return float(np.average(found["loss"], weights=found["count"]))


def _without_environment(found: pd.DataFrame, split: str, student: bool) -> Result:
    metrics = {"loss": round(_mean(found), 6)}
    if student:
        metrics["nll"] = metrics["loss"]
    samples = found.assign(split=split, loss=found["loss"].round(6))[["split", "id", "loss", "count"]]
    return Result(metrics, samples, pd.DataFrame(columns=list(CLASSES)))
