"""Run what is not up to date in dvc.yaml as a Prefect flow: `python -m pipelines.distillation`."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from data.errors import UserError
from pipelines import graph, summary
from pipelines.execution import Result, only_flow
from pipelines.graph import Step
from pipelines.services import prefect_api

EPILOG = """examples:
  python -m pipelines.distillation --plan                     what would run, and why
  python -m pipelines.distillation                            everything that is not up to date
  python -m pipelines.distillation --task recognition         one task
  python -m pipelines.distillation distill@recognition-kd     one stage and what it needs
  python -m pipelines.distillation distill                    every student

Without PREFECT_API_URL a temporary server is used, with its database in .prefect/. Exit code 1: a stage failed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.distillation",
        description="Run the stages of dvc.yaml that are not up to date, side by side where cores allow it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", metavar="TARGET", nargs="*", help="name of a stage; all without any")
    parser.add_argument("--task", help="only stages of this task, and what they need")
    parser.add_argument("--plan", action="store_true", help="print what would run and why, and start nothing")
    options = parser.parse_args(arguments)
    # Not basicConfig: every request that Prefect makes would be told as well.
    logging.getLogger("distillery").addHandler(logging.StreamHandler())
    try:
        if options.plan:
            print(summary.plan(graph.read().select(options.targets, options.task).plan()))
            return 0
        with only_flow():
            return _run(graph.read().select(options.targets, options.task).plan(), options)
    except UserError as error:
        print(f"error in distillation: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one was", file=sys.stderr)
        return 130


def _run(steps: Sequence[Step], options: argparse.Namespace) -> int:
    """Run the flow; a temporary server is not worth its start where nothing is to do."""
    if not any(step.runs for step in steps) and not os.environ.get("PREFECT_API_URL"):
        results = {step.stage.name: Result("cached") for step in steps}
        print(summary.terminal(steps, results))
        print("everything is up to date")
        return 0
    with prefect_api():
        from pipelines import flow

        token = flow.planned.set(steps)
        try:
            state: Any = flow.distillation(targets=options.targets, task=options.task, return_state=True)
        finally:
            flow.planned.reset(token)
            flow.flush_logs()
        return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())
