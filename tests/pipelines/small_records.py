"""What stages leave on disk, and what MLflow holds of it: for the tests of records."""

import contextlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from data.errors import UserError
from data.files import digest, sha256
from pipelines import records, tracking
from stages.evaluate import __main__ as stage
from stages.evaluate.result import Result

PROJECT = Path(__file__).parents[2]
PARAMETERS = """
teachers:
  big: {task: recognition, dataset: digits}
students:
  small: {task: recognition, dataset: digits, method: kd, teacher: big}
  words: {task: text, dataset: papers, method: alone, teacher: none}
tasks:
  recognition: {}
"""
DAY = 1_700_000_000
TEACHER, STUDENT = "a" * 64, "b" * 64


def lines(*values: tuple[int, str, float]) -> bytes:
    return b"".join(
        json.dumps({"step": step, "name": name, "value": value}).encode() + b"\n" for step, name, value in values
    )


def curve(steps: int) -> list[tuple[int, str, float]]:
    """Values that repeat: one that is lost or doubled must not hide behind another."""
    return [(step, name, 1.0 / (1 + step // 3)) for step in range(steps) for name in ("loss/task", "validation/top_1")]


class Disk:
    """What stages leave behind, written as they write it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "params.yaml").write_text(PARAMETERS)

    def write(self, path: str, content: bytes, day: int = 0) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        os.utime(file, (DAY + day, DAY + day))
        return file

    def header(self, stage: str, key: str, name: str) -> bytes:
        return json.dumps({"stage": stage, "key": key, "digest": name}).encode() + b"\n"

    def grow(self, stage: str, key: str, name: str, content: bytes, *, now: bool = False) -> Path:
        file = self.write(
            f".checkpoints/{stage}/{key}/{name[:16]}/record.jsonl", self.header(stage, key, name) + content
        )
        file.parents[1].with_name(f"{file.parents[1].name}.lock").touch()
        if now:
            os.utime(file)
        return file

    def finish(self, stage: str, key: str, name: str, content: bytes, task: str = "recognition", **more: Any) -> None:
        """Into a new folder that takes the place of the old one; then the checkpoints go."""
        recipe = {"task": task, "dataset": "digits", "training": {"epochs": 3, "rate": 0.1}, "widths": [1, 2], **more}
        student = stage == "distill"
        description = {
            "name": key,
            "task": task,
            "kind": "student" if student else "teacher",
            "recipe": recipe | ({"method": "kd", "teacher": "big"} if student else {}),
            "dataset": {"name": "digits", "digest": "d" * 64},
            "teacher": {"name": "big", "weights_sha256": "5" * 64} if student else None,
            "weights_sha256": digest(["weights", name]),
        }
        part = f"models/trained/{task}/.{key}.part-1"
        self.write(f"{part}/model.json", json.dumps(description).encode())
        self.write(f"{part}/record.jsonl", self.header(stage, key, name) + content)
        folder = self.root / f"models/trained/{task}/{key}"
        shutil.rmtree(folder, ignore_errors=True)
        (self.root / part).rename(folder)
        shutil.rmtree(self.root / f".checkpoints/{stage}/{key}", ignore_errors=True)

    def accompany(self, student: str, companion: str, weights: str) -> None:
        """What a training left beside its student."""
        description = {"dataset": {"name": "digits", "digest": "d" * 64}, "weights_sha256": weights}
        folder = f"models/companions/recognition/{student}"
        self.write(f"{folder}/{companion}/model.json", json.dumps(description).encode())
        self.write(f"{folder}/contents.json", json.dumps({"evaluated": [companion]}).encode())

    def evaluate(self, figures: dict[str, float], day: int = 1) -> None:
        """By the stage itself, but for what it reads: networks are not loaded, and answer with these figures."""
        names = sorted(folder.name for folder in (self.root / "models/trained/recognition").iterdir())
        manifest = self.write("data/prepared/recognition/digits/manifest.csv", b"id")
        proof = json.dumps({"manifest": sha256(manifest)})
        self.write("data/validated/recognition/digits.json", proof.encode())
        settings = SimpleNamespace(threads=1, model_dump=dict)
        parameters = SimpleNamespace(tasks={"recognition": settings}, models=lambda task: names)

        def load_model(folder: Path) -> tuple[str, SimpleNamespace]:
            described = SimpleNamespace(**json.loads((folder / "model.json").read_text()))
            beside = folder.parents[2].name == "companions"
            return f"{folder.parent.name}.{folder.name}" if beside else folder.name, described

        def answer(network: str, *others: Any) -> Result:
            return Result({"top_1": figures[network]}, pd.DataFrame({"id": []}), pd.DataFrame({"class": []}))

        task = SimpleNamespace(import_module=lambda name: SimpleNamespace(evaluate=answer))
        with patch.multiple(stage, load=lambda: parameters, load_model=load_model, importlib=task):
            stage.main("recognition")
        os.utime(self.root / "reports/evaluation/recognition/record.jsonl", (DAY + day, DAY + day))

    def everything(self) -> None:
        self.finish("teach", "big", TEACHER, lines(*curve(5)))
        self.finish("distill", "small", STUDENT, lines(*curve(7)))
        self.evaluate({"big": 0.9, "small": 0.8})


def runs(task: str = "recognition") -> dict[str, Any]:
    """Every run of an experiment that is not deleted, by its name; a name twice is a failure."""
    client = tracking.connect()
    experiment = client.get_experiment_by_name(task)
    found = client.search_runs([experiment.experiment_id], max_results=1000) if experiment else []
    by_name = {run.data.tags["mlflow.runName"]: run for run in found}
    assert len(by_name) == len(found), [run.data.tags["mlflow.runName"] for run in found]
    return by_name


def history(run: Any, *, times: bool = False) -> list[tuple[Any, ...]]:
    """All values of a run, doubled ones included: from the database itself, which the client would ask name by name."""
    with contextlib.closing(sqlite3.connect(tracking.DATABASE)) as database:
        rows = database.execute(
            "select step, key, value, timestamp from metrics where run_uuid = ?", (run.info.run_id,)
        ).fetchall()
    return sorted((*row[:3], row[3] - run.info.start_time) if times else row[:3] for row in rows)


def picture(task: str = "recognition", *, times: bool = True, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """All that MLflow holds of a task, with names in place of the ids that it draws."""
    found = runs(task)
    names = {run.info.run_id: name for name, run in found.items()}
    return {
        name: {
            "status": run.info.status,
            "times": (run.info.start_time, run.info.end_time) if times and run.data.tags["kind"] == "stage" else None,
            "tags": {tag: names.get(text, text) for tag, text in run.data.tags.items() if tag not in without},
            "params": run.data.params,
            "inputs": [
                (
                    data.dataset.name,
                    data.dataset.digest,
                    data.dataset.source,
                    [(tag.key, tag.value) for tag in data.tags],
                )
                for data in run.inputs.dataset_inputs
            ],
            "history": history(run, times=times),
        }
        for name, run in found.items()
    }


def pipeline(found: dict[str, Any]) -> Any:
    (parent,) = [run for run in found.values() if run.data.tags["kind"] == "pipeline"]
    return parent


class Breaking:
    """A client whose n-th change is its last act: it is carried out, and its answer is lost.

    An end while it reads is the same as one after the change before.
    """

    def __init__(self, client: Any, last: int = 10**9) -> None:
        self.client, self.last, self.calls = client, last, 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)
        if name.startswith(("get_", "search_")):
            return method

        def call(*arguments: Any, **more: Any) -> Any:
            if self.calls >= self.last:
                raise MlflowException("nobody answers")
            self.calls += 1
            result = method(*arguments, **more)
            if self.calls >= self.last:
                raise MlflowException("the answer is lost")
            return result

        return call


def broken_sync(monkeypatch: pytest.MonkeyPatch, last: int) -> bool:
    """A sync that ends at its n-th call; whether it got there."""
    client = Breaking(tracking.connect(), last)
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "connect", lambda: client)
        try:
            records.sync("one")
        except UserError:
            return True
    return False


def git(*arguments: str) -> str:
    settings = ("-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *settings, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def all_runs() -> list[Any]:
    client = tracking.connect()
    return list(client.search_runs([client.get_experiment_by_name("recognition").experiment_id], max_results=1000))


def forget_engines() -> None:
    """mlflow keeps connections to a file that was replaced."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for engine in SqlAlchemyStore._engine_map.values():
        engine.dispose()


def script(*acts: Callable[[], Any]) -> Callable[[], bool]:
    """`ended` for `follow`: does the next act each time that it is asked, and says yes after the last."""
    left = list(acts)

    def ended() -> bool:
        if not left:
            return True
        left.pop(0)()
        return False

    return ended


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
