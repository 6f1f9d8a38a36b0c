"""Code of the user's own in the working folder, without PYTHONPATH."""

import csv
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch._utils import ExceptionWrapper

from rlmt.cli import commands, main
from rlmt.errors import own_error_message

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
from torch.utils.data import DataLoader

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


def collate(rows):
    return {}["prompt"]


class Workers(RolloutDataModule):
    def train_dataloader(self):
        return DataLoader(range(8), batch_size=2, collate_fn=collate, num_workers=2)
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
            "(own_mistakes.py, line 23: with open(path) as file:; "
            "called in own_mistakes.py, line 19: self.words = read(path))",
        ),
        (
            "--model.reward own_mistakes.Loads",
            "Loads.load raised RuntimeError: no weights (own_mistakes.py, line 29: "
            'raise RuntimeError("no weights.\\nand more"))',
        ),
        (
            "--model.reward own_mistakes.Constant --model.algorithm own_mistakes.Prepares",
            "Prepares.prepare raised KeyError: 'advantages' (own_mistakes.py, line 34: return {}[\"advantages\"])"
            + RESUME,
        ),
        (
            "--model.reward own_mistakes.Constant --trainer.callbacks+ own_mistakes.Starts",
            "Starts.on_train_start raised AttributeError: 'Trainer' object has no attribute 'no_such_attribute' "
            "(own_mistakes.py, line 39: trainer.no_such_attribute)",
        ),
        (
            "--model.reward own_mistakes.Constant --data own_mistakes.Data",
            'Data.setup raised ValueError: no rows (own_mistakes.py, line 44: raise ValueError("no rows"))',
        ),
        (
            "--model.reward own_mistakes.Constant --data own_mistakes.Workers",
            "collate raised KeyError: 'prompt' (own_mistakes.py, line 48: return {}[\"prompt\"]) "
            "in DataLoader worker process 0" + RESUME,
        ),
        ("--model.reward own_syntax.Broken", "…(own_syntax.py, line 3: class Broken(:)"),
        (
            "--model.reward own_import.Any",
            "Your code raised ZeroDivisionError: division by zero (own_import.py, line 2: rate = 1 / (rows - 1))",
        ),
    ],
    ids=["init", "load", "algorithm", "callback", "data", "collate", "syntax", "import"],
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


ROWS = """
from rlmt.errors import UserError


class Rows:
    def __getitem__(self, index):
        return self.read(index)

    def read(self, index):
        if index == 0:
            raise ValueError("no text.\\nand more")
        try:
            [][index]
        except IndexError as error:
            raise UserError("rows.jsonl: row 1 is empty; fill it.") from error
"""


def raised_by_a_worker(index: int) -> Exception:
    """The exception that a data loader raises for an error of a dataset in its worker 0."""
    try:
        importlib.import_module("own_rows").Rows()[index]
    except Exception as error:
        assert error.__traceback__ is not None  # its first frame is of this file, which no worker runs
        sent = ExceptionWrapper((type(error), error, error.__traceback__.tb_next), "in DataLoader worker process 0")
    with pytest.raises(Exception) as raised:
        sent.reraise()
    return raised.value


@pytest.fixture
def own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_rows.py").write_text(ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_rows", None)


@pytest.mark.usefixtures("own_rows")
def test_error_of_a_dataset_in_a_worker_names_its_lines_and_the_first_line_of_its_message() -> None:
    error = raised_by_a_worker(0)
    assert "Traceback" in str(error)
    assert own_error_message(error) == (
        "__getitem__ raised ValueError: no text (own_rows.py, line 11: "
        'raise ValueError("no text.\\nand more"); called in own_rows.py, line 7: return self.read(index)) '
        "in DataLoader worker process 0" + AGAIN
    )


@pytest.mark.usefixtures("own_rows")
def test_user_error_of_a_worker_is_its_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: str, args: list[str]) -> int:
        raise raised_by_a_worker(1)

    monkeypatch.setitem(commands._COMMANDS, "doctor", fail)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "rlmt: error: rows.jsonl: row 1 is empty; fill it.\n"


@pytest.mark.usefixtures("own_rows")
def test_error_in_another_process_of_a_pool_is_one_line(tmp_path: Path) -> None:
    error = raised_by_a_worker(0)
    text = str(error).partition("Original ")[2]
    remote = RuntimeError("no text")
    remote.__cause__ = Exception(f'\n"""\n{text}"""')  # as multiprocessing and concurrent.futures attach it
    message = own_error_message(remote)
    assert message is not None and message.startswith("__getitem__ raised ValueError: no text (own_rows.py, line 11: ")
    assert message.endswith(") in another process" + AGAIN)
