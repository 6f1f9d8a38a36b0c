"""Budgets of `rlmt plan` against sizes computed by hand, and its command line."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
)

from rlmt.algorithms import GRPO
from rlmt.algorithms.base import CriticOptions
from rlmt.cli.commands import main
from rlmt.data import RolloutDataModule
from rlmt.engines import TransformersEngine, VLLMEngine
from rlmt.errors import UserError
from rlmt.memory.budget import (
    CUDA_CONTEXT,
    CUDA_GRAPHS,
    GIB,
    VLLM_OVERHEAD,
    Budget,
    BudgetLine,
    VLLMShare,
    _add_engine,
    _check_vllm,
    make_budget,
)
from rlmt.memory.bytes import Parallelism
from rlmt.memory.cures import CARDS, fitting_cards
from rlmt.memory.engine_options import choose_engine_options
from rlmt.memory.known_models import model_config
from rlmt.memory.meta_models import meta_from_config
from rlmt.models import LoRA, loading
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
LINEAR = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
"""Weights of the linear layers of the 8B Llama, without the output projection."""
ALL = LINEAR + 2 * 128256 * 4096 + 65 * 4096
ADAPTER = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
"""Weights of a LoRA adapter of rank 16 on all of these layers."""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders policy/ and reward/ that hold only a config.json."""
    root = tmp_path_factory.mktemp("shapes")
    LlamaConfig(**LLAMA_8B, architectures=["LlamaForCausalLM"]).save_pretrained(root / "policy")
    LlamaConfig(**LLAMA_8B, num_labels=1).save_pretrained(root / "reward")
    assert [file.name for file in (root / "policy").iterdir()] == ["config.json"]
    return root


def nf4(weights: int) -> float:
    """Bytes under double quantization: half a byte a weight, one per 64 weights, four per 64 × 256."""
    return weights * (1 / 2 + 1 / 64 + 4 / 64 / 256)


def lines_by_name(budget: Budget) -> dict[str, Any]:
    """The lines of a budget by their names without what is in parentheses."""
    return {re.sub(r" \(.*", "", line.name): line for line in budget.lines}


def qlora(shapes: Path, **engine: Any) -> tuple[RLMTModule, RolloutDataModule]:
    """The run of configs/qlora.yaml on models of 8B."""
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


@pytest.mark.parametrize(
    ("gib", "method"),
    [
        (None, None),
        pytest.param(22.0, "fp8_per_channel", marks=pytest.mark.slow),
        pytest.param(39.3, "fp8_per_channel", marks=pytest.mark.slow),
        pytest.param(44.3, None, marks=pytest.mark.slow),
    ],
)
def test_automatic_quantization_rounds_where_exact_weights_leave_no_room(
    gib: float | None, method: str | None, shapes: Path
) -> None:
    """Of 44.3 GiB vLLM gets 23; 8B in 16 bits take 15 of them, the cache 8 · 5,120 · 128 KiB = 5."""
    module, data = qlora(shapes, share=0.52)
    data.engine = data.val_engine = VLLMEngine(
        gpu_memory_utilization=0.52, max_num_batched_tokens=2048, quantization="auto"
    )
    assert data.engine.quantization == "fp8_per_channel" and data.engine.rounds_weights  # without the command
    memory = None if gib is None else int(gib * GIB)
    choose_engine_options(module, data, torch.bfloat16, memory, Parallelism())
    assert data.engine.quantization == method and data.engine.rounds_weights == (method is not None)
    data.engine = VLLMEngine(quantization="fp8_per_tensor")
    choose_engine_options(module, data, torch.bfloat16, memory, Parallelism())
    assert data.engine.quantization == "fp8_per_tensor"


@pytest.mark.slow
def test_8b_policy_and_8b_reward_model_fit_in_24_gb(shapes: Path) -> None:
    module, data = qlora(shapes)
    budget = make_budget(module, data, torch.bfloat16, 24 * GIB)
    found = lines_by_name(budget)
    unquantized = 2 * (ALL - LINEAR)  # embeddings, output projection and norms in bfloat16
    assert found["policy weights"].update == pytest.approx(nf4(LINEAR) + unquantized, rel=0.001)
    assert found["reward weights"].update == pytest.approx(nf4(LINEAR) + unquantized - 2 * 128256 * 4096, rel=0.001)
    assert found["LoRA adapter"].rollout == found["gradients"].update == 4 * ADAPTER
    assert found["gradients"].rollout == 0
    assert found["optimizer states"].reward == pytest.approx(ADAPTER * (2 + 8 / 256), rel=0.001)
    assert "reference weights" not in found and "critic weights" not in found
    # Two samples of 4,096 tokens: the bfloat16 inputs of 32 checkpointed layers, and the last layer's activations.
    assert found["activations"].update == pytest.approx(32 * 8192 * 4096 * 2, rel=0.1)
    assert found["logits chunk"].update == 256 * 128256 * 10
    engine = LINEAR + unquantized + 2 * ADAPTER
    assert found["vLLM weights"].rollout == pytest.approx(engine, rel=1e-6) and found["vLLM weights"].update == 0
    activations = found["vLLM activations"].rollout
    # Of 8,192 tokens in bfloat16: gate, up and their product of one layer, and the residual stream with its norm.
    assert activations == pytest.approx(8192 * (3 * 14336 + 3 * 4096) * 2, rel=0.15)
    besides = found["vLLM weights"].rollout + activations + CUDA_GRAPHS + VLLM_OVERHEAD
    cache = 0.52 * 24 * GIB - besides
    assert 1.3 * GIB < cache < 1.7 * GIB
    assert found["vLLM KV cache"].rollout == pytest.approx(cache, abs=1)
    assert f"{int(cache // (128 * 1024)):,} tokens" in budget.notes[0]  # 128 KiB a token
    assert found["CUDA context"].reward == CUDA_CONTEXT
    assert budget.fits and budget.peak == "rollout"
    assert budget.total("rollout") < 23.5 * GIB


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `shapes`, with the first two of the 32 layers."""
    root = tmp_path_factory.mktemp("two-layers")
    short = LLAMA_8B | {"num_hidden_layers": 2}
    LlamaConfig(**short, architectures=["LlamaForCausalLM"]).save_pretrained(root / "policy")
    LlamaConfig(**short, num_labels=1).save_pretrained(root / "reward")
    return root


@pytest.mark.slow
def test_held_out_reward_models_take_memory_in_all_phases(two_layers: Path) -> None:
    module, data = qlora(two_layers)
    before = make_budget(module, data, torch.bfloat16, 24 * GIB)
    held_out = ClassifierReward(str(two_layers / "reward"), dtype="bfloat16", tokens_per_batch=8192, name="held_out")
    module.held_out.rewards.append(held_out)
    budget = make_budget(module, data, torch.bfloat16, 24 * GIB)
    # In bfloat16, with a score head instead of the output projection.
    size = 2 * (LINEAR // 16 + 128256 * 4096 + 6 * 4096)
    assert lines_by_name(budget)["held-out reward weights"].rollout == pytest.approx(size, rel=0.001)
    for phase in ("rollout", "reward", "update"):
        assert budget.total(phase) - before.total(phase) == pytest.approx(size, rel=0.001)


@pytest.mark.slow
def test_critic_weights_of_a_4_bit_policy(two_layers: Path) -> None:
    """A copy of the policy is in 4 bits and has an adapter of its own; a shared critic is only an adapter."""
    module, data = qlora(two_layers)
    linear, adapter = LINEAR // 16, ADAPTER // 16
    sizes = {}
    for name, init, shared in (("copy", "policy", False), ("shared", "policy", True), ("other", "reward", False)):
        init = init if init == "policy" else str(two_layers / init)
        module.algorithm.critic = CriticOptions(init=init, lr=1e-5, shared=shared, warmup_steps=0)
        found = lines_by_name(make_budget(module, data, torch.bfloat16, 80 * GIB))
        sizes[name] = found["critic weights"].update
        assert found["gradients"].update == 4 * (2 * adapter + 4097), name
    rest = 2 * (128256 * 4096 + 5 * 4096)  # embeddings and norms in bfloat16, without output projection
    assert sizes["copy"] == pytest.approx(nf4(linear) + rest + sizes["shared"], rel=0.001)
    assert sizes["shared"] == 4 * (adapter + 4097)  # and the value head
    assert sizes["other"] == pytest.approx(2 * linear + rest + sizes["shared"], rel=0.001)


@pytest.mark.slow
def test_16_bit_vllm_weights_exceed_24_gb_and_fit_in_48(shapes: Path) -> None:
    budget = Budget(24 * GIB)
    _add_engine(budget, *qlora(shapes, quantization=None), torch.bfloat16, Parallelism())
    _check_vllm(budget, 5120)
    assert "cannot hold one sample of 5,120 tokens" in budget.problems[0] and not budget.fits
    budget = Budget(48 * GIB)
    _add_engine(budget, *qlora(shapes, quantization=None), torch.bfloat16, Parallelism())
    assert budget.fits and lines_by_name(budget)["vLLM weights"].rollout == pytest.approx(2 * (ALL + ADAPTER), rel=1e-6)
    split, (module, data) = Budget(48 * GIB), qlora(shapes, quantization=None)
    data.engine.tensor_parallel_size = 16  # type: ignore[attr-defined]
    _add_engine(split, module, data, torch.bfloat16, Parallelism(16))
    assert lines_by_name(split)["vLLM weights"].rollout == pytest.approx(2 * (ALL / 16 + ADAPTER), rel=1e-6)
    found = lines_by_name(split)
    cache = 0.52 * 48 * GIB - found["vLLM weights"].rollout - found["vLLM activations"].rollout
    cache -= VLLM_OVERHEAD + CUDA_GRAPHS
    assert f"{int(cache // (16 * 1024)):,} tokens" in split.notes[0]  # one of eight key-value heads, 16 KiB a token
    with pytest.raises(UserError, match="quantization awq"):
        _add_engine(budget, *qlora(shapes, quantization="awq"), torch.bfloat16, Parallelism())


def test_full_training_adds_a_reference_or_a_critic(tmp_path: Path) -> None:
    small = LLAMA_8B | {"hidden_size": 512, "num_hidden_layers": 2, "intermediate_size": 1024, "vocab_size": 4096}
    LlamaConfig(**small, architectures=["LlamaForCausalLM"], head_dim=64).save_pretrained(tmp_path / "policy")
    size = 2 * 4096 * 512 + 5 * 512 + 2 * (2 * 512 * 2048 + 2 * 512 * 512 + 3 * 512 * 1024)
    LlamaConfig(**small, num_labels=1).save_pretrained(tmp_path / "reward")
    reward = ClassifierReward(str(tmp_path / "reward"))
    module = RLMTModule(str(tmp_path / "policy"), reward, GRPO(), tokens_per_micro_batch=64)
    engine = TransformersEngine(tokens_per_batch=65536)
    data = RolloutDataModule("prompts.jsonl", engine, max_prompt_tokens=32, max_new_tokens=32)
    found = lines_by_name(make_budget(module, data, torch.float32, 80 * GIB))
    assert found["policy weights"].update == found["reference weights"].update
    assert found["policy weights"].update == pytest.approx(4 * size, rel=1e-3)
    assert found["gradients"].update == 4 * size
    assert found["optimizer states"].update == pytest.approx(8 * size, rel=1e-3)
    assert found["KV cache"].rollout == 65536 * 2 * 2 * 8 * 64 * 4
    # AdamW's foreach step on a GPU takes the roots of all second moments: more than forward and backward here.
    rest = found["working memory"].update + found["logits chunk"].update + found["activations"].update
    assert rest == 4 * size

    module.algorithm = GRPO(kl_coef=0)
    module.algorithm.critic = CriticOptions(init="policy", lr=1e-5, shared=False, warmup_steps=0)
    found = lines_by_name(make_budget(module, data, torch.float32, 80 * GIB))
    critic = 4 * (size - 4096 * 512 + 513)  # no output projection, but a value head
    assert "reference weights" not in found
    assert found["critic weights"].update == critic and found["gradients"].update == 4 * size + critic


def test_tiny_run_matches_the_bytes_of_real_tensors(tiny: Path) -> None:
    """Policy, reference, gradients and Adam's moments of a real step, and the reward model, each within 1%."""
    module = RLMTModule(str(tiny / "policy"), ClassifierReward(str(tiny / "reward")), GRPO())
    data = RolloutDataModule("x", TransformersEngine(), max_prompt_tokens=64, max_new_tokens=32)
    found = lines_by_name(make_budget(module, data, torch.float32, GIB))
    policy = load_policy(tiny / "policy", "float32")
    optimizer = torch.optim.AdamW(policy.parameters())
    policy(torch.arange(9)[None]).logits.sum().backward()
    optimizer.step()

    def storage_bytes(tensors: Any) -> int:
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    model = AutoModelForSequenceClassification.from_pretrained(tiny / "reward")
    real = {
        "policy weights": storage_bytes([*policy.parameters(), *policy.buffers()]),
        "reference weights": storage_bytes([*policy.parameters(), *policy.buffers()]),
        "gradients": storage_bytes(p.grad for p in policy.parameters()),
        "optimizer states": storage_bytes(v for state in optimizer.state.values() for v in state.values()),
        "reward weights": storage_bytes([*model.parameters(), *model.buffers()]),
    }
    for name, size in real.items():
        assert found[name].update == pytest.approx(size, rel=0.01), name


@pytest.fixture
def command(shapes: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`command("--memory", "24")` runs a plan for tiny models of which only the configs exist."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    for name in ("policy", "reward"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((tiny / name / "config.json").read_text())
    base = "plan --config base --config grpo --config tiny --model.policy policy --model.reward.model reward"
    return lambda *more: main([*base.split(), "--trainer.accelerator", "gpu", *map(str, more)])


def test_command_prints_budget_and_verdict(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--memory", 24) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:2]] == ["GiB", "policy"]
    assert "Fits in 24 GiB: yes" in out and "Peak: " in out and "vLLM's KV cache holds" in out
    assert "Fits on: T4 (14.5), L4 (22)" in out and "Does not fit on" not in out
    assert command("--memory", 1) == 1
    out = capsys.readouterr().out
    assert "Fits in 1 GiB: no" in out and "no value of data.engine.gpu_memory_utilization fits" in out
    assert "None of LoRA" in out and "take a smaller model" in out
    assert command("--memory", "l4") == 0
    assert "Fits in 22 GiB: yes" in capsys.readouterr().out


@pytest.mark.slow
def test_plan_that_does_not_fit_names_the_options_that_would(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Each option is planned again as a user would: it fits, and its peak is the printed one."""
    share = "--data.engine.gpu_memory_utilization"
    assert command("--memory", 4, share, 0.99) == 1
    out = capsys.readouterr().out
    cures = dict(re.findall(r"^  (--.*): ([\d.]+) GiB$", out, re.MULTILINE))
    assert len(cures) > 2 and next(iter(cures)).startswith(share), out
    for options, peak in list(cures.items())[:2]:
        assert command("--memory", 4, share, 0.99, *options.split()) == 0, options
        (planned,) = re.findall(r"Peak: ([\d.]+) GiB", capsys.readouterr().out)
        assert float(planned) == pytest.approx(float(peak), abs=0.02)


PARAMETERS = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
}
"""Number of parameters that the hub shows for each model."""


def test_known_models_have_their_number_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_config", lambda path: pytest.fail("the hub was asked"))
    for name, count in PARAMETERS.items():
        model = meta_from_config(AutoModelForCausalLM, model_config(name), torch.bfloat16)
        assert sum(p.numel() for p in model.parameters()) == count, name
    reward = model_config("Skywork/Skywork-Reward-Llama-3.1-8B-v0.2")
    assert reward.num_labels == 1 and reward.model_type == "llama"


def test_limits_of_vllm_by_hand() -> None:
    """A trainer of 8 of 20 GiB; vLLM's weights and overhead take 5, a sample 1: 6/20 at least, 12/20 at most."""
    lines = [
        BudgetLine.all_phases("trainer", 8 * GIB),
        BudgetLine("vLLM", rollout=5 * GIB),
        BudgetLine("cache", rollout=GIB // 2),
    ]
    share = VLLMShare(granted=0.275, fixed=5 * GIB, cache=GIB // 2, sample=GIB, phases=("rollout",))
    budget = Budget(20 * GIB, lines, vllm=share)
    assert budget.vllm_limits() == (0.3, 0.6)
    assert budget.fits_on(14 * GIB) and not budget.fits_on(14 * GIB - 1)
    assert budget.peak_with(0.5) == 18 * GIB
    _check_vllm(budget, 100)
    assert budget.problems == [
        "vLLM's KV cache cannot hold one sample of 100 tokens: set data.engine.gpu_memory_utilization to a value from "
        "0.30 to 0.60."
    ]
    assert fitting_cards(budget) == {card: size >= 14 for card, size in CARDS.items()}


def table(out: str) -> dict[str, list[float]]:
    """The printed lines by their names."""
    rows = [re.split(r"\s{2,}", line) for line in out.splitlines()[1:]]
    return {
        re.sub(r" \(.*", "", row[0]): [float(cell) for cell in row[1:] if cell]
        for row in rows
        if len(row) > 1 and row[0]
    }


@pytest.mark.slow
def test_devices_and_sharding_divide_the_memory(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    base = "plan --config base --config grpo --config llama-3.1-8b --memory 80"
    folders = ["--model.policy", str(shapes / "policy"), "--model.reward.model", str(shapes / "reward")]

    def planned(*options: str) -> dict[str, list[float]]:
        assert main([*base.split(), *" ".join(options).split(), *folders]) in (0, 1)
        return table(capsys.readouterr().out)

    one, eight = planned(), planned("--config fsdp --trainer.devices 4 --trainer.num_nodes 2")
    for part in ("policy weights", "reference weights", "optimizer states", "gradients", "reward weights"):
        assert eight[part] == pytest.approx([size / 8 for size in one[part]], abs=0.006), part
    embeddings, block = 2 * 128256 * 4096 + 4096, LINEAR // 32 + 2 * 4096  # float32; and bfloat16, float32 gradients
    gathered = max(2 * (4 * embeddings + 2 * block), 4 * embeddings + 2 * embeddings + 10 * block)
    assert eight["all-gathered blocks"] == pytest.approx([gathered / GIB], abs=0.01)
    offloaded = planned("--config fsdp --trainer.devices 8 --trainer.strategy.offload true")
    assert offloaded["policy weights"] == offloaded["gradients"] == offloaded["reward weights"] == []
    assert offloaded["all-gathered blocks"] == eight["all-gathered blocks"]

    rounded = planned("--config fsdp --trainer.devices 8 --trainer.strategy.bf16_residual true")
    assert rounded["activations"][-1] < 0.75 * eight["activations"][-1]

    lora, replicated = planned("--config lora"), planned("--config lora --config ddp --trainer.devices 8")
    assert replicated["policy weights"] == lora["policy weights"] and replicated["gradients"] == lora["gradients"]
    assert replicated["DDP gradient buckets"] == pytest.approx([4 * ADAPTER / GIB] * 3, abs=0.006)
    lora_sharded = planned("--config lora --config fsdp --trainer.devices 8")
    assert lora_sharded["policy weights"] == pytest.approx([2 * ALL / 8 / GIB] * 3, abs=0.006)
    assert (
        lora_sharded["LoRA adapter"] == lora["LoRA adapter"]
        and lora_sharded["optimizer states"] == lora["optimizer states"]
    )

    def error_of(*options: str) -> str:
        assert main([*base.split(), *options, *folders]) == 2
        return capsys.readouterr().err

    assert "--trainer.devices is required" in error_of("--config", "fsdp")
    rounded = ["--config", "fsdp", "--trainer.devices", "8", "--trainer.strategy.bf16_residual", "true"]
    assert "bf16_residual is true, but --trainer.precision is 32-true" in error_of(
        *rounded, "--trainer.precision", "32-true"
    )
    assert "this run has one" in error_of("--data.engine.tensor_parallel_size", "8")


@pytest.mark.slow
def test_invalid_options_are_one_line_errors(
    command: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def error_of(*options: Any) -> str:
        assert command(*options) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error:")]
        return line

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--memory" in error_of() and "A100-80GB" in error_of("--memory", "T1000")
    assert "an-org/a-model" in error_of("--memory", 24, "--model.policy", "an-org/a-model")
    assert "kl_koef" in error_of("--memory", 24, "--model.algorithm.kl_koef", 1)
    lora = ("--memory", 24, "--model.lora", "LoRA")
    assert "target_modules names query" in error_of(*lora, "--model.lora.target_modules", "[query]")
    dora = (*lora, "--model.lora.dora", "true")
    assert "vLLM does not support DoRA; use --data.engine.serve merged" in error_of(*dora)
    assert command(*dora, "--data.engine.serve", "merged") == 0
    config = json.loads(Path("reward/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert "not a causal language model" in error_of("--memory", 24, "--model.policy", "reward")


@pytest.mark.parametrize("max_num_batched_tokens", [64, 4096])
def test_vllm_deducts_activations_and_cuda_graphs_from_its_cache(two_layers: Path, max_num_batched_tokens: int) -> None:
    module, data = qlora(two_layers)
    budgets = []
    for eager in (None, True):
        data.engine = VLLMEngine(0.5, max_num_batched_tokens=max_num_batched_tokens, enforce_eager=eager)
        _add_engine(budget := Budget(24 * GIB), module, data, torch.bfloat16, Parallelism())
        budgets.append(lines_by_name(budget))
        assert budget.total("rollout") == pytest.approx(12 * GIB, abs=1)
    graphs, eager_budget = budgets
    assert eager_budget["vLLM KV cache"].rollout - graphs["vLLM KV cache"].rollout == CUDA_GRAPHS
    assert graphs["vLLM overhead"].update == VLLM_OVERHEAD + CUDA_GRAPHS and graphs["vLLM activations"].update == 0
    logits = 256 * 128256 * (2 + 3 * 4)  # of as many samples as are decoded at once
    forward = max_num_batched_tokens * (3 * 14336 + 3 * 4096) * 2
    assert graphs["vLLM activations"].rollout == pytest.approx(max(logits, forward), rel=0.15)


@pytest.mark.parametrize("kind", [pytest.param("sft", marks=pytest.mark.slow), "reward"])
def test_supervised_run_has_one_phase(
    kind: str, two_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the configs' bfloat16 and checkpointing, where backward has a layer's input for each layer."""
    monkeypatch.chdir(tmp_path)
    model = "--model.policy" if kind == "sft" else "--model.model"
    line = f"plan --config {kind} --data.path x.jsonl --data.max_length 2048 --memory 80 {model}"
    level = logging.getLogger("lightning.pytorch").level
    assert main([*line.split(), str(two_layers / "policy")]) == 0
    assert logging.getLogger("lightning.pytorch").level == level, "a run in the same process logs as before"
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["GiB", "update"] and "in update." in out
    found = {name: cells[0] for name, cells in table(out).items()}
    size = LINEAR // 16 + 128256 * 4096 + 5 * 4096 + (128256 * 4096 if kind == "sft" else 4096)
    weights = found["policy weights" if kind == "sft" else "reward model weights"]
    assert weights == pytest.approx(4 * size / GIB, abs=0.01) and found["optimizer states"] == pytest.approx(
        8 * size / GIB, abs=0.01
    )
    assert found["gradients"] == weights
    rows, length = (8, 2047) if kind == "sft" else (8, 2048)
    assert f"activations ({rows} × {length} tokens)" in out
    hidden = rows * length * 4096 * 4
    assert 2 * hidden / GIB < found["activations"] < 6 * hidden / GIB
    assert ("logits chunk" in found) == (kind == "sft")
    # In float32 without checkpointing every matrix product saves its input.
    plain = ["--trainer.precision", "32-true", "--model.gradient_checkpointing", "false"]
    assert main([*line.split(), str(two_layers / "policy"), *plain]) == 0
    each = rows * length * (5 * 4096 + 3 * 14336) * 4
    assert table(capsys.readouterr().out)["activations"][0] > 2 * each / GIB


def test_plan_of_unfitting_data_is_a_one_line_error(
    two_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = "plan --config sft --data PreferenceDataModule --data.path x.jsonl --memory 24 --model.policy"
    assert main([*line.split(), str(two_layers / "policy")]) == 2
    assert "--data is PreferenceDataModule, but --model SFT trains on SFTDataModule" in capsys.readouterr().err


def test_help_describes_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "--help"])
    usage, _, rest = capsys.readouterr().out.partition("\n\n")
    assert usage.startswith("usage: rlmt plan [") and " fit" not in usage
    assert (
        " ".join(rest.split()).startswith("Prints the memory of a run") and "optimization" not in rest.split("\n\n")[0]
    )
