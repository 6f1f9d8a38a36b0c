"""Processes of a study: servers beside it, and ends of parents."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlmt.study.jobs import served

SERVER = """
import time
print("ready", flush=True)
for _ in range(4000):
    print("x" * 50, flush=True)
open("done", "w").close()
time.sleep(60)
"""


def test_server_that_logs_more_than_a_pipe_holds_is_not_blocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chatty.py").write_text(SERVER)
    with served("chatty"):
        end = time.monotonic() + 60
        while not Path("done").exists():
            assert time.monotonic() < end, "the server waits for a reader of its output"
            time.sleep(0.02)


@pytest.mark.parametrize(("parent", "status"), [("os.getpid()", 0), ("os.getpid() + 1", -signal.SIGTERM)])
def test_process_ends_if_its_parent_is_another_one(parent: str, status: int) -> None:
    """The parent is named, because the first process of a container has the number of the one that adopts orphans."""
    code = (
        "import os, signal, subprocess, sys\n"
        "from functools import partial\n"
        "from rlmt.study.processes import end_with_parent\n"
        f"end = partial(end_with_parent, signal.SIGTERM, {parent})\n"
        "print(subprocess.run([sys.executable, '-c', ''], preexec_fn=end).returncode)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == status
