"""The report on zero-shot recognition: roles, trade-off, epochs, real and synthesised features, images, classes."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from page_reader import Reader
from zero_shot_files import ATTRIBUTES, CLASSES, FEATURES, IMAGES, ROLES, SEEN, describe, write_prepared

from data import zero_shot as data
from data.files import sha256, write_json
from models.artifacts import Description, load_model, save_model
from models.zero_shot import build
from stages import paths
from stages.evaluate.zero_shot import evaluate, trade_off
from stages.parameters import load
from stages.parameters.zero_shot import Task
from stages.report import __main__ as report
from stages.report import charts, comparison, sections, zero_shot
from stages.report.results import Group, difference, read_task
from stages.report.samples import choose

PAGE = Path("reports/index.html")
HIDDEN, NOISE = 5, 3
MLP = {"name": "mlp", "hidden": HIDDEN, "encoder": None}
GENERATOR = {"name": "generator", "attributes": ATTRIBUTES, "noise": NOISE, "hidden": 8}
ADDED = "new & <strange>"
STUDENTS = ("d3gzsl", "clswgan", "eszsl", "extended")
ORDER = ["teacher", "d3gzsl", "d3gzsl.last", "clswgan", "eszsl", "extended"]
UNSEEN = [label for label, role in enumerate(ROLES) if role == "unseen"]


def student(method: str, teacher: str, hidden: int | None = HIDDEN, **more: Any) -> dict[str, Any]:
    common = {"task": "zero_shot", "dataset": "tiny", "method": method, "teacher": teacher, **more}
    return common if method == "extended" else {**common, "network": {"name": "mlp", "hidden": hidden}}


def parameters(**generator: Any) -> dict[str, Any]:
    rights = {"licence": "-", "credit": "-", "redistributable": True}
    common = {"task": "zero_shot", "source": "tiny", "encoder": "none"}
    split = {"validation": 0.2, "test": 0.2, "validation_classes": 2}
    generated = {"generator": {"name": "clswgan", **generator}}
    teacher = {"task": "zero_shot", "start": "none"}
    return {
        "sources": {"tiny": {"kind": "folder", "path": "unused", "tree_digest": "0" * 64, **rights}},
        "datasets": {
            "pictures": {**common, "format": "renderings", "file": "x.csv", "unseen": ["0-plain"], "split": split},
            "tiny": {**common, "format": "encoded", "encoder": "zero_shot-encoder"},
        },
        "teachers": {
            "zero_shot-encoder": {**teacher, "dataset": "pictures", "network": {"name": "encoder", "widths": [4]}},
            "zero_shot-teacher": {**teacher, "dataset": "tiny", "network": {"name": "mlp", "hidden": HIDDEN}},
        },
        "students": {
            "zero_shot-d3gzsl": student("d3gzsl", "zero_shot-teacher", **generated),
            "zero_shot-clswgan": student(
                "d3gzsl", "none", None, **generated, distribution=None, classifier={"mode": "two_stage"}
            ),
            "zero_shot-eszsl": student("eszsl", "none", None),
            "zero_shot-extended": student("extended", "zero_shot-d3gzsl", added={ADDED: [1.0] * ATTRIBUTES}),
        },
        "exports": {f"zero_shot-{name}": {"task": "zero_shot", "dataset": "tiny"} for name in STUDENTS},
        "tasks": {"zero_shot": {}},
    }  # fmt: skip


def network(description: Description, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made = build(dataclasses.asdict(description))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    return made.eval()


def write_companions(name: str, companions: dict[str, tuple[nn.Module, dict[str, Any]]], like: Description) -> None:
    folder = paths.companions("zero_shot", name)
    folder.mkdir(parents=True)
    for companion, (made, built_from) in companions.items():
        (folder / companion).mkdir()
        described = dataclasses.replace(like, name=f"{name}.{companion}", kind="companion", network=built_from)
        save_model(folder / companion, made, described)
    evaluated = [companion for companion in companions if companion == "last"]
    write_json(folder / "contents.json", {"models": list(companions), "evaluated": evaluated, "tables": []})


def write_models() -> None:
    """Trained by nobody: weights at random, but the features are scaled, and generators know the attributes."""
    recipes = load().models("zero_shot")
    seen = [CLASSES[label] for label in SEEN]
    prepared = paths.prepared("zero_shot", "tiny")
    _, train, _ = data.load(prepared, "train")
    for seed, (name, recipe) in enumerate(recipes.items()):
        short = name.removeprefix("zero_shot-")
        classes = seen if short in ("encoder", "teacher") else [*CLASSES, ADDED] if short == "extended" else CLASSES
        described = describe(
            classes, name, "student" if short in STUDENTS else "teacher",
            {"name": "encoder", "widths": [FEATURES], "blocks": 1} if short == "encoder"
            else {**MLP, "hidden": None} if short in ("eszsl", "clswgan") else MLP,
        )  # fmt: skip
        described = dataclasses.replace(
            described,
            interface={**described.interface, "images": IMAGES},
            recipe=recipe.model_dump(mode="json"),
            dataset={
                "name": recipe.dataset,
                "digest": sha256(paths.prepared("zero_shot", recipe.dataset) / "manifest.csv"),
            },
        )
        made = network(described, seed)
        if short != "encoder":
            made.scale.fit(train)
        if short == "extended":  # so that it is an answer to something
            made.classifier.bias.data[-1] += 2
        paths.trained("zero_shot", name).mkdir(parents=True)
        described = save_model(paths.trained("zero_shot", name), made, described)
        if short in ("d3gzsl", "clswgan", "extended"):
            generator = network(dataclasses.replace(described, network=GENERATOR), seed)
            generator.attributes[: len(CLASSES)] = data.attributes(prepared)
            companions: dict[str, tuple[nn.Module, dict[str, Any]]] = {"generator": (generator, GENERATOR)}
            if short == "d3gzsl":
                epochs = [network(described, seed + 100 * epoch) for epoch in range(1, 4)]
                for epoch in epochs:
                    epoch.scale.fit(train)
                kept = {"name": "snapshots", "hidden": HIDDEN, "count": len(epochs)}
                companions |= {"last": (epochs[-1], MLP), "snapshots": (nn.ModuleList(epochs), kept)}
            write_companions(name, companions, described)


def write_evaluation() -> None:
    """As the stage has it, without its checks."""
    weights = {}
    for folder in (paths.metrics("zero_shot"), paths.evaluation("zero_shot")):
        folder.mkdir(parents=True, exist_ok=True)
    for name, folder in paths.models("zero_shot", load().models("zero_shot")).items():
        made, described = load_model(folder)
        prepared = paths.prepared("zero_shot", described.dataset["name"])
        results = [evaluate(made, described, prepared, split, Task()) for split in ("validation", "test")]
        figures = {"validation": results[0].metrics, "test": results[1].metrics}
        write_json(paths.metrics("zero_shot") / f"{name}.json", figures)
        for kind in ("samples", "classes"):
            table = pd.concat([getattr(result, kind) for result in results])
            table.to_csv(paths.evaluation("zero_shot") / f"{name}.{kind}.csv", index=False)
        weights[name] = described.weights_sha256
    write_json(paths.evaluation("zero_shot") / "models.json", weights)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole project, as if the pipeline had run."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        Path("params.yaml").write_text(yaml.safe_dump(parameters(), sort_keys=False), encoding="utf-8")
        write_prepared(paths.prepared("zero_shot", "pictures"), seed=0, holds=["images"])
        write_prepared(paths.prepared("zero_shot", "tiny"), seed=0, holds=["images", "features"])
        write_models()
        write_evaluation()
    return root


@pytest.fixture(autouse=True)
def _project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def groups() -> tuple[Group, Group]:
    """Of the encoder's images, and of the features."""
    first, second = read_task("zero_shot", load())
    return first, second


def rendered() -> str:
    report.main("zero_shot")
    return PAGE.read_text(encoding="utf-8")


def change(name: str, split: str, **figures: float | None) -> None:
    """Other figures of a model; None takes one away."""
    file = paths.metrics("zero_shot") / f"zero_shot-{name}.json"
    plain = json.loads(file.read_text(encoding="utf-8"))
    plain[split] = {key: value for key, value in {**plain[split], **figures}.items() if value is not None}
    write_json(file, plain)


# Roles and comparison


def test_roles_and_methods() -> None:
    encoder, found = groups()
    assert [(model.role, model.method) for model in encoder.models] == [("encoder", None)]
    assert encoder.encodes
    assert not found.encodes
    assert [(found.short(model.name), model.role, model.method, model.learnt_from) for model in found.models] == [
        ("teacher", "teacher", None, None),
        ("d3gzsl", "student", "d3gzsl", "zero_shot-teacher"),
        ("d3gzsl.last", "last epoch", "d3gzsl", "zero_shot-teacher"),
        ("clswgan", "baseline", "clswgan", None),
        ("eszsl", "baseline", "eszsl", None),
        ("extended", "student", "extended", "zero_shot-d3gzsl"),
    ]


def test_an_encoder_is_compared_by_what_it_learns() -> None:
    encoder, _ = groups()
    assert comparison.main_metric(encoder, zero_shot)[0] == "seen"
    said = comparison.text(encoder, zero_shot)
    assert "test S" in said
    assert "encoder: another data set holds the features" in said
    assert "latency" not in said.lower()
    assert "-m stages.latency" not in sections.reproduce(encoder, None)


def test_students_are_compared_with_the_closed_form_and_the_generator_alone() -> None:
    _, found = groups()
    columns = {one.title: [figure for figure, _ in one.cells] for one in comparison.columns(found, zero_shot)}
    by_name = {found.short(model.name): model for model in found.models}
    wanted = ["-"]
    for name in ORDER[1:]:
        gap = difference(by_name[name], by_name["eszsl"], "harmonic_mean", "test")
        assert gap is not None
        wanted.append("-" if name == "eszsl" else f"{100 * gap.value:+.2f}")
    assert columns["vs eszsl"] == wanted
    assert "agrees" not in columns
    lines = comparison.conclusions(found, zero_shot)
    assert [line.split()[0] for line in lines] == ["zero_shot-d3gzsl", "zero_shot-extended"]
    assert re.search(r"zero_shot-eszsl \(paired.*zero_shot-clswgan \(paired", lines[0])
    assert "clswgan" not in lines[1]
    assert "last epoch: a student at the end of its training" in comparison.text(found, zero_shot)


def test_the_generator_alone_is_one_with_the_same_generator() -> None:
    _, found = groups()
    model = next(model for model in found.models if model.method == "d3gzsl")
    assert zero_shot.relatives(model) == ("eszsl", "clswgan")
    assert model.description is not None
    recipe = {**model.description.recipe, "generator": {"name": "cegzsl"}}
    other = dataclasses.replace(model, description=dataclasses.replace(model.description, recipe=recipe))
    assert zero_shot.relatives(other) == ("eszsl", "cegzsl")
    assert zero_shot.relatives(dataclasses.replace(model, role="teacher")) == ()


def test_a_validation_split_without_unseen_samples_has_no_figure() -> None:
    """The table says so; the test split still compares."""
    for name in ORDER:
        change(name, "validation", harmonic_mean=None, unseen=None)
    _, found = groups()
    columns = {one.title: one.cells for one in comparison.columns(found, zero_shot)}
    assert "validation H" not in columns
    assert len(columns["test H"]) == len(ORDER)
    change("eszsl", "test", harmonic_mean=None)
    with pytest.raises(Exception, match="figures of zero_shot-eszsl hold no 'harmonic_mean'"):
        groups_and_text()


def groups_and_text() -> str:
    return comparison.text(groups()[1], zero_shot)


# Seen against unseen


def test_the_trade_off_is_drawn_with_its_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    lines = charts.lines
    monkeypatch.setattr(charts, "lines", lambda *given: (drawn.append(given), lines(*given))[1])
    _, found = groups()
    page = zero_shot.seen_against_unseen(found)
    assert page is not None
    ((series, _, _, _, marks),) = drawn
    assert list(series) == [1, 2, 3, 4, 5]  # all but the teacher
    for number, (across, up) in series.items():
        model = found.models[number]
        assert model.samples is not None
        curve = trade_off(model.samples[model.samples["split"] == "test"])
        np.testing.assert_allclose((across, up), (100 * curve.unseen, 100 * curve.seen))
        known = model.metrics["test"]
        ours = [(mark.place, mark.value, mark.ring) for mark in marks if mark.number == number]
        assert ours == [
            (100 * known["unseen"], 100 * known["seen"], False),
            (100 * known["calibrated_unseen"], 100 * known["calibrated_seen"], True),
        ]
    assert page.count("<circle") == 2 * len(series)
    cells = re.findall(r"<tr><th scope=\"row\">d3gzsl</th>(.*?)</tr>", page)[0]
    known = found.models[1].metrics["test"]
    shown = [
        f"{100 * known[f'{kind}{name}']:.2f}"
        for kind in ("", "calibrated_")
        for name in ("seen", "unseen", "harmonic_mean")
    ]
    assert re.findall(r">([-+\d.]+)</td>", cells) == [*shown, f"{known['handicap']:+.3f}"]
    assert zero_shot.seen_against_unseen(groups()[0]) is None


def test_marks_are_where_lines_are() -> None:
    scale, axis = charts.linear(np.array([0.0, 100.0])), charts.Axis([], 100.0, "")
    series = {0: (np.array([0.0, 25.0]), np.array([100.0, 50.0])), 1: (np.array([10.0]), np.array([20.0]))}
    drawing = charts.lines(series, scale, axis, "test", [charts.Mark(0, 25.0, 50.0, ring=True)])
    line = re.findall(r'points="([^"]*)"', drawing)[0].split()
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="[\d.]+" class="([^"]*)"', drawing)
    assert circles[1] == (*line[1].split(","), "mark s0 ring")
    assert circles[0][2] == "mark s1"  # a line of one point would not be seen


# Epochs


def epochs_table() -> list[list[str]]:
    page = zero_shot.epochs(groups()[1])
    assert page is not None
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", page)
    return [re.sub(r"<[^>]*>", "|", row).replace("||", "|").rstrip("|").split("|") for row in rows]


def test_epochs() -> None:
    _, found = groups()
    kept, last = found.models[1].metrics, found.models[2].metrics
    best = kept["test"]["test_best_harmonic_mean"]
    values = [one[split]["harmonic_mean"] for one in (kept, last) for split in ("validation", "test")]
    assert epochs_table() == [["zero_shot-d3gzsl", *(f"{100 * value:.2f}" for value in (*values, best))]]
    page = zero_shot.epochs(found)
    assert page is not None
    assert "best on test: not to be used" in page
    assert zero_shot.TEST_BEST not in zero_shot.METRICS
    assert "Which epoch" in rendered()


def test_the_last_epoch_may_be_the_one_that_was_kept() -> None:
    contents = paths.companions("zero_shot", "zero_shot-d3gzsl") / "contents.json"
    write_json(contents, {"models": ["generator"], "evaluated": [], "tables": []})
    assert epochs_table()[0][3:5] == ["the same", "the same"]
    change("d3gzsl", "test", test_best_harmonic_mean=None)
    assert zero_shot.epochs(groups()[1]) is None


# Real and synthesised features


def test_principal_components() -> None:
    generator = np.random.default_rng(0)
    points = generator.normal(size=(60, 5)) @ np.diag([1, 5, 0.1, 3, 0.5]) + 7
    axes, middle, share = zero_shot.principal_components(points)
    values, vectors = np.linalg.eigh(np.cov(points.T, bias=True))
    np.testing.assert_allclose(np.abs(axes.T @ vectors[:, [-1, -2]]), np.eye(2), atol=1e-9)
    np.testing.assert_allclose(middle, points.mean(axis=0))
    assert share == pytest.approx(values[-2:].sum() / values.sum())
    assert (axes.max(axis=0) == np.abs(axes).max(axis=0)).all()
    again, _, _ = zero_shot.principal_components(points[::-1])
    np.testing.assert_allclose(axes, again)
    flat, _, whole = zero_shot.principal_components(np.outer([1.0, 2, 4], [3.0, 4]))
    np.testing.assert_allclose(flat[:, 0], [0.6, 0.8])
    assert whole == pytest.approx(1)


def test_clouds_are_of_unseen_test_classes() -> None:
    _, found = groups()
    model = found.models[1]
    clouds = zero_shot.read_clouds(found, model)
    assert clouds.classes == [CLASSES[label] for label in UNSEEN]
    prepared = paths.prepared("zero_shot", "tiny")
    (_, train, _), (_, test, labels) = (data.load(prepared, split) for split in ("train", "test"))
    low, high = train.numpy().min(axis=0), train.numpy().max(axis=0)
    for place, label in enumerate(UNSEEN):
        wanted = (test.numpy()[labels.numpy() == label] - low) / (high - low)
        np.testing.assert_allclose(clouds.real[place], wanted, rtol=1e-4, atol=1e-5)
        spread = np.sqrt(np.mean([np.linalg.norm(row - wanted.mean(axis=0)) ** 2 for row in wanted]))
        assert clouds.spreads[place] == pytest.approx(spread, rel=1e-4)
        assert clouds.synthesised[place].shape == (zero_shot.SYNTHESISED, FEATURES)
        for other, real in enumerate(clouds.real):
            apart = np.linalg.norm(clouds.synthesised[place].mean(axis=0) - real.mean(axis=0))
            assert clouds.distances[place, other] == pytest.approx(apart)
    again = zero_shot.read_clouds(found, model)
    assert all((one == other).all() for one, other in zip(clouds.synthesised, again.synthesised, strict=True))
    assert not np.allclose(clouds.synthesised[0], clouds.synthesised[1])


def panels(classes: int, moved: bool = False) -> tuple[list[str], str]:
    """Captions and the whole, of classes with a spread of 2, the generator 0, 1, 2 ... away from them."""
    generator = np.random.default_rng(1)
    centres = 20 * np.eye(classes, classes + 2)
    around = generator.normal(size=(30, classes + 2))
    around -= around.mean(axis=0)
    around *= 2 / np.sqrt((around**2).sum(axis=1).mean())
    real = [centre + around for centre in centres]
    offsets = np.arange(classes)[:, None] * np.eye(1, classes + 2, classes)
    made = [points + offset for points, offset in zip(real, offsets, strict=True)]
    if moved:
        made[0], made[1] = made[1], made[0]
    page = zero_shot._clouds(zero_shot.Clouds([f"<c{place}>" for place in range(classes)], real, made), "toy")
    return re.findall(r"<figcaption>(.*?)</figcaption>", page), page


def test_panels_say_how_far_the_means_are_apart() -> None:
    captions, page = panels(4)
    assert page.count("<svg") == 4
    assert page.count('id="clouds-toy"') == 1
    assert page.count('<use href="#clouds-toy">') == 3
    assert [caption.split("</b> ")[0] for caption in captions] == [f"<b>&lt;c{place}&gt;" for place in range(4)]
    away = [float(caption.split("</b> ")[1]) for caption in captions]
    assert away == [0, 0.5, 1, 1.5]
    assert "For 4 of 4 unseen classes" in page
    captions, page = panels(4, moved=True)
    assert "For 2 of 4 unseen classes" in page
    assert any("&lt;c0&gt;</b>" in caption and "nearer to &lt;c1&gt;" in caption for caption in captions)


def test_of_many_classes_the_nearest_and_the_farthest_are_shown() -> None:
    captions, page = panels(zero_shot.PANELS + 5)
    half = zero_shot.PANELS // 2
    shown = [int(re.findall(r"c(\d+)", caption)[0]) for caption in captions]
    assert shown == [*range(half), *range(half + 5, zero_shot.PANELS + 5)]
    assert f"Shown are the {half} nearest and the {half} farthest." in page


def test_points_of_all_panels_share_their_axes() -> None:
    generator = np.random.default_rng(0)
    drawn = [
        charts.Cloud(*(generator.normal(size=(9, 2)) + 3 * place for _ in range(2)), (np.zeros(2), np.ones(2)), "x")
        for place in range(3)
    ]
    found = charts.clouds(drawn, "id")
    every = np.concatenate([cloud.dots for cloud in drawn])
    behind = re.findall(r"M([\d.]+),([\d.]+)h0", found[0])[: len(every)]
    places = np.array(behind, dtype=float)
    unit = np.ptp(places[:, 0]) / np.ptp(every[:, 0])
    np.testing.assert_allclose(places[:, 0] - places[0, 0], unit * (every[:, 0] - every[0, 0]), atol=0.11)
    np.testing.assert_allclose(places[:, 1] - places[0, 1], -unit * (every[:, 1] - every[0, 1]), atol=0.11)
    for number, svg in enumerate(found):
        own = re.findall(r"M([\d.]+),([\d.]+)h0", svg)[-9:]
        assert own == behind[9 * number : 9 * number + 9]
        coordinates = np.array(re.findall(r"M([\d.-]+),([\d.-]+)", svg), dtype=float)
        assert (coordinates >= charts.CLOUD_EDGE - 0.1).all()
        assert (coordinates <= charts.CLOUD - charts.CLOUD_EDGE + 0.1).all()


def test_features_are_those_of_generators_of_their_own() -> None:
    page = zero_shot.features(groups()[1])
    assert page is not None
    assert re.findall(r"<h4>(.*?)</h4>", page) == ["zero_shot-d3gzsl", "zero_shot-clswgan"]
    assert page.count("<figure>") == 2 * len(UNSEEN)
    assert zero_shot.features(groups()[0]) is None


def test_a_generator_that_cannot_be_read_is_told() -> None:
    (paths.companions("zero_shot", "zero_shot-d3gzsl") / "generator" / "weights.safetensors").write_bytes(b"x")
    page = zero_shot.features(groups()[1])
    assert page is not None
    assert "Without the features of zero_shot-d3gzsl: " in page
    assert re.findall(r"<h4>(.*?)</h4>", page) == ["zero_shot-clswgan"]
    shutil.rmtree(paths.prepared("zero_shot", "tiny"))
    page = zero_shot.features(groups()[1])
    assert page is not None
    assert "Without the features of zero_shot-clswgan: " in page


# Images and classes


def test_images_show_what_everybody_answers() -> None:
    _, found = groups()
    page = zero_shot.images(found)
    assert page is not None
    tables = {model.name: model.samples[model.samples["split"] == "test"].set_index("id") for model in found.models}
    able = {name: rows for name, rows in tables.items() if name != "zero_shot-teacher"}
    chosen, disagreed = choose(able, zero_shot.DISAGREED, zero_shot.OTHERS)
    assert re.findall(r" · (\d+)</figcaption>", page) == chosen
    assert f"disagree on {disagreed:,} of {len(tables['zero_shot-teacher'])} test images" in page
    known = [*CLASSES, ADDED]
    cards = page.split("<figure")[1:]
    for card, name in zip(cards, chosen, strict=True):
        text = Reader(f"<figure{card}".removesuffix("</div>")).text
        label = tables["zero_shot-teacher"].loc[name, "label"]
        assert f"{ROLES[label]} class {CLASSES[label]} · {name}" in text
        for model, rows in tables.items():
            row = rows.loc[name]
            assert f"{found.short(model)}{known[row['prediction']]} {100 * row['confidence']:.0f} %" in text
    assert any((rows["prediction"] == len(CLASSES)).any() for rows in tables.values())


def test_without_images_there_are_none_to_show() -> None:
    (paths.prepared("zero_shot", "tiny") / "images.npy").unlink()
    assert zero_shot.images(groups()[1]) is None
    assert "Test images" not in rendered()
    shutil.rmtree(paths.prepared("zero_shot", "tiny"))
    assert "dvc repro prepare@tiny" in str(zero_shot.images(groups()[1]))


def test_accuracy_by_class_and_role() -> None:
    _, found = groups()
    page = zero_shot.accuracy_by_class(found)
    unseen, seen = page.split("<h4>Seen classes</h4>")
    assert "teacher" not in unseen
    assert '<th scope="col" class="n">teacher</th>' in seen
    for part, labels in ((unseen, UNSEEN), (seen, SEEN)):
        names = [f"class &lt;{label}&gt;" for label in labels]
        assert sorted(re.findall(r"<th scope=\"row\">(.*?)</th>", part)) == names
    table = found.models[1].classes
    assert table is not None
    row = table[(table["split"] == "test") & (table["label"] == UNSEEN[0])].iloc[0]
    line = re.findall(rf"<th scope=\"row\">class &lt;{UNSEEN[0]}&gt;</th>(.*?)</tr>", unseen)[0]
    assert re.findall(r">([\d.]+)</td>", line)[:2] == [str(row["samples"]), f"{100 * row['accuracy']:.1f}"]
    assert "zero_shot-extended knows 1 more, without samples here: new &amp; &lt;strange&gt;." in seen
    encoder = zero_shot.accuracy_by_class(groups()[0])
    assert "Unseen classes" not in encoder
    assert "Seen classes" in encoder


# The page


def test_everything_is_escaped_and_well_formed() -> None:
    page = rendered()
    reader = Reader(page)
    assert "<strange>" not in page
    assert "class <0>" not in page
    identities = [value for name, value in reader.attributes if name == "id"]
    assert len(identities) == len(set(identities))
    first, second = page.split('<h2 id="zero_shot-tiny">')
    titles = ["Seen against unseen", "Which epoch", "Real and synthesised features", "Test images", "Export", "Latency"]
    for title in titles:
        assert f"<h3>{title}" in second
        assert f"<h3>{title}" not in first
    assert "<h3>Accuracy by class</h3>" in first


@pytest.mark.parametrize("gone", ["data/prepared", "models/companions", "models/trained", "reports/evaluation"])
def test_whatever_is_missing_leaves_a_page(gone: str) -> None:
    shutil.rmtree(gone)
    assert "dvc repro" in Reader(rendered()).text
