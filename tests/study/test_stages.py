"""Stages: placeholders, needs, patterns for Snakemake, digests and error messages."""

import shlex
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from rlmt.errors import UserError
from rlmt.study.jobs import print_totals
from rlmt.study.stages import Arm, Plan, Stage, digest_configs, target_files

STAGES = {
    "world": Stage(run="mini $dir --seed $seed"),
    "warm": Stage(
        run="fit --config sft --config $format", each={"format": ["think", "no_think"]}, needs={"world": "world"}
    ),
    "reward_model": Stage(
        run="fit --config reward --model.model $start/model --data.path $pairs",
        each={"pairs": ["strong", "weak"]},
        needs={"start": "warm-think"},
    ),
    "rl": Stage(
        run="$train --model.policy $start/model --model.reward.model $scorer/model --data.prompts '$world/a b.jsonl'",
        each={"format": ["think", "no_think"]},
        needs={"world": "world", "start": "warm-$format", "scorer": "reward_model-strong"},
        resources={"gpu": 8},
    ),
}
TEXTS = {"train": "fit --config base $more", "more": "--config grpo --config $format"}


def test_command_equals_manual_expansion() -> None:
    command = Plan(STAGES, TEXTS).command("rl", {"seed": "4", "format": "no_think"})
    assert command.replace("'", "") == (
        "fit --config base --config grpo --config no_think --model.policy $study/seed-4/warm-no_think/model "
        "--model.reward.model $study/seed-4/reward_model-strong/model --data.prompts $study/seed-4/world/a b.jsonl "
        "--trainer.default_root_dir $study/seed-4/rl-no_think --ckpt_path last"
    )
    assert shlex.split(command)[-5] == "$study/seed-4/world/a b.jsonl"  # one word


def test_needs_and_folders_become_patterns_of_snakemake() -> None:
    plan = Plan(STAGES, TEXTS)
    assert plan.inputs("rl") == {
        "world": "seed-{seed}/world/done",
        "start": "seed-{seed}/warm-{format}/done",
        "scorer": "seed-{seed}/reward_model-strong/done",
    }
    assert plan.output("rl") == "seed-{seed}/rl-{format}/done" and plan.output("world") == "seed-{seed}/world/done"
    arms = [Arm("rl", "RLMT", {"format": "think"}), Arm("world", "World")]
    assert target_files(plan, arms, [1, 2]) == [
        *("seed-1/rl-think/done", "seed-1/world/done", "seed-2/rl-think/done", "seed-2/world/done")
    ]


def test_training_run_of_an_arm_is_that_of_the_job_it_scores() -> None:
    scores = Stage(
        run="evaluate $run/last.ckpt", each={"format": ["think", "no_think"]}, needs={"w": "world", "run": "rl-$format"}
    )
    plan = Plan({**STAGES, "scores": scores, "initial": Stage(run="validate $w", needs={"w": "world"})}, TEXTS)
    assert plan.program("scores") == "evaluate"
    for arm, folder in (
        (Arm("scores", "RLMT", {"format": "think"}), "seed-3/rl-think"),
        (Arm("rl", "RLHF", {"format": "no_think"}), "seed-3/rl-no_think"),
        (Arm("initial", "Base"), "seed-3/initial"),
    ):
        assert plan.training_folder(arm, 3) == Path(folder)


def test_digest_covers_the_configs_that_a_command_names(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("a: 1")
    commands = ("fit --config mine.yaml --config base", "fit -c mine.yaml -c base", "fit --config=mine.yaml -c=base")
    first = {digest_configs(command, tmp_path) for command in commands}
    assert len(first) == 1 and digest_configs("fit --config base", tmp_path) not in first
    config.write_text("a: 2")
    assert digest_configs(commands[0], tmp_path) not in first
    with pytest.raises(UserError, match="--config nowhere: no such file and no shipped config"):
        Plan({"a": Stage(run="fit --config $x", each={"x": ["base", "nowhere"]})}, {}).check_configs(tmp_path)


@pytest.mark.parametrize(
    ("changes", "texts", "message"),
    [
        (
            {"a": Stage(run="mini $nothing")},
            {},
            r"stages.a.run: unknown placeholder \$nothing; use \$seed, \$dir, an axis",
        ),
        ({"a": Stage(run="mini $")}, {}, "stages.a.run: Invalid placeholder"),
        ({"a": Stage(run=" ")}, {}, "stages.a.run: the command is empty"),
        ({"A": Stage(run="x")}, {}, "stage 'A': invalid name; use lower-case letters"),
        ({"a": Stage(run="x", each={"seed": ["1"]})}, {}, "axis 'seed': invalid name; use lower-case"),
        ({"a": Stage(run="x", each={"b": ["c"]})}, {"b": "y"}, "'b': two of axes, needs and texts have this name"),
        ({"a": Stage(run="x", needs={"b": "world"})}, {"b": "y"}, "'b': two of axes, needs and texts have this name"),
        ({"a": Stage(run="x", each={"b": ["../up"]})}, {}, "invalid value '../up'"),
        ({"a": Stage(run="$t")}, {"t": "$u", "u": "$t"}, "its texts contain each other"),
        (
            {"a": Stage(run="x", needs={"b": "nowhere"})},
            {},
            "stages.a.needs.b: unknown stage 'nowhere'; choose from world",
        ),
        (
            {"a": Stage(run="x", needs={"b": "warm"})},
            {},
            r"stages.a.needs.b: 'warm' has 0 values, not 1; write 'warm-\$format'.",
        ),
        (
            {"a": Stage(run="x", needs={"b": "warm-odd"})},
            {},
            "stages.a.needs.b: 'odd' is no value of the axis format of warm; choose from think, no_think",
        ),
        (
            {"a": Stage(run="x", each={"pairs": ["strong"]}, needs={"b": "warm-$pairs"})},
            {},
            r"stages.a.needs.b: '\$pairs' is no value of the axis format of warm",
        ),
    ],
)
def test_invalid_stages_raise(changes: dict[str, Stage], texts: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Plan({**STAGES, **changes}, TEXTS | texts)


def test_invalid_arms_raise() -> None:
    plan = Plan(STAGES, TEXTS)
    with pytest.raises(UserError, match="arm 'A': unknown stage 'nothing'"):
        plan.folder(Arm(stage="nothing", label="A"), 1)
    for where in ({}, {"format": "loud"}, {"format": "think", "extra": "x"}):
        with pytest.raises(UserError, match="`where` must have exactly one value for each axis of rl"):
            plan.folder(Arm(stage="rl", label="A", where=where), 1)


def shipped_study() -> tuple[Plan, dict[str, Arm]]:
    shipped = yaml.safe_load((Path(__file__).parents[2] / "configs/study/mini.yaml").read_text())
    plan = Plan({name: Stage(**stage) for name, stage in shipped["stages"].items()}, shipped["texts"])
    assert len(shipped["seeds"]) == 6
    return plan, {name: Arm(**arm) for name, arm in shipped["arms"].items()}


def test_shipped_study_uses_every_stage() -> None:
    plan, arms = shipped_study()
    used = {arm.stage for arm in arms.values()}
    for stage in reversed(plan.stages):
        used |= {job.split("-")[0] for job in plan.stages[stage].needs.values()} if stage in used else set()
    assert used == set(plan.stages)
    plan.check_configs(Path.cwd())
    tables = yaml.safe_load((Path(__file__).parents[2] / "configs/study/mini.yaml").read_text())["tables"]
    assert sorted(arms) == sorted(arm for members in tables.values() for arm in members)


@pytest.mark.parametrize("scale", ["8b", "tiny"])
def test_study_of_the_paper_has_a_twin_of_every_arm(scale: str) -> None:
    """The same jobs at each scale; the commands of RLMT and RLHF differ in the format alone."""
    shipped = yaml.safe_load((Path(__file__).parents[2] / "configs/study/paper.yaml").read_text())
    stages = {name: Stage(**stage) for name, stage in shipped["stages"].items()}
    plan = Plan(stages, shipped["texts"] | shipped["scales"][scale])
    plan.check_configs(Path.cwd())
    assert len(list(plan.jobs(1))) == 52
    arms = {name: Arm(**arm) for name, arm in shipped["arms"].items()}
    assert sorted(arms) == sorted(arm for members in shipped["tables"].values() for arm in members)
    assert set(shipped["scales"]["8b"]) == set(shipped["scales"]["tiny"])
    assert {name for arm in arms.values() for name in arm.paper} <= set(shipped["metrics"])
    for name in arms:
        if name.startswith("rlmt"):
            twins = [arms[name], arms[name.replace("rlmt", "rlhf")]]
            think, no_think = (plan.command(arm.stage, {"seed": "1", **arm.where}) for arm in twins)
            assert think != no_think and no_think.replace("no_think", "think") == think


def test_totals_of_the_paper_are_those_of_its_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    """Every job is one that some arm needs, so that a dry run lists all of them."""
    root = Path(__file__).parents[2]
    shipped = yaml.safe_load((root / "configs/study/paper.yaml").read_text())
    plan = Plan(
        {name: Stage(**it) for name, it in shipped["stages"].items()}, shipped["texts"] | shipped["scales"]["8b"]
    )
    folders = {str(Path(plan.output(stage).format(**values)).parent) for stage, values in plan.jobs(1)}
    needed = {str(plan.folder(Arm(**arm), 1)) for arm in shipped["arms"].values()}
    for stage, values in reversed(list(plan.jobs(1))):
        if str(Path(plan.output(stage).format(**values)).parent) in needed:
            needed |= {str(Path(path.format(**values)).parent) for path in plan.inputs(stage).values()}
    assert needed == folders
    print_totals([plan.stages[stage] for stage, _ in plan.jobs(1)], Console(width=200, highlight=False))
    printed = capsys.readouterr().out.strip()
    assert printed.startswith("52 jobs would run: ") and printed in (root / "docs/paper.md").read_text()


def test_arms_of_the_shipped_study_differ_only_in_the_format() -> None:
    """Think and no-think arms differ only in the format and in the policy that was warm-started with it."""
    plan, arms = shipped_study()
    alone = {"rlmt_shuffled", "rlmt_deep_longer"}
    pairs = [(name, name.replace("rlmt", "rlhf")) for name in arms if name.startswith("rlmt") and name not in alone]
    assert len(pairs) == 12
    for one, other in pairs:
        think, no_think = (plan.command(arms[name].stage, {"seed": "1", **arms[name].where}) for name in (one, other))
        assert think != no_think and no_think.replace("no_think", "think") == think


def test_commands_of_the_shipped_study_equal_the_recorded_ones() -> None:
    """The quickstart's jobs run what they ran before Snakemake: its runner wrote the file, in other folders for SFT."""
    plan, arms = shipped_study()
    recorded = (Path(__file__).parent / "quickstart_commands.txt").read_text(encoding="utf-8").splitlines()
    jobs = {plan.folder(arms[name], 1) for name in ("sft_think", "sft_no_think", "rlhf", "rlmt")}
    commands = []
    for stage, values in reversed(list(plan.jobs(1))):
        if Path(plan.output(stage).format(**values)).parent in jobs:
            jobs |= {Path(path.format(**values)).parent for path in plan.inputs(stage).values()}
            commands.append(plan.command(stage, values))
    assert commands[::-1] == recorded and len(recorded) == 13
