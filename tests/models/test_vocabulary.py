"""Every token that can occur in a text has an embedding row; anything else is one line before weights are read."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config, LlamaConfig, PretrainedConfig, PreTrainedTokenizerBase, Qwen2Config

from rlmt.cli.commands import main
from rlmt.errors import UserError
from rlmt.models.loading import load_tokenizer
from rlmt.models.vocabulary import check_vocabulary
from rlmt.rewards import ClassifierReward

FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma2": Gemma2Config}


@pytest.fixture
def tokenizer(tiny: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny / "policy")


def config(family: str, rows: int) -> PretrainedConfig:
    return FAMILIES[family](vocab_size=rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_rows_than_tokens_are_fine(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    for spare in (0, 1, 64):
        check_vocabulary(tokenizer, config(family, len(tokenizer) + spare), "some/model")


@pytest.mark.parametrize("family", FAMILIES)
def test_added_token_without_a_row_is_named(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = len(tokenizer)
    tokenizer.add_tokens(["Zebra1", "Zebra2"])
    with pytest.raises(UserError) as caught:
        check_vocabulary(tokenizer, config(family, rows), "some/model")
    assert str(caught.value).startswith(
        f"some/model: the tokenizer's token 'Zebra1' has id {rows}, but the model has {rows} embedding rows and none "
        "for it (nor for 1 other tokens); resize"
    )
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="'Zebra2'"):
        check_vocabulary(tokenizer, config(family, rows + 1), "some/model")


@pytest.mark.parametrize("where", ["pad", "template", "role", "tag"])
def test_special_token_that_is_written_needs_a_row(where: str, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = len(tokenizer)
    token = {"role": "<|turn_assistant|>", "tag": "<|<think>|>"}.get(where, "<|extra|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    number = tokenizer.convert_tokens_to_ids(token)
    assert number == rows
    if where == "pad":
        tokenizer.pad_token = token
    elif where == "template":
        tokenizer.chat_template = str(tokenizer.chat_template) + token
    elif where == "role":  # as Phi-3's, which does not contain the token in one piece
        tokenizer.chat_template = "{% for m in messages %}<|turn_{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match=f"token {re.escape(repr(token))} has id {rows}"):
        check_vocabulary(tokenizer, config("llama", rows), "some/model")


def test_special_token_that_no_text_contains_needs_no_row(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})  # as in Gemma 3 1B
    check_vocabulary(tokenizer, config("gemma2", rows), "some/model")


def grown(folder: Path, to: Path) -> Path:
    """A copy of a model whose tokenizer has a token without a row."""
    shutil.copytree(folder, to)
    tokenizer = load_tokenizer(to)
    tokenizer.add_tokens(["Zebra"])
    tokenizer.save_pretrained(to)
    (to / "model.safetensors").write_bytes(b"not read")
    return to


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_supervised_runs_are_refused_before_weights_are_read(
    kind: str, tiny: Path, tmp_path: Path, supervised_command: Callable[..., list[str]], capsys: Any
) -> None:
    option = "--model.policy" if kind == "sft" else "--model.model"
    model = grown(tiny / "policy", tmp_path / "grown")
    assert main(supervised_command("fit", kind, option, model)) == 2
    _check_line(capsys.readouterr().err, str(model))


def test_rl_runs_rewards_and_chat_are_refused_before_weights_are_read(
    tiny: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    policy, reward = grown(tiny / "policy", tmp_path / "policy"), grown(tiny / "reward", tmp_path / "reward")
    args = ["--config", "base", "--config", "grpo", "--config", "tiny", "--data.prompts", str(prompts_file)]
    good = ["--model.policy", str(tiny / "policy"), "--model.reward.model", str(tiny / "reward")]
    lengths = ["--data.max_new_tokens", "64", "--data.max_prompt_tokens", "64"]
    small = [*lengths, "--data.batch_size", "2", "--data.val_size", "2", "--data.engine", "TransformersEngine"]
    for change in (["--model.policy", str(policy)], ["--model.reward.model", str(reward)]):
        assert main(["fit", *args, *good, *small, *change]) == 2
        _check_line(capsys.readouterr().err, change[1])
    with pytest.raises(UserError, match="'Zebra'"):
        ClassifierReward(str(reward)).check()
    assert main(["chat", str(policy), "--format", "think", "--prompt", "hi"]) == 2
    _check_line(capsys.readouterr().err, str(policy))


def _check_line(err: str, source: str) -> None:
    (line,) = [line for line in err.splitlines() if "Zebra" in line]
    rows = json.loads((Path(source) / "config.json").read_text())["vocab_size"]
    assert source in line and f"the model has {rows:,} embedding rows" in line
    assert "Traceback" not in err
