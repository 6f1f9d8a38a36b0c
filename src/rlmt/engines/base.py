"""The Engine interface, and helpers that its implementations share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlmt.annotations import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.types import AdapterWeights, SampleRequest, Samples, Sampling


class Engine(ABC):
    """Generates samples with the weights of its last sync.

    Order of calls: the checks before any model is loaded, `start` once the policy exists, then `sync` and `generate` as
    often as needed, `close` at the end. The constructor only stores options.
    """

    version: int | None = None
    """Version of the loaded weights; None before the first sync, and after the engine dropped them to save memory."""
    replays: bool = False
    """Whether it returns recorded samples of the prompts that it `knows`. They come from other weights than the
    policy's, so it is not synced."""
    rounds_weights: bool = False
    """Whether it samples from the policy's weights in fewer bits than the trainer computes with."""
    shares_policy: bool = False
    """Whether it generates with the policy's own modules. Others read no weights at the start, so the policy may be on
    the meta device, which stands for the machine's accelerator."""
    concurrent: bool = False
    """Whether `generate` may run in another thread while the policy is trained; `close` then cancels it."""

    def check(self) -> None:
        """Raises UserError, naming what to install, when this engine cannot run on this machine."""

    def check_sampling(
        self,
        format: ThinkingFormat,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        group_size: int,
        max_model_len: int,
    ) -> None:
        """Checks that this engine supports the run's sampling settings.

        Args:
            format: The run's thinking format.
            tokenizer: The policy's tokenizer.
            sampling: The run's temperature, limits and stops.
            group_size: Samples per prompt.
            max_model_len: Longest prompt + completion in tokens.

        Raises:
            UserError: The engine does not support them; the message names the option to change.
        """

    def has_prompt(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the engine can sample from this prompt."""
        return True

    def check_policy(self, config: PretrainedConfig) -> None:
        """Checks that this engine supports the policy's architecture.

        Args:
            config: The policy's configuration.

        Raises:
            UserError: The engine does not support it; the message names the option to change.
        """

    def check_adapter(self, config: dict[str, Any]) -> None:
        """Checks that this engine can serve the policy's adapter.

        Args:
            config: PEFT's adapter_config.json as plain data.

        Raises:
            UserError: The engine cannot serve it; the message holds the reason and the fix.
        """

    @abstractmethod
    def start(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_model_len: int, dtype: torch.dtype
    ) -> None:
        """Starts the engine for a policy of this architecture; `sync` brings the weights.

        Args:
            policy: The trainer's policy, for its config and device; see `shares_policy`.
            tokenizer: The policy's tokenizer.
            max_model_len: Longest prompt + completion in tokens.
            dtype: Dtype of the trainer's forward.
        """

    @abstractmethod
    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int, adapter: AdapterWeights | None = None) -> None:
        """Loads the policy's weights and drops every stale cache; collective over ranks.

        Args:
            weights: All weights of the policy (Hugging Face names, as in `state_dict()`). With an adapter, those of the
                frozen base, which never change and are read only where the engine does not hold them. Each tensor is
                made when it is read.
            version: Version of these weights.
            adapter: The adapter on top of the base; None when the weights are the policy's own.
        """

    def reload_lost_weights(self) -> None:
        """Reloads the current weights where a part of the engine has lost them; collective over ranks.

        Called before `generate`. An engine that cannot do so without the policy sets `version` to None.
        """

    @abstractmethod
    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Samples:
        """Samples every request once per seed. A sample depends on its prompt, seed and the weights alone.

        Each rank calls it with its own requests. The call has no collective operations in concurrent engines, where it
        may run in another thread. In other engines several ranks may share an engine, so all ranks call it together.
        """

    def close(self) -> None:
        """Releases memory and processes; harmless when called twice or before `start`."""


def max_completion_tokens(prompt_tokens: int, max_model_len: int) -> int:
    """Number of tokens that fit after a prompt.

    Raises:
        UserError: No token fits.
    """
    if prompt_tokens >= max_model_len:
        raise UserError(
            f"a prompt of {prompt_tokens} tokens leaves no room for a completion within {max_model_len} tokens: "
            "lower --data.max_prompt_tokens or raise --data.max_new_tokens."
        )
    return max_model_len - prompt_tokens
