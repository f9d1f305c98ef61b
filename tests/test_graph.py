"""dvc.yaml against the code: every module that can change a result is a dependency, and nothing else is."""

import ast
import functools
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages import paths
from stages.code import NO_DEPENDENCY
from stages.parameters import TASKS

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "models", "stages", "pipelines")


def module_file(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def files(modules: set[str]) -> set[str]:
    """Where modules stand, without those that are no dependency."""
    return {
        str(module_file(module).relative_to(ROOT))  # type: ignore[union-attr]
        for module in modules
        if module not in NO_DEPENDENCY
    }


@functools.cache
def imports(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """Project modules that a module imports anywhere in its text, and the patterns of those it imports by name."""
    file = module_file(name)
    if file is None:
        raise AssertionError(f"{name} is no module of this project")
    found: set[str] = set()
    patterns: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute here"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            if isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
            else:
                patterns.add(pattern(node.args[0]))
    known = {name for name in found if name.split(".")[0] in PACKAGES and module_file(name)}
    return frozenset(known), frozenset(patterns)


def pattern(argument: ast.expr) -> str:
    """f"stages.teach.{entry.task}" becomes "stages.teach.{task}"; a task's own key is its name."""
    assert isinstance(argument, ast.JoinedStr), ast.unparse(argument)
    parts = []
    for value in argument.values:
        if isinstance(value, ast.Constant):
            parts.append(str(value.value))
        else:
            assert isinstance(value, ast.FormattedValue)
            last = ast.unparse(value.value).split(".")[-1]
            parts.append({"key": "{task}"}.get(last, "{" + last + "}"))
    return "".join(parts)


def closure(starts: set[str], task: str | None, method: str | None) -> set[str]:
    """Every project module that is imported, packages on the way included."""
    seen: set[str] = set()
    waiting = list(starts)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        parents = name.split(".")[:-1]
        waiting += [".".join(parents[: depth + 1]) for depth in range(len(parents))]
        found, patterns = imports(name)
        waiting += found
        for template in patterns:
            package, _, last = template.rpartition(".")
            if last not in ("{task}", "{method}"):
                # By a name that is neither: whatever the package holds may be meant.
                waiting += [f"{package}.{file.stem}" for file in ROOT.joinpath(*package.split(".")).glob("[!_]*.py")]
            elif {"{task}": task, "{method}": method}[last] is not None:
                waiting.append(template.format(task=task, method=method))
    return seen


def resolved(folder: Path) -> Iterator[tuple[str, str, Any]]:
    """Stage name, key and stage as DVC itself understands them."""
    from dvc.repo import Repo

    with Repo(str(folder)) as repo:
        for stage in repo.index.stages:
            name, _, key = stage.name.partition("@")
            yield name, key, stage


def code_dependencies(stage: Any, folder: Path) -> set[str]:
    found = set()
    for dependency in stage.deps:
        path = Path(dependency.def_path)
        for file in sorted((folder / path).rglob("*.py")) if (folder / path).is_dir() else [folder / path]:
            if file.suffix == ".py" and path.parts[:2] not in (("data", "raw"), ("data", "prepared")):
                found.add(file.relative_to(folder).as_posix())
    return found


def entry(name: str, key: str, parameters: dict[str, Any]) -> tuple[str | None, str | None]:
    """Task and method of one stage."""
    section = {"teach": "teachers", "distill": "students", "export": "exports", "fetch": "sources"}.get(
        name, "datasets"
    )
    if name == "evaluate":
        return key, None
    item = parameters[section][key]
    return item.get("task"), item.get("method")


@pytest.fixture(scope="module")
def parameters() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def test_the_code_a_stage_imports_is_what_it_depends_on(parameters: dict[str, Any]) -> None:
    seen = set()
    methods = {student["method"] for student in parameters["students"].values()}
    for name, key, stage in resolved(ROOT):
        task, method = entry(name, key, parameters)
        start = f"stages.{name}.__main__" if (ROOT / "stages" / name).is_dir() else f"stages.{name}"
        wanted = files(closure({start}, task, method))
        if task is None:
            # A source belongs to no task: no schema of a task says anything about it.
            wanted = {path for path in wanted if not path.startswith("stages/parameters/")}
        found = code_dependencies(stage, ROOT)
        assert wanted <= found, stage.name
        # dvc.yaml has one list for all tasks and methods: what only some of them share stands in it for the others too.
        elsewhere = {path for pair in product(TASKS, methods) for path in files(closure({start}, *pair))}
        assert found - wanted <= elsewhere, stage.name
        assert not {Path(path).stem for path in found - wanted} & {*TASKS, *methods}, stage.name
        seen.add(name)
    assert seen == {"fetch", "prepare", "validate", "teach", "distill", "evaluate", "export"}


def test_a_stage_replaces_its_shell() -> None:
    """A shell that waits for its last command would take signals, and DVC's end, in the stage's place."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for name, stage in stages.items():
        assert stage["do"]["cmd"] == f"exec env PYTHONPATH=${{code}} python -m stages.{name} ${{key}}"


def test_the_short_list_is_short_and_true() -> None:
    for name in NO_DEPENDENCY:
        file = module_file(name)
        assert file is not None, f"{name} does not exist"
        if file.name == "__init__.py" and name != "stages.parameters":
            body = ast.parse(file.read_text(encoding="utf-8")).body
            assert len(body) == 1, f"{name} holds more than a docstring"
            assert isinstance(body[0], ast.Expr), name
    assert len(NO_DEPENDENCY) <= 16


@pytest.fixture
def two_tasks(tmp_path: Path, parameters: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The shipped dvc.yaml over two tasks: recognition, and a second one that shares its source."""
    both: dict[str, Any] = {"code": ".", "sources": parameters["sources"], "tasks": {"recognition": {}, "other": {}}}
    for section in ("datasets", "teachers", "students", "exports"):
        both[section] = {name: item for name, item in parameters[section].items() if item["task"] == "recognition"}
        for name, item in list(both[section].items()):
            twin = {**item, "task": "other"}
            for field in ("dataset", "teacher"):
                if field in item and item[field] != "none":
                    twin[field] = f"other-{item[field]}"
            both[section][f"other-{name}"] = twin
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(both))
    return tmp_path, both


def test_editing_one_task_leaves_the_others_alone(parameters: dict[str, Any]) -> None:
    stages = list(resolved(ROOT))
    for task in parameters["tasks"]:
        touched = [
            (name, key)
            for name, key, stage in stages
            if any(Path(dependency.def_path).stem == task for dependency in stage.deps)
        ]
        assert {name for name, _ in touched} == {"prepare", "validate", "teach", "distill", "evaluate", "export"}
        assert all(entry(name, key, parameters)[0] == task for name, key in touched)


def test_tasks_share_nothing_but_their_sources(two_tasks: tuple[Path, dict[str, Any]]) -> None:
    """What one task makes is no input of another, so neither edit nor failure crosses over."""
    folder, both = two_tasks
    assert {entry(name, key, both)[0] for name, key, _ in resolved(folder)} == {None, "recognition", "other"}
    made: dict[str, str | None] = {}
    stages = list(resolved(folder))
    for name, key, stage in stages:
        for out in stage.outs:
            made[out.def_path] = entry(name, key, both)[0]
    for name, key, stage in stages:
        task = entry(name, key, both)[0]
        for dependency in stage.deps:
            makers = {maker for path, maker in made.items() if Path(path).is_relative_to(dependency.def_path)}
            makers |= {maker for path, maker in made.items() if Path(dependency.def_path).is_relative_to(path)}
            assert makers <= {task, None}, (stage.name, dependency.def_path)


def test_a_student_depends_on_its_own_parameters_alone(parameters: dict[str, Any]) -> None:
    for name, key, stage in resolved(ROOT):
        read = {key for dependency in stage.deps for key in getattr(dependency, "params", [])}
        allowed = {
            "fetch": {f"sources.{key}"},
            "teach": {f"teachers.{key}"},
            "distill": {f"students.{key}"},
            "export": {f"exports.{key}"},
            "evaluate": {f"tasks.{key}"},
            "validate": {f"datasets.{key}"},
            "prepare": {f"datasets.{key}", f"sources.{parameters['datasets'].get(key, {}).get('source')}"},
        }[name]
        assert read == allowed, stage.name


def test_outputs_lie_where_the_code_looks(parameters: dict[str, Any]) -> None:
    for name, key, stage in resolved(ROOT):
        task = entry(name, key, parameters)[0] or ""
        expected = {
            "fetch": [paths.raw(key)],
            "prepare": [paths.prepared(task, key)],
            "validate": [paths.validated(task, key)],
            "teach": [paths.trained(task, key), paths.companions(task, key), paths.curves(task, key)],
            "distill": [paths.trained(task, key), paths.companions(task, key), paths.curves(task, key)],
            "evaluate": [paths.metrics(task), paths.evaluation(task)],
            "export": [paths.exported(task, key)],
        }[name]
        assert {out.def_path for out in stage.outs} == {path.as_posix() for path in expected}, stage.name


def test_training_cannot_go_round_validation(parameters: dict[str, Any]) -> None:
    for name, key, stage in resolved(ROOT):
        if name in ("teach", "distill"):
            section = "teachers" if name == "teach" else "students"
            item = parameters[section][key]
            proof = paths.validated(item["task"], item["dataset"]).as_posix()
            assert proof in {dependency.def_path for dependency in stage.deps}


def test_imports_point_one_way() -> None:
    """pipelines -> stages -> models -> data; a method imports no other method."""
    height = {"data": 0, "models": 1, "stages": 2, "pipelines": 3}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for other in imports(name)[0]:
                assert height[other.split(".")[0]] <= height[package], f"{name} imports {other}"
                methods = [path.stem for path in (ROOT / "stages" / "distill").glob("[!_]*.py")]
                if name.startswith("stages.distill.") and name.split(".")[2] in methods:
                    assert other.split(".")[:2] != ["stages", "distill"] or other == "stages.distill", name


def test_heavy_packages_stay_where_they_belong() -> None:
    """A worker that trains has none of them, and no stage pays for an import it does not need."""
    for package in ("data", "models", "stages"):
        for file in (ROOT / package).rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            names = {
                (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name.split(".")[0]
                for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names
            }
            assert not names & {"dvc", "mlflow", "prefect"}, file
            assert "great_expectations" not in names or file.name == "expectations.py", file
            assert "lightning_fabric" not in names or file.name == "run.py", file


def test_at_most_twelve_stages_per_task(parameters: dict[str, Any]) -> None:
    """DVC's own cost grows with the square of the number of stages: 60 for five tasks."""
    assert len(list(resolved(ROOT))) <= 12 * len(parameters["tasks"])
