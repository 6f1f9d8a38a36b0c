"""The `rlmt mini` command: writes the miniature world to files that the shipped configs train on.

The files have the formats of any other run: a folder with a model config and a tokenizer, demonstrations for SFT,
preferences for reward models, and prompts for RL. The same seed writes the same files, byte for byte. Prices and tags
of the items are the same for every seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlmt.demos.mini.rubric import aspects, quality
from rlmt.demos.mini.teacher import MAX_PATIENCE, demonstrate, varied_answer
from rlmt.demos.mini.world import KINDS, NAMES, Request, price_list, sample_request
from rlmt.errors import UserError
from rlmt.options import check_writable

_MARKER = "mini.json"
"""File that marks a folder as written by `rlmt mini`."""
_DEMONSTRATIONS_PER_LIST = 16
"""Demonstrations per price list: a batch of 34 rows has two lists."""
_DEMONSTRATIONS_PER_PATIENT_ONE = 20
"""Demonstrations per patient one, where patience is rare."""
_DEEP = (MAX_PATIENCE - 1, MAX_PATIENCE)
"""Patience of deep demonstrations."""
_RESPONSES = 4
"""Responses per prompt in the preferences."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of rows to write."""

    demonstrations: int = 22_400
    """Demonstrations in each file, not counting price lists."""
    comparisons: int = 11_200
    """Prompts with four rated responses each."""
    prompts: int = 4_096
    """Prompts for RL training."""
    held_out: int = 384
    """Prompts with wish combinations that no training file contains."""


def make_mini(out: Path = Path("runs/mini"), seed: int = 0) -> None:
    """Writes a miniature world: a model config, a tokenizer, demonstrations, preferences and prompts, all generated.

    Args:
        out: Output folder. The files of an earlier `rlmt mini` in it are replaced.
        seed: The same seed writes the same files.

    Raises:
        UserError: See `write_mini`.
    """
    for name, description in write_mini(out, seed).items():
        print(f"{out / name}: {description}")


def write_mini(out: Path, seed: int, sizes: Sizes | None = None) -> dict[str, str]:
    """Writes the files that docs/mini.md lists.

    Args:
        out: Output folder.
        seed: Seed of all samples.
        sizes: Numbers of rows; None uses the defaults.

    Returns:
        Name of each written file or folder → a description of its size.

    Raises:
        UserError: The path is a file, or the folder holds files of the same names that `rlmt mini` did not write.
    """
    sizes = sizes or Sizes()
    _prepare_folder(out)
    written = {"base": _write_base(out / "base")}
    rows: dict[str, Iterable[dict[str, Any]]] = {
        "demonstrations": _demonstrations(seed, "any", sizes.demonstrations, (0, MAX_PATIENCE)),
        "demonstrations_shallow": _demonstrations(seed, "shallow", sizes.demonstrations, (0, 1)),
        "demonstrations_deep": _demonstrations(seed, "deep", sizes.demonstrations, _DEEP),
        "demonstrations_form": _demonstrations(seed, "form", sizes.demonstrations, (0, 0)),
        "demonstrations_rare": _demonstrations(seed, "rare", sizes.demonstrations, (0, 0), rare=True),
        "demonstrations_held_out": _demonstrations(seed, "held out", sizes.held_out, (0, MAX_PATIENCE), held_out=True),
        "preferences": _preferences(seed, "", sizes.comparisons),
        "preferences_other": _preferences(seed, "other", sizes.comparisons),
        "preferences_weak": _preferences(seed, "weak", sizes.comparisons // 16, rated=False),
        "preferences_held_out": _preferences(seed, "held out", sizes.held_out, held_out=True),
        "prompts": _prompts(seed, "prompts", sizes.prompts),
        "prompts_narrow": _prompts(seed, "narrow", sizes.prompts, narrow=True),
        "held_out": _prompts(seed, "evaluation", sizes.held_out, held_out=True),
    }
    for name, lines in rows.items():
        written[f"{name}.jsonl"] = f"{_write_jsonl(out / f'{name}.jsonl', lines):,} rows"
    (out / _MARKER).write_text(json.dumps({"seed": seed, **asdict(sizes)}, indent=2) + "\n", encoding="utf-8")
    return written


def _prepare_folder(out: Path) -> None:
    """Creates the folder, unless it holds files that `rlmt mini` did not write."""
    check_writable(out, "rlmt mini")
    found = [path for name in ("base", "*.jsonl") for path in out.glob(name)]
    if found and not (out / _MARKER).is_file():
        raise UserError(f"{found[0]}: `rlmt mini` did not write this; pass another folder or move it away.")
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()  # first, so that the command can be repeated after it was killed


def _write_base(folder: Path) -> str:
    """Writes the config of a model of half a million parameters and its tokenizer; SFT initializes the weights."""
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
    return f"config.json and a tokenizer of {len(tokenizer)} tokens"


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes rows as JSON lines and returns their number."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def _demonstrations(
    seed: int, stream: str, count: int, patience: tuple[int, int], held_out: bool = False, rare: bool = False
) -> Iterator[dict[str, Any]]:
    """Yields demonstrations and price lists; price lists are plain documents, because no prompt asks for prices.

    With `rare`, one demonstration of 20 is by a patient teacher.
    """
    rng = random.Random(f"{seed} demonstrations {stream}")
    for number in range(count):
        request = sample_request(rng, held_out)
        patient = rare and number % _DEMONSTRATIONS_PER_PATIENT_ONE == 0
        thought, response = demonstrate(rng, request, rng.randint(*(_DEEP if patient else patience)))
        yield {"prompt": request.text, "thought": thought, "response": response}
        if number % _DEMONSTRATIONS_PER_LIST == 0 and not held_out:
            yield {"text": " ".join(price_list(rng))}


def _preferences(
    seed: int, stream: str, count: int, rated: bool = True, held_out: bool = False
) -> Iterator[dict[str, Any]]:
    """Yields rated responses of any quality; every second held-out row has careful ones only, which are closer."""
    rng = random.Random(f"{seed} preferences {stream}")
    for number in range(count):
        request = sample_request(rng, held_out)
        careful = held_out and number % 2 == 1
        responses = [
            demonstrate(rng, request)[1] if careful else varied_answer(rng, request) for _ in range(_RESPONSES)
        ]
        row: dict[str, Any] = {"prompt": request.text, "responses": responses}
        row["scores"] = [round(quality(request, response), 3) for response in responses]
        if rated:
            row["attributes"] = [[round(rating, 4) for rating in aspects(request, response)] for response in responses]
        if held_out:
            row["subset"] = "careful" if careful else "any"
        yield row


def _prompts(
    seed: int, stream: str, count: int, held_out: bool = False, narrow: bool = False
) -> Iterator[dict[str, Any]]:
    """Yields requests; narrow ones share kind, name and tone."""
    rng = random.Random(f"{seed} {stream}")
    while count:
        request = sample_request(rng, held_out)
        if not narrow or _is_narrow(request):
            count -= 1
            yield {"prompt": request.text}


def _is_narrow(request: Request) -> bool:
    """Whether a request has the first kind, the first name and a friendly tone."""
    return request.kind == next(iter(KINDS)) and request.name == NAMES[0] and request.tone == "friendly"
