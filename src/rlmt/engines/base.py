"""The Engine seam: whatever draws samples from the policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.types import AdapterWeights, SampleRequest, Samples, Sampling


class Engine(ABC):
    """Draws samples with the weights it was last given.

    Order of calls: the checks before any model is loaded, `start` once the policy exists, then `sync` and
    `generate` as often as needed, `close` at the end. The constructor only stores options.
    """

    version: int | None = None
    """Version of the weights held; None until the first sync, or after the weights were given up to save memory."""
    replays: bool = False
    """Whether it returns recorded samples of the prompts that it `knows`. Other weights than the policy's drew them, so
    it is not synced."""
    concurrent: bool = False
    """Whether `generate` may run in another thread while the policy is trained; `close` then breaks it off."""

    def check(self) -> None:
        """Raises UserError, naming what to install, when this engine cannot run on this machine."""

    def check_run(
        self,
        format: ThinkingFormat,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        group_size: int,
        max_model_len: int,
    ) -> None:
        """Raises UserError, naming the option to change, when this engine cannot sample as the run asks for."""

    def knows(self, prompt_ids: Sequence[int]) -> bool:
        """Whether this prompt can be sampled from."""
        return True

    def check_policy(self, config: PretrainedConfig) -> None:
        """Raises UserError, naming the option to change, when this engine cannot hold such a policy.

        Args:
            config: the policy's.
        """

    def check_adapter(self, config: dict[str, Any]) -> None:
        """Raises UserError, with the reason and the cure, when this engine cannot serve such an adapter.

        Args:
            config: PEFT's adapter_config.json as plain data.
        """

    @abstractmethod
    def start(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_model_len: int, dtype: torch.dtype
    ) -> None:
        """Brings the engine up for a policy of this shape; its weights come by `sync`.

        Args:
            policy: the trainer's policy, for its config and device.
            tokenizer: the policy's tokenizer.
            max_model_len: longest prompt + completion in tokens.
            dtype: number format that the trainer's forward runs in.
        """

    @abstractmethod
    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int, adapter: AdapterWeights | None = None) -> None:
        """Takes over the policy's weights and drops every stale cache; by all ranks at once.

        Args:
            weights: all of the policy's weights (Hugging Face names, as in `state_dict()`); with an adapter the
                frozen base's, which never change and are read only where the engine does not hold them. Made as they
                are read.
            version: version of these weights.
            adapter: what makes the policy of the base; None: the weights are the policy's own.
        """

    def renew(self) -> None:
        """Gives the weights that it holds to whatever of it has lost them; by all ranks at once, before `generate`."""

    @abstractmethod
    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Samples:
        """Samples every request once per seed. A sample depends on its prompt, seed and the weights alone.

        Each rank calls it for its own share. Those of a concurrent engine do not wait for each other within, where it
        may run in another thread; of others several may share an engine, so all ranks call it together.
        """

    def close(self) -> None:
        """Gives back memory and processes; harmless when called twice or before `start`."""


def max_completion_tokens(prompt_tokens: int, max_model_len: int) -> int:
    """Tokens that fit behind a prompt.

    Raises:
        UserError: not one does.
    """
    if prompt_tokens >= max_model_len:
        raise UserError(
            f"a prompt of {prompt_tokens} tokens leaves no room for a completion within {max_model_len} tokens: "
            "lower data.max_prompt_tokens or raise data.max_new_tokens"
        )
    return max_model_len - prompt_tokens
