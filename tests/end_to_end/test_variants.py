"""Named algorithm variants and dynamic sampling through the command line."""

import csv
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from rlmt.cli.commands import main
from rlmt.models import varlen

CONFIGS = [word for name in ("base", "grpo", "tiny") for word in ("--config", f"configs/{name}.yaml")]
REWARD = """
def picky(prompt, response):
    '''Equal for all responses to a third of the prompts, which have no learning signal.'''
    return float(len(response) % 5) if len(prompt[-1]["content"]) % 3 else 1.0


def rarely(prompt, response):
    '''Equal for all responses to most prompts.'''
    return 1.0 if len(prompt[-1]["content"]) % 3 else float(len(response) % 5)


def indifferent(prompt, response):
    return 1.0
"""
pytestmark = pytest.mark.usefixtures("no_plots")
Fit = Callable[..., int]


@pytest.fixture
def fit(tiny: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """`fit(run, "--data.x", 1)` trains on tiny models without vLLM; rewards from REWARD, 6 batches an epoch."""
    (tmp_path / "variant_rewards.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(folder: Path, *more: object) -> int:
        options = {
            "--model.policy": tiny / "policy",
            "--model.reward": "CallableReward",
            "--model.reward.function": "variant_rewards.picky",
            "--model.malformed": "null",
            "--model.format": "no_think",
            "--data.prompts": prompts_file,
            "--data.engine": "TransformersEngine",
            "--data.batch_size": 4,
            "--data.group_size": 4,
            "--data.max_prompt_tokens": 256,
            "--data.max_new_tokens": 12,
            "--data.val_size": 0,
            "--trainer.default_root_dir": folder,
            "--trainer.enable_progress_bar": "false",
        }
        words = [str(word) for pair in options.items() for word in pair]
        return main(["fit", *CONFIGS, *words, *map(str, more)])

    return run


def metrics(run: Path, version: int = 0) -> list[dict[str, float]]:
    with (run / f"version_{version}" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("reward/mean")]
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def rollouts(run: Path) -> dict[int, list[dict[str, Any]]]:
    """The saved samples of each step."""
    steps: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(run.rglob("rollouts_*.parquet")):
        for row in pq.read_table(path).to_pylist():
            steps[row["step"]].append(row)
    return steps


@pytest.mark.parametrize("name", ["DrGRPO", "DAPO", "GSPO", "RLOO", "REINFORCEPlusPlus"])
def test_variant_is_one_option(name: str, fit: Fit, tmp_path: Path) -> None:
    """On top of GRPO's configuration, of which only the clamp of the KL estimate holds for the variant, too."""
    seen: list[Any] = []
    from rlmt.modules import RLMTModule

    with pytest.MonkeyPatch.context() as patch:
        take_steps = RLMTModule._update_policy
        patch.setattr(RLMTModule, "_update_policy", lambda m, e: (seen.append(m.algorithm), take_steps(m, e))[1])
        assert fit(tmp_path / "run", "--model.algorithm", name, "--trainer.max_steps", 1) == 0
    (algorithm,) = seen
    fresh = type(algorithm)()
    assert type(algorithm).__name__ == name and vars(algorithm) == vars(fresh) | {"kl_clamp": 10.0}
    (row,) = metrics(tmp_path / "run")
    assert row["policy/grad_norm"] > 0 and row["policy/ratio_max"] == pytest.approx(1, abs=1e-6)
    assert ("policy/kl" in row) == fresh.needs_reference


def test_variant_accepts_its_own_options_and_rejects_fixed_ones(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path / "run", "--model.algorithm", "DAPO", "--model.algorithm.kl_coef", 0.1) == 2
    assert "DAPO has no option 'kl_coef'" in capsys.readouterr().err
    assert fit(tmp_path / "run", "--model.algorithm", "DAPO", "--model.algorithm.dynamic_sampling", -1) == 2
    assert "--model.algorithm.dynamic_sampling" in capsys.readouterr().err


def test_dynamic_sampling_trains_on_groups_with_a_signal_and_logs_all(fit: Fit, tmp_path: Path) -> None:
    options = ("--model.algorithm", "DAPO", "--model.algorithm.minibatches", 2, "--trainer.max_steps", 8)
    assert fit(tmp_path / "run", *options) == 0
    rows, steps = metrics(tmp_path / "run"), rollouts(tmp_path / "run")
    assert len(rows) == len(steps) == 4
    seeds = set()
    for number, row in enumerate(rows):
        samples = steps[number]
        groups = defaultdict(list)
        for sample in samples:
            groups[sample["group"]].append(sample["reward"])
            seeds.add((sample["epoch"], sample["prompt_index"], sample["sample"]))
        equal = sum(len(set(rewards)) == 1 for rewards in groups.values())
        assert len(samples) == 16 * (1 + row["reward/refills"])
        assert row["reward/dropped_groups"] == equal
        assert row["reward/surplus_groups"] == max(0, len(groups) - equal - 4)
        # the logged reward covers all samples, not only those trained on
        assert row["reward/mean"] == pytest.approx(sum(s["reward"] for s in samples) / len(samples), rel=1e-5)
        assert row["reward/zero_std_groups"] == pytest.approx(equal / len(groups))
        assert row["engine/mismatch_max"] < 1e-3  # refills are sampled with the current weights and are in order
        enough = len(groups) - equal >= 4
        assert enough or row["reward/refills"] == 4
        assert row["time/rollout_s"] > 0 and row["time/reward_s"] >= 0
    assert sum(row["reward/refills"] for row in rows) >= 4 and any(row["reward/surplus_groups"] for row in rows)
    # (epoch, prompt, sample) determines the seed: none is used twice, and epochs end within steps
    assert len(seeds) == sum(map(len, steps.values()))
    epochs = [{sample["epoch"] for sample in samples} for samples in steps.values()]
    assert max(map(len, epochs)) > 1


@pytest.mark.slow
def test_resumed_run_with_refills_equals_the_unbroken_run(fit: Fit, tmp_path: Path) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    common = ("--model.algorithm", "DAPO")
    assert fit(unbroken, *common, "--trainer.max_steps", 5) == 0
    assert fit(broken, *common, "--trainer.max_steps", 2) == 0
    assert fit(broken, *common, "--trainer.max_steps", 5, "--ckpt_path", "last") == 0
    expected, resumed = (
        [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in metrics(run)]
        for run in (unbroken, broken)
    )
    assert sum(row["reward/refills"] for row in expected[:2]) > 0 and len(expected) == 5
    assert resumed == expected
    key = ("step", "epoch", "prompt_index", "sample", "completion_ids", "reward")
    dumps = [
        [[s[name] for name in key] for _, samples in sorted(rollouts(run).items()) for s in samples]
        for run in (unbroken, broken)
    ]
    assert dumps[0] == dumps[1]
    ends = [
        torch.load(run / "latest" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (unbroken, broken)
    ]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_groups_available_at_the_refill_limit_are_trained_on(fit: Fit, tmp_path: Path) -> None:
    """Fewer groups than minibatches make fewer optimizer steps, and no group makes none."""
    options: tuple[object, ...] = ("--model.reward.function", "variant_rewards.rarely")
    options += ("--model.algorithm.dynamic_sampling", 1, "--model.algorithm.minibatches", 4, "--trainer.max_steps", 6)
    assert fit(tmp_path / "run", *options) == 0
    rows, trained = metrics(tmp_path / "run"), []
    for row in rows:
        sampled = 4 * (1 + row["reward/refills"])
        trained.append(sampled - row["reward/dropped_groups"] - row["reward/surplus_groups"])
        assert row["reward/refills"] <= 1
    assert 0 in trained and any(0 < count < 4 for count in trained)
    versions = [row["engine/weight_version"] for row in rows]
    assert [b - a for a, b in zip(versions, versions[1:], strict=False)] == trained[: len(rows) - 1]


def test_batches_without_a_learning_signal_are_skipped_and_end_the_run(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model.reward.function", "variant_rewards.indifferent", "--model.algorithm", "DAPO")
    assert fit(tmp_path / "run", *options, "--model.max_idle", 3, "--trainer.max_steps", 9) == 2
    message = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "3 consecutive rollout batches without a learning signal" in message
    assert "no prompt has samples with different rewards" in message
    rows = metrics(tmp_path / "run")
    assert [(row["policy/skipped"], row["engine/weight_version"]) for row in rows] == [(1.0, 0.0)] * 2
    assert all((row["reward/refills"], row["reward/dropped_groups"]) == (4, 20) for row in rows)


def test_packed_rows_train_as_padded_ones(
    tiny: Path, fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policy, reference, critic and reward model pack their rows; nothing but rounding differs."""
    runs, packs = [], []
    attend = varlen.varlen_attention

    def watch(module: Any, query: Any, key: Any, value: Any, mask: Any, *args: Any, **options: Any) -> Any:
        packs.append(isinstance(mask, varlen.PackedMask))
        return attend(module, query, key, value, mask, *args, **options)

    monkeypatch.setattr(varlen, "varlen_attention", watch)
    for implementation in ("null", "varlen"):
        runs.append(tmp_path / implementation)
        options = ("--model.attn_implementation", "--model.reward.attn_implementation")
        more = [word for option in options for word in (option, implementation)]
        reward = ["--model.reward", "ClassifierReward", "--model.reward.model", tiny / "reward"]
        more += ["--model.algorithm", "PPO", "--model.algorithm.kl_coef", 0.1, "--model.gradient_checkpointing", "true"]
        assert fit(runs[-1], *reward, *more, "--trainer.max_steps", 2) == 0
        assert any(packs) == (implementation == "varlen")
    padded, packed = (metrics(run) for run in runs)
    assert len(padded) == len(packed) == 2 and all(step["policy/kl"] is not None for step in packed)
    for one, other in zip(padded, packed, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if not name.startswith(("time/", "perf/")):
                assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name
