"""The README is true: its commands parse into runs, its tree is the tree, its links lead somewhere."""

import functools
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from rlmt.cli import chat, commands, main
from rlmt.cli.plan import PlanCLI
from rlmt.demos.mini import files
from rlmt.export import checkpoints
from rlmt.study import command
from rlmt.study.runner import Runner

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for text in (README, *((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("mini.md", "single-gpu.md")))
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
    if line.startswith("rlmt ")
]


def recorder(function: Callable[..., Any], reached: list[str]) -> Callable[..., Any]:
    """Takes the place of a function, with its signature, and notes that it was called."""

    @functools.wraps(function)
    def note(*args: Any, **options: Any) -> None:
        reached.append(function.__name__)

    return note


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_reach_the_trainer(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reached: list[str] = []
    for name in ("fit", "validate", "test", "predict"):
        monkeypatch.setattr(Trainer, name, recorder(getattr(Trainer, name), reached))
    monkeypatch.setattr(checkpoints, "export", recorder(checkpoints.export, reached))
    monkeypatch.setattr(PlanCLI, "fit", lambda cli, **options: reached.append("plan"))
    monkeypatch.setattr(chat, "chat", recorder(chat.chat, reached))
    monkeypatch.setattr(files, "write_mini", lambda *given: reached.append("mini") or {})
    monkeypatch.setattr(Runner, "run", lambda runner: reached.append("study"))
    monkeypatch.setattr(command, "report", lambda *anything: None)
    monkeypatch.chdir(tmp_path)
    for run in ("tiny/run", "llama-3.1-8b", "sft", "reward"):
        checkpoint = tmp_path / "runs" / run / "checkpoints/last.ckpt"
        checkpoint.parent.mkdir(parents=True)
        torch.save({}, checkpoint)
    words = shlex.split(line)[1:]
    assert (
        main(
            [*words, *(["--trainer.accelerator", "cpu"] if words[0] in ("fit", "validate", "predict", "plan") else [])]
        )
        == 0
    )
    assert reached == [words[0]]


def test_there_are_commands_of_every_kind() -> None:
    assert {line.split()[1] for line in COMMANDS} == {
        *("fit", "validate", "predict", "plan", "export", "chat", "mini", "study")
    }
    assert {"make quickstart", "make test"} <= {line.split("#")[0].strip() for line in README.splitlines()}
    targets = (ROOT / "Makefile").read_text()
    assert "\nquickstart:" in targets and "\ntest:" in targets


def test_the_tree_is_the_tree() -> None:
    tree = README.split("## What is where")[1].split("```")[1]
    folder, named = "", set()
    for line in tree.strip().splitlines():
        path = line.split()[0]
        folder = path if not line.startswith(" ") else folder
        named.add(path if path == folder else folder + path)
    files = {
        f"{top}{path.relative_to(ROOT / top)}"
        for top in ("src/rlmt/", "callbacks/")
        for path in (ROOT / top).rglob("*.py")
        if not path.name.startswith("_") and "callbacks" not in path.relative_to(ROOT / top).parts
    }
    assert {name for name in named if name.endswith(".py")} == files


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)h#][^)]*)\)", README):
        assert (ROOT / target).exists(), target


def test_the_promises_of_reliability_have_their_tests() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    named = [re.findall(r"`([\w/]+\.py)`", row) for row in rows]
    assert len(rows) > 10 and all(named)
    for name in {name for names in named for name in names}:
        assert (ROOT / name if name.startswith("benchmarks/") else ROOT / "tests" / name).is_file(), name
    for target in re.findall(r"\]\(([^)h#][^)]*)\)", text):
        assert (ROOT / "docs" / target).exists(), target


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text: Any = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in commands._COMMANDS)
