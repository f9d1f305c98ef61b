"""params.yaml, typed. `python -m stages.parameters` checks the whole file and prints nothing when it is right.

Every error names the path of the value, as in `students.recognition-kd.temperature: must be > 0, got -1`; an unknown
key is refused with the nearest known one.
"""

import difflib
import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from data.errors import UserError, suggest
from stages.parameters.shared import AnySource, Dataset, Export, Gates, Source, Student, Task, Teacher

TASKS = ("recognition", "segmentation", "text", "zero_shot", "policy")
CODE = "code"  # where the code lies, for dvc.yaml alone
SECTIONS = ("sources", "datasets", "teachers", "students", "exports", "tasks", "gates")
PER_TASK = {"tasks": "Task", "gates": "Gates"}  # sections whose entries are named after tasks
DISCRIMINATORS = ("method", "name", "kind")  # the fields that tell the members of a union apart
Entry = TypeVar("Entry")


class _Loader(yaml.SafeLoader):
    """YAML as DVC reads it (1.2: `on`, `off`, `yes` and `no` are words), and no key twice: the later of two students of
    one name would silently win.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} stands here twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))


@dataclass(frozen=True)
class Parameters:
    """All of params.yaml: one typed mapping per section, by name."""

    sources: dict[str, Source]
    datasets: dict[str, Dataset]
    teachers: dict[str, Teacher]
    students: dict[str, Student]
    exports: dict[str, Export]
    tasks: dict[str, Task]
    gates: dict[str, Gates]

    def models(self, task: str) -> dict[str, Teacher | Student]:
        """Teachers, then students of a task."""
        everything: dict[str, Teacher | Student] = {**self.teachers, **self.students}
        return {name: model for name, model in everything.items() if model.task == task}


def schema(task: str) -> ModuleType:
    """The module with the schema of one task."""
    return importlib.import_module(f"stages.parameters.{task}")


def load(path: Path = Path("params.yaml")) -> Parameters:
    """Read and check params.yaml.

    Raises:
        UserError: every mistake found, one line each, with its path.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing · run commands from the root of the project") from None
    try:
        raw = yaml.load(content.decode("utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must be a mapping of {', '.join(SECTIONS)}")
    mistakes: list[str] = [
        f"{key}: unknown section; {suggest(str(key), (CODE, *SECTIONS))}" for key in raw if key not in (CODE, *SECTIONS)
    ]
    if not isinstance(raw.get(CODE, "."), str):
        mistakes.append(f"{CODE}: must be the path from here to the root of the project, got {raw[CODE]!r}")
    found: dict[str, dict[str, Any]] = {}
    for section in SECTIONS:
        entries = {} if raw.get(section) is None else raw[section]
        if not isinstance(entries, dict):
            mistakes.append(f"{section}: must be a mapping of names, got {entries!r}")
            entries = {}
        found[section] = {}
        for name, entry in entries.items():
            kind = _kind(section, name, entry, mistakes)
            if kind is not None:
                value = _read(kind, entry, f"{section}.{name}", mistakes)
                if value is not None:
                    found[section][name] = value
    if not mistakes:
        mistakes = _contradictions(Parameters(**found))
    if mistakes:
        raise UserError(f"{path} has {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}:\n  " + "\n  ".join(mistakes))
    return Parameters(**found)


def select(section: Mapping[str, Entry], name: str, what: str) -> Entry:
    """One entry by name.

    Raises:
        UserError: there is none; the nearest known name is suggested.
    """
    if name not in section:
        raise UserError(f"unknown {what} {name!r}; {suggest(name, section)}")
    return section[name]


def _kind(section: str, name: object, entry: object, mistakes: list[str]) -> Any:
    """The type that an entry is read as; None and a mistake where that cannot be said."""
    path = f"{section}.{name}"
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name == "none":
        mistakes.append(f"{path}: a name consists of letters, digits, '-' and '_', and is not 'none'")
        return None
    if not isinstance(entry, dict):
        mistakes.append(f"{path}: must be a mapping, got {entry!r}")
        return None
    if section == "sources":
        return AnySource
    if section not in PER_TASK and "task" not in entry:
        mistakes.append(_missing(path, "task", entry, f"; known: {', '.join(TASKS)}"))
        return None
    task = name if section in PER_TASK else entry["task"]
    if task not in TASKS:
        where = path if section in PER_TASK else f"{path}.task"
        mistakes.append(f"{where}: unknown task {task!r}; {suggest(str(task), TASKS)}")
        return None
    return getattr(schema(task), PER_TASK.get(section, section.rstrip("s").capitalize()))


def _read(kind: Any, entry: dict[str, Any], path: str, mistakes: list[str]) -> Any:
    try:
        return TypeAdapter(kind).validate_python(entry)
    except ValidationError as error:
        mistakes.extend(_sentence(kind, entry, path, detail) for detail in error.errors())
        return None


def _sentence(kind: Any, entry: dict[str, Any], path: str, detail: Any) -> str:
    """One line for one pydantic error."""
    walk = list(_walk(entry, detail["loc"]))
    steps = [step for step, role in walk if role == "key"]
    if detail["type"] == "missing" and walk[-1][1] == "nothing":
        steps.append(walk[-1][0])
    where = path + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    got = detail["input"]
    match detail["type"]:
        case "extra_forbidden":
            return f"{where}: unknown key; {suggest(str(steps[-1]), _siblings(kind, entry, detail['loc']))}"
        case "missing":
            return f"{where}: is missing"
        case "union_tag_invalid":
            tag = detail["ctx"]["discriminator"].strip("'")
            known = [name.strip(" '") for name in detail["ctx"]["expected_tags"].split(",")]
            return f"{where}.{tag}: unknown {tag} {got.get(tag)!r}; {suggest(str(got.get(tag)), known)}"
        case "union_tag_not_found":
            tag = detail["ctx"]["discriminator"].strip("'")
            known = _siblings(kind, entry, (*detail["loc"], tag))
            return _missing(where, tag, [key for key in got if key not in known])
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            sign = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
            bound = next(detail["ctx"][name] for name in ("gt", "ge", "lt", "le") if name in detail["ctx"])
            return f"{where}: must be {sign[detail['type']]} {bound:g}, got {got}"
        case "value_error":
            return f"{where}: {detail['ctx']['error']}"
        case _:
            return f"{where}: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {got!r}"


def _missing(where: str, key: str, others: Iterable[Any], end: str = "") -> str:
    """One line for a key without which nobody can say which keys are known: it is not there, or is misspelt."""
    near = difflib.get_close_matches(key, map(str, others), n=1)
    return f"{where}.{near[0]}: unknown key; did you mean {key!r}?" if near else f"{where}.{key}: is missing{end}"


def _walk(entry: Any, location: tuple[Any, ...]) -> Iterator[tuple[Any, str]]:
    """Every step of pydantic's location, and what it is there: a "key" that a user wrote, a "tag" of a union, which is
    no part of a user's path, or "nothing" of both.
    """
    value: Any = entry
    tagged: Any = None
    for step in location:
        if value is not tagged and isinstance(value, Mapping) and step in map(value.get, DISCRIMINATORS):
            tagged = value  # the tag may also be the name of a key, as in `kind: url`
            yield step, "tag"
        elif (isinstance(value, Mapping) and step in value) or (isinstance(value, list) and isinstance(step, int)):
            value = value[step]
            yield step, "key"
        else:
            yield step, "nothing"


def _siblings(kind: Any, entry: Any, location: tuple[str | int, ...]) -> list[str]:
    """The keys that are known in the place of an unknown one."""
    models = _models(kind)
    for step, role in list(_walk(entry, location))[:-1]:
        if role == "tag":
            models = [model for model in models if step in _tags(model)]
        elif isinstance(step, str) and role == "key":
            fields = [item for model in models for item in model.model_fields.items()]
            models = [
                inner for name, field in fields if step in (name, field.alias) for inner in _models(field.annotation)
            ]
    return sorted({field.alias or name for model in models for name, field in model.model_fields.items()})


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Every model inside an annotation: itself, members of a union, items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _tags(model: type[BaseModel]) -> list[str]:
    """The values of the fields that tell the members of a union apart."""
    fields = [model.model_fields[name] for name in DISCRIMINATORS if name in model.model_fields]
    return [tag for field in fields for tag in get_args(field.annotation)]


def _encoder(name: str, dataset: Dataset, parameters: Parameters) -> list[str]:
    """What is wrong with the model that a data set is encoded with."""
    path, encoder = f"datasets.{name}.encoder", dataset.encoder
    known = [key for key, teacher in parameters.teachers.items() if teacher.task == dataset.task and teacher.pretrained]
    if encoder == "none":
        return []
    if encoder not in known:
        return [f"{path}: unknown encoder {encoder!r} of task {dataset.task}; {suggest(encoder, known)}"]
    images = parameters.teachers[encoder].dataset
    if images == name or images not in parameters.datasets:
        return [f"{path}: {encoder!r} learns from {images!r}, which has to be another data set"]
    source = parameters.datasets[images].source
    if source != dataset.source and {source, dataset.source} <= parameters.sources.keys():
        return [f"datasets.{name}.source: must be that of the images, datasets.{images}.source = {source!r}"]
    return []


def _contradictions(parameters: Parameters) -> list[str]:
    """Names that lead nowhere, and values that do not fit each other."""
    mistakes = []
    for name, dataset in parameters.datasets.items():
        if dataset.source not in parameters.sources:
            mistakes.append(
                f"datasets.{name}.source: unknown source {dataset.source!r}; "
                f"{suggest(dataset.source, parameters.sources)}"
            )
        mistakes.extend(_encoder(name, dataset, parameters))
    for name in parameters.teachers.keys() & parameters.students.keys():
        mistakes.append(f"students.{name}: a teacher has this name too")
    everything: dict[str, Teacher | Student] = {**parameters.teachers, **parameters.students}
    for name, model in everything.items():
        path = f"{'teachers' if name in parameters.teachers else 'students'}.{name}"
        known = [key for key, dataset in parameters.datasets.items() if dataset.task == model.task]
        if model.dataset not in known:
            mistakes.append(
                f"{path}.dataset: unknown data set {model.dataset!r} of task {model.task}; "
                f"{suggest(model.dataset, known)}"
            )
        else:
            teacher = everything.get(model.teacher) if isinstance(model, Student) else None
            pairs = schema(model.task).conflicts(model, parameters.datasets[model.dataset], teacher)
            mistakes.extend(f"{path}.{field}: {what}" for field, what in pairs)
        if isinstance(model, Teacher):
            others = [key for key, other in parameters.teachers.items() if other.task == model.task and key != name]
            near = suggest(model.start, others)
            if model.start == name:
                mistakes.append(f"{path}.start: a teacher cannot begin with itself")
            elif model.start not in (*others, "none"):
                mistakes.append(f"{path}.start: unknown teacher {model.start!r} of task {model.task}; {near}")
        if isinstance(model, Student):
            teachers = [key for key, other in everything.items() if other.task == model.task and key != name]
            if model.teacher == name:
                mistakes.append(f"{path}.teacher: a student cannot teach itself")
            elif model.teacher not in (*teachers, "none"):
                mistakes.append(
                    f"{path}.teacher: unknown model {model.teacher!r} of task {model.task}; "
                    f"{suggest(model.teacher, teachers)}"
                )
            elif model.teacher == "none" and model.needs_teacher:
                mistakes.append(f"{path}.teacher: method {model.method!r} needs a teacher")
        if model.task not in parameters.tasks:
            mistakes.append(f"tasks.{model.task}: is missing, and {path} belongs to this task")
    for section, field in (("teachers", "start"), ("students", "teacher")):
        entries: Mapping[str, Teacher | Student] = getattr(parameters, section)
        for name in entries:
            chain = [name]
            while chain[-1] in entries and getattr(entries[chain[-1]], field) not in chain:
                chain.append(getattr(entries[chain[-1]], field))
            if len(chain) > 1 and chain[-1] in entries and getattr(entries[chain[-1]], field) == name:
                mistakes.append(f"{section}.{name}.{field}: goes round in a circle: {' <- '.join([*chain, name])}")
    for name, export in parameters.exports.items():
        if name not in parameters.students:
            mistakes.append(f"exports.{name}: unknown student; {suggest(name, parameters.students)}")
            continue
        # dvc.yaml cannot look them up in the student's own entry, so they stand here again.
        for field in ("task", "dataset"):
            wanted, got = getattr(parameters.students[name], field), getattr(export, field)
            if got != wanted:
                mistakes.append(f"exports.{name}.{field}: must be the student's own, {wanted!r}, got {got!r}")
    for task, gates in parameters.gates.items():
        exported = [parameters.students[name] for name in parameters.exports if name in parameters.students]
        known = sorted({student.dataset for student in exported if student.task == task})
        if gates.dataset is not None and gates.dataset not in known:
            mistakes.append(
                f"gates.{task}.dataset: no exported student is of data set {gates.dataset!r}; "
                f"{suggest(gates.dataset, known)}"
            )
    return mistakes
