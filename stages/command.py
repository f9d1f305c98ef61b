"""The command line of every stage: its arguments, its errors, and its end when its parent ends."""

import argparse
import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from data.errors import UserError
from data.files import is_disk_full

log = logging.getLogger("distillery")


def run(
    stage: str,
    description: str,
    act: Callable[[str], Any],
    *,
    key: str,
    example: str,
    optional: bool = False,
) -> None:
    """Parse the command line, act, and exit: 0 when the output is complete, 1 after a mistake of the user's.

    Args:
        key: what the one argument names ("data set", "student", ...).
        optional: the argument may be left out; `act` then gets an empty string.
    """
    end_with_parent()
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{stage}",
        description=description,
        epilog=f"example: python -m stages.{stage} {example}",
    )
    parser.add_argument(
        "key",
        metavar=key.upper().replace(" ", "-"),
        nargs="?" if optional else None,
        default="",
        help=f"name of a {key} in params.yaml",
    )
    name = parser.parse_args().key
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with errors_told(f"{stage} {name}".strip()):
        act(name)


@contextlib.contextmanager
def errors_told(what: str, explain: Callable[[Exception], str | None] = lambda error: None) -> Iterator[None]:
    """End the process with exit code 1 and one paragraph after what the user can mend; 130 after an interruption.

    Args:
        what: the command, as it stands in the message.
        explain: says the same of errors that only this command knows, None of all others.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the output (`| head`) has seen enough; what is still buffered must not fail on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if isinstance(error, UserError):
            reason: str | None = str(error)
        elif is_disk_full(error):
            reason = "the disk is full · free some space and run it again"
        elif isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError):
            reason = f"{error.filename}: {error.strerror} · mend it, and run it again"
        else:
            reason = explain(error)
        if reason is None:
            raise
        print(f"error in {what}: {reason}", file=sys.stderr)
        sys.exit(1)


def end_with_parent() -> None:
    """Ask the kernel (Linux) to end this process when the thread that started it ends.

    A `kill -9` of dvc would otherwise leave the stage running, and the next run would collide with it.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
