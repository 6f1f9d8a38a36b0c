"""Jobs as subprocesses: done jobs are kept, failures are reported, changed jobs start again."""

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
from rlmt.study.runner import JobState, Runner, is_done
from rlmt.study.stages import Job, Plan, Stage, job_digests


class Recorder:
    """Replaces subprocesses: records each command with its times, and fails commands that contain `bad`."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, float, tuple[str, ...]]] = []

    def execute(self, runner: Runner, command: tuple[str, ...], log: Path, bar: Any) -> int:
        start = time.monotonic()
        log.open("a").write("Epoch 0:  10%| | 1/10 [00:00<00:01]\rthe reason\n")
        time.sleep(0.1)
        self.calls.append((start, time.monotonic(), command))
        return 2 if "bad" in command else 0

    @property
    def commands(self) -> list[str]:
        return [" ".join(command) for _, _, command in self.calls]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(Runner, "_execute", lambda runner, *args: recorder.execute(runner, *args))
    return recorder


def plan_jobs(out: Path, **stages: list[str]) -> tuple[list[Job], dict[Path, str]]:
    plan = Plan({name: Stage(run=run) for name, run in stages.items()}, [0], out, {})
    return plan.jobs, job_digests(plan.jobs, out)


def test_done_jobs_are_not_run_again(tmp_path: Path, recorder: Recorder) -> None:
    jobs, digests = plan_jobs(tmp_path, a=["one", "two"], b=["three $a"])
    Runner(jobs, digests, 1).run()
    assert recorder.commands == ["one", "two", f"three {tmp_path}/seed-0/a"]
    assert all(is_done(job, digests[job.folder]) for job in jobs)
    state = JobState.load(jobs[0].folder)
    assert state is not None and state.commands == ["rlmt one", "rlmt two"] and set(state.seconds) == {"0", "1"}
    Runner(jobs, digests, 1).run()
    assert len(recorder.calls) == 3


def test_interrupted_job_resumes_at_the_interrupted_command(tmp_path: Path, recorder: Recorder) -> None:
    jobs, digests = plan_jobs(tmp_path, a=["one", "bad", "two"])
    with pytest.raises(
        UserError, match=r"1 of 1 jobs did not finish: the reason \(exit 2, .*log.txt\)\. Fix the cause"
    ):
        Runner(jobs, digests, 1).run()
    state = JobState.load(jobs[0].folder)
    assert state is not None and state.done == 1
    fixed = [Job(**{**vars(jobs[0]), "commands": (("one",), ("good",), ("two",))})]
    Runner(fixed, digests, 1).run()  # as if the cause lay outside the commands
    assert recorder.commands == ["one", "bad", "good", "two"]


def test_failure_skips_dependent_jobs_only(tmp_path: Path, recorder: Recorder) -> None:
    jobs, digests = plan_jobs(tmp_path, a=["bad"], b=["x $a"], c=["y $b"], d=["other"])
    with pytest.raises(UserError, match="3 of 4 jobs did not finish: the reason"):
        Runner(jobs, digests, 1).run()
    assert recorder.commands == ["bad", "other"]


def test_changed_settings_start_a_job_again(
    tmp_path: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    Runner(*plan_jobs(tmp_path, a=["one"], b=["two $a"]), 1).run()
    (tmp_path / "seed-0/a/leftover").touch()
    Runner(*plan_jobs(tmp_path, a=["one --more"], b=["two $a"]), 1).run()
    assert not (tmp_path / "seed-0/a/leftover").exists()
    assert len(recorder.calls) == 4 and "the settings have changed; the folder is deleted" in capsys.readouterr().out


def test_independent_jobs_run_in_parallel_after_their_dependencies(tmp_path: Path, recorder: Recorder) -> None:
    jobs, digests = plan_jobs(tmp_path, a=["one"], b=["two"], c=["three $a $b"])
    Runner(jobs, digests, 2).run()
    (one, two, three) = recorder.calls
    assert one[0] < two[1] and two[0] < one[1]  # they overlap
    assert three[0] >= max(one[1], two[1])


def test_export_without_a_saved_state_is_written_again(tmp_path: Path, recorder: Recorder) -> None:
    jobs, digests = plan_jobs(tmp_path, a=["one", "export $dir/last.ckpt $dir/model"])
    folder = jobs[0].folder
    (folder / "model").mkdir(parents=True)
    (folder / "model/config.json").touch()
    JobState(digests[folder], done=1).save(folder)
    Runner(jobs, digests, 1).run()
    assert not (folder / "model").exists()  # removed, so that the command can write it


def test_failed_command_is_reported_by_its_last_line(tmp_path: Path) -> None:
    jobs, digests = plan_jobs(tmp_path, a=["--version", "nonsense"])
    with pytest.raises(UserError, match="'nonsense' is not a command; choose one of fit"):
        Runner(jobs, digests, 1).run()
    assert "\n$ rlmt --version\n0." in (jobs[0].folder / "log.txt").read_text()


def test_progress_bar_in_the_log_is_parsed() -> None:
    text = b"Epoch 0:   1%| | 9/700 [00:02<03:00]\rEpoch 0:   1%| | 10/700 [00:02<03:00, 3.5it/s]"
    assert runner._TQDM_POSITION.findall(text)[-1] == (b"10", b"700")


@pytest.mark.slow
def test_terminated_study_terminates_its_jobs(tmp_path: Path) -> None:
    """SIGTERM to a study with a job of several minutes leaves no process behind."""
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
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in listing.stdout.split()]
