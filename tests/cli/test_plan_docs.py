"""The plans and peaks that README and docs show are those that `rlmt plan` prints, without a hub."""

import re
from pathlib import Path

import pytest
import torch

from rlmt.cli.commands import main
from rlmt.models import loading

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(loading, "load_config", lambda path: pytest.fail(f"the hub was asked for {path}"))


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def peak_of(options: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The peak that the plan prints, in GiB."""
    assert main(["plan", *options.split()]) == 0
    (peak,) = re.findall(r"^Peak: ([\d.]+) GiB", capsys.readouterr().out, re.MULTILINE)
    return str(peak)


@pytest.mark.parametrize("name", [pytest.param("single-gpu", marks=pytest.mark.slow), "scaling"])
def test_docs_show_the_printed_plan(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ((line, printed),) = re.findall(
        r"```sh\n(rlmt plan .*?)```\n\n```\n(.*?)```", text_of(f"docs/{name}.md"), re.DOTALL
    )
    assert main(line.split()[1:]) == 0
    assert [row.rstrip() for row in capsys.readouterr().out.splitlines()] == printed.splitlines()


@pytest.mark.slow
def test_docs_table_shows_the_printed_peaks(capsys: pytest.CaptureFixture[str]) -> None:
    """Every row of the table of cards and the configs for them."""
    text = text_of("docs/single-gpu.md")
    rows = re.findall(r"^\| (\d+) GB \| .*? \| `(--.*?)` \| ([\d.]+) GiB \|$", text, re.MULTILINE)
    assert {int(card) for card, _, _ in rows} == {12, 24, 48, 80}
    for card, options, peak in rows:
        if options == "--config qlora":  # the docs show its whole plan, which the test above checks
            assert f"\nPeak: {peak} GiB" in text
            continue
        words = f"--config base --config grpo --config llama-3.1-8b {options} --memory {card}"
        assert peak_of(words, capsys) == peak, words


def test_readme_shows_the_peaks_of_the_docs() -> None:
    rows = re.findall(r"`(--.*?)` \| ([\d.]+) GiB \|$", text_of("docs/single-gpu.md"), re.MULTILINE)
    exact = {options: float(peak) for options, peak in rows}
    readme = text_of("README.md")
    shown = re.findall(r"^\| one GPU of \d+ GB.*? \| `(.*?)` \| ([\d.]+) GiB \|$", readme, re.MULTILINE)
    assert len(shown) == 3 and all(float(peak) == round(exact[options], 1) for options, peak in shown)
    (sharded,) = re.findall(r"^\| 8 GPUs of 80 GB.*? \| ([\d.]+) GiB each \|$", readme, re.MULTILINE)
    (peak,) = re.findall(r"^Peak: ([\d.]+) GiB", text_of("docs/scaling.md"), re.MULTILINE)
    assert float(sharded) == round(float(peak), 1)


@pytest.mark.slow
def test_readme_shows_the_peak_of_a_first_run(capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = re.findall(
        r"^\| a card of 24 GB, .*qwen2\.5-0\.5b.* \| ([\d.]+) GiB \|$", text_of("README.md"), re.MULTILINE
    )
    peak = peak_of("--config base --config qwen2.5-0.5b --memory 24", capsys)
    assert float(shown) == round(float(peak), 1)


@pytest.mark.slow
def test_docs_table_shows_the_peaks_of_supervised_runs(capsys: pytest.CaptureFixture[str]) -> None:
    rows = re.findall(
        r"^\| (\d+) GB \| `rlmt plan (.*?)` \| ([\d.]+) GiB \|$", text_of("docs/single-gpu.md"), re.MULTILINE
    )
    assert {re.findall(r"--config (sft|reward)", options)[0] for _, options, _ in rows} == {"sft", "reward"}
    for card, options, peak in rows:
        assert peak_of(f"{options} --data.path x.jsonl --memory {card}", capsys) == peak, options
