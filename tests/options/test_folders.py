"""Folders that cannot be written are one line before any weights are read."""

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from rlmt.callbacks.rollout_writer import RolloutWriter
from rlmt.cli.commands import main
from rlmt.demos import tiny as tiny_demo
from rlmt.engines import VLLMEngine
from rlmt.engines.vllm.temporary_folders import check_folders
from rlmt.errors import UserError
from rlmt.export import checkpoints
from rlmt.models.loading import load_config
from rlmt.options import check_writable

UNWRITABLE = Path("/proc/rlmt")  # for root, too


def problem(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_writable(folder, "--out")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_that_exist_or_can_be_created_pass_and_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "there", tmp_path / "a" / "b" / "c"):
        check_writable(folder, "--out")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_relative_folder_is_found_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_writable(Path("runs/a"), "--out")
    (tmp_path / "runs").write_text("a file")
    assert problem(Path("runs/a")) == "--out runs/a: runs is not a folder; pass a folder that can be written."


def test_file_broken_link_and_read_only_folder_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for folder in (file, file / "in" / "it"):
        assert problem(folder) == f"--out {folder}: {file} is not a folder; pass a folder that can be written."
    assert file.read_text() == "kept"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "link is not a folder" in problem(tmp_path / "link" / "out")
    assert "cannot be written (" in problem(UNWRITABLE)
    (tmp_path / "read_only").mkdir(mode=0o500)
    if os.getuid():
        assert "cannot be written (Permission denied)" in problem(tmp_path / "read_only" / "out")


def error_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("out", ["file", "file/in/it", str(UNWRITABLE)])
def test_commands_check_their_output_folder_first(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("kept")
    Path("last.ckpt").write_text("not read")
    never = pytest.fail
    monkeypatch.setattr(checkpoints, "_open", lambda path: never("the checkpoint was read"))
    monkeypatch.setattr(tiny_demo, "warm_started_policy", lambda *_: never("a policy was made"))
    for arguments in (["tiny", out], ["mini", out], ["export", "last.ckpt", out]):
        line = error_line(capsys, arguments)
        assert line.startswith("rlmt: error: ") and out in line and line.endswith("."), line
        assert any(word in line for word in ("is not a folder", "cannot be written", "already exists")), line
    assert Path("file").read_text() == "kept"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file/predictions.parquet", "file is not a folder"),
        (str(UNWRITABLE / "predictions.parquet"), "cannot be written"),
        ("folder.parquet", "folder.parquet: is a folder; give the path of a file"),
    ],
)
def test_file_of_predictions_is_checked_before_anything_is_generated(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("folder.parquet").mkdir()
    trainer: Any = SimpleNamespace(is_global_zero=True)
    with pytest.raises(UserError, match=message):
        RolloutWriter(path).setup(trainer, SimpleNamespace(), "predict")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "/cache"), OSError(30, "Read-only", "/cache")], ids=str
)
def test_hub_cache_that_cannot_be_written_is_named(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*_: object, **__: object) -> None:
        raise OSError("PermissionError at /cache when downloading") from error

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(UserError) as caught:
        load_config("owner/model")
    assert str(caught.value) == (
        f"owner/model: the hub's cache cannot be written (/cache: {error.strerror}); set HF_HOME to a folder that can."
    )


@pytest.mark.parametrize("variable", ["VLLM_CACHE_ROOT", "XDG_CACHE_HOME"])
def test_cache_of_vllm_is_checked_if_it_compiles(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for name in ("VLLM_CACHE_ROOT", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    check_folders(compiles=False)
    with pytest.raises(UserError, match="vLLM's cache .*file is not a folder; set VLLM_CACHE_ROOT"):
        check_folders(compiles=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="vLLM's cache"):
        VLLMEngine(enforce_eager=False).check()
    VLLMEngine(enforce_eager=True).check()
