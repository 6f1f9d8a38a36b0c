"""The wheel contains every module and config, with the version of the package."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from rlmt import __version__

ROOT = Path(__file__).parents[1]


def test_wheel_contains_every_module_and_config(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    for name in ("src", "callbacks", "configs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, project / name, symlinks=True, ignore=ignored)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=project, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"rlmt-{__version__}-py3-none-any.whl"
    packaged = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"rlmt/{path.relative_to(ROOT / 'src/rlmt')}" for path in (ROOT / "src/rlmt").rglob("*.py")}
    for folder in ("callbacks", "configs"):
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml")]
        expected |= {f"rlmt/{path.relative_to(ROOT)}" for path in files}
    assert len(expected) > 150 and expected <= packaged
