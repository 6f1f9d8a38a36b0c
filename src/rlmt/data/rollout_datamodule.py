"""RolloutDataModule: loads prompts, and generates rollouts for them with the current weights of the policy.

The loaders yield prompts only. The module calls `generate` for the batch that it is about to train on, so rollouts are
on-policy. Nothing is prefetched: a row of text costs nothing to load, and a rollout generated early would be stale;
`rollout_lag` allows that on purpose, by one step.
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from rlmt import progress
from rlmt.checkpointing.watchdog import time_limit
from rlmt.data.generation import LoadedPrompts, PolicySource, generate, recorded_prompts
from rlmt.data.one_step_off import OneStepOff
from rlmt.data.prompts import PromptDataset, PromptSets, load_fitting_prompts, split_prompts, training_source
from rlmt.data.sampler import PromptSampler, ResumableOrder
from rlmt.distributed import collectives
from rlmt.engines import Engine, ReplayEngine
from rlmt.engines.offline_rollouts import OfflineRollouts
from rlmt.errors import UserError
from rlmt.options import (
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
    """Loads prompts, and has the engine generate samples from the policy for them.

    Training batches have `group_size` samples per prompt. Validation and test batches have one, with the same seeds
    every time, so that curves are comparable. Predict passes once over all prompts, with `group_size` samples each.
    Several ranks share the prompts of a batch, and the held-out prompts, evenly.

    Args:
        prompts: File (.parquet, .jsonl, .json, .csv), folder or hub data set, see `rlmt.data.prompts`.
        engine: Generates the samples.
        batch_size: Prompts per training step, over all ranks.
        group_size: Samples per prompt.
        temperature: Sampling temperature, > 0.
        top_p: Nucleus mass in (0, 1]; below 1 the engine's log-probs are renormalized and differ from the trainer's.
        max_prompt_tokens: Prompts that are longer once rendered are dropped; their number is logged.
        max_new_tokens: Maximum length of a completion in tokens.
        column: Column of the prompts; null takes `prompt`, else `messages`.
        system: System prompt for rows without one.
        extra_columns: Other columns to read, such as a reference answer; rewards receive them with the prompt, and
            rollout files contain them. `val_prompts` must have them, too.
        split: Split of `prompts`, if it is a folder or hub data set; null takes `train`, or the only one.
        subset: Subset (configuration) of `prompts`, if it is a folder or hub data set with several.
        val_prompts: File, folder or hub data set of validation prompts; null splits them off `prompts`.
        val_split: Split of the validation prompts: one of `val_prompts`, or another one of `prompts`.
        val_size: Number of validation prompts, 0 for none; null takes 64 of `prompts`, or all that `val_prompts` or
            `val_split` name. `rlmt predict` holds nothing out.
        seed: Seed of the order of prompts and of the samples.
        val_engine: Generates the samples of validation and test; null takes `engine`, unless that one replays.
        engine_timeout: Maximum seconds of one rollout, including the start of the engine for the first; after that the
            run saves a checkpoint if it can and exits with status 75. Null sets no limit.
        rollout_lag: 1 generates the next batch while this one is trained on, with weights from before this update (one
            step off-policy); the objective corrects for it. Requires an engine that runs beside the trainer. 0 is
            exactly on-policy.

    Raises:
        UserError: An option is out of range.
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
        extra_columns: list[str] | None = None,
        val_prompts: str | None = None,
        val_size: NonNegativeInt | None = None,
        seed: int = 0,
        val_engine: Engine | None = None,
        engine_timeout: PositiveFloat | None = 7200.0,
        rollout_lag: ZeroOrOne = 0,
        split: str | None = None,
        subset: str | None = None,
        val_split: str | None = None,
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
        self.extra_columns = extra_columns or []
        self.split, self.subset, self.val_split = split, subset, val_split
        self.val_prompts = val_prompts
        self.val_size = val_size
        self.seed = seed
        self.val_engine = val_engine
        self.engine_timeout = engine_timeout
        self.rollout_lag = rollout_lag
        self._one_step_off = OneStepOff()
        self._all: list[Prompt] | None = None
        self._sets: PromptSets | None = None
        self._train: list[Prompt] = []
        self._val: list[Prompt] = []
        self._started: list[Engine] = []

    # Prompts ----------------------------------------------------------------------------------------------------------

    @collectives.rank_hook
    def setup(self, stage: str) -> None:
        """Checks the engine and the options, then loads, filters and splits the prompts (once).

        Args:
            stage: fit, validate, test or predict.

        Raises:
            UserError: The engine, the options or the prompts have an error.
        """
        held_out = stage in ("validate", "test")
        engine = self._held_out_engine if held_out else self.engine
        engine.check()
        source = self._source
        if self._max_model_len > source.max_positions:
            raise UserError(
                f"--data.max_prompt_tokens {self.max_prompt_tokens:,} + --data.max_new_tokens {self.max_new_tokens:,} "
                f"exceed the model's context of {source.max_positions:,} tokens: lower one of them."
            )
        samples = 1 if held_out else self.group_size
        engine.check_sampling(source.format, source.tokenizer, self._sampling(source), samples, self._max_model_len)
        if self._all is None:
            self._all = load_fitting_prompts(training_source(self), self, source)
        if stage != "predict" and self._sets is None:
            self._sets = split_prompts(self._all, self, source)
            self._train, self._val = self._sets
        self._sampler = None
        if stage == "fit":
            if self.rollout_lag and not engine.concurrent:
                raise UserError(
                    f"--data.rollout_lag is 1, but {type(engine).__name__} cannot generate while the policy is "
                    "trained: set --data.engine VLLMServerEngine, or the lag to 0."
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
            raise UserError(f"There are no prompts to {stage} on: set --data.val_size above 0 or --data.val_prompts.")
        if len(self._val) % self._world_size:  # a prompt would count twice
            raise UserError(
                f"--data.val_size is {len(self._val)}, which is not divisible by {self._world_size} devices: set it to "
                "a multiple."
            )

    def _check_batch_size(self) -> None:
        if self.batch_size > len(self._train):
            raise UserError(
                f"--data.batch_size is {self.batch_size:,}, but {self.prompts} has only {len(self._train):,} training "
                "prompts: lower it or --data.val_size."
            )

    def train_dataloader(self) -> StatefulDataLoader:
        """Batches of `batch_size` / ranks prompts, reshuffled every epoch, resumable within an epoch."""
        assert self._sampler is not None
        sampler = self._sampler
        return StatefulDataLoader(
            sampler.dataset,
            batch_size=self.batch_size // self._world_size,
            sampler=sampler,
            collate_fn=lambda prompts: LoadedPrompts(prompts, epoch=sampler.epoch),
            drop_last=True,
            # Starting an epoch takes a random number; a resumed run starts one epoch more, so it is not the global
            # generator's.
            generator=torch.Generator(),
        )

    def state_dict(self) -> dict[str, Any]:
        """State of the order of prompts, with `rollout_lag` also the batch that is being generated."""
        state = super().state_dict()
        return state | {"ahead": self._one_step_off.state_dict()} if state and self.rollout_lag else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state."""
        super().load_state_dict(state_dict)
        if self._sampler is not None:
            self._one_step_off.load_state_dict(state_dict.get("ahead", {}) if self.rollout_lag else {})

    def val_dataloader(self) -> DataLoader[Prompt] | list[DataLoader[Prompt]]:
        """The held-out prompts, with as many samples per batch as in training; no loader if there are none."""
        if not self._val:
            return []
        dataset = PromptDataset(self._val)
        # A DistributedSampler even on one rank, so that Lightning does not replace it.
        sampler: DistributedSampler[Prompt] = DistributedSampler(
            dataset, num_replicas=self._world_size, rank=self._rank, shuffle=False
        )
        batch_size = max(1, self.batch_size * self.group_size // self._world_size)
        own = torch.Generator()  # as in training: a run resumed after a validation starts the loader once more
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=_collate_held_out, generator=own)

    def test_dataloader(self) -> DataLoader[Prompt] | list[DataLoader[Prompt]]:
        """The same as `val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Prompt]:
        """All prompts that are short enough, in the order of their rows, distributed over ranks.

        If their number is not divisible by the ranks, the first ones are repeated at the end, so that all ranks have
        equally many.
        """
        dataset = PromptDataset(self._all or [])
        sampler: DistributedSampler[Prompt] = DistributedSampler(
            dataset, num_replicas=self._world_size, rank=self._rank, shuffle=False
        )
        batch_size = max(1, self.batch_size // self._world_size)
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=_collate_held_out)

    # Rollouts ---------------------------------------------------------------------------------------------------------

    def generate(self, prompts: PromptBatch, held_out: bool | None = None) -> RolloutBatch:
        """Generates rollouts with the current weights of the policy. All ranks have to call it.

        Args:
            prompts: P prompts: a batch of this module's loaders, or of `next_prompts`.
            held_out: Whether to generate as for validation: one sample per prompt, with the engine of validation. None
                does where the trainer neither trains nor predicts.

        Returns:
            The rollouts, tensors on the module's device. The seconds of the first ones include the engine's start.

        Raises:
            RuntimeError: The engine violated its contract, e.g. sampled with other weights than the policy's.
            UserError: The engine cannot generate.
        """
        assert self.trainer is not None
        source, device = self._source, self.trainer.lightning_module.device
        if held_out is None:
            held_out = not (self.trainer.training or self.trainer.predicting)
        engine, group_size = (self._held_out_engine, 1) if held_out else (self.engine, self.group_size)
        settings = (source, engine, self._sampling(source), group_size, self.seed)
        time_limited = time_limit(self.engine_timeout, type(engine).__name__, "--data.engine_timeout")
        began = started = perf_counter()
        # Engines choose their dtype themselves: a step's autocast is the trainer's.
        with time_limited, torch.autocast(device.type, enabled=False):
            if engine not in self._started:
                assert source.policy is not None
                progress.report(f"starting {type(engine).__name__}")
                self._started.append(engine)
                engine.start(source.policy, source.tokenizer, self._max_model_len, source.compute_dtype)
                started = perf_counter()
            if self.rollout_lag and self.trainer.training and not held_out:
                assert self._sampler is not None
                following = self._load_rows(*self._sampler.peek(len(prompts.prompts)))
                rollouts = self._one_step_off.generate(prompts, following, *settings)
            else:
                if engine is self.engine:
                    self._one_step_off.wait()
                rollouts = generate(prompts, *settings)
        seconds = rollouts.seconds | {"rollout": rollouts.seconds["rollout"] + started - began}
        logprobs = rollouts.engine_logprobs.to(device)
        return replace(rollouts, engine_logprobs=logprobs, rounded=engine.rounds_weights, seconds=seconds)

    def next_prompts(self) -> PromptBatch:
        """Takes the next training batch of prompts out of turn; the loader continues after it.

        Whole batches keep resuming exact: the order depends on the number of prompts taken alone, and no batch holds
        prompts of two epochs.
        """
        sampler = self._sampler
        assert sampler is not None
        positions = sampler.take(self.batch_size // self._world_size)
        return self._load_rows(positions, sampler.epoch)

    def _load_rows(self, positions: list[int], epoch: int) -> LoadedPrompts:
        assert self._sampler is not None
        return LoadedPrompts([self._sampler.dataset[i] for i in positions], epoch=epoch)

    @property
    def offline_rollouts(self) -> OfflineRollouts | None:
        """The recorded samples of a `ReplayEngine`; None for other engines. Available after `setup`."""
        return self.engine.rollouts if isinstance(self.engine, ReplayEngine) else None

    def teardown(self, stage: str) -> None:
        """Closes the engines.

        Args:
            stage: Not used.
        """
        self._close_engines()

    def on_exception(self, exception: BaseException) -> None:
        """Closes the engines, since Lightning does not call `teardown` after an exception.

        Args:
            exception: The exception that ended the run.
        """
        self._close_engines()

    def _close_engines(self) -> None:
        for engine in (self.engine, self.val_engine):
            if engine is not None:
                engine.close()
        self._one_step_off.close()
        self._started = []

    # Trainer ----------------------------------------------------------------------------------------------------------

    @property
    def _source(self) -> PolicySource:
        assert self.trainer is not None
        return cast(PolicySource, self.trainer.lightning_module)

    def _sampling(self, source: PolicySource) -> Sampling:
        stops = source.format.stop, source.stop_token_ids
        return Sampling(self.temperature, self.max_new_tokens, *stops, self.top_p)

    @property
    def _held_out_engine(self) -> Engine:
        engine = self.val_engine or self.engine
        if engine.replays:
            raise UserError(
                f"--data.engine is {type(engine).__name__}, whose recorded samples do not measure the current policy: "
                "set --data.val_size 0, or --data.val_engine VLLMEngine."
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
    """Always epoch 0: the same seeds at every validation."""
    return LoadedPrompts(prompts, epoch=0)
