"""Avoiding: steps per second of all rollouts at once, against one rollout after the other, in one run.

Every rollout is given the actions of a demonstration, so that most of them go all the way. `alone` is the environment
itself with one rollout at a time; `plain` are the rules written out in Python's own numbers, without arrays. All have
to come to the same outcomes, which is checked before any time is taken. A step counts if its rollout has not ended.
Repetitions alternate; a figure is the median of the ratios of repetitions.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import numpy as np

from data.avoiding import CYLINDERS, FINISH, MODES, ROD, ROWS, STEPS, TRACKING, Avoiding, demonstrate

Result = list[tuple[bool, int, int]]  # success, mode and steps of each rollout
Side = Callable[[np.ndarray, list[int]], Result]
REACH = [(x, y, (radius + ROD) ** 2) for x, y, radius in CYLINDERS.tolist()]


def together(actions: np.ndarray, seeds: list[int]) -> Result:
    """(T, R, 2) actions: all rollouts at once."""
    environment = Avoiding()
    environment.reset(seeds)
    for step in actions:
        environment.step(step)
        if environment.ended.all():
            break
    outcome = environment.outcome()
    return list(zip(outcome.success.tolist(), outcome.mode.tolist(), outcome.steps.tolist(), strict=True))


def alone(actions: np.ndarray, seeds: list[int]) -> Result:
    """One rollout after the other."""
    return [together(actions[:, place : place + 1], [seed])[0] for place, seed in enumerate(seeds)]


def plain(actions: np.ndarray, seeds: list[int]) -> Result:
    """The rules, without arrays."""
    environment = Avoiding()
    return [
        _plain(environment.reset([seed])[0].astype(float).tolist(), own)
        for seed, own in zip(seeds, actions.transpose(1, 0, 2).astype(float).tolist(), strict=True)
    ]


def _plain(start: list[float], actions: list[list[float]]) -> tuple[bool, int, int]:
    desired_x, desired_y, x, y = start
    row, steps, seen = 0, 0, []
    for action_x, action_y in actions:
        steps += 1
        desired_x += action_x
        desired_y += action_y
        along_x, along_y = TRACKING * (desired_x - x), TRACKING * (desired_y - y)
        length = along_x * along_x + along_y * along_y
        hit = False
        for centre_x, centre_y, reach in REACH:
            to_x, to_y = centre_x - x, centre_y - y
            share = (to_x * along_x + to_y * along_y) / length if length else 0.0
            share = 0.0 if share < 0 else min(share, 1.0)
            to_x -= share * along_x
            to_y -= share * along_y
            hit = hit or to_x * to_x + to_y * to_y < reach
        while row < 3 and y + along_y > ROWS[row][0]:
            place = x + (ROWS[row][0] - y) / along_y * along_x
            seen.append(sum(place > part for part in ROWS[row][1]))
            row += 1
        x += along_x
        y += along_y
        if hit or y > FINISH or steps == STEPS:
            break
    mode = MODES.index("-".join(map(str, seen))) if row == 3 else -1
    return not hit and y > FINISH, mode, steps


def main() -> None:
    """Print a row per way."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example, from the root of the project: PYTHONPATH=. python benchmarks/speed_avoiding.py",
    )
    parser.add_argument("--rollouts", type=int, default=480)
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    made = demonstrate(math.ceil(arguments.rollouts / len(MODES)), 0.008, 0)[: arguments.rollouts]
    actions = np.zeros((STEPS, len(made), 2))
    for place, (_, _, own) in enumerate(made):
        actions[: len(own), place] = own
    seeds = list(range(len(made)))
    sides: dict[str, Side] = {"together": together, "alone": alone, "plain": plain}
    results = {name: side(actions, seeds) for name, side in sides.items()}
    if not results["together"] == results["alone"] == results["plain"]:
        raise SystemExit("the ways differ")
    steps = sum(count for *_, count in results["together"])
    print(f"numpy {np.__version__}, {len(made)} rollouts, {steps} steps, {arguments.repetitions} repetitions\n")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.repetitions):
        for name, side in sides.items():
            start = time.perf_counter()
            side(actions, seeds)
            times[name].append(time.perf_counter() - start)
    print("| way | steps per second | together is so many times as fast |\n|---|---|---|")
    for name, taken in times.items():
        ratio = statistics.median(other / own for other, own in zip(taken, times["together"], strict=True))
        print(f"| {name} | {steps / statistics.median(taken):,.0f} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
