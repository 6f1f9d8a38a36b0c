"""Stop tokens of a policy: tokenizer, chat template and generation config."""

import json
from pathlib import Path

import pytest

from rlmt.errors import UserError
from rlmt.formats import FormatName, ThinkingFormat
from rlmt.models.assets import load_stop_token_ids

from ..chat_templates import SHAPES


@pytest.mark.parametrize(
    ("shape", "format", "eos", "expected"),
    [
        (
            "GLM-4.5",
            "think",
            ["<|endoftext|>", "<|user|>", "<|observation|>"],
            "<|endoftext|> <|user|> <|observation|>",
        ),
        ("Phi-3", "no_think", ["<|user|>"], "<|endoftext|> <|end|> <|user|>"),
        ("Phi-3", "no_think", "<|end|>", "<|endoftext|> <|end|>"),
        ("Phi-3", "no_think", None, "<|endoftext|> <|end|>"),
        ("Phi-3", "zero_think", ["<|end|>"], "<|endoftext|> <|end|>"),
        ("Phi-3", "zero_think", None, "<|endoftext|>"),
    ],
)
def test_stop_tokens_are_those_of_tokenizer_template_and_generation_config(
    shape: str, format: FormatName, eos: list[str] | str | None, expected: str, tmp_path: Path
) -> None:
    tokenizer = SHAPES[shape].tokenizer()
    if eos is not None:
        ids = tokenizer.convert_tokens_to_ids(eos)
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    stops = load_stop_token_ids(tmp_path, tokenizer, ThinkingFormat(format))
    assert tokenizer.convert_ids_to_tokens(list(stops)) == expected.split()


def test_eos_tokens_that_the_tokenizer_lacks_are_left_out(tmp_path: Path) -> None:
    tokenizer = SHAPES["ChatML"].tokenizer()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [50256]}))
    assert load_stop_token_ids(tmp_path, tokenizer, ThinkingFormat("think")) == (tokenizer.eos_token_id,)


def test_damaged_generation_config_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config.json cannot be read; copy it again") as caught:
        load_stop_token_ids(tmp_path, SHAPES["ChatML"].tokenizer(), ThinkingFormat("think"))
    assert "\n" not in str(caught.value)
