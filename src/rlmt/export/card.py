"""The model card of an export: README.md with metadata for the hub, usage code, training settings and results.

It states what checkpoint and run folder record, and only options that are named here: no path, URL or name of an
environment variable. Of a local folder or file it names the last part. The licence is left to the user.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from rlmt import __version__
from rlmt.checkpointing.config_changes import flatten
from rlmt.export.usage import Usage
from rlmt.formats.thinking import ThinkingFormat
from rlmt.report.run_states import METRICS_FILE, REPORTED, Row, read_rows

FILE_NAME = "README.md"
CURVES = "curves.png"
"""Picture of a run, in its folder and beside the card."""

_LICENCE = "# license: add one, such as apache-2.0; the licence of the base model may limit the choice\n"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIXES = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".txt", ".zst", ".gz")
_KINDS = {
    "RLMTModule": "Trained by reinforcement learning with a reward model",
    "SFT": "Fine-tuned on demonstrations",
    "RewardModeling": "A reward model: it scores a response to a conversation",
}
_FORMATS = {
    "think": "The model writes a thought between `<think>` and `</think>`, then the response. Show users the response.",
    "no_think": "The model writes the response alone, without a thought.",
    "zero_think": "The model reads a plain-text conversation. It writes a thought between `<think>` and `</think>`, "
    "then the response between `<response>` and `</response>`.",
    "zero_no_think": "The model reads a plain-text conversation, and writes the response between `<response>` and "
    "`</response>`.",
}
_SETTINGS = (
    ("learning rate", "model.optimizer.lr"),
    ("optimizer steps", "trainer.max_steps"),
    ("epochs", "trainer.max_epochs"),
    ("batch size", "data.batch_size"),
    ("samples a prompt", "data.group_size"),
    ("temperature", "data.temperature"),
    ("longest prompt in tokens", "data.max_prompt_tokens"),
    ("longest completion in tokens", "data.max_new_tokens"),
    ("longest row in tokens", "data.max_length"),
    ("KL coefficient", "model.algorithm.kl_coef"),
    ("beta", "model.algorithm.beta"),
    ("reward of malformed samples", "model.malformed_reward"),
    ("LoRA rank", "model.lora.rank"),
    ("precision", "trainer.precision"),
    ("seed", "seed_everything"),
)
"""Row of the table → option."""


@dataclass(frozen=True)
class Facts:
    """What a card states."""

    name: str
    """Name of the model: of its repository, or of its folder."""
    module: str
    """Kind of the module that trained it."""
    base: str
    """Folder or hub name of the model that the run started from."""
    config: Mapping[str, Any]
    """Configuration of the run as plain data; empty for runs from Python."""
    usage: Usage
    """Code that uses the model."""
    format: ThinkingFormat | None = None
    """Thinking format; None of a reward model."""
    adapter: bool = False
    """Whether the folder holds an adapter."""
    run: Path | None = None
    """Folder of the run, with metrics.csv and curves.png."""
    step: int | None = None
    """Last step of the checkpoint, as in metrics.csv; None is the last of all."""


def write_card(facts: Facts, out: Path) -> None:
    """Writes README.md, and copies the picture of the curves beside it.

    Args:
        facts: What the card states.
        out: The exported folder.
    """
    picture = facts.run is not None and (facts.run / CURVES).is_file()
    if facts.run is not None and picture:
        shutil.copyfile(facts.run / CURVES, out / CURVES)
    (out / FILE_NAME).write_text(render_card(facts, picture), encoding="utf-8")


def render_card(facts: Facts, picture: bool) -> str:
    """The card as Markdown with YAML metadata.

    Args:
        facts: What it states.
        picture: Whether the picture of the curves is beside it.
    """
    metadata = yaml.safe_dump(_metadata(facts), sort_keys=False, allow_unicode=True) + _LICENCE
    parts = [
        f"---\n{metadata}---",
        f"# {facts.name}",
        f"{_KINDS.get(facts.module, 'Trained')}, from {shown(facts.base)}, with rlmt {__version__}."
        + (" This folder holds a LoRA adapter." if facts.adapter else ""),
        *_usage(facts),
        "## Training",
        _table(("", ""), list(_training(facts))),
    ]
    if results := _results(facts):
        parts += ["## Results", _table(("", "first", "last"), results)]
    if picture:
        parts.append(f"![Curves of the run]({CURVES})")
    return "\n\n".join(parts) + "\n"


def hub_name(source: str) -> str | None:
    """The name on the hub of a model or data set; None of a local folder or file."""
    local = Path(source).expanduser().exists() or source.endswith(_FILE_SUFFIXES)
    return source if _HUB_NAME.fullmatch(source) and not local else None


def shown(source: str) -> str:
    """A model or data set as a card names it: a hub name, or the last part of a path or URL, without a query."""
    source = urlsplit(source).path if "://" in source else source
    return f"`{hub_name(source)}`" if hub_name(source) else f"`{Path(source).name}` (local)"


def _metadata(facts: Facts) -> dict[str, Any]:
    """The metadata that the hub reads."""
    options = dict(flatten(facts.config))
    data = options.get("data.prompts") or options.get("data.path")
    objective = _class_name(options.get("model.algorithm"))
    metadata: dict[str, Any] = {"library_name": "peft" if facts.adapter else "transformers"}
    metadata["pipeline_tag"] = "text-classification" if facts.format is None else "text-generation"
    if name := hub_name(facts.base):
        metadata |= {"base_model": name, "base_model_relation": "adapter" if facts.adapter else "finetune"}
    if isinstance(data, str) and (name := hub_name(data)):
        metadata["datasets"] = [name]
    tags = ["rlmt", *([objective.lower()] if objective else [])]
    tags += ["reward-model"] if facts.format is None else [facts.format.name]
    return metadata | {"tags": tags}


def _usage(facts: Facts) -> Iterator[str]:
    """The thinking format and the code."""
    yield "## Use"
    if facts.format is not None:
        yield _FORMATS[facts.format.name]
    yield "The prompt, as in training:"
    yield f"```python\n{facts.usage.prompt}\n```"
    yield "Then with transformers:"
    yield f"```python\n{facts.usage.transformers}\n```"
    if facts.usage.vllm is not None:
        yield "Or with vLLM:"
        yield f"```python\n{facts.usage.vllm}\n```"


def _training(facts: Facts) -> Iterator[tuple[str, str]]:
    """Rows of the table of settings."""
    options = dict(flatten(facts.config))
    yield "base model", shown(facts.base)
    for title, key in (("data", "data.prompts"), ("data", "data.path"), ("held-out data", "data.val_prompts")):
        if isinstance(value := options.get(key), str):
            yield title, shown(value)
    model = facts.config.get("model", {}).get("init_args", {})
    if reward := model.get("reward"):
        yield "reward", describe_reward(reward)
    if held_out := model.get("held_out_rewards"):
        yield "held-out rewards", ", ".join(map(describe_reward, held_out))
    if objective := _class_name(options.get("model.algorithm")):
        yield "objective", objective
    if facts.format is not None:
        yield "thinking format", f"`{facts.format.name}`"
    for title, key in _SETTINGS:
        if (value := options.get(key)) is not None and value != -1:
            yield title, str(value)
    if model.get("quantization"):
        yield "base weights", "4 bits (NF4)"
    if facts.step is not None:
        yield "rollout step" if "data.group_size" in options else "step", str(facts.step + 1)


def describe_reward(spec: Mapping[str, Any]) -> str:
    """A reward of a configuration: its class, and its model, function or parts.

    Args:
        spec: Its `class_path` and `init_args`.
    """
    options = spec.get("init_args") or {}
    name = _class_name(spec.get("class_path")) or "reward"
    if parts := options.get("rewards"):
        weights = options.get("weights") or [1.0] * len(parts)
        summed = " + ".join(
            f"{weight:g} × {describe_reward(part)}" for weight, part in zip(weights, parts, strict=True)
        )
        return f"{name} ({summed})"
    endpoints = options.get("endpoints") or [options.get("endpoint") or {}]
    model = options.get("model") or (endpoints[0].get("init_args") or endpoints[0]).get("model")
    detail = shown(model) if model else f"`{options['function']}`" if options.get("function") else ""
    return f"{name} {detail}".strip()


def _results(facts: Facts) -> list[tuple[str, str, str]]:
    """First and last value of each reported metric up to the checkpoint."""
    path = None if facts.run is None else facts.run / METRICS_FILE
    if path is None or not path.is_file():
        return []
    rows = [row for row in read_rows(path) if facts.step is None or row.get("step", 0) <= facts.step]
    held_out = {name for row in rows for name in row if name.startswith("val/")}
    known = [name for names in REPORTED.values() for name in names]
    names = dict.fromkeys([*known, *sorted(held_out), "reward/malformed", "policy/kl"])
    return [(f"`{name}`", *points) for name in names if (points := _first_and_last(rows, name)) is not None]


def _first_and_last(rows: Sequence[Row], name: str) -> tuple[str, str] | None:
    """First and last value of a metric with their steps, counted from 1."""
    found = [row for row in rows if name in row]
    if not found:
        return None
    first, last = (f"{row[name]:.4g} (step {row.get('step', 0) + 1:.0f})" for row in (found[0], found[-1]))
    return first, last


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _class_name(class_path: Any) -> str | None:
    return class_path.rpartition(".")[2] if isinstance(class_path, str) else None
