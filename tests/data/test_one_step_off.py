"""One-step-off rollouts with a real Trainer: which weights generate which batch, and that a resumed run repeats it."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rlmt.callbacks import PolicyCheckpoint
from rlmt.data import PromptSampler, RolloutDataModule, one_step_off
from rlmt.engines.base import Engine
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.types import FinishReason, PromptBatch, RolloutBatch, SampleRequest, Samples, Sampling


class Slow(Engine):
    """Samples from prompt, seed and the synced weight; generation ahead ends after the step has begun."""

    concurrent = True

    def __init__(self) -> None:
        self.generated_with: list[int] = []
        self.training = threading.Event()
        self.closed = threading.Event()
        self.busy = False

    def start(self, policy: Any, tokenizer: Any, max_model_len: int, dtype: torch.dtype) -> None:
        self.main = threading.current_thread()

    def sync(self, weights: Any, version: int, adapter: Any = None) -> None:
        assert not self.busy, "weights must not change during generation"
        self.weight = {name: tensor.item() for name, tensor in weights}["weight"]
        self.version = version

    def generate(self, requests: list[SampleRequest], sampling: Sampling) -> Samples:
        assert not self.busy and self.version is not None
        self.busy, weight, version = True, self.weight, self.version
        if threading.current_thread() is not self.main:
            while not self.training.wait(0.01):
                if self.closed.is_set():
                    raise InterruptedError
            self.training.clear()
        self.generated_with.append(version)
        draws = [random.Random(f"{r.prompt_ids} {seed} {weight}") for r in requests for seed in r.seeds]
        ids = [[draw.randrange(200) for _ in range(draw.randint(1, 5))] for draw in draws]
        logprobs = [[-draw.random() for _ in row] for draw, row in zip(draws, ids, strict=True)]
        self.busy = False
        return Samples(ids, logprobs, [FinishReason(draw.choice(("stop", "length"))) for draw in draws], version)

    def close(self) -> None:
        self.closed.set()


class Module(LightningModule):
    """One weight that moves by what it saw, at its second step not at all; notes every batch."""

    max_positions = 100
    compute_dtype = torch.float32

    def __init__(self, tokenizer: Any, more: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.tokenizer, self.format = tokenizer, ThinkingFormat("think")
        self.stop_token_ids = self.format.stop_token_ids(tokenizer)
        self.policy = torch.nn.Module()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("updates", torch.zeros(1, dtype=torch.int64))
        self.more = more
        self.seen: list[RolloutBatch] = []
        self.held_out: list[RolloutBatch] = []

    @property
    def policy_version(self) -> int:
        return int(self.updates)

    def policy_weights(self) -> Any:
        return iter([("weight", self.weight.detach())])

    def policy_adapter(self) -> None:
        return None

    def on_generated(self) -> None:
        """The step has its rollouts."""

    def training_step(self, prompts: PromptBatch) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        batch = data.generate(prompts)
        self.on_generated()
        self.seen.append(batch)
        data.engine.training.set()
        if self.policy_version == self.more:
            self.seen.append(data.generate(data.next_prompts()))
            data.engine.training.set()
        self.manual_backward((self.weight * sum(map(sum, batch.completion_ids))).sum())
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        self.updates += 1

    def validation_step(self, prompts: PromptBatch) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.held_out.append(data.generate(prompts))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """20 prompts: 3 batches of 6 a pass, and 2 held out."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say{i:02}"}) + "\n" for i in range(20)))
    return str(path)


def make(prompts: str, lag: int = 1, **options: Any) -> RolloutDataModule:
    settings = {"batch_size": 6, "group_size": 2, "val_size": 2, "max_prompt_tokens": 20, "max_new_tokens": 10}
    return RolloutDataModule(prompts, **(settings | {"engine": Slow(), "rollout_lag": lag} | options))


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "default_root_dir": folder, "num_sanity_val_steps": 0}
    return Trainer(**(quiet | {"enable_checkpointing": "callbacks" in options} | options))


def content(batch: RolloutBatch) -> tuple[Any, ...]:
    rows = [prompt.index for prompt in batch.prompts]
    ids, logprobs = batch.completion_ids, batch.engine_logprobs.tolist()
    return batch.epoch, rows, batch.prompt_ids, ids, logprobs, batch.finish, batch.weight_version, batch.lag


def test_every_batch_but_the_first_is_one_update_behind(byte_tokenizer: Any, prompts: str, tmp_path: Path) -> None:
    module, data = Module(byte_tokenizer), make(prompts, val_size=0)
    trainer(tmp_path, max_steps=7).fit(module, datamodule=data)
    assert [batch.weight_version for batch in module.seen] == [0, 0, 1, 2, 3, 4, 5]
    assert [batch.lag for batch in module.seen] == [0, 1, 1, 1, 1, 1, 1]
    assert [batch.off_policy for batch in module.seen] == [False] + [True] * 6
    # The same prompts with the same seeds in the same order as on-policy, over three passes.
    sampler = PromptSampler(data._sampler.dataset, 6, 1, 0, seed=0)  # type: ignore[union-attr]
    order = [[data._train[i].index for i in sampler.take(6)] for _ in range(7)]
    assert [[p.index for p in batch.prompts] for batch in module.seen] == order
    assert [batch.epoch for batch in module.seen] == [0, 0, 0, 1, 1, 1, 2]
    on_policy = Module(byte_tokenizer)
    trainer(tmp_path, max_steps=7).fit(on_policy, datamodule=make(prompts, lag=0, val_size=0))
    assert content(on_policy.seen[0]) == content(module.seen[0])
    assert on_policy.seen[1].completion_ids != module.seen[1].completion_ids  # generated with other weights
    assert [(batch.weight_version, batch.lag, batch.off_policy) for batch in on_policy.seen] == [
        (version, 0, False) for version in range(7)
    ]


def test_validation_has_the_present_weights_and_the_batch_under_way_keeps_its_own(
    byte_tokenizer: Any, prompts: str, tmp_path: Path
) -> None:
    runs = []
    for options in ({"val_check_interval": 2}, {"limit_val_batches": 0}):
        module, data = Module(byte_tokenizer), make(prompts)
        trainer(tmp_path, max_steps=6, check_val_every_n_epoch=None, **options).fit(module, datamodule=data)
        runs.append(module)
    assert [(batch.weight_version, batch.lag) for batch in runs[0].held_out] == [(2, 0), (4, 0), (6, 0)]
    assert list(map(content, runs[0].seen)) == list(map(content, runs[1].seen))


def test_more_draws_within_a_step_take_what_is_under_way(byte_tokenizer: Any, prompts: str, tmp_path: Path) -> None:
    module, data = Module(byte_tokenizer, more=2), make(prompts, val_size=0)
    trainer(tmp_path, max_steps=4).fit(module, datamodule=data)
    assert [(batch.weight_version, batch.lag) for batch in module.seen] == [(0, 0), (0, 1), (1, 1), (2, 0), (2, 1)]
    sampler = PromptSampler(data._sampler.dataset, 6, 1, 0, seed=0)  # type: ignore[union-attr]
    order = [[data._train[i].index for i in sampler.take(6)] for _ in range(5)]
    assert [[p.index for p in batch.prompts] for batch in module.seen] == order


def test_seconds_are_those_that_training_waited(
    byte_tokenizer: Any, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that advances by 5 during a generation that training waits for, and by 2 during a sync."""
    now, read = [0.0], threading.Event()

    def clock() -> float:
        time = now[0]
        read.set()
        return time

    class Timed(Slow):
        def sync(self, weights: Any, version: int, adapter: Any = None) -> None:
            super().sync(weights, version)
            now[0] += 2

        def generate(self, requests: list[SampleRequest], sampling: Sampling) -> Samples:
            samples = super().generate(requests, sampling)
            assert read.wait(60)
            now[0] += 5
            return samples

        def close(self) -> None:
            read.set()  # nobody waits for the last batch
            super().close()

    class Training(Module):
        def on_generated(self) -> None:
            read.clear()

    monkeypatch.setattr(one_step_off, "perf_counter", clock)
    module, data = Training(byte_tokenizer), make(prompts, val_size=0, engine=Timed())
    trainer(tmp_path, max_steps=4).fit(module, datamodule=data)
    assert [batch.seconds for batch in module.seen] == [{"rollout": pytest.approx(5.0, abs=0.5), "sync": 2.0}] * 4


class Killed(Exception):
    """Stands for a signal."""


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_trains_on_the_samples_of_the_unbroken_one(
    stop: int, byte_tokenizer: Any, prompts: str, tmp_path: Path
) -> None:
    """Killed after any step, at the end of a pass (3) and in the middle of one."""
    uninterrupted = Module(byte_tokenizer, more=1)
    trainer(tmp_path, max_steps=6).fit(uninterrupted, datamodule=make(prompts))
    first, data = Module(byte_tokenizer, more=1), make(prompts)
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_last=True)
    trainer(tmp_path, max_steps=stop, callbacks=[saver]).fit(first, datamodule=data)
    second = Module(byte_tokenizer, more=1)
    trainer(tmp_path, max_steps=6).fit(second, datamodule=make(prompts), ckpt_path=str(tmp_path / "saved/last.ckpt"))
    assert list(map(content, first.seen + second.seen)) == list(map(content, uninterrupted.seen))
    assert torch.equal(second.weight, uninterrupted.weight)
    saved = torch.load(tmp_path / "saved/last.ckpt", weights_only=True)["RolloutDataModule"]["ahead"]
    assert saved["weight_version"] == stop - 1 and saved["prompts"] == [p.index for p in second.seen[0].prompts]


def test_a_run_that_dies_within_a_step_goes_on_from_its_newest_checkpoint(
    byte_tokenizer: Any, prompts: str, tmp_path: Path
) -> None:
    """Its batch has landed by then, and the one after that is under way."""

    class Dying(Module):
        def training_step(self, batch: RolloutBatch) -> None:
            if len(self.seen) == 3:
                raise Killed
            super().training_step(batch)

    uninterrupted = Module(byte_tokenizer)
    trainer(tmp_path, max_steps=6).fit(uninterrupted, datamodule=make(prompts))
    saver = PolicyCheckpoint(every_n_steps=2, dirpath=str(tmp_path / "saved"))
    with pytest.raises(Killed):
        trainer(tmp_path, max_steps=6, callbacks=[saver]).fit(Dying(byte_tokenizer), datamodule=make(prompts))
    again = Module(byte_tokenizer)
    trainer(tmp_path, max_steps=6).fit(again, datamodule=make(prompts), ckpt_path=str(tmp_path / "saved/last.ckpt"))
    assert len(again.seen) >= 3
    assert list(map(content, again.seen)) == list(map(content, uninterrupted.seen[-len(again.seen) :]))
    assert torch.equal(again.weight, uninterrupted.weight)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_of_all_ranks_make_the_batch_of_one(size: int) -> None:
    """Six prompts with two samples each; prompt i of one process is number i // N of rank i % N."""
    lengths = [1 + i % 3 for i in range(12)]
    whole: dict[str, Any] = {
        "epoch": 1,
        "prompts": [40, 7, 21, 3, 8, 30],
        "lengths": lengths,
        "ids": torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)]),
        "logprobs": torch.rand(sum(lengths)),
        "finish": ["stop", "length", "stop"] * 4,
        "weight_version": 5,
    }
    shares = [one_step_off._share(whole, rank, size) for rank in range(size)]
    assert [share["prompts"] for share in shares] == [whole["prompts"][rank::size] for rank in range(size)]
    assert set(shares[-1]["ids"].tolist()) == {2 * i + k for i in range(size - 1, 6, size) for k in range(2)}
    joined = one_step_off._join(shares)
    for name in ("ids", "logprobs"):
        assert torch.equal(joined.pop(name), whole.pop(name))
    assert joined == whole


def test_on_policy_again_from_a_checkpoint_with_a_batch_under_way(
    byte_tokenizer: Any, prompts: str, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_last=True)
    trainer(tmp_path, max_steps=2, callbacks=[saver]).fit(Module(byte_tokenizer), datamodule=make(prompts))
    module = Module(byte_tokenizer)
    last = str(tmp_path / "saved/last.ckpt")
    trainer(tmp_path, max_steps=3).fit(module, datamodule=make(prompts, lag=0), ckpt_path=last)
    assert (module.seen[0].weight_version, module.seen[0].lag) == (2, 0)


def test_an_engine_that_fails_ahead_stops_the_run_after_the_step_and_its_checkpoint(
    byte_tokenizer: Any, prompts: str, tmp_path: Path
) -> None:
    class Dying(Slow):
        def generate(self, requests: list[SampleRequest], sampling: Sampling) -> Samples:
            if self.version == 1:
                raise UserError("no server is left")
            return super().generate(requests, sampling)

    module, data = Module(byte_tokenizer), make(prompts, engine=Dying())
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_last=True)
    with pytest.raises(UserError, match="no server is left"):
        trainer(tmp_path, max_steps=5, callbacks=[saver]).fit(module, datamodule=data)
    assert len(module.seen) == 2 and data.engine.closed.is_set()  # type: ignore[attr-defined]
    saved = torch.load(tmp_path / "saved/last.ckpt", weights_only=True)
    assert saved["global_step"] == 2 and saved["RolloutDataModule"]["ahead"] == {}
    # The lost batch is generated again, with the current weights.
    again = Module(byte_tokenizer)
    last = str(tmp_path / "saved/last.ckpt")
    trainer(tmp_path, max_steps=4).fit(again, datamodule=make(prompts), ckpt_path=last)
    assert [(batch.weight_version, batch.lag) for batch in again.seen] == [(2, 0), (2, 1)]


def test_a_run_that_ends_in_an_error_does_not_wait_for_the_batch_under_way(
    byte_tokenizer: Any, prompts: str, tmp_path: Path
) -> None:
    class Failing(Module):
        def training_step(self, batch: RolloutBatch) -> None:
            raise Killed

    data = make(prompts, val_size=0)
    with pytest.raises(Killed):
        trainer(tmp_path, max_steps=5).fit(Failing(byte_tokenizer), datamodule=data)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollouts")]


def test_samples_of_other_weights_than_asked_for_are_refused(byte_tokenizer: Any, prompts: str, tmp_path: Path) -> None:
    class Stale(Slow):
        def generate(self, requests: list[SampleRequest], sampling: Sampling) -> Samples:
            samples = super().generate(requests, sampling)
            samples.weight_version -= threading.current_thread() is not self.main
            return samples

    with pytest.raises(RuntimeError, match="stale rollout: generated with weights -1, not with 0"):
        trainer(tmp_path, max_steps=5).fit(Module(byte_tokenizer), datamodule=make(prompts, engine=Stale()))


def test_which_lags_and_engines_go_together(byte_tokenizer: Any, prompts: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rollout_lag is 2: must be an integer of at least 0 and at most 1"):
        make(prompts, lag=2)

    class InProcess(Slow):
        concurrent = False

    with pytest.raises(UserError, match="rollout_lag is 1, but InProcess cannot .*--data.engine VLLMServerEngine"):
        trainer(tmp_path, max_steps=1).fit(Module(byte_tokenizer), datamodule=make(prompts, engine=InProcess()))
    trainer(tmp_path, max_steps=1).fit(Module(byte_tokenizer), datamodule=make(prompts, lag=0, engine=InProcess()))
