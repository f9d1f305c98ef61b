"""Avoiding: a rod is steered in the plane past three rows of cylinders, which can be done in 24 ways.

After D3IL's task of that name (VDD card 9). A policy sees the desired position of the rod and its actual one, and
answers by how much the desired one is to move. The actual one follows with a lag. It is a failure to touch a cylinder,
a success to be beyond the finish line, and the way is given by the sides that were taken at the rows. Positions are in
metres, x to the right and y towards the finish.

What is fitted to human recordings is printed by `PYTHONPATH=. python benchmarks/fit_avoiding.py`.
"""

import functools
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np

from data.errors import UserError

CYLINDERS = np.array([
    [0.5, -0.1, 0.03],
    [0.425, 0.08, 0.025],
    [0.575, 0.08, 0.025],
    [0.35, 0.26, 0.025],
    [0.5, 0.26, 0.025],
    [0.65, 0.26, 0.025],
])  # fmt: skip
"""Centre and radius of each (VDD card 9)."""
ROWS = ((-0.1, (0.5,)), (0.08, (0.425, 0.575)), (0.26, (0.35, 0.5, 0.65)))
"""Where each row is, and what parts its sides."""
FINISH = 0.35
STEPS = 250
MODES = ["-".join(map(str, sides)) for sides in product(*(range(len(parts) + 1) for _, parts in ROWS))]
"""The sides at the three rows, each counted from the left: 0-0-0 to 1-2-3."""
HEIGHTS = np.array([height for height, _ in ROWS])
PARTS = np.array([[*parts, *[np.inf] * (3 - len(parts))] for _, parts in ROWS])
UNKNOWN = -1  # the mode of a rollout that did not pass every row

START = (0.52492845, -0.27973673)  # fitted: where the rod stands at the first step of every recording
ROD = 0.0115  # fitted: the largest radius with which no recording touches a cylinder, rounded down
TRACKING = 0.507  # fitted: the share of the way to the desired position that is made in a step
REACH = (CYLINDERS[:, 2:] + ROD) ** 2
RECORDED = 96
MOVED = ((0.0, 0.0061262), (0.00755489, 0.0), (0.00592518, 0.00877902))
"""Fitted: by how much the desired position of these of the recordings is ahead at their first step; of the others by
nothing. Nothing else varies at the beginning."""

MARGIN = 0.003  # metres that generated demonstrations keep free around the rod
TRIES = 100
FASTEST = 0.0125  # the largest recorded action, in each direction
CRUISE = (0.0125, 0.0148)  # recorded lengths of an action: the median, and the largest but for a hundredth
SLOPES = (0.45, 1.1)  # metres across per metre ahead: sideways, recorded actions are 0 or 0.005 at least
BESIDE = 0.03  # metres before and after the middle of a row in which a path goes straight on
ROUNDED = 0.03  # metres over which a path turns
GRAIN = 0.0005


class Outcome(NamedTuple):
    """What came of R rollouts so far.

    Attributes:
        success: (R,) bool. reward: (R,) float64, what the rollout earned. mode: (R,) int64, an index into the modes,
            UNKNOWN where there is none. steps: (R,) int64, how many were made. failed: (R,) bool, ended by a failure
            before the last step; neither `success` nor `failed` is too late.
    """

    success: np.ndarray
    reward: np.ndarray
    mode: np.ndarray
    steps: np.ndarray
    failed: np.ndarray


class Avoiding:
    """R rollouts at once; what one of them does is the same whatever the others are.

    The reward is 1 for a success and 0 otherwise: the task has no other.

    Attributes:
        observations, actions: dimensions. limit: steps of a rollout at most. modes: names.
        ended: (R,) bool; further steps change nothing of such a rollout.
    """

    observations, actions, limit, modes = 4, 2, STEPS, MODES

    @staticmethod
    def constants() -> dict[str, Any]:
        """What the rollouts depend on, as plain data."""
        return {
            "start": list(START),
            "moved": [list(offset) for offset in MOVED],
            "recorded": RECORDED,
            "cylinders": CYLINDERS.tolist(),
            "rows": [[height, list(parts)] for height, parts in ROWS],
            "finish": FINISH,
            "rod": ROD,
            "tracking": TRACKING,
            "steps": STEPS,
        }

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        """Begin a rollout for each seed. Returns its first observation, (R, 4) float32."""
        count = len(seeds)
        self._actual = np.repeat(np.array(START)[:, None], count, axis=1)
        self._desired = self._actual + np.array([_ahead(seed) for seed in seeds]).T
        self._sides = np.full((len(ROWS), count), UNKNOWN)
        self._success, self._failed, self.ended = (np.zeros(count, dtype=bool) for _ in range(3))
        self._steps = np.zeros(count, dtype=np.int64)
        return self._observation()

    def step(self, actions: np.ndarray) -> np.ndarray:
        """Move the desired positions by (R, 2) actions. Returns the observations (R, 4) float32.

        An observation is desired x and y, actual x and y.

        Raises:
            ValueError: the actions have another shape, or are not finite.
        """
        actions = np.asarray(actions, dtype=np.float64)
        if actions.shape != self._desired.shape[::-1]:
            raise ValueError(f"actions of shape {actions.shape}, but the rollouts take {self._desired.shape[::-1]}")
        if not np.isfinite(actions).all():
            raise ValueError(f"an action is not finite: {actions[~np.isfinite(actions).all(axis=1)][0]}")
        going = ~self.ended
        before = self._actual
        self._desired = self._desired + actions.T * going
        after = before + TRACKING * going * (self._desired - before)
        _pass_rows(before, after, self._sides)
        touched = (_distances(before, after) < REACH).any(axis=0) & going
        self._actual = after
        self._steps += going
        self._failed |= touched
        self._success |= going & ~touched & (after[1] > FINISH)
        self.ended = self._success | self._failed | (self._steps >= STEPS)
        return self._observation()

    def outcome(self) -> Outcome:
        """What came of the rollouts so far."""
        return Outcome(
            self._success.copy(), self._success * 1.0, _mode(self._sides), self._steps.copy(), self._failed.copy()
        )

    def _observation(self) -> np.ndarray:
        return np.concatenate([self._desired, self._actual]).T.astype(np.float32)


@functools.cache
def _ahead(seed: int) -> tuple[float, float]:
    """By how much the desired position is ahead at the beginning of a rollout."""
    drawn = np.random.default_rng(seed).integers(RECORDED)
    return MOVED[drawn] if drawn < len(MOVED) else (0.0, 0.0)


# Geometry. Only what rounds the same for every length of an array: a rollout must not depend on how many there are.


def _distances(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(6, R) squared distances from the centre of each cylinder to the straight ways between (2, R) positions."""
    (x, y), (along_x, along_y) = before, after - before
    to_x, to_y = CYLINDERS[:, :1] - x, CYLINDERS[:, 1:2] - y
    # Where nothing moves, the nearest point is where it stands.
    per_length = 1 / np.maximum(along_x * along_x + along_y * along_y, np.finfo(np.float64).tiny)
    share = to_x * along_x
    share += to_y * along_y
    share *= per_length
    np.maximum(share, 0, out=share)
    np.minimum(share, 1, out=share)
    to_x -= share * along_x
    to_y -= share * along_y
    to_x *= to_x
    to_y *= to_y
    to_x += to_y
    return to_x


def _pass_rows(before: np.ndarray, after: np.ndarray, sides: np.ndarray) -> None:
    """Note in (3, R) `sides` on which side of its parts a row was passed, the first time that it was."""
    passed = (before[1] <= HEIGHTS[:, None]) & (after[1] > HEIGHTS[:, None]) & (sides == UNKNOWN)
    if not passed.any():
        return
    rows, which = np.nonzero(passed)
    (x, y), (to_x, to_y) = before[:, which], after[:, which]
    place = x + (HEIGHTS[rows] - y) / (to_y - y) * (to_x - x)
    sides[rows, which] = (place[:, None] > PARTS[rows]).sum(axis=1)


def _mode(sides: np.ndarray) -> np.ndarray:
    """(R,) int64: the index of (3, R) sides in MODES."""
    mode = (sides[0] * 3 + sides[1]) * 4 + sides[2]
    return np.where((sides == UNKNOWN).any(axis=0), UNKNOWN, mode).astype(np.int64)


def clearance(path: np.ndarray) -> float:
    """The smallest distance between a (T, 2) path, straight from point to point, and the surface of a cylinder."""
    return float((np.sqrt(_distances(path[:-1].T, path[1:].T)) - CYLINDERS[:, 2:]).min())


def mode_of(path: np.ndarray) -> int:
    """The index in MODES of a (T, 2) path, UNKNOWN if it does not pass every row."""
    sides = np.full((len(ROWS), 1), UNKNOWN)
    for before, after in pairwise(path):
        _pass_rows(before[:, None], after[:, None], sides)
    return int(_mode(sides)[0])


# Measures


def mode_entropy(modes: np.ndarray, success: np.ndarray, count: int) -> float:
    """Entropy of the modes of successful rollouts, to the base of the number of modes: 0 to 1 (VDD card 6, D3IL).

    Args:
        modes: (R,) integers. success: (R,) bool. count: how many modes there are.

    Returns:
        0 if no rollout succeeded.
    """
    _, found = np.unique(np.asarray(modes)[np.asarray(success, dtype=bool)], return_counts=True)
    shares = found / max(found.sum(), 1)
    # -0 is what one mode alone would give.
    return float(-(shares * np.log(shares)).sum() / np.log(count)) + 0.0


def context_entropy(modes: np.ndarray, success: np.ndarray, count: int, failed_as_zero: bool = True) -> float:
    """Mean over contexts of the entropy of modes, for tasks that begin in one of several ways (VDD card 6, D3IL).

    Args:
        modes: (contexts, rollouts) integers. success: the same of bool. count: how many modes a context has.
        failed_as_zero: contexts without a success count as 0 (Aligning); otherwise they are left out (Sorting).

    Returns:
        0 if no rollout of any context succeeded.
    """
    kept = [
        mode_entropy(mode, some, count)
        for mode, some in zip(modes, np.asarray(success, dtype=bool), strict=True)
        if failed_as_zero or some.any()
    ]
    return float(np.mean(kept)) if kept else 0.0


# Demonstrations


def demonstrate(episodes: int, noise: float, seed: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Demonstrations of every way, `episodes` of each: index of the mode, observations (T, 4) and actions (T, 2).

    Paths through the gates, steered as in the human recordings and at their pace, and with a variation of theirs: where
    a gate is passed, where the path turns and how sharply, how fast and how steadily it goes. Both
    are float32, and the observations are those of the environment when it is given the actions; an episode ends with
    the last step before the finish. No path comes nearer to a cylinder than MARGIN. The first episodes of a mode are
    the same whatever `episodes` is.

    Args:
        noise: metres, standard deviation of where paths pass a gate. seed: of everything drawn.

    Raises:
        UserError: no path of a mode stayed clear in TRIES tries: too much noise.
    """
    tasks = list(product(range(len(MODES)), range(episodes)))
    generators = [np.random.default_rng([seed, *task]) for task in tasks]
    made: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    waiting = list(range(len(tasks)))
    for _ in range(TRIES):
        modes = [tasks[place][0] for place in waiting]
        drawn = [_draw(mode, noise, generators[place]) for mode, place in zip(modes, waiting, strict=True)]
        seeds = [int(generators[place].integers(2**32)) for place in waiting]
        for place, found in zip(waiting, _perform(drawn, modes, seeds), strict=True):
            if found is not None:
                made[tasks[place]] = found
        waiting = [place for place in waiting if tasks[place] not in made]
        if not waiting:
            return [(mode, *made[mode, episode]) for mode, episode in tasks]
    raise UserError(
        f"no path of the way {MODES[tasks[waiting[0]][0]]} kept clear of the cylinders in {TRIES} tries with noise of "
        f"{noise} m · lower `noise` of the data set; 0.014 is that of human recordings"
    )


def _draw(mode: int, noise: float, generator: np.random.Generator) -> np.ndarray:
    """(T, 2) float32 actions: a path to beyond the finish, before it is known whether it stays clear."""
    sides = map(int, MODES[mode].split("-"))
    corners = [START]
    for (height, parts), side in zip(ROWS, sides, strict=True):
        # Recordings pass at the outside 0.076 m beside the last cylinder.
        edges = (parts[0] - 0.152, *parts, parts[-1] + 0.152)
        # People steer with a stick: straight on, then across at no small angle, then straight on again.
        (x, y), across = corners[-1], generator.normal((edges[side] + edges[side + 1]) / 2, noise)
        above, below = y + BESIDE * (len(corners) > 1), height - BESIDE
        rise = min(abs(across - x) / generator.uniform(*SLOPES), below - above)
        turn = above + generator.beta(1, 3) * (below - above - rise)
        corners += [(x, turn), (across, turn + rise), (across, height)]
    corners.append((corners[-1][0], FINISH + 0.1))
    # Even points along the path, close together; the stick takes a moment to follow.
    lengths = np.cumsum([0, *(np.hypot(x - u, y - v) for (u, v), (x, y) in pairwise(corners))])
    places = np.arange(0, lengths[-1], GRAIN)
    path = np.column_stack([_smooth(np.interp(places, lengths, axis)) for axis in np.array(corners).T])
    ways = np.abs(np.diff(path, axis=0))
    # In steps at full speed, which is limited along the path and in each direction.
    cruise = generator.uniform(*CRUISE)
    effort = np.maximum(ways.max(axis=1) / FASTEST, np.sqrt((ways**2).sum(axis=1)) / cruise)
    reached = np.concatenate([[0], np.cumsum(effort)])
    at = np.concatenate([[0], np.cumsum(_pace(generator, int(2 * reached[-1]) + 20))])
    # Where the path ends there is nothing more to do: the finish was passed before.
    at = at[: np.searchsorted(at, reached[-1])]
    positions = np.column_stack([np.interp(at, reached, axis) for axis in path.T])
    return np.diff(positions, axis=0).astype(np.float32)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over ROUNDED metres, which keeps both ends."""
    width = round(ROUNDED / GRAIN) // 2
    padded = np.concatenate([2 * values[0] - values[width:0:-1], values, 2 * values[-1] - values[-2 : -width - 2 : -1]])
    return np.convolve(padded, np.full(2 * width + 1, 1 / (2 * width + 1)), mode="valid")


def _pace(generator: np.random.Generator, steps: int) -> np.ndarray:
    """(steps,) shares of full speed: a ramp, and then mostly all of it."""
    pace = np.clip((np.arange(steps) + 1) / generator.integers(1, 5), 0, 1)
    hesitation = generator.normal(0, 1, steps)
    for step in range(1, steps):
        hesitation[step] = 0.9 * hesitation[step - 1] + np.sqrt(1 - 0.9**2) * hesitation[step]
    slack: np.ndarray = pace * (1 - np.clip(0.1 * (hesitation - 0.5), 0, 0.4))
    return slack


def _perform(
    drawn: Sequence[np.ndarray], modes: Sequence[int], seeds: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray] | None]:
    """Observations and actions of each, as the environment has them; None where it does not go as it should."""
    environment = Avoiding()
    actions = np.zeros((max(map(len, drawn)), len(drawn), 2), dtype=np.float32)
    for place, own in enumerate(drawn):
        actions[: len(own), place] = own
    seen = [environment.reset(seeds)]
    seen += [environment.step(step) for step in actions]
    observations, outcome = np.stack(seen, axis=1), environment.outcome()
    found: list[tuple[np.ndarray, np.ndarray] | None] = []
    for place, mode in enumerate(modes):
        steps = int(outcome.steps[place])
        path = observations[place, : steps + 1].astype(np.float64)
        good = outcome.success[place] and outcome.mode[place] == mode and clearance(path[:, 2:]) >= ROD + MARGIN
        found.append((observations[place, :steps], actions[:steps, place]) if good else None)
    return found
