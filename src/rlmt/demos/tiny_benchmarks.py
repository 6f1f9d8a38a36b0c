"""Small files of benchmarks, in the form of the real ones, so that `rlmt evaluate` runs on tiny models offline."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_TOPICS = ("the sea", "bread", "a walk in the rain", "bees")
_REFERENCE = "It is good and I like it."
_CRITERIA = ("Clear", "Coherent", "Dull", "Overwrought")


def write_benchmarks(out: Path) -> list[str]:
    """Writes four items of each benchmark of the paper's table; those of IFBench need no data of NLTK.

    Args:
        out: Folder to write to.

    Returns:
        Names of the benchmarks; each is a file or folder of that name, for `rlmt evaluate --data.NAME`.
    """
    prompts = [f"Write about {topic}." for topic in _TOPICS]
    user = [[{"role": "user", "content": prompt}] for prompt in prompts]
    wildbench = [
        {"conversation_input": turns, "checklist": ["It keeps to the topic."], "references": {"gpt-4": _REFERENCE}}
        for turns in user
    ]
    popqa = [
        {"id": number, "question": f"What is {topic}?", "possible_answers": json.dumps([topic.split()[-1]])}
        for number, topic in enumerate(_TOPICS)
    ]
    redux: list[dict[str, Any]] = [
        {
            "question": f"Which is {topic}?",
            "choices": list(_TOPICS),
            "answer": n,
            "error_type": "ok",
            "correct_answer": None,
        }
        for n, topic in enumerate(_TOPICS)
    ]
    followed = [["format:no_whitespace"], ["count:numbers"], ["words:vowel"], ["format:no_whitespace", "words:vowel"]]
    ifbench = [
        {"key": str(n), "prompt": prompt, "instruction_id_list": names, "kwargs": [{} for _ in names]}
        for n, (prompt, names) in enumerate(zip(prompts, followed, strict=True))
    ]
    hard = [{"uid": str(n), "category": "hard_prompt", "prompt": prompt} for n, prompt in enumerate(prompts)]
    answers = [
        {"uid": str(n), "messages": [*turns, {"role": "assistant", "content": {"answer": _REFERENCE}}]}
        for n, turns in enumerate(user)
    ]
    _write_lines(out / "wildbench.jsonl", wildbench)
    _write_lines(out / "popqa.jsonl", popqa)
    _write_lines(out / "ifbench.jsonl", ifbench)
    _write_lines(out / "mmlu_redux.jsonl", redux)
    _write_lines(out / "arena_hard/question.jsonl", hard)
    _write_lines(out / "arena_hard/model_answer/o3-mini-2025-01-31.jsonl", answers)
    baseline = [{"instruction": prompt, "output": _REFERENCE} for prompt in prompts]
    _write(out / "alpaca_eval/alpaca_eval_gpt4_baseline.json", json.dumps(baseline))
    difficulty = ["index,difficulty", *(f"{n},{(n + 1) / 10}" for n in range(len(prompts)))]
    _write(out / "alpaca_eval/instruction_difficulty.csv", "\n".join(difficulty) + "\n")
    story = {"writing_prompt": "Write a story about <SEED>.", "seed_modifiers": list(_TOPICS)}
    _write(out / "creative_writing/creative_writing_prompts_v3.json", json.dumps({"1": story}))
    _write(out / "creative_writing/creative_writing_criteria.txt", "\n".join(_CRITERIA) + "\n")
    _write(out / "creative_writing/negative_criteria.txt", "\n".join(_CRITERIA[2:]) + "\n")
    return ["wildbench", "alpaca_eval", "arena_hard", "creative_writing", "popqa", "ifbench", "mmlu_redux"]


def _write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Writes JSON lines."""
    _write(path, "".join(json.dumps(row) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    """Writes a file and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
