"""The report of classes that no training has seen: neighbours, verification, resolutions, and what may be missing."""

import contextlib
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

from data.files import write_json
from models.artifacts import Description
from models.recognition import Output
from stages.evaluate.recognition import evaluate
from stages.parameters import load
from stages.parameters.recognition import Task
from stages.report import __main__ as report
from stages.report import comparison, recognition
from stages.report.results import Group, read_task

sys.path.insert(0, str(Path(__file__).parent))
from page_reader import Reader

SIDE, COUNT, CLASSES = 8, 60, 8
PREPARED = Path("data/prepared/recognition/tiny")
NASTY = "<b>7</b>"
NAMES = [*(f"bird {label}" for label in range(CLASSES - 1)), NASTY]
# How far embeddings are spread, and the side of the images that a model sees.
MODELS = {"teacher": (0.2, 8), "assistant": (0.25, 8), "horkd": (0.3, 4), "horkd-2": (0.3, 4), "alone": (0.6, 4)}
RESOLUTIONS = [2, 4, 8]


def entries() -> dict[str, Any]:
    rights = {"licence": "none", "credit": "nobody", "redistributable": True}
    dataset = {"task": "recognition", "source": "tiny", "encoder": "none", "format": "arrays", "file": "x.npz"}
    dataset |= {"image_size": SIDE, "channels": 1, "split": {"by": "classes", "validation": 3, "test": 3}}
    network = {"name": "resnet", "widths": [4]}
    common = {"task": "recognition", "dataset": "tiny", "network": network}

    def student(method: str, teacher: str, resolution: int, **more: Any) -> dict[str, Any]:
        return {**common, "method": method, "teacher": teacher, "resolution": resolution, **more}

    return {
        "sources": {"tiny": {"kind": "folder", "path": "unused", "tree_digest": "0" * 64, **rights}},
        "datasets": {"tiny": {**dataset, "verification": {"folds": 3}}},
        "teachers": {"recognition-teacher": {**common, "start": "none"}},
        "students": {
            "recognition-assistant": student("horkd", "recognition-teacher", 8),
            "recognition-horkd": student("horkd", "recognition-assistant", 4),
            "recognition-horkd-2": student("horkd", "recognition-assistant", 4, training={"seed": 1}),
            "recognition-alone": student("alone", "none", 4),
        },
        "exports": {name: {"task": "recognition", "dataset": "tiny"} for name in ("recognition-horkd",)},
        "tasks": {"recognition": {"resolutions": RESOLUTIONS}},
    }


class Fading(torch.nn.Module):
    """Knows an image by its colour, and where it is, the less the fewer pixels it sees."""

    def __init__(self, embeddings: torch.Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", embeddings)
        self.classes = classes

    def forward(self, images: torch.Tensor) -> Output:
        found = self.embeddings[(images[:, 0].mean((1, 2)) * 255).round().long()]
        return Output(found, found, found[:, : self.classes])


def write_model(name: str, classes: int, **settings: Any) -> None:
    spread, side = MODELS[name]
    generator, full = np.random.default_rng(sum(map(ord, name))), f"recognition-{name}"
    labels = np.load(PREPARED / "labels.npy")
    embeddings = (np.eye(CLASSES)[labels] + spread * generator.normal(size=(COUNT, CLASSES))).astype(np.float32)
    interface = {"classes": NAMES[:classes], "channels": 1, "resolution": side}
    plain = {"name": full, "task": "recognition", "kind": "student", "network": {"widths": [4]}, "interface": interface}
    plain |= {"recipe": {}, "dataset": {"name": "tiny", "digest": ""}, "teacher": None, "start": None, "sources": []}
    description = Description(full, "recognition", "student", {}, interface, {}, {}, None, None, [])
    network = Fading(torch.from_numpy(embeddings), classes).eval()
    results = [evaluate(network, description, PREPARED, split, Task(**settings)) for split in ("validation", "test")]
    figures = {split: result.metrics for split, result in zip(("validation", "test"), results, strict=True)}
    Path("reports/metrics/recognition").mkdir(parents=True, exist_ok=True)
    Path("reports/evaluation/recognition").mkdir(parents=True, exist_ok=True)
    write_json(Path(f"reports/metrics/recognition/{full}.json"), figures)
    # Evaluation makes the folder anew.
    Path(f"reports/evaluation/recognition/{full}.resolutions.csv").unlink(missing_ok=True)
    for kind in results[0].tables:
        rows = pd.concat([result.tables[kind] for result in results])
        rows.to_csv(f"reports/evaluation/recognition/{full}.{kind}.csv", index=False)
    folder = Path(f"models/trained/recognition/{full}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "model.json", {**plain, "parameters": 99, "weights_sha256": full})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with figures of real evaluations, of models that look up what they answer."""
    folder = tmp_path_factory.mktemp("project")
    with contextlib.chdir(folder):
        write_project()
    return folder


@pytest.fixture(autouse=True)
def _project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def write_project() -> None:
    Path("params.yaml").write_text(yaml.safe_dump(entries(), sort_keys=False))
    PREPARED.mkdir(parents=True)
    generator = np.random.default_rng(0)
    split = np.where(np.arange(COUNT) % 2 == 0, "validation", "test")
    labels = np.where(split == "test", 5, 2) + np.arange(COUNT) // 2 % 3
    colours = np.arange(COUNT, dtype=np.uint8)
    np.save(PREPARED / "images.npy", np.broadcast_to(colours[:, None, None, None], (COUNT, 1, SIDE, SIDE)))
    np.save(PREPARED / "labels.npy", labels)
    ids = np.array([f"image-{row}" for row in range(COUNT)])
    pd.DataFrame({"id": ids, "split": split}).to_csv(PREPARED / "manifest.csv", index=False)
    drawn = []
    for part in ("validation", "test"):
        rows = np.flatnonzero(split == part)
        pairs = generator.permutation([(a, b) for a in rows for b in rows if a < b])[:90]
        same = (labels[pairs[:, 0]] == labels[pairs[:, 1]]).astype(int)
        named = {"first": ids[pairs[:, 0]], "second": ids[pairs[:, 1]], "same": same}
        drawn.append(pd.DataFrame({"split": part, "fold": np.arange(90) % 3, **named}))
    pd.concat(drawn).to_csv(PREPARED / "pairs.csv", index=False)
    described = {"classes": NAMES[:2], "held_out": NAMES[2:], "verification": {"folds": 3}}
    write_json(PREPARED / "dataset.json", described)
    for name in MODELS:
        write_model(name, 2, resolutions=RESOLUTIONS)


def group() -> Group:
    (found,) = read_task("recognition", load())
    return found


def section(title: str) -> str:
    return dict(recognition.figures(group()))[title]


def cells(text: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", text.split("<tbody>")[1])
    return [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def test_held_out_classes_are_compared_by_recall() -> None:
    found = group()
    assert recognition.main_metric(found) == "recall_at_1"
    lines = comparison.text(found, recognition).splitlines()
    assert "test Recall@1" in lines[2]
    figures = {model.name: model.metrics["test"]["recall_at_1"] for model in found.models}
    for model in found.models:
        row = next(line for line in lines[4:] if line.startswith(found.short(model.name) + " "))
        assert f" {100 * figures[model.name]:.2f} \N{PLUS-MINUS SIGN}" in row
    assert any("recognition-horkd is" in line and "above recognition-alone" in line for line in lines)


def test_a_model_without_classes_changes_what_all_are_compared_by() -> None:
    described = json.loads((PREPARED / "dataset.json").read_text())
    write_json(PREPARED / "dataset.json", {**described, "classes": NAMES, "held_out": []})
    for name in MODELS:
        write_model(name, CLASSES)
    assert recognition.main_metric(group()) == "top_1"
    assert [title for title, _ in recognition.figures(group())] == ["Test images", "Verification", "Accuracy by class"]
    write_model("horkd", 0)
    assert recognition.main_metric(group()) == "recall_at_1"
    report.main("recognition")
    assert "Nearest neighbours" in Path("reports/index.html").read_text()


def test_the_page_is_whole_and_safe() -> None:
    report.main("recognition")
    text = Path("reports/index.html").read_text()
    reader = Reader(text)
    for title in ("Nearest neighbours", "Verification", "Accuracy against resolution", "Accuracy by class"):
        assert f"<h3>{title}</h3>" in text
    assert NASTY not in text
    assert NASTY in reader.text
    assert all(value.startswith("data:image/png") for name, value in reader.attributes if name == "src")


def test_neighbours_are_marked_by_sign_and_colour() -> None:
    text = section("Nearest neighbours")
    found = group()
    labels = dict(
        zip(*(found.models[0].samples.query("split == 'test'")[name] for name in ("id", "label")), strict=True)
    )
    cards = re.findall(r'<figure class="sample">.*?</figure>', text)
    assert len(cards) == recognition.QUERIES_DISAGREED + recognition.QUERIES_OTHERS
    # The first of every role and method: not the second seed.
    shown = ["recognition-teacher", "recognition-assistant", "recognition-horkd", "recognition-alone"]
    assert "Not shown: horkd-2." in text
    for card in cards:
        query = re.findall(r"(image-\d+)</figcaption>", card)[0]
        strips = re.findall(r'<div class="near">(.*?)</div></div>', card + "</div>")
        assert len(strips) == len(shown)
        for name, strip in zip(shown, strips, strict=True):
            model = next(one for one in found.models if one.name == name)
            samples = model.samples.query("split == 'test'").reset_index(drop=True)
            row = samples[samples["id"] == query].iloc[0]
            near = [samples.loc[int(place), "id"] for place in row["neighbours"].split()]
            titles = re.findall(r'title="(image-\d+), class', strip)
            assert titles == [query, *near]
            marks = re.findall(r'<div class="(right|wrong)">.*?<span>(.)</span>', strip)
            hits = [labels[other] == labels[query] for other in near]
            assert marks == [("right", "\N{CHECK MARK}") if hit else ("wrong", "\N{BALLOT X}") for hit in hits]
        opinions = re.findall(r'<li class="(right|wrong)">', card)
        firsts = [re.findall(r'<div class="(right|wrong)">', strip)[0] for strip in strips]
        assert opinions == firsts


def test_a_model_that_knows_classes_is_shown_by_its_neighbours_too() -> None:
    """Its classes may be right where its nearest neighbour is not; the page shows neighbours."""
    write_model("alone", CLASSES)
    described = json.loads((PREPARED / "dataset.json").read_text())
    write_json(PREPARED / "dataset.json", described | {"classes": NAMES, "held_out": []})
    write_model("alone", CLASSES)
    text = section("Nearest neighbours")
    for card in re.findall(r'<figure class="sample">.*?</figure>', text):
        strips = re.findall(r'<div class="near">(.*?)</div></div>', card + "</div>")
        firsts = [re.findall(r'<div class="(right|wrong)">', strip)[0] for strip in strips]
        assert re.findall(r'<li class="(right|wrong)">', card) == firsts
    assert "; of alone: top-1." in section("Accuracy by class")


def test_students_teachers_and_baselines_come_before_assistants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognition, "SEARCHERS", 3)
    text = section("Nearest neighbours")
    assert "Not shown: assistant, horkd-2." in text


def test_verification_is_tabled_with_its_error() -> None:
    rows = cells(section("Verification"))
    for model, row in zip(group().models, rows, strict=True):
        known = {name: f"{100 * value:.2f}" for name, value in model.metrics["test"].items()}
        accuracy = f"{known['verification']} \N{PLUS-MINUS SIGN}{known['verification_error']}"
        rates = [known[f"tar_at_far_{rate}"] for rate in ("0.1", "0.01", "0.001")]
        side = str(model.description.interface["resolution"])
        assert row == [group().short(model.name), side, accuracy, *rates, known["rank_1"], "-"]


def test_resolutions_are_tabled_and_drawn() -> None:
    text = section("Accuracy against resolution")
    rows = cells(text)
    for model, row in zip(group().models, rows, strict=True):
        file = f"reports/evaluation/recognition/{model.name}.resolutions.csv"
        known = pd.read_csv(file).query("split == 'test'").set_index("resolution")
        figures = [known.loc[side, name] for name in ("recall_at_1", "rank_1") for side in RESOLUTIONS]
        assert row[2:] == [f"{100 * value:.2f}" for value in figures]
    drawings = re.findall(r"<svg [^>]*viewBox.*?</svg>", text)
    assert len(drawings) == 2
    for drawing in drawings:
        rings = re.findall(r'<circle [^>]*class="mark s\d ring"', drawing)
        assert len(rings) == len(MODELS)
        assert drawing.count("<circle") == len(MODELS) * len(RESOLUTIONS)
        # Equal factors at equal distances.
        places = [float(x) for x, _ in re.findall(r"([\d.]+),([\d.]+)", re.findall(r'points="([^"]*)"', drawing)[0])]
        assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)


def test_one_resolution_is_a_point() -> None:
    for name in MODELS:
        write_model(name, 2, resolutions=[4])
    assert "<circle" in section("Accuracy against resolution")


@pytest.mark.parametrize(
    ("gone", "title"),
    [("*.resolutions.csv", "Accuracy against resolution"), ("*.samples.csv", None), ("*.classes.csv", None)],
)
def test_what_is_missing_is_left_out(gone: str, title: str | None) -> None:
    for file in Path("reports/evaluation/recognition").glob(gone):
        file.unlink()
    report.main("recognition")
    text = Path("reports/index.html").read_text()
    assert "Verification" in text
    if title is not None:
        assert title not in text


def test_without_images_the_command_is_named() -> None:
    shutil.rmtree(PREPARED)
    assert "dvc repro prepare@tiny" in section("Nearest neighbours")


def test_without_pairs_there_is_no_verification() -> None:
    (PREPARED / "pairs.csv").unlink()
    described = json.loads((PREPARED / "dataset.json").read_text())
    write_json(PREPARED / "dataset.json", {**described, "verification": None})
    for name in MODELS:
        write_model(name, 2)
    assert [title for title, _ in recognition.figures(group())] == ["Nearest neighbours", "Accuracy by class"]
