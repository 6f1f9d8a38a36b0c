"""Jobs as processes: what is done is kept, what failed is told, what changed is made anew."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlmt.errors import UserError
from rlmt.study import runner
from rlmt.study.runner import Runner, State, is_done
from rlmt.study.stages import Job, Plan, Stage, keys


class Recorder:
    """Takes the place of processes: notes commands with the time, and fails those that say so."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, float, tuple[str, ...]]] = []

    def execute(self, runner: Runner, command: tuple[str, ...], log: Path, bar: Any) -> int:
        start = time.monotonic()
        log.open("a").write("Epoch 0:  10%| | 1/10 [00:00<00:01]\rreason why\n")
        time.sleep(0.1)
        self.calls.append((start, time.monotonic(), command))
        return 2 if "bad" in command else 0

    @property
    def commands(self) -> list[str]:
        return [" ".join(command) for _, _, command in self.calls]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(Runner, "_execute", lambda runner, *args: found.execute(runner, *args))
    return found


def planned(out: Path, **stages: list[str]) -> tuple[list[Job], dict[Path, str]]:
    plan = Plan({name: Stage(run=run) for name, run in stages.items()}, [0], out, {})
    return plan.jobs, keys(plan.jobs, out)


def test_what_is_done_is_not_run_again(tmp_path: Path, recorder: Recorder) -> None:
    jobs, digests = planned(tmp_path, a=["one", "two"], b=["three $a"])
    Runner(jobs, digests, 1).run()
    assert recorder.commands == ["one", "two", f"three {tmp_path}/seed-0/a"]
    assert all(is_done(job, digests[job.folder]) for job in jobs)
    state = State.load(jobs[0].folder)
    assert state is not None and state.commands == ["rlmt one", "rlmt two"] and set(state.seconds) == {"0", "1"}
    Runner(jobs, digests, 1).run()
    assert len(recorder.calls) == 3


def test_an_interrupted_job_goes_on_with_the_command_that_was_cut(tmp_path: Path, recorder: Recorder) -> None:
    jobs, digests = planned(tmp_path, a=["one", "bad", "two"])
    with pytest.raises(UserError, match=r"1 of 1 jobs did not finish: reason why \(exit 2, .*log.txt\); mend it"):
        Runner(jobs, digests, 1).run()
    state = State.load(jobs[0].folder)
    assert state is not None and state.done == 1
    mended = [Job(**{**vars(jobs[0]), "commands": (("one",), ("good",), ("two",))})]
    Runner(mended, digests, 1).run()  # as if the mistake lay outside the commands
    assert recorder.commands == ["one", "bad", "good", "two"]


def test_a_failure_stops_what_needs_it_and_nothing_else(tmp_path: Path, recorder: Recorder) -> None:
    jobs, digests = planned(tmp_path, a=["bad"], b=["x $a"], c=["y $b"], d=["other"])
    with pytest.raises(UserError, match="3 of 4 jobs did not finish: reason why"):
        Runner(jobs, digests, 1).run()
    assert recorder.commands == ["bad", "other"]


def test_changed_settings_make_a_job_anew(
    tmp_path: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    Runner(*planned(tmp_path, a=["one"], b=["two $a"]), 1).run()
    (tmp_path / "seed-0/a/leftover").touch()
    Runner(*planned(tmp_path, a=["one --more"], b=["two $a"]), 1).run()
    assert not (tmp_path / "seed-0/a/leftover").exists()
    assert len(recorder.calls) == 4 and "settings have changed; it is made anew" in capsys.readouterr().out


def test_jobs_run_side_by_side_but_not_before_what_they_need(tmp_path: Path, recorder: Recorder) -> None:
    jobs, digests = planned(tmp_path, a=["one"], b=["two"], c=["three $a $b"])
    Runner(jobs, digests, 2).run()
    (one, two, three) = recorder.calls
    assert one[0] < two[1] and two[0] < one[1]  # they overlap
    assert three[0] >= max(one[1], two[1])


def test_an_export_that_was_not_noted_is_written_again(tmp_path: Path, recorder: Recorder) -> None:
    jobs, digests = planned(tmp_path, a=["one", "export $dir/last.ckpt $dir/model"])
    folder = jobs[0].folder
    (folder / "model").mkdir(parents=True)
    (folder / "model/config.json").touch()
    State(digests[folder], done=1).save(folder)
    Runner(jobs, digests, 1).run()
    assert not (folder / "model").exists()  # removed for the command that would write it


def test_a_real_command_that_fails_is_told_by_its_last_line(tmp_path: Path) -> None:
    jobs, digests = planned(tmp_path, a=["--version", "nonsense"])
    with pytest.raises(UserError, match="'nonsense' is not a command; choose one of fit"):
        Runner(jobs, digests, 1).run()
    assert "\n$ rlmt --version\n0." in (jobs[0].folder / "log.txt").read_text()


def test_a_bar_in_the_log_is_found() -> None:
    text = b"Epoch 0:   1%| | 9/700 [00:02<03:00]\rEpoch 0:   1%| | 10/700 [00:02<03:00, 3.5it/s]"
    assert runner._BAR.findall(text)[-1] == (b"10", b"700")


def test_ending_the_study_ends_its_jobs(tmp_path: Path) -> None:
    """A real study whose job would take minutes; SIGTERM must not leave it behind."""
    config = tmp_path / "study.yaml"
    stages = {"slow": {"run": ["tiny $dir/world"]}}
    arms = {"only": {"stage": "slow", "label": "Slow"}}
    config.write_text(json.dumps({"stages": stages, "arms": arms, "metrics": {"a": "a"}, "out": str(tmp_path / "out")}))
    process = subprocess.Popen(
        [sys.executable, "-m", "rlmt", "study", "--config", str(config)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("out/seed-0/slow/log.txt")) and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1)
        assert (children := _children(process.pid))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
        assert not any(Path(f"/proc/{child}/cmdline").exists() for child in children)
    finally:
        process.kill()


def _children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]
