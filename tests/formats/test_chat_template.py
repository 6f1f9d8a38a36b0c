"""Chat templates with the shapes of common ones: prompts, ends of turns, thinking switches, dates and refusals."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import pytest

from rlmt.errors import UserError
from rlmt.formats.resolve import check_format, resolve_format
from rlmt.formats.thinking import ThinkingFormat
from rlmt.types import Message

from ..chat_templates import SHAPES

HI = [Message(role="user", content="Hi")]

# name → (tokens that end a sample, what the prompt of think has behind the user's text, that of no_think)
EXPECTED: dict[str, tuple[str, str | None, str | None]] = {
    "ChatML": ("<|im_end|>", *["<|im_end|>\n<|im_start|>assistant\n"] * 2),
    "Llama 3.2, with the date": ("<|eot_id|>", *["<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"] * 2),
    "Qwen2.5": ("<|endoftext|> <|im_end|>", *["<|im_end|>\n<|im_start|>assistant\n"] * 2),
    "Qwen3": (
        "<|im_end|>",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "Qwen3.5": (
        "<|im_end|>",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "SmolLM3, with the date": (
        "<|im_end|>",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n",
    ),
    "R1 distill": ("<|end_of_sentence|>", "<|Assistant|><think>\n", None),
    "DeepSeek V3.1": ("<|end_of_sentence|>", "<|Assistant|><think>", "<|Assistant|></think>"),
    "Phi-3": ("<|endoftext|> <|end|>", *["<|end|>\n<|assistant|>\n"] * 2),
    "GLM-4.5": ("<|endoftext|> <|user|>", "<|assistant|>", "/nothink<|assistant|>\n<think></think>"),
    "Gemma": ("<eos> <end_of_turn>", *["<end_of_turn>\n<start_of_turn>model\n"] * 2),
    "Mistral, without system role": ("</s>", *[" [/INST]"] * 2),
    "OpenChat": ("</s> <|end_of_turn|>", *["<|end_of_turn|>Chat assistant:"] * 2),
    "named templates, one of them default": ("<|im_end|>", *["<|im_end|>\n<|im_start|>assistant\n"] * 2),
    "always an empty thought": ("<|im_end|>", None, "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
}
CASES = [
    (shape, name, stops.split(), end)
    for shape, (stops, *ends) in EXPECTED.items()
    for name, end in zip(("think", "no_think"), ends, strict=True)
    if end is not None
]

REFUSED = {
    ("R1 distill", "no_think"): r"opens a thought, unlike format no_think; use format think, or a model",
    ("always an empty thought", "think"): r"closes an empty thought, unlike format think; use no_think",
    (
        "named templates, none of them default",
        "",
    ): r"templates named rag, tool_use and none named default; save the one",
    ("no template", ""): r"has no chat template, which format \w+ requires; use an instruct model",
    ("ChatML without generation prompt", ""): r"writes '<\|im_start\|>assistant' before an answer, but not at the end",
    ("Command A, with marks around responses", ""): r"writes '<\|START_RESPONSE\|>' before an answer, but not",
    ("turns as lists of parts", ""): r"omits the text of turns that are plain text",
    ("turns that end with plain text", ""): r"writes '\\n\\n### user:\\n' behind an answer, and no special token",
}


def resolved(shape: str, name: str, **options: Any) -> ThinkingFormat:
    return resolve_format(ThinkingFormat(name, **options), SHAPES[shape].tokenizer(), "m")  # type: ignore[arg-type]


def rendered(shape: str, format: ThinkingFormat, messages: list[Message] = HI) -> str:
    tokenizer = SHAPES[shape].tokenizer()
    return str(tokenizer.decode(format.render(messages, tokenizer), skip_special_tokens=False))


def set_clock(monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    """Sets the clock that chat templates read."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime(2026, 11, day)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


def test_every_shape_is_covered() -> None:
    assert {shape for shape, _ in REFUSED} | EXPECTED.keys() == SHAPES.keys()


@pytest.mark.parametrize(("shape", "name", "stops", "end"), CASES, ids=[f"{shape}-{name}" for shape, name, *_ in CASES])
def test_prompt_and_stop_tokens_equal_results_by_hand(shape: str, name: str, stops: list[str], end: str) -> None:
    format, tokenizer = resolved(shape, name), SHAPES[shape].tokenizer()
    prompt = format.render(HI, tokenizer)
    text = rendered(shape, format)
    assert text.endswith(f"Hi{end}")
    assert text.count("Hi") == 1 and text.count("<think>") <= 1
    if tokenizer.bos_token:
        assert prompt[0] == tokenizer.bos_token_id and prompt.count(tokenizer.bos_token_id) == 1
    assert tokenizer.convert_ids_to_tokens(list(format.stop_token_ids(tokenizer))) == stops
    assert tokenizer.convert_ids_to_tokens(format.turn_end(tokenizer)) == stops[-1]
    assert format.prefill == (end.rstrip().endswith("<think>"))
    assert resolve_format(format, tokenizer, "m") == format == ThinkingFormat.from_dict(format.to_dict())


@pytest.mark.parametrize(("shape", "name"), REFUSED)
def test_templates_that_do_not_fit_are_refused_in_one_line(shape: str, name: str) -> None:
    for format in [name] if name else ["think", "no_think"]:
        with pytest.raises(UserError, match=rf"^m: the (chat template|tokenizer) .*{REFUSED[shape, name]}") as caught:
            resolved(shape, format)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [name for name in EXPECTED if name != "always an empty thought"])
@pytest.mark.parametrize("prefill", [False, True])
def test_no_thought_opens_behind_a_closed_one(shape: str, prefill: bool) -> None:
    text = rendered(shape, resolved(shape, "think", prefill=prefill))
    assert not re.search(r"</think>\s*<think>|<think>\s*<think>", text)
    assert text.rstrip().endswith("<think>") == (prefill or resolved(shape, "think").prefill)


def test_given_arguments_override_the_switch() -> None:
    assert resolved("Qwen3", "no_think").chat_template_kwargs == {"enable_thinking": False}
    assert resolved("Qwen3", "think").chat_template_kwargs == {}
    kept = resolved("Qwen3", "no_think", chat_template_kwargs={"enable_thinking": True})
    assert rendered("Qwen3", kept).endswith("<|im_start|>assistant\n")
    for shape, name, given, message in [
        ("Qwen3", "think", {"enable_thinking": False}, r"\{'enable_thinking': False\} closes an empty thought"),
        ("DeepSeek V3.1", "no_think", {"thinking": True}, "opens a thought, unlike format no_think"),
        ("Qwen3", "think", {"enable_thinkin": False}, "'enable_thinkin', which the chat template does not read"),
        ("Qwen3", "think", {"tokenize": True}, "'tokenize', which rlmt sets itself"),
    ]:
        with pytest.raises(UserError, match=f"^m: .*{message}"):
            resolved(shape, name, chat_template_kwargs=given)


def test_saved_format_is_checked_as_it_is() -> None:
    with pytest.raises(UserError, match="opens a thought, unlike format think; set prefill to true"):
        check_format(ThinkingFormat("think"), SHAPES["R1 distill"].tokenizer(), "m")
    check_format(ThinkingFormat("no_think"), SHAPES["Qwen3"].tokenizer(), "m")


@pytest.mark.parametrize(
    ("shape", "printed"), [("Llama 3.2, with the date", "31 Jan 2025"), ("SmolLM3, with the date", "31 January 2025")]
)
def test_date_is_that_of_the_format_and_not_the_clock(
    shape: str, printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = set()
    for day in (26, 27):
        set_clock(monkeypatch, day)
        assert f"{day} Nov" in str(SHAPES[shape].tokenizer().apply_chat_template(HI, tokenize=False))
        prompts.add(rendered(shape, resolved(shape, "think")))
    assert len(prompts) == 1 and "26 Jul" in prompts.pop()
    assert printed in rendered(shape, resolved(shape, "think", date="2025-01-31"))
    assert resolved(shape, "think").template(SHAPES[shape].tokenizer()).prints_date()


def test_instruction_that_the_template_omits_is_refused() -> None:
    tokenizer = SHAPES["GLM-4.5"].tokenizer()
    template = str(tokenizer.chat_template).replace("for m in messages", "for m in messages if m.role != 'system'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", template)
        resolve_format(ThinkingFormat("think"), tokenizer, "m")
        with pytest.raises(UserError, match="^m: the chat template omits the system turn"):
            resolve_format(ThinkingFormat("think", instruction="Think first."), tokenizer, "m")


@pytest.mark.parametrize("template", ["{{ messages[0].content + none }}", "{{ messages[9].content.x }}", "{% for"])
def test_broken_template_is_one_line(template: str) -> None:
    tokenizer = SHAPES["Phi-3"].tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", template)
        with pytest.raises(UserError, match="^m: the chat template refuses the turns user") as caught:
            resolve_format(ThinkingFormat("think"), tokenizer, "m")
    assert "\n" not in str(caught.value)


def test_generation_prompt_that_differs_from_the_conversation_is_refused() -> None:
    tokenizer = SHAPES["Phi-3"].tokenizer()
    template = str(tokenizer.chat_template).replace("{{ '<|assistant|>\n' }}", "{{ '<|assistant|>Sure. ' }}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", template)
        with pytest.raises(UserError, match=r"starts an answer with '<\|end\|>\\n<\|assistant\|>Sure. ' in a prompt"):
            resolve_format(ThinkingFormat("no_think"), tokenizer, "m")
