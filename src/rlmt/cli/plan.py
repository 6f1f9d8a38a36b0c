"""`rlmt plan`: what a run will hold in a device's memory, phase by phase, told before anything is loaded.

It takes the options of `rlmt fit` and reads the models' configs alone; the sums are in `rlmt.memory.budget`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.table import Table

from rlmt.cli.lightning_cli import RLMTCLI, run
from rlmt.data import RolloutDataModule
from rlmt.distributed.fsdp2 import FSDP2
from rlmt.errors import UserError
from rlmt.memory.budget import GIB, PHASES, Budget, gib, make_budget
from rlmt.memory.bytes import Devices
from rlmt.modules import RLMTModule
from rlmt.options import PositiveFloat


def print_budget(budget: Budget, console: Console | None = None) -> None:
    """Prints the table, the verdict and the remarks.

    Args:
        budget: what to print.
        console: where to; standard output by default.
    """
    console = console or Console(highlight=False)
    table = Table("GiB", *PHASES, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for part in budget.parts:
        sizes = [getattr(part, phase) for phase in PHASES]
        table.add_row(part.name, *(gib(size) if size else "" for size in sizes))
    table.add_section()
    table.add_row("total", *(gib(budget.total(phase)) for phase in PHASES), style="bold")
    console.print(table)
    spare = budget.memory - budget.total(budget.peak)
    verdict = f"yes, {gib(spare)} GiB to spare" if budget.fits else "no"
    if spare < 0:
        verdict += f", {gib(-spare)} GiB too much"
    console.print(f"\nPeak: {gib(budget.total(budget.peak))} GiB, in {budget.peak}.")
    console.print(f"Fits in {budget.memory / GIB:.0f} GB: {verdict}.")
    for line in (*budget.problems, *budget.remarks):
        console.print(line, soft_wrap=True)


class PlanCLI(RLMTCLI):
    """Takes what `rlmt fit` takes, and tells instead of training."""

    def before_fit(self) -> None:
        """Nothing: no checkpoint is read."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of the plan alone."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--memory", type=PositiveFloat | None, default=None, help="GiB of the device; that of the one here"
        )
        parser.add_argument("--must_fit", type=bool, default=False, help="fail when the run does not fit")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer for the CPU, whatever device is planned for."""
        return super().instantiate_trainer(
            **{**kwargs, "accelerator": "cpu", "devices": 1, "strategy": "auto", "num_nodes": 1}
        )

    def fit(self, **kwargs: Any) -> None:
        """Prints the budget.

        Raises:
            UserError: it is no RL run, the device's memory is not known, or the run must fit and does not.
        """
        if not (isinstance(self.model, RLMTModule) and isinstance(self.datamodule, RolloutDataModule)):
            raise UserError(
                f"`rlmt plan` knows RL runs alone, not those of {type(self.model).__name__}: plan an RL run of the "
                "same model, its weights, adapter, optimizer and gradients are the same."
            )
        given = self._get(self.config_init, "memory")
        if given is None:
            if not torch.cuda.is_available():
                raise UserError("There is no GPU here to plan for: give --memory, its GiB (24 for a card of 24 GB).")
            memory = torch.cuda.mem_get_info()[1]
        else:
            memory = round(given * GIB)
        compute = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else torch.float32
        budget = make_budget(self.model, self.datamodule, compute, memory, self._spread())
        print_budget(budget)
        if self._get(self.config_init, "must_fit") and not budget.fits:
            raise UserError(f"--must_fit: the run does not fit in {memory / GIB:.0f} GB; see the table.")

    def _spread(self) -> Devices:
        """Over which devices the run is to be spread.

        Raises:
            UserError: their number is neither given nor to be seen here.
        """
        strategy = self._get(self.config_init, "trainer.strategy")
        sharded = isinstance(strategy, FSDP2)
        if not (sharded or isinstance(strategy, DDPStrategy) or str(strategy).startswith("ddp")):
            return Devices()
        given = self._get(self.config_init, "trainer.devices")
        listed = given.strip("[], ").split(",") if isinstance(given, str) and "," in given else given
        here = torch.cuda.device_count() if str(given) in ("auto", "-1") else listed
        count = len(here) if isinstance(here, list) else int(here)
        if count == 0:
            raise UserError("There is no GPU here to count: give --trainer.devices, how many a machine has.")
        ranks = count * int(self._get(self.config_init, "trainer.num_nodes") or 1)
        return Devices(ranks, sharded, sharded and strategy.offload)


def plan(args: Sequence[str]) -> int:
    """Runs `rlmt plan`.

    Args:
        args: options of `rlmt fit`, `--memory` and `--must_fit`.

    Returns:
        Exit status 0.

    Raises:
        UserError: a mistake in the configuration, or the run must fit and does not.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell of the CPU's trainer
    return run(["fit", *args], PlanCLI)
