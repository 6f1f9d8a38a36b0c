"""Supervised fine-tuning: the warm start of a policy on demonstrations, or its whole training from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import AdamW
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlmt.batching import batches_by_length
from rlmt.data.sft import EncodedDemonstration
from rlmt.data.supervised import RowBatch
from rlmt.errors import UserError
from rlmt.models import loading
from rlmt.models.logprobs import token_logprobs
from rlmt.models.micro_batch import MicroBatch
from rlmt.modules.checkpoints import check_same_format, record_of, save_beside_checkpoints
from rlmt.modules.rlmt import LRSchedulerCallable, OptimizerCallable
from rlmt.modules.supervised import check_options, check_trainer, make_optimizer, take_step
from rlmt.resume.options import adopt_all, schedule_options
from rlmt.rng import random_states, restore_random_states
from rlmt.thinking import FormatName, ThinkingFormat


class SFT(LightningModule):
    """Trains a policy to write demonstrations: thought, response and end of turn, or response alone without thinking.

    The loss is the mean negative log-prob over the target tokens of a whole optimizer step, whatever turn or row they
    belong to: with weights w (1 for target tokens, `prompt_weight` for prompt tokens) it is -Σ w log p / Σ w. So it
    does not depend on how the step is cut into micro-batches.

    Args:
        policy: folder or hub name of the policy to start from.
        from_scratch: start from random weights instead, drawn by the run's seed: `policy` is then a folder with
            config.json and a tokenizer, and weights in it are not read.
        format: how thoughts are written: think, no_think, zero_think, zero_no_think, or a ThinkingFormat with options.
        optimizer: made from the trainable parameters, which it is given with their names.
        scheduler: made from the optimizer and stepped after each of its steps; null keeps the learning rate constant.
        prompt_weight: weight of prompt tokens in the loss; 0 trains on the assistant's tokens alone.
        tokens_per_micro_batch: tokens, padding included, that one forward and backward holds.
        max_grad_norm: the gradient is clipped to this norm.
        gradient_checkpointing: trade time for memory in the backward.
        attn_implementation: transformers' name of an attention, such as flash_attention_2; null lets it choose.

    Raises:
        UserError: an option is out of range, or later, while setting up, does not fit the model or the data.
    """

    data_module = "SFTDataModule"
    """What it is trained on."""

    def __init__(
        self,
        policy: str,
        from_scratch: bool = False,
        format: FormatName | ThinkingFormat = "think",  # noqa: A002 - the word users write
        optimizer: OptimizerCallable = AdamW,
        scheduler: LRSchedulerCallable | None = None,
        prompt_weight: float = 0.0,
        tokens_per_micro_batch: int = 16384,
        max_grad_norm: float = 1.0,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        check_options(
            {"tokens_per_micro_batch": tokens_per_micro_batch, "max_grad_norm": max_grad_norm},
            {"prompt_weight": prompt_weight},
        )
        self.policy_path = policy
        self.from_scratch = from_scratch
        self.format = format if isinstance(format, ThinkingFormat) else ThinkingFormat(format)
        self.prompt_weight = prompt_weight
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.max_grad_norm = max_grad_norm
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self._optimizer, self._scheduler = optimizer, scheduler
        self.policy: PreTrainedModel | None = None

    @cached_property
    def policy_config(self) -> PretrainedConfig:
        """The policy's configuration, read without its weights."""
        return loading.load_config(self.policy_path)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        return loading.load_tokenizer(self.policy_path)

    @property
    def max_positions(self) -> int:
        """Longest sequence the policy can take, in tokens."""
        return loading.max_positions(self.policy_config)

    def setup(self, stage: str) -> None:
        """Looks for mistakes that can be seen before any weights are read."""
        check_trainer(self.trainer)
        loading.check_causal_lm(self.policy_config, self.policy_path)
        loading.check_head(self.policy_config, self.policy_path)

    def configure_model(self) -> None:
        """Loads the policy, or draws it."""
        if self.policy is not None:
            return
        fitting = self.trainer.state.fn == "fit"
        self.policy = self._load().train(fitting)
        if fitting and self.gradient_checkpointing:
            self.policy.gradient_checkpointing_enable({"use_reentrant": False})

    def _load(self) -> PreTrainedModel:
        if self.from_scratch:
            return loading.random_policy(self.policy_path, self.attn_implementation)
        return loading.load_policy(self.policy_path, "float32", attn_implementation=self.attn_implementation)

    def configure_optimizers(self) -> Any:
        """The optimizer over what can be trained, and the scheduler if there is one."""
        made = make_optimizer(self.trainer, self._policy, self._optimizer, self._scheduler)
        parts = made if isinstance(made, dict) else {"optimizer": made, "lr_scheduler": None}
        self._configured = schedule_options(parts["optimizer"], parts["lr_scheduler"])
        return made

    def on_train_start(self) -> None:
        """Options of the optimizer and the scheduler are those of this start, whatever a checkpoint had."""
        adopt_all(self, self._configured)

    @property
    def _policy(self) -> PreTrainedModel:
        assert self.policy is not None, "configure_model has not run"
        return self.policy

    # One step ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: RowBatch[EncodedDemonstration], batch_idx: int) -> None:
        """Takes one optimizer step on a batch of demonstrations."""
        loss, norm = take_step(self, self.losses(batch.rows, self.prompt_weight), self.max_grad_norm)
        size = len(batch.rows)
        metrics = {"sft/loss": loss, "sft/grad_norm": norm, "sft/tokens": float(target_tokens(batch.rows))}
        self.log_dict(metrics, batch_size=size)
        self.log("loss", loss, prog_bar=True, logger=False, batch_size=size)

    def losses(self, rows: list[EncodedDemonstration], prompt_weight: float) -> Iterator[Tensor]:
        """Each micro-batch's share of the loss of all rows together."""
        sequences = [sequence.long() for row in rows for sequence in row.sequences]
        prompts = [count for row in rows for count in row.prompts]
        whole = target_tokens(rows) + prompt_weight * sum(count - 1 for count in prompts)
        for part in batches_by_length([len(sequence) - 1 for sequence in sequences], self.tokens_per_micro_batch):
            # A sequence's first token is never predicted; its prompt's others are only if they count.
            first = [1 if prompt_weight else prompts[i] for i in part]
            batch = _micro_batch([sequences[i] for i in part], first, self.device)
            weights = torch.ones(len(batch.targets), device=self.device)
            if prompt_weight:
                until = torch.tensor([prompts[i] for i in part], device=self.device)
                weights[batch.columns + 1 < until[batch.rows]] = prompt_weight
            yield -(token_logprobs(self._policy, batch, temperature=1.0).logprobs * weights).sum() / whole

    # Held-out demonstrations ------------------------------------------------------------------------------------------

    def validation_step(self, batch: RowBatch[EncodedDemonstration], batch_idx: int) -> None:
        """Adds to the mean loss over all target tokens of the held-out demonstrations; prompts do not count."""
        self._evaluate(batch, "val")

    def test_step(self, batch: RowBatch[EncodedDemonstration], batch_idx: int) -> None:
        """As `validation_step`."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: RowBatch[EncodedDemonstration], stage: str) -> None:
        loss = torch.stack(list(self.losses(batch.rows, prompt_weight=0.0))).sum()
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=target_tokens(batch.rows))

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads a policy.

        Raises:
            UserError: the weights are not those of this policy.
        """
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            raise UserError(
                f"The checkpoint's weights do not fit the policy {self.policy_path}; give --model.policy the model "
                "that the checkpoint was trained from."
            ) from error

    def resume_state(self) -> dict[str, Any]:
        """What changes while training beside weights, optimizer and scheduler, as plain data."""
        return {"random": random_states()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the format and what export needs."""
        checkpoint["rlmt"] = {
            "module": "SFT",
            "policy": self.policy_path,
            "format": self.format.to_dict(),
            **self.resume_state(),
        }
        save_beside_checkpoints(self.trainer, self._policy.config, self.tokenizer, self.format)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of something else or of another format.

        Raises:
            UserError: it is one.
        """
        saved = record_of(checkpoint, "SFT")
        self.check_format(ThinkingFormat.from_dict(saved["format"]), "--ckpt_path")
        if self.trainer.state.fn == "fit":
            restore_random_states(saved["random"])

    def check_format(self, saved: ThinkingFormat, where: str) -> None:
        """Refuses to go on with another format than a checkpoint's.

        Args:
            saved: the checkpoint's format.
            where: what to call the checkpoint.

        Raises:
            UserError: the formats differ.
        """
        check_same_format(self.format, saved, where)


def target_tokens(rows: list[EncodedDemonstration]) -> int:
    """How many tokens the assistant wrote, ends of turns included."""
    return sum(len(ids) - prompt for row in rows for ids, prompt in zip(row.sequences, row.prompts, strict=True))


def _micro_batch(sequences: list[Tensor], first: list[int], device: torch.device) -> MicroBatch:
    """Sequences padded on the right to one length; position `first` of each and all behind it are predicted."""
    width = max(map(len, sequences)) - 1
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence) - 1] = sequence[:-1]
    counts = torch.tensor([len(sequence) - start for sequence, start in zip(sequences, first, strict=True)])
    columns = [torch.arange(start - 1, len(sequence) - 1) for sequence, start in zip(sequences, first, strict=True)]
    targets = [sequence[start:] for sequence, start in zip(sequences, first, strict=True)]
    return MicroBatch(
        samples=[],
        shared_prompt=None,
        input_ids=ids.to(device),
        rows=torch.arange(len(sequences)).repeat_interleave(counts).to(device),
        columns=torch.cat(columns).to(device),
        targets=torch.cat(targets).to(device),
    )
