"""The report on segmentation: pictures against the arrays they show, tables and charts against the figures."""

import base64
import io
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
from PIL import Image

from data.files import digest
from models.artifacts import Description, save_model
from models.segmentation import build
from stages.parameters import load
from stages.report import __main__ as report
from stages.report import charts, comparison, pictures, segmentation
from stages.report.results import Group, error_of, read_task
from stages.scores import scores

sys.path.insert(0, str(Path(__file__).parent))
from page_reader import Reader

TASK = "segmentation"
CLASSES = ["<ground>", "one", "two", "never"]
VALIDATION, TEST, SIZE = 4, 12, [16, 24]
NAMES = ("teacher", "gdd", "kd", "alone")
WRONG = {"teacher": 0.05, "gdd": 0.2, "kd": 0.25, "alone": 0.4}
INTERFACE = {
    "classes": CLASSES, "channels": 3, "size": SIZE, "mean": [0.5] * 3, "std": [0.25] * 3,
    "fit": "resize", "resize": "bilinear with antialiasing",
}  # fmt: skip


def write(path: str, value: Any) -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def network(width: int) -> dict[str, Any]:
    return {"name": "pspnet", "encoder": {"name": "resnet", "widths": [width] * 4}, "width": width}


def parameters() -> dict[str, Any]:
    common = {"task": TASK, "dataset": "tiny"}
    rights = {"licence": "none", "credit": "nobody", "redistributable": True}
    students = {
        f"{TASK}-{name}": {**common, "method": name, "teacher": f"{TASK}-teacher", "network": network(4)}
        for name in ("gdd", "kd")
    }
    students[f"{TASK}-alone"] = {**common, "method": "alone", "teacher": "none", "network": network(4)}
    return {
        "sources": {"tiny": {"kind": "folder", "path": "unused", "tree_digest": "0" * 64, **rights}},
        "datasets": {
            "tiny": {
                "task": TASK,
                "source": "tiny",
                "encoder": "none",
                "format": "folders",
                "image_size": SIZE,
                "classes": CLASSES,
            },
        },
        "teachers": {f"{TASK}-teacher": {**common, "start": "none", "network": network(8)}},
        "students": students,
        "exports": {f"{TASK}-gdd": common},
        "tasks": {TASK: {"noise": [0.01, 0.125, 0.5]}},
    }


def prepared() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images, labels and names of the test split."""
    folder = Path(f"data/prepared/{TASK}/tiny")
    ids = pd.read_csv(folder / "manifest.csv")["id"].tolist()
    return np.load(folder / "images.npy")[VALIDATION:], np.load(folder / "labels.npy")[VALIDATION:], ids[VALIDATION:]


def write_data() -> None:
    generator = np.random.default_rng(0)
    count = VALIDATION + TEST
    labels = generator.integers(0, 2, (count, *SIZE)).astype(np.uint8) + generator.integers(0, 2, (count, 1, 1))
    labels[:, :2] = 255
    folder = Path(f"data/prepared/{TASK}/tiny")
    write(str(folder / "dataset.json"), {"classes": CLASSES, "size": SIZE, "fit": "resize"})
    np.save(folder / "images.npy", generator.integers(0, 256, (count, 3, *SIZE), dtype=np.uint8))
    np.save(folder / "labels.npy", labels.astype(np.uint8))
    split = ["validation"] * VALIDATION + ["test"] * TEST
    pd.DataFrame({"id": [f"scene-{row}" for row in range(count)], "split": split}).to_csv(folder / "manifest.csv")


def write_figures(name: str, wrong: float) -> None:
    """What evaluation would have written of a model that is wrong at random."""
    folder = Path(f"data/prepared/{TASK}/tiny")
    labels = np.load(folder / "labels.npy")
    generator = np.random.default_rng(len(name))
    answer = np.where(generator.random(labels.shape) < wrong, generator.integers(0, 3, labels.shape), labels)
    known = labels != 255
    rows = []
    for row in range(len(labels)):
        found: dict[str, Any] = {"split": "validation" if row < VALIDATION else "test", "id": f"scene-{row}"}
        for label in range(len(CLASSES)):
            ours, theirs = (labels[row] == label), (answer[row] == label) & known[row]
            found |= {f"intersection_{label}": int((ours & theirs).sum()), f"union_{label}": int((ours | theirs).sum())}
        shares = [found[f"intersection_{k}"] / u for k in range(len(CLASSES)) if (u := found[f"union_{k}"])]
        rows.append(found | {"miou": round(float(np.mean(shares)), 6)})
    samples = pd.DataFrame(rows)
    details = Path(f"reports/evaluation/{TASK}")
    details.mkdir(parents=True, exist_ok=True)
    samples.to_csv(details / f"{TASK}-{name}.samples.csv", index=False)
    classes, metrics = [], {}
    for split, part in samples.groupby("split", sort=False):
        total = part.drop(columns=["split", "id", "miou"]).sum()
        for label, text in enumerate(CLASSES):
            union = total[f"union_{label}"]
            iou = round(total[f"intersection_{label}"] / union, 6) if union else None
            row = {"split": split, "label": label, "class": text, "pixels": int((labels == label).sum()), "iou": iou}
            classes.append(row)
        miou = scores(TASK, part, "miou").value
        metrics[str(split)] = {"miou": miou, "pixel_accuracy": scores(TASK, part, "pixel_accuracy").value} | {
            f"miou_{kind}_{level}": miou / (1 + level) for kind in ("noise", "blur", "darkness") for level in (1, 2, 3)
        }
    pd.DataFrame(classes).to_csv(details / f"{TASK}-{name}.classes.csv", index=False)
    write(f"reports/metrics/{TASK}/{TASK}-{name}.json", metrics)


def write_model(name: str) -> str:
    """A network with fresh weights; the digest of these."""
    torch.manual_seed(len(name))
    full = f"{TASK}-{name}"
    entry = load().teachers[full] if name == "teacher" else load().students[full]
    description = Description(
        name=full,
        task=TASK,
        kind="teacher" if name == "teacher" else "student",
        network=entry.model_dump()["network"],
        interface=INTERFACE,
        recipe={},
        dataset={"name": "tiny", "digest": ""},
        teacher=None,
        start=None,
        sources=[],
    )
    folder = Path(f"models/trained/{TASK}/{full}")
    folder.mkdir(parents=True, exist_ok=True)
    written = build({"network": description.network, "interface": INTERFACE})
    return save_model(folder, written, description).weights_sha256


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole project, as if the pipeline had run."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    write("params.yaml", yaml.safe_dump(parameters(), sort_keys=False))
    write_data()
    for name, wrong in WRONG.items():
        write_figures(name, wrong)
    write(f"reports/evaluation/{TASK}/models.json", {f"{TASK}-{name}": write_model(name) for name in NAMES})


def group() -> Group:
    (found,) = read_task(TASK, load())
    return found


def tables() -> dict[str, pd.DataFrame]:
    return {model.name: model.samples.query("split == 'test'").set_index("id") for model in group().models}


def shown(page: str) -> dict[str, np.ndarray]:
    """Pictures by description, as RGBA."""
    found = {}
    for element in re.findall(r"<img[^>]*>", page):
        source, name = (re.search(f'{key}="([^"]*)"', element)[1] for key in ("src", "alt"))  # type: ignore[index]
        file = io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))
        found[name] = np.asarray(Image.open(file).convert("RGBA"))
    return found


def rgb(label: int) -> list[int]:
    return [*bytes.fromhex(pictures.colour(label)[1:])]


# Figures


def test_table_and_conclusions() -> None:
    found = group()
    model = found.models[0]
    assert [one.name for one in found.models] == [f"{TASK}-{name}" for name in NAMES]
    error = error_of(model, "miou", "test")
    figure = f"{100 * model.metrics['test']['miou']:.2f} ±{100 * error:.2f}"  # type: ignore[operator]
    lines = comparison.text(found, segmentation).splitlines()
    assert "test mIoU" in lines[2]
    assert "16x24" in lines[4]
    assert figure in lines[4]
    teacher, student = comparison.conclusions(found, segmentation)
    assert "so there is something to distil" in teacher
    assert student.startswith("segmentation-gdd is")


def test_classes_and_metrics() -> None:
    report.main(TASK)
    page = Path("reports/index.html").read_text(encoding="utf-8")
    text = Reader(page).text
    for wanted in (*CLASSES, "pixel accuracy", "noise 3", "0.125", "0.75", "IoU by class", "Noise, blur"):
        assert wanted in text
    assert "boundary F" not in text  # no model has it here
    row = re.search(r'<tr><th scope="row">never</th>(.*?)</tr>', page)
    assert row is not None
    assert re.findall(r">([^<]+)</td>", row[1]) == ["0", *["-"] * len(NAMES)]
    first = re.search(r'<tr><th scope="row">one</th>(.*?)</tr>', page)
    assert first is not None
    classes = pd.read_csv(f"reports/evaluation/{TASK}/{TASK}-teacher.classes.csv")
    iou = classes.query("split == 'test' and label == 1")["iou"].item()
    assert re.findall(r">([^<]+)</td>", first[1])[1] == f"{100 * iou:.1f}"


def test_lines_of_worse_images() -> None:
    found = group()
    drawing = segmentation.robustness(found)
    assert drawing.count("<polyline") == 3 * len(NAMES)
    points = re.findall(r'points="([^"]*)"', drawing)[0].split()
    places = [tuple(map(float, point.split(","))) for point in points]
    assert [x for x, _ in places] == pytest.approx(
        np.linspace(charts.LEFT, charts.WIDTH - charts.RIGHT, 4).tolist(), abs=0.1
    )
    bottom = charts.HEIGHT - charts.BOTTOM
    heights = np.array([bottom - y for _, y in places])
    np.testing.assert_allclose(heights / heights[0], [1, 1 / 2, 1 / 3, 1 / 4], atol=0.01)  # the axis starts at 0
    for model in found.models:
        for name in list(model.metrics["test"]):
            if name != "miou":
                del model.metrics["test"][name]
    assert f"dvc repro evaluate@{TASK}" in segmentation.robustness(found)


# Pictures


def test_pictures_show_the_arrays() -> None:
    page = segmentation.images(group())
    found = shown(page)
    images, labels, ids = prepared()
    chosen = segmentation.choose(group(), tables(), ids)
    assert len(found) == len(chosen) * (2 + 2 * len(NAMES))
    network, _ = segmentation.load_model(Path(f"models/trained/{TASK}/{TASK}-teacher"))
    for name in chosen:
        index = ids.index(name)
        image, truth = images[index], labels[index]
        np.testing.assert_array_equal(found[f"{name}, as it is"][:, :, :3], np.moveaxis(image, 0, 2))
        known = truth != 255
        seen = found[f"{name}, its classes"]
        assert not seen[~known, 3].any()
        np.testing.assert_array_equal(seen[known, :3], [rgb(label) for label in truth[known]])
        with torch.inference_mode():
            logits = network(torch.from_numpy(image)[None] / 255).logits
            logits = torch.nn.functional.interpolate(logits, tuple(SIZE), mode="bilinear", align_corners=False)
        answer = logits[0].argmax(0).numpy()
        np.testing.assert_array_equal(
            found[f"{name}, classes by teacher"][:, :, :3].reshape(-1, 3), [rgb(label) for label in answer.ravel()]
        )
        wrong = found[f"{name}, where teacher is wrong"]
        marked = (wrong[:, :, :3] == pictures.WRONG).all(axis=2) & (wrong[:, :, 3] > 0)
        np.testing.assert_array_equal(marked, known & (answer != truth))
        assert not wrong[~known, 3].any()


def test_where_teacher_and_alone_differ_most_comes_first() -> None:
    found, by_name = group(), tables()
    _, _, ids = prepared()
    chosen = segmentation.choose(found, by_name, ids)
    assert len(chosen) == len(set(chosen)) == segmentation.DIFFERENT + segmentation.OTHERS
    gap = (by_name[f"{TASK}-teacher"]["miou"] - by_name[f"{TASK}-alone"]["miou"]).abs()
    assert gap[chosen[: segmentation.DIFFERENT]].tolist() == sorted(gap, reverse=True)[: segmentation.DIFFERENT]
    rest = [name for name in sorted(ids, key=digest) if name not in chosen[: segmentation.DIFFERENT]]
    assert chosen[segmentation.DIFFERENT :] == rest[: segmentation.OTHERS]
    assert segmentation.choose(found, {}, ids) == sorted(ids, key=digest)[: len(chosen)]
    # In either direction.
    by_name[f"{TASK}-teacher"].loc[ids[7], "miou"], by_name[f"{TASK}-alone"].loc[ids[7], "miou"] = 0, 1
    assert segmentation.choose(found, by_name, ids)[0] == ids[7]


def test_large_images_are_reduced_in_the_file() -> None:
    labels = np.zeros((400, 700), dtype=np.uint8)
    labels[:, 350:], labels[:100] = 2, 255
    (seen,) = shown(segmentation._view(pictures.class_map(labels, 4), "x")).values()
    assert seen.shape == (round(352 * 4 / 7), 352, 4)
    assert not seen[:40, :, 3].any()
    assert seen[-1, 0, :3].tolist() == rgb(0)
    assert seen[-1, -1, :3].tolist() == rgb(2)


def test_colours_of_classes_differ() -> None:
    colours = [pictures.colour(label) for label in range(60)]
    assert len(set(colours)) == 60
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)


def test_a_model_without_weights_is_left_out_and_named() -> None:
    Path(f"models/trained/{TASK}/{TASK}-kd/weights.safetensors").unlink()
    page = segmentation.images(group())
    assert f"Without {TASK}-kd: " in page
    assert "classes by kd" not in page
    assert "classes by alone" in page


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("reports/evaluation", "There are no figures by class"),
        ("models/trained", f"there is no model in models/trained/{TASK}/{TASK}-teacher"),
        ("data/prepared", "dvc repro prepare@tiny"),
    ],
)
def test_what_is_missing_is_said(gone: str, told: str) -> None:
    shutil.rmtree(gone)
    report.main("")
    assert told in Reader(Path("reports/index.html").read_text(encoding="utf-8")).text


def test_two_data_sets_on_one_page_and_a_task_without_figures() -> None:
    plain = parameters()
    plain["tasks"]["recognition"] = {}
    other = f"{TASK}-other"
    plain["datasets"]["second"] = plain["datasets"]["tiny"]
    plain["teachers"][other] = {**plain["teachers"][f"{TASK}-teacher"], "dataset": "second"}
    write("params.yaml", yaml.safe_dump(plain, sort_keys=False))
    write_figures("other", 0.1)
    report.main("")
    page = Path("reports/index.html").read_text(encoding="utf-8")
    for dataset in ("tiny", "second"):
        assert f'href="#{TASK}-{dataset}"' in page
        assert f'id="{TASK}-{dataset}"' in page
    assert "no figures for task &#x27;recognition&#x27;" in page
    assert page.count("IoU by class") == 2


def test_the_page_is_the_same_for_the_same_files() -> None:
    assert segmentation.images(group()) == segmentation.images(group())
