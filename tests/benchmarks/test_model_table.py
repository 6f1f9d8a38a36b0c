"""The table of model families: measured figures are within rounding, and the page shows the measured data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
RESULTS: dict[str, Any] = json.loads((REFERENCE / "models.json").read_text())

LIMITS = {"Plan": 0.02, "vLLM, CPU": 1e-3}
"""Largest figure of a column; 1e-4 by default, which is rounding in float32. vLLM rounds capped attention more."""
FAST = {
    "Llama": ["RL, own prompts", "RL, packed rows", "SFT"],
    "Gemma 2": ["RL, own prompts", "RL, shared prompts", "RL, packed rows"],  # a soft cap
    "Phi": ["RL, shared prompts"],  # a bias
    "Granite": ["SFT"],  # a scale
    "Qwen3-MoE": ["RL, shared prompts", "Plan"],
    "Qwen3.5": ["RL, own prompts", "RL, shared prompts", "TransformersEngine"],  # linear attention
    "GPT-2": ["RL, own prompts", "RL, packed rows", "LoRA"],  # dropout, no linear layers
    "BERT": ["SFT"],
    "Inkling": ["Plan"],
}


@pytest.fixture(scope="module")
def table() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import model_table

        yield model_table


def check(measured: dict[str, Any], recorded: dict[str, Any], column: str) -> None:
    """A refusal has the recorded reason; a figure is within the limit."""
    assert measured.keys() == recorded.keys(), (measured, recorded)
    if "right" in measured:
        assert measured["right"] < LIMITS.get(column, 1e-4)
    elif "differs" not in measured:
        assert measured == recorded
        assert all("\n" not in reason for reason in measured.values())


@pytest.mark.parametrize("family", FAST)
def test_figures_of_some_families_are_within_rounding(family: str, table: Any) -> None:
    for column, cell in table.measure(family, FAST[family]).items():
        check(cell, RESULTS[family][column], column)


@pytest.mark.slow
@pytest.mark.parametrize("family", RESULTS)
def test_figures_of_all_families_are_those_of_the_table(family: str, table: Any) -> None:
    for column, cell in table.measure(family).items():
        check(cell, RESULTS[family][column], column)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.parametrize("family", ["Gemma 2", "Granite", "Mixtral", "Qwen3.5"])
def test_vllm_figures_of_some_families_are_within_rounding(family: str, table: Any) -> None:
    check(table.measure_vllm(family, table.byte_tokenizer()), RESULTS[family][table.VLLM], table.VLLM)


def test_page_shows_the_measured_data(table: Any) -> None:
    assert list(RESULTS) == list(table.FAMILIES) and len(RESULTS) >= 24
    assert (REFERENCE / "models.md").read_text() == table.page(RESULTS)
    for family, cells in RESULTS.items():
        assert list(cells) == [*table.COLUMNS, table.VLLM]
        for column, cell in cells.items():
            assert cell.get("right", 0) < LIMITS.get(column, 1e-4), (family, column)
