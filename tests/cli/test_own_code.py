"""Code of the user's own in the working folder, without PYTHONPATH."""

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlmt.cli import main

REWARD = """
def brief(prompt, response):
    return -float(len(response))
"""


@pytest.mark.slow
def test_reward_in_the_working_folder_is_found_by_every_rank(tiny: Path, prompts_file: Path, tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(REWARD)
    options = (
        f"--config base --config grpo --config tiny --config ddp --model.policy {tiny}/policy --model.format no_think "
        f"--model.reward CallableReward --model.reward.function my_rewards.brief --data.prompts {prompts_file} "
        "--data.engine TransformersEngine --data.batch_size 4 --data.group_size 2 --data.max_prompt_tokens 256 "
        "--data.max_new_tokens 8 --data.val_size 4 --trainer.max_epochs 1 --trainer.limit_train_batches 1 "
        "--trainer.devices 2 --trainer.accelerator cpu --trainer.precision 32-true --trainer.enable_progress_bar false "
        "--trainer.default_root_dir run"
    )
    rlmt = Path(sys.executable).with_name("rlmt")  # the script, which Lightning starts again for the second rank
    done = subprocess.run([rlmt, "fit", *options.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "MEMBER: 2/2" in done.stderr + done.stdout, done.stderr
    (metrics,) = tmp_path.rglob("metrics.csv")
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    assert any(float(row["reward/brief"]) <= 0 for row in rows if row.get("reward/brief"))


MISTAKES = """
import torch
from lightning.pytorch import Callback

from rlmt.algorithms import GRPO
from rlmt.data import RolloutDataModule
from rlmt.rewards import Reward


class Constant(Reward):
    def score(self, prompts, responses, statuses):
        return torch.ones(len(responses))


class Opens(Constant):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.words = read(path)


def read(path):
    with open(path) as file:
        return file.read().split()


class Loads(Constant):
    def load(self):
        raise RuntimeError("no weights.\\nand more")


class Prepares(GRPO):
    def prepare(self, experience):
        return {}["advantages"]


class Starts(Callback):
    def on_train_start(self, trainer, pl_module):
        trainer.no_such_attribute


class Data(RolloutDataModule):
    def setup(self, stage):
        raise ValueError("no rows")
"""
MODULES = {
    "own_mistakes.py": MISTAKES,
    "own_syntax.py": "\n\nclass Broken(:\n    pass\n",
    "own_import.py": "rows = 1\nrate = 1 / (rows - 1)\n",
}
AGAIN = "; fix it, and run the command again."
RESUME = "; fix it, and resume with --ckpt_path last."


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder with the modules; they are imported once."""
    folder = tmp_path_factory.mktemp("own")
    for name, text in MODULES.items():
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        yield folder


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            "--model.reward own_mistakes.Opens --model.reward.path words.txt",
            "Opens.__init__ raised FileNotFoundError: [Errno 2] No such file or directory: 'words.txt' "
            "(own_mistakes.py, line 22: with open(path) as file:; "
            "called in own_mistakes.py, line 18: self.words = read(path))",
        ),
        (
            "--model.reward own_mistakes.Loads",
            "Loads.load raised RuntimeError: no weights (own_mistakes.py, line 28: "
            'raise RuntimeError("no weights.\\nand more"))',
        ),
        (
            "--model.reward own_mistakes.Constant --model.algorithm own_mistakes.Prepares",
            "Prepares.prepare raised KeyError: 'advantages' (own_mistakes.py, line 33: return {}[\"advantages\"])"
            + RESUME,
        ),
        (
            "--model.reward own_mistakes.Constant --trainer.callbacks+ own_mistakes.Starts",
            "Starts.on_train_start raised AttributeError: 'Trainer' object has no attribute 'no_such_attribute' "
            "(own_mistakes.py, line 38: trainer.no_such_attribute)",
        ),
        (
            "--model.reward own_mistakes.Constant --data own_mistakes.Data",
            'Data.setup raised ValueError: no rows (own_mistakes.py, line 43: raise ValueError("no rows"))',
        ),
        ("--model.reward own_syntax.Broken", "…(own_syntax.py, line 3: class Broken(:)"),
        (
            "--model.reward own_import.Any",
            "Your code raised ZeroDivisionError: division by zero (own_import.py, line 2: rate = 1 / (rows - 1))",
        ),
    ],
    ids=["init", "load", "algorithm", "callback", "data", "syntax", "import"],
)
def test_error_in_own_code_is_one_line(
    options: str,
    line: str,
    own_folder: Path,
    tiny: Path,
    prompts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = (
        f"fit --config base --config grpo --config tiny --model.policy {tiny}/policy --model.format no_think "
        f"--data.prompts {prompts_file} --data.engine TransformersEngine --data.batch_size 2 --data.group_size 2 "
        "--data.max_prompt_tokens 256 --data.max_new_tokens 4 --data.val_size 0 --trainer.max_steps 1 "
        f"--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.default_root_dir {tmp_path}/run"
    )
    assert main([*run.split(), *options.split()]) == 2
    printed = capsys.readouterr().err
    (found,) = [text for text in printed.splitlines() if text.startswith("rlmt: error: ")]
    line += "" if line.endswith(RESUME) else AGAIN
    assert found.endswith(line.removeprefix("…")) and "Traceback" not in printed
    assert line.startswith("…") or found == f"rlmt: error: {line}"
