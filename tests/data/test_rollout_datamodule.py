import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DistributedSampler
from transformers import PreTrainedTokenizerFast

from rlmt.data import RolloutDataModule, sample_seed
from rlmt.engines.base import Engine
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.types import FinishReason, PromptBatch, RolloutBatch, Samples

FRAME = 4  # tokens around a one-turn prompt: <s> <|user|> … </s> <|assistant|>


class FakeEngine(Engine):
    """Tokens from prompt, seed and the synced weight, nothing else; notes every call."""

    def __init__(self):
        self.calls = []
        self.lag = 0
        self.weight = None

    def check(self):
        self.calls.append("check")

    def start(self, policy, tokenizer, max_model_len, dtype):
        assert dtype is torch.float32
        assert self.version is None
        self.calls.append(("start", max_model_len))

    def sync(self, weights, version, adapter=None):
        assert adapter is None
        self.weight = {name: tensor.item() for name, tensor in weights}["weight"]
        self.version = version
        self.calls.append(("sync", version))

    def generate(self, requests, sampling):
        self.calls.append(("generate", len(requests)))
        self.sampling = sampling
        ids, logprobs = [], []
        for request, seed in ((r, s) for r in requests for s in r.seeds):
            draw = random.Random(f"{request.prompt_ids} {seed} {self.weight}")
            ids.append([draw.randrange(200) for _ in range(draw.randint(1, 5))])
            logprobs.append([-draw.random() for _ in ids[-1]])
        finish = [FinishReason.STOP] * len(ids)
        return Samples(ids, logprobs, finish, self.version - self.lag)

    def close(self):
        self.calls.append("close")
        self.version = None


class Killed(Exception):
    """Stands for a kill signal."""


class FakeModule(LightningModule):
    """One weight that moves by what it saw; a record of every batch in `seen`, keyed by stage."""

    max_positions = 100
    compute_dtype = torch.float32

    def __init__(self, tokenizer, format="think", die_after=None, more=(0,)):
        super().__init__()
        self.automatic_optimization = False
        self.tokenizer = tokenizer
        self.format = ThinkingFormat(format)
        self.policy = torch.nn.Module()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("updates", torch.zeros(1, dtype=torch.int64))
        self.seen = {"train": [], "more": [], "val": [], "test": [], "predict": []}
        self.die_after = die_after
        self.more = more  # batches that each step draws on top of its own, step by step in turn

    @property
    def policy_version(self):
        return int(self.updates)

    def policy_weights(self):
        return iter([("weight", self.weight.detach())])

    def policy_adapter(self):
        return None

    def note(self, stage, batch):
        assert isinstance(batch, RolloutBatch)
        assert batch.engine_logprobs.dtype == torch.float32
        assert batch.engine_logprobs.shape == (sum(batch.lengths),)
        record = (batch.epoch, [p.index for p in batch.prompts], batch.completion_ids, batch.engine_logprobs.tolist())
        self.seen[stage].append(record)
        self.last = batch

    def training_step(self, prompts):
        batch = self.trainer.datamodule.generate(prompts)
        if len(self.seen["train"]) == self.die_after:
            raise Killed
        self.note("train", batch)
        for _ in range(self.more[self.policy_version % len(self.more)]):
            self.note("more", self.trainer.datamodule.generate(self.trainer.datamodule.next_prompts()))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.weight * sum(map(sum, batch.completion_ids))).sum())
        optimizer.step()
        self.updates += 1

    def validation_step(self, prompts):
        self.note("val", self.trainer.datamodule.generate(prompts))

    def test_step(self, prompts):
        self.note("test", self.trainer.datamodule.generate(prompts))

    def predict_step(self, prompts):
        self.note("predict", self.trainer.datamodule.generate(prompts))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


@pytest.fixture
def prompts(tmp_path):
    """22 prompts of 5 bytes: 9 tokens each once rendered."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say{i:02}"}) + "\n" for i in range(22)))
    return str(path)


def make(prompts, **options):
    options = {"batch_size": 6, "group_size": 2, "val_size": 2, "max_prompt_tokens": 20, "max_new_tokens": 10} | options
    return RolloutDataModule(prompts, options.pop("engine", None) or FakeEngine(), **options)


def trainer(tmp_path, **options):
    defaults = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults |= {"enable_checkpointing": "callbacks" in options, "default_root_dir": tmp_path}
    return Trainer(**(defaults | options))


def attached(data, module, world_size=1, rank=0, stage="fit"):
    """The data module set up as on one rank of several, without processes."""
    data.trainer = SimpleNamespace(lightning_module=module, world_size=world_size, global_rank=rank)
    data.setup(stage)
    return data


# ------------------------------------------------------------------------------------------------ setting up


def test_split_is_disjoint_complete_and_moves_with_the_seed(tokenizer, prompts):
    splits = []
    for seed in (0, 0, 1):
        data = attached(make(prompts, seed=seed), FakeModule(tokenizer))
        assert len(data._val) == 2
        assert sorted(p.index for p in data._val + data._train) == list(range(22))
        splits.append([p.index for p in data._val])
    assert splits[0] == splits[1] != splits[2]


def test_long_prompts_are_dropped_and_counted(tokenizer, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("rlmt.data.prompts.rank_zero_info", said.append)
    path = tmp_path / "rows.csv"
    # 16 bytes + the frame are exactly the limit of 20 tokens; one byte more is too long. "é" is two bytes.
    path.write_text("prompt\n" + "\n".join(["x" * 16, "x" * 17, "é" * 8, "é" * 9, "x"]))
    data = attached(make(str(path), batch_size=1, val_size=0), FakeModule(tokenizer))
    assert data.max_prompt_tokens == FRAME + 16
    assert sorted(p.index for p in data._train) == [0, 2, 4]
    assert said == [
        f"dropped 2 of 5 prompts longer than 20 tokens ({path})",
        "3 prompts to train on, 0 to validate on",
    ]


def test_dropping_a_prompt_leaves_the_order_of_the_rest(tokenizer, tmp_path):
    orders = []
    for long in (5, 30):
        path = tmp_path / "rows.csv"
        path.write_text("prompt\n" + "\n".join("x" * (long if i == 9 else 5) for i in range(22)))
        data = attached(make(str(path), val_size=0, batch_size=1), FakeModule(tokenizer))
        orders.append([batch.prompts[0].index for batch in data.train_dataloader()])
    assert orders[1] == [index for index in orders[0] if index != 9]


def test_own_validation_prompts(tokenizer, prompts, tmp_path):
    held_out = tmp_path / "val.csv"
    held_out.write_text("prompt\nA\nB\nC\n")
    for size, expected in ((None, ["A", "B", "C"]), (2, ["A", "B"])):
        data = attached(make(prompts, val_prompts=str(held_out), val_size=size), FakeModule(tokenizer))
        assert [p.messages[0]["content"] for p in data._val] == expected
        assert len(data._train) == 22


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", 0),
        ("group_size", 0),
        ("max_prompt_tokens", 0),
        ("max_new_tokens", -1),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("val_size", -1),
    ],
)
def test_options_out_of_range(prompts, option, value):
    with pytest.raises(UserError, match=rf"^RolloutDataModule\.{option} is {value}: must be .*\.$"):
        make(prompts, **{option: value})


@pytest.mark.parametrize(
    ("options", "world_size", "stage", "message"),
    [
        ({"max_new_tokens": 81}, 1, "fit", r"max_prompt_tokens 20 \+ --data.max_new_tokens 81 .*context of 100 tokens"),
        ({"max_prompt_tokens": 8}, 1, "fit", "all 22 prompts are longer than --data.max_prompt_tokens 8"),
        ({"batch_size": 21}, 1, "fit", "batch_size is 21, but .* has only 20 training prompts"),
        ({"batch_size": 6}, 4, "fit", "batch_size is 6, which is not divisible by 4 devices"),
        ({"val_size": 3}, 2, "fit", "val_size is 3, which is not divisible by 2 devices"),
        ({"val_size": 23}, 1, "fit", "val_size is 23, but .* has 22 prompts"),
        ({"val_size": 22}, 1, "fit", "only 0 training prompts"),
        ({"val_size": 0}, 1, "test", "no prompts to test on"),
        ({"val_size": 0}, 1, "validate", "no prompts to validate on"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(tokenizer, prompts, options, world_size, stage, message):
    with pytest.raises(UserError, match=message) as caught:
        attached(make(prompts, **options), FakeModule(tokenizer), world_size, stage=stage)
    assert "\n" not in str(caught.value)


def test_limits_that_just_fit(tokenizer, prompts):
    data = make(prompts, max_prompt_tokens=9, max_new_tokens=91, batch_size=20)
    attached(data, FakeModule(tokenizer), world_size=2)
    assert len(data._train) == 20 and {len(batch.prompts) for batch in data.train_dataloader()} == {10}


def test_the_engine_is_checked_before_prompts_are_read(tokenizer):
    class Missing(FakeEngine):
        def check(self):
            raise UserError("no engine here")

    with pytest.raises(UserError, match="no engine here"):
        attached(make("missing.jsonl", engine=Missing()), FakeModule(tokenizer))


def test_a_prompt_that_the_template_refuses_is_named(tokenizer, prompts):
    module = FakeModule(tokenizer)
    module.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    refuses = "{% if messages[0].content == 'say03' %}{{ raise_exception('no threes') }}{% endif %}"
    module.tokenizer.chat_template = refuses + tokenizer.chat_template
    with pytest.raises(UserError, match=rf"{prompts}: row 4: .*no threes"):
        attached(make(prompts), module)


# ------------------------------------------------------------------------------------------------ with a real Trainer


def test_rollouts_are_drawn_with_the_present_weights_and_settings(tokenizer, prompts, tmp_path):
    module, data = FakeModule(tokenizer, format="zero_think"), None
    module.max_positions = 2000
    data = make(prompts, max_prompt_tokens=1000, temperature=0.9, top_p=0.8, val_size=0)
    engine = data.engine
    trainer(tmp_path, max_steps=2).fit(module, datamodule=data)
    expected = ["check", ("start", 1010), ("sync", 0), ("generate", 6), ("sync", 1), ("generate", 6), "close"]
    assert engine.calls == expected
    assert engine.sampling.temperature == 0.9 and engine.sampling.top_p == 0.8
    assert engine.sampling.max_new_tokens == 10 and engine.sampling.stop == ("</response>",)
    assert engine.sampling.stop_token_ids == (tokenizer.eos_token_id,)
    batch = module.last
    assert batch.weight_version == 1 and batch.group_size == 2 and len(batch) == 12
    assert batch.prompt_ids == [module.format.render(p.messages, tokenizer) for p in batch.prompts]
    assert set(batch.seconds) == {"rollout", "sync"} and all(s >= 0 for s in batch.seconds.values())
    alike = random.Random(f"{batch.prompt_ids[1]} {sample_seed(0, 0, batch.prompts[1].index, 1)} {engine.weight}")
    assert batch.completion_ids[3] == [alike.randrange(200) for _ in range(alike.randint(1, 5))]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_every_precision_keeps_engine_logprobs_in_fp32(tokenizer, prompts, tmp_path, precision):
    module = FakeModule(tokenizer)
    trainer(tmp_path, max_steps=1, precision=precision).fit(module, datamodule=make(prompts))
    assert len(module.seen["train"]) == 1  # `note` looks at the dtype


def test_epochs_are_complete_reshuffled_and_numbered(tokenizer, prompts, tmp_path):
    module = FakeModule(tokenizer)
    trainer(tmp_path, max_epochs=3).fit(module, datamodule=make(prompts))
    assert [record[0] for record in module.seen["train"]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    epochs = [[i for _, rows, *_ in module.seen["train"][e * 3 : e * 3 + 3] for i in rows] for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == 18
    assert epochs[0] != epochs[1] != epochs[2]
    val = {i for _, rows, *_ in module.seen["val"] for i in rows}
    assert len(val) == 2 and not val & {i for epoch in epochs for i in epoch}


def test_validation_draws_one_sample_with_the_same_seeds_each_time(tokenizer, prompts, tmp_path):
    module, data = FakeModule(tokenizer), make(prompts, val_size=5)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, datamodule=data)
    sanity, first, second = module.seen["val"]
    assert sanity == first == second and first[0] == 0 and len(first[1]) == 5 and len(first[2]) == 5
    run.validate(module, datamodule=data)
    run.test(module, datamodule=data)
    assert module.seen["val"][-1] == first == module.seen["test"][0]
    assert data.engine.calls.count("close") == 3


class Recorded(FakeEngine):
    """Stands for an engine that replays: knows some prompts, whose samples were drawn by weights 40."""

    replays = True

    def __init__(self, known=range(22)):
        super().__init__()
        self.texts, self.asked, self.tokenizer = {f"say{i:02}" for i in known}, [], None

    def check_sampling(self, format, tokenizer, sampling, group_size, max_model_len):
        self.calls.append(("check_sampling", format.name, sampling.temperature, sampling.max_new_tokens, group_size))
        self.tokenizer = tokenizer

    def has_prompt(self, prompt_ids):
        return any(text in self.tokenizer.decode(prompt_ids) for text in self.texts)

    def generate(self, requests, sampling):
        self.asked += [request.epoch for request in requests]
        count = sum(len(request.seeds) for request in requests)
        return Samples(
            [[1, 2]] * count, [[-1.0, -2.0]] * count, [FinishReason.STOP] * count, 40, [[-3.0, -4.0]] * count
        )


def test_recorded_samples_are_off_policy_and_need_no_sync(tokenizer, prompts, tmp_path):
    module, data = FakeModule(tokenizer), make(prompts, engine=Recorded(), val_size=0)
    trainer(tmp_path, max_epochs=2).fit(module, datamodule=data)
    assert data.engine.calls == ["check", ("check_sampling", "think", 0.7, 10, 2), ("start", 30), "close"]
    assert len(module.seen["train"]) == 6 and data.engine.asked == [0] * 18 + [1] * 18
    assert module.last.off_policy and module.last.weight_version == 40
    assert module.last.ref_logprobs.tolist() == [-3.0, -4.0] * 12
    fresh = make(prompts, val_size=0)
    trainer(tmp_path, max_steps=1).fit(module, datamodule=fresh)
    assert not module.last.off_policy and module.last.ref_logprobs is None


def test_held_out_samples_come_from_an_engine_of_their_own(tokenizer, prompts, tmp_path):
    module, data = FakeModule(tokenizer), make(prompts, engine=Recorded(), val_engine=FakeEngine(), val_size=2)
    run = trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0)
    run.fit(module, datamodule=data)
    assert data.val_engine.calls == ["check", ("start", 30), ("sync", 3), ("generate", 2), "close"]
    assert data.engine.calls[-2:] == [("start", 30), "close"] and len(module.seen["train"]) == 3
    run.validate(module, datamodule=data)
    assert data.val_engine.calls[-1] == "close" and len(module.seen["val"]) == 2
    assert not module.last.off_policy and data.engine.calls.count("check") == 1


@pytest.mark.parametrize("val_engine", [None, Recorded()])
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_recorded_samples_say_nothing_of_held_out_prompts(tokenizer, prompts, stage, val_engine):
    with pytest.raises(UserError, match=r"--data\.val_size 0, or --data\.val_engine VLLMEngine"):
        attached(make(prompts, engine=Recorded(), val_engine=val_engine), FakeModule(tokenizer), stage=stage)


def test_prompts_without_recorded_samples_are_dropped_and_counted(tokenizer, prompts, monkeypatch):
    said = []
    monkeypatch.setattr("rlmt.data.generation.rank_zero_info", said.append)
    options = {"engine": Recorded(range(3, 22)), "val_engine": FakeEngine(), "batch_size": 1}
    data = attached(make(prompts, val_size=2, **options), FakeModule(tokenizer))
    unsplit = attached(make(prompts, val_size=2), FakeModule(tokenizer))
    assert [p.index for p in data._val] == [p.index for p in unsplit._val], "what is held out does not change"
    assert sorted(p.index for p in data._train) == sorted(p.index for p in unsplit._train if p.index > 2)
    missing = len(unsplit._train) - len(data._train)
    assert said == [f"dropped {missing} of 20 prompts that were not recorded ({prompts})"]
    data = attached(make(prompts, engine=Recorded([7, 5])), FakeModule(tokenizer), stage="predict")
    assert [p.index for batch in data.predict_dataloader() for p in batch.prompts] == [5, 7]
    with pytest.raises(UserError, match="has none of the 22 prompts .*: set --data.prompts"):
        attached(make(prompts, engine=Recorded([]), val_size=0), FakeModule(tokenizer))


def test_without_validation_prompts_fit_trains_only(tokenizer, prompts, tmp_path):
    module = FakeModule(tokenizer)
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=make(prompts, val_size=0))
    assert len(module.seen["train"]) == 3 and module.seen["val"] == []


def test_predict_goes_through_all_prompts_in_order(tokenizer, prompts, tmp_path):
    module = FakeModule(tokenizer)
    trainer(tmp_path).predict(module, datamodule=make(prompts))
    assert [i for _, rows, *_ in module.seen["predict"] for i in rows] == list(range(22))
    assert all(len(ids) == 2 * len(rows) for _, rows, ids, _ in module.seen["predict"])


def test_stale_or_incomplete_samples_stop_the_run(tokenizer, prompts, tmp_path):
    engine = FakeEngine()
    engine.lag = 1
    with pytest.raises(RuntimeError, match="stale rollout: generated with weights -1, not with 0"):
        trainer(tmp_path, max_steps=1).fit(FakeModule(tokenizer), datamodule=make(prompts, engine=engine))
    assert engine.calls[-1] == "close"

    class Short(FakeEngine):
        def generate(self, requests, sampling):
            return super().generate(requests[1:], sampling)

    with pytest.raises(RuntimeError, match="for 12 seeds"):
        trainer(tmp_path, max_steps=1, num_sanity_val_steps=0).fit(
            FakeModule(tokenizer), datamodule=make(prompts, engine=Short())
        )


def test_loaders_of_two_ranks_share_every_batch(tokenizer, prompts):
    batches, held_out = [], []
    for rank in range(2):
        data = attached(make(prompts, val_size=4), FakeModule(tokenizer), world_size=2, rank=rank)
        loader = data.train_dataloader()
        assert isinstance(loader.sampler, DistributedSampler)  # Lightning puts none of its own in its place
        batches.append(list(loader))
        held_out += [p.index for batch in data.val_dataloader() for p in batch.prompts]
    assert len(batches[0]) == len(batches[1]) == 3
    for left, right in zip(*batches, strict=True):
        assert isinstance(left, PromptBatch) and len(left.prompts) == len(right.prompts) == 3
        assert not {p.index for p in left.prompts} & {p.index for p in right.prompts}
    assert Counter(held_out) == Counter(p.index for p in data._val)


# ------------------------------------------------------------------------------------------------ resuming

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
def test_a_killed_and_resumed_run_is_the_unbroken_run(
    tokenizer, prompts, tmp_path, length, saving, kill_after, resume_from
):
    whole = fit(tokenizer, prompts, tmp_path / "whole", length, saving).seen["train"]
    assert len(whole) == 9 and [record[0] for record in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    killed = fit(tokenizer, prompts, tmp_path / "killed", length, saving, die_after=kill_after)
    assert killed.seen["train"] == whole[:kill_after]
    ckpt = tmp_path / "killed" / f"step={resume_from}.ckpt"
    resumed = fit(tokenizer, prompts, tmp_path / "resumed", length, saving, ckpt=ckpt)
    assert resumed.seen["train"] == whole[resume_from:]


MORE = (1, 0, 2, 0, 0, 1)


@pytest.mark.parametrize("length", [*LENGTH, *CUT])
@pytest.mark.parametrize(("kill_after", "resume_from"), [(3, 3), (5, 4), (7, 7)])
def test_a_run_that_draws_more_within_steps_resumes_exactly(
    tokenizer, prompts, tmp_path, length, kill_after, resume_from
):
    """Steps use up 2, 1, 3, 1, 1, 2, … batches of passes of 3, so draws end and begin passes within steps."""
    options = (length, "every step")
    whole = fit(tokenizer, prompts, tmp_path / "whole", *options, more=MORE).seen
    assert len(whole["train"]) == 9 and len(whole["more"]) == 7
    killed = fit(tokenizer, prompts, tmp_path / "killed", *options, die_after=kill_after, more=MORE).seen
    assert killed["train"] == whole["train"][:kill_after]
    ckpt = tmp_path / "killed" / f"step={resume_from}.ckpt"
    resumed = fit(tokenizer, prompts, tmp_path / "resumed", *options, ckpt=ckpt, more=MORE).seen
    assert resumed["train"] == whole["train"][resume_from:]
    extra = sum((MORE * 2)[:resume_from])
    assert resumed["more"] == whole["more"][extra:]


def test_drawing_more_uses_no_seed_twice_and_leaves_no_prompt_out(tokenizer, prompts, tmp_path):
    seen = fit(tokenizer, prompts, tmp_path, "steps", "every step", more=MORE).seen
    drawn = [(epoch, index) for epoch, rows, *_ in seen["train"] + seen["more"] for index in rows]
    assert len(drawn) == 16 * 6 and len(set(drawn)) == len(drawn)  # (epoch, prompt, sample) makes the seed
    for epoch in range(5):  # whole passes
        assert len({index for e, index in drawn if e == epoch}) == 18
    assert max(drawn)[0] == 5


def test_a_checkpoint_of_other_data_is_refused(tokenizer, prompts, tmp_path):
    fit(tokenizer, prompts, tmp_path, "steps", "every step", die_after=2)
    data = make(prompts, seed=1)
    with pytest.raises(UserError, match="the checkpoint was made with other training data"):
        trainer(tmp_path, max_steps=9).fit(FakeModule(tokenizer), datamodule=data, ckpt_path=tmp_path / "step=2.ckpt")
