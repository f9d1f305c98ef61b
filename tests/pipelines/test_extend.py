"""A class is added to a deployed student from its attributes alone: params.yaml, the flow, latency, the registry."""

import difflib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from data.errors import UserError
from pipelines import extend, tracking
from pipelines.versions import aliases, stored, versions
from stages import paths
from stages.parameters import load

sys.path.insert(0, str(Path(__file__).parent))
from small_project import Model
from small_zero_shot import ORDER, ROWS, SmallZeroShot, usual

ROOT = Path(__file__).parents[2]
TASK, NEW = "zero_shot", "wider"
# Columns in another order than the data set's, a comma in a name, raw numbers.
HEADER = '"long, soft fur",name,stripes,legs'
NEW_CLASSES = f"{HEADER}\n3,d,0,4\n0,e: the last,1,1\n"
WANTED = {"d": [0.0, 0.8, 0.6], "e: the last": [0.7071068, 0.7071068, 0.0]}


class Flow:
    """What stands for the pipeline: it makes the student that params.yaml names."""

    def __init__(self, small: SmallZeroShot) -> None:
        self.small, self.calls, self.measured, self.code = small, list[list[str]](), 0, 0

    def __call__(self, arguments: list[str]) -> int:
        self.calls.append(arguments)
        if self.code == 0:
            written = Path("params.yaml").read_bytes()
            for name, entry in load().students.items():
                if entry.method == "extended" and name not in self.small.models:
                    before = self.small.known.get(entry.teacher, ORDER)
                    self.small.known[name] = [*before, *entry.added]
                    self.small.models[name] = Model(wrong=11, validation=0.9, method="extended")
                    self.small.write()
                    Path("params.yaml").write_bytes(written)
                    self._forget(name)
        return self.code

    def _forget(self, name: str) -> None:
        """Latency is measured by another command."""
        file = paths.latency(TASK)
        measured = json.loads(file.read_text())
        self.times = {name: measured["models"].pop(name)}
        file.write_text(json.dumps(measured))

    def measure(self, task: str) -> None:
        self.measured += 1
        file = paths.latency(task)
        measured = json.loads(file.read_text())
        file.write_text(json.dumps({**measured, "models": {**measured["models"], **self.times}}))


@pytest.fixture
def small(root: Path, monkeypatch: pytest.MonkeyPatch) -> SmallZeroShot:
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    small = usual(root)
    small.write()
    Path("new.csv").write_text(NEW_CLASSES)
    return small


@pytest.fixture
def flow(small: SmallZeroShot, monkeypatch: pytest.MonkeyPatch) -> Flow:
    flow = Flow(small)
    monkeypatch.setattr(extend.distillation, "main", flow)
    monkeypatch.setattr(extend.latency, "main", flow.measure)
    return flow


@pytest.fixture
def unregistered(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registration takes a second."""
    monkeypatch.setattr(extend.registry, "register", lambda task: None)


def run(*arguments: str, student: str = "best", name: str = NEW) -> None:
    extend.main([student, "--name", name, *(arguments or ("--attributes", "new.csv"))])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, **names: str) -> str:
    """What the command says when it refuses; params.yaml is as it was."""
    before = Path("params.yaml").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(*arguments, **names)
    assert ended.value.code == 1
    assert Path("params.yaml").read_bytes() == before
    said = capsys.readouterr().err
    assert said.startswith("error in extend")
    assert "\n" not in said.strip()
    return said


# From attributes to a version


def test_a_class_becomes_a_version(small: SmallZeroShot, flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("params.yaml").read_text().splitlines()
    run()
    lines = Path("params.yaml").read_text().splitlines()
    changes = [line for line in difflib.ndiff(before, lines) if line[0] in "+-"]
    assert changes == [
        "+   wider:",
        "+     task: zero_shot",
        "+     dataset: tiny",
        "+     method: extended",
        "+     teacher: best",
        "+     classifier: {mode: two_stage, samples: 7, learning_rate: 0.001}",
        "+     added:",
        '+       "d": [0.0, 0.8, 0.6]',
        '+       "e: the last": [0.7071068, 0.7071068, 0.0]',
        "+   wider: {task: zero_shot, dataset: tiny}",
    ]
    entry: Any = load().students[NEW]
    assert entry.added == WANTED
    assert entry.classifier.samples == 7
    assert flow.calls == [["--task", TASK]]
    assert flow.measured == 1
    client = tracking.connect()
    version = client.get_model_version(TASK, aliases(client, TASK)["challenger"])
    assert (version.tags["student"], version.tags["method"]) == (NEW, "extended")
    described = json.loads((stored(TASK, version.version) / "model.json").read_text())
    assert described["interface"]["classes"] == [*ORDER, "d", "e: the last"]
    said = capsys.readouterr().out
    assert "d: nearest by its attributes is b (cosine 0.960)" in said
    assert "divided by their length" in said
    assert "pipelines.registry promote zero_shot" in said


def test_again_it_does_nothing_new(small: SmallZeroShot, flow: Flow) -> None:
    run()
    written, count = Path("params.yaml").read_bytes(), len(versions(tracking.connect(), TASK))
    run()
    assert Path("params.yaml").read_bytes() == written
    assert len(versions(tracking.connect(), TASK)) == count
    assert flow.measured == 1
    # Another description under the same name is another student.
    Path("new.csv").write_text(NEW_CLASSES.replace("3,d", "4,d"))
    with pytest.raises(UserError, match="another model 'wider'"):
        extend.extend("best", NEW, [(None, Path("new.csv"))])


@pytest.mark.usefixtures("unregistered")
def test_latency_is_measured_where_that_of_others_was(small: SmallZeroShot, flow: Flow) -> None:
    real = Flow._forget
    Flow._forget = lambda self, name: paths.latency(TASK).unlink()  # type: ignore[method-assign]
    try:
        run()
    finally:
        Flow._forget = real  # type: ignore[method-assign]
    assert flow.measured == 0


def test_a_failure_of_the_flow_keeps_the_entries(
    small: SmallZeroShot, flow: Flow, capsys: pytest.CaptureFixture[str]
) -> None:
    flow.code = 1
    with pytest.raises(SystemExit):
        run()
    said = capsys.readouterr().err
    assert "`dvc repro` or the same command goes on, or remove students.wider and exports.wider" in said
    assert NEW in load().students
    assert NEW in load().exports
    assert not Path("decisions").exists()
    flow.code = 0
    run()
    assert len(flow.calls) == 2
    assert aliases(tracking.connect(), TASK)["challenger"]


def test_an_extended_student_is_extended_again(
    small: SmallZeroShot, flow: Flow, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    Path("third.csv").write_text(f"{HEADER}\n1,f,2,2\n")
    run("--attributes", "third.csv", student=NEW, name="widest")
    entry: Any = load().students["widest"]
    assert entry.teacher == NEW
    assert list(entry.added) == ["f"]
    assert entry.classifier == load().students[NEW].classifier  # type: ignore[attr-defined]
    client = tracking.connect()
    assert client.get_model_version(TASK, aliases(client, TASK)["challenger"]).tags["student"] == "widest"
    assert "class 'd' is known already" in refusal(capsys, student="widest", name="again")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--attributes", "new.csv", "--class", "d"),
        ("--class", "d", "--attributes", "one.csv"),
        ("--class", "d", "--attributes", "unnamed.csv"),
    ],
)
@pytest.mark.usefixtures("unregistered")
def test_one_class_out_of_a_file(small: SmallZeroShot, flow: Flow, arguments: tuple[str, ...]) -> None:
    Path("one.csv").write_text(f"\ufeff{HEADER}\r\n3,d,0,4\r\n\r\n", encoding="utf-8")
    Path("unnamed.csv").write_text('legs,stripes,"long, soft fur"\n4,0,3\n')
    run(*arguments)
    entry: Any = load().students[NEW]
    assert entry.added == {"d": WANTED["d"]}


@pytest.mark.usefixtures("unregistered")
def test_a_file_per_class(small: SmallZeroShot, flow: Flow) -> None:
    Path("unnamed.csv").write_text('legs,stripes,"long, soft fur"\n4,0,3\n')
    run("--class", "x y", "--attributes", "unnamed.csv", "--class", "e: the last", "--attributes", "new.csv")
    entry: Any = load().students[NEW]
    assert entry.added == {"x y": WANTED["d"], "e: the last": WANTED["e: the last"]}


# Wrong inputs


def table(*rows: str) -> str:
    return "\n".join([HEADER, *rows]) + "\n"


FILES: dict[str, tuple[str, str]] = {
    "narrow": ("name,stripes,legs\nd,1,1\n", "has 2 attributes, the data set has 3: missing: long, soft fur"),
    "wide": (f"{HEADER},wings\n1,d,1,1,1\n", "has 4 attributes, the data set has 3: unknown 'wings'"),
    "misspelt": ('name,strypes,legs,"long, soft fur"\nd,1,1,1\n', "unknown 'strypes'; did you mean 'stripes'?"),
    "twice": ('name,stripes,legs,legs,"long, soft fur"\nd,1,1,1,1\n', "'legs' stands there twice"),
    "no header": ("d,1,2,3\n", "unknown 'd'"),
    "short row": (table("3,d,0"), "row 2 has 3 cells, the header has 4"),
    "long row": (table("3,d,0,1", "3,e,0,1,7"), "row 3 has 5 cells, the header has 4"),
    "word": (table("3,d,none,1"), "row 2, attribute 'stripes' is 'none', no number"),
    "nothing": (table("3,d,,1"), "row 2, attribute 'stripes' is '', no number"),
    "nan": (table("nan,d,0,1"), "attribute 'long, soft fur' is nan; a finite number is expected"),
    "infinite": (table("1,d,0,1e999"), "attribute 'legs' is inf"),
    "zeros": (table("0,d,0,0"), "all attributes of class 'd' are 0"),
    "known": (table("1,d,1,1", "1,b,2,3"), "class 'b' is known already"),
    "twice the class": (table("1,d,1,1", "1,d,2,3"), "row 3: class 'd' stands there twice"),
    "no name": (table("1,,1,1"), "'' is no name of a class"),
    "control character": (table('1,"d\te",1,1'), "is no name of a class"),
    "interpolated": (
        table("1,${d},1,1"),
        "'${d}' is no name of a class: printable characters are expected, without ${",
    ),
    "no column": ('legs,stripes,"long, soft fur"\n4,0,3\n', "has no column 'name'"),
    "the same as another": (table("0,d,3,4"), "classes 'd' and 'c' have the same attributes"),
    "the same twice": (table("1,d,1,1", "2,e,2,2"), "classes 'e' and 'd' have the same attributes"),
    "empty": ("", "is empty"),
    "no row": (table(), "has no row below its header"),
    "quote": (f'{HEADER}\n1,"d,1,1\n', "cannot be read as CSV"),
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_attributes_are_refused(
    small: SmallZeroShot, flow: Flow, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    text, message = FILES[name]
    Path("new.csv").write_text(text)
    assert message in refusal(capsys)
    assert flow.calls == []


def test_wrong_commands_are_refused(small: SmallZeroShot, flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown student 'bst'; did you mean 'best'?" in refusal(capsys, student="bst")
    said = refusal(capsys, student="plain")
    assert "students.plain is of method 'eszsl', which has no generator" in said
    assert "(best)" in said
    for name in ("best", "plain", "teacher"):
        assert f"there is another model '{name}'" in refusal(capsys, name=name)
    for name in ("a.b", "none", "é", "-x"):
        assert "a name consists of letters" in refusal(capsys, "--attributes=new.csv", f"--name={name}")
    assert "missing.csv cannot be read as CSV" in refusal(capsys, "--attributes", "missing.csv")
    assert "no row of class 'x' below" in refusal(capsys, "--class", "x", "--attributes", "new.csv")
    Path("unnamed.csv").write_text('legs,stripes,"long, soft fur"\n4,0,3\n1,1,1\n')
    assert "it has 2 rows, and no names" in refusal(capsys, "--class", "x", "--attributes", "unnamed.csv")
    twice = ("--class", "d", "--attributes", "new.csv", "--class", "d", "--attributes", "new.csv")
    assert "class 'd' is given twice" in refusal(capsys, *twice)
    Path("bytes.csv").write_bytes(b"\xff\xfe\x00")
    assert "bytes.csv cannot be read as CSV" in refusal(capsys, "--attributes", "bytes.csv")
    assert flow.calls == []
    for arguments in (["--class", "d"], [*twice, "--class", "e"]):
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        assert ended.value.code == 2


def change(file: Path, edit: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def test_a_student_whose_files_do_not_fit_is_refused(
    small: SmallZeroShot, flow: Flow, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = paths.companions(TASK, "best") / "generator/model.json"
    kept = generator.read_text()
    change(generator, lambda told: told["beside"].update(weights_sha256="0" * 64))
    said = refusal(capsys)
    assert f"trained beside other weights than best has (sha256 {'0' * 64}, now " in said
    assert "dvc repro distill@best" in said
    generator.unlink()
    assert "there is no model in" in refusal(capsys)
    generator.write_text(kept)
    described = paths.prepared(TASK, "tiny") / "dataset.json"
    change(described, lambda told: told["attributes"].append("wings"))
    Path("new.csv").write_text(f"{HEADER},wings\n3,d,0,4,0\n")
    assert "knows attributes of shape (3, 3), and best has 3 classes, 'tiny' 4 attributes" in refusal(capsys)
    described.unlink()
    assert "dvc repro prepare@tiny" in refusal(capsys)
    (paths.trained(TASK, "best") / "model.json").unlink()
    assert "there is no model in" in refusal(capsys)
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("  best: {task: zero_shot, dataset: tiny}\n", ""))
    assert "best is not deployed" in refusal(capsys)
    assert flow.calls == []


def test_a_file_that_new_entries_do_not_fit_into_stays(
    small: SmallZeroShot, flow: Flow, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = yaml.safe_load(Path("params.yaml").read_text())
    Path("params.yaml").write_text(yaml.safe_dump(raw, default_flow_style=True))
    assert "no section `students` of lines" in refusal(capsys)
    exports = yaml.safe_dump(raw.pop("exports"), default_flow_style=True)
    Path("params.yaml").write_text(yaml.safe_dump(raw) + f"exports: {exports}")
    assert "no section `exports` of lines" in refusal(capsys)
    assert flow.calls == []


# Units


def known(rows: np.ndarray, divisors: list[float] | None = None) -> extend.Known:
    names = [f"attribute {number}" for number in range(rows.shape[1])]
    return extend.Known(list(map(str, range(len(rows)))), rows, names, np.array(divisors or [1.0] * len(names)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3).filter(lambda row: max(map(abs, row)) > 1e-3))
def test_rows_of_length_one_stay_so(row: list[float]) -> None:
    found, said = extend.in_units({"x": row}, known(ROWS, [2.0, 5.0, 0.5]))
    divided = np.array(row) / [2.0, 5.0, 0.5]
    np.testing.assert_allclose(np.linalg.norm(found["x"]), 1, atol=1e-6)
    np.testing.assert_allclose(np.array(found["x"]) * np.linalg.norm(divided), divided, rtol=1e-6, atol=1e-6)
    assert "divisors" in said
    assert "length" in said
    # Rows of other lengths are left as they are, but for the digits of float32.
    other, said = extend.in_units({"x": row}, known(2 * ROWS))
    np.testing.assert_array_equal(np.float32(other["x"]), np.float32([float(f"{value:.7g}") for value in row]))
    assert said == "taken as they are"


@pytest.mark.usefixtures("unregistered")
def test_the_divisors_of_the_data_set_are_used(small: SmallZeroShot, flow: Flow) -> None:
    described = paths.prepared(TASK, "tiny") / "dataset.json"
    change(described, lambda told: told.update(divisors=[1, 8, 6]))
    run("--class", "d", "--attributes", "new.csv")
    entry: Any = load().students[NEW]
    assert entry.added == {"d": [0.0, 0.7071068, 0.7071068]}  # 0/1, 4/8, 3/6


# The text of params.yaml


def both(text: str) -> Any:
    """As PyYAML and as DVC read it."""
    theirs = YAML(typ="safe", pure=True).load(text)
    assert theirs == yaml.safe_load(text)
    return theirs


ENTRY = {"task": TASK, "added": {'a "b": #c, é': [0.1, 1e-7, -1.5e22, 0.0, 123456789.0] * 9, "1": [1.0]}}


@pytest.mark.parametrize(
    "file", ["params.yaml", "tests/params.yaml", "tests/text.yaml", "tests/segmentation.yaml", "benchmarks/params.yaml"]
)
def test_an_entry_more_and_no_other_character(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    old = yaml.safe_load(text)
    for section, entry in (("students", ENTRY), ("exports", {"task": TASK, "dataset": "x"}), ("teachers", ENTRY)):
        found = extend.insert(text, section, "new", entry)
        new = both(found) if section == "students" else yaml.safe_load(found)
        assert new == {**old, section: {**old[section], "new": entry}}
        assert list(new[section]) == [*old[section], "new"]
        assert max(map(len, found.splitlines())) <= max(120, *map(len, text.splitlines()))
        start = next(
            place for place, (ours, theirs) in enumerate(zip(found, f"{text} ", strict=False)) if ours != theirs
        )
        end, added = start, len(found) - len(text)
        assert any(found[:place] + found[place + added :] == text for place in range(start - added, end + 1))


LAYOUTS = {
    "alias at the end": "x: &a {b: 1}\nstudents:\n  one: *a\nexports: {}\n",
    "end of the file": "students:\n  one: {a: 1}",
    "comment at the end": "students:\n    one:\n        a: 1 # why\n        # and more\n# of the next\nexports: 1\n",
    "list": "students:\n  one:\n    a:\n    - 1\n    - 2\n\n\nexports: 1\n",
    "several lines": 'students:\n  one: {a: [1,\n    2],\n    b: "c\n      d"}\nexports: 1\n',
    "block of text": "students:\n  one:\n    a: |\n      b\n      c\n\nexports: 1\n",
    "null": "students:\n  one:\n    a: 1\n    b:\nexports: 1\n",
    "the word elsewhere": "code: students\nx:\n  students:\n    y: 1\nstudents:\n  one: {students: {a: 1}}\n",
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, newline: str) -> None:
    text = LAYOUTS[name].replace("\n", newline)
    found = extend.insert(text, "students", "new", ENTRY)
    old = both(text)
    assert both(found) == {**old, "students": {**old["students"], "new": ENTRY}}
    assert found.count("\n") == found.count(newline)
    added = len(found) - len(text)
    assert any(found[:place] + found[place + added :] == text for place in range(len(found)))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=40),
    st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1),
)
def test_numbers_and_names_come_back(numbers: list[float], label: str) -> None:
    found = both(extend.insert("students:\n  one: {a: 1}\n", "students", "new", {"added": {label: numbers}}))
    assert found["students"]["new"] == {"added": {label: numbers}}


@pytest.mark.parametrize("word", ["true", "No", "1e3", "0x1", "12", "null"])
def test_names_that_look_like_something_else(word: str) -> None:
    found = both(extend.insert("students:\n  one: {a: 1}\n", "students", word, {"teacher": word, "added": {}}))
    assert found["students"][word] == {"teacher": word, "added": None}


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        extend.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "examples:" in said
    assert all(word in said for word in ("--class", "--attributes", "raw units"))
