"""Mistakes of newcomers: each is one line that gives the cure, before any model is loaded (mistakes.yaml)."""

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlmt.cli import main, messages
from rlmt.models import loading

MISTAKES: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("mistakes.yaml").read_text(encoding="utf-8"))
FILES = {
    "afile": "a file",
    "broken.yaml": "model: [unclosed",
    "list.yaml": "- a",
    "top_typo.yaml": "modle: {init_args: {}}",
    "key_typo.yaml": "model: {init_args: {algorithm: {init_args: {kl_koef: 1}}}}",
    "trainer_typo.yaml": "trainer: {max_stepz: 3}",
    "out_of_range.yaml": "data: {init_args: {top_p: 2}}",
    "not_a_checkpoint.ckpt": "x",
}
"""Name → content of the files in the working folder."""
FIT = (
    "fit --config base --config grpo --config tiny --model.policy $tiny/policy --model.reward.model $tiny/reward "
    "--data.prompts $tiny/prompts.jsonl --data.engine TransformersEngine --data.max_prompt_tokens 256 "
    "--trainer.accelerator cpu --trainer.default_root_dir run"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder; loading a policy's weights fails the test."""
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content + "\n")
    (tmp_path / "truncated.ckpt").write_bytes(b"PK\x03\x04 truncated")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")

    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    def subclass_paths(base: type) -> list[str]:
        return [path for path in paths_of(base) if path.startswith(("rlmt.", "torch.", "lightning."))]

    paths_of = messages.get_all_subclass_paths

    monkeypatch.setattr(loading, "load_policy", load)
    # Other tests of this process have classes of their own, which no command of a user's would list.
    monkeypatch.setattr(messages, "get_all_subclass_paths", subclass_paths)
    return tmp_path


def check(mistake: dict[str, Any], tiny: Path, capsys: pytest.CaptureFixture[str]) -> float:
    """Runs a command, checks what it prints, and returns the seconds that it took."""
    capsys.readouterr()
    start = time.monotonic()
    status = main(mistake["run"].replace("FIT", FIT, 1).replace("$tiny", str(tiny)).split())
    seconds = time.monotonic() - start
    printed = capsys.readouterr().err
    (line,) = [line for line in printed.splitlines() if line.startswith("rlmt: error: ")]
    line = line.removeprefix("rlmt: error: ")
    expected = mistake["line"]
    found = expected.removeprefix("…") in line if expected.startswith("…") else line.startswith(expected)
    assert found, f"{mistake['run']}\n{line}\n{expected}"
    assert status == 2 and line.endswith(".") and "Traceback" not in printed
    return seconds


@pytest.mark.parametrize("mistake", [row for row in MISTAKES if row.get("fast")], ids=lambda row: str(row["run"]))
def test_mistake_is_one_line_with_the_cure(
    mistake: dict[str, Any], folder: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(mistake, tiny, capsys)


@pytest.mark.slow
def test_all_mistakes_are_one_line_with_the_cure(
    folder: Path, tiny: Path, capsys: pytest.CaptureFixture[str], record_property: Any
) -> None:
    seconds, wrong = [], []
    for mistake in MISTAKES:
        try:
            seconds.append(check(mistake, tiny, capsys))
        except (AssertionError, ValueError) as error:
            wrong.append(str(error))
    assert not wrong, "\n\n".join(wrong)
    with capsys.disabled():
        print(f"\n{len(seconds)} mistakes, median {statistics.median(seconds):.1f} s to the line")


def test_table_has_a_hundred_different_mistakes() -> None:
    assert len({mistake["run"] for mistake in MISTAKES}) == len(MISTAKES) >= 100
