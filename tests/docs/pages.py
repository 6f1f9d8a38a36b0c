"""The pages of the documentation and their shell commands."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def shell_lines(page: Path) -> list[str]:
    """The commands in a page's shell blocks, without comments, continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in re.sub(r" *\\\n *", " ", block).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def rlmt_arguments(line: str) -> str:
    """The part of a command after `rlmt`, also where srun or torchrun starts it, without a redirection; "" for other
    commands."""
    found = re.match(r"(?:srun )?rlmt (.+)|torchrun .* -m rlmt (.+)", line.partition(" > ")[0])
    return "" if found is None else found[1] or found[2]
