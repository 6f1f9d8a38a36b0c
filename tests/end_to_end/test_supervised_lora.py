"""SFT and reward models with adapters, end to end: frozen base, checkpoints, exports, and RL from the exports."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel

from rlmt.cli.commands import main
from rlmt.models import loading
from rlmt.models.loading import load_policy
from rlmt.modules import reward_modeling
from rlmt.modules.supervised import SupervisedModule
from rlmt.rewards import ClassifierReward
from rlmt.types import Prompt, Status

pytestmark = pytest.mark.usefixtures("no_plots")
Command = Callable[..., list[str]]
IDS = torch.arange(40, 88).view(2, 24)
LORA = ("--model.lora", "LoRA", "--model.lora.rank", 4, "--model.lora.alpha", 16)
ADAPTERS = {"lora": LORA, "qlora": (*LORA, "--model.quantization", "NF4")}


@pytest.fixture
def fit(supervised_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`fit("sft", *options)` trains and returns the module, its base before training, and the checkpoint."""
    seen: list[tuple[SupervisedModule, dict[str, Tensor]]] = []
    configure = SupervisedModule.configure_optimizers

    def record(module: SupervisedModule) -> Any:
        seen.append((module, {name: t.clone() for name, t in base_weights(module.trained_model).items()}))
        return configure(module)

    monkeypatch.setattr(SupervisedModule, "configure_optimizers", record)

    def run(kind: str, *options: object) -> tuple[Any, dict[str, Tensor], Path]:
        assert main(supervised_command("fit", kind, *options)) == 0
        return *seen[-1], tmp_path / "run" / "latest" / "checkpoints" / "last.ckpt"

    return run


def base_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """All tensors that an adapter must not change, including 4-bit weights and their scales."""
    return {name: t for name, t in model.state_dict().items() if ".lora_" not in name and name != "score.weight"}


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    """Log-probs of a language model or scores of a classifier, by the forward pass of transformers."""
    logits = model(input_ids=IDS).logits.float()
    return logits.log_softmax(-1) if logits.ndim == 3 else logits


def scores(reward: ClassifierReward) -> Tensor:
    words = ("red", "two bees", "a cat")
    prompts = [Prompt(i, [{"role": "user", "content": f"Tell me about {word}."}]) for i, word in enumerate(words)]
    return reward.score(prompts, ["Sure: red", "No one", "A cat is a cat."], [Status.OK] * 3)


def peft_model(kind: str, base: str, adapter: Path, four_bits: bool) -> Any:
    """The adapter folder on its base, loaded with transformers and PEFT only."""
    options: dict[str, Any] = {}
    if four_bits:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    if kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, num_labels=1, **options)
        model.config.pad_token_id = 0
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    return PeftModel.from_pretrained(model, str(adapter)).train()  # in eval mode bitsandbytes may round to bfloat16


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_adapter_is_trained_and_both_exports_equal_the_model(
    kind: str, adapter: str, fit: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    module, base, last = fit(kind, *ADAPTERS[adapter], "--trainer.max_epochs", 1)
    now = base_weights(module.trained_model)
    assert base and all(torch.equal(now[name], tensor) for name, tensor in base.items())
    assert any("absmax" in name for name in base) == (adapter == "qlora")

    saved = torch.load(last, weights_only=True)
    prefix, head = ("policy.", set()) if kind == "sft" else ("model.", {"model.score.weight"})
    heads = head | ({"attribute_head.weight", "attribute_head.bias"} if kind == "reward" else set())
    adapters = {name for name in saved["state_dict"] if ".lora_" in name}
    assert saved["state_dict"].keys() - adapters == heads and len(adapters) == 2 * 2 * 7  # A and B, layers, matrices
    assert all(saved["state_dict"][name].abs().max() > 0 for name in adapters)  # B starts at 0
    assert saved["rlmt"]["adapter"]["r"] == 4 and (saved["rlmt"]["quantization"] is None) == (adapter == "lora")

    assert main(["export", str(last), str(tmp_path / "merged")]) == 0
    assert main(["export", str(last), str(tmp_path / "adapter"), "--what", "adapter"]) == 0
    auto: Any = AutoModelForCausalLM if kind == "sft" else AutoModelForSequenceClassification
    merged, info = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected, start = outputs(module.trained_model), load_policy(tiny / "policy", "float32")
    with_adapter = outputs(peft_model(kind, str(tiny / "policy"), tmp_path / "adapter", adapter == "qlora"))
    moved = module.trained_model.base_model(IDS).last_hidden_state - start.base_model(IDS).last_hidden_state
    assert moved.abs().max() > 0.05
    assert (outputs(merged) - expected).abs().max() < 1e-3
    assert (with_adapter - expected).abs().max() < 1e-3
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        named = {name.removeprefix("base_model.model.") for name in file.keys()}  # noqa: SIM118
    assert len(named) == len(adapters) + len(head)
    if kind == "reward":
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
        exported, trained = ClassifierReward(str(tmp_path / "merged")), ClassifierReward(str(tmp_path / "merged"))
        exported.load()
        trained.check()
        trained.model = module.trained_model
        assert (scores(exported) - scores(trained)).abs().max() < 1e-3


@pytest.mark.slow
def test_high_rank_adapter_and_all_parameters_both_learn(fit: Callable[..., Any], tmp_path: Path) -> None:
    """A rank of the model's width does not restrict the layers' update; embeddings and head are frozen."""
    ends = []
    for options in ((), ("--model.lora", "LoRA", "--model.lora.rank", 64, "--model.lora.alpha", 256)):
        fit("sft", *options, "--trainer.max_epochs", 4)
        file = max((tmp_path / "run").glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
        rows = list(csv.DictReader(file.open()))
        losses = [float(row["sft/loss"]) for row in rows if row["sft/loss"]]
        ends.append((losses[0], [float(row["val/loss"]) for row in rows if row["val/loss"]][-1]))
    (start, full), (same, adapted) = ends
    assert same == pytest.approx(start, rel=1e-5)
    assert full < 0.95 * start and adapted < 0.95 * start, ends


def never(*args: Any, **options: Any) -> None:
    raise AssertionError("a model was loaded")


@pytest.mark.slow
def test_resumed_run_equals_the_unbroken_run_and_rl_starts_from_both_exports(
    supervised_command: Command,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SFT in 4 bits with dropout and 8-bit optimizer moments, and a reward model with DoRA."""
    options: dict[str, tuple[object, ...]] = {
        "sft": (*ADAPTERS["qlora"], "--model.lora.dropout", 0.1, "--model.optimizer", "bitsandbytes.optim.AdamW8bit"),
        "reward": (*LORA, "--model.lora.dora", "true"),
    }
    for kind, own in options.items():

        def train(name: str, steps: int, *more: object, kind: str = kind, own: tuple[object, ...] = own) -> int:
            run = ("--trainer.default_root_dir", tmp_path / kind / name, "--trainer.max_steps", steps)
            common = ("--model.scheduler", "null", "--data.val_size", 0, "--trainer.max_epochs", -1)
            return main(supervised_command("fit", kind, *common, *own, *run, *more))

        assert train("unbroken", 4) == train("broken", 2) == train("broken", 4, "--ckpt_path", "last") == 0
        files = [tmp_path / kind / name / "latest" / "checkpoints" / "last.ckpt" for name in ("unbroken", "broken")]
        unbroken, broken = (torch.load(file, weights_only=True)["state_dict"] for file in files)
        assert unbroken.keys() == broken.keys()
        assert all(torch.equal(t, broken[name]) for name, t in unbroken.items())
        assert main(["export", str(files[0]), str(tmp_path / kind / "model")]) == 0

        with monkeypatch.context() as patch:
            patch.setattr(loading, "load_policy", never)
            patch.setattr(reward_modeling, "load_reward_model", never)
            for changed in (("--model.lora.rank", 3), ("--model.lora", "null", "--model.quantization", "null")):
                capsys.readouterr()
                assert train("broken", 5, "--ckpt_path", "last", *changed) == 2
                (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("rlmt: error")]
                assert ("lora r 4, this run 3" if changed[1] == 3 else "holds a LoRA adapter") in line

    rl = {
        "--model.policy": tmp_path / "sft" / "model",
        "--model.reward.model": tmp_path / "reward" / "model",
        "--data.prompts": prompts_file,
        "--data.engine": "TransformersEngine",
        "--data.batch_size": 4,
        "--data.max_prompt_tokens": 256,
        "--data.max_new_tokens": 8,
        "--data.val_size": 0,
        "--trainer.max_steps": 1,
        "--trainer.default_root_dir": tmp_path / "rl",
        "--trainer.enable_progress_bar": "false",
    }
    words = [str(word) for pair in rl.items() for word in pair]
    configs = [word for name in ("base", "grpo", "tiny", "no_think") for word in ("--config", name)]
    assert main(["fit", *configs, *words, *map(str, LORA)]) == 0
    with (tmp_path / "rl" / "version_0" / "metrics.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row["reward/mean"]]
    assert float(row["engine/mismatch_max"]) < 1e-3 and float(row["reward/group_std"]) > 0
