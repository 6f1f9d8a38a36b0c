"""Offline training through the command line, from rollouts of `rlmt predict` and from those of a run."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from rlmt.cli.commands import main
from rlmt.engines.rollout_files import read_rollouts
from rlmt.models import loading
from rlmt.modules import RLMTModule, reference_cache

pytestmark = pytest.mark.usefixtures("no_plots")
Run = Callable[..., list[dict[str, float]]]


@pytest.fixture(scope="module")
def options(tiny: Path, prompts_file: Path) -> list[str]:
    """Options of all runs: 24 prompts, 3 steps an epoch."""
    common = {
        "--model.policy": tiny / "policy",
        "--model.reward.model": tiny / "reward",
        "--model.format": "no_think",
        "--data.prompts": prompts_file,
        "--data.engine": "TransformersEngine",
        "--data.batch_size": 8,
        "--data.group_size": 4,
        "--data.max_prompt_tokens": 256,
        "--data.max_new_tokens": 16,
        "--data.val_size": 0,
        "--trainer.max_steps": 3,
        "--trainer.enable_progress_bar": "false",
    }
    configs = [word for name in ("base", "grpo", "tiny") for word in ("--config", name)]
    return [*configs, *(str(word) for pair in common.items() for word in pair)]


@pytest.fixture
def run(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("fit", "name", ...)` runs a command in an empty folder and returns the metrics of each step."""
    monkeypatch.chdir(tmp_path)

    def command(name: str, folder: str, *more: object) -> list[dict[str, float]]:
        assert main([name, *options, "--trainer.default_root_dir", folder, *map(str, more)]) == 0
        version = max(Path(folder).glob("version_*"))
        if not (version / "metrics.csv").exists():
            return []
        with (version / "metrics.csv").open() as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        return [row for row in rows if "reward/mean" in row]

    return command


@pytest.fixture(scope="module")
def predictions(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of the initial policy for all prompts, as `rlmt predict` writes them; copy them before training."""
    folder = tmp_path_factory.mktemp("predictions")
    assert main(["predict", *options, "--trainer.default_root_dir", str(folder)]) == 0
    (path,) = folder.rglob("predictions.parquet")
    return path


@pytest.fixture
def recorded(predictions: Path, tmp_path: Path) -> Path:
    path = tmp_path / "samples" / "r.parquet"
    path.parent.mkdir()
    path.write_bytes(predictions.read_bytes())
    return path


def replay(path: Path, *more: object) -> tuple[object, ...]:
    return ("--data.engine", "ReplayEngine", "--data.engine.path", path, *more)


def weights(folder: str) -> dict[str, torch.Tensor]:
    checkpoint: dict[str, Any] = torch.load(Path(folder) / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"]  # type: ignore[no-any-return]


def untimed(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: value for k, value in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def test_predictions_are_trained_on_and_reference_logprobs_computed_once(
    run: Run, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[str] = []
    modules: list[RLMTModule] = []
    batches: list[Any] = []
    differences: list[float] = []
    step = RLMTModule.training_step

    def training_step(self: RLMTModule, batch: Any, batch_idx: int) -> Any:
        if not modules:  # a copy of the policy before its first update is the reference
            twin = loading.load_policy(self.policy_path, "float32")
            differences.append(
                float(
                    (reference_cache.compute_logprobs(twin, batch, 8192, self.device) - batch.ref_logprobs).abs().max()
                )
            )
        modules.append(self)
        batches.append(batch)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(RLMTModule, "training_step", training_step)
    monkeypatch.setattr("rlmt.modules.offline_rollouts.rank_zero_info", printed.append)
    settings = ("--model.algorithm.kl_coef", 0.1, "--trainer.max_steps", 6)
    rows = run("fit", "one", *replay(recorded, *settings))
    weighted = f"(weight version 0 of {recorded}): importance weights truncated at 2"
    assert printed == [f"rollouts were drawn by another policy {weighted}"]
    assert differences[0] < 1e-6 and modules[0].reference is None
    assert all(batch.off_policy for batch in batches) and len(rows) == 6
    assert [row["engine/weight_version"] for row in rows] == [0] * 6
    # At the first step the policy is the one that generated the samples; later it differs.
    assert rows[0]["engine/importance_mean"] == pytest.approx(1, abs=1e-4) and rows[0]["policy/kl"] < 1e-6
    assert rows[5]["engine/importance_mean"] != pytest.approx(1, abs=1e-3) and rows[5]["policy/kl"] > 1e-3
    assert not any(name.startswith("engine/mismatch") for row in rows for name in row)

    def never(*arguments: Any) -> Any:
        raise AssertionError("the reference was computed again")

    with monkeypatch.context() as patch:
        patch.setattr(reference_cache, "compute_logprobs", never)
        again = run("fit", "two", *replay(recorded, *settings))
    assert untimed(again) == untimed(rows) and all(module.reference is None for module in modules)
    for name, tensor in weights("one").items():
        assert torch.equal(tensor, weights("two")[name]), name


@pytest.mark.parametrize("cache", ["present", "deleted"])
def test_resumed_replay_equals_the_unbroken_run(run: Run, recorded: Path, cache: str) -> None:
    settings = replay(recorded, "--model.algorithm.kl_coef", 0.1, "--model.algorithm.update_epochs", 2)
    unbroken = run("fit", "unbroken", *settings, "--trainer.max_steps", 8)
    run("fit", "broken", *settings, "--trainer.max_steps", 4)
    (file,) = recorded.parent.glob("*.safetensors")
    if cache == "deleted":
        file.unlink()
    resumed = run("fit", "broken", *settings, "--trainer.max_steps", 8, "--ckpt_path", "last")
    assert list(recorded.parent.glob("*.safetensors")) == [file], (
        "the reference is the initial policy, not the checkpoint's"
    )
    assert len(unbroken) == 4 and untimed(resumed) == untimed(unbroken)
    for name, tensor in weights("unbroken").items():
        assert torch.equal(tensor, weights("broken")[name]), name


def test_replayed_rollouts_of_a_run_reproduce_the_run(run: Run) -> None:
    """Over two epochs each prompt's groups are replayed in order, so rollouts are on-policy and weights are 1."""
    settings = ("--trainer.max_steps", 6, "--seed_everything", 3)
    live = run("fit", "live", *settings)
    folder = Path("live/version_0/rollouts")
    assert read_rollouts(folder)["epoch"].to_pylist() == [0] * 96 + [1] * 96
    again = run("fit", "again", *replay(folder, *settings))
    for one, other in zip(live, again, strict=True):
        assert other["engine/importance_mean"] == pytest.approx(1, abs=1e-4)
        for name in ("reward/mean", "length/response_mean", "policy/loss", "policy/kl", "engine/weight_version"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    columns = ["prompt_index", "completion_ids", "reward", "epoch", "weight_version"]
    tables = [read_rollouts(path).select(columns) for path in (folder, "again/version_0/rollouts")]
    assert tables[0].equals(tables[1])
    for name, tensor in weights("live").items():
        torch.testing.assert_close(weights("again")[name], tensor, rtol=0, atol=1e-4, msg=name)


def test_predict_rescores_recorded_samples_with_another_reward(run: Run, predictions: Path) -> None:
    reward = ("--model.reward", "RegexReward", "--model.reward.pattern", "e")
    run("predict", "rescored", *replay(predictions, *reward, "--data.group_size", 3))
    old = [row for row in pq.read_table(predictions).to_pylist() if row["sample"] < 3]
    new = pq.read_table("rescored/version_0/predictions.parquet").to_pylist()
    assert len(new) == 72
    for one, other in zip(old, new, strict=True):
        for name in ("prompt_index", "completion_ids", "engine_logprobs", "scored_text", "weight_version", "finish"):
            assert one[name] == other[name], name
        if other["scored_text"] is not None:
            assert other["reward"] == float("e" in other["scored_text"])
    assert {row["reward"] for row in new} >= {0.0, 1.0}


def test_validation_prompts_are_sampled_by_the_validation_engine(run: Run, recorded: Path) -> None:
    held_out = ("--data.val_size", 8, "--data.val_engine", "TransformersEngine", "--trainer.val_check_interval", 1)
    run("fit", "run", *replay(recorded, *held_out, "--trainer.max_steps", 2))
    with Path("run/version_0/metrics.csv").open() as file:
        values = [row["val/reward_mean"] for row in csv.DictReader(file) if row.get("val/reward_mean")]
    assert len(values) == 2 and values[0] != values[1], "one reward per step, of the current policy"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data.engine.path", "none.parquet"), "--data.engine.path: no rollouts at none.parquet"),
        (("--model.format", "think"), "set --model.format to the format of the recording"),
        (("--data.temperature", 0.9), "set --data.temperature 0.7"),
        (("--data.group_size", 5), "has 4 samples per prompt, but --data.group_size is 5"),
        (("--data.max_new_tokens", 3), "--data.max_new_tokens is 3"),
        (("--data.val_size", 4), "set --data.val_size 0, or --data.val_engine VLLMEngine"),
        (("--data.system", "Be brief."), "none of the 24 prompts"),
    ],
)
def test_configuration_error_is_one_line_before_any_model_is_loaded(
    more: tuple[object, ...],
    message: str,
    options: list[str],
    predictions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_policy", never)
    assert main(["fit", *options, *map(str, replay(predictions, *more))]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error:")]
    assert message in line
