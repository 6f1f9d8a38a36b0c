"""`rlmt plan`: from the options of a run to its budget, with nothing loaded."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel, Qwen2Config

from rlmt.algorithms import GRPO
from rlmt.algorithms.base import CriticOptions
from rlmt.cli.commands import main
from rlmt.data import RolloutDataModule
from rlmt.engines import TransformersEngine, VLLMEngine
from rlmt.errors import UserError
from rlmt.memory.budget import CONTEXT, GIB, VLLM_REST, Budget, _add_engine, make_budget
from rlmt.memory.bytes import Devices
from rlmt.models import LoRA
from rlmt.models.loading import load_policy
from rlmt.modules import RLMTModule
from rlmt.rewards import ClassifierReward

LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}
QWEN_1_5B: dict[str, Any] = {
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
LINEAR = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
"""Weights of its linear layers but the head."""
ALL = LINEAR + 2 * 128256 * 4096 + 65 * 4096
ADAPTER = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
"""Of rank 16 on all of them."""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with a config.json and nothing else: policy/, reward/."""
    root = tmp_path_factory.mktemp("shapes")
    LlamaConfig(**LLAMA_8B, architectures=["LlamaForCausalLM"]).save_pretrained(root / "policy")
    LlamaConfig(**LLAMA_8B, num_labels=1).save_pretrained(root / "reward")
    assert [file.name for file in (root / "policy").iterdir()] == ["config.json"]
    return root


def nf4(weights: int) -> float:
    """Bytes under double quantisation: half a byte a weight, a byte for 64, four for 64 × 256."""
    return weights * (1 / 2 + 1 / 64 + 4 / 64 / 256)


def parts(budget: Budget) -> dict[str, Any]:
    """The lines of a budget by their first words."""
    return {re.sub(r" \(.*", "", part.name): part for part in budget.parts}


def qlora(shapes: Path, **engine: Any) -> tuple[RLMTModule, RolloutDataModule]:
    """What configs/qlora.yaml asks for, on shapes of 8B."""
    reward = ClassifierReward(str(shapes / "reward"), dtype="bfloat16", tokens_per_batch=8192)
    import bitsandbytes

    module = RLMTModule(
        str(shapes / "policy"),
        reward,
        GRPO(),
        optimizer=bitsandbytes.optim.PagedAdamW8bit,
        gradient_checkpointing=True,
        tokens_per_micro_batch=8192,
    )
    for owner, name, value in (
        (module, "lora", LoRA(rank=16, alpha=32)),
        (module, "quantization", SimpleNamespace(double_quant=True)),
        (reward, "quantization", SimpleNamespace(double_quant=True)),
    ):
        setattr(owner, name, value)
    made = VLLMEngine(gpu_memory_utilization=engine.pop("share", 0.52))
    made.quantization = engine.pop("quantization", "fp8_per_channel")  # type: ignore[attr-defined]
    return module, RolloutDataModule("prompts.jsonl", made, **engine)


def test_an_8b_policy_and_an_8b_reward_model_in_24_gb_by_hand(shapes: Path) -> None:
    module, data = qlora(shapes)
    budget = make_budget(module, data, torch.bfloat16, 24 * GIB)
    found = parts(budget)
    whole = 2 * (ALL - LINEAR)  # embeddings, head and norms in bfloat16
    assert found["policy weights"].update == pytest.approx(nf4(LINEAR) + whole, rel=0.001)
    assert found["reward weights"].update == pytest.approx(nf4(LINEAR) + whole - 2 * 128256 * 4096, rel=0.001)
    assert found["LoRA adapter"].rollout == found["gradients"].update == 4 * ADAPTER
    assert found["gradients"].rollout == 0
    assert found["optimizer states"].reward == pytest.approx(ADAPTER * (2 + 8 / 256), rel=0.001)
    assert "reference weights" not in found and "critic weights" not in found
    # Two samples of 4,096 tokens: their inputs to each of 32 checkpointed layers, in bfloat16, and the last layer's.
    assert found["activations"].update == pytest.approx(32 * 8192 * 4096 * 2, rel=0.1)
    assert found["logits chunk"].update == pytest.approx(2**25 * 10, rel=0.01)
    engine = LINEAR + whole + 2 * ADAPTER
    assert found["vLLM weights"].rollout == pytest.approx(engine, rel=1e-6) and found["vLLM weights"].update == 0
    granted = 0.52 * 24 * GIB - found["vLLM weights"].rollout - VLLM_REST
    assert found["vLLM KV cache"].rollout == pytest.approx(granted, abs=1)
    assert f"{int(granted // (128 * 1024)):,} tokens" in budget.remarks[0]  # of 128 KiB each
    assert found["CUDA context"].reward == CONTEXT
    assert budget.fits and budget.peak == "rollout"
    assert budget.total("rollout") < 23.5 * GIB


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two of the 32 layers of `shapes`."""
    root = tmp_path_factory.mktemp("two-layers")
    short = LLAMA_8B | {"num_hidden_layers": 2}
    LlamaConfig(**short, architectures=["LlamaForCausalLM"]).save_pretrained(root / "policy")
    LlamaConfig(**short, num_labels=1).save_pretrained(root / "reward")
    return root


def test_held_out_rewards_are_held_as_well(two_layers: Path) -> None:
    module, data = qlora(two_layers)
    before = make_budget(module, data, torch.bfloat16, 24 * GIB)
    judge = ClassifierReward(str(two_layers / "reward"), dtype="bfloat16", tokens_per_batch=8192, name="judge")
    module.held_out.rewards.append(judge)
    budget = make_budget(module, data, torch.bfloat16, 24 * GIB)
    # In bfloat16, with a score head in the place of the output projection.
    whole = 2 * (LINEAR // 16 + 128256 * 4096 + 6 * 4096)
    assert parts(budget)["held-out reward weights"].rollout == pytest.approx(whole, rel=0.001)
    for phase in ("rollout", "reward", "update"):
        assert budget.total(phase) - before.total(phase) == pytest.approx(whole, rel=0.001)


def test_a_critic_beside_a_policy_in_4_bits(two_layers: Path) -> None:
    """A copy of it is in 4 bits with an adapter of its own; on the same base it is an adapter alone."""
    module, data = qlora(two_layers)
    linear, adapter = LINEAR // 16, ADAPTER // 16
    sizes = {}
    for name, init, shared in (("copy", "policy", False), ("shared", "policy", True), ("other", "reward", False)):
        init = init if init == "policy" else str(two_layers / init)
        module.algorithm.critic = CriticOptions(init=init, lr=1e-5, shared=shared, warmup_steps=0)
        found = parts(make_budget(module, data, torch.bfloat16, 80 * GIB))
        sizes[name] = found["critic weights"].update
        assert found["gradients"].update == 4 * (2 * adapter + 4097), name
    rest = 2 * (128256 * 4096 + 5 * 4096)  # embeddings and norms in bfloat16, and no output projection
    assert sizes["copy"] == pytest.approx(nf4(linear) + rest + sizes["shared"], rel=0.001)
    assert sizes["shared"] == 4 * (adapter + 4097)  # and its head
    assert sizes["other"] == pytest.approx(2 * linear + rest + sizes["shared"], rel=0.001)


def test_vllm_in_16_bits_wants_another_card(shapes: Path) -> None:
    budget = Budget(24 * GIB)
    _add_engine(budget, *qlora(shapes, quantization=None), torch.bfloat16, Devices())
    assert "cannot hold one sample of 5,120 tokens" in budget.problems[0] and not budget.fits
    budget = Budget(48 * GIB)
    _add_engine(budget, *qlora(shapes, quantization=None), torch.bfloat16, Devices())
    assert budget.fits and parts(budget)["vLLM weights"].rollout == pytest.approx(2 * (ALL + ADAPTER), rel=1e-6)
    part, (module, data) = Budget(48 * GIB), qlora(shapes, quantization=None)
    data.engine.tensor_parallel_size = 16  # type: ignore[attr-defined]
    _add_engine(part, module, data, torch.bfloat16, Devices(16))
    assert parts(part)["vLLM weights"].rollout == pytest.approx(2 * (ALL / 16 + ADAPTER), rel=1e-6)
    granted = 0.52 * 48 * GIB - parts(part)["vLLM weights"].rollout - VLLM_REST
    assert f"{int(granted // (16 * 1024)):,} tokens" in part.remarks[0]  # a key-value head of eight, 16 KiB each
    with pytest.raises(UserError, match="quantization awq"):
        _add_engine(budget, *qlora(shapes, quantization="awq"), torch.bfloat16, Devices())


def test_all_parameters_with_a_reference_and_a_critic(tmp_path: Path) -> None:
    small = LLAMA_8B | {"hidden_size": 512, "num_hidden_layers": 2, "intermediate_size": 1024, "vocab_size": 4096}
    LlamaConfig(**small, architectures=["LlamaForCausalLM"], head_dim=64).save_pretrained(tmp_path / "policy")
    size = 2 * 4096 * 512 + 5 * 512 + 2 * (2 * 512 * 2048 + 2 * 512 * 512 + 3 * 512 * 1024)
    LlamaConfig(**small, num_labels=1).save_pretrained(tmp_path / "reward")
    reward = ClassifierReward(str(tmp_path / "reward"))
    module = RLMTModule(str(tmp_path / "policy"), reward, GRPO(), tokens_per_micro_batch=64)
    engine = TransformersEngine(tokens_per_batch=65536)
    data = RolloutDataModule("prompts.jsonl", engine, max_prompt_tokens=32, max_new_tokens=32)
    found = parts(make_budget(module, data, torch.float32, 80 * GIB))
    assert found["policy weights"].update == found["reference weights"].update
    assert found["policy weights"].update == pytest.approx(4 * size, rel=1e-3)
    assert found["gradients"].update == 4 * size
    assert found["optimizer states"].update == pytest.approx(8 * size, rel=1e-3)
    assert found["KV cache"].rollout == 65536 * 2 * 2 * 8 * 64 * 4
    # AdamW's step on a GPU lists the roots of all second moments: more than forward and backward take here.
    rest = found["working memory"].update + found["logits chunk"].update + found["activations"].update
    assert rest == 4 * size

    module.algorithm = GRPO(kl_coef=0)
    module.algorithm.critic = CriticOptions(init="policy", lr=1e-5, shared=False, warmup_steps=0)
    found = parts(make_budget(module, data, torch.float32, 80 * GIB))
    critic = 4 * (size - 4096 * 512 + 513)  # no output projection, but a value head
    assert "reference weights" not in found
    assert found["critic weights"].update == critic and found["gradients"].update == 4 * size + critic


def test_the_tiny_run_is_within_15_percent_of_its_bytes(tiny: Path) -> None:
    """Policy, reference, gradients and Adam's moments of a real step, the reward model, and all together."""
    module = RLMTModule(str(tiny / "policy"), ClassifierReward(str(tiny / "reward")), GRPO())
    data = RolloutDataModule("x", TransformersEngine(), max_prompt_tokens=64, max_new_tokens=32)
    found = parts(make_budget(module, data, torch.float32, GIB))
    policy = load_policy(tiny / "policy", "float32")
    optimizer = torch.optim.AdamW(policy.parameters())
    policy(torch.arange(9)[None]).logits.sum().backward()
    optimizer.step()

    def held(tensors: Any) -> int:
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    model = AutoModelForSequenceClassification.from_pretrained(tiny / "reward")
    real = {
        "policy weights": held([*policy.parameters(), *policy.buffers()]),
        "reference weights": held([*policy.parameters(), *policy.buffers()]),
        "gradients": held(p.grad for p in policy.parameters()),
        "optimizer states": held(v for state in optimizer.state.values() for v in state.values()),
        "reward weights": held([*model.parameters(), *model.buffers()]),
    }
    for name, size in real.items():
        assert found[name].update == pytest.approx(size, rel=0.01), name


@pytest.fixture
def command(shapes: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`command("--memory", "24")`: a plan for tiny models of which only the configs are there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    for name in ("policy", "reward"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((tiny / name / "config.json").read_text())
    base = "plan --config base --config grpo --config tiny --model.policy policy --model.reward.model reward"
    return lambda *more: main([*base.split(), "--trainer.accelerator", "gpu", *map(str, more)])


def test_command(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--memory", 24) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:2]] == ["GiB", "policy"]
    assert "Fits in 24 GB: yes" in out and "Peak: " in out and "vLLM's cache holds" in out
    assert command("--memory", 1) == 0
    assert "Fits in 1 GB: no" in capsys.readouterr().out


def table(out: str) -> dict[str, list[float]]:
    """The printed lines by their first words."""
    rows = [re.split(r"\s{2,}", line) for line in out.splitlines()[1:]]
    return {re.sub(r" \(.*", "", row[0]): [float(cell) for cell in row[1:] if cell] for row in rows if len(row) > 1}


def test_command_for_several_devices(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    base = "plan --config base --config grpo --config llama-3.1-8b --memory 80"
    folders = ["--model.policy", str(shapes / "policy"), "--model.reward.model", str(shapes / "reward")]

    def planned(*words: str) -> dict[str, list[float]]:
        assert main([*base.split(), *" ".join(words).split(), *folders]) == 0
        return table(capsys.readouterr().out)

    one, eight = planned(), planned("--config fsdp --trainer.devices 4 --trainer.num_nodes 2")
    for part in ("policy weights", "reference weights", "optimizer states", "gradients", "reward weights"):
        assert eight[part] == pytest.approx([size / 8 for size in one[part]], abs=0.006), part
    embeddings, block = 2 * 128256 * 4096 + 4096, LINEAR // 32 + 2 * 4096  # float32; and bfloat16, float32 gradients
    together = max(2 * (4 * embeddings + 2 * block), 4 * embeddings + 2 * embeddings + 10 * block)
    assert eight["blocks put together"] == pytest.approx([together / GIB], abs=0.01)
    offloaded = planned("--config fsdp --trainer.devices 8 --trainer.strategy.offload true")
    assert offloaded["policy weights"] == offloaded["gradients"] == offloaded["reward weights"] == []
    assert offloaded["blocks put together"] == eight["blocks put together"]

    lora, shared = planned("--config lora"), planned("--config lora --config ddp --trainer.devices 8")
    assert shared["policy weights"] == lora["policy weights"] and shared["gradients"] == lora["gradients"]
    assert shared["DDP's buffers"] == pytest.approx([4 * ADAPTER / GIB] * 3, abs=0.006)
    cut = planned("--config lora --config fsdp --trainer.devices 8")
    assert cut["policy weights"] == pytest.approx([2 * ALL / 8 / GIB] * 3, abs=0.006)
    assert cut["LoRA adapter"] == lora["LoRA adapter"] and cut["optimizer states"] == lora["optimizer states"]

    def refused(*words: str) -> str:
        assert main([*base.split(), *words, *folders]) == 2
        return capsys.readouterr().err

    assert "give --trainer.devices, how many a machine has" in refused("--config", "fsdp")
    assert "this run has one" in refused("--data.engine.tensor_parallel_size", "8")


def test_command_must_fit(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--memory", 1, "--must_fit", "true") == 2
    assert "--must_fit" in capsys.readouterr().err
    assert command("--memory", 24, "--must_fit", "true") == 0


def test_mistakes(command: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*options: Any) -> str:
        assert command(*options) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error:")]
        return line

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--memory" in refused()
    assert "an-org/a-model" in refused("--memory", 24, "--model.policy", "an-org/a-model")
    assert "kl_koef" in refused("--memory", 24, "--model.algorithm.kl_koef", 1)
    lora = ("--memory", 24, "--model.lora", "LoRA")
    assert "target_modules names query" in refused(*lora, "--model.lora.target_modules", "[query]")
    dora = (*lora, "--model.lora.dora", "true")
    assert "vLLM does not support DoRA; use --data.engine.serve merged" in refused(*dora)
    assert command(*dora, "--data.engine.serve", "merged") == 0
    config = json.loads(Path("reward/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert "not a causal language model" in refused("--memory", 24, "--model.policy", "reward")


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_runs_that_are_no_rl_are_told_in_one_line(
    kind: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = "--model.policy" if kind == "sft" else "--model.model"
    configs = f"plan --config {kind} --config lora --config nf4 --data.path x.jsonl --memory 24 {model}"
    assert main([*configs.split(), str(shapes / "policy")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error:")]
    assert f"knows RL runs alone, not those of {'SFT' if kind == 'sft' else 'RewardModeling'}" in line


@pytest.mark.parametrize("name", ["single-gpu", "scaling"])
def test_the_docs_print_what_the_plan_prints(
    name: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / f"{name}.md").read_text(encoding="utf-8")
    ((line, printed),) = re.findall(r"```sh\n(rlmt plan .*?)```\n\n```\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    folders = ["--model.policy", str(shapes / "policy"), "--model.reward.model", str(shapes / "reward")]
    assert main([*line.split()[1:], *folders]) == 0
    assert [row.rstrip() for row in capsys.readouterr().out.splitlines()] == printed.splitlines()


def test_the_docs_peaks_are_the_plans(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every card of the table that says which YAML is for which."""
    text = (Path(__file__).parents[2] / "docs" / "single-gpu.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) GB \| .*? \| `(.*?)` \| ([\d.]+) GiB \|$", text, re.MULTILINE)
    assert {int(card) for card, _, _ in rows} == {12, 24, 48, 80}
    monkeypatch.chdir(tmp_path)
    Qwen2Config(**QWEN_1_5B, architectures=["Qwen2ForCausalLM"]).save_pretrained("Qwen/Qwen2.5-1.5B-Instruct")
    (tmp_path / "meta-llama").mkdir()
    (tmp_path / "meta-llama" / "Llama-3.1-8B-Instruct").symlink_to(shapes / "policy")
    for card, options, peak in rows:
        if options == "--config qlora":  # its plan is printed in full, and tested above
            assert f"\nPeak: {peak} GiB" in text
            continue
        words = f"plan --config base --config grpo --config llama-3.1-8b {options} --memory {card}"
        assert main([*words.split(), "--model.reward.model", str(shapes / "reward"), "--must_fit", "true"]) == 0
        assert f"Peak: {peak} GiB" in capsys.readouterr().out, words
