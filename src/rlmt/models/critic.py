"""PPO's critic: a value for each state in which a token is sampled (arXiv 1707.06347)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlmt.annotations import PreTrainedModel, PreTrainedTokenizerBase
from rlmt.errors import UserError
from rlmt.models import loading
from rlmt.models.adapters import CRITIC, LoRA, use_adapter
from rlmt.models.attention import attention_options
from rlmt.models.micro_batch import MicroBatch, hidden_states
from rlmt.models.reward_model import classifier_config, classifier_tokenizer, load_classifier


class Critic(nn.Module):
    """A value head on a backbone of its own or on the policy's backbone.

    Args:
        backbone: A decoder without output projection.
        shared: Whether the backbone is the policy's. Then `parameters` and `state_dict` leave its weights out, and the
            critic trains only its head and the adapter named "critic", if the backbone has one.
    """

    def __init__(self, backbone: PreTrainedModel, shared: bool = False) -> None:
        super().__init__()
        self.backbone: PreTrainedModel
        if shared:
            object.__setattr__(self, "backbone", backbone)  # bypasses nn.Module, which would register a submodule
        else:
            self.backbone = backbone
        self._adapter = [p for name, p in backbone.named_parameters() if shared and f".{CRITIC}." in name]
        self.updates_policy = shared and not self._adapter
        """True if the critic's gradient reaches weights of the policy."""
        self.head = nn.Linear(cast(Any, backbone.config).get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def own_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the critic, without the policy's."""
        return [p for p in [*self.parameters(), *self._adapter] if p.requires_grad]

    @contextmanager
    def active_adapter(self) -> Iterator[None]:
        """Activates the critic's adapter on a shared backbone; use it around backward too, which may rerun layers."""
        if self._adapter:
            with use_adapter(self.backbone, CRITIC):
                yield
        else:
            yield

    def forward(self, batch: MicroBatch, head_only: bool = False) -> Tensor:
        """Computes the values of the states in which the micro-batch's completion tokens were sampled.

        Args:
            batch: Micro-batch with t completion tokens.
            head_only: Whether the gradient stops at the head.

        Returns:
            [t] float32.
        """
        with self.active_adapter(), torch.set_grad_enabled(torch.is_grad_enabled() and not head_only):
            hidden = hidden_states(self.backbone, batch)
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.head(hidden.float())
        return values.squeeze(1).clone()  # FSDP2 warns of an output that is a view: an in-place change would break it


def check_critic(
    init: str, policy: str, tokenizer: PreTrainedTokenizerBase, attn_implementation: str | None = None
) -> None:
    """Checks `critic_init` before any weights are read.

    Args:
        init: Initial weights of the critic: "policy", or the folder or hub name of a reward model.
        policy: Folder or hub name of the policy.
        tokenizer: Tokenizer of the policy.
        attn_implementation: As for `load_policy`.

    Raises:
        UserError: `init` is not a reward model with the policy's tokens, or cannot have `attn_implementation`.
    """
    if init == "policy":
        return
    with _option_in_errors():
        attention_options(classifier_config(init), attn_implementation, init)
        classifier_tokenizer(init)
    critic_vocab, policy_vocab = loading.load_tokenizer(init).get_vocab(), tokenizer.get_vocab()
    if different := sorted(token for token, number in policy_vocab.items() if critic_vocab.get(token) != number):
        raise UserError(
            f"--model.algorithm.critic_init {init}: its tokenizer gives other ids to {len(different)} of the policy's "
            f"tokens, such as {different[0]!r}; give a reward model with the tokenizer of {policy}, or leave the "
            "option out."
        )
    rows = [loading.load_config(source).get_text_config().vocab_size for source in (init, policy)]
    if rows[0] < rows[1]:
        raise UserError(
            f"--model.algorithm.critic_init {init}: its vocabulary has {rows[0]} tokens, but {policy} has {rows[1]}, "
            "all of which can be sampled; give another reward model, or leave the option out."
        )


def build_critic(
    policy: PreTrainedModel,
    init: str = "policy",
    shared: bool = False,
    lora: LoRA | None = None,
    attn_implementation: str | None = None,
) -> Critic:
    """Builds the critic; if the policy is trained with an adapter, the critic gets an adapter of its own.

    Args:
        policy: The initial policy, with its adapter.
        init: Initial weights of the critic: "policy", or the folder or hub name of a reward model.
        shared: Whether the critic uses the policy's backbone; `init` is then not read.
        lora: Options of the critic's adapter; None trains all parameters.
        attn_implementation: As for `load_policy`; a copy of the policy has the policy's.

    Returns:
        The critic, on the policy's device if it uses the policy's weights, else on the CPU.

    Raises:
        UserError: The reward model cannot be loaded.
    """
    decoder: PreTrainedModel = cast(Any, policy).get_decoder()
    if shared:
        if lora is not None:
            lora.add_to(policy, CRITIC)
        return Critic(decoder, shared=True)
    if init == "policy":
        return Critic(copy.deepcopy(decoder))  # the critic does not use the output projection
    with _option_in_errors():
        classifier_config(init)
        model: Any = load_classifier(init, dtype="float32", attn_implementation=attn_implementation)
    backbone = getattr(model, model.base_model_prefix)
    if lora is not None:
        lora.add_to(backbone.to(policy.dtype))
    critic = Critic(backbone)
    with torch.no_grad():
        critic.head.weight.copy_(model.score.weight)
        if model.score.bias is not None:
            critic.head.bias.copy_(model.score.bias)
    return critic


@contextmanager
def _option_in_errors() -> Iterator[None]:
    """Puts the option's name before the messages of UserErrors."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--model.algorithm.critic_init: {error}") from error
