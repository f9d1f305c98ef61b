"""Fetching: what is pinned arrives complete; anything else leaves things as they were, and is explained."""

import functools
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.errors import UserError
from data.files import sha256, tree_digest
from stages import fetch

ROOT = Path(__file__).resolve().parents[2]
RAW = Path("data/raw")
RIGHTS = {"licence": "none", "credit": "nobody", "redistributable": True}
WRONG = "0" * 64


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project in a path with a space; nothing of this machine's pip settings holds."""
    folder = tmp_path / "a project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with names that need care."""
    folder = tmp_path / "some data"
    (folder / "in ner").mkdir(parents=True)
    (folder / "one.txt").write_text("1")
    (folder / "in ner" / "zwölf.bin").write_bytes(bytes(range(256)))
    (folder / ".hidden").write_text("h")
    return folder


def declare(**entry: Any) -> None:
    Path("params.yaml").write_text(yaml.safe_dump({"sources": {"toy": {**entry, **RIGHTS}}}))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused() -> str:
    """Fetch twice, once with nothing there and once with an older version: neither changes anything."""
    for before in (None, {"old.txt": b"old"}):
        if before is not None:
            (RAW / "toy").mkdir(parents=True)
            (RAW / "toy" / "old.txt").write_bytes(b"old")
        with pytest.raises(UserError) as caught:
            fetch.main("toy")
        if before is None:
            assert not (RAW / "toy").exists()
        else:
            assert contents(RAW / "toy") == before
        assert [path.name for path in RAW.iterdir()] == ([] if before is None else ["toy"]), "a partial folder is left"
    return str(caught.value)


# Nothing


def test_of_nothing_a_note_is_kept_and_always_the_same(project: Path) -> None:
    declare(kind="none")
    fetch.main("toy")
    first = contents(RAW / "toy")
    assert list(first) == ["note.txt"]
    (RAW / "toy" / "leftover").write_text("of an older version")
    fetch.main("toy")
    assert contents(RAW / "toy") == first


# Folders


def test_a_folder_is_copied(project: Path, source: Path) -> None:
    declare(kind="folder", path=str(source), tree_digest=tree_digest(source))
    fetch.main("toy")
    assert contents(RAW / "toy") == contents(source)
    assert len(contents(source)) == 3
    (RAW / "toy" / "leftover").write_text("of an older version")
    fetch.main("toy")
    assert contents(RAW / "toy") == contents(source)
    assert [path.name for path in RAW.iterdir()] == ["toy"]


@pytest.mark.parametrize("path", ["$TOY_DATA/some data", "${TOY_DATA}/some data", "~/some data"])
def test_variables_and_home_are_expanded(
    project: Path, source: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_DATA", str(source.parent))
    monkeypatch.setenv("HOME", str(source.parent))
    declare(kind="folder", path=path, tree_digest=tree_digest(source))
    fetch.main("toy")
    assert contents(RAW / "toy") == contents(source)


def test_a_value_with_a_dollar_sign_is_no_variable(
    project: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = source.parent / "costs $5"
    source.rename(odd)
    monkeypatch.setenv("TOY_DATA", str(odd))
    declare(kind="folder", path="$TOY_DATA", tree_digest=tree_digest(odd))
    fetch.main("toy")
    assert contents(RAW / "toy") == contents(odd)


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("path", ["$TOY_DATA/x", "${TOY_DATA}/x", "/somewhere/$TOY_DATA"])
def test_a_variable_that_is_not_set_is_named(
    project: Path, path: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOY_DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("TOY_DATA", value)
    declare(kind="folder", path=path, tree_digest=WRONG)
    message = refused()
    assert f"sources.toy.path = {path!r} names the environment variable TOY_DATA, which is not set" in message
    assert "export TOY_DATA=" in message


def test_a_missing_folder_is_named(project: Path, source: Path) -> None:
    for path in (source / "absent", source / "one.txt"):
        shutil.rmtree(RAW, ignore_errors=True)
        declare(kind="folder", path=str(path), tree_digest=WRONG)
        assert f"the folder {path} of source 'toy' does not exist · correct sources.toy.path" in refused()


def test_another_tree_is_refused_with_both_digests(project: Path, source: Path) -> None:
    pinned = tree_digest(source)
    (source / "one.txt").write_text("2")
    declare(kind="folder", path=str(source), tree_digest=pinned)
    message = refused()
    assert str(source) in message
    assert f"sources.toy.tree_digest pins: wanted {pinned}, got {tree_digest(source)}" in message


def test_links_are_followed(project: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "two.txt").write_text("2")
    (source / "link.txt").symlink_to(tmp_path / "elsewhere" / "two.txt")
    (source / "linked folder").symlink_to(tmp_path / "elsewhere")
    declare(kind="folder", path=str(source), tree_digest=tree_digest(source))
    fetch.main("toy")
    shutil.rmtree(tmp_path / "elsewhere")
    assert (RAW / "toy" / "link.txt").read_text() == (RAW / "toy" / "linked folder" / "two.txt").read_text() == "2"


def test_a_link_that_leads_nowhere_is_named(project: Path, source: Path) -> None:
    (source / "link.txt").symlink_to(source / "absent")
    declare(kind="folder", path=str(source), tree_digest=WRONG)
    message = refused()
    assert f"the folder {source} of source 'toy' could not be copied" in message
    assert "link.txt" in message


def test_a_folder_that_is_read_only_there_can_be_replaced_here(project: Path, source: Path) -> None:
    """Whoever runs the tests as root may delete anything: the permissions are looked at."""
    (source / "in ner").chmod(0o555)
    source.chmod(0o555)
    try:
        declare(kind="folder", path=str(source), tree_digest=tree_digest(source))
        fetch.main("toy")
        for folder in (RAW / "toy", RAW / "toy" / "in ner"):
            assert folder.stat().st_mode & 0o700 == 0o700
        fetch.main("toy")
    finally:
        source.chmod(0o755)
        (source / "in ner").chmod(0o755)
    assert contents(RAW / "toy") == contents(source)


def test_what_a_killed_fetch_left_is_removed(project: Path, source: Path) -> None:
    (RAW / ".toy.part-123").mkdir(parents=True)
    (RAW / ".toy.part-123" / "half").write_text("half")
    declare(kind="folder", path=str(source), tree_digest=tree_digest(source))
    fetch.main("toy")
    assert [path.name for path in RAW.iterdir()] == ["toy"]


# URLs


def test_a_file_behind_a_url_is_downloaded(project: Path, source: Path) -> None:
    file = source / "in ner" / "zwölf.bin"
    declare(kind="url", url=file.as_uri(), sha256=sha256(file))
    fetch.main("toy")
    assert list(contents(RAW / "toy").values()) == [file.read_bytes()]
    declare(kind="url", url=(source / "one.txt").as_uri(), sha256=sha256(source / "one.txt"))
    fetch.main("toy")
    assert contents(RAW / "toy") == {"one.txt": b"1"}


def test_another_file_behind_a_url_is_refused_with_both_digests(project: Path, source: Path) -> None:
    declare(kind="url", url=(source / "one.txt").as_uri(), sha256=WRONG)
    found = hashlib.sha256(b"1").hexdigest()
    assert f"one.txt is not what sources.toy.sha256 pins: wanted {WRONG}, got {found} · nothing was kept" in refused()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/file.bin",
        "http://127.0.0.1:9/a name with spaces",
        "http://127.0.0.1:port/file.bin",
        "http://[broken/file.bin",
        "https://127.0.0.1:9/file.bin",
        "file:///no/such/file.bin",
    ],
)
def test_an_unreachable_url_is_named(project: Path, url: str) -> None:
    declare(kind="url", url=url, sha256=WRONG)
    message = refused()
    assert f"{url} of source 'toy' could not be downloaded (" in message
    assert "sources.toy.url" in message


class Server(http.server.BaseHTTPRequestHandler):
    """Three answers: what was asked for, an error, and half of what was promised."""

    def do_GET(self) -> None:
        self.send_response(404 if self.path == "/absent" else 200)
        self.send_header("Content-Length", "1000" if self.path == "/half" else "4")
        self.end_headers()
        self.wfile.write(b"data")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server)) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_a_server_that_answers_badly(project: Path, server: str) -> None:
    pinned = hashlib.sha256(b"data").hexdigest()
    declare(kind="url", url=f"{server}/absent", sha256=pinned)
    assert "could not be downloaded (HTTP Error 404" in refused()
    shutil.rmtree(RAW)
    declare(kind="url", url=f"{server}/half", sha256=hashlib.sha256(b"data" * 250).hexdigest())
    assert "sources.toy." in refused()
    declare(kind="url", url=f"{server}/whole?version=2", sha256=pinned)
    fetch.main("toy")
    assert contents(RAW / "toy") == {"whole": b"data"}


# Wheels


MEMBERS = {"toy_data/one.csv": b"1,2\n" * 999, "toy_data/other/two.bin": b"\0\1", "toy_data/other/one.csv": b"3\n"}


PHOTO = {"more_data/one.csv": b"photo"}


@pytest.fixture
def wheel(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in a local folder that is all that pip looks at."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    path = folder / "toy_data-1.2-py3-none-any.whl"
    build(path, MEMBERS)
    build(folder / "more_data-3.0-cp311-cp311-some_machine_x86_64.whl", {"more_data/three.bin": b"3", **PHOTO})
    build(folder / "more_data-3.0-cp312-cp312-some_machine_x86_64.whl", {"more_data/three.bin": b"4"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    return path


def build(path: Path, members: dict[str, bytes]) -> None:
    name, version, tag = path.stem.split("-", 2)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "".join(f"{member},,\n" for member in members))


def entry(pinned: str, *files: str) -> dict[str, Any]:
    return {"package": "toy-data==1.2", "files": list(files or ("toy_data/one.csv",)), "sha256": pinned}


def declare_wheel(pinned: str, *files: str) -> None:
    declare(kind="wheel", wheels=[entry(pinned, *files)])


def more(wheel: Path, **changes: Any) -> dict[str, Any]:
    """The entry of a wheel that exists for two versions of Python, on a machine that is not this one."""
    archive = wheel.parent / "more_data-3.0-cp311-cp311-some_machine_x86_64.whl"
    return {
        "package": "more-data==3.0",
        "files": ["more_data/three.bin"],
        "sha256": sha256(archive),
        "python": "3.11",
        "platform": "some_machine_x86_64",
        **changes,
    }


def test_files_are_taken_out_of_a_wheel(wheel: Path) -> None:
    declare_wheel(sha256(wheel), "toy_data/one.csv", "toy_data/other/two.bin")
    fetch.main("toy")
    assert contents(RAW / "toy") == {"one.csv": b"1,2\n" * 999, "two.bin": b"\0\1"}
    assert [path.name for path in RAW.iterdir()] == ["toy"]


def test_another_wheel_is_refused_with_both_digests(wheel: Path) -> None:
    pinned = sha256(wheel)
    build(wheel, {**MEMBERS, "toy_data/one.csv": b"9,9\n"})
    declare_wheel(pinned)
    message = refused()
    assert (
        f"{wheel.name} is not what sources.toy.wheels[0].sha256 pins: wanted {pinned}, got {sha256(wheel)}" in message
    )


def test_a_wheel_that_ends_early_is_refused(wheel: Path) -> None:
    declare_wheel(sha256(wheel))
    wheel.write_bytes(wheel.read_bytes()[:-30])
    assert "toy" in refused()


def test_a_file_that_the_wheel_does_not_hold_is_named(wheel: Path) -> None:
    declare_wheel(sha256(wheel), "toy_data/one.csv", "toy_data/tow.bin")
    assert f"{wheel.name} holds no 'toy_data/tow.bin' · correct sources.toy.wheels[0].files" in refused()


def test_two_files_of_one_name_do_not_overwrite_each_other(wheel: Path) -> None:
    declare_wheel(sha256(wheel), "toy_data/one.csv", "toy_data/other/one.csv")
    assert "sources.toy.wheels[0].files holds a second file of the name 'one.csv'" in refused()
    shutil.rmtree(RAW)
    declare(kind="wheel", wheels=[entry(sha256(wheel)), more(wheel, files=["more_data/one.csv"])])
    assert "sources.toy.wheels[1].files holds a second file of the name 'one.csv'" in refused()


def test_files_are_taken_out_of_several_wheels_and_for_another_machine(wheel: Path) -> None:
    """Without `python` and `platform`, pip would look for a wheel of this interpreter on this machine."""
    declare(kind="wheel", wheels=[entry(sha256(wheel)), more(wheel)])
    fetch.main("toy")
    assert contents(RAW / "toy") == {"one.csv": b"1,2\n" * 999, "three.bin": b"3"}
    other = wheel.parent / "more_data-3.0-cp312-cp312-some_machine_x86_64.whl"
    declare(kind="wheel", wheels=[more(wheel, python="3.12", sha256=sha256(other))])
    fetch.main("toy")
    assert contents(RAW / "toy") == {"three.bin": b"4"}


def test_the_second_of_two_wheels_is_refused_and_nothing_of_the_first_is_kept(wheel: Path) -> None:
    declare(kind="wheel", wheels=[entry(sha256(wheel)), more(wheel, sha256=WRONG)])
    message = refused()
    found = more(wheel)["sha256"]
    assert f"is not what sources.toy.wheels[1].sha256 pins: wanted {WRONG}, got {found} · nothing was kept" in message
    assert "more_data-3.0-cp311" in message


def test_a_wheel_that_no_machine_of_that_kind_has_is_named(wheel: Path) -> None:
    declare(kind="wheel", wheels=[more(wheel, python="3.10")])
    message = refused()
    assert (
        "pip could not download more-data==3.0 of source 'toy' for Python 3.10 on some_machine_x86_64 (ERR" in message
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pyhton": "3.11"}, "sources.toy.wheels[1].pyhton: unknown key; did you mean 'python'?"),
        ({"platform": None}, "sources.toy.wheels[1]: 'python' and 'platform' go together"),
    ],
)
def test_a_mistake_inside_a_wheel_is_named_by_its_path(wheel: Path, change: dict[str, Any], message: str) -> None:
    declare(kind="wheel", wheels=[entry(sha256(wheel)), more(wheel, **change)])
    with pytest.raises(UserError) as caught:
        fetch.main("toy")
    assert message in str(caught.value)
    assert not RAW.exists()


def test_no_network_is_explained(wheel: Path) -> None:
    declare_wheel(sha256(wheel))
    wheel.unlink()
    message = refused()
    assert "pip could not download toy-data==1.2 of source 'toy' (ERROR: No matching distribution" in message
    assert "is the network there" in message


# Several parts


def parts(source: Path, wheel: Path) -> list[dict[str, Any]]:
    """A tree, a URL and two files of a wheel; each has what its kind needs and nothing else."""
    file = source.parent / "vocab.txt"
    file.write_text("[PAD]\n")
    return [
        {"kind": "folder", "path": str(source), "tree_digest": tree_digest(source)},
        {"kind": "url", "url": file.as_uri(), "sha256": sha256(file)},
        {"kind": "wheel", "wheels": [entry(sha256(wheel), "toy_data/one.csv", "toy_data/other/two.bin"), more(wheel)]},
    ]


def test_parts_of_several_kinds_come_into_one_folder(source: Path, wheel: Path) -> None:
    declare(kind="parts", parts=parts(source, wheel))
    everything = {
        **contents(source),
        "vocab.txt": b"[PAD]\n",
        "one.csv": MEMBERS["toy_data/one.csv"],
        "two.bin": b"\0\1",
        "three.bin": b"3",
    }
    for _ in range(2):
        fetch.main("toy")
        assert contents(RAW / "toy") == everything
        assert [path.name for path in RAW.iterdir()] == ["toy"]
        assert sorted(path.name for path in (RAW / "toy").iterdir()) == sorted(
            {name.partition("/")[0] for name in everything}
        )


def test_a_name_in_two_parts_is_refused(source: Path, wheel: Path) -> None:
    """Also where one is a folder: nothing is laid over anything."""
    for name in ("one.txt", "in ner"):
        other = wheel.parent / "other" / name
        if name == "one.txt":
            other.parent.mkdir()
        other.write_bytes(b"of another part")
        second = {"kind": "folder", "path": str(other.parent), "tree_digest": tree_digest(other.parent)}
        declare(kind="parts", parts=[*parts(source, wheel), second])
        assert f"sources.toy.parts[3] holds a second file of the name {name!r}" in refused()
        shutil.rmtree(RAW)
        other.unlink()


@pytest.mark.parametrize(
    ("part", "path", "field"),
    [
        (0, ("tree_digest",), "parts[0].tree_digest"),
        (1, ("sha256",), "parts[1].sha256"),
        (2, ("wheels", 1, "sha256"), "parts[2].wheels[1].sha256"),
    ],
)
def test_one_part_that_is_not_what_is_pinned_keeps_all_from_being_kept(
    source: Path, wheel: Path, part: int, path: tuple[Any, ...], field: str
) -> None:
    found = parts(source, wheel)
    place: Any = found[part]
    for key in path[:-1]:
        place = place[key]
    right, place[path[-1]] = place[path[-1]], WRONG
    declare(kind="parts", parts=found)
    assert f"is not what sources.toy.{field} pins: wanted {WRONG}, got {right} · nothing was kept" in refused()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (0, {"path": "/no/such/folder"}, "does not exist · correct sources.toy.parts[0].path"),
        (0, {"path": "$NO_SUCH_VARIABLE"}, "sources.toy.parts[0].path = '$NO_SUCH_VARIABLE' names the environment"),
        (1, {"url": "file:///no/such/file"}, "could not be downloaded ("),
        (1, {"url": "file:///no/such/file"}, "check sources.toy.parts[1].url and the network"),
    ],
)
def test_a_part_that_is_not_there_is_named_by_its_path(
    source: Path, wheel: Path, part: int, change: dict[str, str], message: str
) -> None:
    found = parts(source, wheel)
    found[part].update(change)
    declare(kind="parts", parts=found)
    assert message in refused()


def test_a_file_that_the_wheel_of_a_part_does_not_hold_is_named(source: Path, wheel: Path) -> None:
    found = parts(source, wheel)
    found[2]["wheels"][0]["files"] = ["toy_data/tow.bin"]
    declare(kind="parts", parts=found)
    assert "holds no 'toy_data/tow.bin' · correct sources.toy.parts[2].wheels[0].files" in refused()


# The command line


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", "stages.fetch", *arguments]
    return subprocess.run(call, env=environment, capture_output=True, text=True, check=False)


def test_the_command_line(project: Path, source: Path) -> None:
    declare(kind="folder", path=str(source), tree_digest=WRONG)
    done = command("toy")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error in fetch toy: {source} is not what sources.toy.tree_digest pins")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(RAW.iterdir()) == []
    declare(kind="folder", path=str(source), tree_digest=tree_digest(source))
    done = command("toy")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert contents(RAW / "toy") == contents(source)
    done = command("tyo")
    assert (done.returncode, done.stderr) == (1, "error in fetch tyo: unknown source 'tyo'; did you mean 'toy'?\n")
    assert command().returncode == 2
