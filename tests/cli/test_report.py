"""`rlmt report`: the file that it writes, and what it says when it cannot."""

from pathlib import Path

import pytest

from rlmt.cli import main


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run/version_0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,reward/mean\n" + "".join(f"{i},{i}\n" for i in range(20)))
    return folder


def test_page_goes_to_the_run_or_to_out(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run_folder.parent)]) == 0
    assert (run_folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert capsys.readouterr().out == f"{run_folder / 'report.html'}: 0.1 MB; open it in a browser\n"
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.csv").write_text("step,reward/mean\n0,1\n")
    assert main(["report", str(run_folder), str(other)]) == 0
    assert (tmp_path / "report.html").is_file()
    assert main(["report", str(other), "--out", str(tmp_path / "new/page.html")]) == 0
    assert (tmp_path / "new/page.html").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "nothing: the folder does not exist; pass the folder of a run, such as runs/tiny/run."),
        (["."], ".: no metrics.csv was found; pass a folder that `rlmt fit` wrote, or its version_N."),
        (["run", "run"], "run: this run is given twice; pass each run once."),
        (["run", "--out", "."], "--out .: is a folder; give the path of a file, such as report.html."),
        (
            ["run", "--out", "run/version_0/metrics.csv/page.html"],
            "--out run/version_0/metrics.csv/page.html: cannot be",
        ),
    ],
)
def test_error_names_the_folder_and_the_fix(
    words: list[str], message: str, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2
    assert message in capsys.readouterr().err
