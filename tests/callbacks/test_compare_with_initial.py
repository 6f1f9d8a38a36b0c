"""The policy against the initial one during training: by rewards and a judge, equal after a resume, on all ranks."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
sys.path += [str(FOLDER.parent / "endpoints"), str(FOLDER.parent / "evaluation")]

from loopback import Loopback, completion  # noqa: E402
from toys import PROMPTS  # noqa: E402

from rlmt.callbacks import CompareWithInitial  # noqa: E402
from rlmt.cli.commands import main  # noqa: E402
from rlmt.data.sampler import sample_seed  # noqa: E402
from rlmt.engines.transformers import stream  # noqa: E402
from rlmt.evaluation.models import LocalModel, resolve_model  # noqa: E402
from rlmt.models.loading import load_policy  # noqa: E402
from rlmt.types import Sampling, Split  # noqa: E402

RATES = ("val/reward_model_win_rate", "val/has_e_win_rate", "val/judge_win_rate")


@pytest.fixture
def judge() -> Iterator[Loopback]:
    """Prefers the response with more letters `a`; where they have equally many, the one that it is shown first."""

    def prefer(path: str, body: Any) -> Any:
        text = body["messages"][0]["content"]
        first, second = (re.search(f"<response_{x}>(.*)</response_{x}>", text, re.DOTALL) for x in "ab")
        assert first is not None and second is not None
        return completion(f"I see.\nWinner: {'B' if second[1].count('a') > first[1].count('a') else 'A'}")

    server = Loopback(prefer)
    yield server
    server.close()


Command = Callable[..., list[str]]


@pytest.fixture
def command(
    tiny: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_plots: None, judge: Loopback
) -> Command:
    """Arguments of a tiny run that is compared with its initial policy at each of its two validations."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    endpoint = {"base_url": judge.url, "model": "judge"}
    callbacks = [
        {"class_path": "rlmt.callbacks.CompareWithInitial", "init_args": {"judge": endpoint}},
        {"class_path": "ModelCheckpoint", "init_args": {"monitor": RATES[2], "mode": "max", "filename": "best"}},
        {"class_path": "EarlyStopping", "init_args": {"monitor": RATES[1], "mode": "max", "patience": 50}},
    ]
    held_out = [{"class_path": "RegexReward", "init_args": {"pattern": "e", "name": "has_e"}}]

    def arguments(name: str, *more: object) -> list[str]:
        options = {
            "--model.policy": tiny / "policy",
            "--model.reward.model": tiny / "reward",
            "--model.held_out_rewards": json.dumps(held_out),
            "--model.format": "no_think",
            "--model.malformed": "null",
            "--model.optimizer.lr": 5e-4,
            "--data.prompts": prompts_file,
            "--data.val_prompts": "val.jsonl",
            "--data.val_size": len(PROMPTS),
            "--data.engine": "TransformersEngine",
            "--data.batch_size": 4,
            "--data.group_size": 4,
            "--data.max_prompt_tokens": 256,
            "--data.max_new_tokens": 12,
            "--trainer.max_steps": 2,
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


def answers(source: Path) -> list[Split]:
    """A policy's answers to the validation prompts, sampled one by one."""
    model = resolve_model(str(source), "no_think" if (source / "config.json").exists() else None)
    assert isinstance(model, LocalModel)
    with model.weights() as folder:
        policy = load_policy(folder)
    sampling = Sampling(0.7, 12, stop_token_ids=model.stop_token_ids)
    found = []
    for number, prompt in enumerate(PROMPTS):
        ids = model.format.render([{"role": "user", "content": prompt}], model.tokenizer)
        tokens = list(stream(policy, ids, sampling, sample_seed(0, 0, number, 0)))
        found.append(model.format.split(model.format.decode(tokens, model.tokenizer)))
    return found


def win_rate(now: list[Split], before: list[Split], score: Callable[[str], float]) -> float:
    """The share of prompts that the first policy wins; a malformed answer scores less than any other."""
    scores = [[score(split.response) if split.ok else -1.0 for split in pair] for pair in zip(now, before, strict=True)]
    return sum((a > b) + 0.5 * (a == b) for a, b in scores) / len(scores)


def test_win_rates_of_a_resumed_run_are_those_of_the_answers_of_both_policies(
    command: Command, judge: Loopback, tiny: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert main(command("fit", "--trainer.max_steps", 1)) == 0
    assert (run / "latest" / "report.html").exists()
    (run / "latest" / "report.html").unlink()
    assert main(command("fit", "--ckpt_path", "last", "--report", "false")) == 0
    assert not (run / "latest" / "report.html").exists()
    rates = {name: read(run, name) for name in RATES}
    assert [len(values) for values in rates.values()] == [2, 2, 2]
    now, before = answers(run / "latest" / "checkpoints" / "last.ckpt"), answers(tiny / "policy")
    assert [split.response for split in now] != [split.response for split in before]
    assert {split.ok for split in [*now, *before]} == {True, False}
    assert rates[RATES[1]][-1] == pytest.approx(win_rate(now, before, lambda text: float("e" in text)))
    assert rates[RATES[2]][-1] == pytest.approx(win_rate(now, before, lambda text: float(text.count("a"))))
    assert (run / "latest" / "checkpoints" / "best.ckpt").exists()
    keys = [json.loads(line)["key"] for line in (run / "compare_with_initial.jsonl").read_text().split("\n") if line]
    assert len(keys) == len(set(keys)) == len(judge.bodies)


@pytest.mark.slow
def test_resumed_run_logs_the_values_of_an_uninterrupted_one(command: Command, judge: Loopback, tmp_path: Path) -> None:
    assert main(command("fit")) == 0
    asked, resumed = len(judge.bodies), ["--trainer.default_root_dir", tmp_path / "resumed"]
    assert main(command("fit", *resumed, "--trainer.max_steps", 1)) == 0
    assert main(command("fit", *resumed, "--ckpt_path", "last")) == 0
    for name in (*RATES, "val/has_e", "reward/mean"):
        assert read(tmp_path / "resumed", name) == read(tmp_path / "run", name)
    assert len(judge.bodies) == 2 * asked


@pytest.mark.slow
def test_training_is_the_same_without_the_callback_and_validate_compares(command: Command, tmp_path: Path) -> None:
    assert main(command("fit")) == 0
    plain = command("fit", "--trainer.default_root_dir", tmp_path / "plain")
    del plain[(index := plain.index("--trainer.callbacks+")) : index + 2]
    assert main(plain) == 0
    for name in ("reward/mean", "policy/loss", "policy/grad_norm", "val/has_e"):
        assert read(tmp_path / "run", name) == read(tmp_path / "plain", name)
    checkpoint = tmp_path / "run" / "latest" / "checkpoints" / "last.ckpt"
    assert main(command("validate", "--ckpt_path", checkpoint)) == 0
    for name in RATES:
        assert read(tmp_path / "run", name, 1) == read(tmp_path / "run", name)[-1:]


@pytest.mark.slow
def test_two_ranks_log_the_win_rates_of_one(command: Command, judge: Loopback, crash: Any, tmp_path: Path) -> None:
    words = command("fit", "--trainer.max_steps", 1)
    assert main(words) == 0
    alone, asked = {name: read(tmp_path / "run", name) for name in RATES}, len(judge.bodies)
    shared = ["--config", "ddp", "--trainer.devices", "2", "--trainer.default_root_dir", str(tmp_path / "two")]
    log = tmp_path / "log.txt"
    crash.finish(crash.launch([*words, *shared], log, ranks=2), log)
    assert {name: read(tmp_path / "two", name) for name in alone} == alone
    assert len(judge.bodies) == 2 * asked  # rank 0 alone asks


@pytest.mark.slow
def test_checkpoint_of_a_run_without_the_callback_is_refused(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = command("fit", "--trainer.max_steps", 1)
    del plain[(index := plain.index("--trainer.callbacks+")) : index + 2]
    assert main(plain) == 0
    assert main(command("fit", "--ckpt_path", "last")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error")]
    assert "--ckpt_path: has no answers of the initial policy" in line


ERRORS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "no validation": ({}, ["--data.val_size", "0"], "--data.val_size is 0"),
    "no judge": ({"judge": {"base_url": "http://127.0.0.1:1/v1"}}, [], "CompareWithInitial.judge.model is not set"),
    "template": (
        {"judge": {"base_url": "http://127.0.0.1:1/v1", "model": "m"}, "template": "{response_a}"},
        [],
        "--template does not contain {response_b}",
    ),
    "column": (
        {"judge": {"base_url": "http://127.0.0.1:1/v1", "model": "m"}, "template": "{response_a}{response_b}{level}"},
        [],
        "--data.extra_columns does not have 'level'",
    ),
    "tokens": ({"max_tokens": 0}, [], "max_tokens"),
    "scale": (
        {},
        [
            "--model.held_out_rewards",
            '[{"class_path": "WeightedSum", "init_args": {"rewards": ["FormatReward"], "weights": [1], '
            '"scale": ["batch_std"]}}]',
        ],
        "divides scores by their spread over a batch",
    ),
}


FAST = ("no validation", "column", "scale")


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in ERRORS]
)
def test_errors_are_one_line_before_weights_are_read(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("rlmt.models.loading.load_policy", lambda *_, **__: pytest.fail("weights were read"))
    options, more, message = ERRORS[case]
    words = command("fit", *more)
    words[words.index("--trainer.callbacks+") + 1] = json.dumps(
        [{"class_path": "rlmt.callbacks.CompareWithInitial", "init_args": options}]
    )
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error")]
    assert message in line


def test_callbacks_with_two_judges_have_states_of_their_own() -> None:
    from rlmt.endpoints import Endpoint

    callbacks = [CompareWithInitial(Endpoint("http://127.0.0.1:1/v1", model)) for model in ("one", "two")]
    assert len({callback.state_key for callback in [*callbacks, CompareWithInitial()]}) == 3
