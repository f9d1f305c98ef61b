"""Run a module so that it ends with its parent: `python -m pipelines.child PARENT MODULE [ARGUMENT...]`.

A `kill -9` of the flow leaves it no time to end anything. The kernel then ends what was started through this module,
and the stage under DVC asks for the same (`stages.command.end_with_parent`).
"""

import os
import runpy
import signal
import sys
from types import FrameType
from typing import NoReturn

from stages.command import end_with_parent


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module as a child of this process."""
    return [sys.executable, "-m", "pipelines.child", str(os.getpid()), module, *arguments]


def wait_for_children(signum: int, frame: FrameType | None) -> None:
    """On SIGTERM to a process group: its members save themselves first, and whoever waits for them outlives them.

    DVC would otherwise end at once, and the kernel would end the stage that is about to write its checkpoint.
    """
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        sys.exit(128 + signum)


def main() -> NoReturn:
    """Become the module."""
    parent, module = int(sys.argv[1]), sys.argv[2]
    end_with_parent()
    if os.getppid() != parent:
        sys.exit(1)
    signal.signal(signal.SIGTERM, wait_for_children)
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
