"""PPO through the command line: the algorithm option, critic warm-up, checkpoints with a critic, and error lines."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlmt.cli.commands import main
from rlmt.models import loading
from rlmt.modules import RLMTModule

pytestmark = pytest.mark.usefixtures("no_plots")
Command = Callable[..., list[str]]


@pytest.fixture
def command(tiny: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`command("fit", "--data.x", "1")`: arguments of a PPO run on tiny models, in an empty folder, without vLLM.

    The configs are those of GRPO; only `--model.algorithm` differs.
    """
    monkeypatch.chdir(tmp_path)

    def arguments(name: str, *more: object, algorithm: str = "PPO") -> list[str]:
        options = {
            "--model.algorithm": algorithm,
            "--model.format": "no_think",
            "--model.policy": tiny / "policy",
            "--model.reward.model": tiny / "reward",
            "--data.prompts": prompts_file,
            "--data.engine": "TransformersEngine",
            "--data.batch_size": 4,
            "--data.group_size": 2,
            "--data.max_prompt_tokens": 256,
            "--data.max_new_tokens": 12,
            "--data.val_size": 4,
            "--trainer.max_steps": 2,
            "--trainer.default_root_dir": tmp_path / "run",
            "--trainer.enable_progress_bar": "false",
        }
        flat = [str(word) for pair in options.items() for word in pair]
        configs = [word for name in ("base", "grpo", "tiny") for word in ("--config", name)]
        return [name, *configs, *flat, *map(str, more)]

    return arguments


def steps(run: Path, version: int = 0) -> list[dict[str, str]]:
    """The logged metrics of each step."""
    with (run / f"version_{version}" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("reward/mean")]
    return [{name: value for name, value in row.items() if value} for row in rows]


def weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run / "latest" / "checkpoints" / "last.ckpt", weights_only=True)[
        "state_dict"
    ]
    return state


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line of error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.slow
def test_checkpoint_with_a_critic_validates_predicts_exports_and_names_conflicts(
    command: Command, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, last = tmp_path / "run", tmp_path / "run" / "latest" / "checkpoints" / "last.ckpt"
    assert main(command("fit", "--data.group_size", 1)) == 0
    for row in steps(run):
        assert {"critic/loss", "critic/clip_frac", "critic/explained_variance", "critic/grad_norm"} <= row.keys()
    names = weights(run).keys()
    assert {"policy.lm_head.weight", "critic.head.weight", "critic.backbone.norm.weight"} <= names
    assert "critic.backbone.lm_head.weight" not in names

    assert main(command("validate", "--ckpt_path", last)) == 0  # builds no critic
    assert main(command("predict", "--ckpt_path", last, algorithm="GRPO")) == 0
    assert main(["export", str(last), str(tmp_path / "model")]) == 0
    assert (
        load_file(tmp_path / "model" / "model.safetensors").keys()
        == load_file(tiny / "policy" / "model.safetensors").keys()
    )

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
        assert main(command("fit", "--ckpt_path", last, algorithm="GRPO")) == 2
    assert "holds a critic" in (message := error_line(capsys)) and "GRPO trains none" in message
    assert main(command("fit", "--ckpt_path", last, "--model.algorithm.critic_shared", "true")) == 2
    assert "critic is another one" in (message := error_line(capsys)) and "critic_shared" in message
    other = ("--trainer.default_root_dir", tmp_path / "grpo")
    assert main(command("fit", *other, "--trainer.max_steps", 1, algorithm="GRPO")) == 0
    assert main(command("fit", *other, "--ckpt_path", tmp_path / "grpo/latest/checkpoints/last.ckpt")) == 2
    assert "holds no critic" in (message := error_line(capsys)) and "PPO trains one" in message


@pytest.mark.slow
@pytest.mark.parametrize("four_bits", [False, True], ids=["LoRA", "QLoRA"])
def test_critic_adapter_shares_the_frozen_base_of_the_policy(
    four_bits: bool, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both adapters change and the base does not; the engine samples the policy; only the policy is exported."""
    seen: list[tuple[RLMTModule, dict[str, torch.Tensor]]] = []
    setup = RLMTModule.configure_optimizers

    def base(module: RLMTModule) -> dict[str, torch.Tensor]:
        assert module.policy is not None
        return {name: tensor for name, tensor in module.policy.state_dict().items() if ".lora_" not in name}

    def record(module: RLMTModule) -> Any:
        seen.append((module, {name: tensor.clone() for name, tensor in base(module).items()}))
        return setup(module)

    monkeypatch.setattr(RLMTModule, "configure_optimizers", record)
    options = ["--model.lora", "LoRA", "--model.algorithm.critic_shared", "true", "--model.algorithm.critic_lr", "1e-3"]
    options += ["--model.quantization", "NF4"] if four_bits else []
    assert main(command("fit", *options, "--data.val_size", 0)) == 0
    ((module, before),) = seen
    assert all(torch.equal(tensor, before[name]) for name, tensor in base(module).items())
    assert any("absmax" in name for name in before) == four_bits
    first, second = steps(tmp_path / "run")
    assert float(second["engine/mismatch_max"]) < 1e-3
    assert float(first["critic/loss"]) > 0 and float(second["policy/kl"]) > 0

    run, last = tmp_path / "run", tmp_path / "run" / "latest" / "checkpoints" / "last.ckpt"
    state = weights(run)
    ups = {name: tensor for name, tensor in state.items() if ".lora_B." in name}
    assert sum(".critic." in name for name in ups) == sum(".default." in name for name in ups) == 2 * 7
    assert all(tensor.abs().max() > 0 for tensor in ups.values())  # all start at 0
    assert all(".lora_" in name or name.startswith("critic.head.") for name in state)
    assert main(command("fit", *options, "--data.val_size", 0, "--ckpt_path", last, "--trainer.max_steps", 3)) == 0
    assert main(["export", str(last), str(tmp_path / "adapter"), "--what", "adapter"]) == 0
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(exported) == 2 * 2 * 7 and not any("critic" in name for name in exported)


@pytest.mark.slow
def test_policy_is_unchanged_during_critic_warm_up(command: Command, tmp_path: Path, tiny: Path) -> None:
    """Two updates per rollout and three of warm-up: the policy first changes in the second update of rollout two."""
    options = ("--model.algorithm.critic_warmup_steps", 3, "--model.algorithm.update_epochs", 2)
    for shared in ("true", "false"):
        run = tmp_path / shared
        root = ("--trainer.default_root_dir", run, "--model.algorithm.critic_shared", shared)
        assert main(command("fit", *options, *root, "--trainer.max_steps", 2)) == 0
        start = load_file(tiny / "policy" / "model.safetensors")
        state = weights(run)
        assert state["critic.head.weight"].abs().sum() > 0
        assert all(torch.equal(state[f"policy.{name}"], weight) for name, weight in start.items())
        resumed = (*options, *root, "--trainer.max_steps", 6, "--ckpt_path", "last")
        assert main(command("fit", *resumed)) == 0
        assert not any(torch.equal(weights(run)[f"policy.{name}"], weight) for name, weight in start.items())
        first, second, third = steps(run)
        versions = [float(row["engine/weight_version"]) for row in (first, second, third)]
        assert versions == [0, 0, 1]
        assert "policy/loss" not in first and "policy/loss" in second


@pytest.mark.slow
def test_resumed_run_equals_the_unbroken_run(command: Command, tmp_path: Path) -> None:
    """Bit for bit, including the critic and the adaptive KL coefficient."""
    algorithm = {"lam": 0.9, "kl_placement": "reward", "kl_coef": 0.1, "target_kl": 0.05, "kl_horizon": 20}
    algorithm |= {"minibatches": 2, "critic_lr": 1e-3}
    common = [word for name, value in algorithm.items() for word in (f"--model.algorithm.{name}", value)]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert main(command("fit", *common, "--trainer.default_root_dir", unbroken, "--trainer.max_steps", 10)) == 0
    root = ("--trainer.default_root_dir", broken)
    assert main(command("fit", *common, *root, "--trainer.max_steps", 4)) == 0
    assert main(command("fit", *common, *root, "--trainer.max_steps", 10, "--ckpt_path", "last")) == 0
    expected, resumed = (
        [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in steps(run)]
        for run in (unbroken, broken)
    )
    assert len(expected) == 5
    assert resumed == expected
    assert len({row["policy/kl_coef"] for row in expected}) == 5
    ends = [weights(run) for run in (unbroken, broken)]
    assert ends[0].keys() == ends[1].keys() and any(name.startswith("critic.") for name in ends[0])
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


def test_bf16_mixed_and_gradient_checkpointing_train_the_critic_in_float32(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RLMTModule] = []
    setup = RLMTModule.configure_optimizers

    def record(module: RLMTModule) -> Any:
        seen.append(module)
        return setup(module)

    monkeypatch.setattr(RLMTModule, "configure_optimizers", record)
    options = ("--trainer.precision", "bf16-mixed", "--model.gradient_checkpointing", "true")
    assert main(command("fit", *options, "--trainer.max_steps", 1)) == 0
    (module,) = seen
    assert module.critic is not None and module.critic.backbone.is_gradient_checkpointing
    assert {p.dtype for p in module.critic.parameters()} == {torch.float32}
    groups = module.trainer.optimizers[0].param_groups
    assert [group["lr"] for group in groups] == [3e-4, 1e-5]
    (row,) = steps(tmp_path / "run")
    assert float(row["critic/loss"]) > 0 and float(row["policy/grad_norm"]) > 0


CONFIGURATION_ERRORS = {
    "no such reward model": (["--model.algorithm.critic_init", "./nowhere"], ["critic_init", "nowhere"]),
    "another tokenizer": (["--model.algorithm.critic_init", "REWARD"], ["critic_init", "tokenizer"]),
    "out of range": (["--model.algorithm.gamma", "2"], ["--model.algorithm.gamma"]),
    "unknown key": (["--model.algorithm.normalize_std", "true"], ["normalize_std", "PPO"]),
}


@pytest.mark.parametrize("case", CONFIGURATION_ERRORS)
def test_configuration_error_is_one_line_before_any_model_is_loaded(
    case: str, command: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_policy", load)
    options, named = CONFIGURATION_ERRORS[case]
    assert main(command("fit", *(str(tiny / "reward") if word == "REWARD" else word for word in options))) == 2
    message = error_line(capsys)
    assert all(word in message for word in named), message
