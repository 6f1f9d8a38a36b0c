"""Signals that ask a run to end: it saves, and leaves with the exit status that schedulers expect."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer

from rlmt.distributed.lightning_internals import cluster_environment


class StoppedBySignal(SystemExit):
    """A signal asked the process to end.

    Args:
        number: of the signal; the exit status is 128 + number, as a shell gives it.
        shared: whether all ranks of the run end at the same point.
    """

    def __init__(self, number: int, shared: bool = False) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)
        self.shared = shared


class SignalHandler:
    """Turns signals into `Stopped`: at once where the run can be saved as it is, else at the end of the step.

    The signals are Ctrl-C, SIGTERM and, in a SLURM job that Lightning would requeue, its preemption signal. A second
    one of them does not wait.

    Args:
        savable: whether an exception now would leave a moment that can be saved.
    """

    def __init__(self, savable: Callable[[], bool]) -> None:
        self._savable = savable
        self._before: dict[int, Any] = {}
        self._requeue_signal: int | None = None
        self.asked: int | None = None
        """The signal that came, if one did."""

    def listen(self, trainer: Trainer) -> None:
        """Takes over the signals from Lightning, which would end a step early, save within one, or leave with 0.

        Only the main thread can; in another one signals stay as they are.
        """
        self.asked = None
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        environment = cluster_environment(trainer)
        self._requeue_signal = None
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = environment.requeue_signal or signal.SIGUSR1
            numbers.append(signal.Signals(self._requeue_signal))
        for number in numbers:
            self._before[number] = signal.signal(number, self._on_signal)

    def leave(self) -> None:
        """Gives the signals back; harmless when called twice."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def check(self, shared: bool = False) -> None:
        """Raises `Stopped` where a signal came; to be called where the run can be saved.

        Args:
            shared: whether all ranks have agreed that one came.
        """
        if self.asked is not None:
            raise StoppedBySignal(self.asked, shared)

    def requeue(self) -> None:
        """Has SLURM start the job again, where its preemption signal was the one."""
        if self.asked is not None and self.asked == self._requeue_signal:
            array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID", "")
            job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}" if array else job
            if re.fullmatch(r"[0-9_]+", job):
                done = subprocess.run(["scontrol", "requeue", job], check=False)
                how = "requeued" if done.returncode == 0 else f"scontrol requeue failed ({done.returncode})"
                print(f"rlmt: SLURM job {job}: {how}", file=sys.stderr, flush=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self.asked is not None
        self.asked = number
        if again or self._savable():
            raise StoppedBySignal(number)
        name = signal.Signals(number).name
        # Not by print: the signal may have come in the middle of one.
        os.write(2, f"rlmt: {name}: leaving at the end of this step, or at once if sent again\n".encode())
