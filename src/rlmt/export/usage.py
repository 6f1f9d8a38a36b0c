"""Python code for the model card that uses an exported model as in training, with transformers and with vLLM.

The code is made for one model: it renders the prompts that the policy was trained on (template arguments, date, system
turn, opening tag, one BOS) and splits completions as the format does. The tests run it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date
from typing import Any

from rlmt.annotations import PreTrainedTokenizerBase
from rlmt.formats.base_prompt import base_prompt
from rlmt.formats.chat_template import THOUGHT_TAGS
from rlmt.formats.thinking import ThinkingFormat
from rlmt.rewards.conversation import ConversationReader
from rlmt.types import Message

QUESTION = "Plan a weekend in Rome."
"""The user's turn in the code."""


@dataclass(frozen=True)
class Usage:
    """Blocks of Python code; each continues the one before it."""

    prompt: str
    """Renders a prompt as `ids`."""
    transformers: str
    """Generates with transformers, or scores."""
    vllm: str | None = None
    """Generates with vLLM in place of transformers."""


@dataclass(frozen=True)
class Loading:
    """How the model is loaded."""

    name: str
    """Folder or hub name of the exported model."""
    base: str | None = None
    """Folder or hub name of the model below an exported adapter."""
    rank: int = 0
    """Rank of the adapter."""
    temperature: float = 1.0
    """Sampling temperature."""
    max_new_tokens: int = 1024
    """Maximum length of a completion in tokens."""


def policy_usage(format: ThinkingFormat, tokenizer: PreTrainedTokenizerBase, loading: Loading) -> Usage:
    """Code that samples from a policy.

    Args:
        format: The format that it was trained with.
        tokenizer: Its tokenizer.
        loading: How it is loaded.
    """
    prompt = [
        "from transformers import AutoTokenizer",
        "",
        f"name = {_quoted(loading.name)}  # folder or hub name of this model",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        f"question = {_quoted(QUESTION)}",
        *(_base_text(format) if format.zero else _chat_text(format, tokenizer)),
        'ids = tokenizer(text, add_special_tokens=False)["input_ids"]',
        *_bos(format, tokenizer),
        "",
        "",
        *_split(format),
    ]
    keeps_tags = _keeps_tags(tokenizer, format)
    stop = f", stop_strings=[{', '.join(map(_quoted, format.stop))}], tokenizer=tokenizer" if format.stop else ""
    sampling = f"temperature={loading.temperature:g}"
    transformers = [
        "import torch",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")',
        f"options = dict(do_sample=True, {sampling}, top_k=0, max_new_tokens={loading.max_new_tokens}{stop})",
        "output = model.generate(torch.tensor([ids]), **options)",
        f"completion = {_decoded('output[0, len(ids) :].tolist()', format, tokenizer, keeps_tags)}",
        "print(split(completion))",
    ]
    stop = f", stop=[{', '.join(map(_quoted, format.stop))}], include_stop_str_in_output=True" if format.stop else ""
    vllm = [
        "from vllm import LLM, SamplingParams",
        *(["from vllm.lora.request import LoRARequest"] if loading.base else []),
        "",
        f"params = SamplingParams({sampling}, max_tokens={loading.max_new_tokens}{stop})",
        *_vllm_call(loading),
        f"completion = {_decoded('list(output.outputs[0].token_ids)', format, tokenizer, keeps_tags)}",
        "print(split(completion))",
    ]
    return Usage("\n".join(prompt), "\n".join(transformers), "\n".join(vllm))


def _vllm_call(loading: Loading) -> list[str]:
    """Loads the model in vLLM and generates."""
    generate = 'generate([{"prompt_token_ids": ids}], params'
    if loading.base is None:
        return ["llm = LLM(name)", f"[output] = llm.{generate})"]
    return [
        f"llm = LLM({_quoted(loading.base)}, enable_lora=True, max_lora_rank={max(8, loading.rank)})",
        f'[output] = llm.{generate}, lora_request=LoRARequest("policy", 1, name))',
    ]


def _base_text(format: ThinkingFormat) -> list[str]:
    """Builds the plain text that a base model reads."""
    text = base_prompt(_turns(format), format.thinks, format.opening if format.prefill else "")
    before, after = text.split(QUESTION)
    return [f"text = {_quoted(before)} + question + {_quoted(after)}"]


def _chat_text(format: ThinkingFormat, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Applies the chat template as in training."""
    template, lines = format.template(tokenizer), []
    arguments: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, **template.arguments}
    options = [f"{name}={value!r}" for name, value in arguments.items()]
    if template.prints_date():
        day = date.fromisoformat(format.date)
        lines += ["from datetime import date", "", f"day = date({day.year}, {day.month}, {day.day})  # as in training"]
        options += ['date_string=day.strftime("%d %b %Y")', "strftime_now=day.strftime"]
    turns = ", ".join(
        f'{{"role": "{turn["role"]}", "content": {"question" if turn["role"] == "user" else _quoted(turn["content"])}}}'
        for turn in _turns(format)
    )
    lines += [f"messages = [{turns}]", f"options = dict({', '.join(options)})"]
    lines += ["text = tokenizer.apply_chat_template(messages, **options)"]
    if format.prefill and template.thought(format.probe) == "none":
        lines.append(f"text += {_quoted(format.opening)}")
    return lines


def _turns(format: ThinkingFormat) -> list[Message]:
    """The conversation of the code, with the system turn of the format."""
    return format.turns([Message(role="user", content=QUESTION)])


def _bos(format: ThinkingFormat, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Corrects the number of BOS tokens where the template writes none or the tokenizer adds one."""
    ids, bos = format.render(format.probe, tokenizer), tokenizer.bos_token_id
    if bos is None:
        return []
    if ids[:1] != [bos]:
        return ["ids = ids[1:] if ids[0] == tokenizer.bos_token_id else ids"]
    return ["ids = ids if ids[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id, *ids]"]


def _split(format: ThinkingFormat) -> list[str]:
    """A function that splits a well-formed completion as `ThinkingFormat.split` does."""
    lines = ["def split(completion):"]
    if format.thinks:
        opened, closed = THOUGHT_TAGS
        lines += [
            f"    thought, _, response = completion.partition({_quoted(closed)})",
            f"    thought = thought.strip().removeprefix({_quoted(opened)}).strip()",
        ]
    else:
        lines.append('    thought, response = "", completion')
    if format.zero:
        lines.append('    response = response.rpartition("<response>")[2].partition("</response>")[0]')
    return [*lines, '    return {"thought": thought, "response": response.strip()}']


def _keeps_tags(tokenizer: PreTrainedTokenizerBase, format: ThinkingFormat) -> bool:
    """Whether the tags survive when special tokens are removed."""
    text = " ".join(format.tags)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded = str(tokenizer.decode(ids, skip_special_tokens=True))
    return all(tag in decoded for tag in format.tags)


def _decoded(ids: str, format: ThinkingFormat, tokenizer: PreTrainedTokenizerBase, keeps_tags: bool) -> str:
    """Decodes sampled tokens, without the ones that end a sample and with the format's tags."""
    if keeps_tags:
        return f"tokenizer.decode({ids}, skip_special_tokens=True)"
    stop = sorted({*format.stop_token_ids(tokenizer)})
    return f"tokenizer.decode([token for token in {ids} if token not in {stop}])"


def reward_usage(tokenizer: PreTrainedTokenizerBase, pad_token_id: int | None, loading: Loading) -> Usage:
    """Code that scores a response with a reward model.

    Args:
        tokenizer: Its tokenizer.
        pad_token_id: Pad token of its config.
        loading: How it is loaded.
    """
    reader = ConversationReader(tokenizer, loading.name)
    [ids] = reader.encode([reader.render([Message(role="user", content=QUESTION)], "Gladly.")])
    prompt = [
        "from transformers import AutoTokenizer",
        "",
        f"name = {_quoted(loading.name)}  # folder or hub name of this model",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        f'turns = [{{"role": "user", "content": {_quoted(QUESTION)}}}, {{"role": "assistant", "content": "Gladly."}}]',
        "text = tokenizer.apply_chat_template(turns, tokenize=False)",
        'ids = tokenizer(text, add_special_tokens=False)["input_ids"]',
    ]
    if tokenizer.bos_token_id is not None and reader.leading_bos(ids):
        prompt.append("ids = ids if ids[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id, *ids]")
    if loading.base is None:
        load = ['model = AutoModelForSequenceClassification.from_pretrained(name, dtype="auto")']
    else:
        options = f'num_labels=1, pad_token_id={pad_token_id}, dtype="auto"'
        load = [
            f"base = AutoModelForSequenceClassification.from_pretrained({_quoted(loading.base)}, {options})",
            "model = PeftModel.from_pretrained(base, name)",
        ]
    transformers = [
        "import torch",
        *(["from peft import PeftModel"] if loading.base else []),
        "from transformers import AutoModelForSequenceClassification",
        "",
        *load,
        "score = model(torch.tensor([ids])).logits[0, 0].item()",
        "print(score)",
    ]
    return Usage("\n".join(prompt), "\n".join(transformers))


def _quoted(text: str) -> str:
    """A string literal of Python."""
    return json.dumps(text, ensure_ascii=False)
