"""The README and the pages of the documentation: size, links, trees and tables."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .pages import PAGES, README, ROOT

DOCS = ROOT / "docs"


def test_readme_has_at_most_150_lines() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#][^)]*)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    assert set(re.findall(r"([\w./-]+\.md)$", navigation, re.MULTILINE)) == {
        str(page.relative_to(DOCS)) for page in PAGES if page != README
    }


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    html = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("*.html"))
    assert not re.search(
        r"<(?:script|img)[^>]* src=\"?https?:|<link[^>]* rel=\"?stylesheet\"?[^>]* href=\"?https?:", html
    )
    assert "<!-- generated" not in html and "$$" not in html


def test_architecture_lists_every_package() -> None:
    tree = (DOCS / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    listed = set(re.findall(r"^  (\w+(?:/|\.py)) ", tree, re.MULTILINE))
    package = ROOT / "src" / "rlmt"
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py") if not path.parent.is_symlink()}
    modules = {path.name for path in package.glob("*.py") if not path.name.startswith("_")}
    assert listed == folders | modules


def test_reliability_names_existing_tests() -> None:
    text = (DOCS / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    named = [re.findall(r"`([\w/]+\.py)`", row) for row in rows]
    assert len(rows) > 10 and all(named)
    for name in {name for names in named for name in names}:
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("picture", sorted((DOCS / "concepts").glob("*.png")), ids=lambda path: path.name)
def test_pictures_are_small(picture: Path) -> None:
    assert picture.stat().st_size < 150_000
