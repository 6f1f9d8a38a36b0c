"""A word-level tokenizer for the miniature world, in standard Hugging Face form."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlmt.demos.mini.world import words
from rlmt.formats.thinking import ThinkingFormat

PAD, BOS, END, UNKNOWN = "<|pad|>", "<|bos|>", "<|end|>", "<|unknown|>"
_SPECIAL = (PAD, BOS, END, UNKNOWN, "<|system|>", "<|user|>", "<|assistant|>")
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerBase:
    """One token a word, line break or tag; other words are unknown.

    Decoding puts a space between words, and so gives back any text of this world up to white space.
    """
    spelled = [*_SPECIAL, *(f"\u2581{word}" for word in ("\n", "\n\n", *words()))]
    tokenizer = Tokenizer(models.WordLevel({token: k for k, token in enumerate(spelled)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n+"), "isolated"), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tags = dict.fromkeys(tag for name in ("think", "zero_think") for tag in ThinkingFormat(name).tags)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    wrapped: PreTrainedTokenizerBase = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens=list(_SPECIAL[4:]),
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = _TEMPLATE
    return wrapped
