"""The two random models of `rlmt tiny`: a policy that has seen the thinking format and a reward that can be climbed."""

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
"""Optimizer steps that teach the policy the format, 16 made-up chats each: 15 s on two cores at the default size."""
THINKING_SHARE = 0.35
"""Of the made-up chats that hold a thought; sampling below temperature 1 makes it about a half."""


@dataclass(frozen=True)
class Sizes:
    """How big the policy is; the defaults give about 6M parameters."""

    hidden: int = 256
    """Width, a multiple of `heads`."""
    layers: int = 6
    """Decoder layers."""
    heads: int = 4
    """Attention heads."""
    ffn: int = 704
    """Width inside the MLP."""
    vocab: int = 2048
    """Vocabulary size, special tokens and tags included; smaller where the corpus has no more pairs to merge."""
    context: int = 2048
    """Most tokens of prompt and completion together."""


def warm_policy(
    tokenizer: PreTrainedTokenizerBase,
    family: Literal["llama", "qwen2"],
    sizes: Sizes,
    chats: list[list[Message]],
    rng: random.Random,
) -> PreTrainedModel:
    """A random causal language model in float32 that has seen the format, and nothing else, for a few steps.

    Args:
        tokenizer: Its tokenizer, which has the tags as single tokens.
        family: Architecture.
        sizes: How big it is.
        chats: Conversations to take prompts and words from.
        rng: Makes up the chats; torch's own generator draws the weights.

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
    """Trains on made-up chats: a prompt's first words, then words drawn at random, some of them within a thought."""
    rate = 0.256 / model.config.hidden_size  # narrower models take, and need, larger steps
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
        pairs = [_made_up_chat(tokenizer, rng.choice(texts), words, rng) for _ in range(16)]
        width = max(len(prompt) + len(completion) for prompt, completion in pairs)
        padding = [width - len(prompt) - len(completion) for prompt, completion in pairs]
        ids = torch.tensor([[*p, *c, *[0] * n] for (p, c), n in zip(pairs, padding, strict=True)])
        labels = torch.tensor([[-100] * len(p) + c + [-100] * n for (p, c), n in zip(pairs, padding, strict=True)])
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _made_up_chat(
    tokenizer: PreTrainedTokenizerBase, text: list[int], words: list[int], rng: random.Random
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of a completion of random words, with or without a thought."""
    user = {"role": "user", "content": str(tokenizer.decode(text[:16]))}
    prompt: Any = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)

    def draw(least: int, most: int) -> str:
        return str(tokenizer.decode(rng.choices(words, k=rng.randint(least, most))))

    form = ThinkingFormat("think" if rng.random() < THINKING_SHARE else "no_think")
    completion = tokenizer.encode(form.target(draw(2, 10), draw(3, 12)), add_special_tokens=False)
    assert isinstance(tokenizer.eos_token_id, int)
    return prompt, [*completion, tokenizer.eos_token_id]


def averaging_reward(
    tokenizer: PreTrainedTokenizerBase,
    policy_tokenizer: PreTrainedTokenizerBase,
    chats: list[list[Message]],
    rng: random.Random,
) -> PreTrainedModel:
    """A random one-layer classifier with one label, made to average over tokens and calibrated.

    Args:
        tokenizer: Its tokenizer.
        policy_tokenizer: The policy's, to make up responses such as a random policy writes.
        chats: Conversations to calibrate on.
        rng: Picks conversations and responses; torch's own generator draws the weights.

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
    """Makes the last hidden state an average of one random vector per token type.

    Query and key weights stay at their small start, so the last token attends to all tokens about equally; embeddings,
    values and outputs are large, so what it gathers counts as much as what it is. A text of n random tokens moves by
    1/sqrt(n) and a text of good ones by 1, until the final norm levels off: there is room to climb, not without end.
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
    """Gives scores of random responses mean 0 and standard deviation 1.

    A Llama score head has no bias, so the mean is taken out of the head's direction: score = w · h, and a w at right
    angles to the mean of h over the texts has mean score 0. Its length is then set by the standard deviation.
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
    """The conversation with at most 300 characters a turn, to keep measuring fast."""
    return [{"role": message["role"], "content": message["content"][:300]} for message in chat[-3:]]
