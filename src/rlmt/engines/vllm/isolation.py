"""vLLM as a guest in the trainer's process: what it changes there is put back, and what it keeps to itself is heard."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import distributed

from rlmt.distributed import collectives


@contextmanager
def preserve_process_state() -> Iterator[None]:
    """Puts back what vLLM changes in the process that it starts in."""
    dtype, threads, hook = torch.get_default_dtype(), torch.get_num_threads(), sys.excepthook
    set_num_threads = torch.set_num_threads
    try:
        with isolate_rng():  # vLLM seeds Python, NumPy and torch
            yield
    finally:
        # vLLM's CPU worker replaces set_num_threads by a warning, since it binds threads in processes of its own. It
        # binds none here.
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        sys.excepthook = hook  # torch.distributed puts the rank before every line of a traceback


@contextmanager
def rank_environment() -> Iterator[None]:
    """Tells vLLM, which reads the environment, which rank of a run this process is; without effect on one process."""
    if collectives.world_size() == 1:
        yield
        return
    number = str(collectives.rank())
    # On GPUs vLLM takes it for the number of its own, which need not be the rank's (--trainer.devices "[2,3]").
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        local = str(torch.cuda.current_device())
    else:
        local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or number
    # On a CPU vLLM would bind the threads of every rank to the same cores.
    names = {"RANK": number, "LOCAL_RANK": local, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with mock.patch.dict(os.environ, names):
        yield


@contextmanager
def collect_not_loaded() -> Iterator[list[str]]:
    """Collects vLLM's complaints about weights that a reload left as they were; it raises nothing."""
    complaints: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "not loaded" in record.getMessage():
                complaints.append(record.getMessage())

    logger = logging.getLogger("vllm.model_executor.model_loader.reload.inplace")
    handler, level = Collector(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)  # of this logger alone: the handler that prints keeps its own level
    try:
        yield complaints
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def keep_process_group() -> Iterator[None]:
    """Keeps the trainer's default process group alive while vLLM, which destroys it without asking, shuts down."""
    destroy = distributed.destroy_process_group

    def destroy_others(group: Any = None) -> None:
        if group is not None:
            destroy(group)

    with mock.patch.object(distributed, "destroy_process_group", destroy_others):
        yield
