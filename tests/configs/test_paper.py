"""The runs of the paper: every config trains, baselines match, and docs/paper.md lists every run."""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from rlmt.cli.commands import main

ROOT = Path(__file__).parents[2]
RUNS = {path.stem: path for path in sorted((ROOT / "configs" / "paper").glob("*.yaml"))}
THINKING = [name for name in RUNS if not name.endswith("no_think")]
DOCS = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")


def command_of(name: str) -> list[str]:
    """Arguments of `rlmt` in the first line of a config."""
    line = RUNS[name].read_text(encoding="utf-8").splitlines()[0]
    assert line.startswith("# rlmt fit ") and line.endswith("[no_]think"), line
    words = line.replace("[no_]", "no_" if name.endswith("no_think") else "").split()[2:]
    assert words[-1] == f"paper/{name}"
    return words


@pytest.fixture(scope="module")
def worlds(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with tiny models of both families."""
    from rlmt.demos.tiny import write_tiny
    from rlmt.demos.tiny_models import Sizes

    qwen = tmp_path_factory.mktemp("qwen")
    write_tiny(qwen, family="qwen2", sizes=Sizes(hidden=64, layers=2, heads=2, ffn=128, vocab=512, context=1024))
    return {"llama": tiny, "qwen": qwen}


@pytest.fixture
def one_step(
    worlds: dict[str, Path], prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_plots: None
) -> Callable[..., Path]:
    """Trains one step of a run on tiny models and few prompts, and returns its folder."""
    monkeypatch.chdir(tmp_path)

    def step(name: str, engine: str = "TransformersEngine") -> Path:
        world = worlds[name.partition("-")[0]]
        options = {
            "--model.policy": world / "policy",
            "--model.reward.model": world / "reward",
            "--data.prompts": prompts_file,
            "--data.engine": engine,
            "--data.batch_size": 2,
            "--data.max_prompt_tokens": 256,
            "--data.max_new_tokens": 24,
            "--data.val_size": 0,
            "--trainer.accelerator": "cpu",
            "--trainer.max_steps": 1,
            "--trainer.enable_progress_bar": "false",
        }
        if "-dpo-" in name:  # one in ten samples of the tiny policy is well-formed, enough for some pairs
            options |= {"--data.batch_size": 16, "--model.algorithm.min_valid": 2}
        if "zero" in name:  # the tiny policy never writes these formats, and equal rewards give no step
            options |= {"--model.malformed": "score_all"}
        assert main([*command_of(name), *(str(word) for pair in options.items() for word in pair)]) == 0
        return tmp_path / "runs" / "paper" / name

    return step


def check_one_step(name: str, run: Path, policy: Path) -> bool:
    """Checks that a run trained one step from its policy in its format; returns whether it trained a critic."""
    with (run / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("reward/mean")]
    assert rows[-1]["policy/grad_norm"] and float(rows[-1]["policy/skipped"]) == 0
    saved = torch.load(run / "latest" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    assert saved["rlmt"]["format"]["name"] == name.rpartition("-")[2]
    from safetensors.torch import load_file

    before = load_file(policy / "model.safetensors")
    after = {key.removeprefix("policy."): value for key, value in saved["state_dict"].items()}
    assert any(not torch.equal(before[key], after[key]) for key in before)
    return any(key.startswith("critic.") for key in saved["state_dict"])


# All algorithms and families, and a base, an instruct and a warm-started policy; `make test-all` covers every run.
FAST = {"llama-grpo-zero_think", "llama-instruct-dpo-think", "qwen-ppo-no_think"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in RUNS])
def test_run_trains_one_step(name: str, one_step: Callable[..., Path], worlds: dict[str, Path]) -> None:
    critic = check_one_step(name, one_step(name), worlds[name.partition("-")[0]] / "policy")
    assert critic == ("-ppo-" in name)


@pytest.mark.slow
def test_run_trains_one_step_with_vllm(one_step: Callable[..., Path], worlds: dict[str, Path]) -> None:
    run = one_step("qwen-grpo-think", "VLLMEngine")
    assert not check_one_step("qwen-grpo-think", run, worlds["qwen"] / "policy")


@pytest.mark.parametrize("name", THINKING)
def test_run_and_baseline_differ_in_one_line(name: str) -> None:
    head, _, format = name.rpartition("-")
    baseline = f"{head}-{format.removesuffix('think')}no_think"
    one, other = (RUNS[run].read_text(encoding="utf-8").splitlines() for run in (name, baseline))
    differing = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
    assert [[line.split() for line in pair] for pair in differing] == [
        [["format:", format], ["format:", baseline.rpartition("-")[2]]]
    ]


def test_every_run_has_a_baseline() -> None:
    assert len(RUNS) == 2 * len(THINKING) > 0


# Optimizer steps, learning rate, prompts per step, samples per prompt. DPO: two epochs over the paper's prompts.
SETTINGS = {
    "llama-grpo-think": (120, 1e-6, 64, 8),
    "qwen-instruct-grpo-no_think": (120, 3e-7, 64, 8),
    "qwen-grpo-zero_think": (120, 1e-6, 64, 8),
    "llama-grpo-skywork-v2-think": (120, 1e-6, 64, 8),
    "qwen-ppo-think": (120, 1e-6, 64, 1),
    "llama-instruct-ppo-think": (120, 3e-7, 64, 1),
    "qwen-dpo-no_think": (118, 3e-7, 128, 8),
    "llama-instruct-dpo-think": (118, 3e-7, 128, 8),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in RUNS])
def test_settings_equal_the_papers(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs: list[Any] = []

    def fit(trainer: Trainer, model: Any, datamodule: Any, **options: Any) -> None:
        runs.append((trainer, model, datamodule))

    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.chdir(tmp_path)
    assert main([*command_of(name), "--trainer.accelerator", "cpu"]) == 0
    ((trainer, module, data),) = runs
    optimizer = module.optimizer_factory([torch.nn.Parameter(torch.zeros(1))])
    lr = optimizer.defaults["lr"]
    settings = (trainer.max_steps, lr, data.batch_size, data.group_size)
    assert settings == SETTINGS.get(name, settings)
    assert (data.max_prompt_tokens, data.max_new_tokens, data.temperature, data.top_p) == (1024, 4096, 0.7, 1.0)
    dpo = "-dpo-" in name
    assert optimizer.defaults["weight_decay"] == (1e-4 if dpo else 0.01)
    assert tuple(optimizer.defaults["betas"]) == ((0.9, 0.95) if dpo else (0.9, 0.999))
    assert dpo or (module.algorithm.kl_estimator, module.algorithm.kl_clamp) == ("k3", 10)
    assert (module.reward.truncation_side, module.reward.dtype) == ("right", "bfloat16")
    assert trainer.default_root_dir == f"runs/paper/{name}"
    assert ("V2" in module.reward.source) == ("skywork-v2" in name)


def test_missing_warm_start_error_names_the_fix(
    prompts_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        "--data.prompts",
        str(prompts_file),
        "--data.engine",
        "TransformersEngine",
        "--trainer.accelerator",
        "cpu",
    ]
    assert main([*command_of("llama-grpo-no_think"), *options]) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error")]
    assert "runs/paper/warm-start/llama-3.1-8b-no_think: no such folder" in message and "docs/paper.md" in message


def test_docs_list_every_run_and_no_other() -> None:
    rows = [line.split("|")[1:-1] for line in DOCS.split("## Commands")[0].splitlines() if line.startswith("| ")]
    pairs = [(row[2].strip(" `"), row[4].strip(" `")) for row in rows if len(row) == 6 and "`" in row[2]]
    assert sorted(name for pair in pairs for name in pair) == sorted(RUNS)
    for baseline, thinking in pairs:
        assert baseline == re.sub("think$", "no_think", thinking)


def test_docs_have_the_command_of_every_run() -> None:
    lines = [line.split()[1:] for line in DOCS.splitlines() if line.startswith("rlmt fit ") and not line.endswith("\\")]
    assert sorted(lines) == sorted(command_of(name) for name in THINKING)


def test_docs_list_every_warm_start() -> None:
    expected = set()
    for name, path in RUNS.items():
        (policy,) = re.findall(r"^    policy: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        if policy.startswith("runs/"):
            expected.add(policy.replace("{format}", name.rpartition("-")[2]))
    table = re.findall(r"`(runs/paper/warm-start/[^`{]+)`", DOCS)
    assert sorted(table) == sorted(expected)
