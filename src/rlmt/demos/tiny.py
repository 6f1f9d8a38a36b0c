"""The `rlmt tiny` command: writes a small policy, a small reward model and prompts, offline and in seconds.

The folders have the Hugging Face format and are loaded by the same code as an 8B model. Randomly initialized weights
alone give runs without a learning signal: a random policy writes a close tag once in about as many tokens as its
vocabulary has, and a random classifier gives all texts about the same score. So both models are modified
(`tiny_models`):

- The policy is trained on the format for a few seconds: random words, in some chats with a thought before them. It can
  then write a thought and stop, and it thinks in half of its samples. `think` and `no_think` therefore start with equal
  chances, and reinforcement learning has something to improve.
- The score of the reward classifier is an average of one random number per token, with mean 0 and standard deviation 1
  over random texts. The score is a smooth function of the tokens, which GRPO learns in a few steps. It does not measure
  good English.

The same seed writes the same files, bit for bit. Nothing is downloaded, and the policy writes random words.
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
from transformers.utils import logging

from rlmt.demos.tiny_benchmarks import write_benchmarks
from rlmt.demos.tiny_models import Sizes, averaging_reward_model, warm_started_policy
from rlmt.errors import UserError
from rlmt.options import check_writable
from rlmt.progress import busy
from rlmt.types import Message

TAGS = ("<think>", "</think>", "<response>", "</response>")
"""Tags that are single tokens of the policy's vocabulary. They are not special tokens, so decoding keeps them."""

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
_MAX_TOKENIZER_CHARS = 1_000_000
"""Number of characters of the corpus that the tokenizers are trained on."""
_MARKER = "tiny.json"
"""File that marks a folder as written by `rlmt tiny`."""

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
    benchmarks: bool = False,
) -> None:
    """Writes a small random policy, a small reward model and prompts, to try every command without a download.

    Args:
        out: Output folder. The files of an earlier `rlmt tiny` in it are replaced.
        corpus: Prompt file or data set to train the tokenizers on; without it prompts.jsonl is written and used.
        family: Architecture of the policy.
        seed: The same seed writes the same files.
        benchmarks: Also write OUT/benchmarks, with a few items of each benchmark for `rlmt evaluate`.

    Raises:
        UserError: See `write_tiny`.
    """
    with busy("training a small policy on the format …"):
        written = write_tiny(out, corpus, family, seed)
    if benchmarks:
        written["benchmarks"] = ", ".join(write_benchmarks(out / "benchmarks"))
    for name, description in written.items():
        print(f"{out / name}: {description}")


def write_tiny(
    out: Path,
    corpus: str | None = None,
    family: Literal["llama", "qwen2"] = "llama",
    seed: int = 0,
    sizes: Sizes | None = None,
) -> dict[str, str]:
    """Writes OUT/policy, OUT/reward, OUT/tiny.json and, without a corpus, OUT/prompts.jsonl.

    Args:
        out: Output folder.
        corpus: Prompt file or data set for `rlmt.data.prompts.load_prompts`; None writes and uses built-in prompts.
        family: Architecture of the policy.
        seed: Seed of all weights.
        sizes: Size of the policy; None uses the defaults.

    Returns:
        Name of each written file or folder → a description of its size.

    Raises:
        UserError: The folder holds a policy, reward model or prompts that `rlmt tiny` did not write, or the corpus
            cannot be read.
    """
    sizes = sizes or Sizes()
    chats = _built_in_chats() if corpus is None else _load_chats(corpus)
    _prepare_folder(out, replace_prompts=corpus is None)
    written: dict[str, str] = {}
    if corpus is None:
        rows = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
        (out / "prompts.jsonl").write_text(rows, encoding="utf-8")
        written["prompts.jsonl"] = f"{len(chats)} prompts"
    texts = _tokenizer_texts(chats)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _policy_tokenizer(texts, sizes)
        policy = warm_started_policy(tokenizer, family, sizes, chats, random.Random(seed))
        written["policy"] = _save(out / "policy", policy, tokenizer)
        reward_tokenizer = _reward_tokenizer(texts)
        reward = averaging_reward_model(reward_tokenizer, tokenizer, chats, random.Random(seed))
        written["reward"] = _save(out / "reward", reward, reward_tokenizer)
    marker = {"corpus": corpus, "family": family, "seed": seed, "sizes": asdict(sizes)}
    (out / _MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    return written


def _built_in_chats() -> list[list[Message]]:
    """384 single-turn conversations: every task on every topic."""
    return [[{"role": "user", "content": task.format(topic)}] for topic, task in product(_TOPICS, _TASKS)]


def _load_chats(corpus: str) -> list[list[Message]]:
    """Conversations of a prompt file or data set."""
    from rlmt.data.prompts import load_prompts

    chats = [prompt.messages for prompt in load_prompts(corpus)]
    if not chats:
        raise UserError(f"--corpus {corpus}: no prompts were found; pass a file or data set with prompts.")
    return chats


def _tokenizer_texts(chats: Sequence[Sequence[Message]]) -> list[str]:
    """Texts of the first conversations, up to `_MAX_TOKENIZER_CHARS` characters."""
    texts: list[str] = []
    chars = 0
    for text in (message["content"] for chat in chats for message in chat):
        texts.append(text[: _MAX_TOKENIZER_CHARS - chars])
        chars += len(texts[-1])
        if chars >= _MAX_TOKENIZER_CHARS:
            break
    return texts


def _prepare_folder(out: Path, replace_prompts: bool) -> None:
    """Creates the folder and deletes only what an earlier call wrote to it."""
    own = ["policy", "reward", *(["prompts.jsonl"] if replace_prompts else [])]
    check_writable(out, "rlmt tiny")
    found = [name for name in own if (out / name).exists()]
    if found and not (out / _MARKER).is_file():
        raise UserError(f"{out / found[0]}: `rlmt tiny` did not write this; pass another folder or move it away.")
    out.mkdir(parents=True, exist_ok=True)
    # The marker is written first, so that the command can be repeated after it was killed.
    (out / _MARKER).touch()
    for folder in ("policy", "reward"):
        shutil.rmtree(out / folder, ignore_errors=True)


def _wrap(
    tokenizer: Tokenizer, special: Sequence[str], bos: str, eos: str, pad: str, template: str, unk: str | None = None
) -> PreTrainedTokenizerBase:
    """Wraps a tokenizer for transformers; like Llama's, it adds one `bos` before plain text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    roles = {bos, eos, pad, unk}
    wrapped: PreTrainedTokenizerBase = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        extra_special_tokens=[token for token in special if token not in roles],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = template
    return wrapped


def _policy_tokenizer(texts: Iterable[str], sizes: Sizes) -> PreTrainedTokenizerBase:
    """Byte-level BPE with all 256 bytes, so every text round-trips (except that Qwen2's class normalizes to NFC)."""
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
    """SentencePiece-like BPE over ASCII, with `<unk>` for other characters.

    It differs from the policy's tokenizer in every property, so that using the wrong one is noticed. BPE is required:
    the trainers of WordPiece and Unigram number their tokens differently each time.
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
    """Saves a model and its tokenizer, and returns a description of their size."""
    bars = logging.is_progress_bar_enabled()  # a file of some MB is no shard whose progress is worth a line
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    return f"{type(model).__name__}, {model.num_parameters():,} parameters, {len(tokenizer)} tokens"
