"""Fixtures that all tests share. Every test process runs on one thread and without a network."""

import os

# The number of threads changes the last bits of sums. torch reads this when it is imported; child processes inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import json  # noqa: E402
import logging  # noqa: E402
import random  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402

logging.raiseExceptions = False  # Lightning's handler keeps the stream that pytest captured for an earlier test

LONGEST = (
    "tests/end_to_end/test_end_to_end.py",
    "tests/engines/vllm_server/test_runs.py",
    "tests/checkpointing/test_interruptions.py",
    "tests/cli/test_commands.py",
    "tests/cli/test_plan.py",
    "tests/cli/test_startup.py",
    "tests/modules/test_ranks.py",
    "tests/end_to_end/test_lora.py",
    "tests/engines/vllm/test_engine.py",
    "tests/engines/vllm/test_lora.py",
    "tests/configs/test_configs.py",
    "tests/end_to_end/test_supervised_lora.py",
    "tests/end_to_end/test_supervised_runs.py",
    "tests/end_to_end/test_replay.py",
    "tests/end_to_end/test_ppo_cli.py",
    "tests/export/test_merge.py",
    "tests/checkpointing/test_crash.py",
    "tests/configs/test_paper.py",
)
"""The files that take longest. They run first, so that no worker starts one when the others are nearly done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the tests of the longest files to the front, in the order of LONGEST."""
    places = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only folder as `rlmt tiny` writes it, with a smaller policy: policy/, reward/, prompts.jsonl."""
    from rlmt.demos.tiny import write_tiny
    from rlmt.demos.tiny_models import Sizes

    out = tmp_path_factory.mktemp("tiny")
    write_tiny(out, sizes=Sizes(hidden=64, layers=2, heads=2, ffn=128, vocab=512, context=1024))
    return out


@pytest.fixture(scope="session")
def prompts_file(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 short prompts, one user turn each, as a JSONL file with the column `messages`."""
    lines = (tiny / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[::16]
    assert len({json.loads(line)["messages"][0]["content"] for line in lines}) == 24
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def crash() -> Iterator[Any]:
    """The module benchmarks/crash.py, on sys.path so that the processes it starts can import it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        import crash

        yield crash


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[Callable[..., None]]:
    """`run_ranks(script, *arguments)`: see forked_ranks.py, on sys.path for the processes that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        import forked_ranks

        yield forked_ranks.run_ranks


@pytest.fixture(scope="session")
def real_prompts() -> str:
    """The file of real prompts that RLMT_PROMPTS names; skips the test if the variable is not set."""
    path = os.environ.get("RLMT_PROMPTS")
    if not path:
        pytest.skip("RLMT_PROMPTS is not set")
    return path


@pytest.fixture
def allocated_peak(tmp_path: Path) -> Callable[[Callable[[], None]], int]:
    """`allocated_peak(work)`: peak bytes in torch's CPU allocator during `work`, above what was allocated before."""

    def measure(work: Callable[[], None]) -> int:
        import torch

        with torch.profiler.profile(profile_memory=True) as profile:
            work()
        trace = tmp_path / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
        events.sort(key=lambda event: event["ts"])
        before = events[0]["args"]["Total Allocated"] - events[0]["args"]["Bytes"]
        return int(max(event["args"]["Total Allocated"] for event in events) - before)

    return measure


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables plots, which take a third of a short run's time and have tests of their own."""
    monkeypatch.setattr("rlmt.report.curves.draw_curves", lambda path, *curves: path)
    monkeypatch.setattr("rlmt.report.calibration.draw_calibration", lambda path, bins: path)


WORDS = ["red", "green", "blue", "one", "two", "three", "four", "bee", "cat", "dog", "sun", "moon"]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 rows with thoughts; every tenth has several turns."""
    rng, rows = random.Random(0), []
    for number in range(40):
        words = " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))
        turns = [
            {"role": "user", "content": f"Tell me about {words}."},
            {"role": "assistant", "content": f"<think>they want {words}</think>Sure: {words}"},
        ]
        rows.append({"messages": turns * (3 if number % 10 == 0 else 1)})
    return _write(tmp_path_factory.mktemp("sft") / "demonstrations.jsonl", rows)


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs: the chosen response repeats the prompt's words; with ratings, a margin and a subset."""
    rng, rows = random.Random(1), []
    for number in range(40):
        words = " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))
        others = " ".join(rng.choices(WORDS, k=4))
        row = {"prompt": f"Tell me about {words}.", "chosen": f"Sure: {words}", "rejected": f"No {others}"}
        ratings = {"chosen_attributes": [1, rng.random()], "rejected_attributes": [0, rng.random()]}
        rows.append(row | ratings | {"margin": 0.1, "subset": "ab"[number % 2]})
    return _write(tmp_path_factory.mktemp("preferences") / "preferences.jsonl", rows)


@pytest.fixture
def supervised_command(
    tiny: Path, demonstrations: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """`supervised_command("fit", "sft", ...)`: arguments of a short run on tiny models, 4 steps an epoch.

    The working directory is an empty folder.
    """
    monkeypatch.chdir(tmp_path)

    def arguments(name: str, config: str, *more: object) -> list[str]:
        options = {
            "--config": config,
            "--model.policy" if config == "sft" else "--model.model": tiny / "policy",
            "--data.path": demonstrations if config == "sft" else preferences,
            "--data.batch_size": 8,
            "--data.max_length": 400,
            "--data.val_size": 8,
            "--model.tokens_per_micro_batch": 512,
            "--model.optimizer.init_args.lr": 3e-3,
            "--trainer.max_epochs": 2,
            "--trainer.default_root_dir": tmp_path / "run",
            "--trainer.enable_progress_bar": "false",
            "--trainer.accelerator": "cpu",
            "--trainer.precision": "32-true",
            "--model.gradient_checkpointing": "false",
        }
        flat = [str(word) for pair in options.items() for word in pair]
        return [name, *flat, *map(str, more)]

    return arguments
