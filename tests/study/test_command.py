"""`rlmt study` through the command line: two real runs, their report, and no job run twice."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlmt.cli.commands import main


def study_arguments(path: Path, out: Path, tiny: Path, **changes: Any) -> list[str]:
    run = (
        f"fit --config base --config grpo --config tiny --config $format --seed_everything $seed "
        f"--model.policy {tiny}/policy --model.reward.model {tiny}/reward --data.prompts {tiny}/prompts.jsonl "
        "--data.engine TransformersEngine --data.batch_size 4 --data.group_size 4 "
        "--data.max_prompt_tokens 512 --data.max_new_tokens 64 "
        "--data.val_size 4 --trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.accelerator cpu"
    )
    study = {
        "title": "Two runs",
        "stages": {"rl": {"run": run, "each": {"format": ["think", "no_think"]}}},
        "arms": {
            "rlmt": {"stage": "rl", "label": "RLMT", "where": {"format": "think"}},
            "rlhf": {"stage": "rl", "label": "RLHF", "where": {"format": "no_think"}},
        },
        "metrics": {"reward": "val/reward_mean", "thought_tokens": "val/thought_tokens", "malformed": "val/malformed"},
        "comparisons": [{"more": "rlmt", "than": "rlhf"}],
        "picture": ["rlmt", "rlhf"],
        "out": str(out),
        "jobs": 2,
    }
    path.write_text(json.dumps(study | changes))
    return ["study", "--config", str(path)]


@pytest.mark.slow
def test_two_runs_are_reported_and_not_repeated(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    args = study_arguments(tmp_path / "study.yaml", out, tiny)
    assert main(args) == 0
    output = capsys.readouterr().out
    assert "RLMT − RLHF, reward: " in output and "(one seed: no interval)" in output
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {"rlmt", "rlhf"} and set(summary["rlmt"]) == {"reward", "thought_tokens", "malformed"}
    assert summary["rlhf"]["thought_tokens"] == 0 < summary["rlmt"]["thought_tokens"]
    report = (out / "report.md").read_text()
    assert f"rlmt study --config {tmp_path}/study.yaml" in report and "| RLHF | " in report
    log = (out / "seed-0/rl-think/log.txt").read_text()
    assert "2/" in log and "[rank" not in log

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.csv") if "version" in str(path)}
    (out / "report.md").unlink()
    assert main([*args, "--only", "[rlhf]"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 2
    assert list(json.loads((out / "summary.json").read_text())) == ["rlhf"]


@pytest.mark.parametrize(
    ("args", "changes", "message"),
    [
        (["--only", "[nobody]"], {}, "--only: unknown arm 'nobody'; choose from rlmt, rlhf."),
        (["--seeds", "[1,1]"], {}, "--seeds [1, 1]: a seed occurs twice; pass each seed once."),
        (["--jobs", "0"], {}, "--jobs is 0: must be an integer above 0."),
        ([], {"comparisons": [{"more": "rlmt", "than": "x"}]}, "--comparisons: unknown arm 'x'"),
        ([], {"comparisons": [{"more": "rlmt", "than": "rlhf", "by": "x"}]}, "--comparisons: unknown metric 'x'"),
        ([], {"meanings": {"x": "?"}}, "--meanings: unknown arm or metric 'x'"),
        ([], {"picture": ["x"]}, "--picture: unknown arm 'x'"),
        ([], {"metrics": {}}, "--metrics: no entries; define at least one."),
        ([], {"arms": {}}, "--arms: no entries; define at least one."),
        (["--config", "nowhere"], {}, "--config nowhere: no such file"),
    ],
)
def test_configuration_errors_are_reported_in_one_line(
    args: list[str], changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*study_arguments(tmp_path / "study.yaml", tmp_path / "out", tmp_path, **changes), *args]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
