"""Report of a study: sentences for every outcome, and the written files."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from rlmt.evaluation.statistics import Interval
from rlmt.report.estimates import Estimate
from rlmt.report.sections import Example, Section, Table
from rlmt.study.command import next_commands
from rlmt.study.figure import draw_study
from rlmt.study.findings import Comparison, Findings, comparison_sentences
from rlmt.study.report import make_sections, print_report, write_report

HIGH, LOW, MIXED = Estimate((5.0, 6.0, 5.5)), Estimate((1.0, 2.0, 1.4)), Estimate((0.0, 9.0, 5.0))


def findings(comparison: Comparison, figure: Path | None = None, **arms: Estimate) -> Findings:
    return Findings(
        title="A <study>",
        command="rlmt study --config mine.yaml",
        seeds=list(range(len(next(iter(arms.values())).values))),
        labels={arm: arm.upper() for arm in arms},
        metrics=["rubric"],
        table={arm: {"rubric": estimate} for arm, estimate in arms.items()},
        minutes=dict.fromkeys(arms, Estimate((1.0, 1.0, 1.0))),
        comparisons=[comparison],
        figure=figure,
    )


@pytest.mark.parametrize(
    ("more", "than", "expect", "verdict"),
    [
        (HIGH, LOW, "above", ": above 0, as expected."),
        (LOW, HIGH, "above", "below 0: the opposite of the expected difference**"),
        (MIXED, LOW, "above", "no difference shown, but one was expected**"),
        (HIGH, LOW, "not_above", "**above 0, but no difference was expected**"),
        (MIXED, LOW, "not_above", "no difference, as expected of a control"),
        (LOW, HIGH, "not_above", "below 0, not above, as expected of a control"),
    ],
)
def test_sentence_states_every_outcome(more: Estimate, than: Estimate, expect: str, verdict: str) -> None:
    (sentence,) = comparison_sentences(findings(Comparison("a", "b", expect=expect), a=more, b=than))  # type: ignore[arg-type]
    assert sentence.startswith("A − B, rubric: ") and verdict in sentence
    assert f"{more.minus(than).mean:+.2f}" in sentence and "by seed" in sentence


def test_one_seed_has_no_interval() -> None:
    (sentence,) = comparison_sentences(findings(Comparison("a", "b"), a=Estimate((2.0,)), b=Estimate((1.5,))))
    assert sentence == "A − B, rubric: +0.50 (one seed: no interval)."


def test_interval_over_prompts_is_stated() -> None:
    comparison = Comparison("a", "b")
    over = {comparison.key: Interval(0.5, 0.125, 0.875)}
    (sentence,) = comparison_sentences(
        replace(findings(comparison, a=Estimate((2.0,)), b=Estimate((1.5,))), over_prompts=over)
    )
    assert sentence == "A − B, rubric: +0.50, 95 % interval over prompts 0.12 to 0.88."
    (sentence,) = comparison_sentences(replace(findings(comparison, a=HIGH, b=LOW), over_prompts=over))
    assert ", 95 % interval over prompts 0.12 to 0.88: above 0, as expected." in sentence


def test_difference_without_a_value_is_not_stated_and_not_counted() -> None:
    """A benchmark that was not run: its difference takes no part in the correction."""
    nan = Estimate((math.nan,) * 3)
    found = replace(findings(Comparison("a", "b"), a=HIGH, b=LOW, c=nan), comparisons=[])
    for pairs in ([("a", "b")], [("a", "c"), ("a", "b"), ("c", "b")]):
        (sentence,) = comparison_sentences(replace(found, comparisons=[Comparison(*pair) for pair in pairs]))
        assert sentence.startswith("A − B") and "corrected" not in sentence


def test_wide_tables_have_metrics_in_rows_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    wide = findings(Comparison("a", "b"), a=HIGH, b=LOW)
    metrics = [f"m_{n}" for n in range(9)]
    found = replace(wide, metrics=metrics, table={a: dict.fromkeys(metrics, HIGH) for a in "ab"})
    (results, *_) = make_sections(found)
    assert results.tables[0].columns[:3] == ["", "m 0", "m 1"]
    print_report(found.title, [results], [])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed if "m 8" in line] == [["m", "8", "5.50", "±", "1.24", "5.50", "±", "1.24"]]


def test_table_of_the_miniature_study_fits_80_columns_without_cutting_a_word(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    metrics = ["rubric", "reward", "other_reward", "thought_tokens", "response_tokens", "malformed"]
    wide = findings(Comparison("a", "b"), a=Estimate((1.5,)), b=Estimate((1.5,)))
    found = replace(wide, metrics=metrics, table={a: dict.fromkeys(metrics, Estimate((1.5,))) for a in "ab"})
    (results, *_) = make_sections(found)
    print_report(found.title, [results], [])
    printed = capsys.readouterr().out
    words = {word for name in [*metrics, "minutes"] for word in name.split("_")}
    assert all(word in printed.split() for word in words) and "…" not in printed


def test_terminal_shows_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    labels = {"a": "A [x]", "b": "B"}
    found = replace(findings(Comparison("a", "b"), a=HIGH, b=LOW), labels=labels, tables={"t[1]": ["a"]})
    print_report("A [study]", make_sections(found), [])
    printed = capsys.readouterr().out
    assert "A [study]: T[1]" in printed and "A [x]" in printed and "A [x] − B, rubric" in printed


def test_comparison_with_an_unreported_arm_is_omitted() -> None:
    assert comparison_sentences(findings(Comparison("a", "elsewhere"), a=HIGH)) == []


def test_report_files_agree(tmp_path: Path) -> None:
    rows = [{"step": float(n), "reward/mean": n / 9, "val/reward_mean": n / 8, "val/rubric": 3.0} for n in range(10)]
    figure = draw_study(tmp_path / "curves.png", "A <study>", {"A": [rows, rows], "B": [rows]})
    assert figure.read_bytes()[:4] == b"\x89PNG"
    text = report_of(findings(Comparison("a", "b"), figure, a=HIGH, b=LOW), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": {"rubric": 5.5}, "b": {"rubric": 4.4 / 3}}
    table = list(csv.reader((tmp_path / "results.csv").open()))
    assert table == [
        ["arm", "seed", "rubric"],
        *([arm, str(n), str(e.values[n])] for arm, e in (("a", HIGH), ("b", LOW)) for n in range(3)),
    ]
    assert "| A | 5.50 ± 1.24 | 1.0 ± 0.0 |" in text and "| 1 | 6.00 | 2.00 |" in text
    assert "3 seeds (0, 1, 2); made by `rlmt study --config mine.yaml`" in text
    assert "![Curves of A <study>](curves.png)" in text


def test_report_ends_with_its_words_and_the_next_command(tmp_path: Path) -> None:
    meanings = {"a": "the first arm", "rubric": "points by rules", "elsewhere": "an arm that is not reported"}
    found = replace(findings(Comparison("a", "b"), a=HIGH, b=LOW), meanings=meanings, next_commands=["rlmt chat x"])
    expected = ["- A: the first arm", "- rubric: points by rules", "- next: `rlmt chat x`"]
    assert make_sections(found)[-1] == Section("What comes next", expected)
    text = report_of(found, tmp_path)
    assert text.endswith("\n\n".join(expected) + "\n") and "elsewhere" not in text
    assert "What comes next" not in report_of(findings(Comparison("a", "b"), a=HIGH, b=LOW), tmp_path)


def test_analyses_are_sections_of_the_report(tmp_path: Path) -> None:
    table, example = (
        Table(["trait", "a"], [["checks | weighs", "3"]]),
        Example("Row 1", [("Prompt", "# Hi"), ("", "b")]),
    )
    traits = Section("Planning traits", ["12 of 24 prompts"], [table], examples=[example])
    found = replace(findings(Comparison("a", "b"), a=HIGH, b=LOW), analyses=[traits])
    expected = "## Planning traits\n\n12 of 24 prompts\n\n| trait | a |\n|---|---|\n| checks \\| weighs | 3 |\n"
    assert expected + "\n### Row 1\n\n**Prompt**\n\n```text\n# Hi\n```\n\n```text\nb\n```\n" in report_of(
        found, tmp_path
    )
    alone = replace(found, table={}, minutes={}, comparisons=[])
    assert [section.title for section in make_sections(alone)] == ["Results", "Planning traits"]


def test_comparisons_are_corrected_for_their_number() -> None:
    """By hand: a − b is 4, 4, 4.1, so t = 121 with 2 degrees of freedom, where p = 1 − t / sqrt(t² + 2) = 0.000068."""
    barely = Estimate((3.0, 5.0, 2.0))
    found = replace(
        findings(Comparison("a", "b"), a=HIGH, b=LOW, c=barely),
        comparisons=[Comparison("a", "b"), Comparison("a", "c"), Comparison("b", "c"), Comparison("a", "b")],
    )
    clear, weak, below, _ = comparison_sentences(found)
    assert "; p 6.8e-05, corrected for 4 comparisons 0.00027): above 0, as expected." in clear
    assert weak.endswith("no difference shown, but one was expected**.") and "corrected for 4 comparisons" in weak
    assert "the interval contains 0" in below

    noise = [Comparison("c", "b")] * 17
    (first, *_) = comparison_sentences(replace(found, comparisons=[Comparison("c", "d"), *noise], table={
        **found.table, "d": {"rubric": Estimate((2.0, 3.6, 1.2))},
    }, labels={**found.labels, "d": "D"}))  # fmt: skip
    assert first.endswith("above 0, as expected **by itself, but not after the correction**.")


def test_unfinished_study_is_reported_as_far_as_it_is(tmp_path: Path) -> None:
    whole = findings(Comparison("a", "b"), a=HIGH, b=Estimate((2.0, 1.4)), c=HIGH)
    table = {arm: row for arm, row in whole.table.items() if arm != "c"}
    found = replace(whole, table=table, done={"b": [1, 2], "c": []})
    (sentence,) = comparison_sentences(found)
    assert "(by seed +4.00, +4.10)" in sentence  # of seeds 1 and 2
    text = report_of(found, tmp_path)
    assert "Not done yet: B (seed 0), C." in text and "| 0 | 5.00 | – |" in text and "| 2 | 5.50 | 1.40 |" in text
    assert "Not done yet" not in report_of(whole_of(found), tmp_path)


def whole_of(found: Findings) -> Findings:
    labels = {arm: found.labels[arm] for arm in ("a",)}
    return replace(found, labels=labels, table={"a": found.table["a"]}, done={}, comparisons=[])


def test_tables_have_their_arms_and_the_values_of_the_paper(tmp_path: Path) -> None:
    found = replace(
        findings(Comparison("a", "b"), a=HIGH, b=LOW, c=MIXED),
        tables={"main_table": ["b", "elsewhere"], "empty": ["elsewhere"]},
        paper={"b": {"rubric": 1.25}},
    )
    assert found.groups() == {"main_table": ["b"], "": ["a", "c"]}
    text = report_of(found, tmp_path)
    assert "### Main table\n\n|  | rubric | minutes |" in text and "| B | 1.47 ± 1.25 (1.25) |" in text
    assert "The paper's values are in brackets." in text and "| A | 5.50 ± 1.24 |" in text
    assert [table.caption for table in make_sections(found)[0].tables] == ["Main table", ""]
    assert "brackets" not in report_of(replace(found, paper={}), tmp_path)


def test_results_have_their_provenance(tmp_path: Path) -> None:
    origin = {"a": [{"commit": f"c{n}", "key": "k"} for n in range(3)], "b": [{"commit": "d", "key": "l"}]}
    found = replace(findings(Comparison("a", "b"), a=HIGH, b=Estimate((1.0,))), done={"b": [2]}, provenance=origin)
    write_report(found, [], tmp_path)
    assert list(csv.reader((tmp_path / "results.csv").open())) == [
        ["arm", "seed", "rubric", "commit", "key"],
        *(["a", str(n), str(HIGH.values[n]), f"c{n}", "k"] for n in range(3)),
        ["b", "2", "1.0", "d", "l"],
    ]


def report_of(found: Findings, out: Path) -> str:
    write_report(found, make_sections(found), out)
    return (out / "report.md").read_text()


def test_next_commands_chat_with_the_compared_policies(tmp_path: Path) -> None:
    folders = {arm: [tmp_path / arm / seed for seed in ("0", "1")] for arm in ("a", "b", "c")}
    for arm in ("a", "c"):  # b has no checkpoint, as a validation
        checkpoint = folders[arm][0] / "latest" / "checkpoints" / "last.ckpt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
    comparisons = [Comparison("a", "b"), Comparison("c", "a")]
    (command,) = next_commands(comparisons, folders, "plan a gift .")
    assert command == f"rlmt chat {tmp_path}/a/0/latest/checkpoints/last.ckpt --prompt 'plan a gift .'"
    assert next_commands([], folders, None) == [] == next_commands(comparisons, {"c": folders["c"]}, None)
