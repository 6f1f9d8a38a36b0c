"""An engine and a module for tests of RolloutDataModule with a real Trainer."""

import random
from types import SimpleNamespace

import torch
from lightning.pytorch import LightningModule, Trainer

from rlmt.data import RolloutDataModule
from rlmt.engines.base import Engine
from rlmt.formats.thinking import ThinkingFormat
from rlmt.types import FinishReason, RolloutBatch, Samples

FRAME = 4  # tokens around a one-turn prompt: <s> <|user|> … </s> <|assistant|>


class FakeEngine(Engine):
    """Samples tokens from a hash of prompt, seed and the synced weight alone; records every call."""

    def __init__(self):
        self.calls = []
        self.lag = 0
        self.weight = None

    def check(self):
        self.calls.append("check")

    def start(self, policy, tokenizer, max_model_len, dtype):
        assert dtype is torch.float32
        assert not torch.is_autocast_enabled("cpu")
        assert self.version is None
        self.calls.append(("start", max_model_len))

    def sync(self, weights, version, adapter=None):
        assert adapter is None
        self.weight = {name: tensor.item() for name, tensor in weights}["weight"]
        self.version = version
        self.calls.append(("sync", version))

    def generate(self, requests, sampling):
        assert not torch.is_autocast_enabled("cpu")  # an engine computes in its own dtype
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
    """A module with one weight, trained on the tokens of its batches; `seen` records every batch by stage."""

    max_positions = 100
    compute_dtype = torch.float32

    def __init__(self, tokenizer, format="think", die_after=None, more=(0,)):
        super().__init__()
        self.automatic_optimization = False
        self.tokenizer = tokenizer
        self.format = ThinkingFormat(format)
        self.stop_token_ids = self.format.stop_token_ids(tokenizer)
        self.policy = torch.nn.Module()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("updates", torch.zeros(1, dtype=torch.int64))
        self.seen = {"train": [], "more": [], "val": [], "test": [], "predict": []}
        self.die_after = die_after
        self.more = more  # number of further batches that each step generates, in a cycle over steps

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


def make(prompts, **options):
    options = {"batch_size": 6, "group_size": 2, "val_size": 2, "max_prompt_tokens": 20, "max_new_tokens": 10} | options
    return RolloutDataModule(prompts, options.pop("engine", None) or FakeEngine(), **options)


def trainer(tmp_path, **options):
    defaults = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults |= {"enable_checkpointing": "callbacks" in options, "default_root_dir": tmp_path}
    return Trainer(**(defaults | options))


def attached(data, module, world_size=1, rank=0, stage="fit"):
    """The data module as one rank of several sets it up, without processes."""
    data.trainer = SimpleNamespace(lightning_module=module, world_size=world_size, global_rank=rank)
    data.setup(stage)
    return data
