"""RolloutDataModule: prompts in, rollouts out, drawn with the weights that the policy has at that moment.

The loaders yield prompts only. Sampling happens in `on_before_batch_transfer`, when Lightning asks for the very batch
that it is about to train on, so no rollout ever waits while the policy moves on. Nothing is prefetched: a text row
costs nothing to load, and a rollout drawn early would be stale; `rollout_lag` allows that on purpose, by one step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from rlmt.checkpointing.watchdog import time_limit
from rlmt.data.generation import LoadedPrompts, PolicySource, generate, recorded_prompts
from rlmt.data.one_step_off import OneStepOff
from rlmt.data.prompts import PromptDataset, load_prompt_sets
from rlmt.data.sampler import PromptSampler, ResumableOrder
from rlmt.distributed import collectives
from rlmt.engines.base import Engine
from rlmt.errors import UserError
from rlmt.ranges import (
    FinitePositiveFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UnitIntervalAboveZero,
    ZeroOrOne,
    check_ranges,
)
from rlmt.types import Prompt, PromptBatch, RolloutBatch, Sampling


class RolloutDataModule(ResumableOrder, LightningDataModule):
    """Loads prompts and has the engine draw samples from the policy for them.

    Training batches hold `group_size` samples a prompt; validation and test batches hold one, drawn with seeds that are
    the same every time, so that curves compare; predict goes once through all prompts, `group_size` samples each.
    Several ranks share the prompts of a batch, and the held-out ones, evenly.

    Args:
        prompts: file (.parquet, .jsonl, .json, .csv) or hub data set, see `rlmt.data.prompts`.
        engine: what draws the samples.
        batch_size: prompts a training step over all ranks together.
        group_size: samples a prompt.
        temperature: sampling temperature, > 0.
        top_p: nucleus mass in (0, 1]; below 1 the engine's log-probs are renormalised and no longer the trainer's.
        max_prompt_tokens: longer rendered prompts are dropped, and counted aloud.
        max_new_tokens: completion length limit.
        column: column that holds the prompts; None takes `prompt`, else `messages`.
        system: system prompt for rows that have none.
        val_prompts: file or hub data set to validate on; None splits validation prompts off `prompts`.
        val_size: number of validation prompts, 0 for none; None takes 64 of `prompts`, or all of `val_prompts`.
        seed: orders the prompts and seeds the samples.
        val_engine: what draws the samples of validation and test; None takes `engine`, unless that one replays.
        engine_timeout: seconds that one rollout, with the engine's start at the first, may take; after that the run
            saves what it can and ends with status 75. None waits for ever.
        rollout_lag: 1 has the engine draw the next batch while this one is trained on, with weights from before this
            update; the objective corrects for it. Needs an engine beside the trainer. 0 is exactly on-policy.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        prompts: str,
        engine: Engine,
        batch_size: PositiveInt = 64,
        group_size: PositiveInt = 8,
        temperature: FinitePositiveFloat = 0.7,
        top_p: UnitIntervalAboveZero = 1.0,
        max_prompt_tokens: PositiveInt = 1024,
        max_new_tokens: PositiveInt = 4096,
        column: str | None = None,
        system: str | None = None,
        val_prompts: str | None = None,
        val_size: NonNegativeInt | None = None,
        seed: int = 0,
        val_engine: Engine | None = None,
        engine_timeout: PositiveFloat | None = 7200.0,
        rollout_lag: ZeroOrOne = 0,
    ) -> None:
        check_ranges(RolloutDataModule, locals())
        super().__init__()
        self.prompts = prompts
        self.engine = engine
        self.batch_size = batch_size
        self.group_size = group_size
        self.temperature = temperature
        self.top_p = top_p
        self.max_prompt_tokens = max_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.column = column
        self.system = system
        self.val_prompts = val_prompts
        self.val_size = val_size
        self.seed = seed
        self.val_engine = val_engine
        self.engine_timeout = engine_timeout
        self.rollout_lag = rollout_lag
        self._ahead = OneStepOff()
        self._all: list[Prompt] | None = None
        self._train: list[Prompt] = []
        self._val: list[Prompt] = []
        self._started: list[Engine] = []

    # ---------------------------------------------------------------- prompts

    @collectives.rank_hook
    def setup(self, stage: str) -> None:
        """Checks the engine and the options, then loads, drops and splits the prompts (once).

        Args:
            stage: fit, validate, test or predict.

        Raises:
            UserError: anything is wrong with the engine, the options or the prompts.
        """
        held_out = stage in ("validate", "test")
        engine = self._held_out_engine if held_out else self.engine
        engine.check()
        source = self._source
        if self._max_model_len > source.max_positions:
            raise UserError(
                f"--data.max_prompt_tokens {self.max_prompt_tokens:,} + --data.max_new_tokens {self.max_new_tokens:,} "
                f"exceed the model's context of {source.max_positions:,} tokens: lower one of them"
            )
        source.format.check(source.tokenizer, source.tokenizer.name_or_path)
        samples = 1 if held_out else self.group_size
        engine.check_run(source.format, source.tokenizer, self._sampling(source), samples, self._max_model_len)
        if self._all is None:
            sets = load_prompt_sets(self, source)
            self._all, self._train, self._val = sets.all, sets.train, sets.held_out
        self._sampler = None
        if stage == "fit":
            if self.rollout_lag and not engine.concurrent:
                raise UserError(
                    f"--data.rollout_lag 1: {type(engine).__name__} cannot draw while the policy is trained; set "
                    "--data.engine VLLMServerEngine, or 0"
                )
            if self._val:
                self._held_out_engine.check()
            self._train = recorded_prompts(self._train, source, self.engine, self.prompts)
            self._check_batch_size()
            dataset = PromptDataset(self._train)
            self._sampler = PromptSampler(dataset, self.batch_size, self._world_size, self._rank, self.seed)
        elif stage == "predict":
            self._all = recorded_prompts(self._all or [], source, self.engine, self.prompts)
        elif not self._val:
            raise UserError(f"nothing to {stage} on: set --data.val_size above 0 or --data.val_prompts")
        if len(self._val) % self._world_size:  # one of them would count twice
            raise UserError(
                f"--data.val_size is {len(self._val)}, which does not divide by {self._world_size} devices: set it to "
                "a multiple"
            )

    def _check_batch_size(self) -> None:
        if self.batch_size > len(self._train):
            raise UserError(
                f"--data.batch_size is {self.batch_size:,}, but only {len(self._train):,} training prompts are left of "
                f"{self.prompts}: lower it or --data.val_size"
            )

    def train_dataloader(self) -> StatefulDataLoader:
        """Batches of `batch_size` / ranks prompts, reshuffled every epoch, resumable in the middle of one."""
        assert self._sampler is not None
        sampler = self._sampler
        return StatefulDataLoader(
            sampler.dataset,
            batch_size=self.batch_size // self._world_size,
            sampler=sampler,
            collate_fn=lambda prompts: LoadedPrompts(prompts, epoch=sampler.epoch),
            drop_last=True,
            # Starting an epoch draws a number, which must not be the run's: a resumed run starts one more.
            generator=torch.Generator(),
        )

    def state_dict(self) -> dict[str, Any]:
        """As any order's; with `rollout_lag` the batch under way belongs to it."""
        state = super().state_dict()
        return state | {"ahead": self._ahead.state_dict()} if state and self.rollout_lag else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undoes `state_dict`."""
        super().load_state_dict(state_dict)
        if self._sampler is not None:
            self._ahead.load_state_dict(state_dict.get("ahead", {}) if self.rollout_lag else {})

    def val_dataloader(self) -> DataLoader[Prompt] | list[DataLoader[Prompt]]:
        """The held-out prompts, as many samples a batch as in training; no loader if there are none."""
        if not self._val:
            return []
        dataset = PromptDataset(self._val)
        # Of this type even on one rank, so that Lightning leaves it as it is.
        sampler: DistributedSampler[Prompt] = DistributedSampler(
            dataset, num_replicas=self._world_size, rank=self._rank, shuffle=False
        )
        batch_size = max(1, self.batch_size * self.group_size // self._world_size)
        own = torch.Generator()  # as in training: a run resumed behind a validation starts the loader once more
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=_collate_held_out, generator=own)

    def test_dataloader(self) -> DataLoader[Prompt] | list[DataLoader[Prompt]]:
        """The same as `val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Prompt]:
        """All prompts that are short enough, in the order of their rows, shared out among ranks.

        Where they do not divide by the ranks, the first ones come once more at the end, so that all have equally many.
        """
        dataset = PromptDataset(self._all or [])
        sampler: DistributedSampler[Prompt] = DistributedSampler(
            dataset, num_replicas=self._world_size, rank=self._rank, shuffle=False
        )
        batch_size = max(1, self.batch_size // self._world_size)
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=_collate_held_out)

    # ---------------------------------------------------------------- rollouts

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turns prompts into rollouts with the policy's present weights; other batches pass.

        Args:
            batch: a PromptBatch.
            dataloader_idx: not used.

        Returns:
            RolloutBatch on the CPU, its `seconds` filled in.

        Raises:
            RuntimeError: the engine broke its contract, e.g. sampled with other weights than the policy's.
        """
        if not isinstance(batch, PromptBatch):
            return batch
        assert self.trainer is not None
        source = self._source
        held_out = not (self.trainer.training or self.trainer.predicting)
        engine, group_size = (self._held_out_engine, 1) if held_out else (self.engine, self.group_size)
        with time_limit(self.engine_timeout, type(engine).__name__, "--data.engine_timeout"):
            if engine not in self._started:
                assert source.policy is not None
                self._started.append(engine)
                engine.start(source.policy, source.tokenizer, self._max_model_len, source.compute_dtype)
            settings = (source, engine, self._sampling(source), group_size, self.seed)
            if self.rollout_lag and self.trainer.training:
                assert self._sampler is not None
                return self._ahead.draw(batch, self._load_rows(*self._sampler.peek(len(batch.prompts))), *settings)
            if engine is self.engine:
                self._ahead.settle()
            return generate(batch, *settings)

    def draw_more(self) -> RolloutBatch:
        """Rollouts for what would have been the next training batch, drawn now; the loader goes on behind it.

        Whole batches keep what makes resuming exact: all that the order depends on is the number of prompts drawn, and
        no batch holds prompts of two passes.

        Returns:
            As `on_before_batch_transfer`.
        """
        sampler = self._sampler
        assert sampler is not None
        positions = sampler.take(self.batch_size // self._world_size)
        batch: RolloutBatch = self.on_before_batch_transfer(self._load_rows(positions, sampler.epoch), 0)
        return batch

    def _load_rows(self, positions: list[int], epoch: int) -> LoadedPrompts:
        assert self._sampler is not None
        return LoadedPrompts([self._sampler.dataset[i] for i in positions], epoch=epoch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves the tensors of a RolloutBatch; Lightning's own way would copy every list and fail on frozen records."""
        if isinstance(batch, RolloutBatch):
            return replace(batch, engine_logprobs=batch.engine_logprobs.to(device))
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def teardown(self, stage: str) -> None:
        """Closes the engines.

        Args:
            stage: not used.
        """
        self._close_engines()

    def on_exception(self, exception: BaseException) -> None:
        """Closes the engines, since Lightning calls no teardown after an exception.

        Args:
            exception: what ended the run.
        """
        self._close_engines()

    def _close_engines(self) -> None:
        for engine in (self.engine, self.val_engine):
            if engine is not None:
                engine.close()
        self._ahead.close()
        self._started = []

    # ---------------------------------------------------------------- trainer

    @property
    def _source(self) -> PolicySource:
        assert self.trainer is not None
        return cast(PolicySource, self.trainer.lightning_module)

    def _sampling(self, source: PolicySource) -> Sampling:
        stop_token_ids = source.format.stop_token_ids(source.tokenizer)
        return Sampling(self.temperature, self.max_new_tokens, source.format.stop, stop_token_ids, self.top_p)

    @property
    def _held_out_engine(self) -> Engine:
        engine = self.val_engine or self.engine
        if engine.replays:
            raise UserError(
                f"recorded samples say nothing of the policy as it is, so {type(engine).__name__} draws none for "
                "held-out prompts: set --data.val_size 0, or --data.val_engine VLLMEngine"
            )
        return engine

    @property
    def _max_model_len(self) -> int:
        return self.max_prompt_tokens + self.max_new_tokens

    @property
    def _world_size(self) -> int:
        assert self.trainer is not None
        return self.trainer.world_size

    @property
    def _rank(self) -> int:
        assert self.trainer is not None
        return self.trainer.global_rank


def _collate_held_out(prompts: list[Prompt]) -> LoadedPrompts:
    """Epoch 0 always: the same seeds at every validation."""
    return LoadedPrompts(prompts, epoch=0)
