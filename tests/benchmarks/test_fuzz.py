"""Random completions through the whole text path, with the checks of benchmarks/fuzz.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SOURCE = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
SPEC = importlib.util.spec_from_file_location("fuzz", SOURCE)
assert SPEC is not None and SPEC.loader is not None
fuzz: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz)

CODE_POINTS = st.characters(max_codepoint=fuzz.MARKS - 1, exclude_categories=("Cs",))
TEXTS = st.lists(st.sampled_from(fuzz.PIECES) | st.text(CODE_POINTS, max_size=6), max_size=12).map(fuzz.marked)
NEARLY_WELL_FORMED = st.tuples(TEXTS, TEXTS).map(lambda parts: f"<think>{parts[0]}</think><response>{parts[1]} fine")


@pytest.fixture(scope="module")
def paths(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("fuzz")
    return {format: fuzz.TextPath(tiny / "policy", format, folder) for format in fuzz.FORMATS}


@pytest.mark.parametrize("format", fuzz.FORMATS, ids=lambda f: f.name + ("-prefill" if f.prefill else ""))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_scores_exclude_thoughts_and_files_are_exact(format: Any, paths: dict[Any, Any], data: st.DataObject) -> None:
    """Four cases per example, 420 in total."""
    path = paths[format]
    tokens = st.integers(0, len(path.tokenizer) - 1)

    def ids(text: str, other: list[int], at: int) -> list[int]:
        encoded: list[int] = path.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*encoded[:at], *other, *encoded[at:]] or [0]

    case = st.builds(ids, TEXTS | NEARLY_WELL_FORMED, st.lists(tokens, max_size=3), st.integers(0, 60))
    path.check(data.draw(st.lists(case, min_size=4, max_size=4)))


def test_checks_detect_a_leaked_thought(paths: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A split that returns the whole completion as the response fails the checks."""
    format, path = next(iter(paths.items()))
    correct_split = format.split

    def leaking_split(self: Any, text: str) -> Any:
        split = correct_split(text)
        return type(split)(split.thought, text.replace("<think>", "").replace("</think>", ""), split.status)

    text = fuzz.marked(["<think>", "secret", "</think>", "fine"])
    ids = path.tokenizer(text, add_special_tokens=False)["input_ids"]
    path.check([ids, ids])
    monkeypatch.setattr(type(format), "split", leaking_split)
    with pytest.raises(AssertionError):
        path.check([ids, ids])
