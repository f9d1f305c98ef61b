"""The graph that the flow is derived from: what stands in dvc.yaml and params.yaml, and nothing else."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data.errors import UserError
from pipelines.graph import Graph, Stage, read

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Graph]:
    """The shipped pipeline, with changes to the plain content of dvc.yaml and params.yaml, as a graph."""

    def make(change: Callable[[dict[str, Any], dict[str, Any]], object] = lambda stages, parameters: None) -> Graph:
        pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
        parameters = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        change(pipeline["stages"], parameters)
        (tmp_path / ".dvc").mkdir()
        (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n")
        (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(parameters))
        monkeypatch.chdir(tmp_path)
        return read()

    return make


def test_the_shipped_pipeline(shipped: Callable[..., Graph]) -> None:
    graph = shipped()
    parameters = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for name, student in parameters["students"].items():
        stage = graph.stages[f"distill@{name}"]
        assert (stage.kind, stage.key, stage.task, stage.resource) == ("distill", name, student["task"], "cpu")
        assert stage.cmd == f"exec env PYTHONPATH=. python -m stages.distill {name}"
        teacher = student["teacher"]
        kind = "teach" if teacher in parameters["teachers"] else "distill"
        wanted = {f"prepare@{student['dataset']}", f"validate@{student['dataset']}"}
        assert set(stage.upstream) == wanted | ({f"{kind}@{teacher}"} if teacher != "none" else set())
    for task in parameters["tasks"]:
        models = {name for name in graph.stages if name.startswith(("teach@", "distill@"))}
        models = {name for name in models if graph.stages[name].task == task}
        assert models < set(graph.stages[f"evaluate@{task}"].upstream)
    assert all(graph.stages[f"fetch@{name}"].task is None for name in parameters["sources"])
    order = list(graph.stages)
    assert all(order.index(other) < order.index(name) for name in order for other in graph.stages[name].upstream)
    assert {step.why for step in graph.plan()} == {"never run"}


def test_a_new_stage_needs_no_code(shipped: Callable[..., Graph]) -> None:
    def change(stages: dict[str, Any], parameters: dict[str, Any]) -> None:
        student = "recognition-kd"
        parameters["students"][student]["training"] = {"threads": 3, "devices": 2}
        parameters["exports"][student]["threads"] = 4
        stages["distill"]["do"]["meta"] = {"resource": "gpu"}
        stages["compare"] = {
            "foreach": "${tasks}",
            "do": {
                "cmd": "python compare.py ${key}",
                "deps": ["reports/metrics/${key}"],
                "params": ["tasks.${key}"],
                "meta": {"resource": "gpu"},
                "outs": ["compared/${key}"],
            },
        }

    graph = shipped(change)
    new = graph.stages["compare@recognition"]
    assert new.upstream == ("evaluate@recognition",)
    assert (new.task, new.threads, new.gpus, new.resource) == ("recognition", 1, 1, "gpu")
    # Every device is a process with threads of its own.
    student = graph.stages["distill@recognition-kd"]
    assert (student.threads, student.gpus) == (6, 2)
    exported = graph.stages["export@recognition-kd"]
    assert (exported.threads, exported.gpus, exported.resource) == (4, 0, "cpu")


def test_a_mistake_in_the_parameters_is_found_before_anything_runs(shipped: Callable[..., Graph]) -> None:
    with pytest.raises(UserError, match=r"students\.recognition-kd\.temprature.*'temperature'"):
        shipped(lambda stages, parameters: parameters["students"]["recognition-kd"].update(temprature=1))


def test_a_mistake_in_the_graph_is_told_without_a_traceback(shipped: Callable[..., Graph]) -> None:
    with pytest.raises(UserError, match="DVC cannot read the pipeline"):
        shipped(lambda stages, parameters: stages["fetch"]["do"].update(outs=["${no.such}"]))


CHAIN = Graph(
    [
        Stage("c@x", upstream=("b@x", "a@x"), task="x"),
        Stage("b@x", upstream=("a@x",), task="x", changed="deps changed: f"),
        Stage("a@x"),
        Stage("b@y", upstream=("a@x",), task="y"),
        Stage("d@y", upstream=("b@y",), task="y"),
    ]
)


@pytest.mark.parametrize(
    ("targets", "task", "wanted"),
    [
        ((), None, {"a@x", "b@x", "c@x", "b@y", "d@y"}),
        (("b@x",), None, {"a@x", "b@x"}),
        (("b",), None, {"a@x", "b@x", "b@y"}),
        ((), "y", {"a@x", "b@y", "d@y"}),
        (("b",), "y", {"a@x", "b@y"}),
    ],
)
def test_selection(targets: tuple[str, ...], task: str | None, wanted: set[str]) -> None:
    assert set(CHAIN.select(targets, task).stages) == wanted


@pytest.mark.parametrize(
    ("targets", "task", "message"),
    [
        (("b@z",), None, "unknown target 'b@z'; did you mean 'b@"),
        ((), "xx", "unknown task 'xx'; "),
        (("c@x",), "y", "none of the targets c@x belongs to task 'y'"),
    ],
)
def test_wrong_selection(targets: tuple[str, ...], task: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CHAIN.select(targets, task)


def test_what_follows_from_a_stale_stage_runs() -> None:
    told = {step.stage.name: (step.runs, step.why) for step in CHAIN.plan()}
    assert told == {
        "a@x": (False, "up to date"),
        "b@x": (True, "deps changed: f"),
        "c@x": (True, "upstream runs: b@x"),
        "b@y": (False, "up to date"),
        "d@y": (False, "up to date"),
    }
    # A target that does not need the stale stage does not wait for it either.
    assert not any(step.runs for step in CHAIN.select(["d@y"]).plan())


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """A graph of up to nine stages, in any order, some of them stale."""
    stages = []
    for index in range(draw(st.integers(1, 9))):
        upstream = draw(st.sets(st.integers(0, index - 1))) if index else set()
        changed = "changed" * draw(st.booleans())
        stages.append(Stage(f"s@{index}", upstream=tuple(f"s@{other}" for other in upstream), changed=changed))
    return Graph(draw(st.permutations(stages)))


@given(graphs())
def test_plans_and_heights_of_any_graph(graph: Graph) -> None:
    def stale(name: str) -> bool:
        return bool(graph.stages[name].changed) or any(map(stale, graph.stages[name].upstream))

    def height(name: str) -> int:
        return max((1 + height(other) for other in graph.stages if name in graph.stages[other].upstream), default=0)

    assert {step.stage.name: step.runs for step in graph.plan()} == {name: stale(name) for name in graph.stages}
    assert graph.heights() == {name: height(name) for name in graph.stages}


def test_reasons_are_those_of_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (tmp_path / "params.yaml").write_text("tasks: {recognition: {batch: 8}}\n")
    (tmp_path / "code.py").write_text("1\n")
    stages = {
        "one": {"cmd": "echo 1 > one", "deps": ["code.py"], "params": ["tasks.recognition"], "outs": ["one"]},
        "two": {"cmd": "cp one two", "deps": ["one"], "outs": ["two"]},
        "three": {"cmd": "echo 3 > three", "outs": ["three"], "deps": ["code.py"]},
    }

    def write() -> None:
        (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))

    def why() -> dict[str, str]:
        return {step.stage.name: step.why for step in read().plan()}

    write()
    assert why() == {"one": "never run", "two": "never run", "three": "never run"}
    dvc = shutil.which("dvc", path=str(Path(sys.executable).parent))
    assert dvc
    subprocess.run([dvc, "repro", "-q"], cwd=tmp_path, check=True)
    assert why() == {"one": "up to date", "two": "up to date", "three": "up to date"}
    (tmp_path / "params.yaml").write_text("tasks: {recognition: {batch: 9}}\n")
    (tmp_path / "two").unlink()
    stages["three"]["cmd"] = "echo 4 > three"
    write()
    assert why() == {
        "one": "params changed: tasks.recognition",
        "two": "output missing: two",
        "three": "command changed",
    }
    (tmp_path / "code.py").write_text("2\n")
    (tmp_path / "three").write_text("tampered\n")
    assert why() == {
        "one": "params changed: tasks.recognition; deps changed: code.py",
        "two": "output missing: two",
        "three": "command changed; deps changed: code.py; output changed: three",
    }
