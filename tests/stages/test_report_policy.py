"""The report on policies: diversity beside success, ways, published figures, trajectories, and a rollout in motion."""

import dataclasses
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from page_reader import Reader
from policy_rollouts import LENGTHS, Fated, describe, network, write_prepared

from data import policy as data
from data.avoiding import FINISH, MODES, ROD, UNKNOWN, Avoiding, Outcome
from data.files import write_json
from models.artifacts import load_model, save_model
from stages import paths
from stages.evaluate import policy as evaluation
from stages.evaluate.policy import NONE, Rollouts, roll_out
from stages.parameters import load
from stages.report import __main__ as report
from stages.report import charts, comparison, pictures, policy
from stages.report.results import Group, Metric, difference, error_of, read_task

PAGE = Path("reports/index.html")
ROLLOUTS = 30
SHOWN = 6
STEPS = 12
EXPERTS = 3
NAMES = ["ddpm", "beso", "vdd", "vdd-beso", "em", "alone"]
KINDS = {"ddpm": "ddpm", "beso": "beso"}
DIFFUSION = {"window": 3, "steps": 3, "backbone": {"name": "mlp", "width": 8, "layers": 2}}
MIXTURE = {
    "name": "mixture", "window": 3, "experts": EXPERTS, "backbone": DIFFUSION["backbone"],
    "heads": {"width": 8, "layers": 1}, "gate_head": {"width": 8, "layers": 0},
}  # fmt: skip


def parameters() -> dict[str, Any]:
    rights = {"licence": "-", "credit": "<nobody> & sons", "redistributable": True}
    common = {"task": "policy", "dataset": "tiny"}
    student = {**common, "network": MIXTURE}
    steps, sigma = {"kind": "steps", "low": 0, "high": 1}, {"kind": "last"}
    return {
        "sources": {"tiny": {"kind": "none", **rights}},
        "datasets": {
            "tiny": {
                "task": "policy", "source": "tiny", "encoder": "none", "format": "generated",
                "environment": "avoiding", "demonstrations": {"episodes": 3},
            }
        },
        "teachers": {
            f"policy-{name}": {**common, "start": "none", "network": {"name": name, **DIFFUSION}} for name in KINDS
        },
        "students": {
            "policy-vdd": {**student, "method": "vdd", "teacher": "policy-ddpm", "levels": steps},
            "policy-vdd-beso": {**student, "method": "vdd", "teacher": "policy-beso", "levels": sigma},
            "policy-em": {**student, "method": "em", "teacher": "none"},
            "policy-alone": {**student, "method": "alone", "teacher": "none"},
        },
        "exports": {"policy-vdd": common},
        "tasks": {"policy": {"rollouts": ROLLOUTS, "steps": STEPS, "fewer_calls": [1, 2]}},
    }  # fmt: skip


def fate(seed: int, count: int = ROLLOUTS) -> Outcome:
    """Some succeed, some fail, some are too late; the first ways are taken more often than the last."""
    generator = np.random.default_rng(seed)
    ended = generator.choice(3, count, p=[0.6, 0.3, 0.1])
    mode = np.minimum(generator.geometric(0.15, count) - 1, len(MODES) - 1)
    mode[ended != 0] = np.where(generator.random((ended != 0).sum()) < 0.5, UNKNOWN, mode[ended != 0])
    return Outcome(ended == 0, 1.0 * (ended == 0), mode, generator.integers(3, STEPS, count), ended == 1)


def write_models() -> None:
    for seed, (name, recipe) in enumerate(load().models("policy").items()):
        short = name.removeprefix("policy-")
        described = describe(KINDS.get(short, "mixture"), model=name, window=3)
        described = dataclasses.replace(
            described, recipe=recipe.model_dump(mode="json"), dataset={"name": "tiny", "digest": ""}
        )
        paths.trained("policy", name).mkdir(parents=True)
        save_model(paths.trained("policy", name), network(described, seed), described)


def write_evaluation(patch: pytest.MonkeyPatch) -> None:
    """As the stage has it, of rollouts whose outcome is drawn."""
    for folder in (paths.metrics("policy"), paths.evaluation("policy")):
        folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for seed, (name, folder) in enumerate(paths.models("policy", load().models("policy")).items()):
        made, described = load_model(folder)
        prepared, results = paths.prepared("policy", "tiny"), []
        for split in ("validation", "test"):
            fates = iter(fate(100 * seed + 10 * len(results) + turn) for turn in range(3))
            with patch.context() as inner:
                inner.setattr(evaluation, "roll_out", lambda *_, it=fates, **__: SimpleNamespace(outcome=next(it)))
                results.append(evaluation.evaluate(made, described, prepared, split, load().tasks["policy"]))
        figures = {"validation": results[0].metrics, "test": results[1].metrics}
        write_json(paths.metrics("policy") / f"{name}.json", figures)
        for kind in ("samples", "classes"):
            table = pd.concat([getattr(result, kind) for result in results])
            table.to_csv(paths.evaluation("policy") / f"{name}.{kind}.csv", index=False)
        weights[name] = described.weights_sha256
    write_json(paths.evaluation("policy") / "models.json", weights)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole project, as if the pipeline had run."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        Path("params.yaml").write_text(yaml.safe_dump(parameters(), sort_keys=False), encoding="utf-8")
        environment = {"name": "avoiding", **Avoiding.constants()}
        write_prepared(paths.prepared("policy", "tiny"), environment, MODES)
        write_models()
        write_evaluation(patch)
    return root


@pytest.fixture(autouse=True)
def _project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(policy, "SHOWN", SHOWN)


def group() -> Group:
    (found,) = read_task("policy", load())
    return found


def elsewhere(environment: str) -> Group:
    """The group, as if its data set had that environment."""
    found = group()
    return dataclasses.replace(found, entry=found.entry.model_copy(update={"environment": environment}))


def rendered() -> str:
    report.main("policy")
    return PAGE.read_text(encoding="utf-8")


def samples_of(name: str) -> pd.DataFrame:
    table = pd.read_csv(paths.evaluation("policy") / f"policy-{name}.samples.csv")
    return table[table["split"] == "test"]


def entropy_of(modes: np.ndarray) -> float:
    counts = pd.Series(modes).value_counts() / len(modes)
    return -sum(share * math.log(share, len(MODES)) for share in counts)


def cells(page: str, heading: str) -> list[list[str]]:
    """Text of the rows of a table that begin with that heading."""
    rows = re.findall(rf"<tr><th scope=\"row\">{re.escape(heading)}</th>(.*?)</tr>", page)
    return [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td.*?</td>", row)] for row in rows]


# Comparison


def test_success_and_entropy_stand_beside_each_other() -> None:
    found = group()
    shown = comparison.columns(found, policy)
    titles = [one.title for one in shown]
    assert titles[titles.index("test success") :][:3] == ["test success", "vs alone", "test entropy"]
    columns = {one.title: one.cells for one in shown}
    by_name = {found.short(model.name): model for model in found.models}
    assert list(by_name) == NAMES
    for place, name in enumerate(NAMES):
        rows = samples_of(name)
        won = rows[rows["success"] == 1]
        share, spread = rows["success"].mean(), rows["success"].std(ddof=0) / math.sqrt(ROLLOUTS)
        assert columns["test success"][place] == (f"{100 * share:.2f}", f"{100 * spread:.2f}")
        error = error_of(by_name[name], "entropy", "test")
        assert error is not None
        assert error > 0
        assert columns["test entropy"][place] == (f"{entropy_of(won['mode'].to_numpy()):.4f}", f"{error:.4f}")
    assert "test entropy" in comparison.text(found, policy)


def test_what_is_concluded() -> None:
    found = group()
    by_name = {found.short(model.name): model for model in found.models}
    lines = comparison.conclusions(found, policy)
    said = ["policy-ddpm (teacher) is ", "policy-beso (teacher) is "]
    said += [f"{lead}policy-{name} is " for name in ("vdd", "vdd-beso") for lead in ("", "In entropy, ")]
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))
    gap = difference(by_name["vdd"], by_name["em"], "entropy", "test")
    assert gap is not None
    side = "above" if gap.value > 0 else "below"
    assert f"{abs(gap.value):.4f} {side} policy-em (paired s.e. {gap.error:.4f})" in lines[3]
    assert "policy-alone (paired" in lines[3]


def test_other_tasks_have_nothing_beside() -> None:
    for name in ("recognition", "segmentation", "text", "zero_shot"):
        module = __import__(f"stages.report.{name}", fromlist=["BESIDE"])
        assert module.BESIDE is None


def test_without_an_environment_there_is_only_the_loss() -> None:
    found = elsewhere("none")
    assert policy.main_metric(found) == "loss"
    assert policy.main_metric(group()) == "success"
    teacher = dataclasses.replace(found.models[0], metrics={"test": {"loss": 0.1}, "validation": {"loss": 0.1}})
    assert policy.relatives(teacher) == ()
    assert policy.relatives(found.models[0]) == ("alone", "em")
    assert policy.relatives(dataclasses.replace(found.models[2], metrics=teacher.metrics)) == ("alone", "em")
    assert policy.figures(found) == []


def test_every_figure_that_is_measured_has_a_heading() -> None:
    for model in group().models:
        for split in model.metrics.values():
            assert set(split) <= set(policy.METRICS)
    assert policy.METRICS["one_step_success"].label == "success, one call"
    assert policy.METRICS["4_step_entropy"].label == "entropy, 4 calls"
    assert Metric("x", False).show(2) == "2.0000"
    assert policy.METRICS["calls"].show(8) == "8"
    assert policy.METRICS["steps"].show_difference(1.25) in ("+1.2", "+1.3")


# Figures


def test_success_against_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    lines = charts.lines
    monkeypatch.setattr(charts, "lines", lambda *given: (drawn.append(given), lines(*given))[1])
    found = group()
    page = policy.success_and_diversity(found)
    ((series, _, _, _, marks),) = drawn
    for number, model in enumerate(found.models):
        known = model.metrics["test"]
        assert [list(part) for part in series[number]] == [[100 * known["success"]], [known["entropy"]]]
        rows = cells(page, found.short(model.name))
        teacher = model.role == "teacher"
        assert [row[0] for row in rows] == (["3", "1", "2"] if teacher else ["1"])
        spread = samples_of(found.short(model.name))["success"].std(ddof=0) / math.sqrt(ROLLOUTS)
        assert rows[0][1] == f"{100 * known['success']:.2f} ±{100 * spread:.2f}"
        assert rows[0][2] == f"{known['entropy']:.4f} ±{error_of(model, 'entropy', 'test'):.4f}"
        ours = [(mark.place, mark.value, mark.ring) for mark in marks if mark.number == number]
        calls = ("one", "2") if teacher else ()
        assert ours == [(100 * known[f"{n}_step_success"], known[f"{n}_step_entropy"], True) for n in calls]
        for row, (place, value, _) in zip(rows[1:], ours, strict=True):
            assert row[1:3] == [f"{place:.2f}", f"{value:.4f}"]
    assert "expert drawn by probability" in page
    greedy = dataclasses.replace(found, settings=found.settings.model_copy(update={"greedy": True}))
    assert "its likeliest expert" in policy.success_and_diversity(greedy)


def test_ways_are_counted() -> None:
    page = policy.ways_taken(group())
    assert page is not None
    manifest = pd.read_csv(paths.prepared("policy", "tiny") / "manifest.csv")
    for mode, way in enumerate(MODES):
        (row,) = cells(page, way)
        wanted = [((manifest["split"] == "train") & (manifest["mode"] == way)).sum()]
        wanted += [((rows := samples_of(name))["success"] == 1)[rows["mode"] == mode].sum() for name in NAMES]
        assert row == [str(count) for count in wanted]
    won = [rows[rows["success"] == 1]["mode"] for rows in map(samples_of, NAMES)]
    assert cells(page, "ways")[0][1:] == [f"{modes.nunique()} of 24" for modes in won]
    assert cells(page, "in all") == [[str(len(LENGTHS["train"])), *(str(len(modes)) for modes in won)]]
    shutil.rmtree(paths.prepared("policy", "tiny"))
    without = policy.ways_taken(group())
    assert without is not None
    assert len(cells(without, MODES[0])[0]) == len(NAMES)
    found = group()
    nowhere = [dataclasses.replace(one, classes=one.classes[:0]) for one in found.models if one.classes is not None]
    assert policy.ways_taken(dataclasses.replace(found, models=nowhere)) is None


def test_published_figures_are_no_comparison() -> None:
    found = group()
    page = policy.published(found)
    assert page is not None
    assert cells(page, "DDPM")[0][:2] == ["94", "ddpm"]
    assert cells(page, "DDPM, one call")[0][:2] == ["9", "ddpm, one call"]
    assert cells(page, "BESO")[0][:2] == ["96", "beso"]
    assert cells(page, "VDD from DDPM")[0][:2] == ["92 ±2", "vdd"]
    assert cells(page, "VDD from BESO")[0][:2] == ["95 ±1", "vdd-beso"]
    assert cells(page, "EM")[0][:2] == ["65 ±18", "em"]
    assert cells(page, "IMC") == [["75 ±8", "-", "-"]]
    for name, kind in (("DDPM", "ddpm"), ("VDD from BESO", "vdd-beso"), ("EM", "em")):
        model = next(model for model in found.models if model.name == f"policy-{kind}")
        assert cells(page, name)[0][2].split()[0] == f"{100 * model.metrics['test']['success']:.2f}"
    once = found.models[0].metrics["test"]["one_step_success"]
    assert cells(page, "DDPM, one call")[0][2] == f"{100 * once:.2f}"
    assert "alone" not in page
    assert "do not compare" in page
    assert "<h3>Published figures: other simulator, not comparable</h3>" in rendered()
    assert policy.published(elsewhere("pusht")) is None


# Drawings


def decode(d: str) -> list[np.ndarray]:
    """The lines of a path of `M x,y l dx dy ...`, as (N, 2) each."""
    found = []
    for part in d.split("M")[1:]:
        start, _, steps = part.partition("l")
        moves = np.array(steps.split(), dtype=int).reshape(-1, 2)
        found.append(np.concatenate([[np.array(start.split(","), dtype=int)], moves]).cumsum(axis=0))
    return found


def random_trails(seed: int, count: int = 5) -> list[charts.Trail]:
    generator = np.random.default_rng(seed)
    trails = []
    for number in range(count):
        steps = int(generator.integers(1, 30))
        points = np.array([0.5, -0.2]) + generator.normal(0, 0.02, (steps + 1, 2)).cumsum(axis=0)
        colours = [f"#{colour}" for colour in generator.integers(0, 3, steps)]
        trails.append(charts.Trail(points, colours, missed=bool(number % 2)))
    return trails


@pytest.mark.parametrize("seed", range(5))
def test_trails_are_where_they_were_in_the_colour_of_each_step(seed: int) -> None:
    """Every step of every way is drawn once, in its colour, to the millimetre; a cross stands where one ended early."""
    trails = random_trails(seed)
    page = charts.trails(policy.GROUND, trails, "test")
    drawn = sorted(
        (colour, *first, *second)
        for d, colour in re.findall(r'<path d="([^"]*)" class="trail" style="stroke:(#\d)"', page)
        for line in decode(d)
        for first, second in zip(line.tolist(), line[1:].tolist(), strict=False)
    )
    wanted = []
    for trail in trails:
        x, y = np.rint(1000 * trail.points[:, 0]).astype(int), np.rint(-1000 * trail.points[:, 1]).astype(int)
        wanted += [
            (colour, int(x[step]), int(y[step]), int(x[step + 1]), int(y[step + 1]))
            for step, colour in enumerate(trail.colours)
        ]
    assert drawn == sorted(wanted)
    crosses = re.findall(r'<path d="([^"]*)" class="missed"', page)[0]
    at = re.findall(r"M(-?\d+),(-?\d+)m", crosses)
    ends = [np.rint(1000 * trail.points[-1] * (1, -1)).astype(int).tolist() for trail in trails if trail.missed]
    assert [[int(x), int(y)] for x, y in at] == ends


def test_the_ground_holds_what_is_in_the_way() -> None:
    page = charts.trails(policy.GROUND, [], "test")
    left, top, wide, tall = map(int, re.findall(r'viewBox="([^"]*)"', page)[0].split())
    discs = re.findall(r'cx="(\d+)" cy="(-?\d+)" r="(\d+)" class="(\w+)"', page)
    assert len(discs) == 12
    for (x, y, radius), outer, inner in zip(policy.GROUND.discs, discs[::2], discs[1::2], strict=True):
        assert outer == (f"{1000 * x:.0f}", f"{-1000 * y:.0f}", f"{1000 * (radius + ROD):.0f}", "reach")
        assert inner == (f"{1000 * x:.0f}", f"{-1000 * y:.0f}", f"{1000 * radius:.0f}", "disc")
        assert left < 1000 * (x - radius) < 1000 * (x + radius) < left + wide
    height = int(re.findall(r'd="M\d+,(-?\d+)H\d+" class="finish"', page)[0])
    assert height == -1000 * FINISH
    assert top < height
    assert top + tall > 1000 * 0.28  # below the start
    assert 'class="missed"' not in page


def area(d: str) -> float:
    """Of a closed path of V and H, by the shoelace formula."""
    x, y = map(float, re.match(r"M([\d.]+),([\d.]+)", d).groups())  # type: ignore[union-attr]
    points = [(x, y)]
    for kind, value in re.findall(r"([VH])([\d.]+)", d):
        x, y = (x, float(value)) if kind == "V" else (float(value), y)
        points.append((x, y))
    (xs, ys) = np.array(points).T
    return abs(float(xs @ np.roll(ys, -1) - ys @ np.roll(xs, -1))) / 2


@pytest.mark.parametrize("seed", range(5))
def test_shares_cover_areas_that_are_their_sums(seed: int) -> None:
    generator = np.random.default_rng(seed)
    steps, count = int(generator.integers(1, 40)), int(generator.integers(1, 6))
    values = generator.dirichlet(np.full(count, 0.3), steps)
    taken = generator.integers(0, count, steps)
    colours = [f"#c{expert}" for expert in range(count)]
    motion = charts.Motion("x", steps + 5)
    axis = charts.Axis([(0.0, "0")], steps + 5.0, "step")
    page = charts.shares(values, taken, colours, axis, "test", motion)
    paths_of = re.findall(r'<path d="([^"]*)" fill="(#c\d)" class="share"', page)
    assert [colour for _, colour in paths_of] == colours
    step = (charts.WIDTH - charts.LEFT - charts.RIGHT) / (steps + 5)
    whole = step * (charts.HEIGHT - charts.BOTTOM - charts.TOP)
    for (d, _), wanted in zip(paths_of, values.sum(axis=0), strict=True):
        assert area(d) / whole == pytest.approx(wanted, abs=0.03 + 0.002 * steps)
    assert sum(area(d) for d, _ in paths_of) / whole == pytest.approx(steps, abs=0.05 + 0.002 * steps)
    strip = []
    for start, end, colour in re.findall(r'd="M([\d.]+),\d+H([\d.]+)v5H[\d.]+Z" fill="(#c\d)" class="taken"', page):
        strip += [colour] * round((float(end) - float(start)) / step)
    assert strip == [colours[expert] for expert in taken]


def frames(style: str) -> dict[str, tuple[float, list[tuple[float, str]]]]:
    """By class: seconds, and what is declared at which per cent."""
    found = {}
    for name, stops in re.findall(r"@keyframes ([\w-]+)\{((?:[\d.]+%\{[^}]*\})+)\}", style):
        seconds = float(re.findall(rf"\.{name}\{{animation:{name} ([\d.]+)s linear infinite\}}", style)[0])
        found[name] = (seconds, [(float(at), frame) for at, frame in re.findall(r"([\d.]+)%\{([^}]*)\}", stops)])
    return found


def test_a_rod_moves_as_it_did_and_rests_at_its_end() -> None:
    motion = charts.Motion("play", 40)
    trail, other = random_trails(3, 2)
    steps = len(trail.colours)
    drawn = charts.rod(trail.points, trail.colours, ROD, motion)
    charts.rod(other.points, other.colours, ROD, motion)
    style = motion.style()
    # Nothing is declared for who asks for less motion.
    assert style.startswith("<style>@media (prefers-reduced-motion:no-preference){")
    assert style.count("{") == style.count("}")
    moving = frames(style)
    assert list(moving) == ["play-0", "play-1"]
    assert 'class="rod moves play-0"' in drawn
    seconds, stops = moving["play-0"]
    assert moving["play-1"][0] == seconds
    assert len(stops) == steps + 2
    at = np.rint(1000 * trail.points * (1, -1)).astype(int).tolist()
    for step, (percent, frame) in enumerate(stops[:-1]):
        assert percent / 100 * seconds == pytest.approx(step / charts.PACE, abs=0.01)
        x, y = at[step]
        colour = trail.colours[min(step, steps - 1)]
        assert frame == f"transform:translate({x}px,{y}px);fill:{colour}"
    assert stops[-1] == (100.0, stops[-2][1])
    # Without motion it stands where it ended.
    assert f'transform="translate({at[-1][0]},{at[-1][1]})" fill="{trail.colours[-1]}"' in drawn


def test_a_line_runs_along_the_shares_with_the_rod() -> None:
    motion = charts.Motion("play", 10)
    charts.rod(np.zeros((9, 2)), ["a"] * 8, ROD, motion)
    page = charts.shares(np.ones((8, 1)), np.zeros(8, dtype=int), ["a"], charts.Axis([], 10.0, ""), "", motion)
    (_, rod), (_, line) = frames(motion.style()).values()
    assert [at for at, _ in rod] == [at for at, _ in line]
    end = float(re.findall(r'<line x1="([\d.]+)"', page)[0])
    edges = [float(x) for x in re.findall(r"H([\d.]+)", re.findall(r'd="([^"]*)" fill="a" class="share"', page)[0])][:8]
    offsets = [float(re.findall(r"translate\((-?[\d.]+)px,0\)", frame)[0]) for _, frame in line]
    np.testing.assert_allclose(np.array(offsets[1:-1]) + end, edges, atol=0.11)
    assert offsets[-2:] == [0, 0]


# Pictures


def test_models_act_as_they_were_evaluated() -> None:
    found = group()
    played, missing = policy.play(found)
    assert missing == []
    assert [one.model.name for one in played] == [model.name for model in found.models]
    for one in played:
        made, described = load_model(one.model.folder)
        seeds, task = [2 * number + 1 for number in range(SHOWN)], load().tasks["policy"]
        wanted = roll_out(made, described, Avoiding(), seeds, task)  # type: ignore[arg-type]
        np.testing.assert_array_equal(one.rollouts.observations, wanted.observations)
        for rollout in range(SHOWN):
            steps = wanted.outcome.steps[rollout]
            np.testing.assert_array_equal(one.points(rollout), wanted.observations[rollout, : steps + 1, 2:])
            colours = one.colours(rollout)
            if one.model.role == "teacher":
                way = int(wanted.outcome.mode[rollout])
                assert colours == ["var(--soft)" if way == UNKNOWN else pictures.colour(way + 1)] * steps
            else:
                experts = wanted.experts[rollout, :steps]
                assert (experts != NONE).all()
                assert colours == [pictures.colour(expert + 1) for expert in experts]
    assert any(len(set(one.colours(0))) > 1 for one in played)


def made_up(successes: np.ndarray) -> list[policy.Played]:
    """Of (models, rollouts) successes; the last rollout is too late if it does not succeed."""
    played = []
    generator = np.random.default_rng(0)
    for number, success in enumerate(successes):
        count, experts = len(success), EXPERTS * (number > 0)
        steps = generator.integers(3, STEPS, count)
        late = ~success & (np.arange(count) == count - 1)
        outcome = Outcome(success, 1.0 * success, np.where(success, number + 1, UNKNOWN), steps, ~success & ~late)
        gone = np.arange(STEPS) >= steps[:, None]
        chosen = (
            np.where(gone, NONE, generator.integers(0, 2, (count, STEPS))) if experts else np.full(gone.shape, NONE)
        )
        observations = generator.random((count, STEPS + 1, 4))
        gate = generator.dirichlet(np.ones(EXPERTS), gone.shape)[..., :experts]
        rollouts = Rollouts(outcome, observations, chosen, gate)
        played.append(policy.Played(number, group().models[number], rollouts))
    return played


@pytest.mark.parametrize("seed", range(4))
def test_the_first_rollout_in_which_most_succeed_is_shown(seed: int) -> None:
    successes = np.random.default_rng(seed).random((3, SHOWN)) < 0.4
    best = max(range(SHOWN), key=lambda rollout: (successes[:, rollout].sum(), -rollout))
    played = made_up(successes)
    page = policy.step_by_step(group(), played, ["Without <x>"])
    assert page is not None
    assert f"Test rollout {2 * best + 1}, the first in which" in page
    count = successes[:, best].sum()
    assert ("all models succeed" if count == 3 else f"most models succeed ({count} of 3)") in page
    for one, success in zip(played, successes, strict=True):
        steps = one.rollouts.outcome.steps[best]
        said = "succeeds" if success[best] else "is too late" if best == SHOWN - 1 else "fails"
        assert f"<b>{one.model.name.removeprefix('policy-')}</b> {said} after {steps} steps" in page
    # A teacher has no gate. All moves together, and its rules come after all that moves.
    assert page.count('class="now moves') == 2
    assert page.count('class="rod moves') == 3
    assert page.count("<style>") == 1
    assert page.endswith("</style>")
    assert "Without &lt;x&gt;" in page
    moving = frames(page)
    assert len(moving) == 5
    longest = max(one.rollouts.outcome.steps[best] for one in played)
    assert {seconds for seconds, _ in moving.values()} == {round(longest / charts.PACE / (1 - charts.REST), 2)}


def test_trajectories_say_how_many_succeed_and_how() -> None:
    successes = np.array([[True, True, False, False, True, False], [False] * 6])
    page = policy.trajectories(group(), made_up(successes))
    assert page is not None
    text = Reader(f"<div>{page}</div>").text
    assert "ddpm: 3 of 6 succeed, in 1 way" in text
    assert "experts" not in text[text.index("ddpm") : text.index("beso")]
    assert "beso: 0 of 6 succeed; 2 of 3 experts act" in text
    crosses = re.findall(r'<path d="([^"]*)" class="missed"', page)
    assert [d.count("M") for d in crosses] == [2, 5]
    assert f"demonstrations: {len(LENGTHS['test'])} of the test split" in text
    assert re.findall(r"</span>(expert \d)", page) == ["expert 1", "expert 2", "expert 3"]
    assert policy.trajectories(group(), []) is None
    shutil.rmtree(paths.prepared("policy", "tiny"))
    without = policy.trajectories(group(), made_up(successes))
    assert without is not None
    assert "demonstrations: " not in Reader(f"<div>{without}</div>").text.split("was not reached.")[1]


def test_demonstrations_are_drawn_by_way() -> None:
    page = policy._demonstrations(group())
    assert page is not None
    prepared = paths.prepared("policy", "tiny")
    episodes, manifest = data.load(prepared, "test"), pd.read_csv(prepared / "manifest.csv").set_index("id")
    wanted = {}
    for name, start, length in zip(episodes.ids, episodes.starts, episodes.lengths, strict=True):
        line = np.rint(1000 * episodes.observations[start : start + length, 2:].numpy() * (1, -1)).astype(int).tolist()
        wanted.setdefault(pictures.colour(1 + MODES.index(manifest.loc[name, "mode"])), []).append(line)
    drawn = {
        colour: [line.tolist() for line in decode(d)]
        for d, colour in re.findall(r'd="([^"]*)" class="trail" style="stroke:([^"]*)"', page)
    }
    assert drawn == wanted


def test_elsewhere_the_gate_is_shown_without_the_ground(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that is no plane has no trajectories."""
    outcome = fate(0, SHOWN)
    monkeypatch.setattr(data, "environment", lambda name: Fated(outcome, STEPS, []))
    found = elsewhere("pusht")
    titles = [title for title, _ in policy.figures(found)]
    assert titles == ["Success and diversity", "Ways taken", "One rollout, step by step"]
    page = dict(policy.figures(found))["One rollout, step by step"]
    assert 'class="ground"' not in page
    assert page.count('class="now moves') == 4


# The page


def test_the_page_is_well_formed_and_always_the_same() -> None:
    page = rendered()
    reader = Reader(page)
    assert "<nobody>" not in page
    assert "script" not in reader.tags
    assert not re.search(r"url\(|@import|https?://", page)
    again = re.sub(r"Generated [^<]*", "", rendered())
    assert re.sub(r"Generated [^<]*", "", page) == again
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    ours = [title for title, _ in policy.figures(group())]
    assert [title for title in titles if title in ours] == ours
    assert len(ours) == 5


@pytest.mark.parametrize("gone", ["data/prepared", "models/trained", "reports/evaluation"])
def test_whatever_is_missing_leaves_a_page(gone: str) -> None:
    shutil.rmtree(gone)
    page = rendered()
    assert "dvc repro" in Reader(page).text
    if gone == "models/trained":
        assert page.count("Without policy-") == len(NAMES)
