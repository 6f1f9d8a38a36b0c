"""Reward-model training on preferences (Bradley and Terry, 1952; InstructGPT, arXiv 2203.02155)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from rlmt.annotations import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from rlmt.data.preferences import EncodedComparison
from rlmt.data.supervised import RowBatch
from rlmt.distributed.collectives import all_gather_object, rank_hook
from rlmt.distributed.fsdp2 import call_as_forward, pad_with_no_ops, rank_0_loads_for, shard_models
from rlmt.distributed.rank_0_loading import load_on_rank_0
from rlmt.formats.chat_template import check_has_template
from rlmt.models import loading
from rlmt.models.assets import REWARD_ASSETS, save_reward_assets
from rlmt.models.reward_model import last_token_states, load_reward_model, reward_config, score_states
from rlmt.models.rows import group_rows, packs_rows
from rlmt.models.vocabulary import check_vocabulary
from rlmt.modules.base import RestoredMixin
from rlmt.modules.checkpoints import checkpoint_folders
from rlmt.modules.checks import check_trainer, weights_dtype
from rlmt.modules.supervised import SupervisedModule
from rlmt.options import FiniteNonNegativeFloat, check_ranges
from rlmt.progress import track
from rlmt.rewards.calibration import calibration_bins, calibration_error
from rlmt.rewards.conversation import ConversationReader, set_pad_token


@dataclass
class PairLoss:
    """The share of one micro-batch in the loss of a step."""

    loss: Tensor
    """Scalar: all terms, with gradient."""
    rankings: Tensor
    """[p] float32 Bradley-Terry term of each pair, detached."""
    differences: Tensor
    """[p] float32 score of the chosen minus score of the rejected response of each pair, detached."""
    subsets: list[str | None]
    """Subset of the data that each pair belongs to."""
    rows: list[int]
    """Position of the row that each pair belongs to."""


class RewardModeling(RestoredMixin, SupervisedModule):  # type: ignore[misc] # Lightning's load_from_checkpoint
    """Trains a sequence classifier with one output to score the chosen response of each pair higher.

    With scores r and pairs (c, j) of a chosen and a rejected response the loss is the mean over all pairs of an
    optimizer step of

        -log σ(r_c - r_j - margin)  +  centering · (r_c + r_j)²

    (margins: Llama 2, arXiv 2307.09288; centring: arXiv 2312.09244), plus `attribute_weight` times the mean squared
    error over responses and attributes of a linear regression on the same hidden state, if the data rates responses. It
    does not depend on how the step is cut into micro-batches or spread over ranks.

    It scores what `ClassifierReward` scores: the conversation rendered by its `ConversationReader`, the hidden state of
    the last token, the head in float32. `rlmt export` writes the folder that `ClassifierReward` loads.

    Args:
        model: Folder or hub name of the initial model: a causal language model, which gets a new head, or a classifier
            with one output. Its tokenizer must have a chat template.
        centering: Weight of the squared sum of a pair's scores, which keeps their mean at 0.
        attribute_weight: Weight of the regression on ratings; unused if the data has none.
        **options: Those of `SupervisedModule`.

    Raises:
        UserError: An option is out of range, or, during setup, does not fit the model or the data.
    """

    data_module = "PreferenceDataModule"
    kind = "RewardModeling"
    path_option = "model"
    saved = ("model.", "attribute_head.")

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
        self._differences: list[Tensor] = []
        self._loss = MeanMetric(sync_on_compute=False)  # every rank updates it with the pairs of all ranks
        self._accuracy = MeanMetric(sync_on_compute=False)
        self._by_subset = nn.ModuleList()

    @cached_property
    def model_config(self) -> PretrainedConfig:
        """Config of the classifier."""
        return reward_config(self.model_path)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the reward model; raises UserError if it has tokens that the model has no embedding for."""
        tokenizer = loading.load_tokenizer(self.model_path)
        check_vocabulary(tokenizer, self.model_config, self.model_path)
        return tokenizer

    @cached_property
    def reader(self) -> ConversationReader:
        """Renders conversations.

        Raises:
            UserError: The tokenizer has no chat template, or none named default.
        """
        purpose = "renders conversations for a reward model"
        check_has_template(self.tokenizer, self.model_path, purpose, "put one beside it as chat_template.jinja")
        return ConversationReader(self.tokenizer, self.model_path)

    @property
    def max_positions(self) -> int:
        """Context length of the model in tokens."""
        return loading.max_positions(self.model_config)

    @rank_hook
    def setup(self, stage: str) -> None:
        """Checks the configuration before any weights are loaded, and creates a metric for each subset."""
        check_trainer(self.trainer)
        self.check_model_options(self.model_config, self.model_path)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self._subsets = data.subsets
        self._by_subset = nn.ModuleList(MeanMetric(sync_on_compute=False) for _ in self._subsets)

    @rank_hook
    def configure_model(self) -> None:
        """Loads the model or initializes it, adds a head for ratings if the data has them, and shards under FSDP2."""
        self.check_restored()
        if self.model is None:
            self._load_model()

    def _load_model(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        with rank_0_loads_for(self.trainer):
            self._add_model(getattr(torch, weights_dtype(self.trainer, self.lora)), data.attributes)
        self.model = self.set_training_mode(self.trained_model)
        self.add_kernels(self.model)
        cast(Any, self.model).score.requires_grad_(True)  # LoRA freezes the head, which is often a new one
        # Beside an adapter, heads are unsharded like the adapter.
        shard_models(self.trainer, self.model, self.attribute_head if self.lora is None else None)

    def _add_model(self, dtype: torch.dtype, attributes: int) -> None:
        """Loads the model or initializes it, with its adapter, and a head for `attributes` ratings if there are any."""
        self.model = load_on_rank_0(lambda: self._read_model(dtype))
        if attributes:
            # The bias soon learns the mean rating; a zero init leaves torch's random state alone.
            self.attribute_head = nn.Linear(self.model_config.get_text_config().hidden_size, attributes)
            nn.init.zeros_(self.attribute_head.weight)
            nn.init.zeros_(self.attribute_head.bias)

    def _read_model(self, dtype: torch.dtype) -> PreTrainedModel:
        model = load_reward_model(
            self.model_path, self.from_scratch, self.attn_implementation, dtype, self.quantization
        )
        set_pad_token(self.reader, model.config)
        if self.lora is not None:
            self.lora.add_to(model)
        return model

    def load_initial(self, state_dict: Mapping[str, Tensor]) -> None:
        """See `RestoredMixin.load_initial`."""
        self._add_model(torch.float32, len(state_dict.get("attribute_head.bias", ())))
        cast(Any, self.model).score.requires_grad_(True)  # as in the run, so that the checkpoint holds it

    def planned_model(self) -> PreTrainedModel:
        """See `TrainingModule.planned_model`."""
        from transformers import AutoModelForSequenceClassification

        return loading.meta_model(self.model_config, AutoModelForSequenceClassification)

    @property
    def trained_model(self) -> PreTrainedModel:
        """The classifier, once it is loaded."""
        assert self.model is not None, "configure_model has not run"
        return self.model

    # One step ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: RowBatch[EncodedComparison], batch_idx: int) -> None:
        """Takes one optimizer step on a batch of comparisons."""
        parts: list[PairLoss] = []

        def losses() -> Iterator[Tensor]:
            for part in self.losses(batch.rows):
                parts.append(part)
                yield part.loss

        rates = self.learning_rates("rm/lr")
        loss, norm = self.take_step(losses())
        rankings, differences, _ = _pairs_of_all_ranks(parts)
        metrics = {
            "rm/loss": loss,
            "rm/ranking_loss": float(rankings.mean()),
            "rm/accuracy": float((differences > 0).float().mean()),
            "rm/difference": float(differences.mean()),
            "rm/grad_norm": norm,
            **rates,
        }
        self.log_step(metrics, len(batch.rows), {"rm/accuracy": "acc"})

    def losses(self, rows: list[EncodedComparison], regress: bool = True) -> Iterator[PairLoss]:
        """The micro-batches of this rank: their shares in the loss over the rows of all ranks.

        Args:
            rows: Rows of this rank.
            regress: Whether to include the regression on ratings, if there are any.
        """
        pair_count = sum(all_gather_object(sum(len(row.pairs) for row in rows)))
        rating_count = sum(all_gather_object(sum(len(ratings) for row in rows for ratings in row.attributes)))
        assert self.model is not None
        lengths = [[len(sequence) for sequence in row.sequences] for row in rows]
        parts = group_rows(lengths, self.tokens_per_micro_batch, packs_rows(self.model), self.device)
        for part in track("micro-batch", pad_with_no_ops(parts, self.model, [])):
            owners = [i for i in part for _ in rows[i].pairs]
            yield self._loss_of([rows[i] for i in part], owners, pair_count, rating_count if regress else 0)

    def _loss_of(
        self, rows: list[EncodedComparison], owners: list[int], pair_count: int, rating_count: int
    ) -> PairLoss:
        """Loss of one micro-batch; without rows a no-op that keeps FSDP ranks in lockstep."""
        assert self.model is not None
        sequences = [s for row in rows for s in row.sequences]
        no_op = [torch.zeros(1, dtype=torch.int32)]
        scores, states = call_as_forward(self.model, _scores_and_states, sequences or no_op, self.device)
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
                predicted = self.attribute_head(states[: len(sequences)].float())
            errors = predicted - ratings.view_as(predicted)
            loss = loss + self.attribute_weight * errors.square().sum() / rating_count
        subsets = [row.subset for row in rows for _ in row.pairs]
        return PairLoss(loss, rankings.detach(), (better - worse).detach(), subsets, owners)

    # Held-out preferences ---------------------------------------------------------------------------------------------

    def validation_step(self, batch: RowBatch[EncodedComparison], batch_idx: int) -> dict[str, Any]:
        """Adds to loss and accuracies over all held-out pairs.

        Returns:
            `differences`, [p] score of the chosen minus score of the rejected response of each pair of all ranks; and
            `values` by metric, [r, 2] for each row of this rank the sum over its pairs, and their number.
        """
        return self._evaluate(batch, "val")

    def test_step(self, batch: RowBatch[EncodedComparison], batch_idx: int) -> dict[str, Any]:
        """As `validation_step`."""
        return self._evaluate(batch, "test")

    def _evaluate(self, batch: RowBatch[EncodedComparison], stage: str) -> dict[str, Any]:
        parts = list(self.losses(batch.rows, regress=False))
        rankings, differences, subsets = _pairs_of_all_ranks(parts)
        right = (differences > 0).float().to(self.device)  # a tie is wrong
        self._loss.update(rankings.to(self.device))
        self._accuracy.update(right)
        self.log(f"{stage}/loss", self._loss, on_epoch=True, batch_size=len(right))
        self.log(f"{stage}/accuracy", self._accuracy, on_epoch=True, prog_bar=True, batch_size=len(right))
        for name, metric in zip(self._subsets, self._by_subset, strict=True):
            here = right[torch.tensor([subset == name for subset in subsets], device=right.device)]
            if len(here):
                metric.update(here)  # type: ignore[operator]
            self.log(f"{stage}/accuracy/{name}", metric, on_epoch=True, batch_size=len(right))  # type: ignore[arg-type]
        self._differences.append(differences)
        return {"differences": differences, "values": _values_of_rows(parts)}

    def on_validation_epoch_end(self) -> None:
        """Logs the calibration error over all held-out pairs."""
        if self._differences:
            bins = calibration_bins(torch.cat(self._differences).double().numpy())
            self.log(f"{'test' if self.trainer.testing else 'val'}/calibration_error", calibration_error(bins))
        self._differences = []

    on_test_epoch_end = on_validation_epoch_end

    # Checkpoints ------------------------------------------------------------------------------------------------------

    @property
    def mismatch(self) -> str:
        """See `SupervisedModule.mismatch`."""
        return (
            f"the reward model {self.model_path} with the attributes of these data: give --model.model and --data.path "
            "as in the run that wrote it"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what `rlmt export` requires."""
        checkpoint["rlmt"] = {**self.checkpoint_state(), "model": loading.absolute_path(self.model_path)}
        for folder in checkpoint_folders(self.trainer):
            save_reward_assets(folder / REWARD_ASSETS, self.trained_model.config, self.tokenizer)


def _scores_and_states(model: PreTrainedModel, rows: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Scores of b conversations, and the hidden states of their last tokens: [b] and [b, H]."""
    states = last_token_states(getattr(model, model.base_model_prefix), rows, device)
    return score_states(model, states).clone(), states  # FSDP2 warns of a view


def _pairs_of_all_ranks(parts: list[PairLoss]) -> tuple[Tensor, Tensor, list[str | None]]:
    """Rankings, differences and subsets of the pairs of all ranks, on the CPU."""
    mine = [(part.rankings.cpu(), part.differences.cpu(), part.subsets) for part in parts]
    rankings, differences, subsets = zip(*(part for rank in all_gather_object(mine) for part in rank), strict=True)
    return torch.cat(rankings), torch.cat(differences), [subset for part in subsets for subset in part]


def _values_of_rows(parts: list[PairLoss]) -> dict[str, Tensor]:
    """Loss and accuracies of this rank's rows: [r, 2] the sum over the pairs of each row, and their number."""
    none = torch.zeros(0)  # a rank may have no rows
    rankings = torch.cat([none, *(part.rankings.cpu() for part in parts)])
    right = (torch.cat([none, *(part.differences.cpu() for part in parts)]) > 0).float()
    owners = torch.tensor([row for part in parts for row in part.rows], dtype=torch.long)
    subsets = [subset for part in parts for subset in part.subsets]
    values = {"loss": _sums_by_row(rankings, owners), "accuracy": _sums_by_row(right, owners)}
    for name in sorted({subset for subset in subsets if subset is not None}):
        here = torch.tensor([subset == name for subset in subsets])
        values[f"accuracy/{name}"] = _sums_by_row(right[here], owners[here])
    return values


def _sums_by_row(values: Tensor, owners: Tensor) -> Tensor:
    """[r, 2] sum and number of the values of each row that has any."""
    rows, position = torch.unique(owners, return_inverse=True)
    return torch.zeros(len(rows), 2).index_add_(0, position, torch.stack([values, torch.ones_like(values)], dim=1))
