"""Chat templates with the shapes of common ones, written for the tests, with byte-level tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ("river", " it", " is", "sand", "!", "plan")
"""Words that are single tokens, so that a sequence of tokens without repetition spells a text."""

_CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN25 = (
    "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    + _CHATML
)
_QWEN3 = """
{%- set ns = namespace(last=0) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- set thought, text = '', m.content -%}
    {%- if '</think>' in text -%}
      {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
      {%- set text = text.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif -%}
    {{- text + '<|im_end|>\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
"""
_QWEN3_END = """
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif -%}
{%- endif -%}
"""
_QWEN35_END = """
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if enable_thinking is defined and enable_thinking is true -%}
    {{- '<think>\n' -}}
  {%- else -%}
    {{- '<think>\n\n</think>\n\n' -}}
  {%- endif -%}
{%- endif -%}
"""
_SMOL = """
{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif -%}
{{- '<|im_start|>system\nToday Date: ' + strftime_now('%d %B %Y') -}}
{{- '\nReasoning Mode: ' + ('/think' if enable_thinking else '/no_think') + '\n' -}}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif -%}
{{- '<|im_end|>\n' -}}
{%- for m in messages if m.role != 'system' -%}
  {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if not enable_thinking %}{{ '<think>\n\n</think>\n' }}{% endif -%}
{%- endif -%}
"""
_LLAMA32 = """
{{- bos_token -}}
{%- if not date_string is defined -%}
  {%- if strftime_now is defined -%}
    {%- set date_string = strftime_now('%d %b %Y') -%}
  {%- else -%}
    {%- set date_string = '26 Jul 2024' -%}
  {%- endif -%}
{%- endif -%}
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' -}}
{%- for m in messages if m.role != 'system' -%}
  {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif -%}
"""
_R1 = """
{{- bos_token -}}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    {{- '<|User|>' + m.content -}}
  {%- elif m.role == 'assistant' -%}
    {{- '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end_of_sentence|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif -%}
"""
_DEEPSEEK = """
{%- if not thinking is defined %}{% set thinking = false %}{% endif -%}
{{- bos_token -}}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    {{- '<|User|>' + m.content -}}
  {%- elif m.role == 'assistant' -%}
    {{- '<|Assistant|></think>' + m.content.split('</think>')[-1] + '<|end_of_sentence|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|Assistant|>' + ('<think>' if thinking else '</think>') }}{% endif -%}
"""
_PHI3 = (
    "{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_GLM = """
{{- '[gMASK]<sop>' -}}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {{- '<|assistant|>\n<think></think>\n' + m.content.split('</think>')[-1].strip() -}}
  {%- else -%}
    {{- '<|' + m.role + '|>\n' + m.content -}}
    {%- if m.role == 'user' and enable_thinking is defined and not enable_thinking %}{{ '/nothink' }}{% endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' -}}
  {%- if enable_thinking is defined and not enable_thinking %}{{ '\n<think></think>' }}{% endif -%}
{%- endif -%}
"""
_GEMMA = """
{{- bos_token -}}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}
{%- for m in messages -%}
  {%- set role = 'model' if m.role == 'assistant' else m.role -%}
  {{- '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif -%}
"""
_MISTRAL = """
{{- bos_token -}}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    {{- '[INST] ' + m.content + ' [/INST]' -}}
  {%- elif m.role == 'assistant' -%}
    {{- ' ' + m.content + eos_token -}}
  {%- else -%}
    {{- raise_exception('Only user and assistant roles are supported!') -}}
  {%- endif -%}
{%- endfor -%}
"""
_OPENCHAT = (
    "{{ bos_token }}{% for m in messages %}{{ 'Chat ' + m.role + ': ' + m.content + '<|end_of_turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Chat assistant:' }}{% endif %}"
)
_CHATML_WITHOUT_START = _CHATML.partition("{%- if add_generation_prompt")[0]
_COMMAND = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START|>' + m.role }}{% if m.role == 'assistant' %}"
    "{{ '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|END|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|START|>assistant' }}{% endif %}"
)
_PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_PLAIN = (
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
_CLOSES = _QWEN3 + "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif -%}"


@dataclass(frozen=True)
class Shape:
    """A chat template and the tokens of its family."""

    template: str | dict[str, str] | None
    special: str
    """Special tokens, separated by spaces."""
    eos: str
    bos: str | None = None
    """Also written before plain text by the tokenizer."""

    @cache  # noqa: B019 - a few shapes that live as long as the tests
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token for each byte, word of `WORDS`, thought tag and special token."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        inner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_tokens([AddedToken(word, normalized=False) for word in (*WORDS, "<think>", "</think>")])
        special = [*filter(None, (self.bos, self.eos)), *self.special.split()]
        inner.add_special_tokens(list(dict.fromkeys(special)))
        if self.bos:
            bos = self.bos
            single = [(bos, inner.token_to_id(bos))]
            inner.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=single)
        wrapped = cast(Any, PreTrainedTokenizerFast)(
            tokenizer_object=inner, bos_token=self.bos, eos_token=self.eos, clean_up_tokenization_spaces=False
        )
        wrapped.chat_template = self.template
        return cast(PreTrainedTokenizerFast, wrapped)

    def __hash__(self) -> int:
        return id(self)


_IM, _DOCUMENT = "<|im_start|> <|im_end|>", "<|endoftext|>"
SHAPES = {
    "ChatML": Shape(_CHATML, _IM, "<|im_end|>"),
    "Llama 3.2, with the date": Shape(
        _LLAMA32, "<|start_header_id|> <|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"
    ),
    "Qwen2.5": Shape(_QWEN25, _IM, _DOCUMENT),
    "Qwen3": Shape(_QWEN3 + _QWEN3_END, _IM, "<|im_end|>"),
    "Qwen3.5": Shape(_QWEN3 + _QWEN35_END, _IM, "<|im_end|>"),
    "SmolLM3, with the date": Shape(_SMOL, _IM, "<|im_end|>"),
    "R1 distill": Shape(_R1, "<|User|> <|Assistant|>", "<|end_of_sentence|>", "<|begin_of_sentence|>"),
    "DeepSeek V3.1": Shape(_DEEPSEEK, "<|User|> <|Assistant|>", "<|end_of_sentence|>", "<|begin_of_sentence|>"),
    "Phi-3": Shape(_PHI3, "<|system|> <|user|> <|assistant|> <|end|>", _DOCUMENT),
    "GLM-4.5": Shape(_GLM, "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>", _DOCUMENT),
    "Gemma": Shape(_GEMMA, "<start_of_turn> <end_of_turn>", "<eos>", "<bos>"),
    "Mistral, without system role": Shape(_MISTRAL, "[INST] [/INST]", "</s>", "<s>"),
    "OpenChat": Shape(_OPENCHAT, "<|end_of_turn|>", "</s>", "<s>"),
    "named templates, one of them default": Shape({"default": _CHATML, "rag": _QWEN25}, _IM, "<|im_end|>"),
    "named templates, none of them default": Shape({"rag": _QWEN25, "tool_use": _CHATML}, _IM, "<|im_end|>"),
    "no template": Shape(None, _IM, _DOCUMENT),
    "ChatML without generation prompt": Shape(_CHATML_WITHOUT_START, _IM, "<|im_end|>"),
    "always an empty thought": Shape(_CLOSES, _IM, "<|im_end|>"),
    "Command A, with marks around responses": Shape(
        _COMMAND, "<|START|> <|END|> <|START_RESPONSE|> <|END_RESPONSE|>", "<|END|>", "<BOS>"
    ),
    "turns as lists of parts": Shape(_PARTS, _IM, "<|im_end|>"),
    "turns that end with plain text": Shape(_PLAIN, "<unk>", "</s>"),
}
"""Name in the documentation → template. The first ones work, the others are refused."""
