"""The packages of rlmt form layers, and each module lies in a package."""

import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]


def test_imports_point_to_lower_layers() -> None:
    """The layers are under [tool.importlinter] in pyproject.toml."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Contracts: 1 kept, 0 broken." in result.stdout


def test_package_has_four_flat_modules() -> None:
    flat = {path.stem for path in (REPO / "src/rlmt").glob("*.py")}
    assert flat == {"__init__", "__main__", "errors", "types"}
