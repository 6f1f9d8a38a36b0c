"""`rlmt report`: one HTML page on a run, or on several."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rlmt.errors import UserError
from rlmt.report.page import page_title, write_page
from rlmt.report.results import read_sections
from rlmt.report.runs import read_runs


def run(args: Sequence[str]) -> int:
    """Parses the command line and writes the page.

    Args:
        args: Arguments after `rlmt report`.

    Returns:
        Exit status 0.

    Raises:
        UserError: A run does not exist or has no metrics yet, or the page cannot be written.
    """
    # The standard library's parser: jsonargparse takes seconds to import.
    parser = argparse.ArgumentParser(
        prog="rlmt report",
        description="Writes one self-contained HTML page on a run, or on several next to each other.",
    )
    add_arguments(parser)
    options = parser.parse_args(list(args))
    runs = read_runs(options.runs)
    sections = [section for folder in options.results for section in read_sections(folder)]
    out: Path = options.out or (runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html"))
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; give the path of a file, such as {out / 'report.html'}.")
    try:
        write_page(out, page_title(runs), runs, sections)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); give another path.") from error
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `rlmt report`."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run: its version_N, or the parent for the latest"
    )
    parser.add_argument(
        "--out", type=Path, help="file to write; by default report.html in the run's folder, or here for several runs"
    )
    parser.add_argument(
        "--results",
        type=Path,
        action="append",
        default=[],
        help="--out folder of `rlmt compare` or `rlmt traits`, whose tables and figure are shown; may be repeated",
    )
