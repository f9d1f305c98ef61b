"""The command: its plan and table, and (slow) flows on real servers."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.errors import UserError
from pipelines import distillation, services, summary
from pipelines.execution import Result
from pipelines.graph import Graph, Stage

ROOT = Path(__file__).parents[2]
GRAPH = Graph(
    [
        Stage("teach@t", task="x", changed="never run", threads=2),
        Stage("distill@s", upstream=("teach@t",), task="x", gpus=1),
        Stage("evaluate@x", upstream=("distill@s", "teach@t"), task="x"),
        Stage("fetch@f"),
    ]
)


def test_the_plan_says_what_and_why() -> None:
    head, *lines = summary.plan(GRAPH.plan()).splitlines()
    assert head.split() == ["stage", "threads", "resource", "why"]
    assert {line.split(maxsplit=4)[0]: line.split(maxsplit=4)[1:] for line in lines} == {
        "teach@t": ["run", "2", "cpu", "never run"],
        "fetch@f": ["-", "1", "cpu", "up to date"],
        "distill@s": ["run", "1", "gpu", "upstream runs: teach@t"],
        "evaluate@x": ["run", "1", "cpu", "upstream runs: distill@s, teach@t"],
    }


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which both models were evaluated; the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "reports" / "metrics" / "x"
    folder.mkdir(parents=True)
    for name, value in (("t", 0.75), ("s", 0.5)):
        content = {"validation": {"top_1": value, "other": 1}, "test": {"top_1": 0.1}}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def rows(text: str) -> dict[str, list[str]]:
    """Cells of a markdown table by stage."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "@" in line]
    return {first: rest for first, *rest in cells}


def test_the_table_shows_validation_and_links(figures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "run_url", lambda stage: f"http://h/{stage.key}" if stage.kind == "distill" else None)
    results = {name: Result("ran", 1.26) for name in GRAPH.stages} | {"fetch@f": Result("cached")}
    text = summary.markdown(GRAPH.plan(), results, 61.4)
    assert rows(text) == {
        "teach@t": ["ran", "1.3 s", "top_1 0.75", ""],
        "distill@s": ["ran", "1.3 s", "top_1 0.5", "[run](http://h/s)"],
        "evaluate@x": ["ran", "1.3 s", "", ""],
        "fetch@f": ["cached", "", "", ""],
    }
    assert text.splitlines()[-1].startswith("3 ran, 1 cached in 61 s.")


def test_no_figure_of_an_older_model_stands_in_the_table(figures: Path) -> None:
    results = {
        "teach@t": Result("ran", 1),
        "distill@s": Result("failed", 1, "a | b"),
        "evaluate@x": Result("skipped", reason="distill@s failed"),
        "fetch@f": Result("cached"),
    }
    text = summary.markdown(GRAPH.plan(), results, 1)
    assert "top_1" not in text
    assert "failed: a \\| b" in text
    assert "skipped: distill@s failed" in text
    # A part of the pipeline without its evaluation: what did not run has the figures that lie there.
    part = GRAPH.select(["teach@t"])
    assert "top_1" not in summary.markdown(part.plan(), results, 1)
    fresh = Graph([Stage("teach@t", task="x")])
    assert "top_1 0.75" in summary.markdown(fresh.plan(), {"teach@t": Result("cached")}, 1)


def test_columns_that_say_nothing_are_left_out() -> None:
    assert summary.aligned([("a", "b", "c"), ("1", "", "3"), ("22", "", "")]) == "a   c\n1   3\n22"


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        distillation.main(["--help"])
    assert "python -m pipelines.distillation --task recognition" in capsys.readouterr().out


def test_a_plan_needs_no_prefect_and_no_torch() -> None:
    code = (
        "import sys; from pipelines.distillation import main; code = main(['--plan', 'evaluate']); "
        "sys.exit(code or sorted({'prefect', 'torch', 'mlflow', 'pandas'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "evaluate@recognition" in done.stdout
    assert "export@" not in done.stdout


def test_mistakes_are_one_paragraph() -> None:
    command = [sys.executable, "-m", "pipelines.distillation", "--plan", "distill@recognition-hordk"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    wanted = "error in distillation: unknown target 'distill@recognition-hordk'; did you mean"
    assert done.stderr.startswith(wanted), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_users_own_prefect_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary server gets a home in the project, and none of the user's settings."""
    seen: dict[str, str] = {}

    class Server:
        returncode = None

        def __init__(self, command: list[str], **options: object) -> None:
            seen.update(options["env"])  # type: ignore[call-overload]

        def poll(self) -> None: ...
        def terminate(self) -> None: ...
        def wait(self, timeout: float) -> int:
            return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(services.os, "environ", {"PREFECT_HOME": "/user", "PREFECT_PROFILE": "cloud", "A": "b"})
    monkeypatch.setattr(services.subprocess, "Popen", Server)
    monkeypatch.setattr(services, "_wait_until_healthy", lambda url, process: None)
    monkeypatch.setitem(sys.modules, "prefect", services)
    with services.prefect_api():
        assert services.os.environ["PREFECT_API_URL"].startswith("http://127.0.0.1:")
    assert "PREFECT_API_URL" not in services.os.environ
    assert seen["PREFECT_HOME"] == str(tmp_path / ".prefect")
    assert seen["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert "PREFECT_PROFILE" not in seen
    assert seen["A"] == "b"


def test_a_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{services.free_port()}/api"
    monkeypatch.setattr(services.os, "environ", {"PREFECT_API_URL": url})
    with pytest.raises(UserError, match=f"{url} does not answer"), services.prefect_api():
        pass


def test_a_flow_goes_on_without_records(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Neither a follower that fails at once nor one that has not begun to listen keeps a flow from its end."""
    monkeypatch.setattr(services, "FOLLOWER", "pipelines.no_such_module")
    with services.live_records("r"):
        time.sleep(0.5)
    assert "not everything was written to MLflow" in caplog.text
    caplog.clear()
    monkeypatch.setattr(services, "FOLLOWER", "this")
    monkeypatch.setattr(services, "LAST_SYNC", 20.0)
    with services.live_records("r"):
        pass
    assert not caplog.text
