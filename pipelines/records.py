"""Records to MLflow: the only writer of runs. Trainings and evaluations write files and know nothing of it.

One experiment per task. In it a parent run per pipeline run, and below it a run per stage that trained or evaluated:

- A *pipeline run* is what `--pipeline-run`, or DISTILLERY_PIPELINE_RUN, names (the flow gives its own id). Otherwise it
  is the state of the working tree: the revision, and a digest of what is uncommitted (dvc.lock apart). It appears when
  a run first belongs to it. Its tags `stage.STAGE/KEY` name the run of every record that lay there, older ones too.
- A *stage's run* is the run of one record, for ever: a record that DVC restored leads to the run that it had before.
  Records of trainings that are under way grow in MLflow too; a training that was killed is KILLED until it goes on.

Nothing is lost while MLflow is away: the records lie on disk, and the next `sync` writes what is missing, once.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from data.errors import UserError
from data.files import digest
from pipelines import tracking
from pipelines.record_files import QUIET_SECONDS, Tree, find, read_tree
from pipelines.record_writer import ACTIVE_ONLY, FOLLOW_LOCK, Writer

log = logging.getLogger("distillery")

PIPELINE_RUN = "DISTILLERY_PIPELINE_RUN"
POLL_SECONDS, SYSTEM_SECONDS = 1.0, 10.0
SYNC_LOCK = Path(f"{tracking.DATABASE}.sync-lock")


def sync(pipeline_run: str = "", tree: Tree | None = None) -> list[str]:
    """Write everything that MLflow lacks, once.

    Args:
        pipeline_run: what new runs belong to; empty: DISTILLERY_PIPELINE_RUN, or the state of the working tree.
        tree: the working tree when the pipeline run began; None: as it is now.

    Returns:
        what could not be written, and why.

    Raises:
        UserError: MLflow cannot be used now. What was written stays, and the next call goes on.
    """
    tree = tree or read_tree()
    name = _pipeline_run(pipeline_run, tree)
    client = tracking.connect()
    with _alone(), _telling_of_mlflow():
        sources, problems = find()
        writer = Writer(client, name, tree)
        problems += writer.write(sources, sources)
    if writer.created or writer.lines:
        log.info("%s: %d new runs, %d new lines", tracking.address(), writer.created, writer.lines)
    else:
        log.info("%s: nothing new in %d records", tracking.address(), len(sources))
    return problems


def follow(ended: Callable[[], bool], pipeline_run: str = "") -> list[str]:
    """Write records while they grow, until `ended`; then everything once more, as `sync` does.

    Args:
        ended: asked ten times a second.

    Returns:
        as `sync`.

    Raises:
        UserError: MLflow cannot be used in the end. On the way that is one warning, and tried again.
    """
    tree = read_tree()
    name = _pipeline_run(pipeline_run, tree)
    follower = _Follower(name, tree)
    with FOLLOW_LOCK.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        while not ended():
            follower.poll()
            until = time.monotonic() + POLL_SECONDS
            while time.monotonic() < until and not ended():
                time.sleep(0.1)
    return sync(name, dataclasses.replace(tree, lock=read_tree().lock))


class _Follower:
    def __init__(self, pipeline_run: str, tree: Tree) -> None:
        self._pipeline_run, self._tree = pipeline_run, tree
        self._writer: Writer | None = None
        self._seen: dict[str, str] = {}
        self._written: dict[str, str] = {}
        self._away = False
        self._system_at = 0.0

    def poll(self) -> None:
        """Write what changed."""
        try:
            if self._writer is None:
                self._writer = Writer(tracking.connect(), self._pipeline_run, self._tree)
            with _alone(), _telling_of_mlflow():
                self._write(self._writer)
        except UserError as error:
            if not self._away:
                log.warning("%s (the records wait on disk; it is tried again)", error)
            self._away, self._writer = True, None
        else:
            if self._away:
                log.info("MLflow answers again")
            self._away = False

    def _write(self, writer: Writer) -> None:
        every, _ = find(quiet_seconds=QUIET_SECONDS)  # what is being replaced is told of in the end, if it still is
        before, self._seen = self._seen, {}
        changed = []
        for source in every:
            state = digest([source.finished, source.alive, source.modified, len(source.lines), source.description])
            self._seen[source.identity] = state
            # DVC restores a folder file by file: a finished one is read when it has lain still for a moment.
            if self._written.get(source.identity) != state and not (
                source.finished and before.get(source.identity) != state
            ):
                changed.append(source)
        if changed:
            writer.write(changed, every)
            self._written |= {source.identity: self._seen[source.identity] for source in changed}
        if time.monotonic() - self._system_at > SYSTEM_SECONDS:
            writer.log_system()
            self._system_at = time.monotonic()


def run_id(stage: str, key: str) -> tuple[str, str] | None:
    """Experiment and run of a stage, by the record that lies there now; None if it has none.

    Raises:
        UserError: MLflow cannot be used.
    """
    sources = [source for source in find()[0] if (source.stage, source.key) == (stage, key)]
    if not sources:
        return None
    newest = max(sources, key=lambda source: (source.finished, source.modified))
    client = tracking.connect()
    with _telling_of_mlflow():
        experiment = client.get_experiment_by_name(newest.task)
        if experiment is None:
            return None
        wanted = f"tags.`sync.identity` = '{newest.identity}'"
        found = client.search_runs([experiment.experiment_id], wanted, ACTIVE_ONLY, 1)
        return (experiment.experiment_id, found[0].info.run_id) if found else None


def run_url(stage: str, key: str) -> str | None:
    """The page of a stage's run.

    None where there is no such run, where MLflow does not answer, and where runs lie in a database without a server
    (`run_id` finds them there too).
    """
    try:
        if not tracking.address().startswith(("http://", "https://")):
            return None
        found = run_id(stage, key)
    except UserError:
        return None
    return f"{tracking.address()}/#/experiments/{found[0]}/runs/{found[1]}" if found else None


def _pipeline_run(given: str, tree: Tree) -> str:
    name = given or os.environ.get(PIPELINE_RUN, "") or tree.name
    if not re.fullmatch(r"[\w.:-]{1,100}", name):
        raise UserError(f"{name!r} is no name of a pipeline run · use letters, digits and . : - _, at most 100")
    return name


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process of this checkout writes at a time; the others wait for as long as it takes."""
    with SYNC_LOCK.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _telling_of_mlflow() -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(tracking.explain(error)) from error


def _end_of(pid: int) -> Callable[[], bool]:
    """Whether a process has ended; another one that got its number later does not count."""
    import psutil  # type: ignore[import-untyped]

    try:
        process = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return lambda: True

    def ended() -> bool:
        try:
            return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return ended


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.records",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: dvc repro && python -m pipelines.records sync",
    )
    command = parser.add_subparsers(required=True, metavar="sync").add_parser(
        "sync",
        help="write to MLflow what it lacks",
        description="Write to MLflow what it lacks: MLFLOW_TRACKING_URI, or mlflow.db here.",
        epilog="example: python -m pipelines.records sync --follow --until-pid $$",
    )
    command.add_argument("--follow", action="store_true", help="go on until SIGTERM, SIGINT or the end of --until-pid")
    command.add_argument("--until-pid", type=int, metavar="PID", help="with --follow: end when this process has ended")
    command.add_argument(
        "--pipeline-run",
        default="",
        metavar="ID",
        help=f"what new runs belong to (default: ${PIPELINE_RUN}, or the state of the working tree)",
    )
    arguments = parser.parse_args()
    if arguments.until_pid is not None and not arguments.follow:
        parser.error("--until-pid is for --follow")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    try:
        problems = _follow(arguments) if arguments.follow else sync(arguments.pipeline_run)
    except UserError as error:
        problems = [str(error)]
    for problem in problems:
        print(f"error in records: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


def _follow(arguments: argparse.Namespace) -> list[str]:
    arrived: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        arrived.append(signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, note)
    gone = _end_of(arguments.until_pid) if arguments.until_pid is not None else lambda: False
    return follow(lambda: bool(arrived) or gone(), arguments.pipeline_run)


if __name__ == "__main__":
    main()
