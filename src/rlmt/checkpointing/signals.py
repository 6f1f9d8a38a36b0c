"""Signals that stop a run: it saves a checkpoint and exits with the status that schedulers expect."""

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
    """The process stops because of a signal.

    Args:
        number: Number of the signal; the exit status is 128 + number, as in a shell.
        shared: Whether all ranks stop at the same point.
    """

    def __init__(self, number: int, shared: bool = False) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)
        self.shared = shared


class SignalHandler:
    """Turns signals into `StoppedBySignal`: at once if a checkpoint can be written, else at the end of the step.

    The signals are Ctrl-C, SIGTERM and, in a SLURM job that Lightning would requeue, its preemption signal. A second
    signal in a step raises at once. One that follows the exception is announced only, since the run then writes its
    checkpoint; another one raises.

    Args:
        savable: Returns True if a checkpoint can be written after an exception at this point.
    """

    def __init__(self, savable: Callable[[], bool]) -> None:
        self._savable = savable
        self._before: dict[int, Any] = {}
        self._requeue_signal: int | None = None
        self.received: int | None = None
        """Number of the signal that was received; None if there was none."""
        self._stopping = self._announced = False

    def install(self, trainer: Trainer) -> None:
        """Installs the handlers in place of Lightning's, which end or save within a step or exit with status 0.

        This works only in the main thread; in another thread it does nothing.
        """
        self.received = None
        self._stopping = self._announced = False
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

    def restore(self) -> None:
        """Restores the previous handlers; a second call does nothing."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def check(self, shared: bool = False) -> None:
        """Raises `StoppedBySignal` if a signal was received; call it where a checkpoint can be written.

        Args:
            shared: Whether all ranks raise here.
        """
        if self.received is not None:
            self._stopping = True
            raise StoppedBySignal(self.received, shared)

    def requeue(self) -> None:
        """Requeues the SLURM job if its preemption signal was received."""
        if self.received is not None and self.received == self._requeue_signal:
            array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID", "")
            job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}" if array else job
            if re.fullmatch(r"[0-9_]+", job):
                done = subprocess.run(["scontrol", "requeue", job], check=False)
                how = "requeued" if done.returncode == 0 else f"scontrol requeue failed ({done.returncode})"
                print(f"rlmt: SLURM job {job}: {how}", file=sys.stderr, flush=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._stopping and not self._announced:
            self._announced = True
            _say(f"{name}: the run is stopping and writes its checkpoint; sent again, it stops without.")
            return
        again = self.received is not None
        self.received = number
        if again or self._savable():
            self._stopping = True
            raise StoppedBySignal(number)
        _say(f"{name}: stopping at the end of this step, or at once if sent again.")


def _say(line: str) -> None:
    os.write(2, f"rlmt: {line}\n".encode())  # print could be what the signal interrupts
