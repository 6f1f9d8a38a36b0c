"""Every record on the data path, in the order in which data flows. Read this first.

    Prompt → PromptBatch → (engine) RolloutBatch → (module) Experience → (algorithm) TokenBatch + PolicyOutputs

Ragged data stays ragged: tokens of all samples lie end to end in one flat tensor, with `lengths` beside it, so no
record holds padding. Letters in shapes: P prompts, G samples a prompt, B = P·G samples, T completion tokens of all B
samples together, t completion tokens of one micro-batch, b samples of one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypedDict

import torch
from torch import Tensor


class Message(TypedDict):
    """One turn of a chat: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """One row of the prompt set: a conversation that ends with a user's turn."""

    index: int
    """Row number in the prompt set as loaded, before shuffling or splitting: stable over epochs and runs."""
    messages: list[Message]
    """The conversation, oldest turn first; an optional system turn comes first."""


@dataclass(frozen=True)
class PromptBatch:
    """What the loader yields: the prompts of one rollout, not yet sampled."""

    prompts: list[Prompt]
    """P prompts."""
    epoch: int
    """The pass over the prompt set that this batch belongs to; enters every sample's seed."""


@dataclass(frozen=True)
class Sampling:
    """How to sample, the same for every sample of a batch but the seed."""

    temperature: float
    """Sampling temperature, > 0 (0 means greedy and is for predict only); log-probs are taken at this temperature."""
    max_new_tokens: int
    """Completion length limit in tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a sample once they are complete in its text; kept as part of the completion."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a sample (end of turn); kept as the completion's last token."""
    top_p: float = 1.0
    """Nucleus mass; below 1 the engine's log-probs are renormalised and no longer match the trainer's."""


@dataclass(frozen=True)
class SampleRequest:
    """One prompt to sample from, as tokens, with a seed for each wanted sample."""

    prompt_ids: list[int]
    """Rendered prompt, prefilled opening included."""
    seeds: list[int]
    """G seeds in [0, 2**63), one a sample, from (run seed, epoch, prompt, sample)."""
    epoch: int = 0
    """The pass over the prompt set."""


class FinishReason(StrEnum):
    """Why a sample ended."""

    STOP = "stop"
    """It ended by itself: an end-of-turn token or a stop string."""
    LENGTH = "length"
    """It was truncated at max_new_tokens."""


@dataclass
class Samples:
    """What an engine returns: B = sum of seeds over requests, a prompt's samples side by side."""

    completion_ids: list[list[int]]
    """B ragged lists of sampled tokens, never empty; the stopping token is kept."""
    logprobs: list[list[float]]
    """B ragged lists: log-prob of each sampled token under the engine's weights at the sampling temperature."""
    finish: list[FinishReason]
    """B reasons."""
    weight_version: int
    """Version of the weights that drew these samples."""
    ref_logprobs: list[list[float]] | None = None
    """B ragged lists: log-prob of each token under the reference, where it was recorded with the samples."""


@dataclass(frozen=True)
class AdapterWeights:
    """A LoRA adapter on its way to an engine, as PEFT writes it to a folder."""

    config: dict[str, Any]
    """adapter_config.json as plain data."""
    tensors: dict[str, Tensor]
    """adapter_model.safetensors: `base_model.model.<layer>.lora_A.weight` [rank, in], `….lora_B.weight` [out, rank],
    with DoRA `….lora_magnitude_vector` [out]. The trained tensors themselves, not copies."""


@dataclass
class RolloutBatch:
    """The rollouts of one step, ready for the module."""

    prompts: list[Prompt]
    """P prompts."""
    group_size: int
    """G samples a prompt; sample i belongs to prompts[i // G]."""
    prompt_ids: list[list[int]]
    """P ragged lists: rendered prompts."""
    completion_ids: list[list[int]]
    """B ragged lists of sampled tokens, never empty."""
    engine_logprobs: Tensor
    """[T] float32: log-probs from the engine, all completions end to end."""
    finish: list[FinishReason]
    """B reasons."""
    sampling: Sampling
    """How they were drawn; the trainer takes its log-probs at the same temperature."""
    weight_version: int
    """Version of the weights that drew them."""
    lag: int | None = None
    """Updates that the policy has seen since those weights; None for recorded samples."""
    epoch: int = 0
    """Pass over the prompt set."""
    off_policy: bool = False
    """Whether other weights than the policy's drew them, so that the objective has to correct for it."""
    ref_logprobs: Tensor | None = None
    """[T] float32 log-probs under the reference where they were recorded with the samples; None: not recorded."""
    epochs: list[int] | None = None
    """P passes, one a prompt, where batches of several were merged; None: all are of `epoch`."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds of the phases `rollout` and `sync`."""

    @property
    def lengths(self) -> list[int]:
        """B completion lengths in tokens."""
        return [len(ids) for ids in self.completion_ids]

    def __len__(self) -> int:
        return len(self.completion_ids)


class Status(StrEnum):
    """What `ThinkingFormat.split` found; the set is closed. Everything but OK counts as malformed."""

    OK = "ok"
    """Well formed: the response is what the reward model may see."""
    UNOPENED = "unopened"
    """An opening tag is missing where the format wants one."""
    UNCLOSED = "unclosed"
    """The thought never closes."""
    STRAY_TAG = "stray_tag"
    """A tag of the format stands where none belongs, so a second thought could hide in the response."""
    EMPTY_RESPONSE = "empty_response"
    """Nothing but white space is left to show to a user."""


@dataclass(frozen=True)
class Split:
    """A completion taken apart."""

    thought: str
    """The thought without its tags; empty for formats without thinking."""
    response: str
    """The text shown to the user and scored; always empty unless status is OK."""
    status: Status
    """What was found."""

    @property
    def ok(self) -> bool:
        """Whether the completion is well formed."""
        return self.status is Status.OK


@dataclass
class Scores:
    """What rewards made of B samples."""

    total: Tensor
    """[B] float32: the reward trained on, malformed samples included."""
    parts: dict[str, Tensor]
    """Name of each reward → [B] float32 raw scores before weighting, NaN where a sample was not scored."""
    texts: list[str | None]
    """B scored response texts exactly as passed to the rewards, None where a sample was not scored."""


@dataclass
class Experience:
    """One rollout batch with all that an algorithm needs; written by the module, then by `Algorithm.prepare`."""

    rollouts: RolloutBatch
    """The samples."""
    texts: list[str]
    """B decoded completions, tags kept, other special tokens dropped."""
    splits: list[Split]
    """B splits of `texts`."""
    thought_tokens: Tensor
    """[B] int64: sampled tokens up to and with the thought's close tag; the whole completion when it never closes."""
    scores: Scores
    """Rewards."""
    group: Tensor
    """[B] int64: which prompt of the batch each sample belongs to, 0..P-1."""
    lengths: Tensor
    """[B] int64: completion lengths; their sum is T."""
    engine_logprobs: Tensor
    """[T] float32 log-probs at sampling time."""
    old_logprobs: Tensor | None = None
    """[T] float32 log-probs under the trainer's weights before any update; None when one update makes the ratio 1."""
    ref_logprobs: Tensor | None = None
    """[T] float32 log-probs under the reference; None when the algorithm does not ask for it, NaN for tokens of samples
    that take no part in it."""
    values: Tensor | None = None
    """[T] float32 the critic's values before any update, one for each state that a token is sampled in; None without a
    critic."""
    advantages: Tensor | None = None
    """[B] or [T] float32, set by `Algorithm.prepare`; None for objectives over pairs."""
    returns: Tensor | None = None
    """[T] float32 what the critic should have said, set by `Algorithm.prepare`; None without a critic."""
    pairs: Tensor | None = None
    """[N, 2] int64 chosen and rejected sample of each pair, both of one prompt, set by `Algorithm.prepare` of
    objectives over pairs; samples in no pair take no part in the loss."""
    mask: Tensor | None = None
    """[B] bool, set by `Algorithm.prepare`: samples that take part in the loss (None: all, or all in `pairs`)."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Scalars found on the way, under their final names."""

    @property
    def response_tokens(self) -> Tensor:
        """[B] int64: sampled tokens after the thought."""
        return self.lengths - self.thought_tokens

    @property
    def truncated(self) -> Tensor:
        """[B] bool: samples cut at the length limit."""
        return torch.tensor([f is FinishReason.LENGTH for f in self.rollouts.finish], device=self.lengths.device)


@dataclass
class TokenBatch:
    """The completion tokens of one micro-batch as `Algorithm.loss` sees them: flat, without padding.

    For objectives over pairs samples 2k and 2k + 1 are the chosen and the rejected one of pair k.
    """

    sample: Tensor
    """[t] int64: which of the b samples of this micro-batch each token belongs to, 0..b-1."""
    lengths: Tensor
    """[b] int64 completion lengths."""
    advantages: Tensor | None
    """[t] float32, or None for objectives over pairs."""
    old_logprobs: Tensor | None
    """[t] float32, or None: this is the only update, so the ratio is taken to the detached current log-probs."""
    ref_logprobs: Tensor | None
    """[t] float32, or None."""
    engine_logprobs: Tensor
    """[t] float32."""
    weights: Tensor
    """[t] float32: each token's share in the loss; over a whole optimizer step they hold the aggregation, so the loss
    of micro-batches adds up to the loss of the step whatever their size."""
    off_policy: bool = False
    """Whether other weights than the policy's drew the samples."""
    values: Tensor | None = None
    """[t] float32 the critic's values before any update, or None."""
    returns: Tensor | None = None
    """[t] float32, or None."""


@dataclass
class PolicyOutputs:
    """What the policy says of a micro-batch's tokens, with gradients."""

    logprobs: Tensor
    """[t] float32 log-prob of each sampled token at the sampling temperature, or the objective's own."""
    entropy: Tensor
    """[t] float32 entropy of each token's distribution at that temperature, in nats."""
