"""Makes a tiny world to try everything on: a random policy, a random reward model and prompts, offline and in seconds.

`rlmt tiny` writes genuine Hugging Face folders, read by the same code as an 8B model. Two random networks would make a
dull world, for a random policy writes one close tag in a vocabulary's worth of tokens, and a random classifier gives
every text about the same score. So both get one hand-made part:

- The policy's head leans towards the format (`_lean_to_format`): after the assistant's opening `<think>` has
  probability 1/2, and at each later token `</think>` and the end of turn have 1/24 each. About one sample in eight is
  well formed, and `no_think` fares as well as `think`: reinforcement learning has something to find and to improve.
- The reward classifier averages a random number per token (`_make_averaging` says how), set to mean 0 and standard
  deviation 1 over random texts (`_calibrate`). Better tokens make better scores, smoothly, which GRPO learns in a few
  steps; it is no measure of good English.

Same seed, same files, bit for bit. Left out: anything pretrained; what such a policy writes is noise.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal, cast

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

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
_OPEN_PROBABILITY = 1 / 2
_CLOSE_PROBABILITY = 1 / 24
_TOKENIZER_CHARS = 2_000_000
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


@dataclass(frozen=True)
class Sizes:
    """How big the policy is; the defaults give about 6M parameters."""

    hidden: int = 256
    """Width, a multiple of `heads`."""
    layers: int = 6
    """Decoder layers."""
    heads: int = 4
    """Attention heads."""
    ffn: int = 704
    """Width inside the MLP."""
    vocab: int = 2048
    """Vocabulary size, special tokens and tags included; smaller where the corpus has no more pairs to merge."""
    context: int = 2048
    """Most tokens of prompt and completion together."""


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
        policy = _policy(tokenizer, family, sizes, chats)
        made["policy"] = _save(out / "policy", policy, tokenizer)
        reward_tokenizer = _reward_tokenizer(texts)
        reward = _reward(reward_tokenizer, tokenizer, chats, seed)
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
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        extra_special_tokens=[token for token in special if token not in named],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = template
    return cast(PreTrainedTokenizerBase, wrapped)


def _policy_tokenizer(texts: Iterable[str], sizes: Sizes) -> PreTrainedTokenizerBase:
    """Byte-level BPE: all 256 bytes are in it, so any text comes back as it was."""
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


def _policy(
    tokenizer: PreTrainedTokenizerBase, family: Literal["llama", "qwen2"], sizes: Sizes, chats: list[list[Message]]
) -> PreTrainedModel:
    """A random causal language model whose head leans to the format."""
    config_class = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        intermediate_size=sizes.ffn,
        max_position_embeddings=sizes.context,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    prompts = [
        tokenizer.apply_chat_template(_shortened(chat), add_generation_prompt=True, return_dict=False)
        for chat in chats[:8]
    ]
    _lean_to_format(model, tokenizer, prompts)
    return cast(PreTrainedModel, model)


@torch.no_grad()
def _lean_to_format(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> None:
    """Sets the head's rows of `<think>`, `</think>` and end of turn so that each has its probability (see the top).

    A Llama head has no bias. A direction that all hidden states share serves as one: it is put into every embedding,
    its image after the layers is measured, and the rows point along it. `<think>`'s row points along what the hidden
    states at the assistant's opening have besides. All other tokens stay equally likely, within a random factor.
    """
    embeddings = model.get_input_embeddings().weight
    shared = torch.randn(embeddings.shape[1])
    embeddings.normal_(std=1.0).add_(shared)
    opening, later = [], []
    for prompt in prompts:
        noise = torch.randint(len(tokenizer), (32,)).tolist()
        hidden = model.base_model(torch.tensor([prompt + noise])).last_hidden_state[0]
        opening.append(hidden[len(prompt) - 1])
        later.append(hidden[len(prompt) :])
    mean = torch.cat(later).mean(0)
    lean = torch.stack(opening).mean(0)
    lean -= mean * (lean @ mean) / (mean @ mean)

    def row(direction: Tensor, probability: float) -> Tensor:
        # A softmax over V tokens of logit 0 and one of l gives that one the probability p at l = log(V p / (1 - p)).
        logit = math.log(len(tokenizer) * probability / (1 - probability))
        return direction * logit / (direction @ direction)

    head = model.get_output_embeddings().weight
    for token in ("</think>", _POLICY_SPECIAL[1]):
        head[tokenizer.convert_tokens_to_ids(token)] = row(mean, _CLOSE_PROBABILITY)
    head[tokenizer.convert_tokens_to_ids("<think>")] = row(lean, _OPEN_PROBABILITY)


def _reward(
    tokenizer: PreTrainedTokenizerBase, policy_tokenizer: PreTrainedTokenizerBase, chats: list[list[Message]], seed: int
) -> PreTrainedModel:
    """A one-layer classifier with one label, made to average over tokens and calibrated."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=8192,
        num_labels=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForSequenceClassification(config).eval()
    _make_averaging(model)
    _calibrate(model, tokenizer, policy_tokenizer, chats, random.Random(seed))
    return cast(PreTrainedModel, model)


@torch.no_grad()
def _make_averaging(model: LlamaForSequenceClassification) -> None:
    """Makes the last hidden state an average of one random vector per token type.

    Query and key weights stay at their small start, so the last token attends to all tokens about equally; embeddings,
    values and outputs are large, so what it gathers counts as much as what it is. A text of n random tokens moves by
    1/sqrt(n) and a text of good ones by 1, until the final norm levels off: there is room to climb, not without end.
    """
    attention = model.model.layers[0].self_attn
    for weight in (attention.v_proj.weight, attention.o_proj.weight):
        weight.normal_(std=weight.shape[1] ** -0.5)
    model.model.embed_tokens.weight.normal_(std=1.0)
    model.score.weight.normal_()


@torch.no_grad()
def _calibrate(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    policy_tokenizer: PreTrainedTokenizerBase,
    chats: list[list[Message]],
    rng: random.Random,
) -> None:
    """Gives scores of random responses mean 0 and standard deviation 1.

    A Llama score head has no bias, so the mean is taken out of the head's direction: score = w · h, and a w at right
    angles to the mean of h over the texts has mean score 0. Its length is then set by the standard deviation.
    """
    hidden = []
    for chat in rng.sample(chats, min(32, len(chats))):
        for _ in range(4):
            noise = rng.choices(range(len(policy_tokenizer)), k=rng.randint(4, 48))
            response = policy_tokenizer.decode(noise, skip_special_tokens=True)
            ids = tokenizer.apply_chat_template(
                [*_shortened(chat), {"role": "assistant", "content": response}], return_dict=False
            )
            hidden.append(model.model(torch.tensor([ids])).last_hidden_state[0, -1])
    states = torch.stack(hidden)
    mean = states.mean(0)
    weight = model.score.weight[0]
    weight -= mean * (weight @ mean) / (mean @ mean)
    weight /= (states @ weight).std()


def _shortened(chat: Sequence[Message]) -> list[dict[str, str]]:
    """The conversation with at most 300 characters a turn, to keep measuring fast."""
    return [{"role": message["role"], "content": message["content"][:300]} for message in chat[-3:]]


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"{type(model).__name__}, {model.num_parameters():,} parameters, {len(tokenizer)} tokens"
