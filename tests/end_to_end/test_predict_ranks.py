"""`rlmt predict` on two ranks writes the same file as on one."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rlmt.cli.commands import main
from rlmt.engines.rollout_files import read_rollouts


def test_two_ranks_write_the_predictions_of_one(crash: Any, tiny: Path, prompts_file: Path, tmp_path: Path) -> None:
    """Seven prompts make batches of 4 and 3; a padding prompt gives both ranks equally many."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(prompts_file.read_text().splitlines(keepends=True)[:7]))
    world = crash.World(
        tiny / "policy",
        tiny / "reward",
        prompts,
        ("--data.val_size", "0", "--trainer.callbacks+", "rlmt.callbacks.RolloutWriter"),
    )
    assert main(["predict", *world.command(tmp_path / "one")[1:]]) == 0
    shared = dataclasses.replace(world, ranks=2, configs=("ddp",))
    log = tmp_path / "log.txt"
    crash.finish(crash.launch(["predict", *shared.command(tmp_path / "two")[1:]], log, ranks=2), log)

    files = [list((tmp_path / run).rglob("*.parquet")) for run in ("one", "two")]
    assert [[file.name for file in found] for found in files] == [["predictions.parquet"]] * 2
    one, two = (read_rollouts(found[0]) for found in files)
    assert one.schema.metadata == two.schema.metadata and len(one) == 7 * 4
    assert two["rank"].to_pylist() == [prompt % 2 for batch in (4, 3) for prompt in range(batch) for _ in range(4)]
    same = [name for name in one.column_names if name not in ("rank", "engine_logprobs", "reward", "reward_parts")]
    assert one.select(same).equals(two.select(same))
    for name in ("reward", "engine_logprobs"):
        ours, theirs = (table[name].combine_chunks() for table in (one, two))
        flat = [values.flatten() if name == "engine_logprobs" else values for values in (ours, theirs)]
        assert flat[0].to_pylist() == pytest.approx(flat[1].to_pylist(), abs=1e-4)
