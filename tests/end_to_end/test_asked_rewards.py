"""Runs whose rewards are asked for: every class, a judge that dies, and verdicts that are recorded."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from rlmt.cli.commands import main
from rlmt.models.logprobs import compute_logprobs

sys.path.append(str(Path(__file__).parents[1] / "endpoints"))
from loopback import Loopback, Reply, completion  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_plots")
Fit = Callable[..., int]


@pytest.fixture
def fit(tiny: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """`fit(run, reward, ...)` trains for three rollouts on tiny models; prompts have a reference and a rubric."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlmt.endpoints.client.FIRST_WAIT", 0.001)
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    extra = {"reference": "Yes.", "rubric": ["short", {"criterion": "kind", "weight": 2}]}
    Path("prompts.jsonl").write_text("".join(json.dumps(row | extra) + "\n" for row in rows))

    def run(folder: str, reward: dict[str, Any], *more: object) -> int:
        Path("reward.json").write_text(json.dumps({"model": {"init_args": {"reward": reward}}}))
        options = {
            "--model.policy": tiny / "policy",
            "--model.format": "no_think",
            "--model.malformed": "null",
            "--data.prompts": "prompts.jsonl",
            "--data.extra_columns": "[reference, rubric]",
            "--data.engine": "TransformersEngine",
            "--data.batch_size": 4,
            "--data.group_size": 4,
            "--data.max_prompt_tokens": 256,
            "--data.max_new_tokens": 8,
            "--data.val_size": 0,
            "--trainer.max_steps": 3,
            "--trainer.default_root_dir": folder,
            "--trainer.enable_progress_bar": "false",
        }
        words = [str(word) for pair in options.items() for word in pair]
        configs = [word for name in ("base", "grpo", "tiny", "reward.json") for word in ("--config", name)]
        return main(["fit", *configs, *words, *map(str, more)])

    return run


def score_anything(path: str, body: Any) -> Reply:
    """Answers the requests of every reward by the length of the response."""
    if path == "/classify":
        scores = [len(ids) % 7 / 2 - 1 for ids in body["input"]]
        if body["use_activation"]:
            scores = [1 / (1 + math.exp(-score)) for score in scores]
        return Reply({"data": [{"index": i, "probs": [score]} for i, score in enumerate(scores)]})
    if "responses" in body:
        return Reply({"rewards": [len(text) % 5 for text in body["responses"]]})
    question = body["messages"][-1]["content"]
    lengths = [len(text) for text in re.findall(r"<response(?:_[ab])?>\n(.*?)\n</response", question, re.DOTALL)]
    if len(lengths) == 2:
        return completion("Winner: " + ("tie" if lengths[0] == lengths[1] else "AB"[lengths[1] > lengths[0]]))
    if "<criteria>" in question:
        return completion(f"1: {'yes' if lengths[0] % 2 else 'no'}\n2: {'yes' if lengths[0] % 3 else 'no'}")
    return completion(f"Score: {1 + lengths[0] % 9}")


@pytest.fixture
def service() -> Iterator[Loopback]:
    """A service for every reward; tests may set another `script`."""
    server = Loopback(score_anything)
    yield server
    server.close()


def rewards_of(server: Loopback, tiny: Path) -> dict[str, dict[str, Any]]:
    """A configuration of each class that asks."""
    judge = {"endpoint": {"base_url": server.url, "model": "judge", "max_attempts": 2}, "ledger": "ledger/judge.jsonl"}
    plain = {"base_url": server.url}
    options: dict[str, dict[str, Any]] = {
        "JudgeReward": judge | {"samples": 2, "temperature": 1.0},
        "PairwiseJudgeReward": judge | {"ledger": None, "reference_column": "reference"},
        "RubricReward": judge | {"ledger": None},
        "RemoteReward": {"endpoint": plain, "label_column": "reference"},
        "ServedReward": {"model": str(tiny / "reward"), "endpoints": [plain]},
    }
    return {name: {"class_path": f"rlmt.rewards.{name}", "init_args": init} for name, init in options.items()}


def metrics(run: str) -> list[dict[str, float]]:
    with (Path(run) / "version_0" / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_sum_of_every_reward_trains_and_log_probs_are_computed_while_it_is_asked_for(
    fit: Fit, service: Loopback, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, waited = threading.Event(), []

    def compute(*args: Any) -> torch.Tensor:
        computed.set()
        return compute_logprobs(*args)

    def slow(path: str, body: Any) -> Reply:
        """Answers about responses only once log-probs are computed."""
        if path != "/classify":  # these are probed at start
            waited.append(computed.wait(60))
        return score_anything(path, body)

    monkeypatch.setattr("rlmt.modules.rlmt.compute_logprobs", compute)
    service.script = slow
    parts = list(rewards_of(service, tiny).values())
    scale = ["running_std", "none", "batch_std", "none", "running_std"]
    init = {"rewards": parts, "weights": [1.0] * 5, "scale": scale}
    reward = {"class_path": "rlmt.rewards.WeightedSum", "init_args": init}
    assert fit("run", reward, "--trainer.max_steps", 2, "--trainer.val_check_interval", 1, "--data.val_size", 2) == 0
    rows = [row for row in metrics("run") if "reward/mean" in row]
    names = ("judge", "win_rate", "rubric", "remote", "reward_model")
    assert waited and all(waited)
    assert len(rows) >= 2  # steps without a learning signal do not count
    for row in rows:
        assert all(f"reward/{name}" in row for name in names)
        assert row["reward/judge_unparsed"] == row["reward/rubric_unparsed"] == 0
        assert sum(row[f"reward/{name}_share"] for name in names) == pytest.approx(1)
    table = [row for path in Path("run").rglob("rollouts_*.parquet") for row in pq.read_table(path).to_pylist()]
    assert {json.loads(row["extra"])["reference"] for row in table} == {"Yes."}
    responses = [text for body in service.bodies for text in body.get("responses", [])]
    assert not Counter(row["scored_text"] for row in table) - Counter(responses)
    saved = torch.load("run/latest/checkpoints/last.ckpt", weights_only=True)["rlmt"]["rewards"]
    assert saved == {"0": {"0": saved["0"]["0"], "4": saved["0"]["4"]}} and saved["0"]["0"][0] == 16 * len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["JudgeReward", "PairwiseJudgeReward", "RubricReward", "RemoteReward", "ServedReward"])
def test_every_reward_trains(name: str, fit: Fit, service: Loopback, tiny: Path) -> None:
    assert fit("run", rewards_of(service, tiny)[name]) == 0
    rows = [row for row in metrics("run") if "reward/mean" in row]
    assert len(rows) >= 3  # steps without a learning signal do not count
    assert any(row.get("policy/loss", 0) != 0 for row in rows)


@pytest.mark.slow
def test_judge_that_dies_ends_the_run_resumable_and_no_verdict_is_asked_for_twice(
    fit: Fit, service: Loopback, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The judge's verdicts are random, so that only recorded ones give the same run again."""
    scores = itertools.cycle([1, 7, 3, 9, 4, 2, 8])

    def fickle(path: str, body: Any) -> Reply:
        return completion(f"Score: {next(scores)}")

    def dying(path: str, body: Any) -> Reply:
        return fickle(path, body) if len(service.bodies) < 40 else Reply({}, 503)  # a batch has at most 32 requests

    reward = rewards_of(service, tiny)["JudgeReward"]
    service.script = dying
    assert fit("run", reward) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error: ")]
    assert "no answer in 2 attempts (status 503" in line and "resume with --ckpt_path last" in line
    assert 1 <= len([row for row in metrics("run") if "reward/mean" in row]) < 3
    service.script = fickle
    assert fit("run", reward, "--ckpt_path", "last") == 0
    recorded = [json.loads(row)["key"] for row in Path("ledger/judge.jsonl").read_text().splitlines()]
    assert len(recorded) == len(set(recorded)) > 40
    asked = len(service.bodies)

    service.script = lambda path, body: Reply({}, 503)
    assert fit("again", reward) == 0, "every verdict is recorded"
    assert len(service.bodies) == asked
    ends = [
        torch.load(f"{run}/latest/checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in ("run", "again")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_missing_column_is_an_error_before_any_model_is_loaded(
    fit: Fit, service: Loopback, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlmt.models.loading.load_policy", lambda *args, **options: pytest.fail("loaded"))
    assert fit("run", rewards_of(service, tiny)["RubricReward"], "--data.extra_columns", "[reference]") == 2
    assert "--data.extra_columns does not have 'rubric', which reward 'rubric' reads" in capsys.readouterr().err
