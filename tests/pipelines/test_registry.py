"""The registry as its user meets it: register, promote, roll back; and whatever may go wrong between."""

import contextlib
import json
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from data.errors import UserError
from data.files import sha256
from pipelines import promotion, tracking, versions
from pipelines.candidates import best
from pipelines.promotion import promote, rollback
from pipelines.registry import register, show
from pipelines.versions import aliases

sys.path.insert(0, str(Path(__file__).parent))
from small_project import INTERFACE, TASK, Faces, Model, Small, usual

ROOT = Path(__file__).resolve().parents[2]
ONNX = f"models/exported/{TASK}/best/model.onnx"
WEIGHTS = f"models/trained/{TASK}/best/weights.safetensors"
LATENCY = f"reports/latency/{TASK}.json"


@pytest.fixture
def project(root: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """A project that is complete and committed, with an empty MLflow."""
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    small = usual(root)
    small.write()
    small.commit()
    return small


@pytest.fixture(scope="session")
def templates(empty_mlflow: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two projects to copy: `registered`, and `champion`, where `best` was promoted as well."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        shutil.copyfile(empty_mlflow, folder / tracking.DATABASE)
        small = usual(folder)
        small.write()
        small.commit()
        register(TASK)
        kept = copied(folder, tmp_path_factory.mktemp("registered") / "project")
        assert promote(TASK)
    return {"registered": kept, "champion": folder}


def copied(source: Path, target: Path) -> Path:
    """A project with its MLflow somewhere else: the database knows its artifacts by absolute paths."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    with contextlib.closing(sqlite3.connect(target / tracking.DATABASE)) as database, database:
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for _, column, kind, *_ in database.execute(f"PRAGMA table_info({table})").fetchall():
                if "CHAR" in kind:
                    changed = f"UPDATE {table} SET {column} = replace({column}, ?, ?) WHERE {column} LIKE ?"
                    database.execute(changed, (str(source), str(target), f"%{source}%"))
    return target


@pytest.fixture
def registered(templates: dict[str, Path], root: Path) -> Small:
    """Three versions; `best` is challenger."""
    return usual(copied(templates["registered"], root))


@pytest.fixture
def champion(templates: dict[str, Path], root: Path) -> Small:
    """`best` is champion, by one decision."""
    return usual(copied(templates["champion"], root))


def again(project: Small, name: str = "best", **changes: Any) -> None:
    """The student is trained again, another way, and registered: the challenger."""
    project.change(name, **changes)
    project.commit()
    register(TASK)


def held() -> dict[str, str]:
    return aliases(tracking.connect(), TASK)


def students() -> dict[str, str]:
    """Student by version."""
    return {str(version.version): version.tags["student"] for version in versions.versions(tracking.connect(), TASK)}


def tags(version: str) -> dict[str, str]:
    return dict(tracking.connect().get_model_version(TASK, version).tags)


def records() -> list[dict[str, Any]]:
    """Decisions, oldest first."""
    files = sorted(Path("decisions", TASK).glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    return [json.loads(file.read_text()) for file in files]


def failed() -> list[str]:
    """The gates that the last decision names."""
    return [name for name, check in records()[-1]["gates"].items() if check["verdict"] == "failed"]


def history() -> list[str]:
    client = tracking.connect()
    return promotion.history(client, TASK, held().get("champion"))


def command(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "pipelines.registry", *arguments]
    return subprocess.Popen(line, cwd=folder, env=environment, stdout=-1, stderr=-1, text=True)


# Register


def test_register_twice_is_one_version_each(project: Small, capsys: pytest.CaptureFixture[str]) -> None:
    register(TASK)
    first = students()
    assert sorted(first.values()) == ["best", "plain", "second"]
    assert first[held()["challenger"]] == "best"
    assert "champion" not in held()
    assert capsys.readouterr().out.count("(new") == 3
    register(TASK)
    assert students() == first
    assert capsys.readouterr().out.count("(registered before") == 3


def test_a_version_says_what_it_is(project: Small) -> None:
    project.redistributable = False
    project.write()
    project.commit()
    register(TASK)
    found = tags(held()["challenger"])
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    expected = {
        "student": "best",
        "method": "kd",
        "teacher": "teacher",
        "weights_sha256": sha256(Path(WEIGHTS)),
        "onnx_sha256": sha256(Path(ONNX)),
        "data_sha256": sha256(Path(f"data/prepared/{TASK}/tiny/manifest.csv")),
        "teacher_sha256": "f" * 64,
        "git_revision": revision,
        "git_clean": "true",
        "dvc_lock_sha256": "none",
        "licences": "tiny: none",
        "redistributable": "false",
        "validation": "0.95",
    }
    assert {name: found[name] for name in expected} == expected
    assert "run" not in found
    assert "test" not in found  # test figures are the gates' business


def test_a_version_leads_to_its_run(project: Small) -> None:
    client = tracking.connect()
    run = client.create_run(client.create_experiment(TASK), tags={"digest": "d" * 64})
    register(TASK)
    version = client.get_model_version(TASK, held()["challenger"])
    assert version.run_id == version.tags["run"] == run.info.run_id


def test_selection_uses_validation_alone(project: Small) -> None:
    project.change("second", validation=0.99, wrong=200)
    register(TASK)
    assert students()[held()["challenger"]] == "second"


def test_training_again_is_another_version_and_exporting_again_too(registered: Small) -> None:
    project = registered
    again(project, weights="other")
    assert len(students()) == 4
    onnx = Path(ONNX).read_bytes() + b"\x72\x01x"  # one more field: another file, the same network
    description = json.loads(Path(ONNX).with_name("model.json").read_text())
    project.put(ONNX, onnx)
    project.put(str(Path(ONNX).with_name("model.json")), {**description, "onnx_sha256": sha256(Path(ONNX))})
    register(TASK)
    assert len(students()) == 5
    assert tags(held()["challenger"])["onnx_sha256"] == sha256(Path(ONNX))


@pytest.mark.parametrize("path", [ONNX, WEIGHTS])
def test_tampered_files_are_not_registered(project: Small, path: str) -> None:
    before = sha256(Path(path))
    project.put(path, Path(path).read_bytes() + b"x")
    with pytest.raises(UserError) as caught:
        register(TASK)
    assert before in str(caught.value)
    assert sha256(Path(path)) in str(caught.value)
    assert aliases(tracking.connect(), TASK) == {}


def test_what_is_not_exported_yet_is_left_out(project: Small, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(Path(ONNX).parent)
    register(TASK)
    assert sorted(students().values()) == ["plain", "second"]
    assert "dvc repro export@best" in capsys.readouterr().out


@pytest.mark.parametrize(("file", "found"), [("models", {"best": "0" * 64}), ("data", {"tiny": "0" * 64})])
def test_figures_of_other_weights_or_data_select_nothing(project: Small, file: str, found: dict[str, str]) -> None:
    project.put(f"reports/evaluation/{TASK}/{file}.json", found)
    with pytest.raises(UserError, match=f"dvc repro evaluate@{TASK}"):
        register(TASK)
    assert students() == {}


def edited(project: Small, change: Callable[[dict[str, Any]], object]) -> None:
    content = yaml.safe_load(Path("params.yaml").read_text())
    change(content)
    project.put("params.yaml", yaml.safe_dump(content))


def test_mistakes_are_answered(project: Small) -> None:
    with pytest.raises(UserError, match="did you mean 'recognition'"):
        register("recogniton")
    with pytest.raises(UserError, match="registry register recognition"):
        promote(TASK)
    with pytest.raises(UserError, match="none was promoted"):
        rollback(TASK)
    edited(project, lambda content: content.pop("gates"))
    with pytest.raises(UserError, match=r"gates\.recognition is missing"):
        register(TASK)


def test_a_metric_that_was_not_measured(project: Small) -> None:
    project.gates["metric"] = "recall_at_1"
    project.write()
    with pytest.raises(UserError, match=r"gates\.recognition\.metric is 'recall_at_1'"):
        register(TASK)


def test_figures_of_two_data_sets_are_not_compared(project: Small) -> None:
    def other_data_set(content: dict[str, Any]) -> None:
        content["datasets"]["other"] = content["datasets"]["tiny"]
        for section in ("students", "exports"):
            content[section]["second"] = {**content[section]["second"], "dataset": "other"}

    edited(project, other_data_set)
    with pytest.raises(UserError, match=r"gates\.recognition\.dataset is missing"):
        register(TASK)
    edited(project, lambda content: content["gates"][TASK].update(dataset="tiny"))
    register(TASK)
    assert sorted(students().values()) == ["best", "plain"]


# Promote


def test_a_first_champion_needs_the_absolute_gates_and_the_baseline(
    registered: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    assert promote(TASK)
    assert held()["champion"] == held()["challenger"]
    record = records()[-1]
    assert (record["decision"], record["student"], record["champion_before"]) == ("promoted", "best", None)
    gates = {"untampered", "validated", "evaluated", "baseline", "champion", "teacher_share", "parity", "latency"}
    assert set(record["gates"]) == {*gates, "signature", "redistributable", "clean"}
    assert record["gates"]["baseline"]["figures"]["other"] == "plain"
    assert record["gates"]["baseline"]["figures"]["difference"] == pytest.approx(2 / 250)
    assert record["gates"]["teacher_share"]["figures"]["share"] == pytest.approx(240 / 248)
    found = tags(held()["champion"])
    assert found["decision"] == "promoted"
    assert found["test"] == "0.96"
    assert "passed latency: " in found["gates"]
    assert Path(found["decision_record"]).is_file()
    assert "promoted: version" in capsys.readouterr().out
    assert promote(TASK)
    assert "already" in capsys.readouterr().out
    assert len(records()) == 1


def test_a_better_challenger_wins(champion: Small) -> None:
    before = held()["champion"]
    again(champion, wrong=3, weights="other")
    assert held() == {"champion": before, "challenger": held()["challenger"]}
    assert promote(TASK)
    assert held()["champion"] != before
    assert history() == [before, held()["champion"]]
    figures = records()[-1]["gates"]["champion"]["figures"]
    assert figures["difference"] == pytest.approx(7 / 250)
    assert figures["evaluated_again"] is False


def test_a_worse_challenger_is_refused(champion: Small, capsys: pytest.CaptureFixture[str]) -> None:
    before = held()["champion"]
    champion.gates["baseline"] = "alone"
    champion.change("plain", wrong=60)
    again(champion, wrong=40, weights="other")
    assert promote(TASK) is False
    assert held()["champion"] == before
    assert failed() == ["champion"]
    assert records()[-1]["gates"]["champion"]["figures"]["difference"] == pytest.approx(-30 / 250)
    assert tags(held()["challenger"])["decision"] == "refused"
    assert "failed champion: " in tags(held()["challenger"])["gates"]
    assert "refused: " in capsys.readouterr().out
    show(TASK)
    assert "failed  champion" in capsys.readouterr().out


def test_worse_than_the_baseline_is_refused(project: Small) -> None:
    project.change("best", wrong=60)
    project.commit()
    register(TASK)
    assert promote(TASK) is False
    assert failed() == ["baseline"]
    assert "champion" not in held()


def test_the_baseline_itself_may_be_champion(project: Small) -> None:
    project.change("plain", validation=1.0)
    project.commit()
    register(TASK)
    assert promote(TASK)
    assert students()[held()["champion"]] == "plain"
    assert "itself the baseline" in records()[-1]["gates"]["baseline"]["sentence"]
    assert records()[-1]["gates"]["teacher_share"]["figures"]["teacher"] == "teacher"


def test_a_teacher_that_learnt_too_is_the_one_to_compare_with(project: Small) -> None:
    """Of the assistant too, whose own teacher never learnt the task, and has the figures of a guess."""
    project.change("teacher", wrong=200, validation=0.2)
    project.models["second.other"] = Model(wrong=1, validation=1.0, method=None)
    project.models["second.teacher"] = Model(wrong=5, validation=0.97, method=None)
    project.write()
    edited(project, lambda content: content["students"]["best"].update(teacher="second"))
    project.commit()
    register(TASK)
    assert promote(TASK)
    share = records()[-1]["gates"]["teacher_share"]["figures"]
    assert (share["teacher"], share["teacher_score"]) == ("second.teacher", 245 / 250)
    # Its own, once it has one.
    project.models["best.teacher"] = Model(wrong=2, validation=0.98, method=None)
    again(project, wrong=9, weights="other")
    assert promote(TASK)
    share = records()[-1]["gates"]["teacher_share"]["figures"]
    assert (share["teacher"], share["teacher_score"]) == ("best.teacher", 248 / 250)
    # The figures of a companion are evaluated with the others, and have to be of its weights.
    project.change("best.teacher", weights="other")
    project.put(f"models/companions/{TASK}/best/teacher/model.json", {"weights_sha256": "0" * 64})
    with pytest.raises(UserError, match=f"dvc repro evaluate@{TASK}"):
        register(TASK)


def test_without_companions_the_teacher_is_the_one_named(registered: Small) -> None:
    assert promote(TASK)
    assert records()[-1]["gates"]["teacher_share"]["figures"]["teacher"] == "teacher"


def tampered(path: str) -> Callable[[Small], object]:
    return lambda project: project.put(path, Path(path).read_bytes() + b"x")


def edited_description(change: dict[str, Any]) -> Callable[[Small], object]:
    """The registry's description of the challenger, since that is what the gates read."""

    def act(project: Small) -> None:
        file = versions.stored(TASK, held()["challenger"]) / "model.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))

    return act


PARITY = {"samples": 20, "largest_difference": {"logits": 0.5}, "metric": {"onnx": 0.9, "pytorch": 0.9}}


@pytest.mark.parametrize(
    ("spoil", "gate"),
    [
        (tampered(ONNX), "untampered"),
        (tampered(WEIGHTS), "untampered"),
        (lambda project: (versions.stored(TASK, held()["challenger"]) / "model.onnx").write_bytes(b"x"), "untampered"),
        (lambda project: Path(f"data/validated/{TASK}/tiny.json").unlink(), "validated"),
        (lambda project: project.put(f"reports/evaluation/{TASK}/models.json", "{}"), "evaluated"),
        (lambda project: project.put(f"reports/evaluation/{TASK}/data.json", {"tiny": "0" * 64}), "evaluated"),
        (lambda project: Path(LATENCY).unlink(), "latency"),
        (lambda project: project.put(LATENCY, Path(LATENCY).read_text().replace(sha256(Path(ONNX)), "0")), "latency"),
        (lambda project: project.put("new.py", ""), "clean"),
        (edited_description({"parity": PARITY}), "parity"),
    ],
)
def test_every_gate_refuses_alone(registered: Small, spoil: Callable[[Small], object], gate: str) -> None:
    spoil(registered)
    assert promote(TASK) is False
    assert failed() == [gate]
    assert "champion" not in held()


@pytest.mark.parametrize(
    ("gates", "gate"),
    [
        ({"teacher_share": 0.99}, "teacher_share"),
        ({"latency": {"budget_ms": 0.9}}, "latency"),
        ({"delta": 0.001}, "baseline"),
        ({}, None),
    ],
)
def test_gates_are_read_from_params(registered: Small, gates: dict[str, Any], gate: str | None) -> None:
    """The baseline is right once more often than `best`."""
    registered.gates |= gates
    registered.change("plain", wrong=9)
    registered.commit()
    assert promote(TASK) is (gate is None)
    assert failed() == ([gate] if gate else [])


def test_sources_that_may_not_be_passed_on_only_warn(project: Small) -> None:
    project.redistributable = False
    project.write()
    project.commit()
    register(TASK)
    assert promote(TASK)
    assert records()[-1]["gates"]["redistributable"]["verdict"] == "warning"


def test_a_changed_input_is_refused(champion: Small) -> None:
    again(champion, wrong=3, weights="other")
    described = {"name": "images", "shape": ["batch", 1, 8, 8], "dtype": "float32"}
    edited_description({"input": described})(champion)
    assert promote(TASK) is False
    assert failed() == ["signature"]


def test_a_student_that_is_exported_no_more(registered: Small) -> None:
    registered.models["other"] = registered.models.pop("best")
    registered.write()
    registered.commit()
    with pytest.raises(UserError, match="exports no more"):
        promote(TASK)


@pytest.mark.parametrize("wrong", [3, 30])
def test_the_champion_is_evaluated_again_when_test_data_moved(champion: Small, wrong: int) -> None:
    """On today's data, where no image is harder than number 245, the champion fails in the last ten or none."""
    before = held()["champion"]
    champion.ids, champion.hardest = "new", 239
    champion.models["plain"] = Model(wrong=60, validation=0.1, method="alone")
    again(champion, wrong=wrong, weights="other")
    won = promote(TASK)
    figures = records()[-1]["gates"]["champion"]["figures"]
    assert figures["evaluated_again"] is True
    assert figures["other_score"] == 1.0  # 0.96 on the data of its time
    assert won is (wrong == 3)
    assert (held()["champion"] == before) is not won
    assert failed() == ([] if won else ["champion"])


def test_a_tampered_champion_is_not_compared_with(champion: Small) -> None:
    (versions.stored(TASK, held()["champion"]) / "model.onnx").write_bytes(b"x")
    again(champion, wrong=3, weights="other")
    assert promote(TASK) is False
    assert failed() == ["champion"]


# Rollback, crashes, two at once


def three_champions(project: Small) -> list[str]:
    found = [held()["champion"]]
    for wrong in (6, 2):
        again(project, wrong=wrong, weights=f"{wrong}")
        assert promote(TASK)
        found.append(held()["champion"])
    assert len(set(found)) == 3
    return found


def test_rollback_twice_and_forward_again(champion: Small) -> None:
    first, second, third = three_champions(champion)
    rollback(TASK)
    assert held()["champion"] == second
    assert records()[-1]["decision"] == "rolled-back"
    assert (records()[-1]["version"], records()[-1]["champion_before"]) == (second, third)
    rollback(TASK)
    assert held()["champion"] == first
    with pytest.raises(UserError, match="no champion before"):
        rollback(TASK)
    assert held()["champion"] == first
    assert promote(TASK)  # the challenger is still the third
    assert held()["champion"] == third
    assert history() == [first, third]
    rollback(TASK)
    assert held()["champion"] == first


def test_rollback_past_a_champion_that_stood_twice(champion: Small) -> None:
    first = held()["champion"]
    again(champion, weights="other")
    assert promote(TASK)
    second = held()["champion"]
    again(champion, weights="first")
    assert held()["challenger"] == first
    assert promote(TASK)
    assert history() == [first, second, first]
    rollback(TASK)
    assert held()["champion"] == second
    rollback(TASK)
    assert (held()["champion"], history()) == (first, [first])
    with pytest.raises(UserError, match="no champion before"):
        rollback(TASK)


def test_rollback_restores_nothing_that_was_tampered_with(champion: Small) -> None:
    first, second, third = three_champions(champion)
    (versions.stored(TASK, second) / "model.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match=f"version {second} is not restored"):
        rollback(TASK)
    assert held()["champion"] == third
    tracking.connect().delete_model_version(TASK, second)
    with pytest.raises(UserError, match=f"version {second}, .* was deleted"):
        rollback(TASK)
    assert history() == [first, second, third]


class Killed(BaseException):
    """What kill -9 leaves behind, without ending the test."""


@pytest.mark.parametrize("action", [promote, rollback])
def test_a_crash_between_tags_and_alias_loses_nothing(
    champion: Small, monkeypatch: pytest.MonkeyPatch, action: Callable[[str], Any]
) -> None:
    from mlflow import MlflowClient

    first, second, third = three_champions(champion)
    again(champion, wrong=1, weights="last")
    fourth = held()["challenger"]

    def killed(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", killed)
        with pytest.raises(Killed):
            action(TASK)
    assert held()["champion"] == third
    assert history() == [first, second, third]
    action(TASK)
    assert held()["champion"] == (fourth if action is promote else second)
    assert history() == ([first, second, third, fourth] if action is promote else [first, second])
    rollback(TASK)
    assert held()["champion"] == (third if action is promote else first)


def test_a_champion_set_by_hand_is_part_of_history(champion: Small) -> None:
    first = held()["champion"]
    client = tracking.connect()
    other = next(version for version, student in students().items() if student == "second")
    client.set_registered_model_alias(TASK, "champion", other)
    assert history() == [first, other]
    rollback(TASK)
    assert held()["champion"] == first


def test_two_at_once(project: Small) -> None:
    """Two processes register, then two promote: one version each, one decision."""
    fork = multiprocessing.get_context("fork")  # without the imports of a fresh process
    for action in (register, promote):
        both = [fork.Process(target=action, args=(TASK,)) for _ in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join(60)
        assert [process.exitcode for process in both] == [0, 0]
    assert sorted(students().values()) == ["best", "plain", "second"]
    assert history() == [held()["champion"]] == [held()["challenger"]]
    assert len(records()) == 1


def test_the_command_says_no_with_code_1(champion: Small, root: Path) -> None:
    Path(LATENCY).unlink()
    again(champion, wrong=3, weights="other")
    Path(LATENCY).unlink()
    refused = command("promote", TASK, folder=root)
    out, error = refused.communicate(timeout=120)
    assert refused.returncode == 1, error
    assert "because of latency" in out
    assert f"python -m stages.latency {TASK}" in out
    assert "Traceback" not in error


def test_show(champion: Small, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    show(TASK)
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()) == "version student method aliases validation top_1 test last decision"
    (row,) = [line for line in lines if "champion" in line and "last" not in line]
    assert {"best", "kd", "0.95", "0.96", "promoted"} <= set(row.split())
    assert any(line.startswith("record: decisions/") for line in lines)


def test_show_before_anything(project: Small, capsys: pytest.CaptureFixture[str]) -> None:
    show(TASK)
    assert "nothing is registered" in capsys.readouterr().out


# Students without classes


@pytest.fixture
def faces(root: Path, monkeypatch: pytest.MonkeyPatch) -> Faces:
    """Students that answer with embeddings alone; the teacher learnt classes beside them."""
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    small = usual(root, Faces)
    assert isinstance(small, Faces)
    small.write()
    teacher = f"models/trained/{TASK}/teacher/model.json"
    small.put(teacher, {**json.loads(Path(teacher).read_text()), "interface": INTERFACE})
    small.commit()
    return small


def test_a_student_without_classes_becomes_champion(faces: Faces) -> None:
    """By Recall@1, and beside a teacher that has classes."""
    register(TASK)
    assert promote(TASK)
    gates = records()[-1]["gates"]
    assert gates["teacher_share"]["figures"]["teacher"] == "teacher"
    assert gates["teacher_share"]["figures"]["share"] == pytest.approx(240 / 248)
    assert gates["baseline"]["figures"]["difference"] == pytest.approx(2 / 250)


def test_classes_are_counted_only_where_they_may_be_added() -> None:
    def one(name: str, validation: float, **interface: list[str]) -> Any:
        return SimpleNamespace(name=name, validation=validation, description={"interface": interface, "parameters": 1})

    assert best([one("a", 0.5, classes=["x"]), one("b", 0.7, classes=[])]).name == "b"
    assert best([one("a", 0.5, classes=["x"], seen=["x"]), one("b", 0.7, classes=[], seen=[])]).name == "a"
