"""Fixtures that all tests share: a tiny world made once, and no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import json  # noqa: E402
import logging  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

logging.raiseExceptions = False  # Lightning's handler keeps the stream that pytest captured for an earlier test


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `rlmt tiny` makes it, with a smaller policy: policy/, reward/, prompts.jsonl. Do not write to it."""
    from rlmt.tiny import write_tiny
    from rlmt.tiny_models import Sizes

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
def real_prompts() -> str:
    """A file of real prompts named by RLMT_PROMPTS; the test is skipped without one."""
    path = os.environ.get("RLMT_PROMPTS")
    if not path:
        pytest.skip("RLMT_PROMPTS names no prompt file")
    return path


@pytest.fixture
def allocated_peak(tmp_path: Path) -> Callable[[Callable[[], None]], int]:
    """The most bytes that torch's own allocator held at a time during a piece of work, beyond what it held before."""

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
