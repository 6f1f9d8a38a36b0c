"""`--model.liger_kernels`: a run binds the kernels to all of its models, or says in one line why it cannot."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlmt.algorithms import PPO
from rlmt.cli import main
from rlmt.modules import SFT, RewardModeling, RLMTModule
from rlmt.rewards import ClassifierReward


def configured(module: Any) -> Any:
    """The module with its models, as at the start of `fit` on a CPU."""
    module._trainer = SimpleNamespace(
        state=SimpleNamespace(fn="fit"),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        precision="32-true",
        datamodule=SimpleNamespace(offline_rollouts=None, attributes=0),
    )
    module.configure_model()
    return module


def has_kernels(decoder: Any) -> bool:
    return all("forward" in vars(layer.mlp) and "forward" in vars(layer.input_layernorm) for layer in decoder.layers)


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("rlmt.modules.base.uses_kernels", lambda option, device: option is None)
    monkeypatch.setattr("rlmt.modules.base.rank_zero_info", lines.append)
    return lines


def test_all_models_of_an_rl_run_have_kernels(tiny: Path, printed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlmt.modules.scoring.RolloutDataModule", SimpleNamespace)
    options: dict[str, Any] = {"reward": ClassifierReward(str(tiny / "reward")), "algorithm": PPO(kl_coef=0.1)}
    run = configured(RLMTModule(str(tiny / "policy"), **options))
    models = (run.policy.model, run.reference.model, run.critic.backbone, run.reward.model.model)
    assert all(map(has_kernels, models)) and len(printed) == 2
    off = configured(RLMTModule(str(tiny / "policy"), liger_kernels=False, **options))
    assert not has_kernels(off.policy.model) and len(printed) == 2


def test_supervised_runs_have_kernels(tiny: Path, printed: list[str]) -> None:
    assert has_kernels(configured(SFT(str(tiny / "policy"), from_scratch=True)).policy.model)
    assert has_kernels(configured(RewardModeling(str(tiny / "reward"))).model.model)
    layers = len(configured(SFT(str(tiny / "policy"))).policy.model.layers)
    assert printed[-1] == f"{3 * layers + 1} norms and MLPs are computed by Liger's kernels (--model.liger_kernels)"


def test_kernels_without_a_gpu_are_refused_before_weights_are_read(
    tiny: Path,
    demonstrations: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlmt.models.liger._installed", lambda: True)
    monkeypatch.setattr("rlmt.models.loading.load_policy", lambda *args: pytest.fail("weights were read"))
    options = {"policy": tiny / "policy", "liger_kernels": "true"}
    words = [word for name, value in options.items() for word in (f"--model.{name}", str(value))]
    words += ["--data.path", str(demonstrations), "--data.max_length", "512", "--data.val_size", "4"]
    words += ["--trainer.default_root_dir", str(tmp_path)]
    assert main(["fit", "--config", "sft", "--config", "think", *words, "--trainer.accelerator", "cpu"]) == 2
    assert "--model.liger_kernels is true, but the run has no GPU" in capsys.readouterr().err
