"""Makes a tiny world to try everything on: a random policy, a random reward model and prompts, offline and in seconds.

`rlmt tiny` writes genuine Hugging Face folders, read by the same code as an 8B model. Two random networks would make a
dull world, for a random policy writes one close tag in a vocabulary's worth of tokens, and a random classifier gives
every text about the same score. So both get one thing taught or made by hand:

- The policy sees the format for a few seconds (`tiny_models`): random words, with a thought before them in some chats.
  It knows how to write a thought and when to stop, and half of the time it thinks: `think` and `no_think` fare
  alike, and reinforcement learning has something to find and to improve.
- The reward classifier averages a random number per token (see `tiny_models`), set to mean 0 and standard
  deviation 1 over random texts. Better tokens make better scores, smoothly, which GRPO learns in a few
  steps; it is no measure of good English.

Same seed, same files, bit for bit. Left out: anything downloaded; what such a policy writes is noise.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlmt.demos.tiny_models import Sizes, averaging_reward, warm_policy
from rlmt.errors import UserError
from rlmt.types import Message

TAGS = ("<think>", "</think>", "<response>", "</response>")
"""Single tokens of the policy's vocabulary, not special ones: they are part of the text."""

_POLICY_SPECIAL = ("<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
_POLICY_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_REWARD_SPECIAL = ("<unk>", "<s>", "</s>", "[PAD]", "[INST]", "[/INST]", "[SYS]", "[/SYS]")
_REWARD_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}[SYS]{{ m['content'] }}[/SYS]"
    "{% elif m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
_TOKENIZER_CHARS = 1_000_000
_MARKER = "tiny.json"

_TASKS = (
    "Explain {} to a child.",
    "Write a short poem about {}.",
    "What should I know about {} before I begin?",
    "Give me three tips on {}.",
    "Why do people care so much about {}?",
    "Draft a friendly email to a colleague about {}.",
    "Tell me a joke about {}, please.",
    "What is the history of {} in two sentences?",
    "Make a packing list for a weekend of {}.",
    "Compare {} with something that most people know.",
    "I know nothing about {}; where do I start?",
    "Summarise the best arguments against {}.",
    "Plan one week of learning about {}, day by day.",
    "Invent a story that begins and ends with {}.",
    "Which mistakes do beginners make with {}?",
    "How would you teach {} to a class of 30?",
)
_TOPICS = (
    "bread baking", "black holes", "chess openings", "compound interest", "mountain hiking", "the French Revolution",
    "houseplants", "jazz improvisation", "unit tests", "bicycle repair", "sleep", "coral reefs", "public speaking",
    "regular expressions", "medieval castles", "home budgets", "volcanoes", "knitting", "the immune system",
    "negotiating a salary", "street photography", "beekeeping", "cold-water swimming", "quantum computers",
)  # fmt: skip


def make_tiny(
    out: Path = Path("runs/tiny"),
    corpus: str | None = None,
    family: Literal["llama", "qwen2"] = "llama",
    seed: int = 0,
) -> None:
    """Makes a tiny random policy, a tiny reward model and prompts, to try every command on without any download.

    Args:
        out: Folder to write; one that an earlier `rlmt tiny` made is made anew.
        corpus: Prompt file or data set to train the tokenizers on; without it prompts.jsonl is written and used.
        family: Architecture of the policy.
        seed: Same seed, same files.

    Raises:
        UserError: As `write_tiny`.
    """
    for name, what in write_tiny(out, corpus, family, seed).items():
        print(f"{out / name}: {what}")


def write_tiny(
    out: Path,
    corpus: str | None = None,
    family: Literal["llama", "qwen2"] = "llama",
    seed: int = 0,
    sizes: Sizes | None = None,
) -> dict[str, str]:
    """Writes OUT/policy, OUT/reward, OUT/tiny.json and, when no corpus is given, OUT/prompts.jsonl.

    Args:
        out: Folder to write.
        corpus: What `rlmt.data.prompts.load_prompts` reads, or None for the own prompts.
        family: Architecture of the policy.
        seed: Seed of all weights.
        sizes: How big the policy is.

    Returns:
        What was written → a word on its size.

    Raises:
        UserError: If `out` holds a policy, reward model or prompts that were not made by this function, or the corpus
            cannot be read.
    """
    sizes = sizes or Sizes()
    chats = _default_chats() if corpus is None else _read_chats(corpus)
    _make_room(out, replace_prompts=corpus is None)
    made: dict[str, str] = {}
    if corpus is None:
        rows = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
        (out / "prompts.jsonl").write_text(rows, encoding="utf-8")
        made["prompts.jsonl"] = f"{len(chats)} prompts"
    texts = _some_text(chats)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _policy_tokenizer(texts, sizes)
        policy = warm_policy(tokenizer, family, sizes, chats, random.Random(seed))
        made["policy"] = _save(out / "policy", policy, tokenizer)
        reward_tokenizer = _reward_tokenizer(texts)
        reward = averaging_reward(reward_tokenizer, tokenizer, chats, random.Random(seed))
        made["reward"] = _save(out / "reward", reward, reward_tokenizer)
    marker = {"corpus": corpus, "family": family, "seed": seed, "sizes": asdict(sizes)}
    (out / _MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    return made


def _default_chats() -> list[list[Message]]:
    """384 one-turn conversations: every task on every topic."""
    return [[{"role": "user", "content": task.format(topic)}] for topic, task in product(_TOPICS, _TASKS)]


def _read_chats(corpus: str) -> list[list[Message]]:
    from rlmt.data.prompts import load_prompts

    chats = [prompt.messages for prompt in load_prompts(corpus)]
    if not chats:
        raise UserError(f"--corpus {corpus}: holds no prompts to train tokenizers on")
    return chats


def _some_text(chats: Sequence[Sequence[Message]]) -> list[str]:
    """The first conversations' texts, enough for tokenizers of this size."""
    texts: list[str] = []
    chars = 0
    for text in (message["content"] for chat in chats for message in chat):
        texts.append(text[: _TOKENIZER_CHARS - chars])
        chars += len(texts[-1])
        if chars >= _TOKENIZER_CHARS:
            break
    return texts


def _make_room(out: Path, replace_prompts: bool) -> None:
    """Removes what an earlier run made, and nothing else."""
    ours = ["policy", "reward", *(["prompts.jsonl"] if replace_prompts else [])]
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder to write to")
    found = [name for name in ours if (out / name).exists()]
    if found and not (out / _MARKER).is_file():
        raise UserError(f"{out / found[0]}: was not made by `rlmt tiny`; name another folder or move it away")
    out.mkdir(parents=True, exist_ok=True)
    # The marker goes first, so that a run killed halfway can be repeated.
    (out / _MARKER).touch()
    for folder in ("policy", "reward"):
        shutil.rmtree(out / folder, ignore_errors=True)


def _wrap(
    tokenizer: Tokenizer, special: Sequence[str], bos: str, eos: str, pad: str, template: str, unk: str | None = None
) -> PreTrainedTokenizerBase:
    """Makes a transformers tokenizer that puts one `bos` before plain text, as Llama's does."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    named = {bos, eos, pad, unk}
    wrapped: PreTrainedTokenizerBase = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        extra_special_tokens=[token for token in special if token not in named],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = template
    return wrapped


def _policy_tokenizer(texts: Iterable[str], sizes: Sizes) -> PreTrainedTokenizerBase:
    """Byte-level BPE: all 256 bytes are in it, so any text comes back as it was (Qwen2's class composes accents)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=sizes.vocab - len(TAGS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(_POLICY_SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    bos, eos, pad = _POLICY_SPECIAL[:3]
    return _wrap(tokenizer, _POLICY_SPECIAL, bos, eos, pad, _POLICY_TEMPLATE)


def _reward_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """SentencePiece-like BPE over ASCII with `<unk>` for the rest: unlike the policy's in all that can be mixed up.

    Only BPE will do: the trainers of WordPiece and Unigram number their tokens differently each time.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        initial_alphabet=[chr(code) for code in range(0x20, 0x7F)],
        special_tokens=list(_REWARD_SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.encode("ascii", "ignore").decode() for text in texts), trainer)
    unk, bos, eos, pad = _REWARD_SPECIAL[:4]
    return _wrap(tokenizer, _REWARD_SPECIAL, bos, eos, pad, _REWARD_TEMPLATE, unk)


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"{type(model).__name__}, {model.num_parameters():,} parameters, {len(tokenizer)} tokens"
