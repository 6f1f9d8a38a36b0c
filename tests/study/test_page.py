"""The page of a study has the runs of its arms, and the tables and sentences of the report as plain text."""

import base64
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlmt.report.estimates import Estimate
from rlmt.study.command import write_study_page
from rlmt.study.findings import Comparison, Findings
from rlmt.study.report import make_sections

FOUND = Findings(
    title="A <study>",
    command="rlmt study --config mine",
    seeds=[1, 2],
    labels={"a": "Arm a", "b": "Arm b"},
    metrics=["my_rubric"],
    comparisons=[Comparison("b", "a")],
    table={"a": {"my_rubric": Estimate((5.0, 6.0))}, "b": {"my_rubric": Estimate((1.0, 2.0))}},
    minutes={"a": Estimate((1.0, 1.0)), "b": Estimate((2.0, 2.0))},
    meanings={"a": "the first arm"},
    next_commands=["rlmt chat x"],
    samples=["", "> a \\*prompt\\*", "", "- Arm a before RL (reward 0.50): [a thought] **an answer**"],
)


def write_run(folder: Path) -> Path:
    (folder / "version_0").mkdir(parents=True)
    lines = ["step,reward/mean,length/response_mean", *(f"{n},{n / 9},{10 + n}" for n in range(12)), ""]
    (folder / "version_0" / "metrics.csv").write_text("\n".join(lines))
    return folder


def payload(page: str) -> Any:
    encoded = re.search(r'id="payload">(.*?)<', page, re.DOTALL)
    assert encoded is not None
    return json.loads(gzip.decompress(base64.b64decode(encoded[1])))


def test_page_has_arms_with_seeds_and_the_contents_of_the_report(tmp_path: Path) -> None:
    trained = {arm: [write_run(tmp_path / arm / str(seed)) for seed in (1, 2)] for arm in "ab"}
    page = write_study_page(FOUND, make_sections(FOUND), trained, ["a", "b"], tmp_path).read_text(encoding="utf-8")
    assert "<title>A &lt;study&gt;</title>" in page and "<study>" not in page
    data = payload(page)
    assert [(run["label"], run["arm"]) for run in data["runs"]] == [
        ("Arm a, seed 1", "Arm a"),
        ("Arm a, seed 2", "Arm a"),
        ("Arm b, seed 1", "Arm b"),
        ("Arm b, seed 2", "Arm b"),
    ]
    titles = [section["title"] for section in data["sections"]]
    assert titles == [
        "Results",
        "Differences",
        "My rubric by seed",
        "Answers to the same prompts",
        "What comes next",
    ]
    results, differences, by_seed, samples, closing = data["sections"]
    assert results["texts"][0] == "2 seeds (1, 2); made by rlmt study --config mine."
    (table,) = results["tables"]
    assert table["columns"] == ["", "my rubric", "minutes"]
    assert [row[0] for row in table["rows"]] == ["Arm a", "Arm b"] and table["rows"][0][1].startswith("5.50 ± ")
    assert differences["texts"][0].endswith(": below 0: the opposite of the expected difference.")
    assert by_seed["tables"][0]["rows"] == [["1", "5.00", "1.00"], ["2", "6.00", "2.00"]]
    assert samples["texts"] == ["a *prompt*", "Arm a before RL (reward 0.50): [a thought] an answer"]
    assert closing["texts"] == ["Arm a: the first arm", "next: rlmt chat x"]


def test_sections_without_contents_are_left_out() -> None:
    one_seed = replace(
        FOUND,
        seeds=[1],
        table={arm: {"my_rubric": Estimate((1.0,))} for arm in "ab"},
        minutes=dict.fromkeys("ab", Estimate((1.0,))),
        comparisons=[],
        samples=(),
        meanings={},
        next_commands=(),
    )
    assert [section.title for section in make_sections(one_seed)] == ["Results"]


def test_study_without_training_runs_has_a_page_of_its_sections(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()  # of `rlmt evaluate`, without metrics.csv
    page = write_study_page(replace(FOUND, seeds=[1]), make_sections(FOUND), {"a": [tmp_path / "a"]}, ["a"], tmp_path)
    data = payload(page.read_text(encoding="utf-8"))
    assert data["runs"] == [] and [section["title"] for section in data["sections"]][0] == "Results"
