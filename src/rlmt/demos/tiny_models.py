"""The models of `rlmt tiny`: a policy trained on the thinking format only, a reward model with a smooth score."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from rlmt.formats.thinking import ThinkingFormat
from rlmt.types import Message

WARM_UP_STEPS = 80
"""Optimizer steps on the format, with 16 random chats each; 15 s on two cores at the default size."""
THINKING_SHARE = 0.35
"""Fraction of the random chats with a thought; sampling below temperature 1 raises it to about one half."""


@dataclass(frozen=True)
class Sizes:
    """Size of the policy; the defaults give about 6M parameters."""

    hidden: int = 256
    """Hidden size, a multiple of `heads`."""
    layers: int = 6
    """Number of decoder layers."""
    heads: int = 4
    """Number of attention heads."""
    ffn: int = 704
    """Intermediate size of the MLP."""
    vocab: int = 2048
    """Vocabulary size, including special tokens and tags; smaller if the corpus has too few pairs to merge."""
    context: int = 2048
    """Maximum number of tokens of a prompt and its completion."""


def warm_started_policy(
    tokenizer: PreTrainedTokenizerBase,
    family: Literal["llama", "qwen2"],
    sizes: Sizes,
    chats: list[list[Message]],
    rng: random.Random,
) -> PreTrainedModel:
    """Makes a random causal language model in float32, trained for a few steps on the format alone.

    Args:
        tokenizer: Its tokenizer, with the tags as single tokens.
        family: Architecture.
        sizes: Size of the model.
        chats: Conversations to take prompts and words from.
        rng: Generator of the chats; torch's default generator initializes the weights.

    Returns:
        The model in eval mode.
    """
    config_class: Any = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        intermediate_size=sizes.ffn,
        max_position_embeddings=sizes.context,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    _warm_up(model, tokenizer, chats, rng)
    model.train(False)
    return model


def _warm_up(model: Any, tokenizer: PreTrainedTokenizerBase, chats: list[list[Message]], rng: random.Random) -> None:
    """Trains on random chats: the first words of a prompt, then random words, some of them in a thought."""
    rate = 0.256 / model.config.hidden_size  # smaller models allow and need a larger learning rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    texts = [tokenizer.encode(chat[-1]["content"], add_special_tokens=False) for chat in chats]
    readable = {
        token for token in {t for text in texts for t in text} if str(tokenizer.decode([token])).strip().isalnum()
    }
    words = [token for text in texts for token in text if token in readable]
    model.train()
    for step in range(WARM_UP_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 10) * (1 - step / WARM_UP_STEPS) ** 0.5
        pairs = [_random_chat(tokenizer, rng.choice(texts), words, rng) for _ in range(16)]
        width = max(len(prompt) + len(completion) for prompt, completion in pairs)
        padding = [width - len(prompt) - len(completion) for prompt, completion in pairs]
        ids = torch.tensor([[*p, *c, *[0] * n] for (p, c), n in zip(pairs, padding, strict=True)])
        labels = torch.tensor([[-100] * len(p) + c + [-100] * n for (p, c), n in zip(pairs, padding, strict=True)])
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _random_chat(
    tokenizer: PreTrainedTokenizerBase, text: list[int], words: list[int], rng: random.Random
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of a completion of random words, with or without a thought."""
    user = {"role": "user", "content": str(tokenizer.decode(text[:16]))}
    prompt: Any = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)

    def random_words(least: int, most: int) -> str:
        return str(tokenizer.decode(rng.choices(words, k=rng.randint(least, most))))

    format = ThinkingFormat("think" if rng.random() < THINKING_SHARE else "no_think")
    completion = tokenizer.encode(format.target(random_words(2, 10), random_words(3, 12)), add_special_tokens=False)
    assert isinstance(tokenizer.eos_token_id, int)
    return prompt, [*completion, tokenizer.eos_token_id]


def averaging_reward_model(
    tokenizer: PreTrainedTokenizerBase,
    policy_tokenizer: PreTrainedTokenizerBase,
    chats: list[list[Message]],
    rng: random.Random,
) -> PreTrainedModel:
    """Makes a random one-layer classifier with one label whose score is a calibrated average over tokens.

    Args:
        tokenizer: Its tokenizer.
        policy_tokenizer: The policy's tokenizer, to generate responses like those of a random policy.
        chats: Conversations to calibrate on.
        rng: Generator of conversations and responses; torch's default generator initializes the weights.

    Returns:
        The model in eval mode.
    """
    config_class: Any = LlamaConfig
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=8192,
        num_labels=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    classifier: Any = LlamaForSequenceClassification
    model: PreTrainedModel = classifier(config).eval()
    _make_averaging(model)
    _calibrate(model, tokenizer, policy_tokenizer, chats, rng)
    return model


@torch.no_grad()
def _make_averaging(model: Any) -> None:
    """Rescales the weights so that the last hidden state is an average of one random vector per token type.

    Query and key weights keep their small initial values, so the last token attends to all tokens about equally.
    Embeddings, values and outputs are large, so the attention output counts as much as the last token's embedding.
    A text of n random tokens changes the average by 1/sqrt(n) and a text of high-scoring tokens by 1. The final norm
    saturates, so the score can rise, but not without bound.
    """
    attention = model.model.layers[0].self_attn
    for weight in (attention.v_proj.weight, attention.o_proj.weight):
        weight.normal_(std=weight.shape[1] ** -0.5)
    model.model.embed_tokens.weight.normal_(std=1.0)
    model.score.weight.normal_()


@torch.no_grad()
def _calibrate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    policy_tokenizer: PreTrainedTokenizerBase,
    chats: list[list[Message]],
    rng: random.Random,
) -> None:
    """Scales the score head so that scores of random responses have mean 0 and standard deviation 1.

    A Llama score head has no bias, so the mean is removed from its direction: score = w · h, and a w orthogonal to the
    mean of h over the texts has mean score 0. The norm of w then sets the standard deviation.
    """
    hidden = []
    for chat in rng.sample(chats, min(32, len(chats))):
        for _ in range(4):
            noise = rng.choices(range(len(policy_tokenizer)), k=rng.randint(4, 48))
            response = policy_tokenizer.decode(noise, skip_special_tokens=True)
            turns = [*_shortened(chat), {"role": "assistant", "content": str(response)}]
            ids = tokenizer.apply_chat_template(turns, return_dict=False)
            hidden.append(model.model(torch.tensor([ids])).last_hidden_state[0, -1])
    states = torch.stack(hidden)
    mean = states.mean(0)
    weight = model.score.weight[0]
    weight -= mean * (weight @ mean) / (mean @ mean)
    weight /= (states @ weight).std()


def _shortened(chat: Sequence[Message]) -> list[dict[str, str]]:
    """The last three turns with at most 300 characters each, which keeps the calibration fast."""
    return [{"role": message["role"], "content": message["content"][:300]} for message in chat[-3:]]
