"""A tiny policy, a tokenizer, and naive reference implementations of what every engine must return."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlmt.engines import Engine
from rlmt.types import FinishReason, SampleRequest, Samples, Sampling

MAX_LEN = 256
ARCHITECTURES = ["llama-tied", "llama-untied", "qwen2-tied", "qwen2-untied"]


class Helpers:
    """Helpers in one fixture, since test folders are not packages."""

    architectures = ARCHITECTURES
    max_len = MAX_LEN

    @staticmethod
    def tokenizer() -> PreTrainedTokenizerFast:
        """A tokenizer with all bytes, 64 tokens of two letters, and two special tokens."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        pairs = list(itertools.product("abcdefgh", repeat=2))
        vocab = {piece: i for i, piece in enumerate([*alphabet, *map("".join, pairs)])}
        core = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        build: Any = PreTrainedTokenizerFast
        return build(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>")

    @staticmethod
    def policy(architecture: str) -> PreTrainedModel:
        """A random fp32 policy with a generation_config that an engine must ignore: it would change every sample."""
        torch.manual_seed(0)
        family, embeddings = architecture.split("-")
        config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[family]
        policy = model(
            config(
                vocab_size=336,  # larger than the tokenizer's, as in padded vocabularies
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=MAX_LEN,
                tie_word_embeddings=embeddings == "tied",
                bos_token_id=None,
                eos_token_id=320,
                pad_token_id=321,
                initializer_range=0.2,
            )
        )
        policy.generation_config = GenerationConfig(
            do_sample=True, temperature=0.1, top_k=2, repetition_penalty=3.0, max_new_tokens=2, eos_token_id=[1, 2, 3]
        )
        return policy.train()

    @staticmethod
    def prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
        rng = random.Random(seed)
        return [[rng.randrange(256) for _ in range(length + i)] for i in range(count)]

    @staticmethod
    def update(policy: PreTrainedModel) -> None:
        """Runs one optimizer step."""
        ids = torch.arange(40)[None] % 300
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.02)
        policy(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    @staticmethod
    @torch.no_grad()
    def mismatch(
        policy: PreTrainedModel, requests: list[SampleRequest], samples: Samples, temperature: float, top_p: float = 1.0
    ) -> float:
        """Maximum difference between the engine's log-probs and those of one plain forward per sample."""
        prompts = [request.prompt_ids for request in requests for _ in request.seeds]
        maximum = 0.0
        for prompt, ids, logprobs in zip(prompts, samples.completion_ids, samples.logprobs, strict=True):
            logits = policy(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            probs = torch.softmax(logits / temperature, dim=-1)
            for row, token, logprob in zip(probs, ids, logprobs, strict=True):
                nucleus = row.clone()
                if top_p < 1:
                    ranked = sorted(range(len(row)), key=lambda i: -row[i].item())
                    mass = 0.0
                    for i in ranked:
                        if mass >= top_p:
                            nucleus[i] = 0
                        mass += row[i].item()
                maximum = max(maximum, abs((nucleus[token] / nucleus.sum()).log().item() - logprob))
        return maximum

    @staticmethod
    def composition_matters(engine: Engine, prompts: list[list[int]], sampling: Sampling) -> bool:
        """Whether a sample changes between requests on its own, with others, or in another order."""
        requests = [SampleRequest(prompt, [10 * i, 10 * i + 1, 10 * i + 2]) for i, prompt in enumerate(prompts)]
        batched = engine.generate(requests, sampling).completion_ids
        in_reverse = engine.generate(requests[::-1], sampling).completion_ids
        for i, request in enumerate(requests):
            group = batched[3 * i : 3 * i + 3]
            j = len(requests) - 1 - i
            if in_reverse[3 * j : 3 * j + 3] != group:
                return True
            if i % 4 == 0:
                alone = [
                    engine.generate([SampleRequest(request.prompt_ids, [seed])], sampling) for seed in request.seeds
                ]
                if [sample.completion_ids[0] for sample in alone] != group:
                    return True
            assert group[0] != group[1] != group[2]
        return False

    @staticmethod
    def check_stops(engine: Engine, tokenizer: PreTrainedTokenizerFast) -> None:
        """Checks where samples end, against unlimited samples that are truncated by hand."""
        request = SampleRequest(Helpers.prompts(1, 20)[0], list(range(100, 112)))
        free = engine.generate([request], Sampling(0.9, 60))
        assert [len(ids) for ids in free.completion_ids] == [60] * 12
        assert set(free.finish) == {FinishReason.LENGTH}
        # A string that ends inside a token of two letters, and two token ids; all of them occur in the samples.
        middle = next(
            tokenizer.decode(ids[k - 1 : k]) + tokenizer.decode(ids[k : k + 1])[0]
            for ids in free.completion_ids
            for k in range(5, 55)
            if 256 <= ids[k] < 320 and tokenizer.decode(ids[k - 1 : k]).isascii()
        )
        strings, tokens = (middle, "x"), (free.completion_ids[0][7], free.completion_ids[1][20])
        for stop, stop_token_ids in [(strings, ()), ((), tokens), (strings, tokens)]:
            cut = engine.generate([request], Sampling(0.9, 60, stop, stop_token_ids))
            reasons = set()
            for i, ids in enumerate(free.completion_ids):
                ends = [
                    n
                    for n in range(1, 61)
                    if ids[n - 1] in stop_token_ids or any(s in tokenizer.decode(ids[:n]) for s in stop)
                ]
                length = ends[0] if ends else 60
                assert cut.completion_ids[i] == ids[:length]
                assert cut.logprobs[i] == pytest.approx(free.logprobs[i][:length], abs=1e-4)
                assert cut.finish[i] is (FinishReason.STOP if ends else FinishReason.LENGTH)
                reasons.add(cut.finish[i])
            assert FinishReason.STOP in reasons
        # A stop on the last allowed token counts as a stop, not as a truncation.
        last = free.completion_ids[0][7]
        short = engine.generate(
            [SampleRequest(request.prompt_ids, [100])],
            Sampling(0.9, free.completion_ids[0].index(last) + 1, stop_token_ids=(last,)),
        )
        assert short.finish == [FinishReason.STOP]


@pytest.fixture(scope="session")
def helpers() -> type[Helpers]:
    return Helpers
