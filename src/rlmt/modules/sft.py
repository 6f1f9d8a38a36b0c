"""Supervised fine-tuning: the warm start of a policy on demonstrations, or its whole training from scratch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlmt.data.demonstrations import EncodedDemonstration
from rlmt.data.supervised import RowBatch
from rlmt.distributed import collectives
from rlmt.distributed.collectives import all_gather_object
from rlmt.distributed.fsdp2 import pad_with_no_ops, shard_models
from rlmt.formats.thinking import FormatName, ThinkingFormat
from rlmt.models import loading
from rlmt.models.logprobs import token_logprobs
from rlmt.models.micro_batch import MicroBatch, batches_by_length, no_op_micro_batch
from rlmt.modules.checkpoints import save_assets_beside_checkpoints
from rlmt.modules.checks import adapter_config_for, check_trainer, weights_dtype
from rlmt.modules.policy import PolicyOwner
from rlmt.modules.supervised import SupervisedModule, take_step
from rlmt.ranges import FiniteNonNegativeFloat, check_ranges


class SFT(SupervisedModule, PolicyOwner):
    """Trains a policy to write demonstrations: thought, response and end of turn, or response alone without thinking.

    The loss is the mean negative log-prob over the target tokens of a whole optimizer step, whatever turn or row they
    belong to: with weights w (1 for target tokens, `prompt_weight` for prompt tokens) it is -Σ w log p / Σ w. So it
    does not depend on how the step is cut into micro-batches or spread over ranks.

    Args:
        policy: folder or hub name of the policy to start from.
        format: how thoughts are written: think, no_think, zero_think, zero_no_think, or a ThinkingFormat with options.
        prompt_weight: weight of prompt tokens in the loss; 0 trains on the assistant's tokens alone.
        **options: those of `SupervisedModule`.

    Raises:
        UserError: an option is out of range, or later, while setting up, does not fit the model or the data.
    """

    data_module = "SFTDataModule"
    kind = "SFT"

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
        self.format = format if isinstance(format, ThinkingFormat) else ThinkingFormat(format)
        self.prompt_weight = prompt_weight
        self.policy: PreTrainedModel | None = None

    @collectives.rank_hook
    def setup(self, stage: str) -> None:
        """Looks for mistakes that can be seen before any weights are read."""
        check_trainer(self.trainer)
        loading.check_causal_lm(self.policy_config, self.policy_path)
        loading.check_head(self.policy_config, self.policy_path)
        self._check_adapter()

    @collectives.rank_hook
    def configure_model(self) -> None:
        """Loads the policy, or draws it."""
        if self.policy is None:
            self.policy = self._ready(self._load())
            shard_models(self.trainer, self.policy)

    def _load(self) -> PreTrainedModel:
        if self.from_scratch:
            return loading.random_policy(self.policy_path, self.attn_implementation)
        held = weights_dtype(self.trainer, self.lora)
        return loading.load_policy(self.policy_path, held, self.attn_implementation, self.quantization)

    @property
    def _trained(self) -> PreTrainedModel:
        return self._policy

    # One step ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: RowBatch[EncodedDemonstration], batch_idx: int) -> None:
        """Takes one optimizer step on a batch of demonstrations."""
        loss, norm = take_step(self, self.losses(batch.rows, self.prompt_weight), self.max_grad_norm)
        size = len(batch.rows)
        metrics = {"sft/loss": loss, "sft/grad_norm": norm, "sft/tokens": float(_everywhere(batch.rows))}
        self.log_dict(metrics, batch_size=size)
        self.log("loss", loss, prog_bar=True, logger=False, batch_size=size)

    def losses(self, rows: list[EncodedDemonstration], prompt_weight: float) -> Iterator[Tensor]:
        """The shares of this rank's micro-batches in the loss of all rows of all ranks together."""
        sequences = [sequence.long() for row in rows for sequence in row.sequences]
        prompts = [count for row in rows for count in row.prompts]
        counts = all_gather_object((target_tokens(rows), sum(count - 1 for count in prompts)))
        whole = sum(targets + prompt_weight * prompt for targets, prompt in counts)
        # A sequence's first token is never predicted; its prompt's others are only if they count.
        first = [1 if prompt_weight else count for count in prompts]
        plan = batches_by_length([len(sequence) - 1 for sequence in sequences], self.tokens_per_micro_batch)
        parts = (_micro_batch(part, sequences, first, self.device) for part in plan)
        for batch in pad_with_no_ops(parts, self._policy, no_op_micro_batch(self.device)):
            weights = torch.ones(len(batch.targets), device=self.device)
            if not batch.samples:  # runs what another rank runs at this time, and counts nothing
                weights.zero_()
            elif prompt_weight:
                until = torch.tensor([prompts[i] for i in batch.samples], device=self.device)
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
        loss = sum(all_gather_object(sum(float(part) for part in self.losses(batch.rows, prompt_weight=0.0))))
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=_everywhere(batch.rows))

    # Checkpoints ------------------------------------------------------------------------------------------------------

    @property
    def _misfit(self) -> str:
        return f"the policy {self.policy_path}; give --model.policy the model that the checkpoint was trained from"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the format and what export needs."""
        policy = loading.absolute_path(self.policy_path)
        checkpoint["rlmt"] = {**self._record(), "policy": policy, "format": self.format.to_dict()}
        save_assets_beside_checkpoints(self.trainer, self._policy.config, self.tokenizer, self.format)

    def _planned_adapter(self) -> Any:
        return adapter_config_for(self.policy_config, self.lora)

    def check_checkpoint(self, checkpoint: Mapping[str, Any], fitting: bool) -> None:
        """Refuses a checkpoint of something else, of another adapter or another format; reads no weights.

        Args:
            checkpoint: as loaded.
            fitting: whether training is to go on from it.

        Raises:
            UserError: it is one.
        """
        super().check_checkpoint(checkpoint, fitting)
        self.check_format(ThinkingFormat.from_dict(checkpoint["rlmt"]["format"]), "--ckpt_path")


def target_tokens(rows: list[EncodedDemonstration]) -> int:
    """How many tokens the assistant wrote, ends of turns included."""
    return sum(len(ids) - prompt for row in rows for ids, prompt in zip(row.sequences, row.prompts, strict=True))


def _everywhere(rows: list[EncodedDemonstration]) -> int:
    """As `target_tokens`, over the rows of all ranks."""
    return sum(all_gather_object(target_tokens(rows)))


def _micro_batch(part: list[int], sequences: list[Tensor], first: list[int], device: torch.device) -> MicroBatch:
    """Some of the sequences padded on the right; position `first` of each and all behind it are predicted."""
    sequences, first = [sequences[i] for i in part], [first[i] for i in part]
    width = max(map(len, sequences)) - 1
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence) - 1] = sequence[:-1]
    counts = torch.tensor([len(sequence) - start for sequence, start in zip(sequences, first, strict=True)])
    columns = [torch.arange(start - 1, len(sequence) - 1) for sequence, start in zip(sequences, first, strict=True)]
    targets = [sequence[start:] for sequence, start in zip(sequences, first, strict=True)]
    return MicroBatch(
        samples=part,
        shared_prompt=None,
        input_ids=ids.to(device),
        rows=torch.arange(len(sequences)).repeat_interleave(counts).to(device),
        columns=torch.cat(columns).to(device),
        targets=torch.cat(targets).to(device),
    )
