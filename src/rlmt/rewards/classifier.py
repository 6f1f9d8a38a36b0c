"""A trained reward model: a sequence classifier with one output, such as Skywork-Reward-Llama-3.1-8B-v0.2.

Its input is the conversation of the prompt set plus the response as the assistant turn, rendered with the reward
model's own chat template and tokenizer. The policy's template, preamble and thinking instruction are not included.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from rlmt import progress
from rlmt.annotations import PretrainedConfig, PreTrainedModel
from rlmt.distributed.fsdp2 import call_as_forward, compute_device, pad_with_no_ops
from rlmt.distributed.rank_0_loading import load_on_rank_0
from rlmt.errors import UserError
from rlmt.models.attention import attention_options
from rlmt.models.quantization import NF4
from rlmt.models.reward_model import (
    classifier_config,
    classifier_tokenizer,
    last_token_states,
    load_classifier,
    score_states,
)
from rlmt.models.rows import group_rows, packs_rows
from rlmt.models.vocabulary import check_vocabulary
from rlmt.options import PositiveInt, check_ranges
from rlmt.rewards.base import Reward
from rlmt.rewards.conversation import ConversationReader
from rlmt.types import Message, Prompt, Status


class ClassifierReward(Reward):
    """Scores with a sequence classifier with one output, at the last token of the conversation, in float32.

    It supports every decoder whose classification model is Hugging Face's generic one (Llama, Qwen2, Qwen3, Gemma 2,
    Mistral, ...). The classifier is the submodule `model` after `load`; it is frozen and stays in evaluation mode.

    Input longer than `max_length` tokens is truncated and counted in `truncated`; the first one raises a warning.
    Truncation on the left removes the oldest tokens: the start of the conversation, or all of the prompt if the
    response alone is too long. Truncation on the right removes the end of the response. The BOS token and the
    template's closing tokens always stay.

    Args:
        model: Folder or Hub name of the reward model, with a tokenizer that has a chat template.
        dtype: Dtype of the weights and the forward; `auto` uses the checkpoint's. The score head runs in float32.
        max_length: Maximum input in tokens; None uses the model's context, or `tokens_per_batch` if that is smaller.
        truncation_side: Side on which longer input is truncated.
        tokens_per_batch: Tokens in one forward pass, padding included.
        name: Name under which the scores are logged.
        quantization: Quantizes the linear layers, except the score head, to 4 bits.
        attn_implementation: Attention implementation of transformers, such as flash_attention_2, or `varlen`
            as in `TrainingModule`; None takes its default, or eager for a model that caps attention logits (Gemma 2),
            which the default ignores.

    Raises:
        UserError: An argument is out of range.

    Example:
        >>> ClassifierReward("Skywork/Skywork-Reward-Llama-3.1-8B-v0.2", dtype="bfloat16").name
        'reward_model'
    """

    def __init__(
        self,
        model: str,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_length: PositiveInt | None = None,
        truncation_side: Literal["left", "right"] = "left",
        tokens_per_batch: PositiveInt = 16384,
        name: str = "reward_model",
        quantization: NF4 | None = None,
        attn_implementation: str | None = None,
    ) -> None:
        check_ranges(ClassifierReward, locals())
        super().__init__()
        self.source = model
        self.dtype = dtype
        self.max_length = max_length
        self.truncation_side = truncation_side
        self.tokens_per_batch = tokens_per_batch
        self.name = name
        self.quantization = quantization
        self.attn_implementation = attn_implementation
        self.truncated = 0
        """Number of inputs truncated so far."""
        self.model: PreTrainedModel | None = None
        self._reader: ConversationReader | None = None

    def check(self) -> None:
        """Reads the model's configuration and tokenizer.

        Raises:
            UserError: The model is missing, is not a classifier with one output, has no chat template, or has tokens
                without an embedding; `max_length` exceeds its context or `tokens_per_batch`; or the model
                cannot have `attn_implementation`.
        """
        config = classifier_config(self.source)
        attention_options(config, self.attn_implementation, f"reward model {self.source!r}")
        if self.quantization is not None:
            self.quantization.check()
        self.max_length = self._resolve_max_length(config)
        tokenizer = classifier_tokenizer(self.source)
        check_vocabulary(tokenizer, config, f"reward model {self.source!r}")
        self._reader = ConversationReader(tokenizer, self.source, self.template_date)

    def _resolve_max_length(self, config: PretrainedConfig) -> int:
        """`max_length`, or its default; raises UserError if it exceeds the context or `tokens_per_batch`."""
        context = getattr(config.get_text_config(), "max_position_embeddings", None) or self.tokens_per_batch
        longest = min(context, self.tokens_per_batch)
        if self.max_length is None:
            return longest
        if self.max_length > longest:
            limit = f"reward model {self.source!r} has a context of" if longest == context else "tokens_per_batch is"
            raise UserError(f"reward max_length is {self.max_length}, but {limit} {longest} tokens; lower max_length.")
        return self.max_length

    def load(self) -> None:
        """Loads the weights and freezes them.

        Raises:
            UserError: As in `check`, or the weights cannot be read or lack the score head.
        """
        self.check()
        # FSDP2 cannot shard weights in 4 bits, so every rank needs them.
        self.model = load_on_rank_0(self._read_model) if self.quantization is None else self._read_model()

    def _read_model(self) -> PreTrainedModel:
        model = load_classifier(self.source, self.dtype, self.quantization, self.attn_implementation)
        return model.requires_grad_(False)

    def train(self, mode: bool = True) -> ClassifierReward:
        """Stays in evaluation mode, whatever the mode of the parent module."""
        super().train(False)
        return self

    def render(self, messages: list[Message], response: str) -> str:
        """Renders a conversation as the reward model's tokenizer reads it, before truncation; for logs and tests."""
        return self._loaded_reader.render(messages, response)

    def encode(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[list[int]]:
        """The token ids of B conversations, truncated: what the model reads."""
        texts = [self.render(prompt.messages, response) for prompt, response in zip(prompts, responses, strict=True)]
        return [self._truncate(row) for row in self._loaded_reader.encode(texts)]

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """See `Reward.score`; the status is ignored."""
        rows = self.encode(prompts, responses)
        scores = torch.empty(len(rows), dtype=torch.float32)
        device = compute_device(self._loaded_model)
        packed = packs_rows(self._loaded_model)
        batches = group_rows([[len(row)] for row in rows], self.tokens_per_batch, packed, device)
        scored = 0
        for indices in pad_with_no_ops(batches, self._loaded_model, []):
            progress.report("scoring", scored, len(rows))
            scored += len(indices)
            if indices:
                scores[indices] = self._forward([rows[i] for i in indices]).cpu()
            else:
                self._forward([[0]])
        return scores

    @property
    def _loaded_reader(self) -> ConversationReader:
        """The reader, made by `check` on first use."""
        if self._reader is None:
            self.check()
        assert self._reader is not None
        return self._reader

    def _truncate(self, row: list[int]) -> list[int]:
        """Truncates a row of token ids to `max_length`; keeps a leading BOS and the template's closing tokens."""
        assert self.max_length is not None
        if len(row) <= self.max_length:
            return row
        if not self.truncated:
            warnings.warn(
                f"an input of reward model {self.source!r} has {len(row)} tokens and is truncated on the "
                f"{self.truncation_side} to max_length {self.max_length}; further truncations are only counted.",
                stacklevel=3,
            )
        self.truncated += 1
        if self.truncation_side == "left":
            head = row[: self._loaded_reader.leading_bos(row)]
            return head + row[len(row) - self.max_length + len(head) :]
        tail = self._loaded_reader.suffix_length
        return row[: max(self.max_length - tail, 0)] + row[len(row) - min(tail, self.max_length) :]

    @torch.no_grad()
    def _forward(self, rows: list[list[int]]) -> Tensor:
        """Computes the [b] float32 scores of b rows of token ids, on the model's device."""
        model, device = self._loaded_model, compute_device(self._loaded_model)
        # The trainer may use autocast. The reward runs in its own dtype, and its head in float32.
        with torch.autocast(device.type, enabled=False):
            return call_as_forward(model, _scores, [torch.tensor(row) for row in rows], device)

    @property
    def _loaded_model(self) -> PreTrainedModel:
        """The classifier; raises RuntimeError before `load`."""
        if self.model is None:
            raise RuntimeError(f"reward model {self.source!r} is not loaded: call load() before score()")
        return self.model


def _scores(model: PreTrainedModel, rows: Sequence[Tensor], device: torch.device) -> Tensor:
    backbone = getattr(model, model.base_model_prefix)
    return score_states(model, last_token_states(backbone, rows, device))


def shardable_models(rewards: nn.Module) -> list[PreTrainedModel]:
    """The loaded reward models that FSDP2 can shard; it cannot shard weights in 4 bits."""
    found = [reward for reward in rewards.modules() if isinstance(reward, ClassifierReward)]
    return [reward.model for reward in found if reward.model is not None and reward.quantization is None]
