"""scripts/setup.sh names what a machine with a GPU lacks before it downloads anything."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
case "$*" in
    *Python.h*) exit $HEADERS ;;
    *version_info*) echo 3.11 ;;
    *"pip install"*) echo install >> installs ;;
esac
"""
SMI = '#!/bin/sh\ncase "$1" in -L) echo "GPU 0: a card" ;; *) echo $DRIVER ;; esac\n'


@pytest.mark.parametrize(
    ("driver", "compiler", "headers", "message"),
    [
        ("580.65.06", True, True, None),
        ("", True, True, None),  # an image is built without a driver
        ("570.133.20", True, True, "the NVIDIA driver is 570.133.20, but CUDA 13 requires 580 or newer"),
        ("580.65.06", False, True, "no C compiler was found.*apt-get install gcc"),
        ("580.65.06", True, False, "Python.h is missing.*apt-get install python3.11-dev"),
    ],
)
def test_machine_with_a_gpu_is_checked_before_the_download(
    driver: str, compiler: bool, headers: bool, message: str | None, tmp_path: Path
) -> None:
    project, tools = tmp_path / "project", tmp_path / "bin"
    for folder in (project / "scripts", project / ".venv/bin", tools):
        folder.mkdir(parents=True)
    for name in ("scripts/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, project / name)
    for name in ("sh", "uname", "grep", "head", "cat", "sha256sum", "dirname", "rm", "sed", "cp"):
        (tools / name).symlink_to(str(shutil.which(name)))
    programs = {project / ".venv/bin/python": PYTHON, tools / "nvidia-smi": SMI}
    if compiler:
        programs[tools / "cc"] = "#!/bin/sh\n"
    for path, text in programs.items():
        path.write_text(text)
        path.chmod(0o755)
    (project / ".venv/setup-stamp").write_text(f"cuda {project}\nolder\n")
    environment = {"PATH": str(tools), "DRIVER": driver, "HEADERS": str(int(not headers))}
    done = subprocess.run(
        [tools / "sh", "scripts/setup.sh"], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == (message is None) == os.path.exists(project / "installs"), done.stderr
    if message is not None:
        (line,) = done.stderr.splitlines()
        assert re.search(message, line), line
