"""Thoughts and answers before and after RL in the report of a study."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlmt.engines.rollout_files import SCHEMA
from rlmt.report.estimates import Estimate
from rlmt.study.command import _samples
from rlmt.study.findings import Comparison, Findings
from rlmt.study.report import make_sections
from rlmt.study.samples import before_and_after, sample_lines


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Writes a rollout file; rows: step, prompt, rewards of the prompt's samples."""
    table = [
        {
            "step": row["step"],
            "prompt_index": row["prompt"],
            "messages": [{"role": "user", "content": f"prompt {row['prompt']}"}],
            "thought": f"thought {row['step']}",
            "response": f"answer of {reward:g}",
            "status": "ok" if reward > -10 else "unclosed",
            "reward": reward,
        }
        for row in rows
        for reward in row["rewards"]
    ]
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(table, schema=SCHEMA), folder / "rollouts" / name)


def test_prompts_that_occur_twice_are_compared_at_their_median_reward(tmp_path: Path) -> None:
    early = [{"step": 0, "prompt": number, "rewards": [1.0, 5.0, 2.0]} for number in range(4)]
    late = [{"step": 9 - number, "prompt": number, "rewards": [4.0, 9.0, 8.0]} for number in range(3)]
    write(tmp_path, "rollouts_000000-000000.parquet", early)
    write(tmp_path, "rollouts_000007-000009.parquet", late)
    pairs = before_and_after(tmp_path)
    assert [(a.prompt, a.step, a.reward, b.prompt, b.step, b.reward) for a, b in pairs] == [
        (f"prompt {n}", 0, 2.0, f"prompt {n}", 9 - n, 8.0) for n in range(3)
    ]


def test_other_prompts_of_the_first_and_the_last_step_are_used_if_none_occurs_twice(tmp_path: Path) -> None:
    rows = [{"step": step, "prompt": 10 * step + number, "rewards": [1.0]} for step in range(3) for number in range(4)]
    write(tmp_path, "rollouts_000000-000002.parquet", rows)
    assert [(a.prompt, b.prompt) for a, b in before_and_after(tmp_path, 2)] == [
        ("prompt 0", "prompt 20"),
        ("prompt 1", "prompt 21"),
    ]
    assert before_and_after(tmp_path / "elsewhere") == []


def test_lines_name_malformed_samples_and_escape_markdown(tmp_path: Path) -> None:
    write(
        tmp_path,
        "a.parquet",
        [{"step": 0, "prompt": 0, "rewards": [-10.0]}, {"step": 5, "prompt": 1, "rewards": [2.0]}],
    )
    lines = list(sample_lines(before_and_after(tmp_path), "RLMT"))
    assert "- RLMT before RL (reward -10.00): [thought 0] **(unclosed)**" in lines
    assert "- RLMT after RL (reward 2.00): [thought 5] **answer of 2**" in lines
    assert "> prompt 0" in lines and "> prompt 1" in lines


def test_report_shows_them_for_the_first_arm_of_the_comparisons(tmp_path: Path) -> None:
    write(tmp_path / "run" / "latest", "a.parquet", [{"step": s, "prompt": 0, "rewards": [s]} for s in (0, 7)])
    found = Findings("A study", "rlmt study", [0], {"a": "A", "b": "B"}, ["m"], [Comparison("a", "b")])
    lines = _samples(found, {"b": [tmp_path], "a": [tmp_path / "run"]})
    assert sum("answer of" in line for line in lines) == 2 and "- A after RL (reward 7.00)" in "".join(lines)
    assert _samples(found, {"b": [tmp_path]}) == []
    one = Estimate((1.0,))
    filled = Findings(
        **{
            **vars(found),
            "samples": lines,
            "table": {"a": {"m": one}, "b": {"m": one}},
            "minutes": {"a": one, "b": one},
        }
    )
    assert {section.title: section.texts for section in make_sections(filled)}["Before and after"] == lines
