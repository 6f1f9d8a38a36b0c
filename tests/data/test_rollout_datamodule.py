"""RolloutDataModule: prompts, generation with a real Trainer, and checks of options."""

import json
import random
from collections import Counter

import pytest
import torch
from torch.utils.data import DistributedSampler
from transformers import PreTrainedTokenizerFast

from rlmt.data import generation, rollout_datamodule, sample_seed
from rlmt.errors import UserError
from rlmt.types import FinishReason, PromptBatch, Samples

from .fakes import FRAME, FakeEngine, FakeModule, attached, make, trainer

# Setup ------------------------------------------------------------------------------------------------------------


def test_split_is_disjoint_and_complete_and_depends_on_the_seed(tokenizer, prompts):
    splits = []
    for seed in (0, 0, 1):
        data = attached(make(prompts, seed=seed), FakeModule(tokenizer))
        assert len(data._val) == 2
        assert sorted(p.index for p in data._val + data._train) == list(range(22))
        splits.append([p.index for p in data._val])
    assert splits[0] == splits[1] != splits[2]


def test_long_prompts_are_dropped_and_counted(tokenizer, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr("rlmt.data.prompts.rank_zero_info", logged.append)
    path = tmp_path / "rows.csv"
    # 16 bytes + the frame are exactly the limit of 20 tokens; one byte more is too long. "é" is two bytes.
    path.write_text("prompt\n" + "\n".join(["x" * 16, "x" * 17, "é" * 8, "é" * 9, "x"]))
    data = attached(make(str(path), batch_size=1, val_size=0), FakeModule(tokenizer))
    assert data.max_prompt_tokens == FRAME + 16
    assert sorted(p.index for p in data._train) == [0, 2, 4]
    assert logged == [
        f"dropped 2 of 5 prompts longer than 20 tokens ({path})",
        "3 prompts to train on, 0 to validate on",
    ]


def test_order_of_prompts_does_not_depend_on_dropped_ones(tokenizer, tmp_path):
    orders = []
    for long in (5, 30):
        path = tmp_path / "rows.csv"
        path.write_text("prompt\n" + "\n".join("x" * (long if i == 9 else 5) for i in range(22)))
        data = attached(make(str(path), val_size=0, batch_size=1), FakeModule(tokenizer))
        orders.append([batch.prompts[0].index for batch in data.train_dataloader()])
    assert orders[1] == [index for index in orders[0] if index != 9]


def test_validation_prompts_can_have_a_file_of_their_own(tokenizer, prompts, tmp_path):
    held_out = tmp_path / "val.csv"
    held_out.write_text("prompt\nA\nB\nC\n")
    for size, expected in ((None, ["A", "B", "C"]), (2, ["A", "B"])):
        data = attached(make(prompts, val_prompts=str(held_out), val_size=size), FakeModule(tokenizer))
        assert [p.messages[0]["content"] for p in data._val] == expected
        assert len(data._train) == 22


@pytest.mark.parametrize("split_off", [True, False])
def test_training_prompts_in_the_validation_set_are_dropped_and_counted(
    tmp_path, tokenizer, caplog, split_off
):  # the same prompt may have several rows
    (tmp_path / "train.csv").write_text("prompt\n" + "\n".join("ABCDE" * 4) + "\n")
    (tmp_path / "val.csv").write_text("prompt\nA\nB\nZ\n")
    options = {"val_size": 2} if split_off else {"val_prompts": str(tmp_path / "val.csv"), "val_size": None}
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        data = attached(make(str(tmp_path / "train.csv"), batch_size=2, **options), FakeModule(tokenizer))
    texts = [[p.messages[0]["content"] for p in prompts] for prompts in (data._train, data._val)]
    assert set(texts[0]) == set("ABCDE") - set(texts[1]) and len(texts[0]) == 4 * len(set(texts[0]))
    assert len(texts[1]) == (2 if split_off else 3)
    dropped = 18 - len(texts[0]) if split_off else 8
    assert f"dropped {dropped} of {18 if split_off else 20} training prompts that equal a validation" in caplog.text


def test_validation_on_all_training_prompts_is_an_error(prompts, tokenizer):
    with pytest.raises(UserError, match="all training prompts are validation prompts"):
        attached(make(prompts, val_prompts=prompts, val_size=None), FakeModule(tokenizer))


def test_another_split_of_the_prompts_is_held_out(tokenizer, tmp_path):
    (tmp_path / "data").mkdir()
    for split, texts in (("train_prefs", "abcdef"), ("test_prefs", "xyz")):
        rows = "".join(json.dumps({"prompt": f"say{text}"}) + "\n" for text in texts)
        (tmp_path / "data" / f"{split}-00000-of-00001.jsonl").write_text(rows)
    options = {"split": "train_prefs", "val_split": "test_prefs", "batch_size": 2}
    for size, held_out in ((None, "xyz"), (2, "xy")):
        data = attached(make(str(tmp_path), val_size=size, **options), FakeModule(tokenizer))
        texts = [[prompt.messages[0]["content"][3:] for prompt in prompts] for prompts in (data._train, data._val)]
        assert ["".join(sorted(texts[0])), "".join(texts[1])] == ["abcdef", held_out]
    with pytest.raises(UserError, match="--data.val_size is 4, but .* has 3 prompts"):
        attached(make(str(tmp_path), val_size=4, **options), FakeModule(tokenizer))


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
def test_options_out_of_range_are_refused(prompts, option, value):
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


def test_limits_equal_to_the_context_are_accepted(tokenizer, prompts):
    data = make(prompts, max_prompt_tokens=9, max_new_tokens=91, batch_size=20)
    attached(data, FakeModule(tokenizer), world_size=2)
    assert len(data._train) == 20 and {len(batch.prompts) for batch in data.train_dataloader()} == {10}


def test_engine_is_checked_before_prompts_are_read(tokenizer):
    class Missing(FakeEngine):
        def check(self):
            raise UserError("no engine here")

    with pytest.raises(UserError, match="no engine here"):
        attached(make("missing.jsonl", engine=Missing()), FakeModule(tokenizer))


def test_prompt_that_the_template_refuses_is_named(tokenizer, prompts):
    module = FakeModule(tokenizer)
    module.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    refuses = "{% if messages[0].content == 'say03' %}{{ raise_exception('no threes') }}{% endif %}"
    module.tokenizer.chat_template = refuses + tokenizer.chat_template
    with pytest.raises(UserError, match=rf"{prompts}: row 4: .*no threes"):
        attached(make(prompts), module)


# With a real Trainer ----------------------------------------------------------------------------------------------


def test_start_of_the_engine_is_part_of_the_first_rollout(tokenizer, prompts, tmp_path, monkeypatch):
    """By a clock that advances while the engine starts, by 7, and while it generates, by 3."""
    now, seen = [0.0], []

    class Timed(FakeEngine):
        def start(self, *args):
            super().start(*args)
            now[0] += 7

        def generate(self, *args):
            now[0] += 3
            return super().generate(*args)

    class Recording(FakeModule):
        def note(self, stage, batch):
            super().note(stage, batch)
            seen.append(batch.seconds)

    for module in (rollout_datamodule, generation):
        monkeypatch.setattr(module, "perf_counter", lambda: now[0])
    module = Recording(tokenizer)
    trainer(tmp_path, max_steps=2).fit(module, datamodule=make(prompts, val_size=0, engine=Timed()))
    assert seen == [{"rollout": 10.0, "sync": 0.0}, {"rollout": 3.0, "sync": 0.0}]


def test_rollouts_are_generated_with_the_current_weights_and_settings(tokenizer, prompts, tmp_path):
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


def test_engine_that_cannot_reload_lost_weights_is_synced_again(tokenizer):
    class Forgetful(FakeEngine):
        def reload_lost_weights(self):
            self.version = None

    for engine, syncs in ((FakeEngine(), 1), (Forgetful(), 2)):
        for _ in range(2):
            generation.sync_weights(engine, FakeModule(tokenizer))
        assert engine.calls == syncs * [("sync", 0)] and engine.version == 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_every_precision_keeps_engine_logprobs_in_fp32(tokenizer, prompts, tmp_path, precision):
    module = FakeModule(tokenizer, more=(1,))  # another batch within the step, as dynamic sampling generates
    data = make(prompts)
    data.engine.rounds_weights = precision == "bf16-mixed"
    trainer(tmp_path, max_steps=1, precision=precision).fit(module, datamodule=data)
    assert len(module.seen["train"]) == len(module.seen["more"]) == 1  # `note` looks at the dtype
    assert module.last.rounded == data.engine.rounds_weights


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


def test_validation_generates_one_sample_with_the_same_seeds_each_time(tokenizer, prompts, tmp_path):
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
    """An engine that replays: it has samples of some prompts only, generated with weight version 40."""

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


def test_held_out_samples_come_from_the_validation_engine(tokenizer, prompts, tmp_path):
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
def test_recorded_samples_cannot_validate_held_out_prompts(tokenizer, prompts, stage, val_engine):
    with pytest.raises(UserError, match=r"--data\.val_size 0, or --data\.val_engine VLLMEngine"):
        attached(make(prompts, engine=Recorded(), val_engine=val_engine), FakeModule(tokenizer), stage=stage)


def test_prompts_without_recorded_samples_are_dropped_and_counted(tokenizer, prompts, monkeypatch):
    logged = []
    monkeypatch.setattr("rlmt.data.generation.rank_zero_info", logged.append)
    options = {"engine": Recorded(range(3, 22)), "val_engine": FakeEngine(), "batch_size": 1}
    data = attached(make(prompts, val_size=2, **options), FakeModule(tokenizer))
    unsplit = attached(make(prompts, val_size=2), FakeModule(tokenizer))
    assert [p.index for p in data._val] == [p.index for p in unsplit._val], "what is held out does not change"
    assert sorted(p.index for p in data._train) == sorted(p.index for p in unsplit._train if p.index > 2)
    missing = len(unsplit._train) - len(data._train)
    assert logged == [f"dropped {missing} of 20 prompts that were not recorded ({prompts})"]
    data = attached(make(prompts, engine=Recorded([7, 5])), FakeModule(tokenizer), stage="predict")
    assert [p.index for batch in data.predict_dataloader() for p in batch.prompts] == [5, 7]
    with pytest.raises(UserError, match="has none of the 22 prompts .*: set --data.prompts"):
        attached(make(prompts, engine=Recorded([]), val_size=0), FakeModule(tokenizer))


def test_without_validation_prompts_fit_trains_only(tokenizer, prompts, tmp_path):
    module = FakeModule(tokenizer)
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=make(prompts, val_size=0))
    assert len(module.seen["train"]) == 3 and module.seen["val"] == []


@pytest.mark.parametrize("options", [{}, {"val_size": 1000}, {"val_size": 7, "val_prompts": "missing.jsonl"}])
def test_predict_uses_all_prompts_in_order_whatever_is_held_out(tokenizer, prompts, tmp_path, options):
    module = FakeModule(tokenizer)
    trainer(tmp_path).predict(module, datamodule=make(prompts, **options))
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
