"""Tab completion: the scripts of `rlmt completion`, in a real bash."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPLETE = """
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
function=$(complete -p rlmt | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
"$function" rlmt "${COMP_WORDS[COMP_CWORD]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def script(shell: str, folder: Path) -> Path:
    path = folder / f"rlmt.{shell}"
    with path.open("wb") as file:
        subprocess.run([sys.executable, "-m", "rlmt", "completion", shell], stdout=file, check=True)
    return path


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script("bash", tmp_path_factory.mktemp("completion"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "",
            {
                "fit",
                "validate",
                "test",
                "predict",
                "plan",
                "export",
                "chat",
                "distill",
                "study",
                "mini",
                "tiny",
                "doctor",
            },
        ),
        ("fi", {"fit"}),
        ("fit --trainer.max_st", {"--trainer.max_steps"}),
        ("fit --model.algorithm.kl_", {"--model.algorithm.kl_coef", "--model.algorithm.kl_clamp"}),
        ("fit --model.algorithm G", {"GRPO", "GSPO"}),
        ("fit --model.malformed p", {"penalty"}),
        ("fit --config gr", {"grpo"}),
        ("validate --config base --config mini/g", {"mini/grpo"}),
        ("plan --mem", {"--memory"}),
        ("chat --pro", {"--prompt"}),
        ("export --w", {"--what"}),
        ("distill --out", {"--out"}),
        ("study --jo", {"--jobs"}),
        ("configs c", {"copy"}),
        ("runs --w", {"--watch"}),
        ("mini --se", {"--seed"}),
        ("tiny --corp", {"--corpus"}),
    ],
)
def test_bash_completes(words: str, expected: set[str], bash_script: Path, tmp_path: Path) -> None:
    line = ["rlmt", *words.split(), *([""] if words.endswith(" ") or not words else [])]
    command = ["bash", "-c", COMPLETE, "bash", str(bash_script), *line]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    found = set(done.stdout.split())
    assert expected <= found, done
    assert all(word.startswith(line[-1]) for word in found)


@pytest.mark.slow
def test_zsh_script_completes_every_command(tmp_path: Path) -> None:
    path = script("zsh", tmp_path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#compdef rlmt")
    assert all(word in text for word in ("--model.algorithm.kl_coef", "--jobs", "_rlmt_complete_config", "--prompt"))
    if zsh := shutil.which("zsh"):
        subprocess.run([zsh, "-n", str(path)], check=True)
