"""Samples on the screen and on disk: nothing lost, nothing twice, nothing that a terminal would obey."""

import html
import json
import re
import signal

import pyarrow.parquet as pq
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from rlmt.callbacks import RolloutWriter, SampleTable
from rlmt.callbacks._logged_samples import SampleRow, markdown_table
from rlmt.callbacks.sample_table import render_samples, shorten, shown_parts
from rlmt.engines.rollout_files import SCHEMA, read_rollouts
from rlmt.errors import UserError
from rlmt.types import Split, Status


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def failing(step_to_fail, error=RuntimeError):
    def before_step(step):
        if step == step_to_fail:
            raise error("boom")

    return before_step


def test_all_rollouts_are_kept_in_files_of_n_steps(world, tmp_path):
    world.fit(tmp_path, [SampleTable(dump_every_n_steps=2, every_n_steps=0)], steps=5)
    folder = tmp_path / "rollouts"
    assert names(folder) == [f"rollouts_{r}.parquet" for r in ("000000-000001", "000002-000003", "000004-000004")]
    table = read_rollouts(folder)
    assert table["step"].to_pylist() == [step for step in range(5) for _ in range(6)]
    assert table["reward"].to_pylist()[-6:] == [5, 6, 7, 9, 9, 9]
    assert table.schema.metadata == {b"rlmt": b'{"format": {"name": "think"}}'}


def test_rollouts_of_each_validation_are_in_a_file_and_none_is_twice_after_a_resumption(world, tmp_path):
    options = {"validate": True, "val_check_interval": 2}
    module = world.Module()
    module.before_step = failing(5)
    with pytest.raises(RuntimeError, match="boom"):
        run_with_checkpoints(world, tmp_path, module, Killed, **options)
    folder = tmp_path / "val_rollouts"
    assert names(folder) == ["rollouts_000001-000001.parquet", "rollouts_000003-000003.parquet"]
    run_with_checkpoints(world, tmp_path, world.Module(), ckpt_path=tmp_path / "step=4.ckpt", **options)
    assert read_rollouts(folder)["step"].to_pylist() == [step for step in (1, 3, 5) for _ in range(12)]
    logged = [row["step"] for row in world.csv(tmp_path) if "val/reward_mean" in row]
    assert set(logged) == {3, 5}, "steps of the files are steps of metrics.csv, which this logger begins anew"
    assert len(read_rollouts(tmp_path / "rollouts")) == 36


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_keeps_what_it_drew(world, tmp_path, error):
    module = world.Module()
    module.before_step = failing(3, error)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((RuntimeError, SystemExit)):
            world.fit(tmp_path, [SampleTable(every_n_steps=0)], steps=5, module=module)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert set(read_rollouts(tmp_path / "rollouts")["step"].to_pylist()) == {0, 1, 2}


class Killed(SampleTable):
    """One whose process is killed outright: no handler gets to run."""

    def on_exception(self, *args):
        pass


def run_with_checkpoints(world, folder, module, kind=SampleTable, **options):
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    options |= {"enable_checkpointing": True, "steps": 6}
    world.fit(folder, [kind(dump_every_n_steps=4, every_n_steps=0), saving], module=module, **options)


@pytest.mark.parametrize("stop_at", [3, 5])
def test_a_killed_and_resumed_run_has_every_step_once(world, tmp_path, stop_at):
    module = world.Module()
    module.before_step = failing(stop_at)
    with pytest.raises(RuntimeError, match="boom"):
        run_with_checkpoints(world, tmp_path, module, Killed)
    assert set(read_rollouts(tmp_path / "rollouts")["step"].to_pylist()) == set(range(stop_at))
    checkpoint = tmp_path / "step=4.ckpt"  # after two rollouts of two optimizer steps; later ones are repeated
    run_with_checkpoints(world, tmp_path, world.Module(), ckpt_path=checkpoint)
    table = read_rollouts(tmp_path / "rollouts")
    assert table["step"].to_pylist() == [step for step in range(6) for _ in range(6)]
    assert table["weight_version"].to_pylist() == table["step"].to_pylist()


def test_fewer_new_steps_leave_the_other_rows_of_a_file_alone(world, tmp_path):
    folder = tmp_path / "rollouts"
    world.fit(tmp_path, [SampleTable(every_n_steps=0)], steps=4)
    before = read_rollouts(folder)
    world.fit(tmp_path, [SampleTable(every_n_steps=0)], steps=2, module=world.Module(malformed=True))
    after = read_rollouts(folder)
    assert names(folder) == ["rollouts_000000-000003.parquet"]
    assert after["step"].to_pylist() == before["step"].to_pylist()
    assert set(after.slice(0, 12)["status"].to_pylist()) == {"unclosed"}
    kept = ["step", "text", "reward", "completion_ids", "engine_logprobs"]
    assert after.slice(12).select(kept).equals(before.slice(12).select(kept))


def test_samples_are_printed_every_n_steps_and_span_the_rewards(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    world.fit(tmp_path, [SampleTable(every_n_steps=2, dump_every_n_steps=0)], steps=4)
    shown = capsys.readouterr().out
    assert [step for step in range(4) if f"step {step}: 3 of 6 samples" in shown] == [0, 2]
    assert not (tmp_path / "rollouts").exists()
    first = shown[: shown.index("step 2:")]
    # sorted rewards 1 2 3 5 5 5: the worst, the one at rank round(2.5) = 2, the best
    assert all(text in first for text in ("1.000", "3.000", "5.000", "response 0", "thought 2", "unclosed"))
    assert "2.000" not in first
    assert "[bold]question[/]" in first, "a prompt's text is no markup"


def test_tensorboard_receives_the_printed_samples(world, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    board = TensorBoardLogger(tmp_path, name="board", version="")
    world.fit(tmp_path, [SampleTable(every_n_steps=2, dump_every_n_steps=0)], steps=4, logger=board)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    (tag,) = [tag for tag in events.Tags()["tensors"] if "samples" in tag]
    found = events.Tensors(tag)
    assert [event.step for event in found] == [0, 2]
    shown = markdown_to_safe_html(found[1].tensor_proto.string_val[0].decode())
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in shown.split("<tr>")[2:]]
    assert [[html.unescape(cell) for cell in row] for row in rows] == [
        ["3.000", "ok", "first [bold]question[/]", "thought 0", "response 0"],
        ["5.000", "ok", "first [bold]question[/]", "thought 2", "response 2"],
        ["7.000", "unclosed", "second question", "<think>never ␛[31mends", ""],
    ]


def test_markup_in_a_sample_is_text_on_tensorboard():
    from tensorboard.plugin_util import markdown_to_safe_html

    text = "a|b <b>*x*</b> [u](http://v) `c` &amp; # d\\\n1. next ü"
    page = markdown_to_safe_html(markdown_table(["reward", "prompt"], [SampleRow(1.0, "ok", text, "", "")]))
    (cell,) = re.findall(r"<td>(.*?)</td>", page)[1:]
    assert html.unescape(cell.replace("<br>", "\n")) == text


@pytest.mark.slow
def test_wandb_receives_the_printed_samples(world, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    world.fit(tmp_path, [SampleTable(every_n_steps=2, dump_every_n_steps=0)], steps=3, logger=logger)
    logger.experiment.finish()
    tables = [json.loads(path.read_text()) for path in tmp_path.rglob("*.table.json")]
    assert {tuple(table["columns"]) for table in tables} == {
        ("step", "reward", "status", "prompt", "thought", "response")
    }
    assert sorted(table["data"][0][:3] for table in tables) == [[0, 1, "ok"], [2, 3, "ok"]]
    assert all("never ␛[31mends" in table["data"][2][4] for table in tables)


def test_malformed_completions_are_shown_in_their_parts():
    unclosed = shown_parts(Split("I wonder", "", Status.UNCLOSED), "<think>I wonder")
    assert unclosed == ("I wonder", ""), "an unclosed thought is no response"
    stray = shown_parts(Split("plan", "", Status.STRAY_TAG), "<think>plan</think>Hi</think>there")
    assert stray == ("plan", "</think>Hi</think>there")
    assert shown_parts(Split("", "", Status.UNOPENED), "just text") == ("", "just text")
    assert shown_parts(Split("a", "b", Status.OK), "<think>a</think>b") == ("a", "b")


def test_the_terminal_obeys_no_sampled_escape_sequence(world):
    text = render_samples(world.experience(), 0, 6, 100, 200, colour=False)
    assert "\x1b" not in text and "␛[31mends" in text
    assert "\x1b[2m" in render_samples(world.experience(), 0, 6, 100, 200, colour=True), "thoughts are dimmed"


def test_an_ascii_terminal_does_not_stop_training(world, tmp_path, monkeypatch):
    import io
    import sys

    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii", write_through=True))
    world.fit(tmp_path, [SampleTable(dump_every_n_steps=0)], steps=1)
    assert b"response 0" in out.getvalue()


def test_shorten_keeps_both_ends():
    assert shorten("  as it is\n", 20) == "as it is"
    short = shorten("a" * 50 + "z" * 50, 40)
    assert len(short) == 40 and short.startswith("a" * 20) and short.endswith("z" * 10)


def test_predictions_are_streamed_to_one_file(world, tmp_path, capsys):
    trainer = world.trainer(tmp_path, [RolloutWriter()])
    trainer.predict(world.Module(), world.Loader(3), return_predictions=False)
    path = tmp_path / "predictions.parquet"
    assert pq.ParquetFile(path).num_row_groups == 3
    assert read_rollouts(path)["step"].to_pylist() == [batch for batch in range(3) for _ in range(6)]
    assert f"predictions: {path}" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.partial.*"))


def test_interrupted_predictions_can_be_read_and_do_not_pass_for_whole(world, tmp_path):
    module = world.Module()
    module.before_step = failing(2)
    path = tmp_path / "mine.parquet"
    with pytest.raises(RuntimeError, match="boom"):
        world.trainer(tmp_path, [RolloutWriter(str(path))]).predict(module, world.Loader(3), return_predictions=False)
    assert not path.exists()
    assert len(read_rollouts(tmp_path / "mine.partial.parquet")) == 12


def test_the_schema_of_files_is_that_of_the_records(world, tmp_path):
    world.fit(tmp_path, [SampleTable(every_n_steps=0)], steps=1)
    assert read_rollouts(tmp_path / "rollouts").schema.equals(SCHEMA)


@pytest.mark.parametrize(
    ("option", "value"), [("every_n_steps", -1), ("num_samples", 0), ("max_chars", 5), ("dump_every_n_steps", -2)]
)
def test_options_out_of_range(option, value):
    with pytest.raises(UserError, match=f"SampleTable.{option}"):
        SampleTable(**{option: value})


def test_predictions_want_a_parquet_name():
    with pytest.raises(UserError, match=r"RolloutWriter\.path"):
        RolloutWriter("out.csv")
