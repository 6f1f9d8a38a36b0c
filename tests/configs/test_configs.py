"""Every shipped YAML parses and instantiates, and the paper's settings are in the ones that claim them."""

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
    """What `rlmt fit` would have trained: the run is stopped where the trainer would start to load models."""
    runs: list[Any] = []

    def fit(trainer: Trainer, model: RLMTModule, datamodule: RolloutDataModule, **options: Any) -> None:
        runs.append((trainer, model, datamodule))

    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.chdir(tmp_path)
    return runs


def compose(*names: str) -> list[str]:
    # An H100 is not at hand in a test: the 8B config is instantiated for the CPU.
    return ["fit", *(word for name in names for word in ("--config", name)), "--trainer.accelerator", "cpu"]


def test_every_shipped_config_is_tested() -> None:
    # See test_paper.py, test_the_miniature_configs_instantiate and tests/study for the folders.
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} <= {"paper", "mini", "study", "__pycache__"}
    shipped = {path.stem for path in CONFIGS.glob("*.yaml")} - {"ddp", "fsdp"}  # see test_one_more_config_spreads_a_run
    objectives = {"grpo", "ppo", "dpo", "dpo_offline"}
    assert shipped == {
        "base",
        "early_stop",
        "lora",
        "nf4",
        "qlora",
        "server",
        "sft",
        "reward",
        *objectives,
        *FORMATS,
        *MODELS,
    }


@pytest.mark.parametrize(
    ("model", "form"),
    [
        pytest.param(model, form, marks=() if "tiny" in model or form == "think" else pytest.mark.slow)
        for model in MODELS
        for form in FORMATS
    ],
)
def test_compositions_instantiate(model: str, form: str, launched: list[Any]) -> None:
    assert main(compose("base", "grpo", model, form)) == 0
    ((_, module, data),) = launched
    assert isinstance(module.algorithm, GRPO) and isinstance(data.engine, VLLMEngine)
    assert module.format.name == {"instructed": "think"}.get(form, form)
    assert module.policy is None and module.reward.model is None  # nothing was loaded


def test_think_and_no_think_differ_in_one_line() -> None:
    for one, other in (("think", "no_think"), ("zero_think", "zero_no_think")):
        lines = [(CONFIGS / f"{name}.yaml").read_text().splitlines() for name in (one, other)]
        code = [[line for line in text if not line.startswith("#")] for text in lines]
        assert sum(a != b for a, b in zip(*code, strict=True)) == 1


def test_the_8b_config_holds_the_papers_settings(launched: list[Any]) -> None:
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
    assert all(vars(PPO())[name] == value for name, value in vars(ppo).items())  # and they are the class's defaults


@pytest.mark.parametrize("model", MODELS)
def test_the_objective_is_one_flag(model: str, launched: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*compose("base", "grpo", model), "--model.algorithm", "PPO", "--model.algorithm.lam", "0.95"]) == 0
    ((_, module, data),) = launched
    assert isinstance(module.algorithm, PPO) and module.algorithm.lam == 0.95
    assert data.group_size == 8  # the base config's
    assert not capsys.readouterr().err


def test_early_stop_adds_to_the_callbacks_and_watches_its_own_reward(launched: list[Any]) -> None:
    assert main(compose("base", "grpo", "llama-3.1-8b", "early_stop")) == 0
    ((trainer, module, data),) = launched
    (stop,) = trainer.early_stopping_callbacks
    newest, best = trainer.checkpoint_callbacks
    assert type(newest).__name__ == "PolicyCheckpoint" and best.dirpath == newest.dirpath
    assert [f"val/{name}" for name in module.held_out.names] == [stop.monitor] == [best.monitor]
    assert (stop.mode, best.mode, best.save_top_k) == ("max", "max", 1)
    (held_out,) = module.held_out.rewards
    assert held_out.source != module.reward.source
    assert data.val_size > 0


def test_dpo_has_the_papers_settings(launched: list[Any]) -> None:
    assert main(compose("base", "llama-3.1-8b", "dpo")) == 0
    ((trainer, module, data),) = launched
    dpo = module.algorithm
    assert isinstance(dpo, DPO) and vars(dpo) == vars(DPO())  # the class's defaults are the paper's, too
    assert (dpo.beta, dpo.pair_loss, dpo.min_valid, dpo.max_tokens) == (0.1, "sigmoid", 4, 8192)
    assert (data.batch_size, data.group_size, trainer.max_steps) == (128, 8, 118)
    optimizer = module.optimizer_factory([torch.nn.Parameter(torch.zeros(1))])
    assert optimizer.defaults["lr"] == 3e-7
    schedule = module.scheduler_factory(optimizer)
    assert isinstance(schedule, CosineWithWarmup) and (schedule.steps, schedule.warmup) == (None, 0.05)


@pytest.mark.parametrize("model", MODELS)
def test_dpo_in_the_place_of_grpo_is_one_flag(
    model: str, launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*compose("base", "grpo", model), "--model.algorithm", "DPO", "--model.algorithm.beta", "0.3"]) == 0
    ((_, module, _),) = launched
    assert isinstance(module.algorithm, DPO) and module.algorithm.beta == 0.3
    assert not capsys.readouterr().err


@pytest.mark.parametrize("form", ["think", "no_think"])
def test_the_sft_config_holds_the_papers_settings(form: str, launched: list[Any]) -> None:
    words = compose("sft", form)
    assert main([*words, "--model.policy", "runs/policy", "--data.path", "demonstrations.jsonl"]) == 0
    ((trainer, module, data),) = launched
    assert isinstance(module, SFT) and isinstance(data, SFTDataModule)
    assert module.format.name == form and module.policy is None
    assert (data.batch_size, data.max_length, trainer.max_epochs, module.prompt_weight) == (16, 20000, 2, 0)
    optimizer = module.optimizer_factory([torch.nn.Parameter(torch.zeros(1))])
    defaults = optimizer.defaults
    assert (defaults["lr"], tuple(defaults["betas"]), defaults["weight_decay"]) == (4e-6, (0.9, 0.95), 1e-4)
    schedule = module.scheduler_factory(optimizer)
    assert isinstance(schedule, CosineWithWarmup) and (schedule.steps, schedule.warmup) == (None, 0.1)


def test_the_reward_config_instantiates(launched: list[Any]) -> None:
    assert main([*compose("reward"), "--model.model", "runs/warm", "--data.path", "preferences.jsonl"]) == 0
    ((_, module, data),) = launched
    assert isinstance(module, RewardModeling) and isinstance(data, PreferenceDataModule)
    assert module.model is None and module.centering == 0.01


def test_configs_name_only_keys_that_classes_take() -> None:
    for path in CONFIGS.rglob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


def test_offline_dpo_is_dpo_on_recorded_samples(launched: list[Any]) -> None:
    for names in (("base", "llama-3.1-8b", "dpo"), ("base", "llama-3.1-8b", "dpo", "dpo_offline")):
        assert main(compose(*names)) == 0
    (_, fresh, fresh_data), (_, fixed, fixed_data) = ((run[0], run[1], run[2]) for run in launched)
    assert vars(fresh.algorithm) == vars(fixed.algorithm)
    assert isinstance(fixed_data.engine, ReplayEngine) and fixed_data.val_size == 0
    assert (fresh_data.batch_size, fresh_data.group_size) == (fixed_data.batch_size, fixed_data.group_size)


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@pytest.mark.parametrize("objective", ["grpo", "ppo", "dpo"])
def test_adapters_go_with_every_objective(adapter: str, objective: str, launched: list[Any]) -> None:
    assert main(compose("base", "llama-3.1-8b", objective, adapter)) == 0
    ((_, module, data),) = launched
    assert isinstance(module.lora, LoRA) and module.lora.rank == 16
    assert (module.quantization is not None) == (adapter == "qlora") == (module.reward.quantization is not None)
    assert data.engine.quantization == ("fp8_per_channel" if adapter == "qlora" else None)


def test_the_miniature_configs_instantiate(launched: list[Any]) -> None:
    """Each is named here; objectives share rollouts, prompts and settings."""
    named = {"sft": ["sft"], "reward": ["reward"], "grpo": ["base", "grpo", "mini/rl"]}
    named |= {"ppo": ["base", "ppo", "mini/rl"], "dpo": ["base", "dpo", "mini/rl"]}
    assert {path.stem for path in (CONFIGS / "mini").glob("*.yaml")} == {*named, "rl"}
    for name, before in named.items():
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


def test_every_run_of_the_miniature_study_instantiates(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "validate", Trainer.fit)
    study = yaml.safe_load((CONFIGS / "study/mini.yaml").read_text())
    stages = {name: Stage(**stage) for name, stage in study["stages"].items()}
    jobs = Plan(stages, [1], Path("out"), study["texts"]).jobs
    unlike = {(job.stage, dict(job.values).get("objective")): job for job in jobs}.values()
    runs = [command for job in unlike for command in job.commands if command[0] in ("fit", "validate")]
    for command in runs:
        words = [word for word in command if word not in ("--ckpt_path", "last")]  # `fit` above has no such option
        assert main([*words, "--trainer.accelerator", "cpu"]) == 0, command
    assert len(launched) == len(runs) == 15
    assert set(yaml.safe_load((CONFIGS / "study/quickstart.yaml").read_text())["only"]) <= set(study["arms"])


SPREAD = [
    *(("tiny", "ddp"), ("llama-3.1-8b", "qlora", "ddp")),
    *(("tiny", "fsdp"), ("llama-3.1-8b", "fsdp"), ("llama-3.1-8b", "lora", "fsdp")),
]


@pytest.mark.parametrize("names", SPREAD)
def test_one_more_config_spreads_a_run(
    names: tuple[str, ...], launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*compose("base", "grpo", *names), "--trainer.devices", "2", "--trainer.num_nodes", "3"]
    assert main(words) == 0
    assert sys.argv[1] == "fit" and sys.argv[-6:] == words[-6:]  # what Lightning starts the other processes with
    ((trainer, module, data),) = launched
    strategy = {"ddp": DDPStrategy, "fsdp": FSDP2}[names[-1]]
    assert type(trainer.strategy) is strategy and trainer.world_size == 6
    assert isinstance(data.engine, VLLMEngine)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_and_sft_and_reward_models(kind: str, spread: str, launched: list[Any]) -> None:
    data = ["--model.policy" if kind == "sft" else "--model.model", "runs/policy", "--data.path", "rows.jsonl"]
    assert main([*compose(kind, spread), *data, "--trainer.devices", "2"]) == 0
    ((trainer, _, _),) = launched
    assert type(trainer.strategy) is {"ddp": DDPStrategy, "fsdp": FSDP2}[spread] and trainer.world_size == 2


@pytest.mark.parametrize("names", [("tiny",), ("llama-3.1-8b", "lora"), ("llama-3.1-8b", "qlora")])
def test_servers_take_the_place_of_the_engine(
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


def test_the_commands_of_the_documentation_train_with_the_servers_that_it_starts(launched: list[Any]) -> None:
    text = (CONFIGS.parent / "docs/rollout-servers.md").read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    ports = [words[words.index("--port") + 1] for words in map(shlex.split, lines) if "--port" in words]
    trained = [line for line in lines if line.startswith("rlmt fit") and "--config server" in line]
    assert len(trained) == 4
    for line in trained:
        assert main([*shlex.split(line)[1:], "--trainer.accelerator", "cpu"]) == 0
    assert [data.rollout_lag for _, _, data in launched] == [0, 1, 1, 0]
    for _, _, data in launched:
        assert [url.rpartition(":")[2] for url in data.engine.urls] == ports[-2:]


@pytest.mark.parametrize("adapter", [("lora",), ("lora", "nf4")], ids=["lora", "qlora"])
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_adapters_go_with_sft_and_reward_models(adapter: tuple[str, ...], kind: str, launched: list[Any]) -> None:
    data = ["--model.policy" if kind == "sft" else "--model.model", "runs/policy", "--data.path", "rows.jsonl"]
    assert main([*compose(kind, *adapter), *data]) == 0
    ((trainer, module, _),) = launched
    assert isinstance(module.lora, LoRA) and module.lora.rank == 16
    four_bits = "nf4" in adapter
    assert (module.quantization is not None) == four_bits == module.gradient_checkpointing
    assert trainer.precision == ("bf16-mixed" if four_bits else "32-true")
    defaults = module.optimizer_factory([torch.nn.Parameter(torch.zeros(1))]).defaults
    assert defaults["lr"] == 1e-5 and tuple(defaults["betas"]) == (0.9, 0.95)  # lora's rate, the module's own betas
    assert defaults["weight_decay"] == (1e-4 if kind == "sft" else 1e-3)


def test_qlora_is_lora_and_nf4_and_more() -> None:
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
