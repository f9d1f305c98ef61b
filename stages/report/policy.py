"""Policies: success against diversity, ways taken, what they look like, one rollout in motion, published figures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pandas as pd

from data import policy as data
from data.avoiding import CYLINDERS, FINISH, ROD, UNKNOWN
from data.errors import UserError
from models.artifacts import load_model
from stages import paths
from stages.evaluate.policy import NONE, WORDS, Rollouts, goals_of, roll_out
from stages.parameters import policy
from stages.parameters.shared import Dataset
from stages.report import charts, pictures, sections
from stages.report.comparison import NOTHING
from stages.report.page import Html, join, note, table, tag
from stages.report.results import TEACHER, Group, Metric, Model, error_of

MOST_CALLS = 64  # how many calls a figure of fewer calls may be about
FEWER = [str(WORDS.get(calls, calls)) for calls in range(1, MOST_CALLS)]
METRICS = {
    "success": Metric("success", True, "share of rollouts that succeed"),
    "entropy": Metric(
        "entropy",
        False,
        "of the ways that successful rollouts took, to the base of their number: 0 is always the same way, 1 all ways "
        "equally often",
    ),
    "reward": Metric("reward", False, "mean over rollouts"),
    "steps": Metric("steps", False, "mean over rollouts that succeed", 1),
    "calls": Metric("calls", False, "of the network, per action", 0),
    "nll": Metric(
        "NLL",
        False,
        "mean negative log-density of the split's demonstrated actions, in nats per action and raw units; that of a "
        "mixture is known exactly, that of a diffusion policy is not",
    ),
    "loss": Metric("loss", False, "of students the NLL; of teachers the error of their denoising, which is no NLL"),
    **{
        f"{calls}_step_{name}": Metric(f"{name}, {calls} call{'s' * (calls != 'one')}", name == "success")
        for calls in FEWER
        for name in ("success", "entropy")
    },
}
BESIDE = "entropy"
ANSWER = None
PARITY = Metric("distance", False)

# Test rollouts, and test demonstrations, that are drawn of every model.
SHOWN = 48
GROUND = charts.Ground((0.2, -0.31), (0.8, 0.39), CYLINDERS, ROD, FINISH)
POSITION = slice(2, 4)  # of an observation: where the rod is
# Mean and standard deviation over seeds, where that is known.
Published = tuple[str, str, float, float | None]
PUBLISHED: dict[str, list[Published]] = {
    "avoiding": [
        ("DDPM", "ddpm", 0.94, None),
        ("DDPM, one call", "ddpm-1", 0.09, None),
        ("BESO", "beso", 0.96, None),
        ("BESO, one call", "beso-1", 0.84, None),
        ("VDD from DDPM", "vdd-ddpm", 0.92, 0.02),
        ("VDD from BESO", "vdd-beso", 0.95, 0.01),
        ("EM", "em", 0.65, 0.18),
        ("IMC", "imc", 0.75, 0.08),
        ("consistency distillation", "cd", 0.82, 0.05),
        ("consistency trajectories", "ctm", 0.93, 0.02),
    ]
}
"""Success rates (VDD card 6, project website): name, what it is here, mean, standard deviation over seeds."""


def main_metric(group: Group) -> str:
    """Where there is no environment, there is only the loss on demonstrations."""
    return "loss" if _environment(group.entry) == "none" else "success"


def relatives(model: Model) -> tuple[str, ...]:
    """What learns from the same demonstrations without a teacher. The loss of a teacher compares with no other."""
    return () if model.role == TEACHER and "success" not in model.metrics["test"] else ("alone", "em")


def size(interface: dict[str, Any]) -> str:
    """Numbers in an observation."""
    return f"{interface['observations']} numbers"


def figures(group: Group) -> list[tuple[str, Html]]:
    """Sections of this task; none where there is no environment to act in."""
    environment = _environment(group.entry)
    if environment == "none":
        return []
    played, missing = play(group)
    found = [
        ("Success and diversity", success_and_diversity(group)),
        ("Ways taken", ways_taken(group)),
        ("Trajectories", trajectories(group, played) if environment == "avoiding" else None),
        ("One rollout, step by step", step_by_step(group, played, missing)),
        ("Published figures: other simulator, not comparable", published(group)),
    ]
    return [(title, part) for title, part in found if part is not None]


def _environment(dataset: Dataset) -> str:
    return cast(policy.Dataset, dataset).environment


def _settings(group: Group) -> policy.Task:
    return cast(policy.Task, group.settings)


# Figures


def success_and_diversity(group: Group) -> Html:
    """Both of every model on the test split, and of teachers with fewer calls."""
    rows, marks, series = [], [], {}
    for number, model in enumerate(group.models):
        known = model.metrics["test"]
        if "success" not in known:
            continue
        shown = [_with_error(model, name) for name in ("success", "entropy")]
        shown += [METRICS[name].show(known[name]) if name in known else NOTHING for name in ("reward", "steps")]
        rows.append([group.short(model.name), METRICS["calls"].show(known["calls"]), *shown])
        if "entropy" in known:
            # A line of one point is drawn as a dot.
            series[number] = (np.array([100 * known["success"]]), np.array([known["entropy"]]))
        for calls in FEWER:
            if (success := known.get(f"{calls}_step_success")) is None:
                continue
            entropy = known.get(f"{calls}_step_entropy")
            cells = [METRICS["success"].show(success), NOTHING if entropy is None else METRICS["entropy"].show(entropy)]
            rows.append([group.short(model.name), "1" if calls == WORDS[1] else calls, *cells, NOTHING, NOTHING])
            if entropy is not None:
                marks.append(charts.Mark(number, 100 * success, entropy, ring=True))
    headings = ["model", *(METRICS[name].label for name in ("calls", "success", "entropy", "reward", "steps"))]
    compared = table(headings, rows, numeric=range(1, 6), bold=[2, 3], rule=[2, 4])
    said = (
        "Success alone says nothing about diversity: who always takes the same way can succeed as often. Calls of the "
        "network are what an action costs. Test rollouts; every model begins in the same states. At every step, a "
        f"student takes {'its likeliest expert' if _settings(group).greedy else 'an expert drawn by probability'}."
    )
    if not series:
        return join([tag("p", said, class_="small soft"), compared])
    ticks = [(float(place), str(place)) for place in range(0, 101, 20)]
    who = ", ".join(group.models[number].name for number in series)
    drawing = charts.lines(
        series,
        charts.linear(np.array([0.0, 1.0])),
        charts.Axis(ticks, 100.0, "success, in per cent"),
        f"entropy of ways against success: {who}",
        marks,
    )
    if marks:
        said += " A ring is a teacher that is run with fewer calls than it was made for."
    figure = tag("figure", tag("figcaption", tag("b", "entropy"), " of ways against success, test"), drawing)
    return join(
        [
            tag("p", said, class_="small soft"),
            charts.legend({number: group.models[number].name for number in series}),
            tag("div", tag("div", figure, class_="charts large"), compared, class_="side"),
        ]
    )


def _with_error(model: Model, name: str) -> str | Html:
    if name not in model.metrics["test"]:
        return NOTHING
    shown, error = METRICS[name].show(model.metrics["test"][name]), error_of(model, name, "test")
    if error is None:
        return shown
    return join([shown, " ", tag("span", f"\N{PLUS-MINUS SIGN}{METRICS[name].show(error)}", class_="error")])


def ways_taken(group: Group) -> Html | None:
    """Successful test rollouts by way and model, beside the demonstrations; None where ways are not told apart."""
    tables = {name: rows for name, rows in sections.classes_of_test(group).items() if len(rows)}
    if not tables:
        return None
    names = next(iter(tables.values()))["class"].tolist()
    counts = {group.short(name): rows["successes"].to_numpy() for name, rows in tables.items()}
    if (demonstrated := _demonstrated(group, names)) is not None:
        counts = {"demonstrations": demonstrated, **counts}
    every = list(counts.values())
    rows: list[list[object]] = [
        [name, *(_shaded(int(count[place]), int(count.sum())) for count in every)] for place, name in enumerate(names)
    ]
    rows.append(["ways", *(_total(f"{int((count > 0).sum())} of {len(names)}") for count in every)])
    rows.append(["in all", *(_total(f"{int(count.sum()):,}") for count in every)])
    said = (
        f"How many of {group.test_samples():,} test rollouts took each way and succeeded, beside the demonstrations of "
        "the training split; the larger the share of its column, the stronger the shade."
    )
    if _environment(group.entry) == "avoiding":
        said += " The name of a way is its sides at the three rows of cylinders, each counted from the left."
    return join([tag("p", said, class_="small soft"), table(["way", *counts], rows, numeric=range(1, 1 + len(counts)))])


def _demonstrated(group: Group, names: list[str]) -> np.ndarray | None:
    """Training episodes by way; None where the data are not here."""
    manifest = _manifest(group)
    if manifest is None:
        return None
    found = manifest.loc[manifest["split"] == "train", "mode"].value_counts()
    return found.reindex(names, fill_value=0).to_numpy()


def _manifest(group: Group) -> pd.DataFrame | None:
    file = paths.prepared(group.task, group.dataset) / "manifest.csv"
    return pd.read_csv(file, dtype={"id": str, "mode": str}, keep_default_na=False) if file.is_file() else None


def _total(text: str) -> Html:
    return tag("td", text, class_="n b")


def _shaded(count: int, every: int) -> Html:
    return tag("td", str(count), class_="heat", style=f"--share:{count / max(every, 1):.3f}")


def published(group: Group) -> Html | None:
    """What the paper's authors report of this task, beside what was found here; None where they report nothing."""
    if (theirs := PUBLISHED.get(_environment(group.entry))) is None:
        return None
    ours: dict[str, list[list[object]]] = {}
    for model in group.models:
        known, kind = model.metrics["test"], _kind(group, model)
        if kind and "success" in known:
            ours.setdefault(kind, []).append([group.short(model.name), _with_error(model, "success")])
        if kind and (alone := known.get(f"{WORDS[1]}_step_success")) is not None:
            shown = METRICS["success"].show(alone)
            ours.setdefault(f"{kind}-1", []).append([f"{group.short(model.name)}, one call", shown])
    rows = []
    for name, kind, mean, spread in theirs:
        figure = f"{100 * mean:.0f}" + ("" if spread is None else f" \N{PLUS-MINUS SIGN}{100 * spread:.0f}")
        rows += [[name, figure, *found] for found in ours.get(kind, [[NOTHING, NOTHING]])]
    said = (
        "Success in per cent. Published: Zhou et al. 2024 (VDD), Avoiding in D3IL's simulator of a robot arm, with "
        "human demonstrations, mean \N{PLUS-MINUS SIGN} standard deviation over seeds; teachers: one seed. Here: a "
        "task in the plane with the same obstacles, \N{PLUS-MINUS SIGN} one standard error over test rollouts. With "
        "another simulator, other networks and other trainings, the figures do not compare. The paper's entropies are "
        "not known here."
    )
    compared = table(
        ["method", "success", "model", "success"],
        rows,
        numeric=[1, 3],
        rule=[1, 2],
        bands=[("", 1), ("published", 1), ("here, test", 2)],
    )
    return join([compared, tag("p", said, class_="small soft")])


def _kind(group: Group, model: Model) -> str | None:
    """What a model is among the published ones: its network, or how it learnt and from which network."""
    if model.method is None:
        return _network(model)
    teacher = next((other for other in group.models if other.name == model.learnt_from), None)
    return f"{model.method}-{_network(teacher)}" if teacher else model.method


def _network(model: Model) -> str | None:
    return str(model.description.network["name"]) if model.description else None


# Pictures


@dataclass(frozen=True)
class Played:
    """What a model did in the first test rollouts, and where it stands in its group."""

    number: int
    model: Model
    rollouts: Rollouts

    def colours(self, rollout: int) -> list[str]:
        """Of every step: that of the expert, or of the way where there are no experts."""
        steps = int(self.rollouts.outcome.steps[rollout])
        experts = self.rollouts.experts[rollout, :steps]
        if (experts == NONE).all():
            return [_colour(int(self.rollouts.outcome.mode[rollout]))] * steps
        return [_colour(int(expert)) for expert in experts]

    def points(self, rollout: int) -> np.ndarray:
        """(S + 1, 2): where the rod was in Avoiding."""
        return self.rollouts.observations[rollout, : int(self.rollouts.outcome.steps[rollout]) + 1, POSITION]


def play(group: Group) -> tuple[list[Played], list[str]]:
    """Every model whose weights are here acts again in the first test rollouts, and a sentence for each other."""
    played, missing = [], []
    for number, model in enumerate(group.models):
        try:
            network, description = load_model(model.folder)
            place, seeds = data.environment(_environment(group.entry)), data.seeds("test", SHOWN)
            prepared, goals = paths.prepared(group.task, group.dataset), description.network["goals"]
            wanted = goals_of(prepared, "test", SHOWN, goals)
            found = roll_out(network, description, place, seeds, _settings(group), goals=wanted)
            played.append(Played(number, model, found))
        except (UserError, FileNotFoundError) as error:
            missing.append(f"Without {model.name}: {error}")
    return played, missing


def _colour(label: int) -> str:
    """Of an expert or a way. The first of the table is too quiet for a line."""
    return "var(--soft)" if label == UNKNOWN else pictures.colour(1 + label)


def trajectories(group: Group, played: Sequence[Played]) -> Html | None:
    """Demonstrations and test rollouts of every model over the obstacles."""
    drawn = [_demonstrations(group), *(_rollouts(group, one) for one in played)]
    if not played:
        return None
    count = max(one.rollouts.probabilities.shape[2] for one in played)
    swatches = [_swatch(expert, f"expert {expert + 1}") for expert in range(count)]
    said = (
        f"The first {SHOWN} test rollouts of every model, upwards to the finish (dashed). The centre of the rod must "
        "not enter the shade around a cylinder; a cross is where a rollout failed. Students are coloured by the expert "
        "that was chosen at each step; those of two students have nothing in common but their number. Demonstrations "
        "and teachers are coloured by way; grey has none, as a row was not reached."
    )
    return join(
        [
            tag("p", said, class_="small soft"),
            tag("ul", *swatches, class_="legend") if count else None,
            tag("div", *(figure for figure in drawn if figure is not None), class_="grounds"),
        ]
    )


def _swatch(label: int, text: str) -> Html:
    return tag("li", tag("span", class_="swatch", style=f"background:{_colour(label)}"), text)


def _demonstrations(group: Group) -> Html | None:
    """Some of the test split; None where the data are not here."""
    manifest = _manifest(group)
    if manifest is None:
        return None
    episodes = data.load(paths.prepared(group.task, group.dataset), "test")
    modes = dict(zip(manifest["id"], manifest["mode"], strict=True))
    names = data.describe(paths.prepared(group.task, group.dataset))["modes"]
    trails = []
    for name, start, length in zip(episodes.ids, episodes.starts.tolist(), episodes.lengths.tolist(), strict=True):
        way = names.index(modes[name]) if modes[name] in names else UNKNOWN
        points = episodes.observations[start : start + length, POSITION].numpy()
        trails.append(charts.Trail(points, [_colour(way)] * (length - 1), missed=False))
    drawing = charts.trails(GROUND, trails[:SHOWN], "demonstrations of the test split, by way")
    caption = tag("figcaption", tag("b", "demonstrations"), f": {min(len(trails), SHOWN)} of the test split")
    return tag("figure", drawing, caption)


def _rollouts(group: Group, played: Played) -> Html:
    outcome = played.rollouts.outcome
    trails = [charts.Trail(played.points(one), played.colours(one), bool(outcome.failed[one])) for one in range(SHOWN)]
    succeeded = int(outcome.success.sum())
    said = f": {succeeded} of {SHOWN} succeed"
    if succeeded:
        ways = len(np.unique(outcome.mode[outcome.success]))
        said += f", in {ways} way{'s' * (ways > 1)}"
    if count := played.rollouts.probabilities.shape[2]:
        experts = played.rollouts.experts
        said += f"; {len(np.unique(experts[experts != NONE]))} of {count} experts act"
    drawing = charts.trails(GROUND, trails, f"rollouts of {played.model.name} past the obstacles")
    return tag("figure", drawing, tag("figcaption", tag("b", group.short(played.model.name)), said))


def step_by_step(group: Group, played: Sequence[Played], missing: Sequence[str]) -> Html | None:
    """One test rollout in motion, and which experts a student could have taken at each step of it."""
    notes = [note(line) for line in missing]
    if not played:
        return join(notes) if notes else None
    successes = np.array([one.rollouts.outcome.success for one in played])
    rollout = int(successes.sum(axis=0).argmax())
    longest = max(int(one.rollouts.outcome.steps[rollout]) for one in played)
    motion = charts.Motion(f"rollout-{group.dataset}", longest)
    drawn = [_in_motion(group, one, rollout, motion) for one in played]
    succeed = int(successes[:, rollout].sum())
    which = "all models succeed" if succeed == len(played) else f"most models succeed ({succeed} of {len(played)})"
    said = (
        f"Test rollout {data.seeds('test', rollout + 1)[-1]}, the first in which {which}; {charts.PACE:g} steps a "
        "second, again and again. It stops while the pointer is on it, and does not move where less motion is asked "
        "for. Beside a student: the probability of each expert at every step, one on top of the other, and in the "
        "strip beneath which of them was taken."
    )
    moving = tag("div", *drawn, class_="played", tabindex="0")
    return join([*notes, tag("p", said, class_="small soft"), moving, motion.style()])


def _in_motion(group: Group, played: Played, rollout: int, motion: charts.Motion) -> Html:
    outcome, name = played.rollouts.outcome, group.short(played.model.name)
    steps = int(outcome.steps[rollout])
    views = []
    if _environment(group.entry) == "avoiding":
        points, colours = played.points(rollout), played.colours(rollout)
        trail = charts.Trail(points, colours, bool(outcome.failed[rollout]))
        views.append(charts.trails(GROUND, [trail], f"a rollout of {name}", charts.rod(points, colours, ROD, motion)))
    if count := played.rollouts.probabilities.shape[2]:
        axis = replace(charts.steps(motion.steps), label="step")
        views.append(
            charts.shares(
                played.rollouts.probabilities[rollout, :steps],
                played.rollouts.experts[rollout, :steps],
                [_colour(expert) for expert in range(count)],
                axis,
                f"probability of each expert of {name} over a rollout",
                motion,
            )
        )
    ended = "succeeds" if outcome.success[rollout] else "fails" if outcome.failed[rollout] else "is too late"
    caption = tag("figcaption", tag("b", name), f" {ended} after {steps} steps")
    return tag("figure", caption, tag("div", *views))
