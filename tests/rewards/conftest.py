"""Tiny random reward models, and loopback services that score."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

sys.path.append(str(Path(__file__).parents[1] / "endpoints"))
from loopback import Loopback, Reply, completion  # noqa: E402

BOS, EOT = "<|bos|>", "<|eot|>"
TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|eot|>{% endfor %}"
"""A template without BOS whose last token ends the turn, as Llama's and ChatML-like ones do."""


def make_tokenizer(template: str | None = TURNS, adds: str = "", pad: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer over bytes (id = rank of the byte, then specials).

    Args:
        template: Chat template.
        adds: What its post-processor adds to plain text: "bos", "bos eos" or nothing.
        pad: Pad token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    build: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = build(tokenizer_object=core, bos_token=BOS, eos_token=EOT, pad_token=pad)
    if adds:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A {EOT}" if "eos" in adds else f"{BOS} $A",
            special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in (BOS, EOT)],
        )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def tokenizers_by() -> Callable[..., PreTrainedTokenizerFast]:
    """`make_tokenizer`."""
    return make_tokenizer


@pytest.fixture
def reward_model(tmp_path: Path) -> Callable[..., str]:
    """Makes a folder with a random reward model and its tokenizer."""

    def make(
        family: str = "llama",
        tokenizer: PreTrainedTokenizerFast | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> str:
        tokenizer = make_tokenizer() if tokenizer is None else tokenizer
        folder = tmp_path / f"rm{len(list(tmp_path.iterdir()))}"
        settings: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "num_labels": 1,
            "initializer_range": 0.3,
            "pad_token_id": tokenizer.pad_token_id,
        } | options
        torch.manual_seed(0)
        config = LlamaConfig(**settings) if family == "llama" else Qwen2Config(**settings)
        auto: Any = AutoModelForSequenceClassification
        model = auto.from_config(config)
        model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str, Any], Reply]], Loopback]]:
    """Starts loopback services without a key; waits between attempts are short."""
    monkeypatch.setattr("rlmt.endpoints.client.FIRST_WAIT", 0.001)
    started: list[Loopback] = []

    def start(script: Callable[[str, Any], Reply]) -> Loopback:
        started.append(Loopback(script))
        return started[-1]

    yield start
    for server in started:
        server.close()


def score_anything(path: str, body: Any) -> Reply:
    """A service for every reward that asks: what it scores is the number of the letter e in the response."""
    if path == "/classify":
        scores = [sum(ids) % 97 / 20 - 2 for ids in body["input"]]
        if body.get("use_activation", True):
            scores = [1 / (1 + math.exp(-score)) for score in scores]
        return Reply({"data": [{"index": i, "probs": [score]} for i, score in enumerate(scores)]})
    if "responses" in body:
        return Reply({"rewards": [text.count("e") / 10 for text in body["responses"]]})
    question = body["messages"][-1]["content"]
    responses = re.findall(r"<response(?:_[ab])?>\n(.*?)\n</response", question, re.DOTALL)
    counts = [text.count("e") for text in responses]
    if len(counts) == 2:
        return completion("Hm.\nWinner: " + ("tie" if counts[0] == counts[1] else "AB"[counts[1] > counts[0]]))
    if "<criteria>" in question:
        (criteria,) = re.findall(r"<criteria>\n(.*?)\n</criteria>", question, re.DOTALL)
        numbers = range(1, len(criteria.splitlines()) + 1)
        return completion("\n".join(f"{n}: {'yes' if counts[0] >= n else 'no'}" for n in numbers))
    return completion(f"Fine.\n**Score: {1 + min(9, counts[0])}**")


@pytest.fixture
def scorer(serve: Callable[[Callable[[str, Any], Reply]], Loopback]) -> Loopback:
    """A service that runs `score_anything`."""
    return serve(score_anything)
