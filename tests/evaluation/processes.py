"""Commands in processes that are killed."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable

from rlmt.cli.commands import main


def run_in_process(words: list[str], ready: Callable[[], bool] | None = None) -> int | None:
    """Runs `rlmt` in a forked process, kills it when `ready`, and returns its exit code."""
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(main(words)))
    process.start()
    while ready is not None and not ready():
        assert process.exitcode is None
        time.sleep(0.002)
    if ready is not None:
        process.kill()
    process.join()
    return process.exitcode
