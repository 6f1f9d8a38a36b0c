"""The report says what was found, whichever way it went."""

import csv
import json
from pathlib import Path

import pytest

from rlmt.study.figure import draw_study
from rlmt.study.report import Comparison, Findings, sentences, write_report
from rlmt.study.results import Estimate

HIGH, LOW, MIXED = Estimate((5.0, 6.0, 5.5)), Estimate((1.0, 2.0, 1.4)), Estimate((0.0, 9.0, 5.0))


def findings(comparison: Comparison, picture: Path | None = None, **arms: Estimate) -> Findings:
    return Findings(
        title="A <study>",
        command="rlmt study --config mine.yaml",
        seeds=list(range(len(next(iter(arms.values())).values))),
        labels={arm: arm.upper() for arm in arms},
        metrics=["rubric"],
        table={arm: {"rubric": estimate} for arm, estimate in arms.items()},
        minutes=dict.fromkeys(arms, Estimate((1.0, 1.0, 1.0))),
        comparisons=[comparison],
        picture=picture,
    )


@pytest.mark.parametrize(
    ("more", "than", "expect", "verdict"),
    [
        (HIGH, LOW, "above", ": above 0, as expected."),
        (LOW, HIGH, "above", "the other way round from what was expected**"),
        (MIXED, LOW, "above", "no difference shown where one was expected**"),
        (HIGH, LOW, "not_above", "**above 0, where none was expected**"),
        (MIXED, LOW, "not_above", "no difference, as expected of a control"),
        (LOW, HIGH, "not_above", "and so not above, as expected of a control"),
    ],
)
def test_every_outcome_is_said_plainly(more: Estimate, than: Estimate, expect: str, verdict: str) -> None:
    (said,) = sentences(findings(Comparison("a", "b", expect=expect), a=more, b=than))  # type: ignore[arg-type]
    assert said.startswith("A − B, rubric: ") and verdict in said
    assert f"{more.minus(than).mean:+.2f}" in said and "by seed" in said


def test_one_seed_claims_no_interval() -> None:
    (said,) = sentences(findings(Comparison("a", "b"), a=Estimate((2.0,)), b=Estimate((1.5,))))
    assert said == "A − B, rubric: +0.50 (one seed: no interval)."


def test_questions_about_arms_that_were_left_out_are_left_out() -> None:
    assert sentences(findings(Comparison("a", "elsewhere"), a=HIGH)) == []


def test_files(tmp_path: Path) -> None:
    rows = [{"step": float(n), "reward/mean": n / 9, "val/reward_mean": n / 8, "val/rubric": 3.0} for n in range(10)]
    picture = draw_study(tmp_path / "curves.png", "A <study>", {"A": [rows, rows], "B": [rows]})
    assert picture.read_bytes()[:4] == b"\x89PNG"
    write_report(findings(Comparison("a", "b"), picture, a=HIGH, b=LOW), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": {"rubric": 5.5}, "b": {"rubric": 4.4 / 3}}
    table = list(csv.reader((tmp_path / "results.csv").open()))
    assert table == [
        ["arm", "seed", "rubric"],
        *([arm, str(n), str(e.values[n])] for arm, e in (("a", HIGH), ("b", LOW)) for n in range(3)),
    ]
    text = (tmp_path / "report.md").read_text()
    assert "| A | 5.50 ± 1.24 | 1.0 ± 0.0 |" in text and "| 1 | 6.00 | 2.00 |" in text
    page = (tmp_path / "report.html").read_text()
    assert "<td>5.50 ± 1.24</td>" in page and 'src="data:image/png;base64,' in page
    assert "<title>A &lt;study&gt;</title>" in page and "<study>" not in page
