"""Runs a script's `main(rank, *arguments)` in processes that are forked from one that has imported rlmt.

The import takes longer than most tests.
"""

import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PRELOAD = ["rlmt.cli.lightning_cli", "rlmt.callbacks", "rlmt.modules"]
"""The same modules as in benchmarks/crash.py, since a process has one fork server."""


def run_ranks(script: Path, *arguments: object, ranks: int = 2, environment: Mapping[str, str] | None = None) -> None:
    """Runs `main` once per rank and waits for all.

    Args:
        script: Python file that defines `main(rank, *arguments)`.
        *arguments: Further arguments of `main`.
        ranks: Number of processes.
        environment: Environment variables of the processes, added to those of the fork server.

    Raises:
        ProcessRaisedException: A rank raised an exception; the message holds its traceback.
        ProcessExitedException: A rank exited with another status than 0.
    """
    from torch.multiprocessing import start_processes

    multiprocessing.set_forkserver_preload(PRELOAD)
    passed = (script, arguments, dict(environment or {}))
    context = start_processes(run_main, passed, nprocs=ranks, join=False, start_method="forkserver")
    try:
        while not context.join():
            pass
    finally:
        for process in context.processes:
            process.kill()


def run_main(rank: int, script: Path, arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    """Imports the script and calls its `main`."""
    os.environ.update(environment)
    sys.path.insert(0, str(script.parent))
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    spec.loader.exec_module(module)
    module.main(rank, *arguments)
