"""What a reward model reads of a conversation: special tokens in texts, chat templates that do not fit, dates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlmt.algorithms import GRPO
from rlmt.errors import UserError
from rlmt.formats import ThinkingFormat
from rlmt.modules import RLMTModule
from rlmt.rewards import ClassifierReward, WeightedSum
from rlmt.rewards.conversation import ConversationReader
from rlmt.types import Message

from ..chat_templates import SHAPES

MakeModel = Callable[..., str]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.mark.parametrize("family", ["Phi-3", "GLM-4.5", "Gemma"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_special_tokens_inside_tags_do_not_make_tags(family: str, data: st.DataObject) -> None:
    tokenizer = SHAPES[family].tokenizer()
    specials = st.sampled_from([*tokenizer.all_special_tokens, *SHAPES[family].special.split()])
    tags = st.sampled_from(["<think>", "</think>", "<response>", "</response>", *tokenizer.all_special_tokens])

    def cut(tag: str, at: int, special: str) -> str:
        return tag[: at % len(tag)] + special + tag[at % len(tag) :]

    piece = st.builds(cut, tags, st.integers(1, 40), specials) | specials | st.text(max_size=4)
    text = "".join(data.draw(st.lists(piece, max_size=6)))
    clean = ConversationReader(tokenizer, "rm").neutralise(text)
    for tag in ("<think>", "</think>", "<response>", "</response>"):
        assert clean.count(tag) <= text.count(tag), (text, clean)
    assert not any(token in clean for token in tokenizer.all_special_tokens)


def test_tag_is_not_smuggled_through_a_special_token(tokenizers_by: MakeTokenizer) -> None:
    reader = ConversationReader(tokenizers_by(), "rm")
    assert reader.neutralise("a<th<|eot|>ink>b</th<|bos|>ink>c") == "a<th ink>b</th ink>c"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("turns as lists of parts", "omits the response"),
        ("named templates, none of them default", "rag, tool_use and none named default"),
        ("no template", "has no chat template"),
    ],
)
def test_reward_models_whose_template_does_not_fit_are_refused(
    reward_model: MakeModel, shape: str, message: str
) -> None:
    with pytest.raises(UserError, match=f"^reward model '.*{message}") as caught:
        ClassifierReward(reward_model(tokenizer=SHAPES[shape].tokenizer())).check()
    assert "\n" not in str(caught.value)


def test_tokenizer_of_whole_words_has_the_suffix_behind_the_words() -> None:
    """It encodes x and y, which are no words, alike."""
    words = ["<unk>", "<|end|>", "<|user|>", "<|assistant|>", "plan", "lunch"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    build: Any = PreTrainedTokenizerFast
    tokenizer = build(tokenizer_object=core, unk_token="<unk>", eos_token="<|end|>")
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = template
    reader = ConversationReader(tokenizer, "rm")
    assert reader.suffix_length == 1
    assert reader.encode([reader.render([Message(role="user", content="plan")], "lunch")]) == [[2, 4, 1, 3, 5, 1]]
    tokenizer.chat_template = template.replace("m.content", "'lunch'")
    with pytest.raises(UserError, match="omits the response"):
        ConversationReader(tokenizer, "rm")


def test_template_date_of_a_run_reaches_all_its_rewards(
    reward_model: MakeModel, tokenizers_by: MakeTokenizer, tiny: Path
) -> None:
    dated = tokenizers_by("{{ strftime_now('%d %B') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    sources = [reward_model(tokenizer=dated) for _ in range(3)]
    trained, other, held_out = map(ClassifierReward, sources)
    other.name, held_out.name = "other", "held_out"
    RLMTModule(
        str(tiny / "policy"),
        WeightedSum([trained, other], [1.0, 1.0]),
        GRPO(),
        ThinkingFormat(date="2025-02-03"),
        held_out_rewards=[held_out],
    )
    for reward in (trained, other, held_out):
        assert reward.render([{"role": "user", "content": "a"}], "b").startswith("03 February[user]a")
