"""The report on text: companions, rows and agreement in the table, texts, influence; everything as text, not markup."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from data.errors import UserError
from data.files import digest, sha256
from stages.parameters import load
from stages.report import __main__ as report
from stages.report import comparison, sections, text
from stages.report.results import Group, agreement, read_task

sys.path.insert(0, str(Path(__file__).parent))
from page_reader import Reader

PAGE = Path("reports/index.html")
CLASSES = ["<b>earn</b>", "acq", "ship"]
NASTY = "<script>alert('text')</script> & more"
TRAIN, VALIDATION, TEST = 30, 12, 60
NAMES = ("mlm", "bert", "lgtm", "lgtm.teacher", "kd", "alone")
WRONG = {"mlm": 40, "bert": 3, "lgtm": 8, "lgtm.teacher": 5, "kd": 12, "alone": 20}
LARGE, SMALL = (
    {"name": "bert", "layers": 2, "hidden": 8, "heads": 2},
    {"name": "bert", "layers": 1, "hidden": 4, "heads": 1},
)
INTERFACE = {"classes": CLASSES, "length": 16, "vocabulary": 50, "pad": 0, "separator": 3, "pair": False}


def write(path: str, value: Any) -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def parameters(metric: str = "accuracy") -> dict[str, Any]:
    common = {"task": "text", "dataset": "tiny"}
    source = {"kind": "folder", "path": "unused", "tree_digest": "0" * 64, "licence": "-", "credit": "-"}
    data = {
        "task": "text",
        "source": "tiny",
        "encoder": "none",
        "format": "table",
        "files": {"train": "x.csv"},
        "length": 16,
    }
    data |= {"split": {"validation": VALIDATION, "test": TEST}, "tokenizer": {"kind": "wordpiece"}, "metric": metric}
    return {
        "sources": {"tiny": {**source, "redistributable": True}},
        "datasets": {"tiny": data},
        "teachers": {
            "text-mlm": {**common, "start": "none", "objective": "mlm", "network": LARGE},
            "text-bert": {**common, "start": "text-mlm", "objective": "task", "network": LARGE},
        },
        "students": {
            "text-lgtm": {**common, "method": "lgtm", "teacher": "text-mlm", "network": SMALL},
            "text-kd": {**common, "method": "kd", "teacher": "text-bert", "network": SMALL},
            "text-alone": {**common, "method": "alone", "teacher": "none", "network": SMALL},
        },
        "exports": {"text-lgtm": common},
        "tasks": {"text": {}},
    }


def samples(wrong: int) -> pd.DataFrame:
    rows = np.arange(TEST)
    table = pd.DataFrame({"id": [f"t{row}" for row in rows], "label": rows % 3, "confidence": 0.75})
    table["correct"] = (rows >= wrong).astype(int)
    table["prediction"] = np.where(table["correct"], table["label"], (table["label"] + 1) % 3)
    return pd.concat([table[-VALIDATION:].assign(split="validation"), table.assign(split="test")])


def folder(name: str) -> str:
    student, _, companion = name.partition(".")
    return f"models/companions/text/text-{student}/{companion}" if companion else f"models/trained/text/text-{name}"


def write_model(name: str, wrong: int, figures: tuple[str, ...] = ("accuracy", "macro_f1", "matthews")) -> None:
    full, table = f"text-{name}", samples(wrong)
    values = dict.fromkeys(figures, 1 - wrong / TEST)
    write(f"reports/metrics/text/{full}.json", {"validation": values, "test": values})
    details = Path("reports/evaluation/text")
    details.mkdir(parents=True, exist_ok=True)
    table.to_csv(details / f"{full}.samples.csv", index=False)
    classes = table.groupby(["split", "label"])["correct"].agg(["size", "mean"]).reset_index()
    classes = classes.rename(columns={"size": "samples", "mean": "recall"})
    classes.assign(**{"class": [CLASSES[label] for label in classes["label"]]}).to_csv(
        details / f"{full}.classes.csv", index=False
    )
    start = {"bert": "text-mlm", "lgtm.teacher": "text-mlm"}.get(name)
    description = {
        "name": full, "task": "text", "kind": "student", "network": LARGE if "e" in name or name == "mlm" else SMALL,
        "interface": INTERFACE, "recipe": {}, "teacher": None, "sources": [], "parameters": 1234567,
        "start": {"name": start, "weights_sha256": ""} if start else None, "weights_sha256": full,
        "dataset": {"name": "tiny", "digest": sha256(Path("data/prepared/text/tiny/manifest.csv"))},
        "rows": {"train": 3944, "held_out": 438} if name.startswith("lgtm") else {"train": 4382},
    }  # fmt: skip
    if "." not in name:
        write(f"reports/curves/text/{full}.csv", "step,loss/task,validation/accuracy\n9,2.5,\n10,,0.5\n")
    write(f"{folder(name)}/model.json", description)
    write(f"{folder(name)}/weights.safetensors", "x" * 2500)


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole project, as if the pipeline had run."""
    monkeypatch.chdir(tmp_path)
    write("params.yaml", yaml.safe_dump(parameters(), sort_keys=False))
    texts = [f"{NASTY} {row}" for row in range(TRAIN)] + [f"test {NASTY} {row} " + "word " * 200 for row in range(TEST)]
    ids = [f"r{row}" for row in range(TRAIN)] + [f"t{row}" for row in range(TEST)]
    manifest = pd.DataFrame({"id": ids, "text": texts, "label": [*np.arange(TRAIN) % 3, *np.arange(TEST) % 3]})
    manifest["split"] = ["train"] * TRAIN + ["test"] * TEST
    manifest["flipped"] = (manifest.index < 5).astype(int)
    write("data/prepared/text/tiny/dataset.json", {"classes": CLASSES, "pair": False, "metric": "accuracy"})
    manifest.to_csv("data/prepared/text/tiny/manifest.csv", index=False)
    for name, wrong in WRONG.items():
        write_model(name, wrong)
    write("reports/evaluation/text/models.json", {f"text-{name}": f"text-{name}" for name in NAMES})
    rows = np.arange(TRAIN)
    table = pd.DataFrame({"row": rows, "visits": 3, "mean": rows - 9.5, "epoch_1": rows - 9.5, "epoch_2": rows - 20.0})
    table.loc[0, "epoch_2"] = np.nan
    table.to_csv("models/companions/text/text-lgtm/influence.csv", index=False)
    for name, companions in {"lgtm": ["teacher"], "kd": []}.items():
        contents = {"models": companions, "evaluated": companions, "tables": ["influence"] * len(companions)}
        write(f"models/companions/text/text-{name}/contents.json", contents)


def group() -> Group:
    (found,) = read_task("text", load())
    return found


def rendered() -> str:
    report.main("text")
    return PAGE.read_text(encoding="utf-8")


def test_companions_follow_their_students() -> None:
    found = group()
    assert [model.name for model in found.models] == [f"text-{name}" for name in NAMES]
    assert [model.role for model in found.models] == [
        "pretrained", "teacher", "student", "co-trained teacher", "baseline", "baseline",
    ]  # fmt: skip
    assert [model.learnt_from for model in found.models] == [
        None, None, "text-lgtm.teacher", "text-mlm", "text-bert", None,
    ]  # fmt: skip
    assert [model.method for model in found.models] == [None, None, "lgtm", "lgtm", "kd", "alone"]
    companion = found.models[3]
    assert companion.weights_bytes == 2500
    assert not companion.deployed
    assert found.notes == ["text-lgtm is not exported yet · run `dvc repro export@text-lgtm`"]


def test_a_companion_that_changed_or_was_not_evaluated_is_told() -> None:
    file = Path(folder("lgtm.teacher")) / "model.json"
    file.write_text(file.read_text().replace('"weights_sha256": "text-lgtm.teacher"', '"weights_sha256": "other"'))
    assert any("Models changed since they were evaluated" in note for note in group().notes)
    Path("reports/metrics/text/text-lgtm.teacher.json").unlink()
    assert any("Not evaluated yet: text-lgtm.teacher" in note for note in group().notes)


def test_columns_and_agreement() -> None:
    found = {one.title: [figure for figure, _ in one.cells] for one in comparison.columns(group(), text)}
    held_out = "3,944 (+438 held out)"
    assert found["rows"] == ["4,382", "4,382", held_out, held_out, "4,382", "4,382"]
    # Both are wrong in the same way on the first samples: what differs is what only one of them gets wrong.
    assert found["agrees"] == [
        "-", "-", f"{100 * (1 - 3 / TEST):.1f}", "-", f"{100 * (1 - 9 / TEST):.1f}", "-",
    ]  # fmt: skip
    assert found["learnt from"] == ["texts", "labels", "lgtm.teacher", "mlm", "bert", "labels"]
    assert found["input"] == ["16 tokens"] * len(NAMES)


def test_agreement_is_over_the_same_samples_in_any_order() -> None:
    first, second = group().models[1], group().models[2]
    second.samples.loc[:] = second.samples.sample(frac=1, random_state=0).to_numpy()
    assert agreement(first, second, "prediction", "test") == pytest.approx(1 - 5 / TEST)
    second.samples["id"] += "-other"
    assert agreement(first, second, "prediction", "test") is None


def test_the_terminal_leaves_out_what_has_no_room() -> None:
    said = comparison.text(group(), text)
    lines = said.splitlines()
    assert max(map(len, lines)) <= comparison.WIDTH
    assert "3,944 (+438 held out)" in said
    assert re.search(r"The page has more columns: weights", said)
    for name in NAMES:  # all of the same rows: the column says nothing
        file = Path(folder(name)) / "model.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "rows": {"train": 4382}}))
    said = comparison.text(group(), text)
    assert "rows" not in said.splitlines()[2]
    assert "rows" in [one.title for one in comparison.columns(group(), text)]


def test_conclusions() -> None:
    bert, lgtm, companion = comparison.conclusions(group(), text)
    assert bert.startswith("text-bert (teacher) is 28.33 points above text-alone")
    assert lgtm.startswith("text-lgtm is 20.00 points above text-alone")
    assert "6.67 points above text-kd" in lgtm
    assert companion.startswith("text-lgtm.teacher (co-trained teacher) is 3.33 points below text-bert (paired s.e. ")
    assert not any("text-mlm" in line for line in (bert, lgtm, companion))
    assert "pretrained: it has not learnt the task" in " ".join(comparison.explanations(group(), text))


def test_the_metric_is_the_data_sets_own() -> None:
    write("params.yaml", yaml.safe_dump(parameters("matthews"), sort_keys=False))
    found = comparison.text(group(), text)
    assert "test Matthews" in found
    assert "0.9500" in found
    assert "Matthews ± one standard error" in found  # no share: not in per cent
    write("params.yaml", yaml.safe_dump(parameters("f1"), sort_keys=False))
    with pytest.raises(UserError, match=r"figures of text-mlm hold no 'f1'.*dvc repro evaluate@text"):
        report.main("text")


def test_exports_are_shown_with_the_metric_that_they_were_checked_by() -> None:
    write("params.yaml", yaml.safe_dump(parameters("matthews"), sort_keys=False))
    parity = {"samples": 12, "largest_difference": {"logits": 1e-6}, "metric": {"onnx": 0.5, "pytorch": 0.5}}
    write("models/exported/text/text-lgtm/model.json", {"weights_sha256": "", "onnx_sha256": "", "parity": parity})
    assert "accuracy ONNX" in sections.export(group(), text)


def test_the_chain_shows_who_began_as_whom() -> None:
    drawing = sections.chain(group(), text)
    assert drawing.count('class="arrow"') == 4  # mlm to bert and to the co-trained one, that to lgtm, bert to kd
    assert ">start</text>" in drawing
    assert drawing.count(">lgtm</text>") == 2


def test_curves_of_a_pretrained_model_stand_apart() -> None:
    found = sections.curves(group(), text)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", found)
    assert sum("<b>loss/task</b>" in caption for caption in captions) == 2
    assert sum("pretrained" in caption for caption in captions) == 2
    assert "text-lgtm.teacher" not in found  # it has no curve of its own


def test_texts() -> None:
    page = text.texts(group())
    names = re.findall(r" · (t\d+)</figcaption>", page)
    # The teacher gets 3 wrong, alone 20: in between models disagree. Those before are wrong for all.
    mixed = {f"t{row}" for row in range(3, 20)}
    assert names[: text.DISAGREED] == sorted(mixed, key=digest)[: text.DISAGREED]
    assert not set(names[text.DISAGREED :]) & mixed
    assert len(names) == text.DISAGREED + text.OTHERS
    assert f"disagree on {len(mixed)} of {TEST} test texts" in page
    assert "mlm" not in page
    card = next(part for part in page.split("<figure") if f" · {names[0]}<" in part)
    row = int(names[0][1:])
    assert {who: mark for mark, who in re.findall(r'title="(\w+)">.</span><span>([\w.]+)</span>', card)} == {
        name: "right" if row >= WRONG[name] else "wrong" for name in NAMES[1:]
    }
    assert "word…" in card
    assert len(max(Reader(page).text.split(" · "), key=len)) < 1000


def test_pairs_and_scores() -> None:
    file = Path("data/prepared/text/tiny/manifest.csv")
    manifest = pd.read_csv(file)
    manifest["pair"], manifest["score"] = "the second", 2.4
    manifest.to_csv(file, index=False)
    for name in NAMES:
        details = Path(f"reports/evaluation/text/text-{name}.samples.csv")
        pd.read_csv(details).assign(score=2.4, predicted_score=1.256).to_csv(details, index=False)
    page = text.texts(group())
    assert page.count("<blockquote>") == 2 * (text.DISAGREED + text.OTHERS)
    assert "score <b>2.4</b>" in page
    assert "<b>1.26</b>" in page


def test_influence() -> None:
    page = text.influence(group())
    assert page is not None
    assert page.count("<h4>text-lgtm</h4>") == 1
    assert "text-kd" not in page
    tables = page.split("<h4>Most ")[1:]
    harmful, helpful = (re.findall(r'<th scope="row">([^<]*)</th>', part) for part in tables)
    assert harmful == [f"{row - 9.5:+.3g}" for row in range(text.EXTREMES)]
    assert helpful == [f"{TRAIN - 1 - row - 9.5:+.3g}" for row in range(text.EXTREMES)]
    assert [part.count("flipped</span>") for part in tables] == [5, 0]
    said = Reader(page).text
    assert f"Of {TRAIN} texts, {100 * 10 / TRAIN:.1f} % have a negative mean" in said
    assert "5 of the labels (16.7 %) were flipped on purpose" in said
    assert "ROC area of 1.000" in said
    assert "100.0 % are flipped" in said


def test_influence_over_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict[int, Any]] = []
    lines = text.charts.lines
    monkeypatch.setattr(text.charts, "lines", lambda *given: (drawn.append(given[0]), lines(*given))[1])
    text.influence(group())
    spread, kinds = drawn
    first, second = np.arange(TRAIN) - 9.5, np.arange(1, TRAIN) - 20.0  # the first text was not drawn a second time
    wanted = [[part.mean(), *np.quantile(part, [0.9, 0.5, 0.1])] for part in (first, second)]
    np.testing.assert_allclose(np.transpose([values for _, values in spread.values()]), wanted)
    means = [[first[:5].mean(), second[:4].mean()], [first[5:].mean(), second[4:].mean()]]
    np.testing.assert_allclose([values for _, values in kinds.values()], means)
    assert all(places.tolist() == [0, 1] for places, _ in (*spread.values(), *kinds.values()))


def test_without_flips_and_epochs_there_is_less_to_show() -> None:
    file = Path("data/prepared/text/tiny/manifest.csv")
    pd.read_csv(file).assign(flipped=0).to_csv(file, index=False)
    description = Path("models/trained/text/text-lgtm/model.json")
    plain = json.loads(description.read_text())
    write(str(description), {**plain, "dataset": {"name": "tiny", "digest": sha256(file)}})
    page = text.influence(group())
    assert page is not None
    assert "ROC" not in page
    assert page.count("<polyline") == 4
    table = Path("models/companions/text/text-lgtm/influence.csv")
    pd.read_csv(table)[["row", "visits", "mean"]].to_csv(table, index=False)
    page = text.influence(group())
    assert page is not None
    assert "<polyline" not in page
    table.unlink()
    assert text.influence(group()) is None
    assert "Influence" not in rendered()


def test_influence_of_other_data_is_not_shown() -> None:
    file = Path("data/prepared/text/tiny/manifest.csv")
    file.write_text(file.read_text() + "\n")
    page = text.influence(group())
    assert page is not None
    assert "Without the influence on text-lgtm: " in page
    assert "about other data" in page
    assert "Most harmful" not in page


def test_everything_is_escaped_and_well_formed() -> None:
    page = rendered()
    assert "<script" not in page
    assert "<b>earn</b>" not in page
    seen = Reader(page).text
    for wanted in (NASTY, CLASSES[0], "Test texts", "Accuracy by class", "Most harmful", "trained on"):
        assert wanted in seen


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("data/prepared", "dvc repro prepare@tiny"),
        ("models/companions", "4,382"),
        ("models/trained", "models/trained/text/text-mlm is missing"),
        ("reports/evaluation", "no standard errors"),
    ],
)
def test_what_is_missing_is_said(gone: str, told: str) -> None:
    shutil.rmtree(gone)
    assert told in Reader(rendered()).text
