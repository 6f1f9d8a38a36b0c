"""`rlmt doctor`: what is missing has a cure, and the token's value is never printed."""

from types import SimpleNamespace

import pytest
import torch

from rlmt.cli import doctor, main
from rlmt.cli.doctor import Finding

GIB = 2**30


def test_report_fits_one_screen_and_hides_the_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret123")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 40 and "hf_secret123" not in out and "hub token present" in out
    for name in ("Python", "torch", "GPU", "driver", "vLLM", "memory", "/dev/shm", "disk", "libnuma", "compiler"):
        assert any(line[2:].startswith(name) for line in out.splitlines()), name
    assert "  yes tiny" in out


def test_problems_are_marked_with_their_cures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=GIB // 2))
    assert main(["doctor"]) == 1, "a full disk stops every run"
    out = capsys.readouterr().out
    assert "! libnuma   missing\n            → apt-get install libnuma1" in out
    assert "! disk      0.5 GiB free here\n            → free some space" in out and "! /dev/shm  0.5 GiB free" in out


@pytest.mark.parametrize(
    ("sizes", "runs"),
    [([], 1), ([14.6], 1), ([20.0], 2), ([22.05], 2), ([23.5], 3), ([79.2], 4), ([79.2] * 7, 4), ([79.2] * 8, 5)],
)
def test_configs_that_run_depend_on_the_gpus(sizes: list[float], runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(sizes))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
    found = [SimpleNamespace(total_memory=int(size * GIB)) for size in sizes]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: found[number])
    assert list(doctor.runnable().values()) == [True] * runs + [False] * (5 - runs)


def test_gpu_that_torch_does_not_find_names_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    finding = doctor._gpu()
    assert isinstance(finding, Finding) and finding.cure == "RLMT_DEVICE=cuda make setup"


def test_options_are_refused() -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--fix"])
