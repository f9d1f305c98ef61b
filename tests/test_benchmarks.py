"""benchmarks/: a DVC project of its own that runs the same dvc.yaml over larger data."""

import os
from pathlib import Path

import pytest
import yaml

from data.files import expand_path, tree_digest
from stages.parameters import load
from stages.parameters.shared import FolderSource

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SIZES = [BENCHMARKS / "params.yaml", *sorted((BENCHMARKS / "sizes").glob("*.yaml"))]


def test_one_text_serves_both() -> None:
    assert (BENCHMARKS / "dvc.yaml").is_symlink()
    assert (BENCHMARKS / "dvc.yaml").resolve() == ROOT / "dvc.yaml"


@pytest.mark.parametrize("file", SIZES, ids=lambda path: path.stem)
def test_every_size_can_be_read_and_resolved(file: Path, tmp_path: Path) -> None:
    """DVC resolves the graph over it, and all code that it names is there."""
    from dvc.repo import Repo

    parameters = load(file)
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["code"] == ".."
    folder = tmp_path / "benchmarks"
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc" / "config").write_text("[core]\n    no_scm = true\n")
    (folder / "dvc.yaml").write_text((BENCHMARKS / "dvc.yaml").read_text(encoding="utf-8"))
    (folder / "params.yaml").write_text(file.read_text(encoding="utf-8"))
    with Repo(str(folder)) as repo:
        stages = {stage.name: stage for stage in repo.index.stages}
    assert {f"distill@{name}" for name in parameters.students} < set(stages)
    for stage in stages.values():
        assert stage.cmd.startswith("exec env PYTHONPATH=.. python -m stages.")
        for dependency in stage.deps:
            if dependency.def_path.startswith(".."):
                assert (BENCHMARKS / dependency.def_path).is_file(), dependency.def_path
    for task in parameters.tasks:
        assert (BENCHMARKS / "models/trained" / task / "none").is_file()


@pytest.mark.parametrize("file", SIZES, ids=lambda path: path.stem)
def test_rows_differ_in_their_method_alone(file: Path) -> None:
    """Students of one network have one schedule and one seed: what differs is how they learn.

    What learns by a generator is trained for as long as that takes, whatever network its classes come from. Assistants
    are no rows: their images are larger, and their schedule may be another.
    """
    everyone = load(file).students
    assistants = {student.teacher for student in everyone.values()}
    students = [student for name, student in everyone.items() if name not in assistants]
    for data in load(file).datasets:
        rows = [student for student in students if student.dataset == data and student.task != "zero_shot"]
        for network in {str(row.network) for row in rows}:  # type: ignore[attr-defined]
            alike = [row for row in rows if str(row.network) == network]  # type: ignore[attr-defined]
            assert len({str(row.training) for row in alike}) == 1
            assert "alone" in {row.method for row in alike}
        generated = [row for row in students if row.dataset == data and row.method == "d3gzsl"]
        for name in {row.generator.name for row in generated}:  # type: ignore[attr-defined]
            alike = [row for row in generated if row.generator.name == name]  # type: ignore[attr-defined]
            assert len({str(row.training) for row in alike}) == 1
            assert len({str(row.generator) for row in alike}) == 1  # type: ignore[attr-defined]
            assert None in {row.distribution for row in alike}, "a generator without the distribution's terms"  # type: ignore[attr-defined]


@pytest.mark.parametrize("file", SIZES, ids=lambda path: path.stem)
def test_teachers_of_texts_read_what_their_students_read(file: Path) -> None:
    parameters = load(file)
    models = {**parameters.teachers, **parameters.students}
    for student in parameters.students.values():
        if student.task == "text" and student.teacher != "none":
            ours, theirs = (parameters.datasets[x.dataset] for x in (student, models[student.teacher]))
            assert ours.length == theirs.length  # type: ignore[attr-defined]
            assert ours.tokenizer == theirs.tokenizer  # type: ignore[attr-defined]


def test_nothing_of_it_shows_at_the_root() -> None:
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        assert {Path(stage.path) for stage in repo.index.stages} == {ROOT / "dvc.yaml"}


@pytest.mark.bench
@pytest.mark.skipif("DISTILLERY_DATA" not in os.environ, reason="DISTILLERY_DATA is not set: no bench data here")
def test_the_data_is_what_is_pinned() -> None:
    folders = {name: source for name, source in load(SIZES[0]).sources.items() if isinstance(source, FolderSource)}
    assert folders
    for name, source in folders.items():
        assert tree_digest(expand_path(source.path, name)) == source.tree_digest, name
