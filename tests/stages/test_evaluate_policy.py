"""Policies evaluated: rollouts against one at a time, figures against their definitions, densities against scipy."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from policy_rollouts import SCALING, WINDOW, Fated, describe, network, write_prepared

from data import policy as data
from data.avoiding import Avoiding, Outcome
from models import policy as models
from stages.evaluate import policy as evaluation
from stages.evaluate.policy import NONE, evaluate, losses, roll_out
from stages.evaluate.result import Result
from stages.parameters.policy import Task
from stages.scores import scores

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = st.integers(0, 10_000)
WAYS = ["left", "middle", "right", "nowhere"]
every_network = pytest.mark.parametrize("name", ["ddpm", "beso", "mixture"])
every_backbone = pytest.mark.parametrize("backbone", ["mlp", "transformer"])


@pytest.fixture(scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fates(seed: int, count: int = 12, ways: int = len(WAYS), chance: float = 0.6) -> Outcome:
    generator = np.random.default_rng(seed)
    success = generator.random(count) < chance
    return Outcome(
        success=success,
        reward=generator.random(count),
        mode=generator.integers(0 if ways else NONE, max(ways, 0), count) if ways else np.full(count, NONE),
        steps=generator.integers(2, 9, count),
        failed=~success,
    )


def alone(net: Any, place: Any, seed: int, task: Task, calls: int | None = None) -> tuple[list[np.ndarray], list[int]]:
    """Observations and experts of one rollout by itself, its history kept as a list."""
    stream = np.random.default_rng([task.seed, seed])
    seen, experts = [place.reset([seed])[0]], []
    while not place.ended[0] and len(experts) < (task.steps or place.limit):
        history = torch.from_numpy(np.array(seen[max(0, len(seen) - WINDOW) :]))[None]
        if isinstance(net, models.Diffusion):
            noise = stream.standard_normal((calls or net.steps, history.shape[1], 2), dtype=np.float32)
            action, expert = net.decide(history, torch.from_numpy(noise)[:, None]), NONE
        else:
            decision = net.step(history, None if task.greedy else torch.tensor([stream.random()], dtype=torch.float32))
            action, expert = decision.action, int(decision.expert)
        seen.append(place.step(action.detach().numpy())[0])
        experts.append(expert)
    return seen, experts


# Rollouts


@every_network
@every_backbone
def test_rollouts_side_by_side_are_those_of_one_at_a_time(name: str, backbone: str) -> None:
    """Also where they end at different times, and rows move."""
    described = describe(name, backbone)
    net, task, fate = network(described), Task(seed=5, steps=7), fates(0, 6)
    assert 1 < len(set(fate.steps)) < 1 + max(fate.steps)
    assert max(fate.steps) > 7
    found = roll_out(net, described, Fated(fate, 20, WAYS), seeds := [4, 0, 12, 6, 2, 9], task)
    for row, seed in enumerate(seeds):
        place = Fated(Outcome(*(part[row : row + 1] for part in fate)), 20, WAYS)
        seen, experts = alone(net, place, seed, task)
        steps = len(experts)
        assert steps == min(7, fate.steps[row]) == found.outcome.steps[row]
        np.testing.assert_allclose(found.observations[row, : steps + 1], seen, atol=1e-5)
        assert found.experts[row, :steps].tolist() == experts
        assert (found.experts[row, steps:] == NONE).all()
        if name == "mixture":
            np.testing.assert_allclose(found.probabilities[row, :steps].sum(1), 1, atol=1e-5)
        assert (found.probabilities[row, steps:] == 0).all()


@every_network
def test_a_rollout_does_not_depend_on_the_others(name: str) -> None:
    """In Avoiding, where what is done has consequences."""
    described = describe(name)
    net, task = network(described), Task(steps=25)
    seeds = data.seeds("test", 9)
    many, few = (roll_out(net, described, Avoiding(), some, task) for some in (seeds, seeds[3:5]))
    steps = few.observations.shape[1]
    np.testing.assert_allclose(many.observations[3:5, :steps], few.observations, atol=1e-5)
    for ours, theirs in zip(many.outcome, few.outcome, strict=True):
        assert (ours[3:5] == theirs).all()
    seen, _ = alone(net, Avoiding(), seeds[3], task)
    np.testing.assert_allclose(few.observations[0, : len(seen)], seen, atol=1e-5)
    assert (few.observations[0, len(seen) :] == few.observations[0, len(seen) - 1]).all()


@every_network
def test_random_numbers_are_those_of_the_task_and_the_seed(name: str) -> None:
    described = describe(name)
    net = network(described)
    one, again, other = (
        roll_out(net, described, Avoiding(), [2, 2, 3], Task(steps=12, seed=seed)).observations for seed in (0, 0, 1)
    )
    assert (one == again).all()
    assert (one[0] == one[1]).all()  # the same seed twice
    assert not np.array_equal(one[0], other[0])


def test_a_greedy_student_draws_nothing() -> None:
    described = describe("mixture")
    net = network(described)
    one, other = (roll_out(net, described, Avoiding(), [2, 8], Task(steps=12, greedy=True, seed=s)) for s in (0, 1))
    assert (one.observations == other.observations).all()
    assert (one.experts == other.experts).all()
    ended = one.experts == NONE
    assert (one.experts == np.where(ended, NONE, one.probabilities.argmax(2))).all()


@pytest.mark.parametrize("name", ["ddpm", "mixture"])
def test_goals_are_shown_throughout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the demonstrations of the split end with, one after the other, in front of every history."""
    write_prepared(tmp_path, {"name": "avoiding"})
    described = describe(name, goals=2)
    net = network(described)
    shown: list[torch.Tensor] = []
    act = "decide" if name == "ddpm" else "step"
    plain = getattr(net, act)
    monkeypatch.setattr(net, act, lambda seen, *more: (shown.append(seen), plain(seen, *more))[1])
    evaluate(net, described, tmp_path, "test", Task(rollouts=6, steps=4, fewer_calls=[]))
    episodes = data.load(tmp_path, "test")
    ends = [
        episodes.observations[start + length - 2 : start + length]
        for start, length in zip(episodes.starts, episodes.lengths, strict=True)
    ]
    wanted = torch.stack([ends[number % len(ends)] for number in range(6)])
    assert len(shown) == 4
    for step, seen in enumerate(shown):
        assert torch.equal(seen[:, :2], wanted)
        assert seen.shape[1] == 2 + min(step + 1, WINDOW)


# Figures


def evaluated(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    place: Fated,
    name: str = "mixture",
    split: str = "test",
    **task: Any,
) -> Result:
    if not (folder / "dataset.json").is_file():
        write_prepared(folder, {"name": "fated"})
    monkeypatch.setattr(data, "environment", lambda name: {"fated": place}[name])
    described = describe(name, environment="fated")
    settings = Task(**{"rollouts": len(place.fate.steps), "fewer_calls": [], **task})
    return evaluate(network(described), described, folder, split, settings)


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, chance=st.sampled_from([0.0, 0.1, 0.6, 1.0]))
def test_figures_are_those_of_the_outcome(seed: int, chance: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    fate = fates(seed, chance=chance)
    with pytest.MonkeyPatch.context() as patch:
        found = evaluated(patch, tmp_path_factory.getbasetemp() / "fated", Fated(fate, 20, WAYS))
    won = [number for number, success in enumerate(fate.success) if success]
    counts = [sum(fate.mode[number] == way for number in won) for way in range(len(WAYS))]
    wanted = {
        "success": len(won) / 12,
        "entropy": scipy.stats.entropy(counts, base=len(WAYS)) if won else 0,
        "reward": sum(fate.reward) / 12,
        "calls": 1,
    }
    if won:
        wanted["steps"] = sum(fate.steps[number] for number in won) / len(won)
    assert found.metrics == pytest.approx(wanted | {"nll": found.metrics["nll"]}, abs=2e-6)
    assert next(iter(found.metrics)) == "success"
    assert found.classes["class"].tolist() == WAYS
    assert found.classes["label"].tolist() == [0, 1, 2, 3]
    assert found.classes["successes"].tolist() == counts
    shares = [count / len(won) for count in counts] if won else [math.nan] * 4
    assert found.classes["share"].to_numpy() == pytest.approx(shares, abs=2e-6, nan_ok=True)
    samples = found.samples
    assert samples["success"].tolist() == samples["correct"].tolist() == fate.success.astype(int).tolist()
    assert samples["mode"].tolist() == fate.mode.tolist()
    assert samples["steps"].tolist() == fate.steps.tolist()
    for metric in ("success", "entropy", "reward"):
        assert scores("policy", samples, metric).value == pytest.approx(wanted[metric], abs=2e-6)


def test_without_ways_there_is_no_entropy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = evaluated(monkeypatch, tmp_path, Fated(fates(1, ways=0), 20, []), "ddpm", fewer_calls=[1])
    assert list(found.metrics) == ["success", "reward", "steps", "calls", "one_step_success"]
    assert len(found.classes) == 0
    assert (found.samples["mode"] == NONE).all()
    assert (found.samples["modes"] == 0).all()


def test_splits_begin_differently_and_models_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = []
    for name, split, count in (("ddpm", "test", 5), ("mixture", "test", 5), ("ddpm", "validation", 8)):
        place = Fated(fates(0, 8), 20, WAYS)
        found = evaluated(monkeypatch, tmp_path, place, name, split, rollouts=count)
        began += place.began
        assert found.samples["seed"].tolist() == place.began[0]
        assert found.samples["id"].is_unique
        assert (found.samples["split"] == split).all()
    assert began[0] == began[1]
    assert len(began[0]) == 5
    assert set(began[0]).isdisjoint(began[2])


def test_fewer_calls_are_run_where_they_are_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Fated(fates(3), 20, WAYS)
    asked: list[int] = []
    plain = models.Diffusion.decide
    monkeypatch.setattr(
        models.Diffusion, "decide", lambda self, seen, n: (asked.append(len(n)), plain(self, seen, n))[1]
    )
    found = evaluated(monkeypatch, tmp_path, place, "ddpm", fewer_calls=[1, 2, 3, 8])
    assert found.metrics["calls"] == 3
    steps = max(place.fate.steps)
    assert asked == [3] * steps + [1] * steps + [2] * steps
    assert [name for name in found.metrics if "_step_" in name] == [
        *("one_step_success", "one_step_entropy", "2_step_success", "2_step_entropy")
    ]
    assert not any("_step_" in name for name in evaluated(monkeypatch, tmp_path, place, fewer_calls=[1]).metrics)


def test_one_call_is_the_noise_denoised_once() -> None:
    """What `one_step_success` is about: rollouts with one call are those of `alone` with one call, and others."""
    described = describe("ddpm")
    net, task = network(described), Task(steps=5)
    found, usual = (roll_out(net, described, Avoiding(), [6], task, calls).observations[0] for calls in (1, None))
    np.testing.assert_allclose(found, alone(net, Avoiding(), 6, task, calls=1)[0], atol=1e-5)
    assert not np.allclose(found[1], usual[1], atol=1e-5)


def test_the_task_may_end_rollouts_early(tmp_path: Path) -> None:
    """And it may not lengthen them."""
    described = describe("mixture")
    net = network(described)
    write_prepared(tmp_path, {"name": "avoiding"}, Avoiding.modes)
    long = roll_out(net, described, Fated(fates(0, 4), 6, WAYS), [1, 2, 3, 4], Task(steps=1000))
    assert long.observations.shape[1] == 7
    short = evaluate(net, described, tmp_path, "validation", Task(rollouts=4, steps=3))
    assert short.metrics["success"] == short.metrics["entropy"] == 0
    assert "steps" not in short.metrics


# Demonstrations


@every_backbone
@pytest.mark.parametrize(("goals", "covariance"), [(0, "full"), (1, "diagonal")])
def test_the_likelihood_is_that_of_scipy(
    tmp_path: Path, backbone: str, goals: int, covariance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of every episode once, seen with the window before it, in the raw units of actions."""
    monkeypatch.setattr(evaluation, "PART", 4)
    write_prepared(tmp_path, None)
    described = describe("mixture", backbone, None, goals=goals, covariance=covariance)
    net = network(described)
    found = losses(net, described, tmp_path, "test", Task())
    episodes = data.load(tmp_path, "test")
    mean, std = (np.array(SCALING["action"][name]) for name in ("mean", "std"))
    for row, (start, length) in enumerate(zip(episodes.starts.tolist(), episodes.lengths.tolist(), strict=True)):
        total = 0.0
        for step in range(length):
            rows = [*range(start + length - goals, start + length)]
            rows += range(start + max(0, step + 1 - WINDOW), start + step + 1)
            with torch.no_grad():
                output = net(episodes.observations[rows][None])
            means, factors, gate = (part[0, -1].double().numpy() for part in output)
            parts = []
            for k in range(len(gate)):
                factor = np.diag(factors[k]) if covariance == "diagonal" else factors[k]
                shape = np.diag(std) @ factor @ factor.T @ np.diag(std)
                normal = scipy.stats.multivariate_normal(mean + std * means[k], shape)
                parts.append(gate[k] + normal.logpdf(episodes.actions[start + step].numpy()))
            total -= scipy.special.logsumexp(parts)
        assert found["id"][row] == episodes.ids[row]
        assert found["count"][row] == length
        assert found["loss"][row] == pytest.approx(total / length, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", ["ddpm", "beso"])
def test_the_loss_of_a_teacher_is_its_own_on_the_same_noise(tmp_path: Path, name: str) -> None:
    write_prepared(tmp_path, None)
    described = describe(name, environment=None)
    net = network(described)
    found = losses(net, described, tmp_path, "test", Task(seed=4))
    episodes = data.load(tmp_path, "test")
    rows = data.windows(episodes, WINDOW)
    generator = torch.Generator().manual_seed(4)
    actions = net.scaling.actions(episodes.actions[rows])
    noise = torch.randn(actions.shape, generator=generator)
    level = net.level_at(torch.rand(len(rows), generator=generator))
    with torch.no_grad():
        wanted = net.loss(actions, episodes.observations[rows], noise, level)
    assert found["count"].tolist() == [length - WINDOW + 1 for length in episodes.lengths.tolist()]
    assert np.average(found["loss"], weights=found["count"]) == pytest.approx(float(wanted), rel=1e-5)
    assert not np.isclose(losses(net, described, tmp_path, "test", Task(seed=5))["loss"], found["loss"]).all()


@every_network
def test_without_an_environment_there_is_a_loss(tmp_path: Path, name: str) -> None:
    write_prepared(tmp_path, None)
    described = describe(name, environment=None)
    net = network(described)
    result = evaluate(net, described, tmp_path, "validation", Task())
    assert list(result.metrics) == ["loss", *["nll"] * (name == "mixture")]
    found = losses(net, described, tmp_path, "validation", Task())
    terms = np.repeat(found["loss"], found["count"])
    assert result.metrics["loss"] == pytest.approx(terms.mean(), abs=2e-6)
    assert result.samples["id"].tolist() == data.load(tmp_path, "validation").ids
    assert scores("policy", result.samples, "loss").value == pytest.approx(terms.mean(), abs=2e-5)
    assert len(result.classes) == 0


def test_likelihood_of_a_data_set_with_an_environment(tmp_path: Path) -> None:
    """The same number as without."""
    write_prepared(tmp_path / "with", {"name": "avoiding"}, Avoiding.modes[:5])
    write_prepared(tmp_path / "without", None)
    described = describe("mixture")
    net = network(described)
    one, other = (
        evaluate(net, described, tmp_path / x, "test", Task(rollouts=2, steps=2)) for x in ("with", "without")
    )
    assert one.metrics["nll"] == other.metrics["nll"]
    assert [column in one.samples for column in ("success", "loss")] == [True, False]
