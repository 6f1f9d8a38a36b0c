"""Every shipped YAML file parses and instantiates, and configs with the paper's settings have them."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from rlmt.algorithms import DPO, GRPO, PPO
from rlmt.cli.commands import main
from rlmt.data import PreferenceDataModule, RolloutDataModule, SFTDataModule
from rlmt.distributed.fsdp2 import FSDP2
from rlmt.engines import ReplayEngine, VLLMEngine, VLLMServerEngine
from rlmt.models import LoRA
from rlmt.modules import SFT, CosineWithWarmup, RewardModeling, RLMTModule
from rlmt.rewards import ClassifierReward
from rlmt.study.stages import Plan, Stage

CONFIGS = Path(__file__).parents[2] / "configs"
FORMATS = ("think", "no_think", "zero_think", "zero_no_think", "instructed")
MODELS = ("tiny", "llama-3.1-8b", "qwen2.5-7b")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Trainer, module and data of each `rlmt fit`, which stops before the trainer loads any model."""
    runs: list[Any] = []

    def fit(trainer: Trainer, model: RLMTModule, datamodule: RolloutDataModule, **options: Any) -> None:
        runs.append((trainer, model, datamodule))

    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.chdir(tmp_path)
    return runs


def compose(*names: str) -> list[str]:
    # Without a GPU, the 8B config is instantiated for the CPU.
    return ["fit", *(word for name in names for word in ("--config", name)), "--trainer.accelerator", "cpu"]


def test_every_shipped_config_is_tested() -> None:
    # test_paper.py, test_miniature_configs_instantiate and tests/study test the folders; tests/distill uses distill,
    # tests/evaluation compare and traits, tests/docs evaluate.
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} <= {"paper", "mini", "study", "__pycache__"}
    shipped = {path.stem for path in CONFIGS.glob("*.yaml")} - {
        "ddp",
        "fsdp",
    }  # see test_strategy_configs_set_the_strategy
    objectives = {"grpo", "ppo", "dpo", "dpo_offline"}
    assert shipped == {
        "base",
        "compare",
        "distill",
        "distill_gpt",
        "early_stop",
        "evaluate",
        "lora",
        "nf4",
        "qlora",
        "qwen2.5-0.5b",
        "server",
        "sft",
        "reward",
        "traits",
        *objectives,
        *FORMATS,
        *MODELS,
    }


@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param(model, name, marks=() if "tiny" in model or name == "think" else pytest.mark.slow)
        for model in MODELS
        for name in FORMATS
    ],
)
def test_compositions_instantiate(model: str, name: str, launched: list[Any]) -> None:
    assert main(compose("base", "grpo", model, name)) == 0
    ((_, module, data),) = launched
    assert isinstance(module.algorithm, GRPO) and isinstance(data.engine, VLLMEngine)
    assert module.configured_format.name == {"instructed": "think"}.get(name, name)
    assert module.policy is None and module.reward.model is None  # nothing was loaded


def keys(config: dict[str, Any], parent: str = "") -> set[str]:
    """Full names of the keys that a config sets to something other than a mapping."""
    found: set[str] = set()
    for name, value in config.items():
        found |= keys(value, f"{parent}{name}.") if isinstance(value, dict) else {f"{parent}{name}"}
    return found


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen2.5-7b"])
@pytest.mark.parametrize("objective", ["grpo", "ppo", "dpo"])
def test_objective_and_model_set_different_keys(objective: str, model: str) -> None:
    of_objective, of_model = (
        keys(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())) for name in (objective, model)
    )
    assert len(of_objective) > 5 and len(of_model) > 5 and not of_objective & of_model


def test_first_run_takes_two_configs(launched: list[Any]) -> None:
    assert main(compose("base", "qwen2.5-0.5b")) == 0
    assert main(compose("base", "grpo", "tiny", "instructed")) == 0
    assert main(compose("base", "qwen2.5-0.5b", "no_think")) == 0
    (trainer, first, data), (_, composed, _), (baseline_trainer, baseline, _) = launched
    assert isinstance(first.algorithm, GRPO) and vars(first.algorithm) == vars(composed.algorithm)
    assert first.configured_format == composed.configured_format
    assert baseline.configured_format.name == "no_think" and not baseline.configured_format.instruction
    assert trainer.max_steps == 120 and isinstance(data.engine, VLLMEngine)
    assert trainer.default_root_dir != baseline_trainer.default_root_dir


def test_think_and_no_think_differ_in_one_line() -> None:
    for one, other in (("think", "no_think"), ("zero_think", "zero_no_think")):
        lines = [(CONFIGS / f"{name}.yaml").read_text().splitlines() for name in (one, other)]
        code = [[line for line in text if not line.startswith("#")] for text in lines]
        assert sum(a != b for a, b in zip(*code, strict=True)) == 1


def test_8b_config_has_the_papers_settings(launched: list[Any]) -> None:
    assert main(compose("base", "grpo", "llama-3.1-8b")) == 0
    ((trainer, module, data),) = launched
    assert (data.batch_size, data.group_size, data.temperature, data.top_p) == (64, 8, 0.7, 1.0)
    assert (data.max_prompt_tokens, data.max_new_tokens) == (1024, 4096)
    grpo = module.algorithm
    assert (grpo.clip_low, grpo.clip_high, grpo.dual_clip, grpo.kl_coef, grpo.kl_estimator) == (
        0.2,
        0.2,
        3.0,
        0.001,
        "k3",
    )
    assert (grpo.entropy_coef, grpo.update_epochs, grpo.minibatches, grpo.normalize_std) == (0.001, 1, 1, True)
    optimizer = module.optimizer_factory([torch.nn.Parameter(torch.zeros(1))])
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-6, 0.01)
    assert module.scheduler_factory is None and module.max_grad_norm == 1.0
    assert trainer.max_steps == 120
    assert isinstance(module.reward, ClassifierReward)


def test_ppo_has_the_papers_settings(launched: list[Any]) -> None:
    assert main(compose("base", "ppo", "llama-3.1-8b")) == 0
    ((_, module, data),) = launched
    assert (data.batch_size, data.group_size) == (64, 1)
    ppo = module.algorithm
    assert isinstance(ppo, PPO) and ppo.critic is not None
    assert (ppo.gamma, ppo.lam, ppo.value_clip, ppo.kl_coef, ppo.kl_placement) == (1.0, 1.0, 0.5, 0.001, "loss")
    assert (ppo.critic.init, ppo.critic.lr, ppo.critic.shared, ppo.critic.warmup_steps) == ("policy", 1e-5, False, 0)
    assert vars(PPO()).keys() == vars(ppo).keys()
    defaults = vars(PPO(kl_clamp=10))  # all others are the class's defaults
    assert all(defaults[name] == value for name, value in vars(ppo).items())


@pytest.mark.parametrize("model", MODELS)
def test_ppo_is_selected_by_one_option(model: str, launched: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*compose("base", "grpo", model), "--model.algorithm", "PPO", "--model.algorithm.lam", "0.95"]) == 0
    ((_, module, data),) = launched
    assert isinstance(module.algorithm, PPO) and module.algorithm.lam == 0.95
    assert data.group_size == 8  # the base config's
    assert not capsys.readouterr().err


def test_early_stop_appends_callbacks_that_monitor_the_held_out_reward(launched: list[Any]) -> None:
    assert main(compose("base", "grpo", "llama-3.1-8b", "early_stop")) == 0
    ((trainer, module, data),) = launched
    (stop,) = trainer.early_stopping_callbacks
    latest, best = trainer.checkpoint_callbacks
    assert type(latest).__name__ == "PolicyCheckpoint" and best.dirpath == latest.dirpath
    assert [f"val/{name}" for name in module.held_out.names] == [stop.monitor] == [best.monitor]
    assert (stop.mode, best.mode, best.save_top_k) == ("max", "max", 1)
    (held_out,) = module.held_out.rewards
    assert held_out.source != module.reward.source
    assert data.val_size > 0


def test_dpo_has_the_papers_settings(launched: list[Any]) -> None:
    assert main(compose("base", "dpo", "llama-3.1-8b")) == 0
    ((trainer, module, data),) = launched
    dpo = module.algorithm
    assert isinstance(dpo, DPO) and vars(dpo) == vars(DPO())  # the class's defaults are also the paper's
    assert (dpo.beta, dpo.pair_loss, dpo.min_valid, dpo.max_tokens) == (0.1, "sigmoid", 4, 8192)
    assert (data.batch_size, data.group_size, trainer.max_steps) == (128, 8, 118)
    optimizer = module.optimizer_factory([torch.nn.Parameter(torch.zeros(1))])
    assert optimizer.defaults["lr"] == 3e-7
    schedule = module.scheduler_factory(optimizer)
    assert isinstance(schedule, CosineWithWarmup) and (schedule.steps, schedule.warmup) == (None, 0.05)


@pytest.mark.parametrize("model", MODELS)
def test_dpo_is_selected_by_one_option(model: str, launched: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*compose("base", "grpo", model), "--model.algorithm", "DPO", "--model.algorithm.beta", "0.3"]) == 0
    ((_, module, _),) = launched
    assert isinstance(module.algorithm, DPO) and module.algorithm.beta == 0.3
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["think", "no_think"])
def test_sft_config_has_the_papers_settings(name: str, launched: list[Any]) -> None:
    words = compose("sft", name)
    assert main([*words, "--model.policy", "runs/policy", "--data.path", "demonstrations.jsonl"]) == 0
    ((trainer, module, data),) = launched
    assert isinstance(module, SFT) and isinstance(data, SFTDataModule)
    assert module.configured_format.name == name and module.policy is None
    assert (data.batch_size, data.max_length, trainer.max_epochs, module.prompt_weight) == (16, 20000, 2, 0)
    optimizer = module.optimizer_factory([torch.nn.Parameter(torch.zeros(1))])
    defaults = optimizer.defaults
    assert (defaults["lr"], tuple(defaults["betas"]), defaults["weight_decay"]) == (4e-6, (0.9, 0.95), 1e-4)
    schedule = module.scheduler_factory(optimizer)
    assert isinstance(schedule, CosineWithWarmup) and (schedule.steps, schedule.warmup) == (None, 0.1)


def test_reward_config_instantiates(launched: list[Any]) -> None:
    assert main([*compose("reward"), "--model.model", "runs/warm", "--data.path", "preferences.jsonl"]) == 0
    ((_, module, data),) = launched
    assert isinstance(module, RewardModeling) and isinstance(data, PreferenceDataModule)
    assert module.model is None and module.centering == 0.01


def test_every_config_is_a_mapping() -> None:
    for path in CONFIGS.rglob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


def test_offline_dpo_differs_only_in_the_engine_and_validation(launched: list[Any]) -> None:
    for names in (("base", "dpo", "llama-3.1-8b"), ("base", "dpo", "llama-3.1-8b", "dpo_offline")):
        assert main(compose(*names)) == 0
    (_, online, online_data), (_, offline, offline_data) = ((run[0], run[1], run[2]) for run in launched)
    assert vars(online.algorithm) == vars(offline.algorithm)
    assert isinstance(offline_data.engine, ReplayEngine) and offline_data.val_size == 0
    assert (online_data.batch_size, online_data.group_size) == (offline_data.batch_size, offline_data.group_size)


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@pytest.mark.parametrize("objective", ["grpo", "ppo", "dpo"])
def test_adapters_compose_with_every_objective(adapter: str, objective: str, launched: list[Any]) -> None:
    assert main(compose("base", "llama-3.1-8b", objective, adapter)) == 0
    ((_, module, data),) = launched
    assert isinstance(module.lora, LoRA) and module.lora.rank == 16
    assert (module.quantization is not None) == (adapter == "qlora") == (module.reward.quantization is not None)
    assert ("quantization" in data.engine.left_to_plan) == (adapter == "qlora")
    assert data.engine.quantization is None and not data.engine.rounds_weights  # exact on a CPU


def test_miniature_configs_instantiate(launched: list[Any]) -> None:
    """Every miniature config is listed; objectives share rollout settings and prompts."""
    preceding = {"sft": ["sft"], "reward": ["reward"], "grpo": ["base", "grpo", "mini/rl"]}
    preceding |= {"ppo": ["base", "ppo", "mini/rl"], "dpo": ["base", "dpo", "mini/rl"]}
    assert {path.stem for path in (CONFIGS / "mini").glob("*.yaml")} == {*preceding, "rl", "compare"}
    for name, before in preceding.items():
        assert main(compose(*before, f"mini/{name}")) == 0
    _, sft, data = launched[0]
    assert isinstance(sft, SFT) and sft.from_scratch and data.batch_size == 34
    assert isinstance(launched[1][1], RewardModeling)
    rollouts = []
    for trainer, module, data in launched[2:]:
        assert module.policy_path == "runs/mini/warm-think" and module.scheduler_factory is None
        assert trainer.max_steps / (module.algorithm.update_epochs * module.algorithm.minibatches) == 40
        rollouts.append(
            (data.batch_size, data.group_size, data.temperature, data.max_new_tokens, module.held_out.names)
        )
    assert rollouts == [(16, 8, 1.0, 128, ["rubric"])] * 3


@pytest.mark.slow
def test_miniature_study_instantiates_every_run(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "validate", Trainer.fit)
    study = yaml.safe_load((CONFIGS / "study/mini.yaml").read_text())
    stages = {name: Stage(**stage) for name, stage in study["stages"].items()}
    plan = Plan(stages, study["texts"])
    distinct = {(stage, values.get("objective")): plan.command(stage, values) for stage, values in plan.jobs(1)}
    runs = [
        command.replace("$study", "out") for command in distinct.values() if command.startswith(("fit", "validate"))
    ]
    for command in runs:
        words = shlex.split(command.replace(" --ckpt_path last", ""))  # the replaced `fit` has no such option
        assert main([*words, "--trainer.accelerator", "cpu"]) == 0, command
    assert len(launched) == len(runs) == 15
    assert set(yaml.safe_load((CONFIGS / "study/quickstart.yaml").read_text())["only"]) <= set(study["arms"])


@pytest.mark.slow
def test_study_of_the_paper_instantiates_every_run(launched: list[Any]) -> None:
    study = yaml.safe_load((CONFIGS / "study/paper.yaml").read_text())
    texts = study["texts"] | study["scales"]["8b"] | {"model": "--config llama-3.1-8b", "warm_up": ""}  # without FSDP
    plan = Plan({name: Stage(**stage) for name, stage in study["stages"].items()}, texts)
    runs = [
        command.replace("$study", "out")
        for stage, values in plan.jobs(1)
        if (command := plan.command(stage, values)).startswith("fit") and values.get("teacher") != "distill_gpt"
    ]
    for command in runs:
        words = shlex.split(command.replace(" --ckpt_path last", ""))
        assert main([*words, "--trainer.accelerator", "cpu"]) == 0, command
    assert len(launched) == len(runs) == 20


STRATEGIES = [
    *(("tiny", "ddp"), ("llama-3.1-8b", "qlora", "ddp")),
    *(("tiny", "fsdp"), ("llama-3.1-8b", "fsdp"), ("llama-3.1-8b", "lora", "fsdp")),
]


@pytest.mark.parametrize("names", STRATEGIES)
def test_strategy_configs_set_the_strategy(
    names: tuple[str, ...], launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*compose("base", "grpo", *names), "--trainer.devices", "2", "--trainer.num_nodes", "3"]
    assert main(words) == 0
    assert sys.argv[1] == "fit" and sys.argv[-6:] == words[-6:]  # Lightning starts the other ranks with these arguments
    ((trainer, module, data),) = launched
    strategy = {"ddp": DDPStrategy, "fsdp": FSDP2}[names[-1]]
    assert type(trainer.strategy) is strategy and trainer.world_size == 6
    assert isinstance(data.engine, VLLMEngine)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_strategy_configs_compose_with_sft_and_reward(kind: str, strategy: str, launched: list[Any]) -> None:
    data = ["--model.policy" if kind == "sft" else "--model.model", "runs/policy", "--data.path", "rows.jsonl"]
    assert main([*compose(kind, strategy), *data, "--trainer.devices", "2"]) == 0
    ((trainer, _, _),) = launched
    assert type(trainer.strategy) is {"ddp": DDPStrategy, "fsdp": FSDP2}[strategy] and trainer.world_size == 2


@pytest.mark.parametrize("names", [("tiny",), ("llama-3.1-8b", "lora"), ("llama-3.1-8b", "qlora")])
def test_server_config_replaces_the_engine(
    names: tuple[str, ...], launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(compose("base", "grpo", *names, "server")) == 0
    ((_, _, data),) = launched
    assert isinstance(data.engine, VLLMServerEngine) and data.engine.urls == [
        "http://127.0.0.1:8001",
        "http://127.0.0.1:8002",
    ]
    assert data.rollout_lag == 0
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_documented_commands_use_the_documented_servers(launched: list[Any]) -> None:
    text = (CONFIGS.parent / "docs/rollout-servers.md").read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    ports = [words[words.index("--port") + 1] for words in map(shlex.split, lines) if "runs/tiny/policy" in words]
    trained = [line for line in lines if line.startswith("rlmt fit") and "--config server" in line]
    assert len(trained) == 5
    for line in trained:
        assert main([*shlex.split(line)[1:], "--trainer.accelerator", "cpu"]) == 0
    assert [data.rollout_lag for _, _, data in launched] == [0, 1, 1, 0, 0]
    assert [data.engine.weight_transfer for _, _, data in launched] == [*4 * ["folder"], "nccl"]
    for _, _, data in launched:
        assert [url.rpartition(":")[2] for url in data.engine.urls] == ports


@pytest.mark.parametrize("adapter", [("lora",), ("lora", "nf4")], ids=["lora", "qlora"])
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_adapters_compose_with_sft_and_reward(adapter: tuple[str, ...], kind: str, launched: list[Any]) -> None:
    data = ["--model.policy" if kind == "sft" else "--model.model", "runs/policy", "--data.path", "rows.jsonl"]
    assert main([*compose(kind, *adapter), *data]) == 0
    ((trainer, module, _),) = launched
    assert isinstance(module.lora, LoRA) and module.lora.rank == 16
    four_bits = "nf4" in adapter
    assert (module.quantization is not None) == four_bits
    assert module.gradient_checkpointing is True and trainer.precision == "bf16-mixed"
    defaults = module.optimizer_factory([torch.nn.Parameter(torch.zeros(1))]).defaults
    # The learning rate of lora and the betas of the base config.
    assert defaults["lr"] == 1e-5 and tuple(defaults["betas"]) == (0.9, 0.95)
    assert defaults["weight_decay"] == (1e-4 if kind == "sft" else 1e-3)


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_miniature_world_computes_in_float32(kind: str, launched: list[Any]) -> None:
    """So that its numbers do not depend on the precision of the configs that it builds on."""
    assert main(compose(kind, f"mini/{kind}")) == 0
    ((trainer, module, _),) = launched
    assert module.gradient_checkpointing is False and trainer.precision == "32-true"


def test_qlora_includes_lora_and_nf4() -> None:
    def settings(name: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}

        def walk(path: str, value: Any) -> None:
            if isinstance(value, dict):
                for key, inner in value.items():
                    walk(f"{path}.{key}", inner)
            else:
                flat[path] = value

        walk("", yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
        return flat

    assert settings("qlora").items() >= (settings("lora") | settings("nf4")).items()
