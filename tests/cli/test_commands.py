"""The commands as a user types them: runs, composed configs and one-line errors."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from rlmt.cli.commands import main, resolve_configs
from rlmt.models import loading
from rlmt.modules import RLMTModule

BASE = ["--config", "configs/base.yaml", "--config", "configs/grpo.yaml", "--config", "configs/tiny.yaml"]
Command = Callable[..., list[str]]


@pytest.fixture
def command(tiny: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`command("fit", "--data.x", "1")` makes arguments of a run on tiny models in an empty folder, without vLLM."""
    monkeypatch.chdir(tmp_path)

    def arguments(name: str, *more: object) -> list[str]:
        options = {
            "--model.policy": tiny / "policy",
            "--model.reward.model": tiny / "reward",
            "--data.prompts": prompts_file,
            "--data.engine": "TransformersEngine",
            "--data.batch_size": 4,
            "--data.group_size": 4,
            "--data.max_prompt_tokens": 256,
            "--data.max_new_tokens": 12,
            "--data.val_size": 4,
            "--trainer.max_steps": 2,
            "--trainer.default_root_dir": tmp_path / "run",
            "--trainer.enable_progress_bar": "false",
        }
        flat = [str(word) for pair in options.items() for word in pair]
        return [name, *BASE, *flat, *map(str, more)]

    return arguments


def metrics(run: Path, version: int = 0) -> list[dict[str, str]]:
    with (run / f"version_{version}" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_fit_resume_validate_predict_and_export(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(command("fit", "--model.format", "no_think")) == 0
    rows = [row for row in metrics(run) if row.get("reward/mean")]
    assert len(rows) == 2
    for name in ("length/response_mean", "policy/kl", "engine/mismatch_kl", "engine/weight_version", "time/rollout_s"):
        assert all(row[name] for row in rows), name
    assert [float(row["engine/weight_version"]) for row in rows] == [0.0, 1.0]
    assert (run / "version_0" / "curves.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert f"files     {run / 'version_0'}: metrics.csv, curves.png" in printed
    assert f"next      rlmt chat {run / 'version_0' / 'checkpoints' / 'last.ckpt'}" in printed
    saved = yaml.safe_load((run / "version_0" / "config.yaml").read_text())
    assert saved["model"]["init_args"]["format"] == "no_think"

    last = run / "latest" / "checkpoints" / "last.ckpt"
    thinking_format = json.loads((run / "latest" / "checkpoints" / "policy" / "thinking_format.json").read_text())
    assert thinking_format["name"] == "no_think"

    resumed = command("fit", "--model.format", "no_think", "--trainer.max_steps", 3, "--ckpt_path", "last")
    assert main(resumed) == 0
    rows = [row for row in metrics(run) if row.get("reward/mean")]  # a resumed run appends to the same file
    assert [float(row["engine/weight_version"]) for row in rows] == [0.0, 1.0, 2.0]

    for name in ("validate", "test"):
        assert main(command(name, "--model.format", "no_think", "--ckpt_path", last)) == 0
        assert ("val" if name == "validate" else "test") + "/reward_mean" in capsys.readouterr().out
    assert main(command("predict", "--model.format", "no_think", "--ckpt_path", last)) == 0
    assert list(run.rglob("predictions.parquet"))

    assert main(["export", str(last), str(tmp_path / "model")]) == 0
    assert loading.load_policy(str(tmp_path / "model"), "float32").num_parameters() > 0


RESUMED: dict[str, tuple[object, ...]] = {
    "GRPO": ("--model.algorithm.minibatches", 2, "--model.scheduler", "LinearLR"),
    "DPO": (
        *("--model.algorithm", "DPO", "--model.algorithm.min_valid", 2, "--model.algorithm.minibatches", 2),
        *("--model.scheduler", "CosineWithWarmup", "--model.scheduler.steps", 14),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("objective", RESUMED)
def test_resumed_run_equals_uninterrupted_run(objective: str, command: Command, tmp_path: Path) -> None:
    """Bit for bit: prompts, samples, rewards and weights of updates 4 to 7, across the end of an epoch (5 steps)."""
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    common = ("--model.format", "no_think", *RESUMED[objective])
    assert main(command("fit", *common, "--trainer.default_root_dir", uninterrupted, "--trainer.max_steps", 14)) == 0
    folder = ("--trainer.default_root_dir", interrupted)
    assert main(command("fit", *common, *folder, "--trainer.max_steps", 6)) == 0
    assert main(command("fit", *common, *folder, "--trainer.max_steps", 14, "--ckpt_path", "last")) == 0
    expected, resumed = (
        [{k: v for k, v in row.items() if v and not k.startswith(("time/", "perf/"))} for row in metrics(run)]
        for run in (uninterrupted, interrupted)
    )
    updates = [row for row in expected if "reward/mean" in row and float(row["policy/skipped"]) == 0]
    assert len(updates) == 7  # two optimizer steps each; a batch without a pair takes none
    assert any(float(row.get("dpo/pairs", 0)) > 0 for row in expected) == (objective == "DPO")
    assert resumed == expected
    ends = [
        torch.load(run / "latest" / "checkpoints" / "last.ckpt", weights_only=True)
        for run in (uninterrupted, interrupted)
    ]
    for name, tensor in ends[0]["state_dict"].items():
        assert torch.equal(tensor, ends[1]["state_dict"][name]), name


def test_learning_rate_is_zero_after_the_last_step(command: Command, tmp_path: Path) -> None:
    dpo = ("--model.algorithm", "DPO", "--model.algorithm.min_valid", 2, "--model.algorithm.update_epochs", 2)
    assert main(command("fit", *dpo, "--model.scheduler", "CosineWithWarmup", "--trainer.max_steps", 4)) == 0
    (schedule,) = torch.load(tmp_path / "run" / "latest" / "checkpoints" / "last.ckpt", weights_only=True)[
        "lr_schedulers"
    ]
    assert (schedule["last_epoch"], schedule["_last_lr"]) == (4, [0.0])


@pytest.mark.parametrize("mode", ["null", "penalty"])
def test_malformed_null_is_the_mode_named_null(mode: str, command: Command, tmp_path: Path) -> None:
    """YAML reads a bare null as None, which must select the mode all the same."""
    options = ("--model.malformed", mode, "--trainer.max_steps", 1, "--model.malformed_reward", -77)
    assert main(command("fit", *options)) == 0
    (row,) = [row for row in metrics(tmp_path / "run") if row.get("reward/mean")]
    assert float(row["reward/malformed"]) > 0
    assert (float(row["reward/mean"]) > -5) == (mode == "null")


def test_last_checkpoint_holds_the_last_step(command: Command, tmp_path: Path) -> None:
    callback = "{class_path: rlmt.callbacks.PolicyCheckpoint, init_args: {every_n_steps: 2}}"
    (tmp_path / "often.yaml").write_text(f"trainer: {{callbacks: [{callback}]}}")
    options = ("--model.format", "no_think", "--config", "often.yaml", "--trainer.max_steps", 3)
    assert main(command("fit", *options)) == 0
    (saved,) = (tmp_path / "run" / "latest" / "checkpoints").glob("*.ckpt")
    assert saved.name == "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 3


def test_non_finite_gradients_skip_steps_and_then_stop_the_run(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlmt.algorithms import advantages, grpo

    calls: list[int] = []

    def sometimes_nan(*args: Any) -> torch.Tensor:
        calls.append(1)
        good = advantages.group_advantages(*args)
        return good if len(calls) == 3 else good * float("nan")

    monkeypatch.setattr(grpo, "group_advantages", sometimes_nan)
    options = ("--model.format", "no_think", "--model.max_skipped", 3, "--trainer.max_steps", 9)
    assert main(command("fit", *options)) == 2
    assert "3 consecutive skipped optimizer steps" in (message := one_line(capsys)) and "nan" in message
    rows = [row for row in metrics(tmp_path / "run") if row.get("reward/mean")]
    # Two steps are skipped, one is taken, then three are skipped; the last one stops the run before it is logged.
    assert [row["policy/skipped"] for row in rows] == ["1.0", "1.0", "0.0", "1.0", "1.0"]
    assert [float(row["engine/weight_version"]) for row in rows] == [0, 0, 0, 1, 1]


def test_bf16_mixed_keeps_what_is_trained_in_float32(command: Command, tmp_path: Path) -> None:
    seen: list[RLMTModule] = []
    original = RLMTModule.configure_optimizers

    def record(module: RLMTModule) -> Any:
        seen.append(module)
        return original(module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RLMTModule, "configure_optimizers", record)
        options = ("--trainer.precision", "bf16-mixed", "--model.format", "no_think", "--trainer.max_steps", 1)
        assert main(command("fit", *options)) == 0
    (module,) = seen
    linear = {p for layer in module.reference.modules() if isinstance(layer, nn.Linear) for p in layer.parameters()}
    assert {p.dtype for p in linear} == {torch.bfloat16}  # autocast would round them at every use
    others = [t for t in [*module.parameters(), *module.buffers()] if t not in linear and t.is_floating_point()]
    assert {t.dtype for t in others} == {torch.float32}
    assert module.compute_dtype is torch.bfloat16
    (row,) = [row for row in metrics(tmp_path / "run") if row.get("reward/mean")]
    assert float(row["policy/kl"]) == 0.0  # policy and reference are the same function
    assert float(row["engine/mismatch_max"]) < 0.05


def test_checkpoint_of_another_format_is_an_error(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("fit", "--model.format", "no_think", "--trainer.max_steps", 1)) == 0
    capsys.readouterr()
    forbid_loading(monkeypatch)
    last = tmp_path / "run" / "latest" / "checkpoints" / "last.ckpt"
    assert main(command("fit", "--model.format", "think", "--ckpt_path", last)) == 2
    message = one_line(capsys)
    assert "last.ckpt" in message and "no_think" in message and "--model.format" in message


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the test fail when a policy's weights are loaded."""

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_policy", load)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only error line on stderr."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error")]
    assert len(lines) == 1
    return lines[0]


BAD = {
    "unknown key": (["--model.typo", "1"], ["--model.typo", "RLMTModule"]),
    "unknown nested key": (["--model.algorithm.clip_hihg", "1"], ["clip_hihg", "GRPO"]),
    "unknown option": (["--trainr.max_steps", "1"], ["--trainr.max_steps"]),
    "wrong type": (["--trainer.max_steps", "many"], ["--trainer.max_steps", "many"]),
    "unknown format": (["--model.format", "thinking"], ["--model.format", "zero_think"]),
    "missing config": (["--config", "nowhere.yaml"], ["nowhere.yaml", "grpo"]),
    "missing prompts": (["--data.prompts", "nowhere.jsonl"], ["nowhere.jsonl"]),
    "unknown column": (["--data.column", "question"], ["question", "prompt"]),
    "missing policy": (["--model.policy", "runs/tiny/policy"], ["runs/tiny/policy", "rlmt tiny"]),
    "missing reward": (["--model.reward.model", "runs/tiny/reward"], ["runs/tiny/reward", "rlmt tiny"]),
    "group of one": (["--data.group_size", "1"], ["--data.group_size", "standard deviation"]),
    "group without pairs": (["--model.algorithm", "DPO", "--data.group_size", "3"], ["--data.group_size", "min_valid"]),
    "minibatches": (["--model.algorithm.minibatches", "3"], ["--model.algorithm.minibatches", "--data.batch_size"]),
    "precision": (["--trainer.precision", "bf16-true"], ["--trainer.precision", "bf16-mixed"]),
    "score not finite": (["--model.malformed_reward", ".nan"], ["--model.malformed_reward"]),
    "missing checkpoint": (["--ckpt_path", "nowhere.ckpt"], ["nowhere.ckpt"]),
    "context": (["--data.max_new_tokens", "100000"], ["--data.max_prompt_tokens", "--data.max_new_tokens", "context"]),
    "gradient accumulation": (["--trainer.accumulate_grad_batches", "2"], ["accumulate_grad", "--data.batch_size"]),
    "gradient clipping": (["--trainer.gradient_clip_val", "1"], ["gradient_clip_val", "--model.max_grad_norm"]),
    "no vllm": (["--data.engine", "VLLMEngine"], ["vllm", "install"]),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_option_is_one_line_before_any_model_is_loaded(
    case: str, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find_spec(name, *rest)
    )
    forbid_loading(monkeypatch)
    options, expected = BAD[case]
    assert main(command("fit", *options)) == 2
    message = one_line(capsys)
    assert all(part in message for part in expected), message


def test_unsuitable_model_is_an_error_before_any_is_loaded(
    command: Command,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forbid_loading(monkeypatch)
    two_labels = Path(shutil.copytree(tiny / "reward", tmp_path / "two_labels"))
    config = json.loads((two_labels / "config.json").read_text())
    config |= {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    (two_labels / "config.json").write_text(json.dumps(config))
    assert main(command("fit", "--model.reward.model", two_labels)) == 2
    message = one_line(capsys)
    assert "two_labels" in message and "2 outputs" in message and "num_labels" in message

    no_template = Path(shutil.copytree(tiny / "policy", tmp_path / "no_template"))
    (no_template / "chat_template.jinja").unlink()
    assert main(command("fit", "--model.policy", no_template)) == 2
    message = one_line(capsys)
    assert "no_template" in message and "chat template" in message and "zero_think" in message


def test_error_in_config_file_names_the_key(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("model: {init_args: {algorithm: {init_args: {kl_koef: 1}}}}")
    assert main(command("fit", "--config", "mine.yaml")) == 2
    assert "--model.algorithm.kl_koef" in one_line(capsys)


def test_truncated_checkpoint_is_an_error_before_any_model_is_loaded(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "truncated.ckpt").write_bytes(b"PK\x03\x04 truncated")
    forbid_loading(monkeypatch)
    assert main(command("fit", "--ckpt_path", tmp_path / "truncated.ckpt")) == 2
    assert "truncated.ckpt" in one_line(capsys)


def test_unknown_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert "'train'" in one_line(capsys)


def test_shipped_configs_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = resolve_configs(["--config", "grpo", "--config=configs/base.yaml", "--x", "--config"])
    assert [Path(word.removeprefix("--config=")).name for word in short] == [
        "--config",
        "grpo.yaml",
        "base.yaml",
        "--x",
        "--config",
    ]
    assert Path(short[1]).is_file()
    (tmp_path / "grpo").write_text("{}")
    assert resolve_configs(["-c", "grpo"]) == ["-c", "grpo"]
