"""Files hold plain data: reading runs no code, and no written file holds a secret."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rlmt.checkpointing.csv_logger import ResumableCSVLogger
from rlmt.checkpointing.files import AtomicCheckpointIO, read_checkpoint
from rlmt.cli.commands import main
from rlmt.engines.vllm import temporary_folders

Command = Callable[..., list[str]]
SECRET = "hush-7c1f93aa"
KEYS = ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "RLMT_API_KEY", "VLLM_API_KEY")


@pytest.fixture
def command(tiny: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(tmp_path)

    def arguments(name: str, *more: object) -> list[str]:
        options = {
            "--model.policy": tiny / "policy",
            "--model.reward.model": tiny / "reward",
            "--model.format": "no_think",
            "--data.prompts": prompts_file,
            "--data.engine": "TransformersEngine",
            "--data.batch_size": 4,
            "--data.group_size": 2,
            "--data.max_prompt_tokens": 256,
            "--data.max_new_tokens": 4,
            "--data.val_size": 4,
            "--trainer.max_steps": 1,
            "--trainer.default_root_dir": tmp_path / "run",
            "--trainer.enable_progress_bar": "false",
        }
        flat = [str(word) for pair in options.items() for word in pair]
        configs = [word for name in ("base", "grpo", "tiny") for word in ("--config", name)]
        return [name, *configs, *flat, *map(str, more)]

    return arguments


class Payload:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path.cwd() / "owned"),)


def test_checkpoint_code_is_never_run(
    command: Command, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.ckpt"
    torch.save({"state_dict": {}, "rlmt": Payload()}, bad)
    shutil.copytree(tiny / "policy", tmp_path / "policy")
    for words in (
        command("fit", "--ckpt_path", bad),
        command("validate", "--ckpt_path", bad),
        command("validate", "--ckpt_path", bad, "--weights_only", "false"),
        ["export", str(bad), str(tmp_path / "out")],
        ["chat", str(bad), "--prompt", "hi", "--format", "think"],
    ):
        assert main(words) == 2, words
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error: ")]
        assert "bad.ckpt" in line and ("damaged" in line or "holds" in line), line
    sharded = tmp_path / "sharded.ckpt"
    sharded.mkdir()
    (sharded / ".metadata").write_bytes(pickle.dumps(Payload()))
    torch.save({}, sharded / "meta.pt")
    assert main(["export", str(sharded), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(Payload()))  # the payload works
    assert (tmp_path / "owned").exists()


def test_environment_secrets_are_in_no_file_and_no_output(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for key in KEYS:
        monkeypatch.setenv(key, SECRET)
    assert main(command("fit")) == 0
    assert main(command("fit", "--ckpt_path", "last", "--seed_everything", 0, "--trainer.max_steps", 2)) == 0
    last = tmp_path / "run" / "latest" / "checkpoints" / "last.ckpt"
    assert main(["export", str(last), str(tmp_path / "out")]) == 0
    assert main(command("fit", "--data.prompts", "nowhere.jsonl")) == 2
    with monkeypatch.context() as patch:  # this file is the user's own code, so the error is one line
        patch.setattr(
            "rlmt.data.rollout_datamodule.generate", lambda *args: (_ for _ in ()).throw(RuntimeError("broke"))
        )
        assert main(command("fit")) == 2
    told = capfd.readouterr()
    assert SECRET not in told.out + told.err and "nowhere.jsonl" in told.err and "broke" in told.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".ckpt", ".csv", ".yaml", ".parquet", ".json", ".safetensors"}
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path


def test_runs_write_plain_data_and_safetensors(command: Command, tmp_path: Path) -> None:
    assert main(command("fit")) == 0
    checkpoint = read_checkpoint(tmp_path / "run" / "latest" / "checkpoints" / "last.ckpt")
    assert checkpoint["config"]["model"]["init_args"]["format"] == "no_think" and checkpoint["run"]["step"] == 0
    assert main(["export", str(tmp_path / "run" / "latest" / "checkpoints" / "last.ckpt"), str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert list(file.keys())


# Folders in memory ----------------------------------------------------------------------------------------------------


def test_temporary_folder_is_removed_at_exit_and_after_a_kill(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(temporary_folders.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(temporary_folders, "_MEMORY", tmp_path / "memory")
    (tmp_path / "memory").mkdir()
    with temporary_folders.TemporaryFolder("adapter", memory_bytes=1000) as folder:
        assert Path(folder).parent == tmp_path / "memory"
        assert temporary_folders.remove_abandoned() == [] and Path(folder).is_dir()  # in use
    assert not Path(folder).exists()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # creates one folder in each place, then is killed
        made = [
            temporary_folders.TemporaryFolder("vllm"),
            temporary_folders.TemporaryFolder("adapter", memory_bytes=1000),
        ]
        os.write(write, "\n".join(folder.path for folder in made).encode())
        signal.pause()
    left = [Path(line) for line in os.read(read, 10_000).decode().splitlines()]
    assert temporary_folders.remove_abandoned() == []
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (tmp_path / "rlmt-scratch-not-ours").mkdir()  # without a lock its owner is unknown
    assert len(left) == 2 and sorted(temporary_folders.remove_abandoned()) == sorted(left)
    assert not any(path.exists() for path in left) and (tmp_path / "rlmt-scratch-not-ours").exists()


def test_adapter_goes_to_disk_where_shared_memory_lacks_room_for_all_ranks(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(temporary_folders.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(temporary_folders, "_MEMORY", tmp_path / "memory")
    (tmp_path / "memory").mkdir()
    free = SimpleNamespace(free=64 * 2**20)  # a container's default
    monkeypatch.setattr(temporary_folders.shutil, "disk_usage", lambda path: free)
    temporary_folders._warn_of_small_memory.cache_clear()
    size = 20 * 2**20
    with temporary_folders.TemporaryFolder("adapter", memory_bytes=size) as folder:
        assert Path(folder).parent == tmp_path / "memory"
    monkeypatch.setattr(temporary_folders.collectives, "world_size", lambda: 4)
    with pytest.warns(UserWarning, match="less than the 80 MiB") as caught:
        for _ in range(2):
            with temporary_folders.TemporaryFolder("adapter", memory_bytes=size) as folder:
                assert Path(folder).parent == tmp_path
    assert len(caught) == 1


def test_content_folder_has_one_path_for_equal_content(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(temporary_folders.tempfile, "tempdir", str(tmp_path))

    def write(text: str) -> Any:
        return temporary_folders.ContentFolder("vllm", lambda folder: Path(folder, "config.json").write_text(text))

    first, second, other = write("a"), write("a"), write("b")
    path = first.path
    assert second.path == path != other.path and len(list(tmp_path.iterdir())) == 2
    first.close()
    first.close()
    assert Path(path, "config.json").read_text() == "a"  # the second one still uses it
    assert temporary_folders.remove_abandoned() == []
    second.close()
    other.close()
    assert list(tmp_path.iterdir()) == []
    again = write("a")
    assert again.path == path
    child = os.fork()
    if child == 0:  # uses it, too, and is killed
        write("a")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    again.close()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(temporary_folders.os, "getuid", lambda: os.geteuid() + 1)
    foreign = write("a")  # belongs to a user who is not the one that `getuid` names
    own = write("a")
    assert own.path != foreign.path and Path(own.path, "config.json").read_text() == "a"


# Logs and checkpoints -------------------------------------------------------------------------------------------------


def test_resumed_log_continues_after_the_checkpoint(tmp_path: Path) -> None:
    log = ResumableCSVLogger(tmp_path)
    for step in range(4):
        log.log_metrics({"loss": 0.5 * step}, step)
        log.save()
    log.log_metrics({"val": 7.0}, 3)
    log.finalize("success")
    path = tmp_path / "version_0" / "metrics.csv"
    assert path.read_text().splitlines() == ["loss,step,val", "0.0,0,", "0.5,1,", "1.0,2,", "1.5,3,", ",3,7.0"]
    path.write_text(path.read_text() + "9.0,4")  # truncated by a kill
    again = ResumableCSVLogger(tmp_path)
    again.resume(0, 1)
    again.log_metrics({"loss": 1.0}, 2)
    again.log_metrics({"new": 2.0}, 2)
    again.finalize("success")
    assert path.read_text().splitlines() == ["loss,new,step,val", "0.0,,0,", "0.5,,1,", "1.0,,2,", ",2.0,2,"]
    fresh = ResumableCSVLogger(tmp_path)
    fresh.log_metrics({"loss": 3.0}, 0)
    fresh.finalize("success")
    assert (tmp_path / "version_1" / "metrics.csv").read_text().splitlines() == ["loss,step", "3.0,0"]


def test_kill_during_any_write_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    """A process is killed after a number of bytes of the new file; the file on disk is the old one or the new one."""
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    old, new = {"x": torch.zeros(50_000)}, {"x": torch.ones(50_000)}
    seen = set()
    for count in (0, 1, 10_000, 150_000, None):
        io.save_checkpoint(old, path)
        child = os.fork()
        if child == 0:
            try:
                with Dying(count):
                    io.save_checkpoint(new, path)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        seen.add(float(io.load_checkpoint(path)["x"].mean()))
    assert seen == {0.0, 1.0}


class Dying:
    """Context in which the process is killed after torch has written this number of bytes; None is never."""

    def __init__(self, count: int | None) -> None:
        self.count = count

    def __enter__(self) -> None:
        from rlmt.checkpointing import files

        save, count = torch.save, self.count

        def dying(checkpoint: Any, file: Any) -> None:
            save(checkpoint, file)
            if count is not None:
                file.flush()
                os.truncate(file.name, count)
                os.kill(os.getpid(), signal.SIGKILL)

        files.torch.save = dying

    def __exit__(self, *raised: object) -> None:
        pass
