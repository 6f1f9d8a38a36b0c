"""RolloutDataModule resumes at the exact position in the prompts."""

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from rlmt.errors import UserError

from .fakes import FakeModule, Killed, make, trainer

SAVING = {
    "every step": {"every_n_train_steps": 1},
    "epoch end": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "after validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
}
LENGTH = {"epochs": {"max_epochs": 3}, "steps": {"max_steps": 9, "max_epochs": -1}}
CUT = {
    "two batches an epoch": {"max_steps": 9, "max_epochs": -1, "limit_train_batches": 2},
    "validation every step": {"max_epochs": 3, "val_check_interval": 1},
}


def fit(tokenizer, prompts, folder, length, saving, die_after=None, ckpt=None, more=(0,)):
    module = FakeModule(tokenizer, die_after=die_after, more=more)
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, **SAVING[saving])
    run = trainer(folder, callbacks=[saver], num_sanity_val_steps=0, **(LENGTH | CUT)[length])
    try:
        run.fit(module, datamodule=make(prompts), ckpt_path=ckpt)
    except Killed:
        assert die_after is not None
    return module


KILLED = [("every step", k, k) for k in range(1, 9)] + [
    ("every step", 5, 4),
    ("every step", 4, 2),
    ("epoch end", 3, 3),
    ("epoch end", 5, 3),
    ("epoch end", 8, 6),
    ("after validation", 3, 3),
    ("after validation", 5, 3),
    ("after validation", 7, 6),
]
KILLED_RUNS = [(length, *killed) for length in LENGTH for killed in KILLED]
KILLED_RUNS += [(length, "every step", k, k) for length in CUT for k in (1, 2, 3, 4, 6)]
KILLED_RUNS += [("two batches an epoch", "epoch end", 4, 4), ("two batches an epoch", "epoch end", 5, 4)]


@pytest.mark.parametrize(("length", "saving", "kill_after", "resume_from"), KILLED_RUNS)
def test_killed_and_resumed_run_equals_the_uninterrupted_run(
    tokenizer, prompts, tmp_path, length, saving, kill_after, resume_from
):
    uninterrupted = fit(tokenizer, prompts, tmp_path / "uninterrupted", length, saving).seen["train"]
    assert len(uninterrupted) == 9 and [record[0] for record in uninterrupted] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    killed = fit(tokenizer, prompts, tmp_path / "killed", length, saving, die_after=kill_after)
    assert killed.seen["train"] == uninterrupted[:kill_after]
    ckpt = tmp_path / "killed" / f"step={resume_from}.ckpt"
    resumed = fit(tokenizer, prompts, tmp_path / "resumed", length, saving, ckpt=ckpt)
    assert resumed.seen["train"] == uninterrupted[resume_from:]


MORE = (1, 0, 2, 0, 0, 1)


@pytest.mark.parametrize("length", [*LENGTH, *CUT])
@pytest.mark.parametrize(("kill_after", "resume_from"), [(3, 3), (5, 4), (7, 7)])
def test_run_with_further_batches_within_steps_resumes_exactly(
    tokenizer, prompts, tmp_path, length, kill_after, resume_from
):
    """Steps use 2, 1, 3, 1, 1, 2, … batches and an epoch has 3, so epochs end and begin within steps."""
    options = (length, "every step")
    uninterrupted = fit(tokenizer, prompts, tmp_path / "uninterrupted", *options, more=MORE).seen
    assert len(uninterrupted["train"]) == 9 and len(uninterrupted["more"]) == 7
    killed = fit(tokenizer, prompts, tmp_path / "killed", *options, die_after=kill_after, more=MORE).seen
    assert killed["train"] == uninterrupted["train"][:kill_after]
    ckpt = tmp_path / "killed" / f"step={resume_from}.ckpt"
    resumed = fit(tokenizer, prompts, tmp_path / "resumed", *options, ckpt=ckpt, more=MORE).seen
    assert resumed["train"] == uninterrupted["train"][resume_from:]
    extra = sum((MORE * 2)[:resume_from])
    assert resumed["more"] == uninterrupted["more"][extra:]


def test_further_batches_use_every_prompt_and_no_seed_twice(tokenizer, prompts, tmp_path):
    seen = fit(tokenizer, prompts, tmp_path, "steps", "every step", more=MORE).seen
    used = [(epoch, index) for epoch, rows, *_ in seen["train"] + seen["more"] for index in rows]
    assert len(used) == 16 * 6 and len(set(used)) == len(used)  # (epoch, prompt, sample) makes the seed
    for epoch in range(5):  # complete epochs
        assert len({index for e, index in used if e == epoch}) == 18
    assert max(used)[0] == 5


def test_checkpoint_of_other_data_is_refused(tokenizer, prompts, tmp_path):
    fit(tokenizer, prompts, tmp_path, "steps", "every step", die_after=2)
    data = make(prompts, seed=1)
    with pytest.raises(UserError, match="the checkpoint was made with other training data"):
        trainer(tmp_path, max_steps=9).fit(FakeModule(tokenizer), datamodule=data, ckpt_path=tmp_path / "step=2.ckpt")
