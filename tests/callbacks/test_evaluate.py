"""Benchmarks during training: the policy's own completions, one value on all ranks, equal after a resume."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
sys.path += [str(FOLDER.parent / "endpoints"), str(FOLDER.parent / "evaluation")]

from loopback import Loopback, completion  # noqa: E402
from toys import PROMPTS, write_data  # noqa: E402

from rlmt.cli.commands import main  # noqa: E402
from rlmt.data.sampler import sample_seed  # noqa: E402
from rlmt.engines.transformers import stream  # noqa: E402
from rlmt.evaluation.models import LocalModel, resolve_model  # noqa: E402
from rlmt.models.loading import load_policy  # noqa: E402
from rlmt.types import Sampling  # noqa: E402


@pytest.fixture
def judge() -> Iterator[Loopback]:
    """Wins for every response with an `a` in it."""
    server = Loopback(
        lambda path, body: completion("win" if "a" in body["messages"][0]["content"].partition("B: ")[2] else "loss")
    )
    yield server
    server.close()


Command = Callable[..., list[str]]


@pytest.fixture
def command(
    tiny: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_plots: None, judge: Loopback
) -> Command:
    """Arguments of a tiny run that evaluates both toy benchmarks at each of its three validations."""
    monkeypatch.chdir(tmp_path)
    data = str(write_data(tmp_path / "data.jsonl"))
    endpoint = {"base_url": judge.url, "model": "judge"}
    callbacks = [
        {"class_path": "rlmt.callbacks.Evaluate", "init_args": {"benchmark": "toys.Letters", "data": data, "limit": 6}},
        {
            "class_path": "rlmt.callbacks.Evaluate",
            "init_args": {"benchmark": "toys.Duel", "data": data, "judge": endpoint},
        },
        {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/duel", "mode": "max", "filename": "best"}},
        {"class_path": "EarlyStopping", "init_args": {"monitor": "val/letters", "mode": "max", "patience": 50}},
    ]

    def arguments(name: str, *more: object) -> list[str]:
        options = {
            "--model.policy": tiny / "policy",
            "--model.reward.model": tiny / "reward",
            "--model.format": "no_think",
            "--model.malformed": "null",
            "--model.optimizer.lr": 1e-2,
            "--data.prompts": prompts_file,
            "--data.engine": "TransformersEngine",
            "--data.batch_size": 4,
            "--data.group_size": 4,
            "--data.max_prompt_tokens": 256,
            "--data.max_new_tokens": 12,
            "--data.val_size": 2,
            "--trainer.max_steps": 3,
            "--trainer.val_check_interval": 1,
            "--trainer.callbacks+": json.dumps(callbacks),
            "--trainer.default_root_dir": tmp_path / "run",
            "--trainer.accelerator": "cpu",
            "--trainer.enable_progress_bar": "false",
        }
        configs = [word for config in ("base", "grpo", "tiny") for word in ("--config", config)]
        return [name, *configs, *(str(word) for pair in options.items() for word in pair), *map(str, more)]

    return arguments


def read(run: Path, metric: str, version: int = 0) -> list[float]:
    with (run / f"version_{version}" / "metrics.csv").open() as file:
        return [float(row[metric]) for row in csv.DictReader(file) if row.get(metric)]


def expected_duel(checkpoint: Path) -> tuple[float, float]:
    """Win rate and share of malformed completions of a checkpoint's weights, sampled one by one."""
    model = resolve_model(str(checkpoint))
    assert isinstance(model, LocalModel)
    with model.weights() as folder:
        policy = load_policy(folder)
    sampling = Sampling(0.7, 12, stop_token_ids=model.stop_token_ids)
    wins = malformed = 0
    for number, prompt in enumerate(PROMPTS):
        ids = model.format.render([{"role": "user", "content": prompt}], model.tokenizer)
        tokens = list(stream(policy, ids, sampling, sample_seed(0, 0, number, 0)))
        split = model.format.split(model.format.decode(tokens, model.tokenizer))
        wins += split.ok and "a" in split.response
        malformed += not split.ok
    return 100 * wins / len(PROMPTS), malformed / len(PROMPTS)


def test_figures_are_those_of_the_current_weights_and_a_resumed_run_logs_the_same(
    command: Command, judge: Loopback, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert main(command("fit")) == 0
    whole = {name: read(run, f"val/{name}") for name in ("duel", "duel_malformed", "letters", "letters_malformed")}
    assert {len(values) for values in whole.values()} == {len(read(run, "val/reward_mean"))}
    win_rate, malformed = expected_duel(run / "latest" / "checkpoints" / "last.ckpt")
    assert (whole["duel"][-1], whole["duel_malformed"][-1]) == (pytest.approx(win_rate), pytest.approx(malformed))
    assert (run / "latest" / "checkpoints" / "best.ckpt").exists()
    keys = [json.loads(line)["key"] for line in (run / "evaluate.duel.jsonl").read_text().split("\n") if line]
    assert len(keys) == len(set(keys)) == len(judge.bodies)

    resumed = ["--trainer.default_root_dir", tmp_path / "resumed"]
    assert main(command("fit", *resumed, "--trainer.max_steps", 1)) == 0
    assert main(command("fit", *resumed, "--ckpt_path", "last")) == 0
    for name, values in whole.items():
        assert read(tmp_path / "resumed", f"val/{name}") == values


@pytest.mark.slow
def test_validate_evaluates_a_checkpoint(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("fit", "--trainer.max_steps", 1)) == 0
    checkpoint = tmp_path / "run" / "latest" / "checkpoints" / "last.ckpt"
    assert main(command("validate", "--ckpt_path", checkpoint)) == 0
    assert "val/duel" in capsys.readouterr().out.replace(" ", "") or read(tmp_path / "run", "val/duel", 1)


@pytest.mark.slow
def test_two_ranks_log_the_values_of_one(command: Command, judge: Loopback, crash: Any, tmp_path: Path) -> None:
    shutil.copy(FOLDER.parent / "evaluation" / "toys.py", tmp_path)  # each process has the working folder on its path
    words = command("validate")
    assert main(words) == 0
    alone = {name: read(tmp_path / "run", f"val/{name}") for name in ("duel", "letters", "duel_malformed")}
    asked = len(judge.bodies)
    shared = ["--config", "ddp", "--trainer.devices", "2", "--trainer.default_root_dir", str(tmp_path / "two")]
    log = tmp_path / "log.txt"
    crash.finish(crash.launch([*words, *shared], log, ranks=2), log)
    assert {name: read(tmp_path / "two", f"val/{name}") for name in alone} == alone
    assert len(judge.bodies) == 2 * asked  # rank 0 alone asks


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"benchmark": "nothing"}, "Evaluate.benchmark nothing: no such benchmark"),
    "no judge": ({"benchmark": "toys.Duel", "data": "data.jsonl"}, "Evaluate.judge is not set"),
    "no data": ({"benchmark": "toys.Letters"}, "Evaluate.data is not set"),
    "limit": ({"benchmark": "toys.Letters", "limit": 0}, "limit"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_before_weights_are_read(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("rlmt.models.loading.load_policy", lambda *_, **__: pytest.fail("weights were read"))
    options, message = ERRORS[case]
    callbacks = [{"class_path": "rlmt.callbacks.Evaluate", "init_args": options}]
    words = command("fit")
    words[words.index("--trainer.callbacks+") + 1] = json.dumps(callbacks)
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error")]
    assert message in line


def test_run_without_validation_is_refused(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("fit", "--data.val_size", 0)) == 2
    assert "Evaluate runs at validations, but --data.val_size is 0" in capsys.readouterr().err
