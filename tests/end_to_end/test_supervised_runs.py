"""SFT and reward modeling through the command line: fit, validate, resume, export, and error lines."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlmt.checkpointing import AtomicCheckpointIO
from rlmt.cli.commands import main
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models import loading, reward_model
from rlmt.models.loading import load_policy, load_tokenizer
from rlmt.modules import sft
from rlmt.rewards import ClassifierReward
from rlmt.types import Prompt, Status

Command = Callable[..., list[str]]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def command(supervised_command: Command) -> Command:
    return supervised_command


def metrics(run: Path, version: int = 0) -> list[dict[str, str]]:
    with (run / f"version_{version}" / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize("form", ["think", "no_think"])
def test_sft_learns_and_exports_a_policy(form: str, command: Command, tmp_path: Path) -> None:
    assert main(command("fit", "sft", "--model.format", form)) == 0
    rows = metrics(tmp_path / "run")
    train = [row for row in rows if "sft/loss" in row]
    assert len(train) == 8
    assert all({"sft/grad_norm", "sft/tokens"} <= row.keys() for row in train)
    validation = [float(row["val/loss"]) for row in rows if "val/loss" in row]
    assert len(validation) == 2 and validation[1] < validation[0] < float(train[0]["sft/loss"])
    last = tmp_path / "run" / "latest" / "checkpoints" / "last.ckpt"
    assert main(command("validate", "sft", "--model.format", form, "--ckpt_path", last)) == 0
    assert main(["export", str(last), str(tmp_path / "model")]) == 0
    assert ThinkingFormat.load(tmp_path / "model").name == form
    weights = torch.load(last, weights_only=True)["state_dict"]
    policy = load_policy(tmp_path / "model", "float32")
    assert all(torch.equal(weights[f"policy.{name}"], value) for name, value in policy.state_dict().items())


def test_reward_model_learns_and_its_export_scores_equally(command: Command, preferences: Path, tmp_path: Path) -> None:
    assert main(command("fit", "reward", "--trainer.max_epochs", 3)) == 0
    rows = metrics(tmp_path / "run")
    assert sum("rm/loss" in row for row in rows) == 12
    *_, last = [row for row in rows if "val/accuracy" in row]
    assert float(last["val/accuracy"]) == 1.0
    assert float(last["val/accuracy/a"]) == float(last["val/accuracy/b"]) == 1.0
    assert {"val/loss", "val/calibration_error"} <= last.keys()
    assert (tmp_path / "run" / "version_0" / "calibration.png").stat().st_size > 10_000

    checkpoint = tmp_path / "run" / "latest" / "checkpoints" / "last.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state["attribute_head.weight"].shape == (2, 64)
    assert main(["export", str(checkpoint), str(tmp_path / "model")]) == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    tokenizer = load_tokenizer(tmp_path / "model")
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["pad_token_id"] == tokenizer.pad_token_id is not None
    assert tokenizer.chat_template

    reward = ClassifierReward(str(tmp_path / "model"))
    reward.load()
    samples = [json.loads(line) for line in preferences.read_text().splitlines()[:6]]
    prompts = [Prompt(i, [{"role": "user", "content": row["prompt"]}]) for i, row in enumerate(samples)] * 2
    responses = [row["chosen"] for row in samples] + [row["rejected"] for row in samples]
    scores = reward.score(prompts, responses, [Status.OK] * 12)
    # The weights of the checkpoint score one conversation at a time, rendered with the policy's template.
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32)
    plain.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        ids = tokenizer.apply_chat_template(
            [*prompt.messages, {"role": "assistant", "content": response}], return_dict=False
        )
        with torch.no_grad():
            assert plain(torch.tensor([ids])).logits.item() == pytest.approx(score.item(), abs=1e-5)
    assert (scores[:6] > scores[6:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["sft", "reward"])
def test_mixed_precision_with_gradient_checkpointing_has_about_the_same_loss(
    config: str, command: Command, tmp_path: Path
) -> None:
    first = []
    for number, options in enumerate(
        [(), ("--trainer.precision", "bf16-mixed", "--model.gradient_checkpointing", "true")]
    ):
        root = ("--trainer.default_root_dir", tmp_path / str(number))
        assert main(command("fit", config, *root, *options, "--trainer.max_steps", 2, "--data.val_size", 0)) == 0
        rows = metrics(tmp_path / str(number))
        first.append([float(row["sft/loss" if config == "sft" else "rm/loss"]) for row in rows])
    assert first[0] != first[1] and first[0] == pytest.approx(first[1], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["sft", "reward"])
def test_resumed_run_equals_the_unbroken_run(
    config: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with a two-part optimizer and a schedule, from a checkpoint within an epoch or at its end."""
    unbroken, name = tmp_path / "unbroken", "sft/loss" if config == "sft" else "rm/loss"
    checkpoint = "{class_path: rlmt.callbacks.PolicyCheckpoint, init_args: {every_n_steps: 2}}"
    (tmp_path / "every_second.yaml").write_text(f"trainer: {{callbacks: [{checkpoint}]}}")
    common = (
        "--config",
        "every_second.yaml",
        "--model.optimizer",
        "MuonAdamW",
        "--model.optimizer.init_args.muon_lr",
        0.01,
    )
    save = AtomicCheckpointIO.save_checkpoint

    def save_and_copy(io: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Path, **options: Any) -> None:
        save(io, checkpoint, path, **options)
        shutil.copytree(Path(path).parent, tmp_path / f"step{checkpoint['global_step']}")

    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", save_and_copy)
        assert main(command("fit", config, *common, "--trainer.default_root_dir", unbroken)) == 0
    expected = [row for row in metrics(unbroken) if name in row]
    assert len(expected) == 8
    for stop in (4, 6):
        run = tmp_path / f"from{stop}"
        start = tmp_path / f"step{stop}" / "last.ckpt"
        assert main(command("fit", config, *common, "--trainer.default_root_dir", run, "--ckpt_path", start)) == 0
        later = [row for row in metrics(run) if name in row]
        assert later == expected[stop:]
        ends = [
            torch.load(folder / "latest" / "checkpoints" / "last.ckpt", weights_only=True) for folder in (unbroken, run)
        ]
        assert ends[0]["lr_schedulers"] == ends[1]["lr_schedulers"]
        assert all(torch.equal(value, ends[1]["state_dict"][key]) for key, value in ends[0]["state_dict"].items())


def error_line(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The only line of error that a failing command prints."""
    capsys.readouterr()
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error: ")]
    return line


@pytest.mark.slow
def test_configuration_errors_are_one_line_and_load_no_model(
    command: Command, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    for module in (loading, reward_model):
        for function in ("load_policy", "random_policy", "load_reward_model"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, never)
    row = {"prompt": "Hi", "response": "Hello"}
    bad = write(tmp_path / "bad.jsonl", [row | {"thought": "greet"}, row | {"thought": " "}])
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "Hi", "chosen": "a", "rejected": "a"}])
    cases = [
        (command("fit", "sft", "--data.path", bad), f"{bad}: line 2: `thought` is empty, but the format requires one"),
        (command("fit", "sft", "--data.max_length", 5), "all 40 demonstrations exceed --data.max_length 5"),
        (command("fit", "sft", "--data.max_length", 5000), "exceeds the model's context of 1,024 tokens"),
        (command("fit", "sft", "--data.batch_size", 33), "has only 32 demonstrations for training"),
        (command("fit", "sft", "--model.prompt_weight", -1), "--model.prompt_weight is -1"),
        (command("fit", "sft", "--trainer.precision", "bf16-true"), "--trainer.precision is bf16-true"),
        (command("fit", "sft", "--model.policy", tiny / "reward"), "holds a LlamaForSequenceClassification"),
        (command("fit", "sft", "--ckpt_path", "nothing.ckpt"), "nothing.ckpt does not exist"),
        (command("fit", "sft", "--trainer.accumulate_grad_batches", 2), "--trainer.accumulate_grad_batches is 2"),
        (command("fit", "sft", "--model.quantization", "NF4"), "add --model.lora LoRA"),
        (command("fit", "sft", "--model.lora", "LoRA", "--model.from_scratch", "true"), "leave one of both out"),
        (command("fit", "reward", "--model.lora", "LoRA", "--model.lora.target_modules", "[score]"), "names score"),
        (command("fit", "reward", "--data.path", pairs), "the responses are equal in all 1 rows"),
        (command("fit", "reward", "--ckpt_path", "nothing.ckpt"), "nothing.ckpt does not exist"),
        (command("fit", "reward", "--data", "SFTDataModule", "--data.path", bad), "trains on PreferenceDataModule"),
        (command("fit", "reward", "--model.centering", "-0.5"), "--model.centering is -0.5"),
        (command("validate", "reward", "--data.val_size", 0), "--data has no validation rows"),
    ]
    for words, message in cases:
        assert message in error_line(capsys, words), message


def test_non_finite_loss_stops_the_run_before_the_optimizer_step(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sft.token_logprobs

    def infinite(*args: Any, **options: Any) -> Any:
        outputs = real(*args, **options)
        outputs.logprobs = outputs.logprobs * float("inf")
        return outputs

    monkeypatch.setattr(sft, "token_logprobs", infinite)
    assert "Stopped before optimizer step 1" in error_line(capsys, command("fit", "sft"))


def test_checkpoints_of_another_module_or_format_are_rejected(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("fit", "sft", "--trainer.max_steps", 1, "--data.val_size", 0)) == 0
    last = tmp_path / "run" / "latest" / "checkpoints" / "last.ckpt"
    line = error_line(capsys, command("fit", "sft", "--model.format", "no_think", "--ckpt_path", last))
    assert "set --model.format to the checkpoint's" in line
    moved = shutil.copy(last, tmp_path / "moved.ckpt")
    line = error_line(capsys, command("validate", "reward", "--ckpt_path", moved))
    assert "is a checkpoint of SFT, and this run trains RewardModeling" in line


def test_calibration_callback_rejects_other_modules(command: Command, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("trainer: {callbacks+: [{class_path: rlmt.callbacks.Calibration}]}")
    with pytest.raises(TypeError, match="differences"):
        main(command("fit", "sft", "--config", "wrong.yaml", "--trainer.max_epochs", 1))
