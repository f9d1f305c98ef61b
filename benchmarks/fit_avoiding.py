"""The constants of Avoiding that are fitted to human recordings, as they stand in `data/avoiding.py`.

Reads `avoiding.npz` of `d3il-avoiding` (observation, action, episode_ends, mode). The rod's radius is the largest with
which no recorded path touches a cylinder, rounded down to a tenth of a millimetre. The tracking is the share of the way
to the desired position that is made in a step: the one with which positions that follow the recorded actions are
nearest to the recorded ones, in the mean square over all steps up to the finish, where a rollout would end.
"""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from data.avoiding import FINISH, Avoiding, clearance, mode_of


class Recording(NamedTuple):
    """One demonstration: desired and actual positions (T, 2), actions (T, 2), and the side at each row."""

    desired: np.ndarray
    actual: np.ndarray
    actions: np.ndarray
    sides: list[int]

    def finish(self) -> int:
        """The first step beyond the finish."""
        return int(np.argmax(self.actual[:, 1] > FINISH))


def read(file: Path) -> list[Recording]:
    """All recordings, in float64."""
    with np.load(file, allow_pickle=False) as arrays:
        observations, actions = (arrays[name].astype(np.float64) for name in ("observation", "action"))
        ends, sides = arrays["episode_ends"], arrays["mode"]
    return [
        Recording(*np.split(observations[first:last], 2, axis=1), actions[first:last], side.tolist())
        for first, last, side in zip([0, *ends[:-1]], ends, sides, strict=True)
    ]


def replay(recording: Recording, tracking: float) -> np.ndarray:
    """(T, 2) positions that follow the recorded actions, without cylinders."""
    desired, actual = recording.desired[0], recording.actual[0]
    positions = [actual]
    for action in recording.actions[:-1]:
        desired = desired + action
        actual = actual + tracking * (desired - actual)
        positions.append(actual)
    return np.array(positions)


def errors(recordings: list[Recording], tracking: float) -> np.ndarray:
    """Distances in metres between replayed and recorded positions, of all steps up to the finish."""
    found = []
    for recording in recordings:
        distances = np.linalg.norm(replay(recording, tracking) - recording.actual, axis=1)
        found.append(distances[: recording.finish() + 1])
    return np.concatenate(found)


def fit_tracking(recordings: list[Recording]) -> float:
    """The share that makes the mean square of the errors least."""
    found = minimize_scalar(lambda share: (errors(recordings, share) ** 2).mean(), bounds=(0.01, 1), method="bounded")
    return float(found.x)


def main() -> None:
    """Print the constants, and how well a replay of the recordings goes with them."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example, from the root of the project: PYTHONPATH=. python benchmarks/fit_avoiding.py "
        "$DISTILLERY_DATA/d3il-avoiding/avoiding.npz",
    )
    default = Path(os.environ.get("DISTILLERY_DATA", "."), "d3il-avoiding", "avoiding.npz")
    parser.add_argument("file", type=Path, nargs="?", default=default)
    recordings = read(parser.parse_args().file)
    starts = np.unique([recording.actual[0] for recording in recordings], axis=0)
    print("START = " + " or ".join(f"({x:.8f}, {y:.8f})" for x, y in starts))
    print(f"RECORDED = {len(recordings)}")
    ahead = [recording.desired[0] - recording.actual[0] for recording in recordings]
    print("MOVED = " + ", ".join(f"({x:.8f}, {y:.8f})" for x, y in ahead if max(abs(x), abs(y)) > 1e-6))
    gap = min(clearance(recording.actual) for recording in recordings)
    print(f"ROD = {np.floor(gap * 1e4) / 1e4:.4f}  # {gap:.6f} at most")
    tracking = round(fit_tracking(recordings), 3)
    found = errors(recordings, tracking) * 1e3
    print(
        f"TRACKING = {tracking}  # {len(found)} steps, mm: root mean square {np.sqrt((found**2).mean()):.1f}, "
        f"median {np.median(found):.1f}, 95 % {np.percentile(found, 95):.1f}, largest {found.max():.1f}"
    )
    environment, succeeded, same = Avoiding(), 0, 0
    for recording in recordings:
        environment.reset([0])
        for action in np.vstack([recording.desired[0] - recording.actual[0], recording.actions]):
            environment.step(action[None])
        outcome = environment.outcome()
        succeeded += int(outcome.success[0])
        same += int(outcome.success[0] and environment.modes[outcome.mode[0]] == "-".join(map(str, recording.sides)))
    told = sum(Avoiding.modes[mode_of(one.actual)] == "-".join(map(str, one.sides)) for one in recordings)
    print(f"recorded paths of the recorded way: {told} of {len(recordings)}")
    print(f"replayed in the environment: {succeeded} succeed, {same} of them the recorded way")


if __name__ == "__main__":
    main()
