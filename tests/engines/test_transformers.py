"""TransformersEngine: log-probs, distribution, stops and batching."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rlmt.engines import TransformersEngine
from rlmt.errors import UserError
from rlmt.types import FinishReason, SampleRequest, Sampling


@pytest.fixture
def tokenizer(helpers: Any) -> PreTrainedTokenizerFast:
    return helpers.tokenizer()


def start(policy: Any, tokenizer: Any, helpers: Any, **options: Any) -> TransformersEngine:
    engine = TransformersEngine(**options)
    engine.check()
    engine.start(policy, tokenizer, helpers.max_len, torch.float32)
    engine.sync(iter(()), version=3)
    return engine


@pytest.mark.parametrize("architecture", ["llama-tied", "llama-untied", "qwen2-tied", "qwen2-untied"])
def test_logprobs_equal_the_policys(architecture: str, helpers: Any, tokenizer: Any) -> None:
    policy = helpers.policy(architecture)
    engine = start(policy, tokenizer, helpers)
    requests = [SampleRequest(prompt, [i, 2**63 - 1 - i]) for i, prompt in enumerate(helpers.prompts(5, 30))]
    for temperature, top_p in [(0.7, 1.0), (1.3, 0.8)]:
        samples = engine.generate(requests, Sampling(temperature, 40, top_p=top_p))
        assert samples.weight_version == 3
        assert helpers.mismatch(policy, requests, samples, temperature, top_p) < 1e-4
    helpers.update(policy)
    assert helpers.mismatch(policy, requests, samples, 1.3, 0.8) > 1e-3
    engine.sync(iter(()), version=4)
    samples = engine.generate(requests, Sampling(0.7, 40))
    assert samples.weight_version == 4
    assert helpers.mismatch(policy, requests, samples, 0.7) < 1e-4


def test_samples_are_independent_of_the_batch(helpers: Any, tokenizer: Any) -> None:
    policy = helpers.policy("llama-tied")
    prompts = helpers.prompts(9, 5)
    for options in ({}, {"tokens_per_batch": 150}):
        assert not helpers.composition_matters(start(policy, tokenizer, helpers, **options), prompts, Sampling(0.8, 30))


def test_samples_end_at_stop_strings_and_tokens(helpers: Any, tokenizer: Any) -> None:
    helpers.check_stops(start(helpers.policy("qwen2-untied"), tokenizer, helpers), tokenizer)


def test_samples_follow_the_policys_distribution(helpers: Any, tokenizer: Any) -> None:
    policy = helpers.policy("llama-untied")
    engine = start(policy, tokenizer, helpers)
    prompt = helpers.prompts(1, 12)[0]
    count = 4000
    samples = engine.generate([SampleRequest(prompt, list(range(count)))], Sampling(0.5, 1))
    counts = Counter(ids[0] for ids in samples.completion_ids)
    with torch.no_grad():
        probs = torch.softmax(policy(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.5, -1)
    assert probs.max() < 0.9  # otherwise the test would be trivial
    for token, p in enumerate(probs.tolist()):
        assert abs(counts[token] - count * p) < 5 * math.sqrt(count * p * (1 - p)) + 5


def test_nucleus_has_the_fewest_tokens_of_its_mass(helpers: Any, tokenizer: Any) -> None:
    policy = helpers.policy("llama-untied")
    prompt = helpers.prompts(1, 12)[0]
    with torch.no_grad():
        probs, order = torch.softmax(policy(input_ids=torch.tensor([prompt])).logits[0, -1], -1).sort(descending=True)
    mass = (probs[0] + probs[1] + probs[2] / 2).item()
    engine = start(policy, tokenizer, helpers)
    samples = engine.generate([SampleRequest(prompt, list(range(500)))], Sampling(1.0, 1, top_p=mass))
    assert {ids[0] for ids in samples.completion_ids} == set(order[:3].tolist())


def test_greedy_returns_the_most_likely_token(helpers: Any, tokenizer: Any) -> None:
    policy = helpers.policy("llama-tied")
    request = SampleRequest(helpers.prompts(1, 30)[0], [1])
    samples = start(policy, tokenizer, helpers).generate([request], Sampling(0.0, 20))
    ids = request.prompt_ids + samples.completion_ids[0]
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([ids])).logits[0]
    assert logits[29:-1].argmax(-1).tolist() == samples.completion_ids[0]
    assert helpers.mismatch(policy, [request], samples, 1.0) < 1e-4


def test_policy_and_random_state_are_unchanged(helpers: Any, tokenizer: Any) -> None:
    policy = helpers.policy("llama-tied")
    policy.gradient_checkpointing_enable()
    policy.model.layers[0].eval()
    modes = [module.training for module in policy.modules()]
    state = torch.get_rng_state()
    config = policy.generation_config.to_dict()
    engine = start(policy, tokenizer, helpers)
    engine.generate([SampleRequest([1, 2, 3], [0, 1])], Sampling(1.0, 8))
    assert [module.training for module in policy.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.generation_config.to_dict() == config
    helpers.update(policy)  # tensors made during sampling do not break a backward pass


def test_prompt_and_completion_stay_within_max_model_len(helpers: Any, tokenizer: Any) -> None:
    engine = start(helpers.policy("llama-tied"), tokenizer, helpers)
    samples = engine.generate(
        [SampleRequest([5] * (helpers.max_len - 3), [0]), SampleRequest([5] * 10, [0])], Sampling(1.0, 20)
    )
    assert [len(ids) for ids in samples.completion_ids] == [3, 20]
    assert samples.finish == [FinishReason.LENGTH] * 2
    with pytest.raises(UserError, match="256 tokens leaves no room"):
        engine.generate([SampleRequest([5] * helpers.max_len, [0])], Sampling(1.0, 20))


def test_batches_stay_within_tokens_per_batch(helpers: Any, tokenizer: Any) -> None:
    policy = helpers.policy("llama-tied")
    engine = start(policy, tokenizer, helpers, tokens_per_batch=100)
    shapes: list[tuple[int, ...]] = []
    hook = policy.model.embed_tokens.register_forward_hook(lambda _m, args, _out: shapes.append(tuple(args[0].shape)))
    requests = [SampleRequest(prompt, [0, 1]) for prompt in helpers.prompts(4, 20)]  # 20, 21, 22, 23 tokens
    engine.generate([*requests, SampleRequest([7] * 150, [0])], Sampling(1.0, 10))
    hook.remove()
    # 3 samples of 33 tokens fit into 100, and 3 of 32: 150 | 23 23 22 | 22 21 21 | 20 20, each prompt is computed once.
    assert [shape for shape in shapes if shape[1] > 1] == [(1, 150), (2, 23), (2, 22), (1, 20)]


def test_generate_before_sync_or_after_close_raises(helpers: Any, tokenizer: Any) -> None:
    engine = TransformersEngine()
    engine.close()
    engine.start(helpers.policy("llama-tied"), tokenizer, 64, torch.float32)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="sync"):
            engine.generate([SampleRequest([1], [0])], Sampling(1.0, 1))
        engine.sync(iter(()), 1)
        engine.close()
