"""From prompts to rollouts: what generation requires of the policy's module, and one checked call of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, replace
from time import perf_counter
from typing import Any, ClassVar, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rlmt import progress
from rlmt.annotations import PreTrainedModel, PreTrainedTokenizerBase
from rlmt.data.sampler import sample_seed
from rlmt.distributed import collectives
from rlmt.engines.base import Engine
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.types import AdapterWeights, Prompt, PromptBatch, RolloutBatch, SampleRequest, Samples, Sampling


class PolicySource(Protocol):
    """What generation reads from the LightningModule that trains the policy."""

    @property
    def format(self) -> ThinkingFormat:
        """How prompts are rendered and where samples stop."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer; available before weights are loaded."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Token ids that end a sample; available before weights are loaded."""

    @property
    def max_positions(self) -> int:
        """The policy's context length in tokens; available before weights are loaded."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the policy's forward pass."""

    @property
    def policy(self) -> PreTrainedModel | None:
        """The policy; None until `configure_model`."""

    @property
    def policy_version(self) -> int:
        """Number of updates of the policy."""

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """All weights under their Hugging Face names, with an adapter the frozen base's; collective where sharded."""

    def policy_adapter(self) -> AdapterWeights | None:
        """The adapter of the policy, or None."""


class LoadedPrompts(PromptBatch):
    """A PromptBatch that Lightning passes on unchanged.

    Lightning walks through the fields of every dataclass in a batch, to cast and move tensors, and fails on frozen
    ones. This class shows it no fields.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedPrompts:
        return self


def recorded_prompts(prompts: list[Prompt], source: PolicySource, engine: Engine, name: str) -> list[Prompt]:
    """The prompts that the engine can generate for: all of them, unless it replays recorded samples.

    Args:
        prompts: Prompts of one set.
        source: The module that trains the policy.
        engine: The engine, after its checks.
        name: Name of the set, for messages.

    Raises:
        UserError: None of the prompts was recorded.
    """
    if not engine.replays:
        return prompts
    known = [p for p in prompts if engine.has_prompt(source.format.render(p.messages, source.tokenizer))]
    if prompts and not known:
        raise UserError(
            f"--data.engine.path has none of the {len(prompts):,} prompts of {name}: set --data.prompts and "
            "--data.system as in the run that recorded, or use another --data.engine."
        )
    if len(known) < len(prompts):
        missing = len(prompts) - len(known)
        rank_zero_info(f"dropped {missing:,} of {len(prompts):,} prompts that were not recorded ({name})")
    return known


def generate(
    prompts: PromptBatch, source: PolicySource, engine: Engine, sampling: Sampling, group_size: int, seed: int
) -> RolloutBatch:
    """Generates rollouts with the current weights of the policy, and syncs the engine first if the policy was updated.

    An engine that replays is not synced, and its samples are marked as off-policy.

    Args:
        prompts: P prompts.
        source: The module that trains the policy.
        engine: A started engine.
        sampling: Sampling parameters.
        group_size: G samples per prompt.
        seed: Seed of the run; with epoch, prompt and sample number it makes the seed of each sample.

    Returns:
        P·G samples on the CPU, with the seconds of `sync` and `rollout`.

    Raises:
        RuntimeError: The engine violated its contract, e.g. sampled with other weights than the policy's.
        UserError: The engine cannot generate; raised on every rank if it fails on one.
    """
    requests = sample_requests(prompts, source, group_size, seed)
    version = source.policy_version
    began = perf_counter()
    if not engine.replays:
        progress.report("syncing weights")
        sync_weights(engine, source)
    synced = perf_counter()
    progress.report("sampling", 0, len(requests) * group_size)
    samples = collectives.run_on_all_ranks(lambda: engine.generate(requests, sampling))
    seconds = {"rollout": perf_counter() - synced, "sync": synced - began}
    expected = samples.weight_version if engine.replays else version
    rollouts = to_rollout_batch(prompts, requests, samples, sampling, expected, seconds)
    return replace(rollouts, off_policy=True) if engine.replays else replace(rollouts, lag=0)


def sample_requests(prompts: PromptBatch, source: PolicySource, group_size: int, seed: int) -> list[SampleRequest]:
    """Renders each prompt as tokens, with a seed for each of its `group_size` samples."""
    return [
        SampleRequest(
            prompt_ids=source.format.render(prompt.messages, source.tokenizer),
            seeds=[sample_seed(seed, prompts.epoch, prompt.index, sample) for sample in range(group_size)],
            epoch=prompts.epoch,
        )
        for prompt in prompts.prompts
    ]


def sync_weights(engine: Engine, source: PolicySource) -> None:
    """Gives the engine the current weights of the policy if it has others. All ranks have to call it."""
    if engine.version == source.policy_version:
        engine.reload_lost_weights()  # an engine that cannot has no version any more
    if engine.version != source.policy_version:
        engine.sync(source.policy_weights(), source.policy_version, source.policy_adapter())


def to_rollout_batch(
    prompts: PromptBatch,
    requests: list[SampleRequest],
    samples: Samples,
    sampling: Sampling,
    version: int,
    seconds: dict[str, float],
) -> RolloutBatch:
    """Joins prompts and samples, after a check that they belong together.

    Args:
        prompts: P prompts.
        requests: Requests for the prompts.
        samples: What the engine returned for the requests.
        sampling: Sampling parameters.
        version: Expected version of the weights that generated the samples.
        seconds: Seconds of `rollout` and `sync`.

    Raises:
        RuntimeError: The engine violated its contract.
    """
    group_size = len(requests[0].seeds)
    _check(samples, len(requests) * group_size, version)
    return RolloutBatch(
        prompts=prompts.prompts,
        group_size=group_size,
        prompt_ids=[request.prompt_ids for request in requests],
        completion_ids=samples.completion_ids,
        engine_logprobs=_flat(samples.logprobs),
        finish=samples.finish,
        sampling=sampling,
        weight_version=samples.weight_version,
        epoch=prompts.epoch,
        ref_logprobs=None if samples.ref_logprobs is None else _flat(samples.ref_logprobs),
        seconds=seconds,
    )


def _flat(rows: list[list[float]]) -> Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=torch.float32)


def _check(samples: Samples, count: int, version: int) -> None:
    """Raises RuntimeError unless there is a sample for every seed, generated with the weights of this version."""
    if samples.weight_version != version:
        raise RuntimeError(f"stale rollout: generated with weights {samples.weight_version}, not with {version}")
    sizes = len(samples.completion_ids), len(samples.logprobs), len(samples.finish)
    if sizes != (count, count, count):
        raise RuntimeError(f"the engine returned {sizes} completions, log-probs and finish reasons for {count} seeds")
    for ids, logprobs in zip(samples.completion_ids, samples.logprobs, strict=True):
        if not ids or len(ids) != len(logprobs):
            raise RuntimeError(f"the engine returned {len(ids)} tokens with {len(logprobs)} log-probs for a sample")
