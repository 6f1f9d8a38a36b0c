"""Writes the miniature world to ordinary files, which the ordinary configs train on.

Nothing downstream knows that the world is small: a folder with a model's shape and its tokenizer, demonstrations for
SFT, preferences for reward models, prompts for RL. Same seed, same files, byte for byte. What the world's items cost
and are like is the same at every seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlmt.demos.mini.rubric import aspects, quality
from rlmt.demos.mini.teacher import MOST_PATIENT, any_answer, demonstrate
from rlmt.demos.mini.world import KINDS, NAMES, Request, draw_request, price_list
from rlmt.errors import UserError

_MARKER = "mini.json"
_DEMOS_PER_LIST = 16
"""Demonstrations to a price list: two lists in a batch of 34 rows."""
_RESPONSES = 4
"""Responses to a prompt in the preferences."""


@dataclass(frozen=True)
class Sizes:
    """How much is written."""

    demonstrations: int = 22_400
    """Demonstrations of each patience mixture; price lists come on top."""
    comparisons: int = 11_200
    """Prompts with four rated responses."""
    prompts: int = 4_096
    """Prompts to train on with RL."""
    held_out: int = 384
    """Prompts of wish combinations that training never holds."""


def make_mini(out: Path = Path("runs/mini"), seed: int = 0) -> None:
    """Writes a miniature world: a model's shape, demonstrations, preferences and prompts, all made up.

    Args:
        out: Folder to write; one that an earlier `rlmt mini` made is made anew.
        seed: Same seed, same files.

    Raises:
        UserError: As `write_mini`.
    """
    for name, what in write_mini(out, seed).items():
        print(f"{out / name}: {what}")


def write_mini(out: Path, seed: int, sizes: Sizes | None = None) -> dict[str, str]:
    """Writes the files; docs/mini.md lists them.

    Args:
        out: Folder to write.
        seed: Seed of everything drawn.
        sizes: How much.

    Returns:
        What was written → a word on it.

    Raises:
        UserError: `out` is a file, or holds files that this function would write and did not make.
    """
    sizes = sizes or Sizes()
    _make_room(out)
    made = {"base": _write_base(out / "base")}
    rows: dict[str, Iterable[dict[str, Any]]] = {
        "demonstrations": _demonstrations(seed, "any", sizes.demonstrations, (0, MOST_PATIENT)),
        "demonstrations_shallow": _demonstrations(seed, "shallow", sizes.demonstrations, (0, 1)),
        "demonstrations_deep": _demonstrations(seed, "deep", sizes.demonstrations, (MOST_PATIENT - 1, MOST_PATIENT)),
        "demonstrations_form": _demonstrations(seed, "form", sizes.demonstrations, (0, 0)),
        "demonstrations_held_out": _demonstrations(seed, "held out", sizes.held_out, (0, MOST_PATIENT), held_out=True),
        "preferences": _preferences(seed, "", sizes.comparisons),
        "preferences_other": _preferences(seed, "other", sizes.comparisons),
        "preferences_weak": _preferences(seed, "weak", sizes.comparisons // 16, rated=False),
        "preferences_held_out": _preferences(seed, "held out", sizes.held_out, held_out=True),
        "prompts": _prompts(seed, "prompts", sizes.prompts),
        "prompts_narrow": _prompts(seed, "narrow", sizes.prompts, narrow=True),
        "held_out": _prompts(seed, "evaluation", sizes.held_out, held_out=True),
    }
    for name, lines in rows.items():
        made[f"{name}.jsonl"] = f"{_write(out / f'{name}.jsonl', lines):,} rows"
    (out / _MARKER).write_text(json.dumps({"seed": seed, **asdict(sizes)}, indent=2) + "\n", encoding="utf-8")
    return made


def _make_room(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder to write to")
    found = [path for name in ("base", "*.jsonl") for path in out.glob(name)]
    if found and not (out / _MARKER).is_file():
        raise UserError(f"{found[0]}: was not made by `rlmt mini`; name another folder or move it away")
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()  # first, so that a run killed halfway can be repeated


def _write_base(folder: Path) -> str:
    """A model's shape, half a million parameters of it, and its tokenizer; weights are drawn by who trains it."""
    from transformers import LlamaConfig

    from rlmt.demos.mini.tokenizer import make_tokenizer

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=256,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"config.json and tokenizer of {len(tokenizer)} words"


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def _demonstrations(
    seed: int, stream: str, count: int, patience: tuple[int, int], held_out: bool = False
) -> Iterator[dict[str, Any]]:
    """Demonstrations and, as documents without turns, price lists: what things cost is asked in no prompt."""
    rng = random.Random(f"{seed} demonstrations {stream}")
    for number in range(count):
        request = draw_request(rng, held_out)
        thought, said = demonstrate(rng, request, rng.randint(*patience))
        yield {"prompt": request.text, "thought": thought, "response": said}
        if number % _DEMOS_PER_LIST == 0 and not held_out:
            yield {"text": " ".join(price_list(rng))}


def _preferences(
    seed: int, stream: str, count: int, rated: bool = True, held_out: bool = False
) -> Iterator[dict[str, Any]]:
    """Rated responses of any quality; of held-out rows every other has careful ones only, harder to tell apart."""
    rng = random.Random(f"{seed} preferences {stream}")
    for number in range(count):
        request = draw_request(rng, held_out)
        careful = held_out and number % 2 == 1
        said = [demonstrate(rng, request)[1] if careful else any_answer(rng, request) for _ in range(_RESPONSES)]
        row: dict[str, Any] = {"prompt": request.text, "responses": said}
        row["scores"] = [round(quality(request, response), 3) for response in said]
        if rated:
            row["attributes"] = [[round(rating, 4) for rating in aspects(request, response)] for response in said]
        if held_out:
            row["subset"] = "careful" if careful else "any"
        yield row


def _prompts(
    seed: int, stream: str, count: int, held_out: bool = False, narrow: bool = False
) -> Iterator[dict[str, Any]]:
    """Requests; narrow ones are all of one kind, for one person in one tone."""
    rng = random.Random(f"{seed} {stream}")
    while count:
        request = draw_request(rng, held_out)
        if not narrow or _is_narrow(request):
            count -= 1
            yield {"prompt": request.text}


def _is_narrow(request: Request) -> bool:
    return request.kind == next(iter(KINDS)) and request.name == NAMES[0] and request.tone == "friendly"
