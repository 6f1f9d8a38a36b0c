"""The critic of PPO: a value for each state in which a token is sampled."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlmt.algorithms.base import CriticOptions
from rlmt.errors import UserError
from rlmt.models import loading
from rlmt.models.adapters import CRITIC, LoRA, use_adapter
from rlmt.models.micro_batch import MicroBatch, hidden_states
from rlmt.rewards.classifier import ClassifierReward


class Critic(nn.Module):
    """A value head on a backbone of its own or on the policy's.

    Args:
        backbone: a decoder without output projection.
        shared: whether it is the policy's; then its weights are none of the critic's, neither in `parameters` nor in
            `state_dict`, but for the adapter named "critic" where it has one.
    """

    def __init__(self, backbone: PreTrainedModel, shared: bool = False) -> None:
        super().__init__()
        self.backbone: PreTrainedModel
        if shared:
            object.__setattr__(self, "backbone", backbone)  # past nn.Module, which would register it as a submodule
        else:
            self.backbone = backbone
        self._adapter = [p for name, p in backbone.named_parameters() if shared and f".{CRITIC}." in name]
        self.moves_policy = shared and not self._adapter
        """Whether its gradient reaches weights that are the policy's."""
        self.head = nn.Linear(cast(Any, backbone.config).get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def own_parameters(self) -> list[nn.Parameter]:
        """What is trained of it, the policy's weights left out."""
        return [p for p in [*self.parameters(), *self._adapter] if p.requires_grad]

    @contextmanager
    def active_adapter(self) -> Iterator[None]:
        """Runs a shared backbone with the critic's adapter; around a backward, too, since it may run layers again."""
        if self._adapter:
            with use_adapter(self.backbone, CRITIC):
                yield
        else:
            yield

    def forward(self, batch: MicroBatch, head_only: bool = False) -> Tensor:
        """Values of the states in which the micro-batch's completion tokens were sampled.

        Args:
            batch: b samples with t completion tokens.
            head_only: keep the gradient out of the backbone.

        Returns:
            [t] float32.
        """
        with self.active_adapter(), torch.set_grad_enabled(torch.is_grad_enabled() and not head_only):
            hidden = hidden_states(self.backbone, batch)
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.head(hidden.float())
        return values.squeeze(1)


def check_critic(options: CriticOptions, policy: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Looks for mistakes in `critic_init` before any weights are read.

    Args:
        options: what the objective wants.
        policy: folder or hub name of the policy.
        tokenizer: the policy's.

    Raises:
        UserError: `critic_init` is no reward model that reads the policy's tokens.
    """
    if options.init == "policy":
        return
    with _naming_the_option():
        ClassifierReward(options.init).check()
    reads, wanted = loading.load_tokenizer(options.init).get_vocab(), tokenizer.get_vocab()
    if strange := sorted(token for token, number in wanted.items() if reads.get(token) != number):
        raise UserError(
            f"--model.algorithm.critic_init {options.init}: {len(strange)} tokens of the policy's, such as "
            f"{strange[0]!r}, are other ones in its tokenizer; give a reward model with the tokenizer of {policy}, "
            "or leave the option out."
        )
    rows = [loading.load_config(source).get_text_config().vocab_size for source in (options.init, policy)]
    if rows[0] < rows[1]:
        raise UserError(
            f"--model.algorithm.critic_init {options.init}: its vocabulary has {rows[0]} tokens, that of {policy} "
            f"{rows[1]}, all of which can be sampled; give another reward model, or leave the option out."
        )


def build_critic(options: CriticOptions, policy: PreTrainedModel, lora: LoRA | None = None) -> Critic:
    """Makes the critic; where the policy is trained by an adapter, so is it, by one of its own.

    Args:
        options: what the objective wants.
        policy: the policy as it starts, its adapter added.
        lora: what its adapter is made by, or None.

    Raises:
        UserError: the reward model to start from cannot be read.
    """
    decoder: PreTrainedModel = cast(Any, policy).get_decoder()
    if options.shared:
        if lora is not None:
            lora.add_to(policy, CRITIC)
        return Critic(decoder, shared=True)
    if options.init == "policy":
        return Critic(copy.deepcopy(decoder))  # without the output projection, which a critic has no use for
    reward = ClassifierReward(options.init, dtype="float32")
    with _naming_the_option():
        reward.load()
    model: Any = reward.model
    backbone = getattr(model, model.base_model_prefix).requires_grad_(True)
    if lora is not None:
        lora.add_to(backbone.to(policy.dtype))
    critic = Critic(backbone)
    with torch.no_grad():
        critic.head.weight.copy_(model.score.weight)
        if model.score.bias is not None:
            critic.head.bias.copy_(model.score.bias)
    return critic


@contextmanager
def _naming_the_option() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"--model.algorithm.critic_init: {error}") from error
