"""Byte-level tokenizers, so that tokens can be counted by hand."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def one_token_a_byte(turn_end: str) -> PreTrainedTokenizerFast:
    """A tokenizer over bytes and control tokens; a turn ends with the passed control token and suffix."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"])
    inner.add_special_tokens([turn_end.strip()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        + turn_end
        + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose turns end with <|im_end|>, which is not the eos token </s>, and a newline."""
    return one_token_a_byte("<|im_end|>\n")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose turns end with the eos token."""
    return one_token_a_byte("</s>")


@pytest.fixture
def prompts(tmp_path):
    """22 prompts of 5 bytes, which the chat template renders to 9 tokens each."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say{i:02}"}) + "\n" for i in range(22)))
    return str(path)
