"""`rlmt study` through the command line: two real runs, their report, and no job run twice."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlmt.cli.commands import main


def study_arguments(path: Path, out: Path, tiny: Path, reward: str = "", **changes: Any) -> list[str]:
    reward = reward or f"--model.reward.model {tiny}/reward"
    run = (
        f"fit --config base --config grpo --config tiny --config $format --seed_everything $seed "
        f"--model.policy {tiny}/policy --data.prompts {tiny}/prompts.jsonl {reward} "
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
def test_two_runs_are_reported_and_not_repeated(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reward is a function in a file of the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text("def brief(prompt, response):\n    return -float(len(response))\n")
    out = tmp_path / "out"
    reward = "--model.reward CallableReward --model.reward.function my_rewards.brief"
    args = study_arguments(tmp_path / "study.yaml", out, tiny, reward)
    assert main(args) == 0
    output = capsys.readouterr().out
    assert "RLMT − RLHF, reward: " in output and "(one seed: no interval)" in output
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {"rlmt", "rlhf"} and set(summary["rlmt"]) == {"reward", "thought_tokens", "malformed"}
    assert summary["rlhf"]["thought_tokens"] == 0 < summary["rlmt"]["thought_tokens"]
    report = (out / "report.md").read_text()
    assert f"rlmt study --config {tmp_path}/study.yaml" in report and "| RLHF | " in report
    log = (out / "seed-0/rl-think/log.txt").read_text()
    assert "\nstep 2 of 2 · " in log and "[rank" not in log

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.csv") if "version" in str(path)}
    (out / "report.md").unlink()
    assert main([*args, "--only", "[rlhf]"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 2
    assert list(json.loads((out / "summary.json").read_text())) == ["rlhf"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_study_that_was_killed_twice_equals_an_uninterrupted_one(tmp_path: Path, tiny: Path) -> None:
    """It is killed when a run has a checkpoint, and again when the run has resumed; a job that was done is kept."""
    changes = {"arms": {"rlmt": {"stage": "rl", "label": "RLMT", "where": {"format": "think"}}}}
    changes |= {"comparisons": [], "picture": [], "jobs": 1}  # type: ignore[dict-item]
    every_step = tmp_path / "every_step.yaml"
    checkpoint = {"class_path": "rlmt.callbacks.PolicyCheckpoint", "init_args": {"every_n_steps": 1}}
    every_step.write_text(json.dumps({"trainer": {"callbacks": [checkpoint]}}))
    results = []
    points = [
        lambda job: (job / "version_0/checkpoints/last.ckpt").exists(),
        lambda job: "Restored all states" in (job / "log.txt").read_text(),
    ]
    for name, kills in (("whole", []), ("killed", points)):
        out = tmp_path / name
        args = study_arguments(tmp_path / f"{name}.json", out, tiny, **changes)
        study = json.loads((tmp_path / f"{name}.json").read_text())
        study["stages"]["first"] = {"run": "--version"}
        study["stages"]["rl"] |= {"needs": {"first": "first"}}
        command = study["stages"]["rl"]["run"].replace(
            " --seed_everything", f" --config {every_step} --seed_everything"
        )
        study["stages"]["rl"]["run"] = f"{command} --trainer.max_steps 8"
        (tmp_path / f"{name}.json").write_text(json.dumps(study))
        for reached in kills:
            with subprocess.Popen([sys.executable, "-m", "rlmt", *args]) as process:
                deadline = time.monotonic() + 500
                while not reached(out / "seed-0/rl-think") and time.monotonic() < deadline:
                    assert process.poll() is None
                    time.sleep(0.05)
                process.kill()
        assert main(args) == 0
        rows = (out / "results.csv").read_text().splitlines()
        results.append([row.split(",")[:5] for row in rows])
        starts = {log.parent.name: log.read_text().count("$ rlmt ") for log in out.rglob("log.txt")}
        assert starts == {"first": 1, "rl-think": 1 + len(kills)}
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_study_of_the_paper_runs_on_tiny_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From demonstrations to benchmarks and traits, with a teacher and a judge that answer by rule; 16 of its jobs."""
    only = "[grpo, rlmt_zero, rlmt_dpo, traits]"
    args = ["study", "--config", "study/paper", "--scale", "tiny", "--only", only, "--out", str(tmp_path)]
    assert main([*args, "--jobs", "2"]) == 0
    output = capsys.readouterr().out
    assert "RLMT − RLHF, chat: " in output and "95 % interval over prompts" in output
    report = (tmp_path / "tiny/report.md").read_text()
    assert "### Grpo" in report and "(35.4)" in report and "(32.1)" in report
    assert "## Planning traits of RLMT and SFT" in report and "](curves.png)" in report
    summary = json.loads((tmp_path / "tiny/summary.json").read_text())
    assert list(summary) == ["rlhf", "rlmt", "rlmt_zero", "rlmt_dpo"]
    assert all(value is not None for row in summary.values() for value in row.values())
    assert summary["rlmt"]["thought_tokens"] > 0 == summary["rlhf"]["thought_tokens"]
    starts = [log.read_text().count("$ rlmt ") for log in (tmp_path / "tiny").rglob("log.txt")]
    assert starts == [1] * 16


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
        (
            ["--executor", "slurm"],
            {},
            "--executor slurm: this machine has no sbatch; start the study on a login node",
        ),
        ([], {"tables": {"all": ["x"]}}, "--tables: unknown arm 'x'"),
        ([], {"tables": {"rlmt": ["rlmt"]}}, "--tables: 'rlmt' is also an arm; rename the table."),
        (["--scale", "8b"], {}, "--scale 8b: no such scale; the study has none, so leave the option out."),
        ([], {"scales": {"8b": {}}}, "--scale None: no such scale; choose from 8b."),
        (["--report_only"], {}, "/out: no arm is done yet; run the study without --report_only."),
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


def test_dry_run_of_a_scale_prints_jobs_and_what_they_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seeds of a table with two arms: 4 jobs of 8 GPUs for 15 minutes; the third arm is not in the table."""
    monkeypatch.chdir(tmp_path)
    stage = {"run": "$program --version", "each": {"x": ["p", "q", "r"]}}
    changes = {
        "stages": {"rl": stage | {"resources": {"gpu": 8, "runtime": 15, "disk_mb": 500, "dollars": 2}}},
        "arms": {x: {"stage": "rl", "label": x, "where": {"x": x}} for x in ("p", "q", "r")},
        "scales": {"small": {"program": "mini"}, "large": {"program": "tiny"}},
        "tables": {"main": ["p", "q"], "other": ["r"]},
        "comparisons": [], "picture": [], "seeds": [1, 2],
    }  # fmt: skip
    args = study_arguments(tmp_path / "study.json", Path("out"), tmp_path, **changes)
    assert main([*args, "--scale", "large", "--only", "[main]", "--dry_run"]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "4 jobs would run: 8 GPU hours at most, 2 GB on disk, 8 dollars for teachers and judges.",
        *(f"rl {x} seed {seed}: not done yet" for x in ("p", "q") for seed in (1, 2)),
    ]
    assert not (tmp_path / "out").exists()
