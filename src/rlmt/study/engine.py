"""Runs Snakemake on a study in a process of its own: `python -m rlmt.study.engine` reads a request and prints events.

A process of its own keeps Snakemake's signal handlers, working directory and logger out of `rlmt study`, and ends all
jobs when it ends.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

_FIELDS = {
    "run_info": ("stats",),
    "job_info": ("jobid", "output", "reason"),
    "job_error": ("jobid", "aux"),
    "job_finished": ("job_id",),
}
"""Event of Snakemake → attributes of its log record that are passed on."""


@dataclass
class Request:
    """What Snakemake is asked to do."""

    targets: list[str]
    """Files to make, relative to the study's folder."""
    threads: int
    """CPU threads of each job."""
    jobs: int
    """Maximum number of parallel jobs."""
    executor: str = "local"
    """local, slurm or dryrun."""
    resources: dict[str, int | str] = field(default_factory=dict)
    """Default resources of each job on a cluster."""
    folder: str = ""
    """The study's folder, where Snakemake works."""
    config: str = ""
    """File with the config of rlmt/study/Snakefile."""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))


class _EventHandler(logging.Handler):
    """Prints Snakemake's events as lines of JSON, and its warnings and errors as events of their own."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one event."""
        event = getattr(record, "event", None)
        name = getattr(event, "value", None)
        if name in _FIELDS:
            self.send(name, {attribute: getattr(record, attribute, None) for attribute in _FIELDS[name]})
        elif record.levelno >= logging.WARNING and record.msg:
            self.send("message", {"text": record.getMessage(), "error": record.levelno >= logging.ERROR})

    def send(self, name: str, values: Mapping[str, Any]) -> None:
        """Prints one event."""
        print(json.dumps({"event": name, **values}, default=str), file=self._stream, flush=True)


def _count_single_jobs(scheduler: Any) -> None:
    """Makes Snakemake's scheduler debit the cores of a job that it selects alone.

    Snakemake 9.10 to 9.15 frees them when the job ends, without having debited them before, so that more and more jobs
    run at a time (https://github.com/snakemake/snakemake/issues/3913).

    Args:
        scheduler: The class of the scheduler.
    """
    select = scheduler.job_selector

    def select_and_debit(self: Any, jobs: Any) -> Any:
        before = dict(self.resources)
        selected = select(self, jobs)
        if selected and self.resources == before:
            self.update_available_resources(selected)
        return selected

    scheduler.job_selector = select_and_debit


def _run(request: Request, handler: _EventHandler) -> None:
    """Runs Snakemake and passes its events to the handler."""
    from snakemake.api import SnakemakeApi
    from snakemake.logging import logger
    from snakemake.resources import DefaultResources
    from snakemake.scheduling.greedy import SchedulerSettings
    from snakemake.scheduling.job_scheduler import JobScheduler
    from snakemake.settings.enums import RerunTrigger
    from snakemake.settings.types import (
        ConfigSettings,
        DAGSettings,
        ExecutionSettings,
        OutputSettings,
        RemoteExecutionSettings,
        ResourceSettings,
        SchedulingSettings,
    )  # fmt: skip
    from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry

    _count_single_jobs(JobScheduler)
    local = request.executor in ("local", "dryrun")
    settings: Any = None
    if not local:
        plugin = ExecutorPluginRegistry().get_plugin(request.executor)
        settings = plugin.settings_cls(requeue=True)
    with SnakemakeApi(OutputSettings(dryrun=request.executor == "dryrun", enable_file_logging=False)) as api:
        for default in list(logger.handlers):
            logger.removeHandler(default)
        logger.addHandler(handler)
        default_resources = None if local else DefaultResources([f"{k}={v!r}" for k, v in request.resources.items()])
        workflow = api.workflow(
            ResourceSettings(
                cores=request.threads * request.jobs if local else None,
                nodes=None if local else request.jobs,
                default_resources=default_resources,
            ),
            ConfigSettings(configfiles=[Path(request.config)]),
            snakefile=Path(__file__).with_name("Snakefile"),
            workdir=Path(request.folder),
        )
        # The code of the rules is left out: it changes with the version of rlmt, which is one of the params.
        triggers = frozenset({RerunTrigger.MTIME, RerunTrigger.PARAMS, RerunTrigger.INPUT})
        workflow.dag(
            DAGSettings(targets=frozenset(request.targets), rerun_triggers=triggers, force_incomplete=True)
        ).execute_workflow(
            executor=request.executor,
            # rlmt study holds a lock that ends with its process; Snakemake's would stay after a kill.
            execution_settings=ExecutionSettings(keep_going=True, lock=False),
            scheduling_settings=SchedulingSettings(scheduler="greedy"),
            scheduler_settings=SchedulerSettings(),
            remote_execution_settings=RemoteExecutionSettings(seconds_between_status_checks=10),
            executor_settings=settings,
        )


def main() -> int:
    """Reads a request from standard input, runs Snakemake, and prints its events to standard output."""
    handler = _EventHandler(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # only events are printed to standard output
    request = Request(**json.loads(sys.stdin.read()))
    try:
        _run(request, handler)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        handler.send("message", {"text": str(error) or type(error).__name__, "error": True})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
