"""The wheel contains every module and config, with the version of the package, and works outside the checkout."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from rlmt import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout, built from a copy of the files that it is made of."""
    tmp_path = tmp_path_factory.mktemp("wheel")
    project = tmp_path / "project"
    project.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    for name in ("src", "callbacks", "configs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, project / name, symlinks=True, ignore=ignored)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=project, check=True, capture_output=True)
    (built,) = tmp_path.glob("*.whl")
    return built


def test_wheel_contains_every_module_and_config(wheel: Path) -> None:
    assert wheel.name == f"rlmt-{__version__}-py3-none-any.whl"
    packaged = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"rlmt/{path.relative_to(ROOT / 'src/rlmt')}" for path in (ROOT / "src/rlmt").rglob("*.py")}
    for folder in ("callbacks", "configs"):
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml")]
        expected |= {f"rlmt/{path.relative_to(ROOT)}" for path in files}
    for folder in ("src/rlmt/report/assets", "src/rlmt/report/vendor"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        assert len(files) >= 3
        expected |= {str(path.relative_to(ROOT / "src")) for path in files}
    assert len(expected) > 150 and expected <= packaged


@pytest.mark.slow
def test_wheel_works_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)

    def python(*words: str) -> str:
        env = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run([sys.executable, *words], cwd=empty, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert python("-c", "import rlmt; print(rlmt.__file__)").strip() == str(site / "rlmt" / "__init__.py")
    assert f"rlmt {__version__}" in python("-m", "rlmt", "--help")
    listed = python("-m", "rlmt", "configs")
    assert all(path.stem in listed for path in (ROOT / "configs").glob("*.yaml"))
    composed = ("--config", "base", "--config", "grpo", "--config", "tiny")
    printed = yaml.safe_load(python("-m", "rlmt", "fit", *composed, "--print_config"))
    assert printed["model"]["class_path"] == "rlmt.modules.RLMTModule" and printed["trainer"]["max_steps"] == 20
    assert not list(empty.iterdir())


def test_metadata_has_what_an_index_shows(wheel: Path) -> None:
    text = zipfile.ZipFile(wheel).read(f"rlmt-{__version__}.dist-info/METADATA").decode()
    metadata, body = email.message_from_string(text), text.partition("\n\n")[2]
    assert metadata["Summary"] and metadata["Author"] and metadata["License-Expression"] == "Apache-2.0"
    assert len(metadata.get_all("Classifier", [])) > 5 and body.startswith("# rlmt")
