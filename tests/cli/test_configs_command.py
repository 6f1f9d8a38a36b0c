"""`rlmt configs`: the list, the composition and the copy."""

from pathlib import Path

import pytest
import yaml

from rlmt.cli import main
from rlmt.configs import shipped_configs


def test_list_has_a_line_for_each_config(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0] for line in lines}
    assert listed - {"paper/…"} == {name for name in shipped_configs() if not name.startswith("paper/")}
    assert all(len(line) <= 80 and len(line.split()) > 3 for line in lines)


def test_copy_writes_a_config_to_edit_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "copy", "mini/grpo"]) == 0
    assert "--config grpo.yaml" in capsys.readouterr().out
    assert (tmp_path / "grpo.yaml").read_text() == shipped_configs()["mini/grpo"].read_text()
    assert main(["configs", "copy", "mini/grpo"]) == 2
    assert "grpo.yaml: the file exists" in capsys.readouterr().err
    assert main(["configs", "copy", "grpo", "mine/other.yaml"]) == 0 and (tmp_path / "mine/other.yaml").is_file()


def test_show_prints_a_file_or_the_composition(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "show", "grpo"]) == 0
    assert capsys.readouterr().out == shipped_configs()["grpo"].read_text()
    assert main(["configs", "show", "base", "grpo", "tiny"]) == 0
    composed = yaml.safe_load(capsys.readouterr().out)
    assert composed["model"]["init_args"]["algorithm"]["init_args"]["dual_clip"] == 3.0
    assert composed["trainer"]["max_steps"] == 20


@pytest.mark.parametrize("words", [["copy"], ["show"], ["list", "grpo"], ["copy", "a", "b", "c"], ["show", "gropo"]])
def test_misuse_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rlmt: error:") and line.endswith(".")
