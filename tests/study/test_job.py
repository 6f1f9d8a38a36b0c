"""Commands of jobs: done ones are kept, interrupted training resumes, changed ones start again."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlmt.errors import UserError
from rlmt.study import job
from rlmt.study.job import JobState, run_job
from rlmt.study.processes import locked


class Recorder:
    """Replaces the subprocess: records each command and the files that it found, and leaves a file behind."""

    def __init__(self, status: int = 0) -> None:
        self.calls: list[str] = []
        self.found: list[list[str]] = []
        self.status = status

    def __call__(self, words: Sequence[str], log: Path) -> int:
        self.calls.append(" ".join(words))
        self.found.append(sorted(path.name for path in log.parent.iterdir()))
        (log.parent / "checkpoint").touch()
        return self.status


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(job, "_execute", recorder)
    return recorder


def test_done_job_is_not_run_again(tmp_path: Path, recorder: Recorder) -> None:
    done = tmp_path / "out/seed-1/rl/done"
    assert run_job("fit --model.policy '$study/a b'", "key", Path("out"), done) == 0
    assert recorder.calls == ["fit --model.policy out/a b"]
    state = json.loads(done.read_text())
    assert state["command"] == "rlmt fit --model.policy 'out/a b'" and state["status"] == 0 and state["key"] == "key"
    assert set(state["versions"]) >= {"torch", "lightning", "snakemake"} and state["finished"] and state["host"]
    before = done.read_text()
    done.unlink()  # Snakemake removes it before it starts a job again, of which it does not know that it is done
    assert run_job("fit --model.policy '$study/a b'", "key", Path("out"), done) == 0
    assert len(recorder.calls) == 1 and done.read_text() == before


@pytest.mark.parametrize(
    ("command", "kept"), [("fit x", True), ("traits x", True), ("predict x", False), ("export x", False)]
)
def test_interrupted_training_goes_on_in_its_folder(
    command: str, kept: bool, tmp_path: Path, recorder: Recorder
) -> None:
    recorder.status = 143
    assert run_job(command, "key", Path("out"), tmp_path / "a/done") == 143 and not (tmp_path / "a/done").exists()
    recorder.status = 0
    assert run_job(command, "key", Path("out"), tmp_path / "a/done") == 0
    assert ("checkpoint" in recorder.found[1]) == kept and "checkpoint" not in recorder.found[0]


def test_changed_job_starts_in_an_empty_folder(tmp_path: Path, recorder: Recorder) -> None:
    done = tmp_path / "a/done"
    run_job("fit x", "key", Path("out"), done)
    run_job("fit x", "another key", Path("out"), done)
    assert "checkpoint" not in recorder.found[1] and len(recorder.calls) == 2
    (tmp_path / "a/job.json").write_text('{"key": "another key", "done": 1, "commands": []}')  # by an older version
    run_job("fit x", "another key", Path("out"), done)
    assert "checkpoint" not in recorder.found[2]


def test_times_of_all_attempts_are_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 20.0, 25.5])
    monkeypatch.setattr(job, "_execute", Recorder(1))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    run_job("export x", "key", Path("out"), tmp_path / "a/done")
    run_job("export x", "key", Path("out"), tmp_path / "a/done")
    state = JobState.load(tmp_path / "a")
    assert state is not None and state.seconds == 15.5 and state.status == 1 and state.finished is None


def test_output_of_a_command_is_appended_to_its_log(tmp_path: Path) -> None:
    assert run_job("--version", "key", Path("out"), tmp_path / "a/done") == 0
    assert run_job("nonsense", "key", Path("out"), tmp_path / "b/done") == 2
    assert "\n$ rlmt --version\n0." in (tmp_path / "a/log.txt").read_text()
    assert "'nonsense' is not a command; choose one of fit" in (tmp_path / "b/log.txt").read_text()


def test_process_of_a_job_does_not_import_torch() -> None:
    """It only starts the command and waits for it, once for each job of a study."""
    code = "import sys, rlmt.study.job; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_second_process_is_refused_while_a_folder_is_locked(tmp_path: Path) -> None:
    holder = (
        "import sys, pathlib; from rlmt.study.processes import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    folder = tmp_path / "a"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="in use"), locked(folder, "in use"):
        pass
    process.send_signal(signal.SIGKILL)  # the system releases the lock
    process.wait()
    with locked(folder, "in use"):
        pass


def test_child_ends_with_its_parent(tmp_path: Path) -> None:
    child = (
        "import signal, time; from rlmt.study.processes import end_with_parent\n"
        "end_with_parent(signal.SIGTERM); print('ready', flush=True); time.sleep(60)"
    )
    parent = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE, text=True)\n"
        "child.stdout.readline(); print(child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", parent, child], capture_output=True, text=True, check=False)
    deadline = time.monotonic() + 30
    while _runs(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(int(done.stdout)) and done.returncode == -signal.SIGKILL


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
