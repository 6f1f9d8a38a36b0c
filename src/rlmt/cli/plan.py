"""`rlmt plan`: the memory of a run on each device, phase by phase, before any weights are loaded.

It takes the options of `rlmt fit` and reads only the models' configs; `rlmt.memory.budget` computes the figures.
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
from rlmt.data import PreferenceDataModule, RolloutDataModule, SFTDataModule
from rlmt.distributed.fsdp2 import FSDP2
from rlmt.errors import UserError
from rlmt.memory.budget import format_gib, make_budget
from rlmt.memory.bytes import Parallelism
from rlmt.memory.cures import CARDS, Cure, find_cures, fitting_cards
from rlmt.memory.engine_options import choose_engine_options
from rlmt.memory.records import GIB, Budget
from rlmt.memory.supervised import make_supervised_budget
from rlmt.modules import SFT, RewardModeling, RLMTModule
from rlmt.modules.checks import check_residual
from rlmt.options import PositiveFloat
from rlmt.progress import busy


def print_budget(budget: Budget, console: Console | None = None) -> None:
    """Prints the table of a budget, whether it fits, problems and notes.

    Args:
        budget: Budget of a run.
        console: Console to print to; standard output by default.
    """
    console = console or Console(highlight=False)
    table = Table("GiB", *budget.phases, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in budget.lines:
        sizes = [getattr(line, phase) for phase in budget.phases]
        table.add_row(line.name, *(format_gib(size) if size else "" for size in sizes))
    table.add_section()
    table.add_row("total", *(format_gib(budget.total(phase)) for phase in budget.phases), style="bold")
    console.print(table)
    spare = budget.memory - budget.total(budget.peak)
    verdict = f"yes, {format_gib(spare)} GiB to spare" if budget.fits else "no"
    if spare < 0:
        verdict += f", {format_gib(-spare)} GiB too much"
    console.print(f"\nPeak: {format_gib(budget.total(budget.peak))} GiB, in {budget.peak}.")
    console.print(f"Fits in {budget.memory / GIB:.4g} GiB: {verdict}.")
    for text in (*budget.problems, *budget.notes):
        console.print(text, soft_wrap=True)
    fitting = fitting_cards(budget)
    for answer, fits in (("Fits on", True), ("Does not fit on", False)):
        cards = [f"{card} ({CARDS[card]:g})" for card in fitting if fitting[card] == fits]
        if cards:
            console.print(f"{answer}: {', '.join(cards)} GiB.", soft_wrap=True)


def print_cures(cures: list[Cure], memory: int, console: Console | None = None) -> None:
    """Prints the options with which a run would fit.

    Args:
        cures: The options, each with its peak.
        memory: Memory of the device in bytes.
        console: Console to print to; standard output by default.
    """
    console = console or Console(highlight=False)
    if not cures:
        tried = "LoRA, QLoRA, smaller micro-batches, a smaller cache, rounded hidden states, 8 sharded GPUs"
        console.print(f"None of {tried} makes it fit in {memory / GIB:.4g} GiB: take a smaller model.", soft_wrap=True)
        return
    console.print("It would fit with")
    for cure in cures:
        console.print(f"  {cure.options}: {format_gib(cure.peak)} GiB", soft_wrap=True)


class DoesNotFit(Exception):
    """The run does not fit."""


class PlanCLI(RLMTCLI):
    """Parses the options of `rlmt fit`, and prints the memory budget instead of training."""

    def before_fit(self) -> None:
        """Does nothing; a plan reads no checkpoint."""

    def setup_parser(self, *args: Any, **options: Any) -> None:
        """Creates the parser of `rlmt fit`, whose help describes the plan."""
        super().setup_parser(*args, **options)
        parser = self._subcommand_parsers["fit"]
        parser.prog = "rlmt plan"
        parser.description = (
            "Prints the memory of a run on each device, phase by phase, before any weights are loaded. Takes the "
            "options of `rlmt fit`, and --memory."
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options that only the plan has."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--memory",
            type=PositiveFloat | str | None,
            default=None,
            help=f"device memory in GiB, or one of {', '.join(CARDS)}; default: that of this GPU",
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Creates a Trainer for the CPU, whatever device is planned for."""
        return super().instantiate_trainer(
            **{**kwargs, "accelerator": "cpu", "devices": 1, "strategy": "auto", "num_nodes": 1}
        )

    def fit(self, **kwargs: Any) -> None:
        """Prints the budget.

        Raises:
            DoesNotFit: The run does not fit; for RL runs the options with which it would are printed.
            UserError: The module is not known, or the device's memory is not known.
        """
        memory = device_memory(self._get(self.config_init, "memory"))
        compute = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else torch.float32
        with busy("planning …"):
            budget = self._budget(compute, memory)
        print_budget(budget)
        if not budget.fits:
            if isinstance(self.model, RLMTModule) and isinstance(self.datamodule, RolloutDataModule):
                with busy("looking for options with which it fits …"):
                    cures = find_cures(self.model, self.datamodule, compute, memory, self._parallelism(), budget)
                print_cures(cures, memory)
            raise DoesNotFit

    def _budget(self, compute: torch.dtype, memory: int) -> Budget:
        """The budget of the configured run.

        Raises:
            UserError: The module is no module of rlmt, or the data module is none for it.
        """
        model, data, devices = self.model, self.datamodule, self._parallelism()
        if isinstance(model, RLMTModule) and isinstance(data, RolloutDataModule):
            choose_engine_options(model, data, compute, memory, devices)
            return make_budget(model, data, compute, memory, devices)
        if isinstance(model, SFT) and isinstance(data, SFTDataModule):
            return make_supervised_budget(model, data, compute, memory, devices)
        if isinstance(model, RewardModeling) and isinstance(data, PreferenceDataModule):
            return make_supervised_budget(model, data, compute, memory, devices)
        raise UserError(
            f"--model {type(model).__name__} with --data {type(data).__name__}: `rlmt plan` knows RLMTModule with "
            "RolloutDataModule, SFT with SFTDataModule, and RewardModeling with PreferenceDataModule."
        )

    def _parallelism(self) -> Parallelism:
        """Number of devices and sharding that the Trainer's options request.

        Raises:
            UserError: The number of devices is not passed and there is no GPU to count.
        """
        strategy = self._get(self.config_init, "trainer.strategy")
        if not (isinstance(strategy, (FSDP2, DDPStrategy)) or str(strategy).startswith("ddp")):
            return Parallelism()
        if isinstance(strategy, FSDP2):
            check_residual(strategy, self._get(self.config_init, "trainer.precision"))
        option = self._get(self.config_init, "trainer.devices")
        listed = option.strip("[], ").split(",") if isinstance(option, str) and "," in option else option
        devices = torch.cuda.device_count() if str(option) in ("auto", "-1") else listed
        count = len(devices) if isinstance(devices, list) else int(devices)
        if count == 0:
            raise UserError("--trainer.devices is required without a GPU; pass the number of devices a machine has.")
        ranks = count * int(self._get(self.config_init, "trainer.num_nodes") or 1)
        return Parallelism.of(ranks, strategy)


def device_memory(option: float | str | None) -> int:
    """The bytes of `--memory`: GiB, the name of a card, or None for the GPU of this machine.

    Raises:
        UserError: The card is not known, or there is no GPU.
    """
    if isinstance(option, str):
        names = {name.lower().replace(" ", ""): size for name, size in CARDS.items()}
        key = option.lower().replace(" ", "")
        if key not in names:
            raise UserError(f"--memory {option}: pass a number of GiB, or one of {', '.join(CARDS)}.")
        return round(names[key] * GIB)
    if option is not None:
        return round(option * GIB)
    if not torch.cuda.is_available():
        raise UserError("--memory is required without a GPU; pass its GiB or a card, such as --memory L4.")
    return int(torch.cuda.mem_get_info()[1])


def plan(args: Sequence[str]) -> int:
    """Runs `rlmt plan`.

    Args:
        args: Options of `rlmt fit`, and `--memory`.

    Returns:
        Exit status: 0 if the run fits, 1 if it does not.

    Raises:
        UserError: The configuration is invalid.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)  # they describe the CPU Trainer, not the planned one
    try:
        return run(["fit", *args], PlanCLI)
    except DoesNotFit:
        return 1
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
