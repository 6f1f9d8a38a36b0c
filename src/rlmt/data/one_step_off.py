"""One-step-off rollouts: the engine draws the next batch while this one is trained on.

Right before a batch is trained on, the engine gets the policy's present weights and is sent for the next batch, so each
batch but a run's first was drawn with the weights from before the one update in between, never older ones. A checkpoint
holds the batch that is under way, once it is there, with the shares of all ranks; so a resumed run trains on the very
samples that the unbroken run would have trained on.

In the thread that draws, ranks do not speak to each other; they do where a batch is waited for, and before the next one
is sent for, so that weights change under nobody's samples.
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
class _Flight:
    """A batch under way."""

    key: tuple[int, list[int]]
    """Which prompts, see `_key`."""
    version: int
    """The policy's when it was sent for."""
    samples: Future[Samples]


class _Landing(RankState):
    """The state of a batch under way. It is written as tensors and plain data, and waited for only then.

    A run notes its state at the end of every step, and writes few of them; one that is told to end must not wait for a
    batch that its checkpoint does not hold.

    Args:
        flight: the batch; None where there is none.
    """

    def __init__(self, flight: _Flight | None) -> None:
        self._flight = flight

    def __deepcopy__(self, memo: dict[int, Any]) -> _Landing:
        return self

    def __reduce__(self) -> Any:
        """Pickles as a dictionary, which is empty where there is no batch or it failed."""
        return OrderedDict(self._plain()).__reduce__()

    def of_all_ranks(self) -> Any:
        """The batch of all ranks; empty where the share of one is missing."""
        if collectives.world_size() == 1:
            return self
        shares = collectives.all_gather_object(self._plain())
        return _joined(shares) if all(shares) else {}

    def _plain(self) -> dict[str, Any]:
        flight = self._flight
        if flight is None or flight.samples.exception() is not None:
            return {}
        samples = flight.samples.result()
        return {
            "epoch": flight.key[0],
            "prompts": flight.key[1],
            "lengths": [len(ids) for ids in samples.completion_ids],
            "ids": torch.tensor([i for ids in samples.completion_ids for i in ids], dtype=torch.int32),
            "logprobs": torch.tensor([x for row in samples.logprobs for x in row], dtype=torch.float32),
            "finish": [reason.value for reason in samples.finish],
            "weight_version": samples.weight_version,
        }


def _joined(shares: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of one process's batch of those of all ranks: rank r of N has every Nth prompt from r on."""
    groups = [group for row in zip(*map(_groups, shares), strict=True) for group in row]
    return _with_groups(shares[0], groups)


def _share(state: dict[str, Any], rank: int, size: int) -> dict[str, Any]:
    """A rank's part of a state."""
    return _with_groups(state, _groups(state)[rank::size])


_Group = tuple[int, list[tuple[int, Tensor, Tensor, str]]]
"""Number of a prompt, and its samples: length, tokens, log-probs, and why it ended."""


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
    """The one batch that is drawn ahead."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._flight: _Flight | None = None
        self._waited = 0.0

    def draw(
        self,
        batch: PromptBatch,
        following: PromptBatch,
        source: PolicySource,
        engine: Engine,
        sampling: Sampling,
        group_size: int,
        seed: int,
    ) -> RolloutBatch:
        """Waits for the rollouts of a batch and sends for those of the following one, with the present weights.

        Every rank has to call it.

        The first batch of a run, for which nothing was sent, is drawn here, with the present weights as well.

        Args:
            batch: P prompts.
            following: the prompts of the next call.
            source: the module that holds the policy.
            engine: a started engine that is `concurrent`.
            sampling: how to sample.
            group_size: G samples a prompt.
            seed: as for `rlmt.data.generation.draw`.

        Returns:
            P·G samples on the CPU; `lag` tells how many updates of the policy their weights are behind, `off_policy`
            whether any; `rollout` seconds are those that training waited.

        Raises:
            RuntimeError: the engine broke its contract.
            UserError: it could not sample; on every rank where it could not on one.
        """
        requests = sample_requests(batch, source, group_size, seed)
        self.settle()
        flight = collectives.run_on_all_ranks(lambda: self._landed(batch))
        if not all(collectives.all_gather_object(flight is not None)):
            flight = None  # a step has samples of the same weights on all ranks
        began = perf_counter()
        sync_weights(engine, source)
        synced = perf_counter()
        version = source.policy_version
        samples, drawn_with = flight or (
            collectives.run_on_all_ranks(lambda: engine.generate(requests, sampling)),
            version,
        )
        waited, self._waited = self._waited + perf_counter() - synced, 0.0
        ahead = sample_requests(following, source, group_size, seed)
        self._send(following, version, partial(engine.generate, ahead, sampling))
        seconds = {"rollout": waited, "sync": synced - began}
        rollouts = to_rollout_batch(batch, requests, samples, sampling, drawn_with, seconds)
        return replace(rollouts, lag=version - drawn_with, off_policy=version != drawn_with)

    def _landed(self, batch: PromptBatch) -> tuple[Samples, int] | None:
        """The samples that were sent for, and the version of their weights; None if they are not of these prompts."""
        flight, self._flight = self._flight, None
        if flight is None:
            return None
        samples = flight.samples.result()
        return (samples, flight.version) if flight.key == _key(batch) else None

    def _send(self, batch: PromptBatch, version: int, draw: Callable[[], Samples]) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "rollouts")
        self._flight = _Flight(_key(batch), version, self._thread.submit(draw))

    def settle(self) -> None:
        """Waits until the engine has drawn what it was sent for on every rank, so that it can be used otherwise."""
        began = perf_counter()
        if self._flight is not None:
            self._flight.samples.exception()
        collectives.all_gather_object(None)
        self._waited += perf_counter() - began

    def state_dict(self) -> Any:
        """The batch under way, for a checkpoint; see `_Landing`."""
        return _Landing(self._flight)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts this rank's share of a saved batch back where it was.

        Args:
            state: what a checkpoint holds.
        """
        self._flight = None
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
        self._flight = _Flight((state["epoch"], list(state["prompts"])), state["weight_version"], samples)

    def close(self) -> None:
        """Waits for the thread to end, which an engine that was closed does not delay."""
        self._flight = None
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None


def _key(batch: PromptBatch) -> tuple[int, list[int]]:
    """Which prompts of which pass a batch has."""
    return batch.epoch, [prompt.index for prompt in batch.prompts]
