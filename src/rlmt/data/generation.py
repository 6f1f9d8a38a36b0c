"""From prompts to rollouts: what the data module asks of the policy, and one checked call of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, replace
from time import perf_counter
from typing import Any, ClassVar, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlmt.data.sampler import sample_seed
from rlmt.distributed import collectives
from rlmt.engines.base import Engine
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.types import AdapterWeights, Prompt, PromptBatch, RolloutBatch, SampleRequest, Samples, Sampling


class PolicySource(Protocol):
    """What the data module reads from the LightningModule that it is run with."""

    @property
    def format(self) -> ThinkingFormat:
        """How prompts are rendered and samples stop."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer; there before any weights are loaded."""

    @property
    def max_positions(self) -> int:
        """The policy's context length in tokens; there before any weights are loaded."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Number format of the policy's forward."""

    @property
    def policy(self) -> PreTrainedModel | None:
        """The policy; None until the module is configured, set by the first batch."""

    @property
    def policy_version(self) -> int:
        """Counts the policy's updates."""

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """All weights under their Hugging Face names, with an adapter the frozen base's; collective where sharded."""

    def policy_adapter(self) -> AdapterWeights | None:
        """The adapter that makes the policy of the frozen base, or None."""


class LoadedPrompts(PromptBatch):
    """A PromptBatch that Lightning's precision plugins leave alone.

    They walk through the fields of every dataclass in a batch, looking for tensors to cast, and fail on frozen ones
    (`bf16-true` does). This one shows them no fields.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedPrompts:
        return self


def recorded_prompts(prompts: list[Prompt], source: PolicySource, engine: Engine, name: str) -> list[Prompt]:
    """The prompts that the engine can sample from: all of them, unless it replays.

    Args:
        prompts: of one set.
        source: the module that holds the policy.
        engine: after its checks.
        name: what to call the set.

    Raises:
        UserError: there is none.
    """
    if not engine.replays:
        return prompts
    known = [p for p in prompts if engine.knows(source.format.render(p.messages, source.tokenizer))]
    if prompts and not known:
        raise UserError(
            f"none of the {len(prompts):,} prompts of {name} was recorded: give --data.prompts and --data.system of "
            "the run that recorded, or another --data.engine"
        )
    if len(known) < len(prompts):
        missing = len(prompts) - len(known)
        rank_zero_info(f"dropped {missing:,} of {len(prompts):,} prompts that were not recorded ({name})")
    return known


def generate(
    batch: PromptBatch, source: PolicySource, engine: Engine, sampling: Sampling, group_size: int, seed: int
) -> RolloutBatch:
    """Samples every prompt with the policy's present weights, syncing the engine first if the policy moved.

    An engine that replays is not synced, and its samples are marked as off-policy.

    Args:
        batch: P prompts.
        source: the module that holds the policy.
        engine: a started engine.
        sampling: how to sample.
        group_size: G samples a prompt.
        seed: seed of the run; with epoch, prompt and sample number it makes each sample's seed.

    Returns:
        P·G samples on the CPU, with the seconds that `sync` and `rollout` took.

    Raises:
        RuntimeError: the engine broke its contract, e.g. sampled with other weights than the policy's.
        UserError: it could not sample; on every rank where it could not on one.
    """
    requests = sample_requests(batch, source, group_size, seed)
    version = source.policy_version
    began = perf_counter()
    if not engine.replays:
        sync_weights(engine, source)
    synced = perf_counter()
    samples = collectives.run_on_all_ranks(lambda: engine.generate(requests, sampling))
    seconds = {"rollout": perf_counter() - synced, "sync": synced - began}
    rollouts = to_rollout_batch(
        batch, requests, samples, sampling, samples.weight_version if engine.replays else version, seconds
    )
    return replace(rollouts, off_policy=True) if engine.replays else replace(rollouts, lag=0)


def sample_requests(batch: PromptBatch, source: PolicySource, group_size: int, seed: int) -> list[SampleRequest]:
    """What to ask an engine for: each prompt as tokens, with a seed for each of its `group_size` samples."""
    return [
        SampleRequest(
            prompt_ids=source.format.render(prompt.messages, source.tokenizer),
            seeds=[sample_seed(seed, batch.epoch, prompt.index, sample) for sample in range(group_size)],
            epoch=batch.epoch,
        )
        for prompt in batch.prompts
    ]


def sync_weights(engine: Engine, source: PolicySource) -> None:
    """Gives the engine the policy's present weights, if it holds others; every rank has to call it."""
    if engine.version == source.policy_version:
        engine.renew()
    else:
        engine.sync(source.policy_weights(), source.policy_version, source.policy_adapter())


def to_rollout_batch(
    batch: PromptBatch,
    requests: list[SampleRequest],
    samples: Samples,
    sampling: Sampling,
    version: int,
    seconds: dict[str, float],
) -> RolloutBatch:
    """Prompts and samples together, once they are known to belong together.

    Args:
        batch: P prompts.
        requests: made of them.
        samples: what an engine returned for those.
        sampling: how they were drawn.
        version: of the weights that have to have drawn them.
        seconds: that `rollout` and `sync` took.

    Raises:
        RuntimeError: the engine broke its contract.
    """
    group_size = len(requests[0].seeds)
    _check(samples, len(requests) * group_size, version)
    return RolloutBatch(
        prompts=batch.prompts,
        group_size=group_size,
        prompt_ids=[request.prompt_ids for request in requests],
        completion_ids=samples.completion_ids,
        engine_logprobs=_flat(samples.logprobs),
        finish=samples.finish,
        sampling=sampling,
        weight_version=samples.weight_version,
        epoch=batch.epoch,
        ref_logprobs=None if samples.ref_logprobs is None else _flat(samples.ref_logprobs),
        seconds=seconds,
    )


def _flat(rows: list[list[float]]) -> Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=torch.float32)


def _check(samples: Samples, count: int, version: int) -> None:
    """Raises RuntimeError unless there is a sample for every seed, drawn with the weights of this version."""
    if samples.weight_version != version:
        raise RuntimeError(f"stale rollout: drawn with weights {samples.weight_version}, not with {version}")
    sizes = len(samples.completion_ids), len(samples.logprobs), len(samples.finish)
    if sizes != (count, count, count):
        raise RuntimeError(f"the engine returned {sizes} completions, log-probs and reasons for {count} seeds")
    for ids, logprobs in zip(samples.completion_ids, samples.logprobs, strict=True):
        if not ids or len(ids) != len(logprobs):
            raise RuntimeError(f"the engine returned {len(ids)} tokens with {len(logprobs)} log-probs for a sample")
