"""Small data in the shapes of the benchmarks' real files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DATA: dict[str, dict[str, Any]] = {
    "wildbench": {
        "wildbench.json": [
            {
                "conversation_input": [
                    {"role": "user", "content": "Hi {query}", "language": "English"},
                    {"role": "assistant", "content": "Hello!", "language": "English"},
                    {"role": "user", "content": "Name a river.\u2028Please.", "language": "English"},
                ],
                "checklist": ["Is it a river?", "Is it short?"],
                "references": {"gpt-4": "The Nile {response_b}"},
            }
        ]
    },
    "alpaca_eval": {
        "alpaca_eval_gpt4_baseline.json": [
            {"dataset": "helpful_base", "instruction": f"Question {n}?", "output": "word " * n, "generator": "gpt4"}
            for n in range(1, 9)
        ],
        "instruction_difficulty.csv": ",0\n" + "".join(f"{n},{n / 10 - 0.4}\n" for n in range(8)),
    },
    "arena_hard": {
        "question.jsonl": [
            {"uid": "u1", "category": "hard_prompt", "subcategory": "coding", "prompt": "Sort {answer_a}.\u2028Now."},
            {"uid": "u2", "category": "hard_prompt", "subcategory": "math", "prompt": "1+1?"},
            {"uid": "u3", "category": "creative_writing", "subcategory": "creative_writing", "prompt": "A poem."},
        ],
        "model_answer/o3-mini-2025-01-31.jsonl": [
            {"uid": uid, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]}
            for uid, content in (("u1", {"answer": "sorted(x)"}), ("u2", {"answer": "**2**"}))
        ],
    },
    "creative_writing": {
        "creative_writing_prompts_v3.json": {
            "1": {"writing_prompt": "A fight. <SEED> Past tense.", "seed_modifiers": ["At night.", "At sea."]},
            "7": {"writing_prompt": "A letter. <SEED>", "seed_modifiers": ["To a son.", "To a foe.", "To no one."]},
        },
        "creative_writing_criteria.txt": "Coherent\nElegant Prose\nNuanced Characters\nWeak Dialogue",
        "negative_criteria.txt": "Weak Dialogue\n",
    },
    "popqa": {
        "popqa.json": [
            {"id": 42, "question": "What is Ann's job?", "possible_answers": '["politician", "pol", "Polit."]'},
            {"id": 43, "question": "Capital of Peru?", "possible_answers": '["Lima", "City of Kings"]'},
        ]
    },
    "mmlu_redux": {
        "mmlu_redux.json": [
            {
                "question": f"Q{n}",
                "choices": ["w", "x", "y", "z"],
                "answer": 1,
                "error_type": error,
                "correct_answer": key,
            }
            for n, (error, key) in enumerate(
                [("ok", None), ("wrong_groundtruth", "3"), ("wrong_groundtruth", "C or D"), ("expert", None)]
            )
        ]
    },
    "ifbench": {
        "ifbench.json": [
            {
                "key": "0",
                "prompt": "Name two nebulas.",
                "instruction_id_list": ["count:keywords_multiple", "format:emoji"],
                "kwargs": [
                    {
                        "N": None,
                        "keyword1": "kale",
                        "keyword2": "leek",
                        "keyword3": "beet",
                        "keyword4": "okra",
                        "keyword5": "corn",
                    },
                    {"N": None},
                ],
            }
        ]
    },
    "ifeval": {
        "ifeval.json": [
            {
                "key": 1000,
                "prompt": "Write three words without a comma.",
                "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
                "kwargs": [{"num_words": None}, {"relation": "at least", "num_words": 3}],
            },
            {"key": 1001, "prompt": "No comma.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        ]
    },
    "math_500": {
        "math_500.json": [
            {"problem": "10^3?", "solution": "", "answer": "1000", "level": 1, "unique_id": "test/algebra/1.json"},
            {
                "problem": "Half?",
                "solution": "",
                "answer": "\\frac{1}{2}",
                "level": 1,
                "unique_id": "test/algebra/2.json",
            },
        ]
    },
    "zebra_logic": {
        "zebra_logic.jsonl": [
            {
                "id": "lgp-test-2x2-1",
                "size": "2*2",
                "puzzle": "There are 2 houses. {form}\u2028",
                "solution": {
                    "header": ["House", "Name", "Food"],
                    "rows": [["1", "Bob", "stew"], ["2", "Ann", "stir fry"]],
                },
            }
        ]
    },
}
"""Files of each benchmark; a benchmark with several takes their folder."""


@pytest.fixture
def data(tmp_path: Path) -> Callable[[str], str]:
    """`data(name)` writes the files of a benchmark and returns the path to pass to it."""

    def write(name: str) -> str:
        for file, content in DATA[name].items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) for row in content] if file.endswith("jsonl") else []
            is_text = isinstance(content, str)
            text = content if is_text else "\n".join(lines) if lines else json.dumps(content, ensure_ascii=False)
            path.write_text(text, encoding="utf-8")
        return str(path if len(DATA[name]) == 1 else tmp_path / name)

    return write
