"""Every shell command of the README and of the documentation is valid."""

import functools
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from rlmt.cli import chat, commands, completion, configs, doctor, main, report, runs
from rlmt.cli.plan import PlanCLI
from rlmt.demos import tiny as tiny_demo
from rlmt.demos.mini import files
from rlmt.distill import command as distill_command
from rlmt.evaluation import command as evaluate_command
from rlmt.evaluation.compare import command as compare_command
from rlmt.evaluation.traits import command as traits_command
from rlmt.export import checkpoints
from rlmt.formats import ThinkingFormat
from rlmt.study import command
from rlmt.study.runner import Runner

from .pages import PAGES, README, ROOT, rlmt_arguments, shell_lines

TESTED_ELSEWHERE = {ROOT / "docs" / "paper.md"}
"""tests/configs/test_paper.py trains with each command of the paper's runs."""
COMMANDS = {
    arguments: page
    for page in reversed(PAGES)
    if page not in TESTED_ELSEWHERE
    for line in shell_lines(page)
    if (arguments := rlmt_arguments(line))
}
"""Arguments of `rlmt` → the first page that has them."""

RUNS = {"tiny/run": "RLMTModule", "llama-3.1-8b-think": "RLMTModule", "sft": "SFT", "reward": "RewardModeling"}
"""Folder of a run that commands of the pages read → module that wrote its checkpoint."""

FAST_PAGES = (README, ROOT / "docs" / "tutorial.md")


def recorder(function: Callable[..., Any], reached: list[str], name: str) -> Callable[..., Any]:
    """A replacement of a function with its signature that only records the call."""

    @functools.wraps(function)
    def record(*args: Any, **options: Any) -> None:
        reached.append(name)

    return record


@pytest.mark.parametrize(
    "arguments",
    [pytest.param(words, marks=() if page in FAST_PAGES else pytest.mark.slow) for words, page in COMMANDS.items()],
)
def test_rlmt_command_reaches_its_function(
    arguments: str,
    write_files: Callable[[Path], None],
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reached: list[str] = []
    for name in ("fit", "validate", "test", "predict"):
        monkeypatch.setattr(Trainer, name, recorder(getattr(Trainer, name), reached, name))
    monkeypatch.setattr(checkpoints, "export", recorder(checkpoints.export, reached, "export"))
    monkeypatch.setattr(tiny_demo, "make_tiny", recorder(tiny_demo.make_tiny, reached, "tiny"))
    monkeypatch.setattr(PlanCLI, "fit", lambda cli, **options: reached.append("plan"))
    monkeypatch.setattr(completion, "completion", lambda args: reached.append("completion") or 0)
    monkeypatch.setattr(doctor, "doctor", lambda: reached.append("doctor") or 0)
    monkeypatch.setattr(configs, "run", lambda args: reached.append("configs") or 0)
    monkeypatch.setattr(runs, "find_runs", lambda root: reached.append("runs") or [])
    monkeypatch.setattr(runs, "_watch", lambda folder, console: reached.append("runs"))
    monkeypatch.setattr(report, "run", lambda args: reached.append("report") or 0)
    monkeypatch.setattr(chat, "chat", recorder(chat.chat, reached, "chat"))
    monkeypatch.setattr(files, "write_mini", lambda *given: reached.append("mini") or {})
    monkeypatch.setattr(distill_command, "distill", recorder(distill_command.distill, reached, "distill"))
    monkeypatch.setattr(evaluate_command, "evaluate", recorder(evaluate_command.evaluate, reached, "evaluate"))
    monkeypatch.setattr(compare_command, "compare", recorder(compare_command.compare, reached, "compare"))
    monkeypatch.setattr(traits_command, "traits", recorder(traits_command.traits, reached, "traits"))
    monkeypatch.setattr(Runner, "run", lambda runner: reached.append("study"))
    monkeypatch.setattr(Runner, "list_jobs", lambda runner: reached.append("study") or {})
    monkeypatch.setattr(command, "report", lambda *anything: None)
    monkeypatch.setattr(command, "check_executor", lambda executor: None)
    write_files(COMMANDS[arguments])
    words = shlex.split(arguments)
    for run, module in RUNS.items():
        checkpoint = tmp_path / "runs" / run / "version_0/checkpoints/last.ckpt"
        checkpoint.parent.mkdir(parents=True)
        (tmp_path / "runs" / run / "latest").symlink_to("version_0")
        state = {"module": module, "adapter": None, "quantization": None, "format": ThinkingFormat().to_dict()}
        torch.save({"rlmt": state}, checkpoint)
    if words[0] in ("validate", "predict"):  # they read the models of the run
        for made in tiny.iterdir():
            (tmp_path / "runs/tiny" / made.name).symlink_to(made)
    if words[0] == "validate" and words[-2:] == ["--ckpt_path", "last"]:  # of the run of `fit` with these options
        (root,) = {run for run in RUNS if run in words}
        with pytest.raises(SystemExit, match="0"):
            main(["fit", *words[1:-2], "--print_config"])
        (tmp_path / "runs" / root / "version_0/config.yaml").write_text(capsys.readouterr().out)
    on_cpu = ["--trainer.accelerator", "cpu"] if words[0] in ("fit", "validate", "predict", "plan") else []
    if "--print_config" in words:
        with pytest.raises(SystemExit, match="0"):
            main(words)
        return
    assert main([*words, *on_cpu]) == 0
    assert reached == [words[0]]


ORDER = (
    ("base",),
    ("grpo", "ppo", "dpo"),
    ("tiny", "llama-3.1-8b", "qwen2.5-7b", "qwen2.5-0.5b", "mini/rl"),
    ("think", "no_think", "zero_think", "zero_no_think", "instructed"),
    ("lora", "qlora"),
    ("server",),
    ("ddp", "fsdp"),
)
"""Configs of RL runs by their place in a command: objective, models, format, adapter, engine, devices."""


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_one_order_of_configs(page: Path) -> None:
    places = {name: place for place, names in enumerate(ORDER) for name in names}
    for line in shell_lines(page):
        names = re.findall(r"--config ([\w./-]+)", line)
        if "base" in names:
            found = [places[name] for name in names if name in places]
            assert found == sorted(found), line


@pytest.mark.parametrize("page", PAGES)
def test_pages_write_the_tiny_models_before_they_use_them(page: Path) -> None:
    lines = shell_lines(page)
    using = [n for n, line in enumerate(lines) if re.search(r"--config tiny\b|\bruns/tiny/", line)]
    writing = [n for n, line in enumerate(lines) if re.match(r"rlmt tiny\b", line)]
    assert not using or (writing and writing[0] < using[0]), lines[using[0]]


def test_documentation_has_every_command() -> None:
    assert {arguments.split()[0] for arguments in COMMANDS} == set(commands._COMMANDS) - {"test"}


@pytest.mark.parametrize("page", PAGES)
def test_other_commands_name_existing_targets_scripts_and_options(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    for line in shell_lines(page):
        words = shlex.split(line)
        if words[0] == "make":
            assert words[1] in targets, line
        elif words[0] == "sbatch":
            assert (ROOT / words[1]).is_file(), line
        elif words[0] == "python" and words[1].endswith(".py"):
            script = ROOT / words[1]
            assert script.is_file() or f'title="{words[1]}"' in text, line
            options = [word for word in words[2:] if word.startswith("--")]
            assert all(option in script.read_text(encoding="utf-8") for option in options), line
        else:  # tests/engines/vllm_server starts the servers, "VLLM_..." and "python -m vllm..."
            assert rlmt_arguments(line) or words[0] in ("source", "export", "python", "mkdir") or "vllm" in line, line


def test_readme_starts_with_the_two_commands() -> None:
    assert [line.split()[1] for line in shell_lines(README) if line.startswith("make ")] == ["quickstart", "test"]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text: Any = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in commands._COMMANDS)
