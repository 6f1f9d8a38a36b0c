"""Complete runs with adapters through the command line: they learn, resume and never change the frozen base."""

from __future__ import annotations

import csv
import importlib.util
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlmt.cli.commands import main
from rlmt.modules import RLMTModule

LORA = ("--model.lora", "LoRA", "--model.lora.rank", 64, "--model.lora.alpha", 64)
QLORA = ("--model.lora", "LoRA", "--model.lora.rank", 8, "--model.quantization", "NF4")
pytestmark = pytest.mark.usefixtures("no_plots")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


class Runner:
    """Starts runs on the tiny models; stores the module of the last run and its frozen weights before training."""

    def __init__(self, tiny: Path, prompts: Path, root: Path) -> None:
        self.tiny, self.prompts, self.root = tiny, prompts, root
        self.module: RLMTModule | None = None
        self.frozen: dict[str, Tensor] = {}

    def record(self, module: RLMTModule) -> None:
        self.module, self.frozen = module, {name: t.clone() for name, t in self.frozen_weights(module).items()}

    @staticmethod
    def frozen_weights(module: RLMTModule) -> dict[str, Tensor]:
        assert module.policy is not None
        return {name: t for name, t in module.policy.state_dict().items() if ".lora_" not in name}

    def __call__(self, name: str, *more: object, status: int = 0) -> list[dict[str, str]]:
        """Trains in the folder `name` and returns the metric rows of its newest version."""
        run = self.root / name
        options = {
            "--model.policy": self.tiny / "policy",
            "--model.reward.model": self.tiny / "reward",
            "--model.format": "no_think",
            "--model.optimizer.lr": 2e-3,
            "--data.prompts": self.prompts,
            "--data.batch_size": 4,
            "--data.max_prompt_tokens": 256,
            "--data.max_new_tokens": 16,
            "--data.val_size": 0,
            "--data.engine": "TransformersEngine",
            "--trainer.default_root_dir": run,
            "--trainer.enable_progress_bar": "false",
        }
        configs = [word for config in ("base", "grpo", "tiny") for word in ("--config", config)]
        words = [str(word) for pair in options.items() for word in pair]
        assert main(["fit", *configs, *words, *map(str, more)]) == status
        if status:
            return []
        newest = max(run.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
        with (newest / "metrics.csv").open() as file:
            return [row for row in csv.DictReader(file) if row.get("reward/mean")]


@pytest.fixture
def fit(tiny: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    runner = Runner(tiny, prompts_file, tmp_path)
    configure = RLMTModule.configure_optimizers

    def recording(module: RLMTModule) -> Any:
        runner.record(module)
        return configure(module)

    monkeypatch.setattr(RLMTModule, "configure_optimizers", recording)
    return runner


def reward_rise(fit: Runner, options: tuple[object, ...], engine: str, seed: int, steps: int) -> float:
    """Trains, checks each step, and returns how much the mean reward of the last three steps exceeds the first's."""
    run = ("--data.engine", engine, "--seed_everything", seed, "--trainer.max_steps", steps)
    rows = fit(str(seed), *options, *run)
    assert [float(row["engine/weight_version"]) for row in rows] == list(range(steps))
    assert max(float(row["engine/mismatch_max"]) for row in rows) < 1e-3
    assert float(rows[0]["policy/kl"]) == pytest.approx(0, abs=1e-9) and float(rows[-1]["policy/kl"]) > 1e-3
    assert fit.module is not None and fit.module.policy is not None and fit.module.reference is None
    now = fit.frozen_weights(fit.module)
    assert all(torch.equal(now[name], tensor) for name, tensor in fit.frozen.items())
    assert not any(p.requires_grad for n, p in fit.module.policy.named_parameters() if ".lora_" not in n)
    reward = [float(row["reward/mean"]) for row in rows]
    return statistics.mean(reward[-3:]) - statistics.mean(reward[:3])


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("options", [LORA, QLORA], ids=["LoRA", "QLoRA"])
def test_reward_rises_and_the_engine_matches_the_policy(options: tuple[object, ...], fit: Runner) -> None:
    assert reward_rise(fit, options, "VLLMEngine", 0, 30) > 0


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("options", [LORA, QLORA], ids=["LoRA", "QLoRA"])
def test_reward_rises_over_three_seeds(options: tuple[object, ...], fit: Runner) -> None:
    rises = [reward_rise(fit, options, "VLLMEngine", 0, 30)]
    rises += [reward_rise(fit, options, "TransformersEngine", seed, 10) for seed in (1, 2)]
    error = statistics.stdev(rises) / len(rises) ** 0.5
    assert statistics.mean(rises) > 2 * error, rises


def test_dpo_reference_is_the_policy_without_its_adapter(fit: Runner) -> None:
    """Before the first step both are equal: a margin of 0 and a loss of ln 2. After a step they differ."""
    dpo = ("--model.algorithm", "DPO", "--model.algorithm.min_valid", 2, "--data.batch_size", 8)
    rows = fit("dpo", *LORA, *dpo, "--trainer.max_steps", 2)
    assert fit.module is not None and fit.module.reference is None
    assert [float(row["policy/loss"]) for row in rows][0] == pytest.approx(0.693147, abs=1e-5)
    assert float(rows[0]["dpo/margin"]) == pytest.approx(0, abs=1e-6) != pytest.approx(float(rows[1]["dpo/margin"]))
    now = fit.frozen_weights(fit.module)
    assert all(torch.equal(now[name], tensor) for name, tensor in fit.frozen.items())


RESUMED = {
    "LoRA": (*LORA, "--model.lora.dropout", 0.1),
    "QLoRA": (*QLORA, "--model.optimizer", "bitsandbytes.optim.AdamW8bit", "--model.optimizer.min_8bit_size", 256),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_resumed_run_equals_the_unbroken_run(case: str, fit: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit; a checkpoint holds the adapter and no base weight."""
    options = (*RESUMED[case], "--model.algorithm.minibatches", 2)
    unbroken = fit("unbroken", *options, "--trainer.max_steps", 6)
    fit("broken", *options, "--trainer.max_steps", 2)
    broken = fit("broken", *options, "--trainer.max_steps", 6, "--ckpt_path", "last")
    timings = ("time/", "perf/")
    compared = [
        [{k: v for k, v in row.items() if v and not k.startswith(timings)} for row in rows]
        for rows in (unbroken, broken)
    ]
    assert compared[0] == compared[1] and len(unbroken) == 3
    files = [fit.root / name / "latest" / "checkpoints" / "last.ckpt" for name in ("unbroken", "broken")]
    ends = [torch.load(file, weights_only=True) for file in files]
    assert ends[0]["state_dict"].keys() == ends[1]["state_dict"].keys()
    for name, tensor in ends[0]["state_dict"].items():
        assert torch.equal(tensor, ends[1]["state_dict"][name]), name
        assert name.startswith("policy.model.layers.") and (".lora_A.default.weight" in name or ".lora_B." in name)
    assert len(ends[0]["state_dict"]) == 2 * 2 * 7  # A and B of seven linear layers in each of two layers
    record = ends[0]["rlmt"]
    assert record["policy"] == str(fit.tiny / "policy") and record["adapter"]["r"] == (64 if case == "LoRA" else 8)
    assert record["quantization"] == (None if case == "LoRA" else {"type": "nf4", "double_quant": True})
    if case == "QLoRA":
        states = ends[0]["optimizer_states"][0]["state"].values()
        dtypes = {t.dtype for state in states for t in state["__bnb_optimizer_quant_state__"].values()}
        assert torch.uint8 in dtypes  # moments in 8 bits
    config = (fit.root / "unbroken" / "latest" / "checkpoints" / "policy" / "config.json").read_text()
    assert "quantization" not in config

    capsys.readouterr()
    fit("broken", "--trainer.max_steps", 7, "--ckpt_path", "last", status=2)
    assert "holds a LoRA adapter, and this run trains all weights" in capsys.readouterr().err
    fit("broken", *options, "--model.lora.alpha", 3, "--trainer.max_steps", 7, "--ckpt_path", "last", status=2)
    assert "lora lora_alpha" in capsys.readouterr().err


def test_bf16_mixed_stores_the_base_in_bfloat16_and_the_adapter_in_float32(fit: Runner) -> None:
    (row,) = fit("run", *QLORA, "--trainer.precision", "bf16-mixed", "--trainer.max_steps", 1)
    assert fit.module is not None and fit.module.policy is not None
    dtypes: dict[bool, set[torch.dtype]] = {".lora_" in name: set() for name, _ in fit.module.policy.named_parameters()}
    for name, p in fit.module.policy.named_parameters():
        dtypes[".lora_" in name].add(p.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16, torch.uint8}}
    assert {t.dtype for _, t in fit.module.policy_weights()} == {torch.bfloat16}
    assert float(row["policy/kl"]) == 0.0
    assert float(row["engine/mismatch_max"]) < 0.05


CONFIGURATION_ERRORS = {
    "4 bits alone": (("--model.quantization", "NF4"), "--model.lora LoRA"),
    "DoRA in vLLM": ((*LORA, "--model.lora.dora", "true", "--data.engine", "VLLMEngine"), "--data.engine.serve merged"),
    "head": ((*LORA, "--model.lora.target_modules", "[lm_head]"), "names lm_head"),
    "rank": (("--model.lora", "LoRA", "--model.lora.rank", 0), "lora.rank is 0"),
}


@pytest.mark.parametrize("case", CONFIGURATION_ERRORS)
def test_configuration_error_is_reported_before_any_model_is_loaded(
    case: str, fit: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlmt.engines import VLLMEngine
    from rlmt.models import loading

    def forbidden(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_policy", forbidden)
    monkeypatch.setattr(VLLMEngine, "check", lambda self: None)
    options, message = CONFIGURATION_ERRORS[case]
    fit("run", *options, status=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error")]
    assert message in line
