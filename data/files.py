"""Files that are either complete or absent, and their digests."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from data.errors import UserError


def sha256(path: Path) -> str:
    """Hex digest of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_digest(folder: Path) -> str:
    """Hex digest of a folder: sha256 over the sorted lines `<sha256 of the file>  <relative path>`.

    `find -L . -type f -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum` prints the same.
    """
    found = (Path(root) / name for root, _, names in os.walk(folder, followlinks=True) for name in names)
    files = sorted((os.fsencode(path.relative_to(folder).as_posix()), path) for path in found if path.is_file())
    lines = b"".join(sha256(path).encode() + b"  " + name + b"\n" for name, path in files)
    return hashlib.sha256(lines).hexdigest()


def digest(value: Any) -> str:
    """Hex digest of plain data, independent of the order of mappings."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def expand_path(text: str, where: str) -> Path:
    """A path in which environment variables and `~` stand for what they mean on this machine.

    Args:
        where: the parameter it comes from.

    Raises:
        UserError: a variable is not set.
    """
    if unset := [name for name in re.findall(r"\$\{?(\w+)", text) if not os.environ.get(name)]:
        raise UserError(
            f"{where} = {text!r} names the environment variable {unset[0]}, which is not set · "
            f"export {unset[0]}=/the/folder"
        )
    return Path(os.path.expandvars(text)).expanduser()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.part-{os.getpid()}")


def remove_partials(path: Path) -> None:
    """Remove what a killed process left while it was writing `path`."""
    for left in path.parent.glob(f".{path.name}.part-*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and vanishes otherwise.

    Raises:
        UserError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path)
    partial = _partial(path)
    partial.mkdir()
    try:
        with _telling_of_a_full_disk(path):
            yield partial
            if path.is_dir():
                shutil.rmtree(path)
            partial.rename(path)
            _sync_directory(path.parent)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def write_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file through `write(file)`: to a temporary name, flushed to disk, then renamed over `path`.

    Raises:
        UserError: the disk is full. What stood at `path` before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path)
    partial = _partial(path)
    try:
        with _telling_of_a_full_disk(path):
            with partial.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            _sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Plain data as readable JSON, the same bytes for the same value."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def _telling_of_a_full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise UserError(
                f"the disk is full: {path} could not be written; what was there before is intact · "
                "free some space and run the same command again"
            ) from error
        raise


def is_disk_full(error: BaseException | None) -> bool:
    """torch.save hides the OSError of a full disk in the context of a RuntimeError."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
