"""Drawings as SVG inside the page: lines over steps or strengths, clouds of points, who learns from whom, ways past
obstacles, shares over steps. Colours come from the style, but for those that a caller gives.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from stages.report.page import Html, tag

SERIES = 8
POINTS = 160
WIDTH, HEIGHT = 360, 224
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 36
# Side of a cloud of points, and how near to its edge they come.
CLOUD, CLOUD_EDGE = 160, 5
# Units of a drawing of the ground per metre.
PER_METRE = 1000
# Of an animation: steps per second, and the part of it at the end in which nothing moves.
PACE, REST = 12.0, 0.15
# Height of the strip under shares that says which of them was taken.
STRIP = 5
# About how wide a character is, in the text of charts and in bold.
CHARACTER, BOLD = 6.8, 8.2
SHARES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)


@dataclass(frozen=True)
class Scale:
    """The vertical axis: where a value stands, ends in those units, and the values that are labelled."""

    place: Callable[[float], float]
    low: float
    high: float
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Axis:
    """The horizontal axis, which starts at 0: places that are labelled, where it ends, and what it is."""

    ticks: list[tuple[float, str]]
    last: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A point of a series that stands out: a dot, or a ring."""

    number: int
    place: float
    value: float
    ring: bool


@dataclass(frozen=True)
class Node:
    """A model in the chain: up to three lines of text; what it learns from, and by which method."""

    name: str
    kind: str
    lines: tuple[str, ...]
    parent: str | None
    label: str


def linear(values: np.ndarray) -> Scale:
    """Even steps of 1, 2 or 5 times a power of ten."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = _step(high - low)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [(index * step, f"{index * step:.6g}") for index in range(first, last + 1)]
    return Scale(float, first * step, last * step, ticks)


def logarithmic(values: np.ndarray) -> Scale:
    """Equal factors at equal distances; for values of very different size. All must be positive."""
    low, high = math.log10(values.min()) - 0.03, math.log10(values.max()) + 0.03
    digits = (1, 2, 5) if high - low < 3 else (1,)
    all_ticks = [d * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for d in digits]
    return Scale(math.log10, low, high, [(tick, f"{tick:g}") for tick in all_ticks if low <= math.log10(tick) <= high])


def share(values: np.ndarray) -> Scale:
    """For shares of what is right: equal factors of what is wrong at equal distances, so that 98 % and 99 % differ."""
    largest = max((float(value) for value in values if value < 1), default=0.99)
    # 100 % would stand infinitely high; it is put a little above the largest value below it.
    ceiling = -math.log10(1 - largest) + 0.15

    def place(value: float) -> float:
        return ceiling if value >= 1 else min(-math.log10(1 - value), ceiling)

    low = place(max(tick for tick in SHARES if tick <= min(values.min(), largest)))
    high = ceiling if values.max() >= 1 else place(float(values.max())) + 0.06
    ticks = [(tick, f"{100 * tick:g} %") for tick in SHARES if low <= place(tick) <= high and place(tick) < ceiling]
    return Scale(place, low, high, ticks)


def loss_scale(values: np.ndarray) -> Scale:
    """Logarithmic where the largest value is ten times the smallest; linear elsewhere."""
    return logarithmic(values) if values.min() > 0 and values.max() >= 10 * values.min() else linear(values)


def steps(last: float) -> Axis:
    """Training steps."""
    step = max(_step(last), 1)
    ticks = [(index * step, f"{index * step:,.0f}") for index in range(int(last // step) + 1)]
    room = (WIDTH - LEFT - RIGHT) * step / max(last, 1)
    every = math.ceil((CHARACTER * len(ticks[-1][1]) + 8) / room)
    return Axis(ticks[::every], max(last, 1), "training step")


def lines(
    series: Mapping[int, tuple[np.ndarray, np.ndarray]],
    scale: Scale,
    axis: Axis,
    description: str,
    marks: Sequence[Mark] = (),
) -> Html:
    """Curves.

    Args:
        series: places on the horizontal axis and values, by the number that gives colour and dashes.
        marks: drawn above all curves.
    """
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(place: float) -> float:
        return LEFT + (right - LEFT) * place / axis.last

    def y(value: float) -> float:
        return bottom - (bottom - TOP) * (scale.place(value) - scale.low) / (scale.high - scale.low)

    parts = []
    for value, text in scale.ticks:
        parts.append(tag("line", x1=LEFT, x2=right, y1=f"{y(value):.1f}", y2=f"{y(value):.1f}", class_="grid"))
        parts.append(tag("text", text, x=LEFT - 7, y=f"{y(value) + 4:.1f}", text_anchor="end", class_="soft"))
    for place, text in axis.ticks:
        parts.append(tag("text", text, x=f"{x(place):.1f}", y=bottom + 17, text_anchor="middle", class_="soft"))
    parts.append(tag("text", axis.label, x=right, y=HEIGHT - 4, text_anchor="end", class_="soft"))
    for number, (places, values) in series.items():
        points = [f"{x(a):.1f},{y(b):.1f}" for a, b in zip(*thin(places, values), strict=True)]
        parts.append(tag("polyline", points=" ".join(points), class_=f"line s{number % SERIES}"))
    # A line of one point cannot be seen.
    dots = [Mark(number, float(a[0]), float(b[0]), ring=False) for number, (a, b) in series.items() if len(a) == 1]
    for mark in (*dots, *marks):
        kind = f"mark s{mark.number % SERIES}" + " ring" * mark.ring
        at = {"cx": f"{x(mark.place):.1f}", "cy": f"{y(mark.value):.1f}"}
        parts.append(tag("circle", **at, r=4.5 if mark.ring else 2, class_=kind))
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=description)


def legend(names: Mapping[int, str]) -> Html:
    """The line of every series, by number."""
    items = [
        tag(
            "li",
            tag("svg", tag("line", x1=0, x2=30, y1=6, y2=6, class_=f"line s{number % SERIES}"), width=30, height=12),
            name,
        )
        for number, name in names.items()
    ]
    return tag("ul", *items, class_="legend")


@dataclass(frozen=True)
class Cloud:
    """Two kinds of points in the plane, drawn as dots and as crosses, and a line from mean to mean.

    Attributes:
        dots: (N, 2). crosses: (M, 2). means: (2,) of either kind.
    """

    dots: np.ndarray
    crosses: np.ndarray
    means: tuple[np.ndarray, np.ndarray]
    description: str


def clouds(drawn: Sequence[Cloud], name: str) -> list[Html]:
    """A square each, all with the same axes of equal units, and behind it, faintly, the dots of all.

    Args:
        name: of no other clouds on the page.
    """
    every = np.concatenate(
        [points for cloud in drawn for points in (cloud.dots, cloud.crosses, *cloud.means)], axis=None
    )
    low, high = every.reshape(-1, 2).min(axis=0), every.reshape(-1, 2).max(axis=0)
    unit = (CLOUD - 2 * CLOUD_EDGE) / max(float((high - low).max()), np.finfo(float).tiny)
    centre = (low + high) / 2

    def at(point: np.ndarray) -> str:
        across, up = (point - centre) * unit
        return f"{CLOUD / 2 + across:.1f},{CLOUD / 2 - up:.1f}"

    def dots(points: np.ndarray) -> str:
        return "".join(f"M{at(point)}h0" for point in points)

    # Written once, and shown in every square.
    behind = tag("path", d=dots(np.concatenate([cloud.dots for cloud in drawn])), id=name, class_="dots behind")
    found: list[Html] = []
    for cloud in drawn:
        start, end = cloud.means
        parts = (
            tag("use", href=f"#{name}") if found else behind,
            tag("path", d=dots(cloud.dots), class_="dots s0"),
            tag("path", d="".join(f"M{at(point)}m-2,-2l4,4m0,-4l-4,4" for point in cloud.crosses), class_="crosses s1"),
            tag("path", d=f"M{at(start)}L{at(end)}", class_="between"),
        )
        box = f"0 0 {CLOUD} {CLOUD}"
        found.append(tag("svg", *parts, viewBox=box, role="img", aria_label=cloud.description))
    return found


@dataclass(frozen=True)
class Ground:
    """A part of a plane seen from above, in metres.

    Attributes:
        low, high: its corners. discs: (N, 3) centre and radius of what is in the way. reach: how near to a disc's edge
            a centre may not come. finish: the height to be reached.
    """

    low: tuple[float, float]
    high: tuple[float, float]
    discs: np.ndarray
    reach: float
    finish: float


@dataclass(frozen=True)
class Trail:
    """A way over the ground.

    Attributes:
        points: (S + 1, 2), in metres. colours: of each of its S steps. missed: it ended before its aim.
    """

    points: np.ndarray
    colours: Sequence[str]
    missed: bool


def trails(ground: Ground, drawn: Sequence[Trail], description: str, above: Html | None = None) -> Html:
    """Ways past obstacles; a cross where one ended before its aim.

    Args:
        above: drawn above all.
    """
    (left, bottom), (right, top) = _units(np.array([ground.low, ground.high])).tolist()
    parts = []
    for x, y, radius in ground.discs.tolist():
        at = {"cx": round(PER_METRE * x), "cy": round(-PER_METRE * y)}
        parts.append(tag("circle", **at, r=round(PER_METRE * (radius + ground.reach)), class_="reach"))
        parts.append(tag("circle", **at, r=round(PER_METRE * radius), class_="disc"))
    parts.append(tag("path", d=f"M{left},{round(-PER_METRE * ground.finish)}H{right}", class_="finish"))
    runs: dict[str, list[str]] = {}
    for trail in drawn:
        units = _units(trail.points)
        changes = [step for step in range(1, len(trail.colours)) if trail.colours[step] != trail.colours[step - 1]]
        for first, last in pairwise([0, *changes, len(trail.colours)]):
            if last > first:
                runs.setdefault(trail.colours[first], []).append(_path(units[first : last + 1]))
    parts += [tag("path", d="".join(found), class_="trail", style=f"stroke:{key}") for key, found in runs.items()]
    crosses = [f"M{x},{y}m-9,-9l18,18m0,-18l-18,18" for x, y in (_units(one.points[-1]) for one in drawn if one.missed)]
    if crosses:
        parts.append(tag("path", d="".join(crosses), class_="missed"))
    box = f"{left} {top} {right - left} {bottom - top}"
    return tag("svg", *parts, above, viewBox=box, role="img", aria_label=description, class_="ground")


def _units(points: np.ndarray) -> np.ndarray:
    """Metres (..., 2), the second upwards, to whole units, the second downwards."""
    return (points * (PER_METRE, -PER_METRE)).round().astype(np.int64)


def _path(units: np.ndarray) -> str:
    """(N, 2) whole units as a line, each step from where the one before ended."""
    return f"M{units[0, 0]},{units[0, 1]}l{' '.join(map(str, np.diff(units, axis=0).ravel().tolist()))}"


class Motion:
    """Things that move in time, and begin again together.

    Args:
        name: of nothing else on the page. steps: of whatever moves longest.
    """

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps = name, steps
        self._rules: list[str] = []

    def moving(self, frames: Sequence[str]) -> str:
        """Classes for a part that moves.

        Args:
            frames: what its style is before the first of its steps, and after each. It stays as it is after the last.
        """
        name = f"{self.name}-{len(self._rules)}"
        stops = "".join(f"{100 * (1 - REST) * step / self.steps:.2f}%{{{frame}}}" for step, frame in enumerate(frames))
        self._rules.append(
            f"@keyframes {name}{{{stops}100%{{{frames[-1]}}}}}"
            f".{name}{{animation:{name} {self.steps / PACE / (1 - REST):.2f}s linear infinite}}"
        )
        return f"moves {name}"

    def style(self) -> Html:
        """To stand behind all that moves: what is shown before moves before. Who asks for less motion gets none."""
        return tag("style", Html(f"@media (prefers-reduced-motion:no-preference){{{''.join(self._rules)}}}"))


def rod(points: np.ndarray, colours: Sequence[str], radius: float, motion: Motion) -> Html:
    """Something round that moves along a way, drawn where it ends. To stand above `trails`.

    Args:
        points: (S + 1, 2), in metres. colours: of its S steps. radius: in metres.
    """
    units = _units(points).tolist()
    shown = [*colours, colours[-1]]
    frames = [f"transform:translate({x}px,{y}px);fill:{colour}" for (x, y), colour in zip(units, shown, strict=True)]
    end = {"transform": "translate({},{})".format(*units[-1]), "fill": shown[-1]}
    return tag("circle", r=round(PER_METRE * radius), **end, class_=f"rod {motion.moving(frames)}")


def shares(
    values: np.ndarray, taken: np.ndarray, colours: Sequence[str], axis: Axis, description: str, motion: Motion
) -> Html:
    """Shares that sum to 1 on top of each other, the first at the bottom, a step each; beneath, which one was taken.

    A line runs along with `motion`.

    Args:
        values: (S, K). taken: (S,) indices. colours: K.
    """
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    limits = np.concatenate([np.zeros((len(values), 1)), values.cumsum(axis=1)], axis=1)

    def x(step: float) -> str:
        return f"{LEFT + (right - LEFT) * step / axis.last:.1f}"

    def y(share: float) -> str:
        return f"{bottom - (bottom - TOP) * share:.1f}"

    parts = []
    for index, colour in enumerate(colours):
        lower, upper = limits[:, index], limits[:, index + 1]
        forth = "".join(f"V{y(share)}H{x(step + 1)}" for step, share in enumerate(upper))
        back = "".join(f"V{y(share)}H{x(step)}" for step, share in reversed(list(enumerate(lower))))
        parts.append(tag("path", d=f"M{x(0)},{y(lower[0])}{forth}{back}Z", fill=colour, class_="share"))
    changes = np.flatnonzero(np.diff(taken)) + 1
    for first, last in pairwise([0, *changes.tolist(), len(taken)]):
        run = f"M{x(first)},{bottom + 2}H{x(last)}v{STRIP}H{x(first)}Z"
        parts.append(tag("path", d=run, fill=colours[taken[first]], class_="taken"))
    for value in (0.0, 0.5, 1.0):
        parts.append(
            tag("text", f"{100 * value:g} %", x=LEFT - 7, y=float(y(value)) + 4, text_anchor="end", class_="soft")
        )
    for place, text in axis.ticks:
        parts.append(tag("text", text, x=x(place), y=bottom + 19, text_anchor="middle", class_="soft"))
    parts.append(tag("text", axis.label, x=right, y=HEIGHT - 3, text_anchor="end", class_="soft"))
    places = [float(x(step)) for step in range(len(values) + 1)]
    frames = [f"transform:translate({place - places[-1]:.1f}px,0)" for place in places]
    line = {"x1": places[-1], "x2": places[-1], "y1": TOP, "y2": bottom + 2 + STRIP}
    parts.append(tag("line", **line, class_=f"now {motion.moving(frames)}"))
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=description)


def thin(steps: np.ndarray, values: np.ndarray, most: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points: means over neighbours, the last point as it is."""
    if len(steps) <= most:
        return steps, values
    parts = np.array_split(np.arange(len(steps) - 1), most - 1)
    return (
        np.array([*(steps[part].mean() for part in parts), steps[-1]]),
        np.array([*(values[part].mean() for part in parts), values[-1]]),
    )


def chain(nodes: Sequence[Node], description: str) -> Html:
    """Who learns from whom, from left to right; whoever teaches nobody stands in the last column."""
    by_name = {node.name: node for node in nodes}
    parents = {node.name: node.parent if node.parent in by_name else None for node in nodes}
    children = {node.name: [other.name for other in nodes if parents[other.name] == node.name] for node in nodes}
    depth = {name: _depth(name, parents) for name in by_name}
    last = max(depth.values())
    row: dict[str, int] = {}

    def settle(name: str, at: int) -> int:
        """Give rows to a model and all that learn from it; returns the next free row."""
        row[name] = at
        following = at
        for child in children[name]:
            following = settle(child, following)
        return max(following, at + 1)

    free = 0
    for node in nodes:
        if parents[node.name] is None:
            free = settle(node.name, free)
    width = max(150, max(round(BOLD * len(line)) for node in nodes for line in node.lines) + 28)
    gap = max(80, max(round(CHARACTER * len(node.label)) for node in nodes) + 34)
    high, between = 66, 20

    def corner(name: str) -> tuple[int, int]:
        column = depth[name] if children[name] else last
        return 2 + column * (width + gap), 2 + row[name] * (high + between)

    parts = []
    for node in nodes:
        parent = parents[node.name]
        left, top = corner(node.name)
        if parent is not None:
            start, level = corner(parent)[0] + width, corner(parent)[1] + high // 2
            end, aim, bend = left - 8, top + high // 2, start + gap // 3
            turn = f"C{bend},{level} {start},{aim} {start + gap // 2},{aim}" if aim != level else ""
            parts.append(tag("path", d=f"M{start},{level} {turn} L{end},{aim}", class_="arrow"))
            parts.append(tag("path", d=f"M{left - 1},{aim} l-9,-4.5 v9 z", class_="head"))
            parts.append(
                tag("text", node.label, x=left - 14, y=aim - 7, text_anchor="end", class_="soft", font_size=12)
            )
        parts.append(tag("rect", x=left, y=top, width=width, height=high, rx=6, class_=f"box {node.kind}"))
        for index, line in enumerate(node.lines):
            parts.append(
                tag(
                    "text",
                    line,
                    x=left + 13,
                    y=top + 20 + 18 * index,
                    class_="soft" if index else None,
                    font_size=12 if index else 13,
                    font_weight=None if index else 600,
                )
            )
    wide, tall = 4 + (last + 1) * width + last * gap, 4 + free * high + (free - 1) * between
    drawing = tag(
        "svg", *parts, width=wide, height=tall, viewBox=f"0 0 {wide} {tall}", role="img", aria_label=description
    )
    return tag("div", drawing, class_="scroll", style="padding:1rem", tabindex="0")


def _depth(name: str, parents: Mapping[str, str | None]) -> int:
    """Teachers between a model and the first of its chain. dvc refuses circles, so that there is a first."""
    parent = parents[name]
    return 0 if parent is None else 1 + _depth(parent, parents)


def _step(extent: float) -> float:
    """1, 2 or 5 times a power of ten, four to nine times in an extent."""
    power = 10.0 ** math.floor(math.log10(extent / 4)) if extent > 0 else 1.0
    return next(factor * power for factor in (5, 2, 1) if factor * power <= extent / 4) if extent > 0 else 1.0
