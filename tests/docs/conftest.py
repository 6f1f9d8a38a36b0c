"""The pages of the documentation, their commands and their files."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Writes the titled code blocks of a page into an empty working folder, as its reader does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(page: Path) -> None:
        text = page.read_text(encoding="utf-8")
        for name, code in re.findall(r'```\w+ title="([\w.]+)"\n(.*?)```', text, re.DOTALL):
            monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
            (tmp_path / name).write_text(code, encoding="utf-8")

    return write


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names a page by its path."""
    return str(val.relative_to(ROOT)) if isinstance(val, Path) else None
