"""`rlmt export --push`: the files reach the repository, private by default, and refusals are one line."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from rlmt.cli import main

from .fake_hub import TOKEN, FakeHub
from .test_card import write_run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol has a server of its own
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tiny, tmp_path_factory.mktemp("run"))


def push(checkpoint: Path, out: Path, repo: str, *more: str) -> int:
    return main(["export", str(checkpoint), str(out), "--push", repo, *more])


def test_folder_is_uploaded_to_a_private_repository(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(checkpoint, tmp_path / "out", "me/thinker") == 0
    assert f"uploaded to {hub.url}/me/thinker" in capsys.readouterr().out
    assert hub.visibility == {"me/thinker": "private"}
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.files["me/thinker"] == written
    assert {"README.md", "model.safetensors", "curves.png", "thinking_format.json"} <= written.keys()
    assert written["README.md"].decode().count('name = "me/thinker"') == 1
    assert not any(TOKEN.encode() in content for content in written.values())


def test_public_repository_has_to_be_asked_for(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(checkpoint, tmp_path / "first", "me/open", "--public", "true") == 0
    assert hub.visibility == {"me/open": "public"}
    capsys.readouterr()
    assert push(checkpoint, tmp_path / "second", "me/open") == 2
    assert "--push me/open: the repository exists and is public; add --public true" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("me/x", None, "--push me/x: no Hugging Face token was found; run `hf auth login`, or set HF_TOKEN."),
        ("me/x", "hf_wrong", "--push me/x: the hub refuses the token; log in again with `hf auth login`."),
        ("others/x", TOKEN, "--push others/x: the hub refuses the token; use a repository of your own"),
        ("a/b/c", TOKEN, "--push a/b/c: is not the name of a repository; pass USER/NAME."),
    ],
)
def test_refusals_are_one_line_before_anything_is_written(
    repo: str,
    token: str | None,
    message: str,
    hub: FakeHub,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert push(checkpoint, tmp_path / "out", repo) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"rlmt: error: {message}") and "\n" not in error and error.endswith(".")
    assert TOKEN not in error and not (tmp_path / "out").exists() and not hub.files


def test_failed_upload_keeps_the_folder_and_says_how_to_go_on(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail_commits = True
    assert push(checkpoint, tmp_path / "out", "me/x") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]  # behind transformers' progress bars
    assert "--push me/x: the hub answered with status 400" in error
    assert f"{tmp_path}/out is complete, and `hf upload me/x {tmp_path}/out` uploads it later." in error
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_unreachable_hub_and_options_without_push(
    hub: FakeHub,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(checkpoint, tmp_path / "out", "me/x") == 2
    assert "--push me/x: the hub cannot be reached (" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(checkpoint, tmp_path / "out", "me/x") == 2
    assert "--push me/x: the hub cannot be reached (" in capsys.readouterr().err
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--public", "true"]) == 2
    assert "--public true: nothing is uploaded; pass --push USER/NAME, too." in capsys.readouterr().err


@pytest.mark.slow
def test_command_uploads_to_the_endpoint_of_the_environment(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "rlmt", "export", str(checkpoint), str(tmp_path / "out"), "--push", "me/x"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr and "model.safetensors" in hub.files["me/x"]
