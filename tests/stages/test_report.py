"""`python -m stages.report`: figures against brute force, safe and self-contained HTML, and whatever may be missing."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from data.errors import UserError
from data.files import digest
from stages.parameters import load
from stages.report import __main__ as report
from stages.report import charts, comparison, page, recognition, sections
from stages.report.results import Difference, Group, difference, error_of, read_task
from stages.report.samples import choose

sys.path.insert(0, str(Path(__file__).parent))
from page_reader import Reader

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path("reports/index.html")
NASTY = "<script>alert(\"1\")</script> & 'co'"
CREDIT = 'see <a href="https://example.org/credit">here</a>'
CLASSES = ["NA", NASTY]
VALIDATION, TEST, SIDE = 10, 40, 4
NAMES = ("teacher", "assistant", "horkd", "kd", "alone")
# How many of the first test samples each model gets wrong.
WRONG = {"teacher": 0, "assistant": 2, "horkd": 4, "kd": 6, "alone": 16}


def write(path: str, value: Any) -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False)


def student(method: str, teacher: str, resolution: int, **more: Any) -> dict[str, Any]:
    network = {"name": "resnet", "widths": [4]}
    common = {"task": "recognition", "dataset": "tiny", "resolution": resolution, "network": network}
    return {**common, "method": method, "teacher": teacher, **more}


def parameters(redistributable: bool = True) -> dict[str, Any]:
    rights = {"licence": "none", "credit": CREDIT, "redistributable": redistributable}
    data = {
        "task": "recognition",
        "source": "tiny",
        "encoder": "none",
        "format": "csv",
        "file": "tiny.csv",
        "classes": CLASSES,
    }
    teacher = {"task": "recognition", "dataset": "tiny", "start": "none", "network": {"name": "resnet", "widths": [8]}}
    return {
        "sources": {"tiny": {"kind": "folder", "path": "unused", "tree_digest": "0" * 64, **rights}},
        "datasets": {
            "tiny": {**data, "image_size": SIDE, "channels": 1, "split": {"validation": VALIDATION, "test": TEST}}
        },
        "teachers": {"recognition-teacher": teacher},
        "students": {
            "recognition-assistant": student("horkd", "recognition-teacher", 4),
            "recognition-horkd": student("horkd", "recognition-assistant", 2),
            "recognition-kd": student("kd", "recognition-teacher", 2),
            "recognition-alone": student("alone", "none", 2),
        },
        "exports": {f"recognition-{name}": {"task": "recognition", "dataset": "tiny"} for name in NAMES[2:]},
        "tasks": {"recognition": {}},
    }


def samples(wrong: int) -> pd.DataFrame:
    rows = np.arange(TEST)
    label = rows % 2
    table = pd.DataFrame({"id": [f"row-{row}" for row in rows], "label": label, "confidence": 0.75})
    table["correct"] = (rows >= wrong).astype(int)
    table["prediction"] = np.where(table["correct"], label, 1 - label)
    return pd.concat([table[-VALIDATION:].assign(split="validation"), table.assign(split="test")])


def write_model(name: str, wrong: int) -> None:
    full, table = f"recognition-{name}", samples(wrong)
    figures = dict.fromkeys(recognition.METRICS, 1 - wrong / TEST)
    write(f"reports/metrics/recognition/{full}.json", {"validation": figures, "test": figures})
    details = Path("reports/evaluation/recognition")
    details.mkdir(parents=True, exist_ok=True)
    table.to_csv(details / f"{full}.samples.csv", index=False)
    classes = table.groupby(["split", "label"])["correct"].agg(["size", "mean"]).reset_index()
    classes = classes.rename(columns={"size": "samples", "mean": "accuracy"})
    classes.assign(**{"class": [CLASSES[label] for label in classes["label"]]}).to_csv(
        details / f"{full}.classes.csv", index=False
    )
    curve = "step,loss/task,loss/<b>,validation/top_1\n9,2.5,1,\n10,,,0.5\n19,0.01,0.9,\n20,,,1.0\n"
    write(f"reports/curves/recognition/{full}.csv", curve)
    description = {
        "name": full,
        "task": "recognition",
        "kind": "teacher" if name == "teacher" else "student",
        "network": {"widths": [4]},
        "interface": {"classes": CLASSES, "resolution": 4 if name in ("teacher", "assistant") else 2},
        "recipe": {},
        "dataset": {"name": "tiny", "digest": ""},
        "teacher": None,
        "start": None,
        "sources": [],
        "parameters": 1234,
        "weights_sha256": full,
    }
    write(f"models/trained/recognition/{full}/model.json", description)
    write(f"models/trained/recognition/{full}/weights.safetensors", "x" * 2500)
    if name in NAMES[2:]:
        parity = {"samples": TEST, "largest_difference": {"logits": 1e-6}, "metric": {"onnx": 0.5, "pytorch": 0.5}}
        exported = {**description, "onnx_sha256": f"onnx-{name}", "parity": parity}
        write(f"models/exported/recognition/{full}/model.json", exported)
        write(f"models/exported/recognition/{full}/model.onnx", "x" * 1500)


def write_latency() -> None:
    times = {batch: {"p50": 0.125, "p95": 0.25} for batch in ("1", "32")}
    size = {"parameters": 1234, "bytes": 1500}
    models = {
        f"recognition-{name}": {"onnx_sha256": f"onnx-{name}", "latency_ms": times, **size}
        for name in ("teacher", *NAMES[2:])
    }
    machine = {"processor": "a <processor>", "cores": 2}
    write("reports/latency/recognition.json", {"time": "now", "machine": machine, "threads": 1, "models": models})


def write_findings(failed: list[str]) -> None:
    findings = [{"success": True, "sentence": "met"}, *({"success": False, "sentence": text} for text in failed)]
    plain = {"success": not failed, "error": None, "rows": {"manifest": 80}, "findings": findings}
    write("reports/validation/recognition/tiny/findings.json", plain)
    write("reports/validation/recognition/tiny/index.html", "docs")


def write_record(weights: dict[str, str]) -> None:
    write("reports/evaluation/recognition/models.json", json.dumps(weights))


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole project, as if the pipeline had run."""
    monkeypatch.chdir(tmp_path)
    write("params.yaml", dump(parameters()))
    for name, wrong in WRONG.items():
        write_model(name, wrong)
    write_record({f"recognition-{name}": f"recognition-{name}" for name in NAMES})
    write_findings([])
    prepared = Path("data/prepared/recognition/tiny")
    write(str(prepared / "dataset.json"), {"classes": CLASSES})
    images = np.random.default_rng(3).integers(0, 256, (TEST, 1, SIDE, SIDE), dtype=np.uint8)
    np.save(prepared / "images.npy", images)
    np.save(prepared / "labels.npy", np.arange(TEST) % 2)
    manifest = pd.DataFrame({"id": [f"row-{row}" for row in range(TEST)], "split": "test"})
    manifest.to_csv(prepared / "manifest.csv", index=False)


def group() -> Group:
    (found,) = read_task("recognition", load())
    return found


def rendered() -> str:
    report.main("recognition")
    return PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("seed", range(5))
def test_paired_standard_error_equals_brute_force(seed: int) -> None:
    generator = np.random.default_rng(seed)
    ours, theirs = generator.integers(0, 2, (2, TEST))
    models = group().models
    for model, column in ((models[0], ours), (models[1], theirs)):
        model.samples.loc[model.samples["split"] == "test", "correct"] = column
    # The two files need not have the same order.
    shuffled = models[1].samples.sample(frac=1, random_state=seed)
    models[1].samples.loc[:] = shuffled.to_numpy()
    found = difference(models[0], models[1], "top_1", "test")
    gaps = [int(a) - int(b) for a, b in zip(ours, theirs, strict=True)]
    mean = sum(gaps) / TEST
    assert found.value == pytest.approx(mean)
    assert found.error == pytest.approx(math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / TEST / TEST))
    assert found.samples == TEST


def test_single_standard_error_is_that_of_a_share() -> None:
    model = group().models[2]
    assert error_of(model, "top_1", "test") == pytest.approx(math.sqrt(0.9 * 0.1 / TEST))
    assert error_of(dataclasses.replace(model, samples=None), "top_1", "test") is None


def test_models_on_different_samples_are_not_compared() -> None:
    first, second, *_ = group().models
    second.samples["id"] = second.samples["id"] + "-other"
    with pytest.raises(UserError, match=r"recognition-teacher.*recognition-assistant.*different test samples"):
        difference(first, second, "top_1", "test")


def test_text_table() -> None:
    write_latency()
    lines = comparison.text(group(), recognition).splitlines()
    assert lines[0] == "recognition on tiny (40 test samples); names of models without 'recognition-'"
    cells = [" | ".join(re.split(r"\s{2,}", line)) for line in (lines[2], *lines[4:9])]
    assert cells == [
        "model | role | method | learnt from | input | test top-1 | vs alone | params | weights | ONNX | p50 ms",
        "teacher | teacher | - | labels | 4x4 | 100.00 ±0.00 | +40.00 ±7.75 | 1,234 | 2.5 kB | - | 0.125",
        "assistant | assistant* | horkd | teacher | 4x4 | 95.00 ±3.45 | +35.00 ±7.54 | 1,234 | 2.5 kB | - | -",
        "horkd | student | horkd | assistant | 2x2 | 90.00 ±4.74 | +30.00 ±7.25 | 1,234 | 2.5 kB | 1.5 kB | 0.125",
        "kd | baseline | kd | teacher | 2x2 | 85.00 ±5.65 | +25.00 ±6.85 | 1,234 | 2.5 kB | 1.5 kB | 0.125",
        "alone | baseline | alone | labels | 2x2 | 60.00 ±7.75 | - | 1,234 | 2.5 kB | 1.5 kB | 0.125",
    ]
    assert max(len(line) for line in lines) <= comparison.WIDTH
    assert len({line.index(mark) for line, mark in zip(lines[4:8], ("+40", "+35", "+30", "+25"), strict=True)}) == 1
    assert "not deployed" in lines[12]


def test_conclusions_follow_from_the_figures() -> None:
    teacher, horkd = comparison.conclusions(group(), recognition)
    assert teacher == (
        "recognition-teacher (teacher) is 40.00 points above recognition-alone (paired s.e. 7.75): "
        "a lead of more than 3 standard errors, so there is something to distil."
    )
    assert horkd == (
        "recognition-horkd is 30.00 points above recognition-alone (paired s.e. 7.25), beyond 2 standard errors; and "
        "5.00 points above recognition-kd (paired s.e. 3.45), within 2 standard errors, which is noise; one seed."
    )
    write_model("alone", 3)
    write_model("teacher", 30)
    write_model("kd", 2)
    teacher, horkd = comparison.conclusions(group(), recognition)
    assert "is 67.50 points below recognition-alone" in teacher
    assert teacher.endswith(": no lead of more than 3 standard errors, so there is little to distil.")
    assert "is 2.50 points below recognition-alone" in horkd
    assert "and 5.00 points below recognition-kd (paired s.e. 3.45): both within 2 standard errors" in horkd


def test_a_lead_counts_only_beyond_the_errors() -> None:
    assert Difference(0.0201, 0.01, 9).beyond(2)
    assert not Difference(0.02, 0.01, 9).beyond(2)
    assert Difference(-0.0201, 0.01, 9).beyond(2)
    assert not Difference(0.0, 0.0, 9).beyond(2)


def test_seeds_are_counted() -> None:
    plain = parameters()
    again = {**plain["students"]["recognition-horkd"], "training": {"seed": 7}}
    other = {**again, "training": {"seed": 8, "epochs": 2}}
    plain["students"] |= {"recognition-horkd-7": again, "recognition-horkd-8": other}
    write("params.yaml", dump(plain))
    assert [model.seeds for model in group().models] == [1, 1, 2, 1, 1]


def test_without_alone_there_is_no_difference() -> None:
    Path("reports/metrics/recognition/recognition-alone.json").unlink()
    text = comparison.text(group(), recognition)
    assert "vs alone" not in text
    assert "Not evaluated yet: recognition-alone" in text
    assert "dvc repro evaluate@recognition" in text


def test_the_reference_has_the_same_network_and_input_if_any_has() -> None:
    plain = parameters()
    students = {"recognition-large": student("alone", "none", 4), **plain["students"]}
    write("params.yaml", dump({**plain, "students": students}))
    write_model("large", 9)
    write(
        "models/trained/recognition/recognition-large/model.json",
        Path("models/trained/recognition/recognition-assistant/model.json").read_text(encoding="utf-8"),
    )
    found = group()
    references = {model.name: found.reference(model, "alone") for model in found.models}
    assert references["recognition-horkd"].name == "recognition-alone"
    assert references["recognition-assistant"].name == "recognition-large"


def test_page_loads_nothing_and_is_well_formed() -> None:
    write_latency()
    text = rendered()
    assert "https://example.org/credit" in text
    reader = Reader(text)
    for name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert value.startswith(("data:image/png;base64,", "#", "validation/")), value
    assert not {"script", "link", "iframe", "object", "base"} & set(reader.tags)
    styles = [*re.findall(r"<style>(.*?)</style>", text, re.DOTALL), *(v for n, v in reader.attributes if n == "style")]
    assert styles
    assert not any("url(" in style or "@import" in style for style in styles)
    assert reader.tags.count("img") == 2 * min(TEST, recognition.DISAGREED + recognition.OTHERS)
    for linked in re.findall(r'href="(validation/[^"]*)"', text):
        assert (PAGE.parent / linked).is_file()


def test_text_from_data_is_escaped() -> None:
    write_latency()
    write_findings([f"label must not be {NASTY}"])
    text = rendered()
    assert "<script" not in text
    assert '<a href="https' not in text
    assert "<processor>" not in text
    seen = Reader(text).text
    for wanted in (NASTY, CREDIT, "a <processor>", "loss/<b>", f"label must not be {NASTY}"):
        assert wanted in seen
    assert '<th scope="row">NA</th>' in text
    assert page.tag("p", '"<', title='"<') == '<p title="&quot;&lt;">&quot;&lt;</p>'


def test_marks_tell_right_from_wrong() -> None:
    text = rendered()
    for kind, mark, other in (("right", "✓", "✗"), ("wrong", "✗", "✓")):
        items = re.findall(rf'<li class="{kind}">.*?</li>', text)
        assert items
        assert all(mark in item and other not in item for item in items)


def test_disagreement_is_shown_first_and_always_the_same() -> None:
    tables = {model.name: model.samples.query("split == 'test'").set_index("id") for model in group().models}
    counts = (recognition.DISAGREED, recognition.OTHERS)
    chosen, disagreed = choose(tables, *counts)
    reversed_tables = {name: table.iloc[::-1] for name, table in reversed(tables.items())}
    assert (chosen, disagreed) == choose(reversed_tables, *counts)
    # The teacher is right everywhere, so that models disagree wherever any of them is wrong.
    mixed = {f"row-{row}" for row in range(max(WRONG.values()))}
    assert disagreed == len(mixed)
    assert chosen[: recognition.DISAGREED] == sorted(mixed, key=digest)[: recognition.DISAGREED]
    assert not set(chosen[recognition.DISAGREED :]) & mixed
    assert len(set(chosen)) == recognition.DISAGREED + recognition.OTHERS


def test_without_figures_there_is_no_report() -> None:
    shutil.rmtree("reports/metrics")
    for key in ("recognition", ""):
        with pytest.raises(UserError, match=r"no figures for task 'recognition'.*run `dvc repro` first"):
            report.main(key)
    assert not PAGE.exists()


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("reports/metrics/recognition/recognition-kd.json", "{"),
        ("reports/metrics/recognition/recognition-kd.json", "{}"),
        ("reports/evaluation/recognition/recognition-kd.samples.csv", ""),
        ("reports/evaluation/recognition/models.json", ""),
    ],
)
def test_damaged_files_are_named(path: str, content: str) -> None:
    write(path, content)
    with pytest.raises(UserError, match=r"recognition.*dvc repro"):
        report.main("recognition")


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("reports/curves", "no training curves"),
        ("reports/evaluation", "no standard errors"),
        ("reports/validation", "python -m stages.validate tiny"),
        ("reports/latency", "python -m stages.latency recognition"),
        ("models/exported", "dvc repro export@recognition-horkd"),
        ("models/trained", "models/trained/recognition/recognition-teacher is missing"),
        ("data/prepared", "dvc repro prepare@tiny"),
    ],
)
def test_what_is_missing_is_said(gone: str, told: str) -> None:
    write_latency()
    shutil.rmtree(gone)
    text = rendered()
    assert told in Reader(text).text
    assert "60.00" in text


def test_notes_on_what_is_out_of_date() -> None:
    write_latency()
    assert group().notes == []
    for kind, key in (("trained", "weights_sha256"), ("exported", "onnx_sha256")):
        file = f"models/{kind}/recognition/recognition-kd/model.json"
        write(file, {**json.loads(Path(file).read_text(encoding="utf-8")), key: "other"})
    notes = group().notes
    assert [note.split(" · ")[0] for note in notes] == [
        "Models changed since they were evaluated",
        "recognition-kd changed since it was exported",
        "recognition-kd changed since its latency was measured",
    ]
    assert all(note in Reader(rendered()).text for note in notes)


def test_a_batch_that_was_not_measured_is_a_dash() -> None:
    write_latency()
    file = Path("reports/latency/recognition.json")
    measured = json.loads(file.read_text(encoding="utf-8"))
    found = measured["models"]["recognition-teacher"]
    found["latency_ms"] = {"1": found["latency_ms"]["1"]}
    write(str(file), measured)
    text = str(sections.latency(group()))
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row)[:4] for row in text.split("<tr")[3:]]
    assert rows == [["0.125", "0.250", "-", "-"], *[["0.125", "0.250"] * 2] * len(NAMES[2:])]
    assert "0.125" in comparison.text(group(), recognition)


def test_data_that_may_not_be_passed_on() -> None:
    assert "may not be redistributed" not in rendered()
    write("params.yaml", dump(parameters(redistributable=False)))
    assert "tiny may not be redistributed" in rendered()


def test_unknown_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown task 'recogniton'; did you mean 'recognition'"):
        report.main("recogniton")


def test_command_line() -> None:
    command = [sys.executable, "-m", "stages.report"]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode()
    assert "\x1b" not in text
    assert text.startswith("recognition on tiny")
    assert text.endswith("report: reports/index.html\n")
    assert [path.name for path in PAGE.parent.iterdir() if path.is_file()] == ["index.html"]


@pytest.mark.parametrize(
    "values",
    [[0.0], [1.0], [1.0, 1.0], [0.126, 0.977], [0.5, 1.0], [0.99995, 0.2], [3.0, 3.0], [0.0, 7.0], [1e-9, 5e4]],
)
def test_curves_stay_inside_their_chart(values: list[float]) -> None:
    array = np.array(values)
    scales = [charts.loss_scale(array), *([charts.share(array)] if array.max() <= 1 else [])]
    for scale in scales:
        drawing = charts.lines({0: (np.arange(len(array)), array)}, scale, charts.steps(len(array) - 1), "test")
        points = re.findall(r"([\d.-]+),([\d.-]+)", re.findall(r'points="([^"]*)"', drawing)[0])
        assert len(points) >= 2 or drawing.count("<circle") == 1
        for x, y in points:
            assert charts.LEFT <= float(x) <= charts.WIDTH - charts.RIGHT
            assert charts.TOP - 0.1 <= float(y) <= charts.HEIGHT - charts.BOTTOM + 0.1
        places = [scale.place(value) for value, _ in scale.ticks]
        assert places == sorted(places)


def test_long_curves_are_thinned_to_means() -> None:
    steps, values = charts.thin(np.arange(5000.0), np.tile([0.0, 2.0], 2500))
    assert len(steps) == charts.POINTS
    assert (steps[-1], values[-1]) == (4999, 2)
    assert np.abs(values[:-1] - 1).max() < 0.1


def test_boxes_of_the_chain_do_not_overlap() -> None:
    parents = {"t": None, "a": "t", "b": "a", "c": "a", "d": "t", "e": None, "f": "gone"}
    nodes = [charts.Node(name, "student", (name,), parent, "kd") for name, parent in parents.items()]
    drawing = charts.chain(nodes, "test")
    boxes = [tuple(map(int, box)) for box in re.findall(r'<rect x="(\d+)" y="(\d+)"', drawing)]
    assert len(set(boxes)) == len(nodes)
    assert drawing.count('class="arrow"') == 4
    place = dict(zip(parents, boxes, strict=True))
    assert place["t"][0] < place["a"][0] < place["b"][0] == place["c"][0] == place["d"][0] == place["e"][0]
