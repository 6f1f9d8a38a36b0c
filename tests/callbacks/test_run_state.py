"""The state of a run: running while its process lives, then finished, interrupted or failed."""

import json
import re
import signal

import pytest

from rlmt.callbacks import RunState
from rlmt.checkpointing.signals import StoppedBySignal
from rlmt.errors import UserError
from rlmt.report.run_states import read_run, read_state

FROM_A_WORKER = """Caught UserError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "data.py", line 3, in read
rlmt.errors.UserError: p.jsonl is empty.
"""


def module_that(world, at, act):
    module = world.Module()
    module.before_step = lambda step: act() if step == at else None
    return module


def test_running_run_is_running_and_ended_run_is_finished(world, tmp_path):
    seen = []
    module = module_that(world, 2, lambda: seen.append(read_run(tmp_path)))
    world.fit(tmp_path, [RunState()], steps=3, module=module, max_steps=6, max_epochs=-1)
    (during,), after = seen, read_run(tmp_path)
    assert (during.state, during.step, during.steps) == ("running", 2, 6)  # written after the first of three batches
    assert (after.state, after.step, after.steps) == ("finished", 6, 6)
    assert after.metrics["reward/mean"] == 5.5 and after.updated >= during.updated


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (RuntimeError("no\nroom"), "failed", r".* raised RuntimeError: no \(.*test_run_state.py, line \d+: .*"),
        (UserError("p.jsonl is empty."), "failed", "p.jsonl is empty."),
        (UserError(FROM_A_WORKER), "failed", "p.jsonl is empty."),
        (KeyboardInterrupt(), "interrupted", None),
        (StoppedBySignal(signal.SIGTERM), "interrupted", None),
    ],
)
def test_exception_ends_a_run_as_failed_or_interrupted(world, tmp_path, error, state, reason):
    def fail():
        raise error

    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((Exception, SystemExit)):
            world.fit(tmp_path, [RunState()], steps=3, module=module_that(world, 1, fail))
    finally:
        signal.signal(signal.SIGINT, handler)
    run = read_run(tmp_path)
    assert run.state == state
    assert run.error is None if reason is None else re.fullmatch(reason, run.error)


def test_killed_run_is_interrupted(world, tmp_path):
    copied = tmp_path / "killed"
    copied.mkdir()

    def copy():
        (copied / "state.json").write_text((tmp_path / "state.json").read_text())
        (copied / ".run.lock").touch()  # a lock goes with its process

    world.fit(tmp_path, [RunState()], steps=2, module=module_that(world, 1, copy))
    assert json.loads((copied / "state.json").read_text())["state"] == "running"
    assert read_run(copied).state == "interrupted"


def test_start_without_a_step_dry_run_and_validation_write_no_state(world, tmp_path):
    with pytest.raises(ZeroDivisionError):
        world.fit(tmp_path, [RunState()], module=module_that(world, 0, lambda: 1 / 0))
    world.fit(tmp_path, [RunState()], fast_dev_run=True)
    assert read_state(tmp_path) is None


def test_damaged_state_is_no_state(tmp_path):
    for text in ("{", "[]", '{"state": "running"}'):
        (tmp_path / "state.json").write_text(text)
        assert read_state(tmp_path) is None
