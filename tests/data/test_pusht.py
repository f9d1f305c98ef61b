"""Push-T: rollouts side by side are those of the simulator; without its package that is said."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from data import policy
from data.errors import UserError
from data.pusht import PushT


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    with pytest.raises(UserError, match=re.escape('pip install ".[pusht]"')):
        policy.environment("pusht")
    assert PushT.constants() == {"steps": 300}


@pytest.fixture
def environment() -> PushT:
    pytest.importorskip("gym_pusht", reason="the optional package gym-pusht is not installed")
    return PushT()


def wander(steps: int, count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 512, (steps, count, 2))


def test_rollouts_are_those_of_the_simulator(environment: PushT) -> None:
    import gymnasium

    actions, seeds = wander(40, 3), [5, 8, 13]
    seen = [environment.reset(seeds), *(environment.step(step) for step in actions)]
    outcome = environment.outcome()
    assert seen[0].dtype == seen[-1].dtype == np.float32
    for place, seed in enumerate(seeds):
        alone = gymnasium.make("gym_pusht/PushT-v0", obs_type="state", max_episode_steps=300, disable_env_checker=True)
        expected, rewards = [alone.reset(seed=seed)[0]], []
        for step in actions[:, place]:
            observation, reward, *_ = alone.step(step)
            expected.append(observation)
            rewards.append(reward)
        np.testing.assert_allclose(np.stack(seen)[:, place], np.stack(expected), rtol=1e-6)
        assert outcome.reward[place] == max(rewards)
    assert outcome.steps.tolist() == [40] * 3
    assert not outcome.success.any()
    assert not outcome.failed.any()
    assert outcome.mode.tolist() == [-1] * 3
    again = [environment.reset(seeds[1:]), *(environment.step(step) for step in actions[:, 1:])]
    np.testing.assert_array_equal(np.stack(again), np.stack(seen)[:, 1:])


def test_who_does_nothing_is_too_late_and_stays_there(environment: PushT) -> None:
    still = environment.reset([0, 1])[:, :2]
    for _ in range(environment.limit):
        assert not environment.ended.any()
        last = environment.step(still)
    assert environment.ended.all()
    np.testing.assert_array_equal(environment.step(still + 100), last)
    assert environment.outcome().steps.tolist() == [300, 300]


def test_what_is_no_action_is_refused(environment: PushT) -> None:
    environment.reset([0, 1])
    with pytest.raises(ValueError, match=r"shape \(3, 2\), but the rollouts take \(2, 2\)"):
        environment.step(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="not finite"):
        environment.step(np.full((2, 2), np.nan))


@pytest.mark.bench
@pytest.mark.skipif(not os.environ.get("DISTILLERY_DATA"), reason="DISTILLERY_DATA names no folder with real data")
def test_recorded_actions_lead_to_recorded_states(environment: PushT) -> None:
    """The block's angle is set before its place: the other way round it would be moved."""
    with np.load(Path(os.environ["DISTILLERY_DATA"]) / "pusht-lowdim" / "pusht.npz") as arrays:
        ends = arrays["episode_ends"][:5]
        states, actions = arrays["state"], arrays["action"]
    environment.reset(range(len(ends)))
    for place, (first, last) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        inside = environment.environments[place].unwrapped
        x, y, block_x, block_y, angle = (float(value) for value in states[first])
        inside.block.angle = angle
        inside.block.position = (block_x, block_y)
        inside.agent.position = (x, y)
        seen = []
        for action in actions[first:last]:
            every = np.zeros((len(ends), 2))
            every[place] = action
            environment.ended[:] = np.arange(len(ends)) != place
            seen.append(environment.step(every)[place])
        distances = np.abs(np.array(seen)[:-1, :4] - states[first + 1 : last, :4])
        assert np.median(distances) < 0.01
    assert (environment.outcome().reward > 0.85).all()
