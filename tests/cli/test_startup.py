"""Start of the `rlmt` command: what it imports, how long help takes, and what it prints on stderr."""

import json
import os
import pty
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

LIGHTNING_REPORTS = (
    "Seed set to",
    "GPU available:",
    "Restoring states from the checkpoint path",
    "Restored all states from the checkpoint",
    "`Trainer.fit` stopped:",
)
"""Lines of Lightning that report on the run."""

USED_BY_SOME_RUNS = {
    *("transformers", "peft", "bitsandbytes", "vllm", "openai", "datasets"),
    *("sklearn", "scipy.signal", "torchmetrics.text", "torch._inductor.compile_fx"),
}
"""Modules that no command needs for its options, each of which takes a quarter of a second or more to import."""


def run(*args: str) -> tuple[str, set[str]]:
    """Output of a command in a new process, and the modules that it imports."""
    code = (
        "import sys; from rlmt.cli.commands import main\n"
        f"try: main({list(args)!r})\n"
        "except SystemExit: pass\n"
        "print('MODULES', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text, _, modules = done.stdout.rpartition("MODULES")
    return text, set(modules.split())


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    text, modules = run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # CPU seconds, on a busy machine too
    assert "rlmt tiny" in text
    assert not {"torch", "vllm", "lightning", "transformers"} & modules


def test_fit_help_imports_no_library_that_only_some_runs_use() -> None:
    """The limit is in CPU seconds, not those on the clock, and leaves room for a busy machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    text, modules = run("fit", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "--trainer.max_steps" in text
    assert not USED_BY_SOME_RUNS & modules
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 16


def test_errors_of_options_are_reported_before_models_can_be_loaded() -> None:
    """Options are checked by the signatures of the classes, in whose annotations transformers' classes occur."""
    _, modules = run("fit", "--config", "base", "--config", "grpo", "--model.algorithm.kl_koef", "1")
    assert "lightning" in modules and not USED_BY_SOME_RUNS & modules


@pytest.mark.slow
def test_terminal_shows_that_a_command_starts() -> None:
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "rlmt", "tiny", "--help"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, env={**os.environ, "TERM": "xterm"}, check=True)
    os.close(end)
    assert b"starting" in os.read(terminal, 10_000) and b"starting" not in done.stdout
    os.close(terminal)


@pytest.mark.slow
def test_deferred_torchmetrics_is_complete_once_it_is_used() -> None:
    code = (
        "from rlmt.cli.deferred_imports import defer_torchmetrics; defer_torchmetrics()\n"
        "import sys, torchmetrics\n"
        "from torchmetrics.metric import Metric\n"
        "before = 'torchmetrics.text' in sys.modules\n"
        "accuracy = torchmetrics.Accuracy(task='binary')\n"
        "same = torchmetrics.Metric is Metric and isinstance(accuracy, Metric) and bool(torchmetrics.functional)\n"
        "print(before, same, torchmetrics.__version__ != '', hasattr(torchmetrics, 'no_such_name'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False True True False\n"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--config no_such_config", "--config no_such_config: no such file"),
        ("--config broken.yaml", "--config broken.yaml: line 2, column 1:"),
        ("--optimizer AdamW", "--optimizer: no such option; use --model.optimizer AdamW"),
    ],
)
def test_errors_of_config_files_are_reported_before_torch_is_imported(options: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("model: [1, 2\n")
    code = (
        "import sys; from rlmt.cli.commands import main\n"
        f"status = main({['fit', *options.split()]!r})\n"
        "print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "2 False\n"
    assert done.stderr.startswith(f"rlmt: error: {line}")


@pytest.mark.parametrize("count", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_commands_print_no_third_party_lines(count: int, tiny: Path, prompts_file: Path, tmp_path: Path) -> None:
    """Fit, resume, export, chat and plan, in one process; the random policy may chat in a malformed way."""
    models = (
        f"--config base --config grpo --config tiny --model.policy {tiny}/policy --model.reward.model {tiny}/reward"
    )
    options = (
        f"--data.prompts {prompts_file} --data.engine TransformersEngine --data.batch_size 4 --data.group_size 4 "
        "--data.max_prompt_tokens 256 --data.max_new_tokens 12 --data.val_size 4 --model.format no_think "
        f"--trainer.default_root_dir {tmp_path}/run --trainer.enable_progress_bar false"
    )
    chat_options = "--format no_think --prompt Hello --max_new_tokens 200"
    commands = [
        f"fit {models} {options} --trainer.max_steps 1",
        f"fit {models} {options} --trainer.max_steps 2 --ckpt_path last",
        f"export {tmp_path}/run/latest/checkpoints/last.ckpt {tmp_path}/out",
        f"chat {tiny}/policy {chat_options}",
        f"plan {models} --memory 24",
    ][:count]
    # At last a warning that C++ code prints past Python's filters, as vLLM's CPU build does, and tips of Lightning.
    third_party = (
        "import torch; torch.ops.aten.std.correction(torch.ones(1), [0], correction=1)\n"
        "from lightning.pytorch.utilities import rank_zero_info\n"
        "rank_zero_info('💡 Tip: For seamless cloud uploads, try installing [litmodels]')\n"
        "rank_zero_info('You are using a CUDA device (x) that has Tensor Cores. To properly utilize them, …')\n"
    )
    code = (
        f"from rlmt.cli.commands import main\nstatuses = [main(line.split()) for line in {json.dumps(commands)}]\n"
        f"{third_party}print(statuses)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    *_, statuses = done.stdout.splitlines()
    assert json.loads(statuses) in ([0, 0, 0, 0, 0][:count], [0, 0, 0, 2, 0][:count]), done.stderr
    ours = re.compile(
        r"[\d,]+ .*prompts|rlmt: error: The completion is malformed|" + "|".join(map(re.escape, LIGHTNING_REPORTS))
    )
    assert [line for line in done.stderr.splitlines() if line.strip() and not ours.match(line)] == []
