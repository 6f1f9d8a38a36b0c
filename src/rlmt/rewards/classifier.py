"""A trained reward model: a sequence classifier with one output, such as Skywork-Reward-Llama-3.1-8B-v0.2.

What it reads is the conversation of the prompt set plus the response as the assistant's turn, written out by the reward
model's own chat template and tokenizer. The policy's template, preamble and thinking instruction are no part of it.

Two things differ from calling Hugging Face's `...ForSequenceClassification` on a padded batch, each because the plain
call can be silently wrong. The score is read at each row's last token by its position, not at the rightmost token that
is not the pad id, which is another one where the pad token also ends a turn. And the score head runs in float32,
whatever the weights are stored in: around a score of 20 bfloat16 has steps of 0.125, so close responses would tie.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForSequenceClassification

from rlmt.distributed.fsdp2 import call_as_forward, compute_device, pad_with_no_ops
from rlmt.errors import UserError
from rlmt.models.micro_batch import batches_by_length
from rlmt.models.quantization import NF4
from rlmt.ranges import PositiveInt, check_ranges
from rlmt.rewards.base import Reward
from rlmt.rewards.conversation import ConversationReader, first_line
from rlmt.types import Message, Status


class ClassifierReward(Reward):
    """Scores with a sequence classifier that has one output, at the conversation's last token, in float32.

    Works for every decoder whose classification model is Hugging Face's generic one (Llama, Qwen2, Qwen3, Gemma 2,
    Mistral, ...). The classifier is the submodule `model` after `load`; it is frozen and stays in evaluation mode.

    Input longer than `max_length` tokens is cut, counted in `truncated` and warned of once. Cut on the left, the oldest
    tokens go (the head of the conversation, up to and including the prompt where the response alone is too long); cut
    on the right, the end of the response goes. Either way the BOS token and the template's closing tokens stay.

    Args:
        model: Folder or hub name of the reward model; its tokenizer, with a chat template, lies beside the weights.
        dtype: What the weights are kept and run in; `auto` takes the checkpoint's. The score head runs in float32.
        max_length: Longest input in tokens; by default the model's context, or `tokens_per_batch` where that is less.
        truncation_side: Which side of a longer input is cut.
        tokens_per_batch: Tokens in one forward pass, padding included.
        name: Under which the scores are logged.
        quantization: Holds the linear layers in 4 bits, but not the score head.

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
        self.truncated = 0
        """How many inputs have been cut so far."""
        self.model: PreTrainedModel | None = None
        self._reader: ConversationReader | None = None

    def check(self) -> None:
        """Reads the model's configuration and tokenizer.

        Raises:
            UserError: The model is missing, is no classifier with one output, has no chat template, or is asked for
                longer input than it or `tokens_per_batch` can hold.
        """
        config = _load_config(self.source)
        if self.quantization is not None:
            self.quantization.check()
        if config.num_labels != 1:
            raise UserError(
                f"reward model {self.source!r} has {config.num_labels} outputs but must have one (num_labels: 1 in its "
                "config.json): give a scalar reward model, not a chat model or a multi-objective one"
            )
        if "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {}):
            code = ", ".join(config.architectures or ["?"])
            raise UserError(
                f"reward model {self.source!r} has a head of its own code ({code}), which is never run: give a plain "
                "sequence classifier"
            )
        architecture = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
        if not (isinstance(architecture, type) and issubclass(architecture, GenericForSequenceClassification)):
            raise UserError(
                f"reward model {self.source!r} is of type {config.model_type!r}, which has no decoder classifier in "
                "transformers: give a Llama, Qwen, Gemma 2 or Mistral reward model"
            )
        self.max_length = self._checked_max_length(config)
        self._reader = ConversationReader(_load_tokenizer(self.source), self.source)

    def _checked_max_length(self, config: PretrainedConfig) -> int:
        context = getattr(config.get_text_config(), "max_position_embeddings", None) or self.tokens_per_batch
        longest = min(context, self.tokens_per_batch)
        if self.max_length is None:
            return longest
        if self.max_length > longest:
            what = f"reward model {self.source!r} reads" if longest == context else "tokens_per_batch allows"
            raise UserError(f"reward max_length is {self.max_length} but {what} 1 to {longest} tokens: set it in there")
        return self.max_length

    def load(self) -> None:
        """Reads the weights and freezes them.

        Raises:
            UserError: As `check`, or the weights are unreadable or lack the score head.
        """
        self.check()
        options = {} if self.quantization is None else self.quantization.loading_options()
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.source, dtype=self.dtype, use_safetensors=True, output_loading_info=True, **options
            )
        except OSError as error:
            raise UserError(f"reward model {self.source!r}: {first_line(error)}; give safetensors weights") from error
        missing = sorted(info["missing_keys"])
        if missing:  # transformers only warns, and would score with random weights
            raise UserError(
                f"reward model {self.source!r} lacks the weights {', '.join(missing[:3])} ({len(missing)} missing): "
                "give a trained sequence classifier"
            )
        if self.quantization is not None:
            self.quantization.finish(model)
        self.model = model.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> ClassifierReward:
        """Stays in evaluation mode, whatever the parent module asks for."""
        super().train(False)
        return self

    def render(self, messages: list[Message], response: str) -> str:
        """The conversation as the reward model's tokenizer reads it, before truncation; for logs and tests."""
        return self._conversations.render(messages, response)

    def score(self, prompts: Sequence[list[Message]], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """See `Reward.score`; the status is not looked at."""
        rows = self._conversations.encode([self.render(p, r) for p, r in zip(prompts, responses, strict=True)])
        rows = [self._fit(row) for row in rows]
        scores = torch.empty(len(rows), dtype=torch.float32)
        batches = batches_by_length([len(row) for row in rows], self.tokens_per_batch)
        for indices in pad_with_no_ops(batches, self._loaded, []):
            if indices:
                scores[indices] = self._forward([rows[i] for i in indices]).cpu()
            else:
                self._forward([[0]])
        return scores

    @property
    def _conversations(self) -> ConversationReader:
        if self._reader is None:
            self.check()
        assert self._reader is not None
        return self._reader

    def _fit(self, row: list[int]) -> list[int]:
        """Cuts a row of token ids to `max_length`, keeping a leading BOS and the template's closing tokens."""
        assert self.max_length is not None
        if len(row) <= self.max_length:
            return row
        if not self.truncated:
            warnings.warn(
                f"an input of reward model {self.source!r} has {len(row)} tokens and is cut on the "
                f"{self.truncation_side} to max_length {self.max_length}; further cuts are only counted",
                stacklevel=3,
            )
        self.truncated += 1
        if self.truncation_side == "left":
            head = row[: self._conversations.leading_bos(row)]
            return head + row[len(row) - self.max_length + len(head) :]
        tail = self._conversations.suffix_length
        return row[: max(self.max_length - tail, 0)] + row[len(row) - min(tail, self.max_length) :]

    @torch.no_grad()
    def _forward(self, rows: list[list[int]]) -> Tensor:
        """[b] float32 scores of b rows of token ids, on the model's device."""
        model, device = self._loaded, compute_device(self._loaded)
        # The trainer may run under autocast; the reward runs in its own dtype, and its head in float32.
        with torch.autocast(device.type, enabled=False):
            return call_as_forward(model, _scores, [torch.tensor(row) for row in rows], device)

    @property
    def _loaded(self) -> PreTrainedModel:
        if self.model is None:
            raise RuntimeError(f"reward model {self.source!r} is not loaded: call load() before score()")
        return self.model


def _scores(model: PreTrainedModel, rows: Sequence[Tensor], device: torch.device) -> Tensor:
    backbone = getattr(model, model.base_model_prefix)
    return score_states(model, states_at_end(backbone, rows, device))


def states_at_end(backbone: Any, rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """[b, H] the last hidden states at the last token of b rows of token ids, each [n]."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)  # what pads does not matter: it is masked
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    ids, mask, last = ids.to(device), mask.long().to(device), (lengths - 1).to(device)
    hidden: Tensor = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(rows), device=device), last]


def score_states(model: PreTrainedModel, states: Tensor) -> Tensor:
    """[b] float32 scores of [b, H] hidden states under a classifier's head, which runs in float32."""
    head: Any = model.score
    with torch.autocast(states.device.type, enabled=False):
        return F.linear(states.float(), head.weight.float()).squeeze(-1)


def _load_config(source: str) -> PretrainedConfig:
    if not Path(source).is_dir() and (source.startswith(("runs/", ".", "/", "~")) or source.count("/") > 1):
        cure = "make it with `rlmt tiny`" if source.startswith("runs/tiny") else "give a folder or a hub name"
        raise UserError(f"reward model folder {source!r} does not exist: {cure}")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"reward model {source!r} has no readable configuration ({first_line(error)}): give a folder with a "
            "config.json or a hub name that can be reached"
        ) from error
    return config


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"reward model {source!r} has no readable tokenizer ({first_line(error)}): put its tokenizer files beside "
            "its weights"
        ) from error
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of reward model {source!r} has no chat template: put the one it was trained with beside it "
            "as chat_template.jinja"
        )
    return tokenizer
