"""Answers of several arms to the same prompts in the report of a study."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlmt.engines.rollout_files import SCHEMA
from rlmt.report.estimates import Estimate
from rlmt.study.command import _samples
from rlmt.study.findings import Comparison, Findings
from rlmt.study.report import make_sections
from rlmt.study.samples import answers_to_same_prompts, sample_lines


def write(folder: Path, step: int, rewards: dict[int, list[float]], name: str = "") -> Path:
    """Writes the rollout file of a validation; prompt → rewards of its samples."""
    table: list[dict[str, Any]] = [
        {
            "step": step,
            "prompt_index": prompt,
            "messages": [{"role": "user", "content": f"prompt {prompt}"}],
            "thought": f"thought {step}",
            "response": f"answer of {reward:g}",
            "status": "ok" if reward > -10 else "unclosed",
            "reward": reward,
        }
        for prompt, of_prompt in rewards.items()
        for reward in of_prompt
    ]
    (folder / "val_rollouts").mkdir(parents=True, exist_ok=True)
    file = folder / "val_rollouts" / f"rollouts_{step:06d}-{step:06d}{name}.parquet"
    pq.write_table(pa.Table.from_pylist(table, schema=SCHEMA), file)
    return folder


def test_last_validations_are_compared_on_shared_prompts_at_their_median_reward(tmp_path: Path) -> None:
    write(tmp_path / "a", 9, {number: [50.0] for number in range(9)})
    a = write(tmp_path / "a", 19, {2: [1.0, 5.0, 2.0], 4: [3.0]}, ".rank1")
    write(a, 19, {5: [1.0], 1: [1.0]})
    b = write(tmp_path / "b", 0, {5: [7.0], 4: [6.0], 2: [8.0], 3: [9.0]})
    found = answers_to_same_prompts({"A": a, "without": tmp_path / "c", "B": b}, count=2)
    assert [[(label, s.prompt, s.reward) for label, s in of_prompt.items()] for of_prompt in found] == [
        [("A", "prompt 2", 2.0), ("B", "prompt 2", 8.0)],
        [("A", "prompt 4", 3.0), ("B", "prompt 4", 6.0)],
    ]
    assert answers_to_same_prompts({"without": tmp_path / "c"}) == []


def test_lines_name_malformed_samples_and_escape_markdown(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 0, {0: [-10.0]}), write(tmp_path / "b", 5, {0: [2.0]})
    lines = list(sample_lines(answers_to_same_prompts({"SFT": a, "RLMT": b})))
    assert lines[1:] == [
        "> prompt 0",
        "",
        "- SFT (reward -10.00): [thought 0] **(unclosed)**",
        "- RLMT (reward 2.00): [thought 5] **answer of 2**",
    ]


def test_report_shows_the_arms_that_are_compared_in_the_order_of_the_table(tmp_path: Path) -> None:
    folders = {arm: [tmp_path / arm] for arm in "cba"}
    for arm in folders:
        write(tmp_path / arm / "latest", 3, {0: [1.0]})
    labels = {arm: arm.upper() for arm in folders}
    found = Findings("A study", "rlmt study", [0], labels, ["m"], [Comparison("a", "b")])
    lines = _samples(found, folders)
    assert [line[:3] for line in lines if line.startswith("- ")] == ["- B", "- A"]
    one = Estimate((1.0,))
    filled = Findings(
        **{
            **vars(found),
            "samples": lines,
            "table": {"a": {"m": one}, "b": {"m": one}},
            "minutes": {"a": one, "b": one},
        }
    )
    assert {section.title: section.texts for section in make_sections(filled)}["Answers to the same prompts"] == lines
