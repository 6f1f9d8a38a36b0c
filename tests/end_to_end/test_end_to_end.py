"""Complete runs through the command line with vLLM: the reward rises, and the reward model never sees a thought."""

import csv
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rlmt.cli.commands import main

pytestmark = pytest.mark.usefixtures("no_plots")
SEEDS = (0, 1, 2)


def fit(tiny: Path, prompts: Path, run: Path, *more: object) -> list[dict[str, float]]:
    """Trains and returns the metrics of each step."""
    options = {
        "--model.policy": tiny / "policy",
        "--model.reward.model": tiny / "reward",
        "--data.prompts": prompts,
        "--data.batch_size": 4,
        "--data.max_prompt_tokens": 256,
        "--data.max_new_tokens": 32,
        "--data.val_size": 0,
        "--trainer.default_root_dir": run,
        "--trainer.enable_progress_bar": "false",
    }
    words = [str(word) for pair in options.items() for word in pair]
    configs = [word for name in ("base", "grpo", "tiny") for word in ("--config", f"configs/{name}.yaml")]
    assert main(["fit", *configs, *words, *map(str, more)]) == 0
    with (run / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("reward/mean")]
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


@pytest.fixture(scope="module")
def grpo(tiny: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Any]]:
    """`grpo(seed)`: folder and metrics of a run without thoughts, trained once per seed."""
    root = tmp_path_factory.mktemp("grpo")
    options = ("--model.format", "no_think", "--trainer.max_steps", 16)

    @cache
    def run(seed: int) -> list[Any]:
        folder = root / str(seed)
        return [folder, fit(tiny, prompts_file, folder, "--seed_everything", seed, *options)]

    return run


OBJECTIVES: dict[str, tuple[object, ...]] = {
    "PPO": ("--model.algorithm", "PPO", "--model.algorithm.critic_lr", 1e-3),
    "DPO": (
        *("--model.algorithm", "DPO", "--model.algorithm.loss", "length_normalized", "--model.algorithm.beta", 5),
        *("--model.algorithm.min_valid", 2, "--model.algorithm.update_epochs", 2, "--trainer.max_steps", 32),
        *("--data.batch_size", 8, "--data.max_new_tokens", 16),
    ),
}


@pytest.fixture
def rise(
    tiny: Path, prompts_file: Path, tmp_path: Path, grpo: Callable[[int], list[Any]]
) -> Callable[[str, int], float]:
    """`rise(objective, seed)`: how much the mean reward of the last four of 16 rollouts exceeds that of the first."""

    def train(objective: str, seed: int) -> float:
        if objective == "GRPO":
            _, rows = grpo(seed)
        else:
            rows = fit(
                *(tiny, prompts_file, tmp_path / str(seed), "--seed_everything", seed),
                *("--model.format", "no_think", "--trainer.max_steps", 16, *OBJECTIVES[objective]),
            )
        updates = 2 if objective == "DPO" else 1
        assert [row["engine/weight_version"] for row in rows] == [updates * step for step in range(16)]
        if objective == "DPO":  # its log-probs are at another temperature than the engine's
            assert all(row["dpo/pairs"] > 0 for row in rows)
        else:  # with fp32 on both sides, the engine samples from the trained policy after every sync
            assert max(row["engine/mismatch_max"] for row in rows) < 1e-3
        reward = [row["reward/mean"] for row in rows]
        return statistics.mean(reward[-4:]) - statistics.mean(reward[:4])

    return train


@pytest.mark.parametrize("objective", ["GRPO", *(pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES)])
def test_reward_rises(objective: str, rise: Callable[[str, int], float]) -> None:
    assert rise(objective, SEEDS[0]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["GRPO", *OBJECTIVES])
def test_reward_rises_over_three_seeds(objective: str, rise: Callable[[str, int], float]) -> None:
    rises = [rise(objective, seed) for seed in SEEDS]
    error = statistics.stdev(rises) / len(rises) ** 0.5
    assert statistics.mean(rises) > 2 * error, rises


def test_thoughts_are_not_scored(tiny: Path, prompts_file: Path, tmp_path: Path) -> None:
    fit(tiny, prompts_file, tmp_path, "--model.format", "think", "--trainer.max_steps", 4)
    assert 0 < scored_share(tmp_path, "think") < 1


def test_all_but_malformed_responses_are_scored_without_thoughts(grpo: Callable[[int], list[Any]]) -> None:
    assert 0 < scored_share(grpo(SEEDS[0])[0], "no_think") < 1


def test_thoughts_are_not_scored_on_real_prompts(tiny: Path, real_prompts: str, tmp_path: Path) -> None:
    fit(tiny, Path(real_prompts), tmp_path, "--model.format", "think", "--trainer.max_steps", 6)
    assert 0 < scored_share(tmp_path, "think") < 1


def scored_share(run: Path, form: str) -> float:
    """Share of scored rollouts; checks by string search that no scored text holds a part of a thought."""
    (folder,) = run.rglob("rollouts")
    rows = [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    scored = [row for row in rows if row["scored_text"] is not None]
    for row in scored:
        before, tag, after = row["text"].partition("</think>")
        if form == "think":
            assert before.lstrip().startswith("<think>") and tag
            assert row["scored_text"] == after.strip()
        else:
            assert row["scored_text"] == row["text"].strip()
        assert "think>" not in row["scored_text"]
    worst: dict[int, float] = {}
    for row in scored:
        worst[row["step"]] = min(row["reward"], worst.get(row["step"], row["reward"]))
    # The reward of a malformed sample never exceeds that of a well-formed one of its batch.
    assert all(row["reward"] <= worst.get(row["step"], 0.0) for row in rows if row["scored_text"] is None)
    return len(scored) / len(rows)
