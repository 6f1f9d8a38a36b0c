"""What the modules that train a policy have in common."""

from __future__ import annotations

from functools import cached_property

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlmt.formats.thinking import ThinkingFormat
from rlmt.models import loading
from rlmt.modules.checkpoints import check_same_format


class PolicyOwner:
    """A policy and the format that it thinks in: what is known of them before the weights are read."""

    policy_path: str
    """Folder or hub name of the policy to start from."""
    format: ThinkingFormat
    policy: PreTrainedModel | None

    @cached_property
    def policy_config(self) -> PretrainedConfig:
        """The policy's configuration, read without its weights."""
        return loading.load_config(self.policy_path)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        return loading.load_tokenizer(self.policy_path)

    @property
    def max_positions(self) -> int:
        """Longest sequence the policy can take, in tokens."""
        return loading.max_positions(self.policy_config)

    @property
    def _policy(self) -> PreTrainedModel:
        assert self.policy is not None, "configure_model has not run"
        return self.policy

    def check_format(self, saved: ThinkingFormat, where: str) -> None:
        """Refuses to go on with another format than a checkpoint's.

        Args:
            saved: the checkpoint's format.
            where: what to call the checkpoint.

        Raises:
            UserError: the formats differ.
        """
        check_same_format(self.format, saved, where)
