"""Training of a reward model on preferences (Bradley and Terry, 1952; InstructGPT, arXiv 2203.02155)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAccuracy
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlmt.data.preferences import EncodedComparison
from rlmt.data.supervised import RowBatch
from rlmt.distributed import collectives
from rlmt.distributed.collectives import all_gather_object
from rlmt.distributed.fsdp2 import call_as_forward, pad_with_no_ops, shard_models
from rlmt.errors import UserError
from rlmt.export.checkpoints import REWARD_ASSETS, save_reward_assets
from rlmt.models import loading
from rlmt.models.micro_batch import batches_by_length
from rlmt.models.reward_model import load_reward_model, reward_config
from rlmt.modules.checkpoints import checkpoint_folders
from rlmt.modules.checks import adapter_config_for, check_trainer, weights_dtype
from rlmt.modules.supervised import SupervisedModule, take_step
from rlmt.ranges import FiniteNonNegativeFloat, check_ranges
from rlmt.rewards.classifier import score_states, states_at_end
from rlmt.rewards.conversation import ConversationReader


@dataclass
class PairLoss:
    """One micro-batch's share of a step's loss."""

    loss: Tensor
    """Scalar: all terms, with gradient."""
    rankings: Tensor
    """[p] float32 the Bradley-Terry term of each pair, detached."""
    differences: Tensor
    """[p] float32 score of the better minus score of the worse response of each pair, detached."""
    subsets: list[str | None]
    """Which part of the data each pair belongs to."""


class RewardModeling(SupervisedModule):
    """Trains a sequence classifier with one output so that the better response of each pair scores higher.

    With scores r and pairs (c, j) of a chosen and a rejected response the loss is the mean over all pairs of an
    optimizer step of

        -log σ(r_c - r_j - margin)  +  centering · (r_c + r_j)²

    (margins: Llama 2, arXiv 2307.09288; centring: arXiv 2312.09244), plus `attribute_weight` times the mean squared
    error over responses and attributes of a linear regression on the same hidden state, if the data rates responses. It
    does not depend on how the step is cut into micro-batches or spread over ranks.

    What is scored is what `ClassifierReward` scores: the conversation written out by its `ConversationReader`, the
    hidden state of the last token, the head in float32. `rlmt export` writes the folder that it loads.

    Args:
        model: folder or hub name of what to start from: a causal language model, which is given a new head, or a
            classifier with one output; with a chat template in its tokenizer.
        centering: weight of the squared sum of a pair's scores, which keeps their mean at 0.
        attribute_weight: weight of the regression on ratings; not read where the data has none.
        **options: those of `SupervisedModule`.

    Raises:
        UserError: an option is out of range, or later, while setting up, does not fit the model or the data.
    """

    data_module = "PreferenceDataModule"
    kind = "RewardModeling"

    def __init__(
        self,
        model: str,
        centering: FiniteNonNegativeFloat = 0.0,
        attribute_weight: FiniteNonNegativeFloat = 1.0,
        **options: Any,
    ) -> None:
        check_ranges(RewardModeling, locals())
        super().__init__(**options)
        self.model_path = model
        self.centering = centering
        self.attribute_weight = attribute_weight
        self.model: PreTrainedModel | None = None
        self.attribute_head: nn.Linear | None = None
        self._subsets: list[str] = []
        self._loss = MeanMetric(sync_on_compute=False)  # each rank sees the pairs of all
        self._accuracy = BinaryAccuracy(sync_on_compute=False)
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

    @collectives.rank_hook
    def setup(self, stage: str) -> None:
        """Looks for mistakes that can be seen before any weights are read, and makes a metric for each subset."""
        check_trainer(self.trainer)
        self._check_adapter()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self._subsets = data.subsets
        self._by_subset = nn.ModuleList(BinaryAccuracy(sync_on_compute=False) for _ in self._subsets)

    @collectives.rank_hook
    def configure_model(self) -> None:
        """Loads the model, or draws it; adds a head for attributes if the data has them."""
        if self.model is not None:
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.model = self._ready(self._load())
        cast(Any, self.model).score.requires_grad_(True)  # an adapter leaves the head alone, and it is often a new one
        if data.attributes:
            # The mean rating is soon learnt by the bias; a zero start leaves torch's random state alone.
            self.attribute_head = nn.Linear(self.model_config.get_text_config().hidden_size, data.attributes)
            nn.init.zeros_(self.attribute_head.weight)
            nn.init.zeros_(self.attribute_head.bias)
        # Beside an adapter heads are whole on every rank, as it is.
        shard_models(self.trainer, self.model, self.attribute_head if self.lora is None else None)

    def _load(self) -> PreTrainedModel:
        dtype = getattr(torch, weights_dtype(self.trainer, self.lora))
        model = load_reward_model(
            self.model_path, self.from_scratch, self.attn_implementation, dtype, self.quantization
        )
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def _planned_adapter(self) -> Any:
        return adapter_config_for(self.model_config, self.lora, AutoModelForSequenceClassification)

    @property
    def _trained(self) -> PreTrainedModel:
        assert self.model is not None, "configure_model has not run"
        return self.model

    # One step ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: RowBatch[EncodedComparison], batch_idx: int) -> None:
        """Takes one optimizer step on a batch of comparisons."""
        seen: list[PairLoss] = []

        def losses() -> Iterator[Tensor]:
            for part in self.losses(batch.rows):
                seen.append(part)
                yield part.loss

        loss, norm = take_step(self, losses(), self.max_grad_norm)
        rankings, differences, _ = _pairs_of_all_ranks(seen)
        metrics = {
            "rm/loss": loss,
            "rm/ranking_loss": float(rankings.mean()),
            "rm/accuracy": float((differences > 0).float().mean()),
            "rm/difference": float(differences.mean()),
            "rm/grad_norm": norm,
        }
        self.log_dict(metrics, batch_size=len(batch.rows))
        self.log("acc", metrics["rm/accuracy"], prog_bar=True, logger=False, batch_size=len(batch.rows))

    def losses(self, rows: list[EncodedComparison], regress: bool = True) -> Iterator[PairLoss]:
        """The shares of this rank's micro-batches in the loss of all rows of all ranks together.

        Args:
            rows: this rank's.
            regress: with the regression on ratings, if there are any.
        """
        pair_count = sum(all_gather_object(sum(len(row.pairs) for row in rows)))
        rating_count = sum(all_gather_object(sum(len(ratings) for row in rows for ratings in row.attributes)))
        most = max((len(row.sequences) for row in rows), default=1)
        parts = batches_by_length([row.longest for row in rows], self.tokens_per_micro_batch, most)
        assert self.model is not None
        for part in pad_with_no_ops(parts, self.model, []):
            yield self._loss_of([rows[i] for i in part], pair_count, rating_count if regress else 0)

    def _loss_of(self, rows: list[EncodedComparison], pair_count: int, rating_count: int) -> PairLoss:
        """Without rows it runs what another rank runs at this time, and counts nothing."""
        assert self.model is not None
        sequences = [s for row in rows for s in row.sequences]
        idle = [torch.zeros(1, dtype=torch.int32)]
        scores, states = call_as_forward(self.model, _scores_and_states, sequences or idle, self.device)
        pairs: list[tuple[int, int]] = []
        start = 0
        for row in rows:
            pairs += [(start + better, start + worse) for better, worse in row.pairs]
            start += len(row.sequences)
        better, worse = scores[torch.tensor(pairs, dtype=torch.long, device=self.device).view(-1, 2)].unbind(1)
        margins = torch.tensor([margin for row in rows for margin in row.margins], device=self.device)
        rankings = -F.logsigmoid(better - worse - margins)
        loss = rankings.sum() / pair_count
        if self.centering:
            loss = loss + self.centering * (better + worse).square().sum() / pair_count
        if self.attribute_head is not None and rating_count:
            ratings = torch.tensor([rating for row in rows for rating in row.attributes], device=self.device)
            with torch.autocast(self.device.type, enabled=False):
                found = self.attribute_head(states[: len(sequences)].float())
            errors = found - ratings.view_as(found)
            loss = loss + self.attribute_weight * errors.square().sum() / rating_count
        subsets = [row.subset for row in rows for _ in row.pairs]
        return PairLoss(loss, rankings.detach(), (better - worse).detach(), subsets)

    # Held-out preferences ---------------------------------------------------------------------------------------------

    def validation_step(self, batch: RowBatch[EncodedComparison], batch_idx: int) -> dict[str, Tensor]:
        """Adds to loss and accuracies over all held-out pairs.

        Returns:
            `differences`: [p] score of the better minus score of the worse response of each pair of all ranks.
        """
        return self._evaluate(batch, "val")

    def test_step(self, batch: RowBatch[EncodedComparison], batch_idx: int) -> dict[str, Tensor]:
        """As `validation_step`."""
        return self._evaluate(batch, "test")

    def _evaluate(self, batch: RowBatch[EncodedComparison], stage: str) -> dict[str, Tensor]:
        rankings, differences, subsets = _pairs_of_all_ranks(list(self.losses(batch.rows, regress=False)))
        right = (differences > 0).float().to(self.device)  # a tie is wrong
        self._loss.update(rankings.to(self.device))
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

    @property
    def _misfit(self) -> str:
        return (
            f"the reward model {self.model_path} with the attributes of these data; give --model.model and --data.path "
            "as they were"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what export needs."""
        checkpoint["rlmt"] = {**self._record(), "model": loading.absolute_path(self.model_path)}
        for folder in checkpoint_folders(self.trainer):
            save_reward_assets(folder / REWARD_ASSETS, self._trained.config, self.tokenizer)


def _scores_and_states(model: PreTrainedModel, rows: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Scores of b conversations, and the hidden states that they are read off: [b] and [b, H]."""
    states = states_at_end(getattr(model, model.base_model_prefix), rows, device)
    return score_states(model, states).clone(), states  # FSDP2 warns of a view


def _pairs_of_all_ranks(parts: list[PairLoss]) -> tuple[Tensor, Tensor, list[str | None]]:
    """Rankings, differences and subsets of the pairs in all ranks' micro-batches, on the CPU."""
    mine = [(part.rankings.cpu(), part.differences.cpu(), part.subsets) for part in parts]
    rankings, differences, subsets = zip(*(part for rank in all_gather_object(mine) for part in rank), strict=True)
    return torch.cat(rankings), torch.cat(differences), [subset for part in subsets for subset in part]
