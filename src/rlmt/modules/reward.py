"""Training of a reward model on preferences (Bradley and Terry, 1952; InstructGPT, arXiv 2203.02155)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAccuracy
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlmt.batching import batches_by_length
from rlmt.data.preferences import EncodedComparison
from rlmt.data.supervised import RowBatch
from rlmt.errors import UserError
from rlmt.export import REWARD_ASSETS, save_reward_assets
from rlmt.models import loading
from rlmt.models.reward_model import load_reward_model, reward_config
from rlmt.modules.checkpoints import checkpoint_folders, record_of
from rlmt.modules.rlmt import LRSchedulerCallable, OptimizerCallable
from rlmt.modules.supervised import check_options, check_trainer, make_optimizer, take_step
from rlmt.resume.options import adopt_all, schedule_options
from rlmt.rewards.classifier import score_states, states_at_end
from rlmt.rewards.conversation import ConversationReader
from rlmt.rng import random_states, restore_random_states


@dataclass
class PairLoss:
    """One micro-batch's share of a step's loss."""

    loss: Tensor
    """Scalar: all terms, with gradient."""
    ranking: Tensor
    """Scalar: the Bradley-Terry term alone, detached."""
    differences: Tensor
    """[p] float32 score of the better minus score of the worse response of each pair, detached."""
    subsets: list[str | None]
    """Which part of the data each pair belongs to."""


class RewardModeling(LightningModule):
    """Trains a sequence classifier with one output so that the better response of each pair scores higher.

    With scores r and pairs (c, j) of a chosen and a rejected response the loss is the mean over all pairs of an
    optimizer step of

        -log σ(r_c - r_j - margin)  +  centering · (r_c + r_j)²

    (margins: Llama 2, arXiv 2307.09288; centring: arXiv 2312.09244), plus `attribute_weight` times the mean squared
    error over responses and attributes of a linear regression on the same hidden state, if the data rates responses. It
    does not depend on how the step is cut into micro-batches.

    What is scored is what `ClassifierReward` scores: the conversation written out by its `ConversationReader`, the
    hidden state of the last token, the head in float32. `rlmt export` writes the folder that it loads.

    Args:
        model: folder or hub name of what to start from: a causal language model, which is given a new head, or a
            classifier with one output; with a chat template in its tokenizer.
        from_scratch: start from random weights instead, drawn by the run's seed: `model` is then a folder with
            config.json and a tokenizer, and weights in it are not read.
        optimizer: made from the trainable parameters, which it is given with their names.
        scheduler: made from the optimizer and stepped after each of its steps; null keeps the learning rate constant.
        centering: weight of the squared sum of a pair's scores, which keeps their mean at 0.
        attribute_weight: weight of the regression on ratings; not read where the data has none.
        tokens_per_micro_batch: tokens, padding included, that one forward and backward holds; the responses of a row
            stay together.
        max_grad_norm: the gradient is clipped to this norm.
        gradient_checkpointing: trade time for memory in the backward.
        attn_implementation: transformers' name of an attention, such as flash_attention_2; null lets it choose.

    Raises:
        UserError: an option is out of range, or later, while setting up, does not fit the model or the data.
    """

    data_module = "PreferenceDataModule"
    """What it is trained on."""

    def __init__(
        self,
        model: str,
        from_scratch: bool = False,
        optimizer: OptimizerCallable = AdamW,
        scheduler: LRSchedulerCallable | None = None,
        centering: float = 0.0,
        attribute_weight: float = 1.0,
        tokens_per_micro_batch: int = 16384,
        max_grad_norm: float = 1.0,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        check_options(
            {"tokens_per_micro_batch": tokens_per_micro_batch, "max_grad_norm": max_grad_norm},
            {"centering": centering, "attribute_weight": attribute_weight},
        )
        self.model_path = model
        self.from_scratch = from_scratch
        self.centering = centering
        self.attribute_weight = attribute_weight
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.max_grad_norm = max_grad_norm
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self._optimizer, self._scheduler = optimizer, scheduler
        self.model: PreTrainedModel | None = None
        self.attribute_head: nn.Linear | None = None
        self._subsets: list[str] = []
        self._loss = MeanMetric()
        self._accuracy = BinaryAccuracy()
        self._by_subset = nn.ModuleList()

    @cached_property
    def model_config(self) -> PretrainedConfig:
        """The classifier's configuration, read without weights."""
        return reward_config(self.model_path)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The reward model's tokenizer."""
        return loading.load_tokenizer(self.model_path)

    @cached_property
    def reader(self) -> ConversationReader:
        """How conversations are written out.

        Raises:
            UserError: the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.model_path}: the tokenizer has no chat template, which a reward model reads conversations "
                "with; put one beside it as chat_template.jinja"
            )
        return ConversationReader(self.tokenizer, self.model_path)

    @property
    def max_positions(self) -> int:
        """Longest conversation that the model can take, in tokens."""
        return loading.max_positions(self.model_config)

    def setup(self, stage: str) -> None:
        """Looks for mistakes that can be seen before any weights are read, and makes a metric for each subset."""
        check_trainer(self.trainer)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self._subsets = data.subsets
        self._by_subset = nn.ModuleList(BinaryAccuracy() for _ in self._subsets)

    def configure_model(self) -> None:
        """Loads the model, or draws it; adds a head for attributes if the data has them."""
        if self.model is not None:
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        fitting = self.trainer.state.fn == "fit"
        self.model = self._load().train(fitting)
        if data.attributes:
            # The mean rating is soon learnt by the bias; a zero start leaves torch's random state alone.
            self.attribute_head = nn.Linear(self.model_config.get_text_config().hidden_size, data.attributes)
            nn.init.zeros_(self.attribute_head.weight)
            nn.init.zeros_(self.attribute_head.bias)
        if fitting and self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def _load(self) -> PreTrainedModel:
        model = load_reward_model(self.model_path, self.from_scratch, self.attn_implementation)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def configure_optimizers(self) -> Any:
        """The optimizer over what can be trained, and the scheduler if there is one."""
        made = make_optimizer(self.trainer, self, self._optimizer, self._scheduler)
        parts = made if isinstance(made, dict) else {"optimizer": made, "lr_scheduler": None}
        self._configured = schedule_options(parts["optimizer"], parts["lr_scheduler"])
        return made

    def on_train_start(self) -> None:
        """Options of the optimizer and the scheduler are those of this start, whatever a checkpoint had."""
        adopt_all(self, self._configured)

    # One step ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: RowBatch[EncodedComparison], batch_idx: int) -> None:
        """Takes one optimizer step on a batch of comparisons."""
        seen: list[PairLoss] = []

        def losses() -> Iterator[Tensor]:
            for part in self.losses(batch.rows):
                seen.append(part)
                yield part.loss

        loss, norm = take_step(self, losses(), self.max_grad_norm)
        differences = torch.cat([part.differences for part in seen])
        metrics = {
            "rm/loss": loss,
            "rm/ranking_loss": float(sum(part.ranking for part in seen)),
            "rm/accuracy": float((differences > 0).float().mean()),
            "rm/difference": float(differences.mean()),
            "rm/grad_norm": norm,
        }
        self.log_dict(metrics, batch_size=len(batch.rows))
        self.log("acc", metrics["rm/accuracy"], prog_bar=True, logger=False, batch_size=len(batch.rows))

    def losses(self, rows: list[EncodedComparison], regress: bool = True) -> Iterator[PairLoss]:
        """Each micro-batch's share of the loss of all rows together, with or without the regression on ratings."""
        pair_count = sum(len(row.pairs) for row in rows)
        rating_count = sum(len(ratings) for row in rows for ratings in row.attributes) if regress else 0
        most = max(len(row.sequences) for row in rows)
        for part in batches_by_length([row.longest for row in rows], self.tokens_per_micro_batch, most):
            yield self._loss_of([rows[i] for i in part], pair_count, rating_count)

    def _loss_of(self, rows: list[EncodedComparison], pair_count: int, rating_count: int) -> PairLoss:
        model: Any = self.model
        states = states_at_end(
            getattr(model, model.base_model_prefix), [s for row in rows for s in row.sequences], self.device
        )
        scores = score_states(model, states)
        pairs, start = [], 0
        for row in rows:
            pairs += [(start + better, start + worse) for better, worse in row.pairs]
            start += len(row.sequences)
        better, worse = scores[torch.tensor(pairs, device=self.device)].unbind(1)
        margins = torch.tensor([margin for row in rows for margin in row.margins], device=self.device)
        ranking = -F.logsigmoid(better - worse - margins).sum() / pair_count
        loss = ranking
        if self.centering:
            loss = loss + self.centering * (better + worse).square().sum() / pair_count
        if self.attribute_head is not None and rating_count:
            ratings = torch.tensor([rating for row in rows for rating in row.attributes], device=self.device)
            with torch.autocast(self.device.type, enabled=False):
                errors = self.attribute_head(states.float()) - ratings
            loss = loss + self.attribute_weight * errors.square().sum() / rating_count
        subsets = [row.subset for row in rows for _ in row.pairs]
        return PairLoss(loss, ranking.detach(), (better - worse).detach(), subsets)

    # Held-out preferences ---------------------------------------------------------------------------------------------

    def validation_step(self, batch: RowBatch[EncodedComparison], batch_idx: int) -> dict[str, Tensor]:
        """Adds to loss and accuracies over all held-out pairs.

        Returns:
            `differences`: [p] score of the better minus score of the worse response of each pair.
        """
        return self._evaluate(batch, "val")

    def test_step(self, batch: RowBatch[EncodedComparison], batch_idx: int) -> dict[str, Tensor]:
        """As `validation_step`."""
        return self._evaluate(batch, "test")

    def _evaluate(self, batch: RowBatch[EncodedComparison], stage: str) -> dict[str, Tensor]:
        parts = list(self.losses(batch.rows, regress=False))
        differences = torch.cat([part.differences for part in parts])
        subsets = [subset for part in parts for subset in part.subsets]
        right = (differences > 0).float()  # a tie is wrong
        self._loss.update(torch.stack([part.ranking for part in parts]).sum(), len(right))
        self._accuracy.update(right, torch.ones_like(right))
        self.log(f"{stage}/loss", self._loss, on_epoch=True, batch_size=len(right))
        self.log(f"{stage}/accuracy", self._accuracy, on_epoch=True, prog_bar=True, batch_size=len(right))
        for name, metric in zip(self._subsets, self._by_subset, strict=True):
            here = right[torch.tensor([subset == name for subset in subsets], device=right.device)]
            if len(here):
                metric.update(here, torch.ones_like(here))  # type: ignore[operator]
            self.log(f"{stage}/accuracy/{name}", metric, on_epoch=True, batch_size=len(right))  # type: ignore[arg-type]
        return {"differences": differences}

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads a reward model.

        Raises:
            UserError: the weights are not those of this model, or of data with other attributes.
        """
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            raise UserError(
                f"The checkpoint's weights do not fit the reward model {self.model_path} with the attributes of these "
                "data; give --model.model and --data.path as they were."
            ) from error

    def resume_state(self) -> dict[str, Any]:
        """What changes while training beside weights, optimizer and scheduler, as plain data."""
        return {"random": random_states()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what export needs."""
        checkpoint["rlmt"] = {"module": "RewardModeling", "model": self.model_path, **self.resume_state()}
        assert self.model is not None
        for folder in checkpoint_folders(self.trainer):
            save_reward_assets(folder / REWARD_ASSETS, self.model.config, self.tokenizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of something else.

        Raises:
            UserError: it is one.
        """
        saved = record_of(checkpoint, "RewardModeling")
        if self.trainer.state.fn == "fit":
            restore_random_states(saved["random"])
