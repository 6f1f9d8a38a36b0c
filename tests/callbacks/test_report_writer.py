"""report.html and run.json: written at the end, on the way and on an interruption, beside metrics.csv."""

import base64
import gzip
import json
import re
from typing import Any

import pytest

from rlmt.callbacks import ReportWriter, RunRecord, RunState, SampleTable
from rlmt.checkpointing.run_record import read_record
from rlmt.errors import UserError


def payload(folder: Any) -> dict[str, Any]:
    page = (folder / "report.html").read_text(encoding="utf-8")
    text = re.search(r'id="payload">([^<]*)<', page)[1]
    data: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(text)))
    return data["runs"][0]


def test_page_is_written_at_the_end_with_the_last_step_and_its_rollouts(world: Any, tmp_path: Any) -> None:
    world.fit(
        tmp_path,
        [RunState(), RunRecord(), SampleTable(every_n_steps=0), ReportWriter(every_n_steps=0)],
        steps=3,
        validate=True,
    )
    run = payload(tmp_path)
    assert run["state"] == "finished" and run["steps"] == 3
    assert run["metrics"]["reward/mean"] == [[0, 1, 2], [3.5, 4.5, 5.5]]  # the mean reward grows by 1 a step
    assert run["metrics"]["val/reward_mean"][1] == [0.5]
    assert run["rollouts"]["total"] == 18 + 12, "of three steps and one validation with two batches"


def test_page_is_refreshed_every_n_steps(world: Any, tmp_path: Any) -> None:
    seen = []
    module = world.Module()
    module.before_step = lambda step: seen.append((tmp_path / "report.html").exists() and payload(tmp_path)["steps"])
    world.fit(tmp_path, [RunRecord(), ReportWriter(every_n_steps=2)], steps=5, module=module)
    assert seen[:3] == [False, False, 1]  # a step is logged after the callbacks of its end
    assert seen[4] == 3 and payload(tmp_path)["steps"] == 5


@pytest.mark.parametrize(("error", "state"), [(KeyboardInterrupt, "interrupted"), (RuntimeError, "failed")])
def test_interrupted_run_has_a_page_and_its_state(
    error: type[BaseException], state: str, world: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    module = world.Module()

    def stop(step: int) -> None:
        if step == 2:
            raise error("stop")

    module.before_step = stop
    with pytest.raises((error, SystemExit)):
        world.fit(
            tmp_path, [RunState(), RunRecord(), SampleTable(every_n_steps=0), ReportWriter()], steps=5, module=module
        )
    run = payload(tmp_path)
    assert run["state"] == state
    assert run["steps"] == 2 and run["rollouts"]["total"] == 12
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out


def test_run_that_fails_in_its_first_step_has_no_files(world: Any, tmp_path: Any) -> None:
    module = world.Module()

    def stop(step: int) -> None:
        raise RuntimeError("stop")

    module.before_step = stop
    with pytest.raises(RuntimeError):
        world.fit(tmp_path, [RunRecord(), ReportWriter()], module=module)
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "run.json").exists()


def test_negative_steps_are_refused() -> None:
    with pytest.raises(UserError, match="every_n_steps"):
        ReportWriter(every_n_steps=-1)


def test_dry_run_and_run_without_a_csv_logger_write_nothing(world: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    world.fit(tmp_path, [RunRecord(), ReportWriter()], fast_dev_run=True)
    world.fit(tmp_path, [ReportWriter()], logger=False)
    assert not list(tmp_path.rglob("report.html")) and not list(tmp_path.rglob("run.json"))


def test_record_has_what_repeating_a_run_takes(world: Any, tmp_path: Any, monkeypatch: Any) -> None:
    from rlmt.configs import find_config

    (tmp_path / "mine.yaml").write_text("trainer: {max_steps: 7}")
    monkeypatch.chdir(tmp_path)
    words = ["rlmt", "fit", "--config", find_config("base"), "--config=mine.yaml", "--model.format", "think"]
    monkeypatch.setattr("sys.argv", words)
    world.fit(tmp_path, [RunRecord()])
    record = read_record(tmp_path)
    assert record["command"] == ["fit", "--config", "base", "--config=mine.yaml", "--model.format", "think"]
    assert record["own_configs"] == {"mine.yaml": {"trainer": {"max_steps": 7}}}
    assert record["device"] == "1 × cpu" and {"rlmt", "python", "torch"} <= record["versions"].keys()
    assert record["started"].endswith("+00:00") and record["git"] is None
    assert read_record(tmp_path / "nothing") == {}


def test_resumed_run_keeps_its_command(world: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["rlmt", "fit", "--seed_everything", "1"])
    world.fit(tmp_path, [RunRecord()])
    monkeypatch.setattr("sys.argv", ["rlmt", "fit", "--ckpt_path", "last"])
    world.fit(tmp_path, [RunRecord()])
    record = read_record(tmp_path)
    assert record["command"] == ["fit", "--seed_everything", "1"] and len(record["resumed"]) == 1
