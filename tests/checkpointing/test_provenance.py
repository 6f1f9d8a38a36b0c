"""Commits of checkouts, with a mark where files were changed, and versions of packages."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rlmt import __version__
from rlmt.checkpointing import provenance
from rlmt.checkpointing.provenance import git_state, source_commit, versions

Git = Callable[..., str]


@pytest.fixture
def git(tmp_path: Path) -> Git:
    """Runs git in a new repository."""

    def run(*words: str) -> str:
        options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *options, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    run("init")
    return run


def test_state_of_a_repository(git: Git, tmp_path: Path) -> None:
    assert git_state(tmp_path) is None  # no commit yet
    git("commit", "--allow-empty", "-m", "first")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "changed_files": 0}
    (tmp_path / "new").touch()
    state = git_state(tmp_path)
    assert state is not None and state["changed_files"] == 1


def test_source_commit_is_the_checkouts_and_marks_changes(
    git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "src" / "provenance.py"
    source.parent.mkdir()
    source.write_text("one")
    monkeypatch.setattr(provenance, "__file__", str(source))
    git("commit", "--allow-empty", "-m", "first")
    assert source_commit() is None  # an installed package that an outer checkout does not track
    git("add", ".")
    git("commit", "-m", "second")
    git("tag", "v1")
    assert source_commit() == git("rev-parse", "HEAD")
    source.write_text("two")
    assert source_commit() == git("rev-parse", "HEAD") + "+"


def test_versions_are_those_of_installed_packages() -> None:
    found = versions()
    assert found["rlmt"] == __version__ and {"python", "torch", "lightning", "transformers"} <= set(found)
    assert all(found.values())
