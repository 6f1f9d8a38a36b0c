"""Code of the user's own in the working folder, without PYTHONPATH."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

REWARD = """
def brief(prompt, response):
    return -float(len(response))
"""


@pytest.mark.slow
def test_reward_in_the_working_folder_is_found_by_every_rank(tiny: Path, prompts_file: Path, tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(REWARD)
    options = (
        f"--config base --config grpo --config tiny --config ddp --model.policy {tiny}/policy --model.format no_think "
        f"--model.reward CallableReward --model.reward.function my_rewards.brief --data.prompts {prompts_file} "
        "--data.engine TransformersEngine --data.batch_size 4 --data.group_size 2 --data.max_prompt_tokens 256 "
        "--data.max_new_tokens 8 --data.val_size 4 --trainer.max_epochs 1 --trainer.limit_train_batches 1 "
        "--trainer.devices 2 --trainer.accelerator cpu --trainer.precision 32-true --trainer.enable_progress_bar false "
        "--trainer.default_root_dir run"
    )
    rlmt = Path(sys.executable).with_name("rlmt")  # the script, which Lightning starts again for the second rank
    done = subprocess.run([rlmt, "fit", *options.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "MEMBER: 2/2" in done.stderr + done.stdout, done.stderr
    (metrics,) = tmp_path.rglob("metrics.csv")
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    assert any(float(row["reward/brief"]) <= 0 for row in rows if row.get("reward/brief"))
