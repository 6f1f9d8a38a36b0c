"""Supervised fine-tuning (SFT): the warm start of a policy on demonstrations, or its training from scratch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rlmt.annotations import PreTrainedModel
from rlmt.data.demonstrations import EncodedDemonstration
from rlmt.data.supervised import RowBatch
from rlmt.distributed.collectives import all_gather_object, rank_hook
from rlmt.distributed.fsdp2 import pad_with_no_ops, rank_0_loads_for, shard_models
from rlmt.distributed.rank_0_loading import load_on_rank_0
from rlmt.formats.thinking import FormatName, ThinkingFormat
from rlmt.models import loading
from rlmt.models.logprobs import token_logprobs
from rlmt.models.micro_batch import MicroBatch, micro_batch_of_sequences, no_op_micro_batch
from rlmt.models.rows import group_rows, packs_rows
from rlmt.modules.base import PolicyMixin
from rlmt.modules.checks import check_trainer, weights_dtype
from rlmt.modules.supervised import SupervisedModule
from rlmt.options import FiniteNonNegativeFloat, check_ranges
from rlmt.progress import track


class SFT(PolicyMixin, SupervisedModule):  # type: ignore[misc] # Lightning's load_from_checkpoint
    """Trains a policy on demonstrations: thought, response and end of turn, or without thinking the response alone.

    The loss is the mean negative log-prob over the target tokens of a whole optimizer step, whatever turn or row they
    belong to: with weights w (1 for target tokens, `prompt_weight` for prompt tokens) it is -Σ w log p / Σ w. So it
    does not depend on how the step is cut into micro-batches or spread over ranks.

    Args:
        policy: Folder or hub name of the initial policy.
        format: How thoughts are written: think, no_think, zero_think, zero_no_think, or a ThinkingFormat with options.
        prompt_weight: Weight of prompt tokens in the loss; 0 trains on the assistant's tokens only.
        **options: Those of `SupervisedModule`.

    Raises:
        UserError: An option is out of range, or, during setup, does not fit the model or the data.
    """

    data_module = "SFTDataModule"
    kind = "SFT"
    saved = ("policy.",)

    def __init__(
        self,
        policy: str,
        format: FormatName | ThinkingFormat = "think",  # noqa: A002 - the word users write
        prompt_weight: FiniteNonNegativeFloat = 0.0,
        **options: Any,
    ) -> None:
        check_ranges(SFT, locals())
        super().__init__(**options)
        self.policy_path = policy
        self.configured_format = format if isinstance(format, ThinkingFormat) else ThinkingFormat(format)
        self.prompt_weight = prompt_weight
        self.policy: PreTrainedModel | None = None

    @rank_hook
    def setup(self, stage: str) -> None:
        """Checks the configuration before any weights are loaded."""
        check_trainer(self.trainer)
        loading.check_policy(self.policy_config, self.policy_path)
        self.check_model_options(self.policy_config, self.policy_path)

    @rank_hook
    def configure_model(self) -> None:
        """Loads the policy or initializes it, and shards it under FSDP2."""
        self.check_restored()
        if self.policy is None:
            with rank_0_loads_for(self.trainer):
                policy = load_on_rank_0(self._load_policy)
            self.policy = self.set_training_mode(policy)
            self.add_kernels(self.policy)
            shard_models(self.trainer, self.policy)

    def _load_policy(self) -> PreTrainedModel:
        if self.from_scratch:
            policy = loading.random_policy(self.policy_path, self.attn_implementation)
        else:
            dtype = weights_dtype(self.trainer, self.lora)
            policy = loading.load_policy(self.policy_path, dtype, self.attn_implementation, self.quantization)
        if self.lora is not None:
            self.lora.add_to(policy)
        return policy

    # One step ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: RowBatch[EncodedDemonstration], batch_idx: int) -> None:
        """Takes one optimizer step on a batch of demonstrations."""
        rates = self.learning_rates("sft/lr")
        loss, norm = self.take_step(self.losses(batch.rows, self.prompt_weight))
        tokens = float(_target_tokens_of_all_ranks(batch.rows))
        metrics = {"sft/loss": loss, "sft/grad_norm": norm, "sft/tokens": tokens, **rates}
        self.log_step(metrics, len(batch.rows), {"sft/loss": "loss"})

    def losses(self, rows: list[EncodedDemonstration], prompt_weight: float) -> Iterator[Tensor]:
        """The micro-batches of this rank: their shares in the loss over the rows of all ranks."""
        return (loss for _, _, loss in self._micro_batches(rows, prompt_weight))

    def _micro_batches(
        self, rows: list[EncodedDemonstration], prompt_weight: float
    ) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
        """Each micro-batch of sequences with the weighted log-probs of its tokens, and its share in the loss."""
        sequences = [sequence for row in rows for sequence in row.sequences]
        prompts = [count for row in rows for count in row.prompts]
        counts = all_gather_object((target_tokens(rows), sum(count - 1 for count in prompts)))
        total_weight = sum(targets + prompt_weight * prompt for targets, prompt in counts)
        # A sequence's first token is never predicted; the others of its prompt only if they have a weight.
        first = [1 if prompt_weight else count for count in prompts]
        packed = packs_rows(self.trained_model)
        plan = group_rows([[len(s) - 1] for s in sequences], self.tokens_per_micro_batch, packed, self.device)
        parts = (
            micro_batch_of_sequences(part, [sequences[i] for i in part], [first[i] for i in part], packed, self.device)
            for part in plan
        )
        padded = pad_with_no_ops(parts, self.trained_model, no_op_micro_batch(self.device))
        for batch in track("micro-batch", padded):
            weights = torch.ones(len(batch.targets), device=self.device)
            if not batch.samples:  # a no-op micro-batch
                weights.zero_()
            elif prompt_weight:
                until = torch.tensor([prompts[i] for i in batch.samples], device=self.device)
                weights[batch.columns + 1 < until[batch.rows]] = prompt_weight
            logprobs = token_logprobs(self.trained_model, batch, temperature=1.0).logprobs
            weighted = logprobs * weights
            yield batch, weighted.detach(), -weighted.sum() / total_weight

    # Held-out demonstrations ------------------------------------------------------------------------------------------

    def validation_step(self, batch: RowBatch[EncodedDemonstration], batch_idx: int) -> dict[str, Any]:
        """Adds to the mean loss over the target tokens of all held-out demonstrations; prompts do not count.

        Returns:
            `values`: `loss`, [r, 2] for each row of this rank the loss summed over its target tokens, and their number.
        """
        return self._evaluate(batch, "val")

    def test_step(self, batch: RowBatch[EncodedDemonstration], batch_idx: int) -> dict[str, Any]:
        """As `validation_step`."""
        return self._evaluate(batch, "test")

    def _evaluate(self, batch: RowBatch[EncodedDemonstration], stage: str) -> dict[str, Any]:
        row_of = torch.tensor([i for i, row in enumerate(batch.rows) for _ in row.sequences], dtype=torch.long)
        sums, own_loss = torch.zeros(len(batch.rows)), 0.0
        for part, weighted, loss in self._micro_batches(batch.rows, prompt_weight=0.0):
            own_loss += float(loss)
            if part.samples:
                sums.index_add_(0, row_of[part.samples][part.rows.cpu()], -weighted.float().cpu())
        self.log(
            f"{stage}/loss",
            sum(all_gather_object(own_loss)),
            prog_bar=True,
            batch_size=_target_tokens_of_all_ranks(batch.rows),
        )
        counts = torch.tensor([target_tokens([row]) for row in batch.rows], dtype=torch.float32)
        return {"values": {"loss": torch.stack([sums, counts], dim=1)}}

    # Checkpoints ------------------------------------------------------------------------------------------------------

    @property
    def mismatch(self) -> str:
        """See `SupervisedModule.mismatch`."""
        return f"the policy {self.policy_path}: give --model.policy the model that the checkpoint was trained from"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the format and what `rlmt export` requires."""
        policy = {"policy": loading.absolute_path(self.policy_path), "format": self.format.to_dict()}
        checkpoint["rlmt"] = policy | self.checkpoint_state()
        self.save_assets_beside_checkpoints(self.trainer)

    def check_checkpoint(self, checkpoint: Mapping[str, Any], fitting: bool) -> None:
        """Checks a checkpoint's module, adapter and format. Loads no weights.

        Args:
            checkpoint: The loaded checkpoint.
            fitting: Whether training is resumed from it.

        Raises:
            UserError: One of them is not this run's.
        """
        super().check_checkpoint(checkpoint, fitting)
        self.check_format(ThinkingFormat.from_dict(checkpoint["rlmt"]["format"]), "--ckpt_path")


def target_tokens(rows: list[EncodedDemonstration]) -> int:
    """Number of tokens that the assistant wrote, ends of turns included."""
    return sum(len(ids) - prompt for row in rows for ids, prompt in zip(row.sequences, row.prompts, strict=True))


def _target_tokens_of_all_ranks(rows: list[EncodedDemonstration]) -> int:
    """As `target_tokens`, over the rows of all ranks."""
    return sum(all_gather_object(target_tokens(rows)))
