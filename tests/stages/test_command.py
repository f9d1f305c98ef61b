"""The command line of every stage, as a user meets it."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.errors import UserError
from stages.command import errors_told

ROOT = Path(__file__).parents[2]
STAGES = (
    *("fetch", "prepare", "validate", "teach", "distill", "evaluate", "export"),
    *("influence", "latency", "parameters"),
)


@pytest.mark.parametrize("stage", STAGES)
def test_help_has_an_example(stage: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"example: python -m stages.{stage} " in done.stdout


def test_outside_the_root_a_user_is_told_where_to_go(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stages.fetch", "mnist"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "error in fetch mnist: params.yaml is missing · run commands from the root of the project\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("what · where · do"), "error in stage key: what · where · do\n"),
        (OSError(errno.ENOSPC, "full"), "error in stage key: the disk is full · free some space and run it again\n"),
        (PermissionError(13, "denied", "file"), "error in stage key: file: denied · mend it, and run it again\n"),
        (LookupError("known here"), "error in stage key: explained: known here\n"),
        (KeyboardInterrupt(), ""),
    ],
)
def test_errors_end_in_a_paragraph(error: BaseException, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def explain(error: Exception) -> str | None:
        return f"explained: {error}" if isinstance(error, LookupError) else None

    with pytest.raises(SystemExit) as ended, errors_told("stage key", explain):
        raise error
    assert ended.value.code == (1 if said else 130)
    assert capsys.readouterr().err == said


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(LookupError), errors_told("stage key"):
        raise LookupError("nobody knows")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process together with its parent")
def test_a_stage_ends_with_its_parent() -> None:
    child = (
        "from stages.command import end_with_parent; import time\n"
        "end_with_parent(); print('up', flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, text=True)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    until = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < until, "the child outlived its parent"
        time.sleep(0.01)


def test_a_reader_that_has_seen_enough_gets_no_traceback() -> None:
    code = (
        "from stages.command import errors_told\n"
        "with errors_told('report'):\n"
        "    for line in range(100_000): print('a line of a long table', line, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "a line of a long table 0\n"
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr is not None
    assert process.stderr.read() == ""
