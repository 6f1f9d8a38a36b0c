"""Jobs through Snakemake: order, failures, changes, and what a kill leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlmt.callbacks import StepProgressBar
from rlmt.endpoints.progress import track_requests
from rlmt.errors import UserError
from rlmt.study.engine import Request
from rlmt.study.jobs import list_jobs, run_jobs, served
from rlmt.study.processes import locked
from rlmt.study.runner import _POSITION, Runner, failure_reason, short_reasons
from rlmt.study.stages import Plan, Stage

ROWS = {"x": ["p", "q"]}


def stages(**changes: str) -> dict[str, Stage]:
    """A chain of commands that take no time; `b` has two jobs, and `d` needs one that `c` needs, too."""
    run = {"a": "--version", "b": "--version $x", "c": "--version", "d": "--version --seed $seed"} | changes
    return {
        "a": Stage(run["a"]),
        "b": Stage(run["b"], each=ROWS, needs={"first": "a"}),
        "c": Stage(run["c"], needs={"p": "b-p", "q": "b-q"}),
        "d": Stage(run["d"], needs={"q": "b-q"}),
        "e": Stage("--version", needs={"c": "c"}),
    }


def run(out: Path, *targets: str, jobs: int = 2, **changes: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    request = Request([f"seed-3/{target}/done" for target in targets], threads=1, jobs=jobs)
    run_jobs(Plan(stages(**changes), {}), out, request)


def attempts(out: Path) -> dict[str, int]:
    return {log.parent.name: log.read_text().count("\n$ rlmt ") for log in sorted(out.glob("seed-3/*/log.txt"))}


def finished(out: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in sorted(out.glob("seed-3/*/done"))}


def test_jobs_run_once_in_order_and_again_when_changed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    at_a_time: list[int] = []
    start = Runner._start

    def counted(self: Runner, job: Any, folder: Path) -> None:
        start(self, job, folder)
        at_a_time.append(len(self._running))

    monkeypatch.setattr(Runner, "_start", counted)
    run(out, "c", "d", jobs=1)
    first = finished(out)
    assert at_a_time == [1] * 5
    assert list(first) == ["a", "b-p", "b-q", "c", "d"] and attempts(out) == dict.fromkeys(first, 1)
    assert json.loads(first["d"])["command"] == "rlmt --version --seed 3"
    lines = [line for line in capfd.readouterr().out.splitlines() if "is done" in line]  # without a terminal
    assert [line.partition(" seed 3 is done ")[2] for line in lines] == [f"({k} of 5 jobs)" for k in range(1, 6)]
    assert lines[0].startswith("a ")
    assert (out / "seed-3/a/done").stat().st_mtime <= min(
        (out / f"seed-3/{name}/done").stat().st_mtime for name in first
    )

    plan = Plan(stages(b="--version $x $x"), {})
    request = Request([f"seed-3/{target}/done" for target in ("c", "d")], threads=1, jobs=1)
    list_jobs(plan, out, request)
    assert sorted(capfd.readouterr().out.splitlines()) == [
        "4 jobs would run.",
        *(f"b {x} seed 3: its command, a config or the version of rlmt changed" for x in ("p", "q")),
        *(f"{name} seed 3: a job before it runs again" for name in ("c", "d")),
    ]
    assert finished(out) == first

    run(out, "c", "d", b="--version $x $x")
    third = finished(out)
    assert third["a"] == first["a"] and attempts(out) == dict.fromkeys(third, 1)
    assert all(third[name] != first[name] for name in ("b-p", "b-q", "c", "d"))
    assert "b p seed 3 runs again: its command, a config or the version of rlmt changed" in capfd.readouterr().out

    moved = tmp_path / "moved"
    out.rename(moved)
    run(moved, "c", "d", b="--version $x $x")
    assert finished(moved) == third


def test_failure_skips_dependent_jobs_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    message = (
        r"^2 of 6 jobs did not finish: 'nonsense' is not a command.* \(exit 2, .*seed-3/c/log.txt\)\. Fix the cause"
    )
    with pytest.raises(UserError, match=message):
        run(out, "d", "e", c="nonsense")
    assert "c seed 3 failed: 'nonsense' is not a command" in capfd.readouterr().out
    before = finished(out)
    assert list(before) == ["a", "b-p", "b-q", "d"]
    run(out, "d", "e")
    after = finished(out)
    assert list(after) == ["a", "b-p", "b-q", "c", "d", "e"] and {name: after[name] for name in before} == before


def test_plan_that_snakemake_rejects_is_an_error_in_one_line(tmp_path: Path) -> None:
    circle = {name: Stage("--version", needs={"other": other}) for name, other in (("a", "b"), ("b", "a"))}
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="Snakemake cannot run the jobs: .*[Cc]ycl") as error:
        run_jobs(Plan(circle, {}), tmp_path / "out", Request(["seed-3/a/done"], threads=1, jobs=1))
    assert "\n" not in str(error.value)


def test_server_runs_while_the_jobs_run() -> None:
    with served("rlmt.demos.endpoint 0"):
        (server,) = (pid for pid in _descendants(os.getpid()) if b"rlmt.demos.endpoint" in _command(pid))
    assert not _runs(server)
    with served(" "):
        pass
    message = "--serve rlmt.demos.endpoint many: does not start: ValueError: invalid literal for int"
    with pytest.raises(UserError, match=message), served("rlmt.demos.endpoint many"):
        pass


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def test_second_study_in_a_folder_is_refused(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "study"),
        pytest.raises(UserError, match="--out .*: another `rlmt study` works in this folder"),
    ):
        run(tmp_path, "d")


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("Missing output files: a/done; Input files updated by another job: b/done", ["not done yet"]),
        (
            "Input files updated by another job: b/done; Params have changed since last execution: x",
            ["a job before it runs again", "its command, a config or the version of rlmt changed"],
        ),
        ("Forced execution", ["Forced execution"]),
    ],
)
def test_reasons_are_in_the_words_of_a_study(reason: str, expected: list[str]) -> None:
    assert short_reasons(reason) == expected


def test_failed_job_without_output_is_reported_by_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    assert failure_reason(tmp_path / "a") == "no output (a/log.txt)"
    assert failure_reason(tmp_path / "a", {"msg": "status TIMEOUT."}) == "status TIMEOUT (a/log.txt)"
    (tmp_path / "a/log.txt").write_text("1\rrlmt: error: --x: bad.\nmore\n\n")
    assert failure_reason(tmp_path / "a") == "--x: bad (a/log.txt)"


def test_progress_lines_in_the_log_are_parsed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of a run, whether it begins or resumes, and those of requests."""
    bar = StepProgressBar()
    for bar._unit, bar._done, bar._total, bar._metrics in (
        ("step", 10, 700, {"reward": 3.0}),
        ("validation batch", 2, 4, {}),
        ("step", 5, float("inf"), {}),
    ):
        bar._print_line(last=True)
    print("step 3: 2 of 16 samples", file=sys.stderr)
    monkeypatch.setattr("rlmt.endpoints.progress.SECONDS_BETWEEN_LINES", -1.0)
    with track_requests("generate · [b]", 1200) as requests:
        requests.advance(1100)
    log = capsys.readouterr().err.encode()
    assert _POSITION.findall(log) == [(b"10", b"700"), (b"2", b"4"), (b"1,100", b"1,200")]
    assert b"generate \xc2\xb7 [b]" in log


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_killed_study_ends_its_jobs(number: signal.Signals, tmp_path: Path) -> None:
    """A signal to a study with a job of several minutes leaves no process behind."""
    config = tmp_path / "study.yaml"
    study: dict[str, Any] = {"stages": {"slow": {"run": "tiny $dir/world"}}}
    study |= {"arms": {"only": {"stage": "slow", "label": "Slow"}}, "metrics": {"a": "a"}, "out": str(tmp_path / "out")}
    config.write_text(json.dumps(study))
    process = subprocess.Popen(
        [sys.executable, "-m", "rlmt", "study", "--config", str(config)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("out/seed-0/slow/log.txt")) and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1)
        assert len(descendants := _descendants(process.pid)) >= 3  # Snakemake, the job, its command
        process.send_signal(number)
        status = process.wait(timeout=120)
        assert status == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
        deadline = time.monotonic() + (60 if number == signal.SIGKILL else 0)
        while any(map(_runs, descendants)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(_runs, descendants))
    finally:
        process.kill()


def _descendants(pid: int) -> list[int]:
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in (line.split() for line in listing.splitlines())}
    found = [pid]
    for child in found:
        found += [each for each, parent in parents.items() if parent == child]
    return found[1:]


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
