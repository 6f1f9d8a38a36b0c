"""Every record on the data path, in the order in which data flows. Read this first.

    Prompt → PromptBatch → (engine) RolloutBatch → (module) Experience → (algorithm) TokenBatch + PolicyOutputs

Ragged data stays ragged: tokens of all samples lie end to end in one flat tensor, with `lengths` beside it, so no
record holds padding. Letters in shapes: P prompts, G samples per prompt, B = P·G samples, T completion tokens of all B
samples, t completion tokens of one micro-batch, b samples of one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
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
    extra: dict[str, Any] = field(default_factory=dict)
    """Other columns of the row, such as a reference answer: JSON values by column name, for rewards and rollout files.
    The policy never sees them."""


@dataclass(frozen=True)
class PromptBatch:
    """A batch of the loader: the prompts to generate rollouts for."""

    prompts: list[Prompt]
    """P prompts."""
    epoch: int
    """Epoch of the prompt set that the batch belongs to; part of the seed of every sample."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, the same for every sample of a batch except the seed."""

    temperature: float
    """Sampling temperature, > 0 (0 is greedy decoding, for chat only); log-probs are computed at this temperature."""
    max_new_tokens: int
    """Maximum length of a completion in tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a sample; they stay in the completion."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a sample (end of turn); they stay as the last token of the completion."""
    top_p: float = 1.0
    """Nucleus mass; below 1 the engine's log-probs are renormalized and differ from the trainer's."""


@dataclass(frozen=True)
class SampleRequest:
    """One prompt as tokens, with a seed for each sample to generate."""

    prompt_ids: list[int]
    """Rendered prompt, prefilled opening included."""
    seeds: list[int]
    """G seeds in [0, 2**63), one per sample, derived from (run seed, epoch, prompt, sample)."""
    epoch: int = 0
    """Epoch of the prompt set."""


class FinishReason(StrEnum):
    """Why a sample ended."""

    STOP = "stop"
    """The policy ended it with an end-of-turn token or a stop string."""
    LENGTH = "length"
    """It was truncated at max_new_tokens."""


@dataclass
class Samples:
    """Output of an engine: B = sum of seeds over requests, the samples of a prompt next to each other."""

    completion_ids: list[list[int]]
    """B ragged lists of sampled tokens, never empty; the stopping token is kept."""
    logprobs: list[list[float]]
    """B ragged lists: log-prob of each sampled token under the engine's weights at the sampling temperature."""
    finish: list[FinishReason]
    """B finish reasons."""
    weight_version: int
    """Version of the weights that generated the samples."""
    ref_logprobs: list[list[float]] | None = None
    """B ragged lists: log-prob of each token under the reference, if it was recorded with the samples."""


@dataclass(frozen=True)
class AdapterWeights:
    """A LoRA adapter for an engine, as PEFT writes it to a folder."""

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
    """G samples per prompt; sample i belongs to prompts[i // G]."""
    prompt_ids: list[list[int]]
    """P ragged lists: rendered prompts."""
    completion_ids: list[list[int]]
    """B ragged lists of sampled tokens, never empty."""
    engine_logprobs: Tensor
    """[T] float32 log-probs from the engine."""
    finish: list[FinishReason]
    """B finish reasons."""
    sampling: Sampling
    """Sampling parameters; the trainer computes log-probs at the same temperature."""
    weight_version: int
    """Version of the weights that generated the samples."""
    lag: int | None = None
    """Number of policy updates since those weights; None for recorded samples."""
    epoch: int = 0
    """Epoch of the prompt set."""
    off_policy: bool = False
    """Whether other weights than the policy's generated the samples, so that the objective has to correct for it."""
    rounded: bool = False
    """Whether the engine rounded the policy's weights (to 8 or 4 bits), for which the objective corrects, too."""
    ref_logprobs: Tensor | None = None
    """[T] float32 log-probs under the reference, if they were recorded with the samples."""
    epochs: list[int] | None = None
    """P epochs, one per prompt, if batches of several epochs were merged; None if all prompts are of `epoch`."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds of the phases `rollout` and `sync`."""

    @property
    def lengths(self) -> list[int]:
        """B completion lengths in tokens."""
        return [len(ids) for ids in self.completion_ids]

    @property
    def prompt_per_sample(self) -> list[Prompt]:
        """B prompts, one per sample."""
        return [prompt for prompt in self.prompts for _ in range(self.group_size)]

    def __len__(self) -> int:
        return len(self.completion_ids)


class Status(StrEnum):
    """Result of `ThinkingFormat.split`. Everything except OK counts as malformed."""

    OK = "ok"
    """Well formed: the reward model may see the response."""
    UNOPENED = "unopened"
    """An opening tag that the format requires is missing."""
    UNCLOSED = "unclosed"
    """The thought is not closed."""
    STRAY_TAG = "stray_tag"
    """A tag of the format is in the wrong place, so a second thought could hide in the response."""
    EMPTY_RESPONSE = "empty_response"
    """The response is empty or white space."""


@dataclass(frozen=True)
class Split:
    """A completion split into thought and response."""

    thought: str
    """The thought without its tags; empty for formats without thinking."""
    response: str
    """The text shown to the user and scored; always empty unless status is OK."""
    status: Status
    """Whether the completion is well formed, or why not."""

    @property
    def ok(self) -> bool:
        """Whether the completion is well formed."""
        return self.status is Status.OK


@dataclass
class Scores:
    """Rewards of B samples: all NaN until they are scored."""

    total: Tensor
    """[B] float32: the reward trained on, malformed samples included."""
    parts: dict[str, Tensor]
    """Name of each reward → [B] float32 raw scores before weighting, NaN for samples that were not scored."""
    texts: list[str | None]
    """B response texts exactly as passed to the rewards, None for samples that were not scored."""

    @classmethod
    def unscored(cls, size: int, device: torch.device) -> Scores:
        """Scores of samples that are not scored yet."""
        return cls(torch.full((size,), torch.nan, device=device), {}, [None] * size)


@dataclass
class Experience:
    """One rollout batch with everything that an algorithm requires, set by the module and by the algorithm."""

    rollouts: RolloutBatch
    """The samples."""
    texts: list[str]
    """B decoded completions with tags and without other special tokens."""
    splits: list[Split]
    """B splits of `texts`."""
    thought_tokens: Tensor
    """[B] int64 sampled tokens up to and including the close tag; all tokens if the thought is not closed."""
    scores: Scores
    """Rewards."""
    group: Tensor
    """[B] int64 prompt of each sample, 0..P-1."""
    lengths: Tensor
    """[B] int64 completion lengths; their sum is T."""
    engine_logprobs: Tensor
    """[T] float32 log-probs at sampling time."""
    old_logprobs: Tensor | None = None
    """[T] float32 log-probs under the policy before any update; None if a single update makes the ratio 1."""
    ref_logprobs: Tensor | None = None
    """[T] float32 log-probs under the reference; None if the algorithm does not require them, NaN for tokens of samples
    that are in no pair."""
    values: Tensor | None = None
    """[T] float32 values of the critic before any update, one for each state in which a token was sampled; None without
    a critic."""
    advantages: Tensor | None = None
    """[B] or [T] float32, set by `Algorithm.prepare`; None for objectives over pairs."""
    returns: Tensor | None = None
    """[T] float32 targets of the critic, set by `Algorithm.prepare`; None without a critic."""
    pairs: Tensor | None = None
    """[N, 2] int64 chosen and rejected sample of each pair, both of one prompt, set by `Algorithm.select` of objectives
    over pairs; samples in no pair take no part in the loss."""
    mask: Tensor | None = None
    """[B] bool samples that take part in the loss, set by `Algorithm.prepare`; None is all, or all in `pairs`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics, under their final names."""

    def to(self, device: torch.device) -> Experience:
        """A copy with its tensors on a device; Lightning calls it for predictions that it collects."""
        scores = replace(self.scores, total=self.scores.total.to(device))
        rollouts = replace(self.rollouts, engine_logprobs=self.rollouts.engine_logprobs.to(device))
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        moved: dict[str, Any] = {n: value.to(device) for n, value in values.items() if isinstance(value, Tensor)}
        return replace(self, rollouts=rollouts, scores=scores, **moved)

    @property
    def response_tokens(self) -> Tensor:
        """[B] int64 sampled tokens after the thought."""
        return self.lengths - self.thought_tokens

    @property
    def truncated(self) -> Tensor:
        """[B] bool samples truncated at the length limit."""
        return torch.tensor([f is FinishReason.LENGTH for f in self.rollouts.finish], device=self.lengths.device)


@dataclass
class TokenBatch:
    """The completion tokens of one micro-batch for `Algorithm.loss`: flat, without padding.

    For objectives over pairs samples 2k and 2k + 1 are the chosen and the rejected one of pair k.
    """

    sample: Tensor
    """[t] int64 sample of each token, 0..b-1."""
    lengths: Tensor
    """[b] int64 completion lengths."""
    advantages: Tensor | None
    """[t] float32, or None for objectives over pairs."""
    old_logprobs: Tensor | None
    """[t] float32, or None if this is the only update: the ratio is then to the detached current log-probs."""
    ref_logprobs: Tensor | None
    """[t] float32, or None."""
    engine_logprobs: Tensor
    """[t] float32."""
    weights: Tensor
    """[t] float32 weight of each token in the loss of the whole optimizer step; the losses of micro-batches of any size
    add up to it."""
    off_policy: bool = False
    """Whether other weights than the policy's generated the samples, or the policy's in fewer bits."""
    values: Tensor | None = None
    """[t] float32 values of the critic before any update, or None."""
    returns: Tensor | None = None
    """[t] float32, or None."""


@dataclass
class PolicyOutputs:
    """Output of the policy for the tokens of a micro-batch, with gradients."""

    logprobs: Tensor
    """[t] float32 log-prob of each sampled token at the sampling temperature, or the objective's own."""
    entropy: Tensor
    """[t] float32 entropy of each token's distribution at that temperature, in nats."""
