"""Exported reward models: transformers' own score, one by one and padded, is ours, whatever the pad token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from rlmt.export.checkpoints import export
from rlmt.models.assets import save_reward_assets
from rlmt.models.loading import load_config, load_tokenizer
from rlmt.rewards import ClassifierReward
from rlmt.rewards.conversation import ConversationReader, set_pad_token
from rlmt.types import Prompt, Status

MakeModel = Callable[..., str]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]

BOS, EOT = "<|bos|>", "<|eot|>"
TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|eot|>{% endfor %}"
NEWLINE = "{{ '\\n' }}"
PROMPT = Prompt(0, [{"role": "user", "content": "hi"}])
RESPONSES = ["a", "bb" * 40, "", "c" * 7, "z!", "dd dd"]


def checkpoint(folder: str, run: Path) -> Path:
    """The checkpoint of a run that trained the model in a folder, with the pad token that the tokenizer has."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.pad_token_id = load_tokenizer(folder).pad_token_id
    save_reward_assets(run / "reward", model.config, load_tokenizer(folder))
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"rlmt": {"module": "RewardModeling", "model": folder}, "state_dict": state}, run / "last.ckpt")
    return run / "last.ckpt"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("pad", [None, EOT, "<|pad|>"])
@pytest.mark.parametrize("end", ["", NEWLINE, BOS])
def test_transformers_scores_of_an_export_are_ours(
    family: str, pad: str | None, end: str, reward_model: MakeModel, tokenizers_by: MakeTokenizer, tmp_path: Path
) -> None:
    tokenizer = tokenizers_by(TURNS + end, pad=pad)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|spare|>"]})
    export(checkpoint(reward_model(family, tokenizer), tmp_path / "run"), tmp_path / "out")
    ours = ClassifierReward(str(tmp_path / "out"))
    ours.load()
    scores = ours.score([PROMPT] * len(RESPONSES), RESPONSES, [Status.OK] * len(RESPONSES))
    assert scores.max() - scores.min() > 0.1

    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    own = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [ours.render(PROMPT.messages, response) for response in RESPONSES]
    assert theirs.config.pad_token_id == own.pad_token_id is not None
    with torch.no_grad():
        for side in ("right", "left"):
            own.padding_side = side
            padded = theirs(**own(texts, add_special_tokens=False, padding=True, return_tensors="pt")).logits[:, 0]
            torch.testing.assert_close(padded, scores, atol=1e-5, rtol=1e-5)
        for text, score in zip(texts, scores, strict=True):
            alone = theirs(**own(text, add_special_tokens=False, return_tensors="pt")).logits
            assert alone.item() == pytest.approx(score.item(), abs=1e-5)


def pad_of(tokenizer: PreTrainedTokenizerFast, rows: int | None = None) -> str | None:
    config = LlamaConfig(vocab_size=rows or len(tokenizer))
    set_pad_token(ConversationReader(tokenizer, "rm"), config)
    assert config.pad_token_id == tokenizer.pad_token_id
    return tokenizer.pad_token


def test_pad_token_of_the_tokenizer_stays_unless_a_conversation_ends_with_it(tokenizers_by: MakeTokenizer) -> None:
    assert pad_of(tokenizers_by(pad="<|pad|>")) == "<|pad|>"
    assert pad_of(tokenizers_by(pad=EOT)) == BOS
    assert pad_of(tokenizers_by(TURNS + NEWLINE, pad=EOT)) == EOT
    assert pad_of(tokenizers_by(TURNS + BOS, pad=BOS)) == EOT


def test_token_made_for_padding_is_preferred_if_the_model_has_a_row_for_it(tokenizers_by: MakeTokenizer) -> None:
    tokenizer = tokenizers_by(pad=EOT)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_0|>", "<|finetune_right_pad_id|>"]})
    assert pad_of(tokenizer) == "<|finetune_right_pad_id|>"
    tokenizer.pad_token = EOT
    assert pad_of(tokenizer, len(tokenizer) - 1) == BOS


def test_tokenizer_with_one_special_token_gets_no_pad_token(tokenizers_by: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = tokenizers_by(pad=EOT)
    tokenizer.bos_token = EOT
    config: Any = json.loads(tokenizer.backend_tokenizer.to_str())
    config["added_tokens"] = [token for token in config["added_tokens"] if token["content"] == EOT]
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    build: Any = PreTrainedTokenizerFast
    alone = build(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token=EOT, eos_token=EOT, pad_token=EOT)
    alone.chat_template = TURNS
    assert pad_of(alone, 300) is None
    config = LlamaConfig(vocab_size=300)
    set_pad_token(ConversationReader(alone, "rm"), config)
    save_reward_assets(tmp_path / "out", config, alone)
    assert load_config(tmp_path / "out").pad_token_id is None
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token is None
