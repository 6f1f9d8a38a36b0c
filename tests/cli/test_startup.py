"""What is imported when: help must come at once."""

import subprocess
import sys
import time


def run(*args: str) -> tuple[str, set[str]]:
    code = (
        "import sys; from rlmt.cli.commands import main\n"
        f"try: main({list(args)!r})\n"
        "except SystemExit: pass\n"
        "print('MODULES', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text, _, modules = done.stdout.rpartition("MODULES")
    return text, set(modules.split())


def test_help_imports_nothing_heavy_and_comes_at_once() -> None:
    start = time.monotonic()
    text, modules = run("--help")
    assert time.monotonic() - start < 2
    assert "rlmt tiny" in text
    assert not {"torch", "vllm", "lightning", "transformers"} & modules


def test_fit_help_does_not_import_vllm() -> None:
    text, modules = run("fit", "--help")
    assert "--trainer.max_steps" in text
    assert "vllm" not in modules
