"""One-step-off rollouts: the engine generates the next batch while this one is trained on.

Before a batch is trained on, the engine gets the current weights of the policy and starts on the next batch. So each
batch but a run's first was generated with the weights from before one update, never older ones. A checkpoint holds the
batch that is being generated, once it is complete, with the shares of all ranks; a resumed run trains on the very
samples that the unbroken run would have trained on.

Ranks do not communicate in the thread that generates. They do where a batch is waited for, and before the next one is
started, so that no engine gets new weights while another rank still generates.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from rlmt.checkpointing.snapshot import RankState
from rlmt.data.generation import PolicySource, sample_requests, sync_weights, to_rollout_batch
from rlmt.distributed import collectives
from rlmt.engines.base import Engine
from rlmt.types import FinishReason, PromptBatch, RolloutBatch, Samples, Sampling


@dataclass
class _Pending:
    """A batch that is being generated."""

    key: tuple[int, list[int]]
    """Epoch and prompts, see `_key`."""
    version: int
    """Version of the policy that generates it."""
    samples: Future[Samples]


class _PendingState(RankState):
    """State of a pending batch. It waits for the batch and converts it to tensors and plain data when it is pickled.

    A run takes a snapshot of its state after every step and writes few of them; a run that receives a signal must not
    wait for a batch that its checkpoint does not hold.

    Args:
        pending: The batch; None if there is none.
    """

    def __init__(self, pending: _Pending | None) -> None:
        self._pending = pending

    def __deepcopy__(self, memo: dict[int, Any]) -> _PendingState:
        return self

    def __reduce__(self) -> Any:
        """Pickles as a dictionary, which is empty if there is no batch or its generation failed."""
        return OrderedDict(self._plain()).__reduce__()

    def merge_ranks(self) -> Any:
        """The batch of all ranks; empty if the share of one is missing."""
        if collectives.world_size() == 1:
            return self
        shares = collectives.all_gather_object(self._plain())
        return _join(shares) if all(shares) else {}

    def _plain(self) -> dict[str, Any]:
        pending = self._pending
        if pending is None or pending.samples.exception() is not None:
            return {}
        samples = pending.samples.result()
        return {
            "epoch": pending.key[0],
            "prompts": pending.key[1],
            "lengths": [len(ids) for ids in samples.completion_ids],
            "ids": torch.tensor([i for ids in samples.completion_ids for i in ids], dtype=torch.int32),
            "logprobs": torch.tensor([x for row in samples.logprobs for x in row], dtype=torch.float32),
            "finish": [reason.value for reason in samples.finish],
            "weight_version": samples.weight_version,
        }


def _join(shares: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of the whole batch from the shares of all ranks: rank r of N has every Nth prompt from r on."""
    groups = [group for row in zip(*map(_groups, shares), strict=True) for group in row]
    return _with_groups(shares[0], groups)


def _share(state: dict[str, Any], rank: int, size: int) -> dict[str, Any]:
    """The share of one rank in the state of a batch."""
    return _with_groups(state, _groups(state)[rank::size])


_Group = tuple[int, list[tuple[int, Tensor, Tensor, str]]]
"""Number of a prompt, and its samples: length, tokens, log-probs and finish reason."""


def _groups(state: dict[str, Any]) -> list[_Group]:
    lengths, prompts = state["lengths"], state["prompts"]
    parts = state["ids"].split(lengths), state["logprobs"].split(lengths)
    samples = list(zip(lengths, *parts, state["finish"], strict=True))
    size = len(samples) // len(prompts)
    return [(prompt, samples[i * size : (i + 1) * size]) for i, prompt in enumerate(prompts)]


def _with_groups(state: dict[str, Any], groups: Sequence[_Group]) -> dict[str, Any]:
    lengths, ids, logprobs, finish = zip(*(sample for _, samples in groups for sample in samples), strict=True)
    return {
        "epoch": state["epoch"],
        "prompts": [prompt for prompt, _ in groups],
        "lengths": list(lengths),
        "ids": torch.cat(ids),
        "logprobs": torch.cat(logprobs),
        "finish": list(finish),
        "weight_version": state["weight_version"],
    }


class OneStepOff:
    """Generates one batch ahead, in a thread."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._pending: _Pending | None = None
        self._waited = 0.0

    def generate(
        self,
        prompts: PromptBatch,
        following: PromptBatch,
        source: PolicySource,
        engine: Engine,
        sampling: Sampling,
        group_size: int,
        seed: int,
    ) -> RolloutBatch:
        """Waits for the rollouts of a batch, and starts the following batch with the current weights.

        All ranks have to call it. A run's first batch is generated here, with the current weights as well.

        Args:
            prompts: P prompts.
            following: The prompts of the next call.
            source: The module that trains the policy.
            engine: A started engine that is `concurrent`.
            sampling: Sampling parameters.
            group_size: G samples per prompt.
            seed: Seed of the run.

        Returns:
            P·G samples on the CPU; `lag` is the number of policy updates since their weights, `off_policy` whether
            there was one; the seconds of `rollout` are those that training waited.

        Raises:
            RuntimeError: The engine violated its contract.
            UserError: The engine cannot generate; raised on every rank if it fails on one.
        """
        requests = sample_requests(prompts, source, group_size, seed)
        self.wait()
        pending = collectives.run_on_all_ranks(lambda: self._result(prompts))
        if not all(collectives.all_gather_object(pending is not None)):
            pending = None  # the samples of a step have the same weights on all ranks
        began = perf_counter()
        sync_weights(engine, source)
        synced = perf_counter()
        version = source.policy_version
        if pending is None:
            pending = collectives.run_on_all_ranks(lambda: engine.generate(requests, sampling)), version
        samples, generated_with = pending
        waited, self._waited = self._waited + perf_counter() - synced, 0.0
        ahead = sample_requests(following, source, group_size, seed)
        self._start(following, version, partial(engine.generate, ahead, sampling))
        seconds = {"rollout": waited, "sync": synced - began}
        rollouts = to_rollout_batch(prompts, requests, samples, sampling, generated_with, seconds)
        return replace(rollouts, lag=version - generated_with, off_policy=version != generated_with)

    def _result(self, prompts: PromptBatch) -> tuple[Samples, int] | None:
        """The pending samples and the version of their weights; None if they are of other prompts."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        samples = pending.samples.result()
        return (samples, pending.version) if pending.key == _key(prompts) else None

    def _start(self, prompts: PromptBatch, version: int, work: Callable[[], Samples]) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "rollouts")
        self._pending = _Pending(_key(prompts), version, self._thread.submit(work))

    def wait(self) -> None:
        """Waits until no rank generates, so that the engine can be used otherwise. All ranks have to call it."""
        began = perf_counter()
        if self._pending is not None:
            self._pending.samples.exception()
        collectives.all_gather_object(None)
        self._waited += perf_counter() - began

    def state_dict(self) -> Any:
        """The pending batch, for a checkpoint."""
        return _PendingState(self._pending)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores this rank's share of a saved batch.

        Args:
            state: State in a checkpoint.
        """
        self._pending = None
        if not state or len(state["prompts"]) % collectives.world_size():
            return
        state = _share(state, collectives.rank(), collectives.world_size())
        samples: Future[Samples] = Future()
        samples.set_result(
            Samples(
                completion_ids=[part.tolist() for part in state["ids"].split(state["lengths"])],
                logprobs=[part.tolist() for part in state["logprobs"].split(state["lengths"])],
                finish=[FinishReason(reason) for reason in state["finish"]],
                weight_version=state["weight_version"],
            )
        )
        self._pending = _Pending((state["epoch"], list(state["prompts"])), state["weight_version"], samples)

    def close(self) -> None:
        """Waits for the thread to end; an engine that was closed ends it at once."""
        self._pending = None
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None


def _key(prompts: PromptBatch) -> tuple[int, list[int]]:
    """Epoch and row numbers of a batch."""
    return prompts.epoch, [prompt.index for prompt in prompts.prompts]
