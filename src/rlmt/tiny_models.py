"""The two random models of `rlmt.tiny`: a policy that leans to the thinking format and a reward that can be climbed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from rlmt.types import Message

OPEN_PROBABILITY = 1 / 2
"""Of `<think>` at the start of the assistant's turn."""
CLOSE_PROBABILITY = 1 / 24
"""Of `</think>`, and of the end of turn, at every later token."""


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


def leaning_policy(
    tokenizer: PreTrainedTokenizerBase, family: Literal["llama", "qwen2"], sizes: Sizes, chats: list[list[Message]]
) -> PreTrainedModel:
    """A random causal language model in float32 whose head leans to the format.

    Args:
        tokenizer: Its tokenizer, which has the tags as single tokens.
        family: Architecture.
        sizes: How big it is.
        chats: Conversations to measure hidden states on.

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
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32).eval()
    prompts: Any = [
        tokenizer.apply_chat_template(_shortened(chat), add_generation_prompt=True, return_dict=False)
        for chat in chats[:8]
    ]
    _lean_to_format(model, tokenizer, prompts)
    return model


@torch.no_grad()
def _lean_to_format(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> None:
    """Sets the head's rows of `<think>`, `</think>` and end of turn so that each has its probability (see `rlmt.tiny`).

    A Llama head has no bias. A direction that all hidden states share serves as one: it is put into every embedding,
    its image after the layers is measured, and the rows point along it. `<think>`'s row points along what the hidden
    states at the assistant's opening have besides. All other tokens stay equally likely, within a random factor.
    """
    embeddings = model.get_input_embeddings().weight
    shared = torch.randn(embeddings.shape[1])
    embeddings.normal_(std=1.0).add_(shared)
    opening, later = [], []
    for prompt in prompts:
        noise = torch.randint(len(tokenizer), (32,)).tolist()
        hidden = model.base_model(torch.tensor([prompt + noise])).last_hidden_state[0]
        opening.append(hidden[len(prompt) - 1])
        later.append(hidden[len(prompt) :])
    mean = torch.cat(later).mean(0)
    lean = torch.stack(opening).mean(0)
    lean -= mean * (lean @ mean) / (mean @ mean)

    def row(direction: Tensor, probability: float) -> Tensor:
        # A softmax over V tokens of logit 0 and one of l gives that one the probability p at l = log(V p / (1 - p)).
        logit = math.log(len(tokenizer) * probability / (1 - probability))
        return direction * logit / (direction @ direction)

    head = model.get_output_embeddings().weight
    for token in ("</think>", tokenizer.eos_token):
        head[tokenizer.convert_tokens_to_ids(token)] = row(mean, CLOSE_PROBABILITY)
    head[tokenizer.convert_tokens_to_ids("<think>")] = row(lean, OPEN_PROBABILITY)


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
