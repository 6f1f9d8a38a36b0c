"""What is imported when: help must come at once."""

import resource
import subprocess
import sys


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
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    text, modules = run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # CPU seconds, on a busy machine too
    assert "rlmt tiny" in text
    assert not {"torch", "vllm", "lightning", "transformers"} & modules


def test_fit_help_does_not_import_vllm() -> None:
    text, modules = run("fit", "--help")
    assert "--trainer.max_steps" in text
    assert "vllm" not in modules
