"""Records as they lie on disk: finished ones beside their outputs, growing ones beside the checkpoints.

models/trained/TASK/MODEL/record.jsonl              a finished training, with model.json
reports/evaluation/TASK/record.jsonl                a finished evaluation, with models.json
.checkpoints/STAGE/KEY/DIGEST16/record.jsonl        a training under way, or one that was stopped
"""

import fcntl
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.errors import UserError
from data.files import digest, sha256
from stages import paths

FILE, DESCRIPTION, MODELS = "record.jsonl", "model.json", "models.json"
# A training lets go of its lock a moment before its output is complete: while following, only silence means an end.
QUIET_SECONDS = 10.0


@dataclass(frozen=True)
class Source:
    """One record.

    Attributes:
        stage, key, digest: its first line.
        task: whose experiment it belongs to.
        finished: it lies beside a complete output.
        alive: finished, or a process still writes it.
        modified: when it was last written, in milliseconds.
        lines: every complete line after the first, not parsed.
        description: model.json of a finished training; what params.yaml says of a living one; else empty.
        evaluated: of an evaluation, sha256 of the weights by model; else empty.
        identity: which run it is. The digest of a training names all that decides its lines. That of an evaluation, or
            of a model taken as it is, names no device, and another one may round otherwise: there the bytes decide.
    """

    stage: str
    key: str
    digest: str
    task: str
    finished: bool
    alive: bool
    modified: int
    lines: list[bytes] = field(repr=False)
    description: Mapping[str, Any] = field(repr=False)
    evaluated: Mapping[str, str] = field(repr=False)
    identity: str

    @property
    def name(self) -> str:
        """The stage as DVC names it."""
        return f"{self.stage}@{self.key}"

    def values(self, start: int) -> Iterator[tuple[int, int, str, float]]:
        """Number of the line, step, name and value, from line `start` on.

        Raises:
            UserError: a line is no value.
        """
        for number, line in enumerate(self.lines[start:], start):
            try:
                value = json.loads(line)
                yield number, int(value["step"]), str(value["name"]), float(value["value"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"line {number + 2} of the record of {self.name} is no value: {line[:80]!r} · "
                    f"run `dvc checkout`, or `dvc repro --force --single-item {self.name}`"
                ) from None


def find(*, quiet_seconds: float = 0.0) -> tuple[list[Source], list[str]]:
    """Every record, trainings before evaluations and finished ones before growing ones, and what could not be read.

    Args:
        quiet_seconds: a growing record that nobody holds counts as alive for so long after its last line.
    """
    # Growing ones first: a training that ends meanwhile is found at least once.
    growing = list(_growing(quiet_seconds))
    sources: list[Source] = []
    problems: list[str] = []
    trained = sorted(Path().glob(str(paths.trained("*", "*") / FILE)))
    evaluated = sorted(Path().glob(str(paths.evaluation("*") / FILE)))
    for path in [path for path in trained + evaluated if not path.parent.name.startswith(".")]:
        try:
            sources.append(_finished(path, "trained" if path in trained else "evaluated"))
        except UserError as error:
            problems.append(str(error))
        except FileNotFoundError:  # it is being replaced
            problems.append(f"{path.parent} is not complete · run `dvc checkout`, or `dvc repro` for it")
    known = {source.identity for source in sources}
    sources += [source for source in growing if source.identity not in known]
    return sorted(sources, key=lambda source: source.stage == "evaluate"), problems


def read_parameters() -> dict[str, Any]:
    """params.yaml as it stands, unchecked; empty where there is none or where it is being edited."""
    try:
        content = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _finished(path: Path, kind: str) -> Source:
    # The folder may be replaced by another between two reads: both files are read from the folder that was opened.
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    beside = DESCRIPTION if kind == "trained" else MODELS
    try:
        content, modified = _read(FILE, folder)
        described = json.loads(_read(beside, folder)[0])
    except ValueError:
        raise UserError(f"{path.parent / beside} is damaged · run `dvc checkout`") from None
    finally:
        os.close(folder)
    header, lines = _parse(content)
    if not header or not content.endswith(b"\n"):
        raise UserError(f"{path} is damaged: it is not a header and complete lines · run `dvc checkout`")
    by_content = kind == "evaluated" or bool(described.get("recipe", {}).get("from"))
    return Source(
        stage=header["stage"],
        key=header["key"],
        digest=header["digest"],
        task=path.parent.parent.name if kind == "trained" else path.parent.name,
        finished=True,
        alive=True,
        modified=modified,
        lines=lines,
        description=described if kind == "trained" else {},
        evaluated=described if kind == "evaluated" else {},
        identity=hashlib.sha256(content).hexdigest() if by_content else header["digest"],
    )


def _growing(quiet_seconds: float) -> Iterator[Source]:
    parameters = read_parameters()
    entries = {**(parameters.get("teachers") or {}), **(parameters.get("students") or {})}
    found: dict[Path, list[tuple[int, bytes, Path]]] = {}
    for path in sorted(Path().glob(str(paths.checkpoints("*", "*") / "*" / FILE))):
        try:
            content, modified = _read(path)
        except FileNotFoundError:  # finished in this moment
            continue
        found.setdefault(path.parent.parent, []).append((modified, content, path))
    for owner, records in found.items():
        newest = max(records)[2]
        for modified, content, path in records:
            header, lines = _parse(content)
            entry = entries.get(header["key"]) if header else None
            if not header or not isinstance(entry, dict) or "task" not in entry:
                continue  # not begun yet, or of a model that params.yaml no longer names
            recent = time.time() - modified / 1000 < quiet_seconds
            # One training at a time holds the lock of a model; what lies beside the newest is of earlier parameters.
            alive = path == newest and (recent or _held(paths.lock(owner.parent.name, owner.name)))
            yield Source(
                stage=header["stage"],
                key=header["key"],
                digest=header["digest"],
                task=entry["task"],
                finished=False,
                alive=alive,
                modified=modified,
                lines=lines,
                description={"recipe": entry} if alive else {},
                evaluated={},
                identity=header["digest"],
            )


def _read(path: str | Path, folder: int | None = None) -> tuple[bytes, int]:
    """Content, and the time of the last change in milliseconds."""
    with os.fdopen(os.open(path, os.O_RDONLY, dir_fd=folder), "rb") as file:
        content = file.read()
        return content, os.fstat(file.fileno()).st_mtime_ns // 1_000_000


def _parse(content: bytes) -> tuple[dict[str, str], list[bytes]]:
    """Header (empty if it is not there yet) and complete lines; a line that is being written is left for later."""
    first, *lines = content.split(b"\n")[:-1] or [b""]
    try:
        header = {name: str(json.loads(first)[name]) for name in ("stage", "key", "digest")}
    except (ValueError, KeyError, TypeError):
        return {}, []
    return (header, lines) if re.fullmatch(r"[\w-]{1,128}", header["digest"]) else ({}, [])


def _held(lock: Path) -> bool:
    """Whether a training holds the lock; it is let go of at once where it could be taken."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def evaluated_models(evaluation: Source, every: list[Source]) -> list[Source]:
    """The models that an evaluation is of; none if other ones lie there by now.

    Companions (NAME.COMPANION) are not among them: the training of their student made both, and its record is theirs.
    """
    wanted = {name: weights for name, weights in evaluation.evaluated.items() if "." not in name}
    models = [
        source
        for source in every
        if source.finished and source.description and source.task == evaluation.task and source.key in wanted
    ]
    found = {source.key: source.description["weights_sha256"] for source in models}
    return models if found == wanted else []


@dataclass(frozen=True)
class Tree:
    """The state of the working tree.

    Attributes:
        revision: of HEAD; empty outside git.
        clean: no uncommitted change but dvc.lock, which every pipeline run changes.
        name: of this state: the revision, and a digest of what is uncommitted.
        lock: sha256 of dvc.lock.
    """

    revision: str
    clean: bool
    name: str
    lock: str


def read_tree() -> Tree:
    """Revision, cleanliness and a name for the state of the working tree."""
    lock = sha256(Path("dvc.lock")) if Path("dvc.lock").is_file() else ""
    revision = _git("rev-parse", "HEAD").strip()
    if not revision:
        return Tree("", False, f"parameters-{digest(read_parameters())[:12]}", lock)
    # The whole repository, whose code runs here, but for the dvc.lock of this folder, which may be one inside it.
    rest = ("--", ":/", ":(exclude)dvc.lock")
    status = _git("status", "--porcelain", *rest)
    if not status:
        return Tree(revision, True, revision[:12], lock)
    changes = digest([status, _git("diff", "--no-ext-diff", "--no-textconv", "HEAD", *rest)])
    return Tree(revision, False, f"{revision[:12]}-{changes[:8]}", lock)


def _git(*arguments: str) -> str:
    """What git prints; nothing outside a repository. It takes no lock that a commit could collide with."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except FileNotFoundError:
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""
