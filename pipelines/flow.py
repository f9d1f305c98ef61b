"""The Prefect flow. It is derived from dvc.yaml whenever it runs: one task per stage that is not up to date.

DVC owns what is up to date, so that Prefect neither caches nor keeps results. Prefect owns when, retries and what can
be seen of it. Only this module imports Prefect; `pipelines.distillation` imports it when a flow really runs.
"""

import contextlib
import time
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.logging.handlers import APILogWorker
from prefect.runtime import flow_run
from prefect.states import Cancelled, Failed

from pipelines import graph, summary
from pipelines.execution import Processes, Result, Room, StageError, counts, execute, only_flow
from pipelines.graph import Stage, Step
from pipelines.services import live_records

RETRIES = 1  # of a stage that was killed; it goes on at its checkpoint
# The command line has asked DVC and holds the checkout already, and prints what stages say.
planned: ContextVar[Sequence[Step] | None] = ContextVar("planned", default=None)


@flow(name="distillation", persist_result=False, validate_parameters=True)
def distillation(targets: list[str] | None = None, task: str | None = None) -> Any:
    """Run what is not up to date in dvc.yaml, and write a summary of everything that was asked for.

    Args:
        targets: names of stages; all without any. task: only stages of this task, and what they need.
    """
    steps = planned.get()
    with contextlib.ExitStack() as stack:
        if steps is None:
            stack.enter_context(only_flow())
            steps = graph.read().select(targets or (), task).plan()
        results, seconds = _run(steps, echo=planned.get() is not None)
    table = summary.markdown(steps, results, seconds)
    create_markdown_artifact(key="distillation", markdown=table, description="How every stage ended")
    if planned.get() is not None:
        print(f"{summary.terminal(steps, results)}\n{summary.sentence(results)} in {seconds:.0f} s")
    if not all(result.well for result in results.values()):
        return Failed(message=summary.sentence(results))
    return counts(results)


def _run(steps: Sequence[Step], echo: bool) -> tuple[dict[str, Result], float]:
    """Results and seconds of all stages."""
    begun = time.monotonic()
    if not any(step.runs for step in steps):
        return {step.stage.name: Result("cached") for step in steps}, 0.0
    processes = Processes()
    futures: dict[str, PrefectFuture[Any]] = {}

    def start(stage: Stage, gpus: tuple[str, ...], ended: Any) -> None:
        outcome: list[Result] = []
        run = _task(stage, processes, gpus, outcome, echo)
        # They have ended; Prefect draws its edges from this.
        futures[stage.name] = run.submit(wait_for=[futures[name] for name in stage.upstream if name in futures])
        crashed = Result("failed", reason="Prefect did not run it; its log says why")
        futures[stage.name].add_done_callback(lambda _: ended(outcome[-1] if outcome else crashed))

    with live_records(str(flow_run.id)):
        try:
            results = execute(steps, Room(), start)
        except BaseException:
            # Cancelled, SIGTERM or Ctrl-C. The pool of threads waits for its tasks, and they for these processes.
            processes.stop()
            raise
        for name, result in results.items():
            if result.status == "skipped":
                _skip.with_options(name=name, task_run_name=name)(result.reason, return_state=True)
                if echo:
                    summary.say(name, f"skipped: {result.reason}")
    return results, time.monotonic() - begun


def _task(stage: Stage, processes: Processes, gpus: Sequence[str], outcome: list[Result], echo: bool) -> Any:
    """The Prefect task of one stage. `outcome` gets a result per attempt."""

    @task(
        name=stage.name,
        task_run_name=stage.name,
        # Prefect asks its server about a limit for every tag: `prefect concurrency-limit create gpu 1` bounds several
        # flows. Within this one, Room does.
        tags={"gpu"} if stage.gpus else None,
        retries=RETRIES,
        retry_condition_fn=_worth_another_try,
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    def run() -> str:
        logger = get_run_logger()

        def said(line: str) -> None:
            logger.info(line)
            if echo:
                summary.say(stage.name, line)

        begun = time.monotonic()
        try:
            result = processes.run(stage, gpus, said)
        except StageError as error:
            outcome.append(Result("failed", time.monotonic() - begun, str(error)))
            said(f"failed: {error}")
            raise
        outcome.append(result)
        return result.status

    return run


def _worth_another_try(task: Any, task_run: Any, state: State[Any]) -> bool:
    """A killed stage goes on where it stopped; a mistake of the user's stays one."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageError) and error.killed


@task(cache_policy=NO_CACHE, persist_result=False)
def _skip(reason: str) -> Any:
    """A stage that could not run: seen in Prefect, never started."""
    return Cancelled(name="Skipped", message=reason)


def flush_logs() -> None:
    """Send what Prefect still keeps, before its server ends."""
    APILogWorker.drain_all(timeout=5)
