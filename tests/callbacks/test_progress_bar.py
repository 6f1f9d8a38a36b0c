"""The progress bar: two rows of at most 80 columns, a count that skipped batches do not break, lines in log files."""

import io
import logging
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console

from rlmt import progress
from rlmt.callbacks import StepProgressBar
from rlmt.callbacks.progress_bar import duration, significant, training_position


def rows(bar: StepProgressBar, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(bar)
    return console.file.getvalue().splitlines()


class Clock:
    """A clock that tests set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("rlmt.callbacks.progress_bar.monotonic", clock)
    return clock


def fake_trainer(step: int, skipped: int = 0, **options):
    """A trainer after `step` optimizer steps and `skipped` batches without one."""
    batches = SimpleNamespace(total=SimpleNamespace(processed=step + skipped))
    optimizer = SimpleNamespace(optim_step_progress=SimpleNamespace(total=SimpleNamespace(ready=step)))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=batches, manual_optimization=optimizer))
    defaults = {"max_steps": 20, "max_epochs": -1, "num_training_batches": float("inf"), "progress_bar_metrics": {}}
    return SimpleNamespace(**({"global_step": step, "fit_loop": loop} | defaults | options))


def take_step(bar, trainer, clock, seconds, **metrics):
    bar.on_train_batch_start(trainer, None, None, 0)
    clock.now += seconds
    bar.on_train_batch_end(trainer, None, {"metrics": metrics}, None, 0)


def test_rows_show_step_time_left_phase_and_metrics_within_80_columns(clock):
    bar = StepProgressBar()
    bar.on_train_start(fake_trainer(0), None)
    progress.report("starting VLLMEngine")
    clock.now += 12
    assert rows(bar)[0].startswith("step 0 of 20 ") and rows(bar)[1] == "starting VLLMEngine 12 s"
    metrics = {"reward": 1.234567, "thought": 345.0, "kl": 0.0123, "v_num": 3, "accuracy": 0.5, "val/reward_mean": 2.0}
    take_step(bar, fake_trainer(1, progress_bar_metrics=metrics), clock, 30)
    assert "left" not in rows(bar)[0], "the first step includes the start of the engine"
    take_step(bar, fake_trainer(2, progress_bar_metrics=metrics), clock, 6)
    take_step(bar, fake_trainer(3, progress_bar_metrics=metrics), clock, 4)
    progress.report("sampling", 310, 512)
    first, second = rows(bar)
    assert first.startswith("step 3 of 20 ") and first.endswith("5.0 s/step · 1:25 min left")  # 17 steps of 5 s
    assert second.startswith("sampling 310 of 512 · reward 1.23  thought 345  kl 0.0123  accuracy 0.5")
    assert [len(row) <= 80 for row in rows(bar)] == [True, True]
    assert all(len(row) <= 40 for row in rows(bar, width=40)) and len(rows(bar, width=40)) == 2
    bar.on_train_end(fake_trainer(3), None)
    progress.report("sampling", 311, 512)
    assert bar._phase[1] == 310, "it listens after the end"


def test_skipped_batches_do_not_advance_the_count(clock):
    bar = StepProgressBar()
    bar.on_train_start(fake_trainer(0), None)
    for step, skipped in ((1, 0), (1, 1), (1, 2), (2, 2)):
        was_skipped = float(skipped > bar._skipped)
        take_step(bar, fake_trainer(step, skipped), clock, 3, **{"policy/skipped": was_skipped})
    assert rows(bar)[0].startswith("step 2 of 20 · 2 skipped") or "2 skipped · 9.0 s/step" in rows(bar)[0]
    bar.on_train_end(fake_trainer(2), None)


def test_slow_steps_are_shown_in_minutes(clock):
    bar = StepProgressBar()
    bar.on_train_start(fake_trainer(0), None)
    for step in (1, 2):
        take_step(bar, fake_trainer(step), clock, 200)
    assert rows(bar)[0].endswith("3:20 min/step · 1:00 h left")
    bar.on_train_end(fake_trainer(2), None)


def test_position_is_that_of_the_limit_reached_first():
    assert training_position(fake_trainer(3)) == (3, 20)
    assert training_position(fake_trainer(3, 2, max_epochs=2, num_training_batches=4)) == (5, 8)
    assert training_position(fake_trainer(3, 2, max_epochs=9, num_training_batches=9)) == (3, 20)
    assert training_position(fake_trainer(3, 2, max_steps=-1)) == (5, float("inf"))


def test_log_file_gets_the_first_and_the_last_step(world, tmp_path, capsys):
    world.fit(tmp_path, [StepProgressBar()], steps=4, enable_progress_bar=True, validate=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 2 and lines[0].startswith("step 1 of 4 · reward 3.5") and lines[1].startswith("step 4 of 4 ·")
    assert not progress._listeners


def test_terminal_shows_rows_and_log_messages_above_them(world, tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    handler = logging.StreamHandler(terminal)
    logger = logging.getLogger("test of the bar")
    logger.addHandler(handler)
    module = world.Module()
    module.before_step = lambda step: logger.warning(f"message {step}")
    world.fit(tmp_path, [StepProgressBar()], steps=2, module=module, enable_progress_bar=True)
    assert handler.stream is terminal, "the stream is not restored"
    text = terminal.getvalue()
    assert "\x1b[2K\x1b[1A\x1b[2Kmessage 1\n" in text.replace("\r", ""), "the message is not above the rows"
    assert "step 2 of 2" in text


def test_reports_of_other_threads_are_ignored():
    seen = []
    listener = lambda *state: seen.append(state)  # noqa: E731 - an object to remove again
    progress.listen(listener)
    thread = threading.Thread(target=progress.report, args=("sampling", 1, 2))
    thread.start()
    thread.join()
    assert list(progress.track("scoring", "ab")) == ["a", "b"]
    progress.ignore(listener)
    progress.ignore(listener)
    progress.report("sampling", 2, 2)
    assert seen == [("scoring", 0, 2), ("scoring", 1, 2)]


def test_times_and_numbers_are_readable():
    assert [duration(s) for s in (0.05, 8.14, 59, 130, 3601 + 300)] == ["50 ms", "8.1 s", "59 s", "2:10 min", "1:05 h"]
    numbers = [1234.5, 0.0123456, 1e-7, 0.0, float("nan"), -2.5]
    assert [significant(n) for n in numbers] == ["1,234", "0.0123", "1e-07", "0", "nan", "-2.5"]
