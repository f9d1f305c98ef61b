"""Files are complete or absent, whatever happens while they are written; digests depend on content alone."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from data.files import digest, new_directory, sha256, tree_digest, write_file, write_json

ROOT = Path(__file__).resolve().parents[2]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
TREES = st.dictionaries(st.sampled_from(["a", "b", "B", "ab", "x/a", "x/y/a", "x y", "ü"]), st.binary(max_size=4))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def plant(folder: Path, tree: dict[str, bytes]) -> None:
    for name, content in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder and a file that stand there already."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old.txt").write_text("old")
    (tmp_path / "file.json").write_text("old")
    return tmp_path


def half_a_folder(path: Path, fail: Callable[[], None]) -> None:
    with new_directory(path) as partial:
        (partial / "half.txt").write_text("half")
        fail()


# new_directory


def test_a_new_directory_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "not" / "yet" / "there"
    with new_directory(target) as partial:
        assert partial.parent == target.parent, "a rename is atomic within one file system only"
        (partial / "inner").mkdir()
        (partial / "inner" / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "inner" / "a.txt").read_text() == "a"
    assert names(target.parent) == ["there"]


def test_it_replaces_all_of_an_old_folder(old: Path) -> None:
    with new_directory(old / "folder") as partial:
        (partial / "new.txt").write_text("new")
        assert names(old / "folder") == ["old.txt"], "the old folder stands until the new one is complete"
    assert names(old / "folder") == ["new.txt"]
    assert names(old) == ["file.json", "folder"]


@pytest.mark.parametrize("error", [ValueError("broken"), UserError("broken"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("name", ["folder", "absent"])
def test_an_exception_leaves_everything_as_it_was(old: Path, name: str, error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        half_a_folder(old / name, fail)
    assert caught.value is error
    assert names(old) == ["file.json", "folder"]
    assert (old / "folder" / "old.txt").read_text() == "old"


@pytest.mark.parametrize("name", ["folder", "absent"])
def test_a_killed_process_leaves_everything_as_it_was_and_the_next_one_cleans_up(old: Path, name: str) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from data.files import new_directory\n"
        "with new_directory(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half.txt').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(old / name)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path for path in names(old) if not path.startswith(".")] == ["file.json", "folder"]
    assert names(old / "folder") == ["old.txt"]
    assert len(names(old)) == 3, "the process was killed before it wrote anything: this test shows nothing"
    with new_directory(old / name) as partial:
        (partial / "new.txt").write_text("new")
    assert names(old / name) == ["new.txt"]
    assert not [path for path in names(old) if path.startswith(".")]


def test_stale_partials_go_and_those_of_others_stay(tmp_path: Path) -> None:
    for stale in (".x.part-1", ".x.part-99999", ".xy.part-1", ".y.part-1"):
        (tmp_path / stale).mkdir()
        (tmp_path / stale / "half.txt").write_text("half")
    (tmp_path / ".x.part-2").write_text("a file among them")
    with new_directory(tmp_path / "x"):
        pass
    assert names(tmp_path) == [".xy.part-1", ".y.part-1", "x"]


# write_file and write_json


def test_write_file_replaces_the_old_content_at_the_end(old: Path) -> None:
    def write(file: IO[bytes]) -> None:
        file.write(b"new")
        file.flush()
        assert (old / "file.json").read_text() == "old"

    write_file(old / "file.json", write)
    assert (old / "file.json").read_bytes() == b"new"
    write_file(old / "deep" / "er" / "file", lambda file: file.write(b"1"))
    assert names(old / "deep" / "er") == ["file"]


def half_then(error: BaseException) -> Callable[[IO[bytes]], None]:
    def write(file: IO[bytes]) -> None:
        file.write(b"half")
        file.flush()
        raise error

    return write


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.EACCES, "no"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["file.json", "absent.json"])
def test_a_failing_write_leaves_everything_as_it_was(old: Path, name: str, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        write_file(old / name, half_then(error))
    assert caught.value is error
    assert (old / "file.json").read_text() == "old"
    assert names(old) == ["file.json", "folder"]


def test_stale_partials_of_a_file_go(old: Path) -> None:
    (old / ".file.json.part-1").write_text("half")
    write_file(old / "file.json", lambda file: file.write(b"new"))
    assert names(old) == ["file.json", "folder"]


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def hidden_in_context() -> None:
    try:
        full()
    except OSError:
        raise RuntimeError("unexpected position 64 vs 32")  # noqa: B904 - as torch.save does


def hidden_in_cause_of_cause() -> None:
    try:
        hidden_in_context()
    except RuntimeError as error:
        raise ValueError("outer") from error


def over_quota() -> None:
    raise OSError(errno.EDQUOT, "Disk quota exceeded")


@pytest.mark.parametrize("fail", [full, hidden_in_context, hidden_in_cause_of_cause, over_quota])
def test_a_full_disk_is_told_as_such(old: Path, fail: Callable[[], None]) -> None:
    def write(file: IO[bytes]) -> None:
        file.write(b"half")
        fail()

    with pytest.raises(UserError, match=re.escape(f"the disk is full: {old / 'file.json'} ")):
        write_file(old / "file.json", write)
    with pytest.raises(UserError, match=re.escape(f"the disk is full: {old / 'folder'} ")):
        half_a_folder(old / "folder", fail)
    assert (old / "file.json").read_text() == "old"
    assert names(old / "folder") == ["old.txt"]
    assert names(old) == ["file.json", "folder"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_disk_that_fills_up_at_the_very_end_is_noticed(
    old: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        full()

    if fails == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match="the disk is full"):
        write_file(old / "file.json", lambda file: file.write(b"new"))
    assert (old / "file.json").read_text() == "old"
    assert names(old) == ["file.json", "folder"]


def test_what_is_written_is_flushed_to_disk_before_it_takes_its_name(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")  # noqa: PTH112
        fsync(descriptor)

    def spy_replace(path: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    write_file(old / "file.json", lambda file: file.write(b"new"))
    assert calls == ["file", "rename", "folder"]


@settings(deadline=None, max_examples=50)
@given(PLAIN)
def test_json_has_the_same_bytes_for_the_same_value_and_reads_back(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "1.json", Path(folder) / "2.json"
        write_json(first, value)
        write_json(second, json.loads(first.read_text(encoding="utf-8")))
        assert json.loads(first.read_text(encoding="utf-8")) == value
        assert first.read_bytes() == second.read_bytes()
        assert first.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_what_is_no_number(old: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(old / "file.json", {"deep": [value]})
    assert (old / "file.json").read_text() == "old"
    assert names(old) == ["file.json", "folder"]


# Digests


@pytest.fixture
def awkward(tmp_path: Path) -> Path:
    """Names with a space, of another alphabet, in an order that a locale would change; links."""
    tree = {"with space.txt": b"1", "grüße/ß.txt": b"2", "B": b"3", "a": b"4", "a-b": b"5", "_": b""}
    plant(tmp_path / "tree", {**tree, "deep/er/est": b"\0\n", ".hidden": b"6", "a.b/c": b"7", "'quoted'": b"8"})
    plant(tmp_path / "elsewhere", {"one": b"9", "two/three": b"10"})
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "elsewhere" / "one")
    (tmp_path / "tree" / "linked folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree" / "empty").mkdir()
    return tmp_path / "tree"


def test_tree_digest_is_what_the_command_in_its_docstring_prints(awkward: Path) -> None:
    (command,) = re.findall(r"`(find .*)`", tree_digest.__doc__ or "")
    done = subprocess.run(["bash", "-c", command], cwd=awkward, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [tree_digest(awkward), "-"]


def test_a_copy_that_follows_links_has_the_same_digest(awkward: Path, tmp_path: Path) -> None:
    shutil.copytree(awkward, tmp_path / "copy")
    assert not any(path.is_symlink() for path in (tmp_path / "copy").rglob("*"))
    assert tree_digest(tmp_path / "copy") == tree_digest(awkward)


def test_names_that_are_no_utf_8_have_a_digest_too(tmp_path: Path) -> None:
    file = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    Path(os.fsdecode(file)).write_bytes(b"x")
    assert len(tree_digest(tmp_path)) == 64


@settings(deadline=None, max_examples=60)
@given(TREES, TREES, st.randoms(use_true_random=False))
def test_tree_digests_are_equal_exactly_when_names_and_contents_are(
    one: dict[str, bytes], other: dict[str, bytes], random: Any
) -> None:
    shuffled = list(one.items())
    random.shuffle(shuffled)
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for index, tree in enumerate((one, dict(shuffled), other)):
            (Path(folder) / str(index)).mkdir()
            plant(Path(folder) / str(index), tree)
            found.append(tree_digest(Path(folder) / str(index)))
    assert found[0] == found[1], "the order of creation and the place of the folder are no content"
    assert (found[0] == found[2]) == (one == other)


def test_a_tree_digest_sees_one_byte_one_name_and_one_file(tmp_path: Path) -> None:
    base = {"a": b"1", "b": b"2"}
    variants = [base, {"a": b"2", "b": b"1"}, {"a": b"1", "c": b"2"}, {"a": b"1", "x/b": b"2"}, {"a": b"1"}]
    for index, tree in enumerate([*variants, {**base, "empty": b""}]):
        (tmp_path / str(index)).mkdir()
        plant(tmp_path / str(index), tree)
    found = [tree_digest(tmp_path / name) for name in names(tmp_path)]
    assert len(set(found)) == len(found)


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


def canonical(value: Any) -> Any:
    """Equality that tells 1, 1.0 and True apart, as JSON does."""
    if isinstance(value, dict):
        return {key: canonical(item) for key, item in value.items()}
    return [canonical(item) for item in value] if isinstance(value, list) else repr(value)


@given(PLAIN, PLAIN)
def test_digest_is_independent_of_the_order_of_keys_and_of_nothing_else(one: Any, other: Any) -> None:
    assert digest(one) == digest(reordered(one))
    assert (digest(one) == digest(other)) == (canonical(one) == canonical(other))
    assert digest([1, 2]) != digest([2, 1])


def test_sha256_is_that_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(3 * 2**18 + 1))
    done = subprocess.run(["sha256sum", str(tmp_path / "big")], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == sha256(tmp_path / "big")
