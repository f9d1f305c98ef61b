"""Push-T: a disc pushes a T-shaped block onto its place, in the simulator of the optional package gym-pusht.

An observation is the place of the disc (x, y), that of the block (x, y) and its angle; an action is where the disc is
to go. Places are in pixels of a square of 512, angles in radians.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.avoiding import UNKNOWN, Outcome
from data.errors import UserError

STEPS = 300
MODES: list[str] = []


class PushT:
    """R rollouts side by side, as `data.avoiding.Avoiding`, each in a simulator of its own.

    The reward of a rollout is the largest of its steps: the share of the place that the block covers, over 0.95 and
    1 at most. It is a success to cover 0.95, which ends the rollout. There are no failures and no modes.

    Raises:
        UserError: gym-pusht is missing.
    """

    observations, actions, limit, modes = 5, 2, STEPS, MODES

    def __init__(self) -> None:
        try:
            import gym_pusht  # noqa: F401 (its import makes the name known to gymnasium)
            import gymnasium
        except ImportError as error:
            raise UserError(
                f"the environment 'pusht' needs the package gym-pusht, which cannot be imported ({error}) · "
                'pip install ".[pusht]"'
            ) from None
        self._make = gymnasium.make
        self.environments: list[Any] = []

    @staticmethod
    def constants() -> dict[str, Any]:
        """What the rollouts depend on, as plain data."""
        return {"steps": STEPS}

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        """Begin a rollout for each seed. Returns its first observation, (R, 5) float32."""
        for _ in range(len(self.environments), len(seeds)):
            self.environments.append(
                self._make("gym_pusht/PushT-v0", obs_type="state", max_episode_steps=STEPS, disable_env_checker=True)
            )
        count = len(seeds)
        self._seen = np.stack(
            [one.reset(seed=seed)[0] for one, seed in zip(self.environments, seeds, strict=False)]
        ).astype(np.float32)
        self.ended, self._success = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
        self._reward, self._steps = np.zeros(count), np.zeros(count, dtype=np.int64)
        return self._seen.copy()

    def step(self, actions: np.ndarray) -> np.ndarray:
        """Send the discs to (R, 2) places. Returns the observations (R, 5) float32.

        Raises:
            ValueError: the actions have another shape, or are not finite.
        """
        actions = np.asarray(actions, dtype=np.float64)
        if actions.shape != (len(self.ended), 2):
            raise ValueError(f"actions of shape {actions.shape}, but the rollouts take {(len(self.ended), 2)}")
        if not np.isfinite(actions).all():
            raise ValueError(f"an action is not finite: {actions[~np.isfinite(actions).all(axis=1)][0]}")
        for place in np.flatnonzero(~self.ended):
            seen, reward, success, late, _ = self.environments[place].step(actions[place])
            self._seen[place] = seen
            self._reward[place] = max(self._reward[place], reward)
            self._success[place] = success
            self._steps[place] += 1
            self.ended[place] = success or late
        return self._seen.copy()

    def outcome(self) -> Outcome:
        """What came of the rollouts so far."""
        unknown = np.full(len(self.ended), UNKNOWN, dtype=np.int64)
        failed = np.zeros(len(self.ended), dtype=bool)
        return Outcome(self._success.copy(), self._reward.copy(), unknown, self._steps.copy(), failed)
