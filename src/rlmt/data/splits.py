"""Which prompts a run trains on, and which it holds out."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from lightning.pytorch.utilities import rank_zero_info

from rlmt.data.prompts import load_prompts
from rlmt.data.rollouts import PolicySource
from rlmt.data.sampler import shuffled
from rlmt.errors import UserError
from rlmt.types import Prompt

DEFAULT_VAL_SIZE = 64
"""Prompts split off for validation when neither `val_size` nor `val_prompts` is given."""


class SplitOptions(Protocol):
    """Those of `RolloutDataModule` that say what is trained on."""

    prompts: str
    val_prompts: str | None
    val_size: int | None
    column: str | None
    system: str | None
    max_prompt_tokens: int
    seed: int


class PromptSets(NamedTuple):
    """Prompts that are short enough."""

    all: list[Prompt]
    """Of the training file, in the order of its rows."""
    train: list[Prompt]
    held_out: list[Prompt]


def load_sets(options: SplitOptions, source: PolicySource) -> PromptSets:
    """Reads the prompts and splits them in an order that depends on the seed and each prompt's row alone.

    Args:
        options: what to read.
        source: renders the prompts.

    Raises:
        UserError: a file cannot be read, or has too few prompts that are short enough.
    """
    fitting = _read(options.prompts, options, source)
    mixed = [fitting[i] for i in shuffled([prompt.index for prompt in fitting], options.seed, "split")]
    if options.val_prompts is not None:
        held_out = _read(options.val_prompts, options, source)
        size = len(held_out) if options.val_size is None else options.val_size
        sets = PromptSets(fitting, mixed, held_out[:size])
    else:
        held_out = mixed
        size = DEFAULT_VAL_SIZE if options.val_size is None else options.val_size
        sets = PromptSets(fitting, mixed[size:], mixed[:size])
    if size > len(held_out):
        raise UserError(
            f"--data.val_size asks for {size:,} validation prompts, but {options.val_prompts or options.prompts} has "
            f"{len(held_out):,}: lower it, or give --data.val_prompts"
        )
    rank_zero_info(f"{len(sets.train):,} prompts to train on, {len(sets.held_out):,} to validate on")
    return sets


def _read(name: str, options: SplitOptions, source: PolicySource) -> list[Prompt]:
    """Loads one prompt set and drops the prompts that are too long once rendered."""
    prompts, limit = load_prompts(name, options.column, options.system), options.max_prompt_tokens
    fitting = []
    for prompt in prompts:
        try:
            length = len(source.format.render(prompt.messages, source.tokenizer))
        except UserError as error:
            raise UserError(f"{name}: row {prompt.index + 1}: {error}") from error
        if length <= limit:
            fitting.append(prompt)
    if not fitting:
        raise UserError(f"{name}: all {len(prompts):,} prompts are longer than --data.max_prompt_tokens {limit:,}")
    if len(fitting) < len(prompts):
        dropped = len(prompts) - len(fitting)
        rank_zero_info(f"dropped {dropped:,} of {len(prompts):,} prompts longer than {limit:,} tokens ({name})")
    return fitting
