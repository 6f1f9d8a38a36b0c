"""Expansion of stages into jobs: placeholders, order, digests and error messages."""

from pathlib import Path

import pytest
import yaml

from rlmt.errors import UserError
from rlmt.study.stages import Arm, Plan, Stage, job_digests

OUT = Path("runs/s")
STAGES = {
    "rl": Stage(
        run=[
            "$train --model.policy $warm/model --model.reward.model ${reward_model.strong}/model "
            "--data.prompts '$world/a b.jsonl'"
        ],
        each={"format": ["think", "no_think"]},
    ),
    "warm": Stage(
        run=["fit --config sft --config $format", "export $dir/x $dir/model"], each={"format": ["think", "no_think"]}
    ),
    "reward_model": Stage(
        run=["fit --config reward --model.model ${warm.think}/model --data.path $pairs"],
        each={"pairs": ["strong", "weak"]},
    ),
    "world": Stage(run=["mini $dir --seed $seed"]),
}
TEXTS = {"train": "fit --config base $more", "more": "--config grpo --config $format"}


def test_jobs_equal_manual_expansion() -> None:
    plan = Plan(STAGES, [3, 4], OUT, TEXTS)
    assert len(plan.jobs) == 2 * (2 + 2 + 2 + 1)
    (job,) = [job for job in plan.jobs if job.folder == OUT / "seed-4/rl-no_think"]
    assert job.name == "rl no_think seed 4"
    assert [" ".join(command) for command in job.commands] == [
        "fit --config base --config grpo --config no_think --model.policy runs/s/seed-4/warm-no_think/model "
        "--model.reward.model runs/s/seed-4/reward_model-strong/model --data.prompts runs/s/seed-4/world/a b.jsonl "
        "--trainer.default_root_dir runs/s/seed-4/rl-no_think --ckpt_path last"
    ]
    assert {need.name for need in job.needs} == {"warm-no_think", "reward_model-strong", "world"}
    assert job.commands[0][-5] == "runs/s/seed-4/world/a b.jsonl"  # one word


def test_jobs_come_after_their_dependencies() -> None:
    seen: set[Path] = set()
    for job in Plan(STAGES, [0], OUT, TEXTS).jobs:
        assert set(job.needs) <= seen
        seen.add(job.folder)


def test_arms_select_their_jobs_and_dependencies() -> None:
    plan = Plan(STAGES, [0], OUT, TEXTS)
    arm = Arm(stage="warm", label="SFT", where={"format": "no_think"})
    assert [job.folder.name for job in plan.jobs_for([arm])] == ["warm-no_think"]
    arm = Arm(stage="rl", label="RLHF", where={"format": "no_think"})
    assert {job.folder.name for job in plan.jobs_for([arm])} == {
        *("warm-no_think", "warm-think", "reward_model-strong", "world", "rl-no_think")
    }


def test_digests_cover_commands_configs_and_dependencies(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("a: 1")

    def digests(line: str, out: Path = OUT) -> list[str]:
        stages = {"one": Stage(run=[line]), "two": Stage(run=["export $one $dir/y"])}
        return list(job_digests(Plan(stages, [0], out, {}).jobs, out).values())

    first = digests(f"fit --config {config}")
    assert digests(f"fit --config {config}") == first and len(set(first)) == 2
    assert digests(f"fit --config {config}", out=tmp_path / "moved") == first
    # The second digest changes too, because its job depends on the first.
    assert set(digests(f"fit --config {config} --seed_everything 1")).isdisjoint(first)
    config.write_text("a: 2")
    assert not set(digests(f"fit --config {config}")) & set(first)


@pytest.mark.parametrize(
    ("stages", "texts", "message"),
    [
        ({"a": Stage(run=["mini $nothing"])}, {}, r"stages.a.run: unknown placeholder \$nothing; use a stage, an axis"),
        ({"a": Stage(run=[])}, {}, "stages.a.run: the list is empty"),
        ({"a": Stage(run=["x $b"]), "b": Stage(run=["x $a"])}, {}, "the stage [ab] depends on itself"),
        ({"A": Stage(run=["x"])}, {}, "stage 'A': invalid name; use lower-case letters"),
        ({"a": Stage(run=["x"], each={"seed": ["1"]})}, {}, "axis 'seed': invalid name; use lower-case"),
        ({"a": Stage(run=["x"])}, {"a": "y"}, "'a': two of stages, axes and texts have this name"),
        ({"a": Stage(run=["x"], each={"b": ["../up"]})}, {}, "invalid value '../up'"),
        ({"a": Stage(run=["$t"])}, {"t": "$u", "u": "$t"}, "its texts contain each other"),
        (
            STAGES | {"late": Stage(run=["x $reward_model"])},
            TEXTS,
            r"does not select a value of the axis pairs \(strong, weak\)",
        ),
        (
            STAGES | {"late": Stage(run=["x ${reward_model.odd}"])},
            TEXTS,
            r"\$reward_model.odd does not select a value",
        ),
        (STAGES | {"late": Stage(run=["x ${world.odd}"])}, TEXTS, "the stage world has no value 'odd'"),
    ],
)
def test_invalid_stages_raise(stages: dict[str, Stage], texts: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Plan(stages, [0], OUT, texts)


def test_invalid_arms_raise() -> None:
    plan = Plan(STAGES, [0], OUT, TEXTS)
    with pytest.raises(UserError, match="arm 'A': unknown stage 'nothing'"):
        plan.jobs_for([Arm(stage="nothing", label="A")])
    for where in ({}, {"format": "loud"}, {"format": "think", "extra": "x"}):
        with pytest.raises(UserError, match="`where` must have exactly one value for each axis of rl"):
            plan.jobs_for([Arm(stage="rl", label="A", where=where)])


def test_shipped_study_uses_every_stage() -> None:
    shipped = yaml.safe_load((Path(__file__).parents[2] / "configs/study/mini.yaml").read_text())
    stages = {name: Stage(**stage) for name, stage in shipped["stages"].items()}
    plan = Plan(stages, shipped["seeds"], OUT, shipped["texts"])
    arms = {name: Arm(**arm) for name, arm in shipped["arms"].items()}
    assert len(plan.seeds) == 6
    unused = set(stages) - {job.stage for job in plan.jobs_for(list(arms.values()))}
    assert not unused
    # Think and no-think arms differ only in the format and in the policy that was warm-started with it.
    for one, other in (
        ("rlmt", "rlhf"),
        ("rlmt_ppo", "rlhf_ppo"),
        ("rlmt_dpo", "rlhf_dpo"),
        ("rlmt_weak", "rlhf_weak"),
    ):
        by_folder = {job.folder: job for job in plan.jobs}
        think, no_think = (by_folder[plan.folder(arms[name], 1)].commands for name in (one, other))
        assert repr(no_think).replace("no_think", "think") == repr(think)
