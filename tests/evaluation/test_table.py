"""The table of results: values, averages and differences against numbers computed here; nothing is mixed."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlmt.cli.commands import main
from rlmt.errors import UserError
from rlmt.evaluation.rendering import to_html, to_latex, to_markdown
from rlmt.evaluation.results import read_results
from rlmt.evaluation.table import Table, build_tables

TITLES = {"wildbench": "WildBench", "alpaca_eval": "AlpacaEval 2", "ifbench": "IFBench", "own": "My_own & 100 %"}
N = 100_000  # so many groups need no correction for small samples: the interval is the plain 2.5 % and 97.5 % quantiles


def samples_of(benchmark: str, model: str) -> np.ndarray[Any, Any]:
    seed = 10 * list(TITLES).index(benchmark)
    shared = np.random.default_rng(seed).normal(0, 3, 1000)  # the prompts' difficulty
    return np.round(40 + seed / 10 + 5 * (model == "RLMT") + shared, 3)


def write(out: Path, benchmark: str, model: str, scoring: str = "ours", **changes: Any) -> None:
    folder = out / benchmark / model
    folder.mkdir(parents=True, exist_ok=True)
    samples = samples_of(benchmark, model)
    pq.write_table(pa.table({"score": samples}), folder / f"{scoring}.resamples.parquet")
    low, high = np.quantile(samples, [0.025, 0.975])
    result = {
        "benchmark": benchmark,
        "title": TITLES[benchmark],
        "model": model,
        "format": "think" if model == "RLMT" else "no_think",
        "scoring": scoring,
        "figures": {"score": {"value": float(samples.mean()), "low": low, "high": high}},
        "chat": benchmark in ("wildbench", "alpaca_eval"),
        "n": N,
        "malformed": 12,
        "unparsed": 3,
        "finish": {"stop": N - 7, "length": 7},
        "thought_tokens": 100.4 if model == "RLMT" else 0.0,
        "response_tokens": None,
        "judge": "judge" if benchmark != "ifbench" else None,
        "judge_versions": ["judge-2026"] if benchmark != "ifbench" else [],
        "baseline": "gpt-4" if benchmark == "wildbench" else None,
        "items": "same",
    }
    (folder / f"{scoring}.json").write_text(json.dumps(result | changes))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for benchmark in TITLES:
        for model in ("RLHF", "RLMT"):
            if (benchmark, model) != ("own", "RLHF"):
                write(tmp_path, benchmark, model)
    return tmp_path


def quantiles(samples: np.ndarray[Any, Any], sign: str = "") -> str:
    low, high = np.quantile(samples, [0.025, 0.975])
    return f"{samples.mean():{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def test_table_has_paper_order_averages_and_paired_difference(out: Path) -> None:
    figures, counts = build_tables(out, read_results(out, "ours"), None)
    assert figures.columns == [
        "model",
        "WildBench",
        "AlpacaEval 2",
        "IFBench",
        TITLES["own"],
        "Chat average",
        "Average",
    ]
    rows = {row[0]: row[1:] for row in figures.rows}
    assert list(rows) == ["RLHF", "RLMT", "RLMT − RLHF"]
    names = list(TITLES)
    for model in ("RLHF", "RLMT"):
        samples = [samples_of(name, model) for name in names]
        expected = [quantiles(each) for each in samples]
        expected[3] = expected[3] if model == "RLMT" else "–"
        chat, every = np.mean(samples[:2], axis=0), np.mean(samples[:3], axis=0)
        assert rows[model] == [*expected, quantiles(chat), quantiles(every)]
    difference = rows["RLMT − RLHF"]
    assert difference[:4] == ["+5.0 [+5.0, +5.0]"] * 3 + ["–"]  # the difficulty cancels: both saw the same prompts
    assert difference[4:] == ["+5.0 [+5.0, +5.0]"] * 2
    cells = dict(zip(counts.columns, counts.rows[1], strict=True))
    assert (cells["model"], cells["n"], cells["malformed"], cells["truncated"]) == ("RLMT", f"{N:,}", "12", "7")
    assert (cells["judge"], cells["baseline"]) == ("judge (judge-2026)", "gpt-4")
    assert (cells["thought"], cells["response"]) == ("100", "–")


def test_interval_of_a_difference_is_for_the_number_of_groups(tmp_path: Path) -> None:
    """Three rows a prompt: the difference's interval is as wide as that of as many rows as there are prompts."""
    widths = []
    cases: list[dict[str, Any]] = [{"n": 12, "groups": 4}, {"n": 4}, {"n": 12}]
    for number, counts in enumerate(cases):
        out = tmp_path / str(number)
        for model, factor in (("RLHF", 1), ("RLMT", 2)):
            write(out, "wildbench", model, **counts)
            column = pa.table({"score": factor * samples_of("wildbench", model)})
            pq.write_table(column, out / "wildbench" / model / "ours.resamples.parquet")
        figures, _ = build_tables(out, read_results(out, "ours"), None)
        widths.append(figures.rows[-1][1])
    assert widths[0] == widths[1] != widths[2]


def test_terminal_shows_brackets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = {"value": 40.0, "low": None, "high": None}
    write(tmp_path, "wildbench", "RLMT", title="Wild [x]", figures={"score": score})
    assert main(["evaluate", "--table", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Wild [x]" in printed and "40.0 [nan, nan]" in printed


def test_difference_is_of_the_named_models(out: Path) -> None:
    figures, _ = build_tables(out, read_results(out, "ours"), ["RLHF", "RLMT"])
    assert figures.rows[-1][0] == "RLHF − RLMT" and figures.rows[-1][1].startswith("-5.0")
    with pytest.raises(UserError, match="'nobody', which has no results; give two of RLHF, RLMT"):
        build_tables(out, read_results(out, "ours"), ["RLHF", "nobody"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": "other"}, "was scored with another judge than RLHF"),
        ({"baseline": "other"}, "another baseline"),
        ({"items": "fewer"}, "other items"),
    ],
)
def test_column_never_mixes_what_cannot_be_compared(out: Path, changes: dict[str, Any], message: str) -> None:
    write(out, "wildbench", "RLMT", **changes)
    with pytest.raises(UserError, match=message):
        build_tables(out, read_results(out, "ours"), None)


def test_column_never_mixes_ours_and_authors(out: Path) -> None:
    (out / "wildbench" / "RLMT" / "ours.json").unlink()
    write(out, "wildbench", "RLMT", scoring="authors")
    with pytest.raises(UserError, match="is scored as authors only, and other models as ours"):
        read_results(out, "ours")
    with pytest.raises(UserError, match="is scored as ours only, and other models as authors"):
        read_results(out, "authors")


def test_command_writes_markdown_latex_and_html(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--table", "--out", str(out)]) == 0
    assert "WildBench" in capsys.readouterr().out
    markdown = (out / "table.ours.md").read_text()
    assert "| RLMT − RLHF | +5.0 [+5.0, +5.0] |" in markdown
    assert main(["evaluate", "RLMT", "--table", "--benchmarks", "[ifbench]", "--out", str(out)]) == 0
    assert "RLHF" not in (out / "table.ours.md").read_text()
    assert main(["evaluate", "nobody", "--table", "--out", str(out)]) == 2
    assert "MODEL nobody: has no results" in capsys.readouterr().err


TABLE = Table("A & B", ["model", "100 % _x_"], [["a|b <script>", "−1.0 [–]"], ["c\\d", "$2 ~ ^"]])


def test_markdown_and_latex_escape_text() -> None:
    assert to_markdown([TABLE]).splitlines() == [
        "**A & B**",
        "",
        "| model | 100 % _x_ |",
        "| --- | ---: |",
        "| a\\|b <script> | −1.0 [–] |",
        "| c\\d | $2 ~ ^ |",
    ]
    latex = to_latex([TABLE])
    assert (
        r"model & 100 \% \_x\_ \\" in latex
        and r"c\textbackslash{}d & \$2 \textasciitilde{} \textasciicircum{} \\" in latex
    )
    assert re.search(r"a\|b <script> & \$-\$1\.0 \[--\]", latex) and latex.count(r"\begin{tabular}{lr}") == 1


def test_html_has_the_cells_and_no_markup_of_the_text() -> None:
    class Cells(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags, self.cells = list[str](), list[str]()

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.tags.append(tag)

        def handle_data(self, data: str) -> None:
            if self.tags and self.tags[-1] in ("td", "th") and data.strip():
                self.cells.append(data)

    parser = Cells()
    parser.feed(to_html([TABLE]))
    assert "script" not in parser.tags
    assert parser.cells == ["model", "100 % _x_", "a|b <script>", "−1.0 [–]", "c\\d", "$2 ~ ^"]
