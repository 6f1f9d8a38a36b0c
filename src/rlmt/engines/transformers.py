"""Engine that generates with the training policy itself in plain transformers: it needs no copy of the weights.

Each sample has a random generator of its own and uses one uniform number per token, so a sample depends on its prompt,
its seed and the weights, and not on the rest of the batch. `model.generate` is not used: it applies the policy's
`generation_config` to every setting and keeps computing samples that have ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from rlmt import progress
from rlmt.engines.base import Engine, max_completion_tokens
from rlmt.models.logprobs import eval_mode
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

    def __init__(self, tokens_per_batch: PositiveInt = 65536) -> None:
        check_ranges(TransformersEngine, locals())
        self.tokens_per_batch = tokens_per_batch
        self._policy: PreTrainedModel | None = None

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
        batch: list[_Row] = []
        for row in sorted(rows, key=lambda row: len(row.prompt_ids), reverse=True):
            longest = len((batch or [row])[0].prompt_ids) + max_new_tokens
            if batch and (len(batch) + 1) * longest > self.tokens_per_batch:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _sample_batch(self, policy: PreTrainedModel, rows: list[_Row], sampling: Sampling) -> Iterator[int]:
        """Samples one batch; rows that have ended leave the batch. Yields the number of ended rows after each token."""
        device, count = policy.device, len(rows)
        cache = DynamicCache(config=policy.config)
        logits, mask = _prefill(policy, cache, rows)
        uniforms = torch.stack([_uniforms(row.seed, sampling.max_new_tokens) for row in rows]).to(device)
        for step in range(sampling.max_new_tokens):
            tokens, logprobs = _sample_token(logits, uniforms[:, step], sampling)
            for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                row.ids.append(token)
                row.logprobs.append(logprob)
                row.finish = self._finish_reason(row, sampling)
            active = [i for i, row in enumerate(rows) if row.finish is None]
            yield count - len(active)
            if not active:
                return
            if len(active) < len(rows):
                index = torch.tensor(active, device=device)
                cache.batch_select_indices(index)
                rows = [rows[i] for i in active]
                tokens, mask, uniforms = tokens[index], mask[index], uniforms[index]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = mask.sum(1, keepdim=True) - 1
            logits = policy(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]

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
    cache = DynamicCache(config=policy.config)
    logits, _ = _prefill(policy, cache, [_Row(prompt_ids, seed, sampling.max_new_tokens)])
    for uniform in _uniforms(seed, sampling.max_new_tokens).to(policy.device):
        token = _sample_token(logits, uniform[None], sampling)[0]
        yield int(token)
        if int(token) in sampling.stop_token_ids:
            return
        logits = policy(input_ids=token[:, None], past_key_values=cache, use_cache=True).logits[:, -1]


def _prefill(policy: PreTrainedModel, cache: DynamicCache, rows: list[_Row]) -> tuple[Tensor, Tensor]:
    """Computes each distinct prompt of the batch once and fills the KV cache for all rows.

    Returns:
        Logits [rows, vocabulary] of the first completion token, and the attention mask [rows, longest prompt] of the
        left-padded prompts.
    """
    distinct: dict[tuple[int, ...], int] = {}
    for row in rows:
        distinct.setdefault(tuple(row.prompt_ids), len(distinct))
    longest = max(map(len, distinct))
    ids = torch.zeros(len(distinct), longest, dtype=torch.long)
    mask = torch.zeros(len(distinct), longest, dtype=torch.long)
    for prompt, number in distinct.items():
        ids[number, longest - len(prompt) :] = torch.tensor(prompt)
        mask[number, longest - len(prompt) :] = 1
    ids, mask = ids.to(policy.device), mask.to(policy.device)
    logits = policy(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    index = torch.tensor([distinct[tuple(row.prompt_ids)] for row in rows], device=policy.device)
    cache.batch_select_indices(index)
    return logits[index], mask[index]


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
