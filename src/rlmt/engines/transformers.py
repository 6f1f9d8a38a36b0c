"""Engine that generates with the training policy itself in plain transformers: it needs no copy of the weights.

Models that keep keys and values per token run in padded batches, and the samples of a prompt share its prefill. Models
with linear attention or other states run in batches of equally long prompts, without padding or sharing.

Each sample has a random generator of its own and uses one uniform number per token, so a sample depends on its prompt,
its seed and the weights, and not on the rest of the batch. `model.generate` is not used: it applies the policy's
`generation_config` to every setting and keeps computing samples that have ended.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlmt import progress
from rlmt.annotations import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from rlmt.engines.base import Engine, max_completion_tokens
from rlmt.models.cache import check_cache, shares_cache
from rlmt.models.training_mode import eval_mode
from rlmt.options import PositiveInt, check_ranges
from rlmt.types import AdapterWeights, FinishReason, SampleRequest, Samples, Sampling


@dataclass
class _Row:
    """One sample in progress."""

    prompt_ids: list[int]
    seed: int
    limit: int
    """Maximum number of completion tokens."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason | None = None


class TransformersEngine(Engine):
    """Generates with the live policy in eval mode, in padded batches with a KV cache.

    Args:
        tokens_per_batch: Maximum number of tokens in a batch, (longest prompt + max_new_tokens) × samples; bounds the
            memory of the KV cache. A single sample may exceed it.
    """

    shares_policy = True

    def __init__(self, tokens_per_batch: PositiveInt = 65536) -> None:
        check_ranges(TransformersEngine, locals())
        self.tokens_per_batch = tokens_per_batch
        self._policy: PreTrainedModel | None = None

    def check_policy(self, config: PretrainedConfig) -> None:
        """Checks that the policy generates from a cache.

        Args:
            config: The policy's configuration.

        Raises:
            UserError: It does not.
        """
        check_cache(config, str(config.name_or_path), "use --data.engine VLLMEngine, or another policy")

    def start(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_model_len: int, dtype: torch.dtype
    ) -> None:
        """Stores a reference to the policy.

        Args:
            policy: The trainer's policy; `generate` uses its current weights.
            tokenizer: The policy's tokenizer; finds the stop strings.
            max_model_len: Longest prompt + completion in tokens.
            dtype: Dtype of the forward, by autocast unless it is float32.
        """
        self._policy, self._tokenizer, self._max_model_len, self._dtype = policy, tokenizer, max_model_len, dtype

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int, adapter: AdapterWeights | None = None) -> None:
        """Stores the version; reads no weights, since the engine uses the policy itself."""
        self.version = version

    @torch.no_grad()  # not inference_mode: buffers that the policy makes here must be usable in training
    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Samples:
        """Samples every request once per seed.

        Args:
            requests: Prompts as tokens, each with its seeds.
            sampling: Temperature, limits and stops; nothing else ends a sample, not even the end-of-text token.

        Returns:
            Samples in the order of the requests. At temperature 0 the log-probs are at temperature 1.

        Raises:
            UserError: A prompt leaves no room for a token within max_model_len.
            RuntimeError: `start` or `sync` was not called.
        """
        if self._policy is None or self.version is None:
            raise RuntimeError("TransformersEngine has no weights: call start and sync before generate.")
        rows = [
            _Row(ids, seed, min(sampling.max_new_tokens, max_completion_tokens(len(ids), self._max_model_len)))
            for ids, seed in ((request.prompt_ids, seed) for request in requests for seed in request.seeds)
        ]
        # Under autocast like the trainer, even if the frozen base of an adapter has this dtype already.
        device, autocast = self._policy.device.type, self._dtype != torch.float32
        with eval_mode(self._policy), torch.autocast(device, self._dtype, enabled=autocast):
            done = 0
            for batch in self._batches(rows, sampling.max_new_tokens):
                for finished in self._sample_batch(self._policy, batch, sampling):
                    progress.report("sampling", done + finished, len(rows))
                done += len(batch)
        return Samples(
            completion_ids=[row.ids for row in rows],
            logprobs=[row.logprobs for row in rows],
            finish=[row.finish for row in rows if row.finish is not None],
            weight_version=self.version,
        )

    def close(self) -> None:
        """Releases the reference to the policy."""
        self._policy = self.version = None

    def _batches(self, rows: list[_Row], max_new_tokens: int) -> Iterator[list[_Row]]:
        """Batches rows of similar prompt length, longest first, so that memory runs out in the first batch or never."""
        assert self._policy is not None
        pads = shares_cache(self._policy.config)
        batch: list[_Row] = []
        for row in sorted(rows, key=lambda row: len(row.prompt_ids), reverse=True):
            longest = len((batch or [row])[0].prompt_ids)
            full = (len(batch) + 1) * (longest + max_new_tokens) > self.tokens_per_batch
            if batch and (full or (not pads and len(row.prompt_ids) < longest)):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _sample_batch(self, policy: PreTrainedModel, rows: list[_Row], sampling: Sampling) -> Iterator[int]:
        """Samples one batch; rows that have ended leave it if the cache allows. Yields the number of ended rows."""
        device, count = policy.device, len(rows)
        generation = _Generation(policy, [row.prompt_ids for row in rows])
        uniforms = torch.stack([_uniforms(row.seed, sampling.max_new_tokens) for row in rows]).to(device)
        for step in range(sampling.max_new_tokens):
            tokens, logprobs = _sample_token(generation.logits, uniforms[:, step], sampling)
            for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                if row.finish is None:
                    row.ids.append(token)
                    row.logprobs.append(logprob)
                    row.finish = self._finish_reason(row, sampling)
            active = [i for i, row in enumerate(rows) if row.finish is None]
            yield count - len(active)
            if not active:
                return
            if len(active) < len(rows) and generation.selects_rows:
                index = torch.tensor(active, device=device)
                generation.select_rows(index)
                rows = [rows[i] for i in active]
                tokens, uniforms = tokens[index], uniforms[index]
            generation.append(tokens)

    def _finish_reason(self, row: _Row, sampling: Sampling) -> FinishReason | None:
        """Finish reason of a row whose newest token ends it, or None."""
        if row.ids[-1] in sampling.stop_token_ids:
            return FinishReason.STOP
        if sampling.stop:
            # The newest token completed a stop string if the last tokens contain one. A token that is not empty adds at
            # least one byte, so the window has one token per byte, and 8 more for a character cut at its start.
            window = max(len(stop.encode()) for stop in sampling.stop) + 8
            text = self._tokenizer.decode(row.ids[-window:], skip_special_tokens=False)
            if any(stop in text for stop in sampling.stop):
                return FinishReason.STOP
        return FinishReason.LENGTH if len(row.ids) >= row.limit else None


@torch.no_grad()
def stream(policy: PreTrainedModel, prompt_ids: list[int], sampling: Sampling, seed: int) -> Iterator[int]:
    """Samples one completion and yields each token as soon as it is sampled, including the stop token.

    The tokens equal those of the engine for the same prompt and seed. The caller handles stop strings; it may abandon
    the iterator at any token.

    Args:
        policy: The model, in eval mode.
        prompt_ids: Rendered prompt.
        sampling: Temperature, limits and stop tokens.
        seed: Seed of the sample.

    Yields:
        Token ids.
    """
    generation = _Generation(policy, [prompt_ids])
    for uniform in _uniforms(seed, sampling.max_new_tokens).to(policy.device):
        token = _sample_token(generation.logits, uniform[None], sampling)[0]
        yield int(token)
        if int(token) in sampling.stop_token_ids:
            return
        generation.append(token)


class _Generation:
    """A batch of sequences in a model's cache, and the logits of their next tokens.

    Args:
        policy: The model, in eval mode.
        prompts: One prompt a row; equally long if the model has states in place of keys and values.
    """

    def __init__(self, policy: PreTrainedModel, prompts: list[list[int]]) -> None:
        from transformers import DynamicCache

        self._policy = policy
        self.selects_rows = shares_cache(policy.config)
        """Whether rows can be repeated or left out."""
        self._parameters = inspect.signature(policy.forward).parameters
        distinct = {tuple(prompt): None for prompt in prompts} if self.selects_rows else prompts
        longest = max(map(len, distinct))
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in distinct]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in distinct]
        self._mask = torch.tensor(mask, device=policy.device)
        self._cache: Any = DynamicCache(config=policy.config) if self.selects_rows else None  # or else the model's own
        self.logits = self._forward(torch.tensor(padded, device=policy.device))
        """[rows, vocabulary] logits of each row's next token."""
        if self.selects_rows:  # each distinct prompt was computed once
            row_of = {prompt: row for row, prompt in enumerate(distinct)}
            self.select_rows(torch.tensor([row_of[tuple(prompt)] for prompt in prompts], device=policy.device))

    def select_rows(self, index: Tensor) -> None:
        """Keeps the rows `index` [n] int64, in this order; a row can occur several times."""
        self._cache.batch_select_indices(index)
        self._mask, self.logits = self._mask[index], self.logits[index]

    def append(self, tokens: Tensor) -> None:
        """Appends one token [rows] int64 to each row and computes the logits of the next."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self.logits = self._forward(tokens[:, None])

    def _forward(self, ids: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if self.selects_rows:
            positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            options |= {"attention_mask": self._mask, "position_ids": positions}
        options = {name: value for name, value in (options | {"logits_to_keep": 1}).items() if name in self._parameters}
        outputs = self._policy(input_ids=ids, past_key_values=self._cache, use_cache=True, **options)
        self._cache = outputs.past_key_values
        logits: Tensor = outputs.logits[:, -1]
        return logits


def _uniforms(seed: int, count: int) -> Tensor:
    """Uniform random numbers [count] float64 in [0, 1), a function of the seed alone."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _sample_token(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Samples one token per row by inverse transform sampling with the row's uniform number.

    Args:
        logits: Logits [rows, vocabulary].
        uniforms: Uniform numbers [rows] float64 in [0, 1).
        sampling: Temperature and top_p.

    Returns:
        Tokens [rows] int64 and their log-probs [rows] float32 at the sampling temperature, within the nucleus.
    """
    greedy = sampling.temperature == 0
    logprobs = torch.log_softmax(logits.float() / (1.0 if greedy else sampling.temperature), dim=-1)
    if greedy:
        tokens = logprobs.argmax(-1)
    else:
        if sampling.top_p < 1:
            probs, order = logprobs.exp().sort(dim=-1, descending=True)
            outside = probs.cumsum(-1) - probs >= sampling.top_p  # the first token always stays
            logprobs = logprobs.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
            logprobs = torch.log_softmax(logprobs, dim=-1)
        cumulative = logprobs.double().exp().cumsum(-1)
        targets = uniforms[:, None] * cumulative[:, -1:]
        # right=True skips tokens of zero mass; the clamp covers a product that was rounded up to the total mass.
        tokens = torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]
