"""The models of an RL run, and which of their weights a checkpoint holds."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlmt.distributed.fsdp2 import shard_models
from rlmt.errors import UserError
from rlmt.models import loading
from rlmt.models.adapters import CRITIC
from rlmt.models.critic import Critic, build_critic
from rlmt.modules.checks import trainable_names, weights_dtype
from rlmt.modules.offline_rollouts import add_reference_logprobs, offline_rollouts_of
from rlmt.rewards import ClassifierReward

if TYPE_CHECKING:
    from rlmt.modules.rlmt import RLMTModule

_TRAINED = ("policy.", "critic.")
"""Submodules whose weights are in a checkpoint."""


class Models(NamedTuple):
    """What a run trains, and the frozen policy that it is held against."""

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    critic: Critic | None


def build_models(module: RLMTModule, fitting: bool, budget: int) -> Models:
    """Loads the policy, and to train it makes what the objective wants: a reference (a frozen copy) and a critic.

    With LoRA the policy without its adapter is the reference. Of recorded samples all reference log-probs are taken
    here, and no reference is kept. Lightning restores a checkpoint afterwards, so a resumed run takes them under the
    initial policy as well.

    Args:
        module: with its options, attached to its trainer.
        fitting: whether the policy is to be trained.
        budget: tokens, padding included, that one forward holds.

    Raises:
        UserError: a model cannot be read.
    """
    held = weights_dtype(module.trainer, module.lora)
    policy = loading.load_policy(module.policy_path, held, module.attn_implementation, module.quantization)
    reference = critic = None
    if fitting and module.algorithm.needs_reference:
        if (recording := offline_rollouts_of(module.trainer)) is not None:
            add_reference_logprobs(recording, policy, module.algorithm, module.trainer, budget)
        elif module.lora is None:
            reference = copy.deepcopy(policy).requires_grad_(False).train(False)
    if module.lora is not None:
        module.lora.add_to(policy)
    if fitting and module.algorithm.critic is not None:
        options = module.algorithm.critic
        critic = build_critic(policy, options.init, options.shared, module.lora).train()
    policy.train(fitting)
    if fitting and module.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        if critic is not None:
            critic.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    shard_models(module.trainer, policy, reference, critic)
    return Models(policy, reference, critic)


def shardable_models(rewards: nn.Module) -> list[PreTrainedModel]:
    """The loaded models of rewards that can be cut into shards; what is held in 4 bits cannot."""
    found = [reward for reward in rewards.modules() if isinstance(reward, ClassifierReward)]
    return [reward.model for reward in found if reward.model is not None and reward.quantization is None]


def weights_to_save(module: RLMTModule, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is trained of the policy and the critic, with LoRA the adapters: all else is read again."""
    trained = trainable_names(module)
    return {
        name: value
        for name, value in state.items()
        if name.startswith(_TRAINED) and (module.lora is None or name in trained)
    }


def check_has_critic(module: RLMTModule, state: Iterable[str]) -> None:
    """Raises UserError where a checkpoint with weights of these names has a critic and the run none, or the reverse."""
    has_critic, wants_one = any(map(_is_critics, state)), module.algorithm.critic is not None
    if has_critic != wants_one:
        raise UserError(
            f"The checkpoint holds {'a' if has_critic else 'no'} critic, and --model.algorithm "
            f"{type(module.algorithm).__name__} trains {'one' if wants_one else 'none'}; go on with the algorithm "
            "it was trained with, or give its policy, written by `rlmt export`, as --model.policy."
        )


def weights_to_load(module: RLMTModule, state: Mapping[str, Any], fitting: bool) -> dict[str, Any]:
    """What a module takes of a checkpoint's weights: all of them, but a critic's only to go on training.

    Raises:
        UserError: they are not those of this policy and critic.
    """
    if fitting:
        check_has_critic(module, state)
    else:
        state = {name: weight for name, weight in state.items() if not _is_critics(name)}
    wrong = sorted(module.state_dict().keys() ^ state.keys())
    if wrong and all(map(_is_critics, wrong)):
        raise UserError(
            f"The checkpoint's critic is another one ({len(wrong)} weights differ, first {wrong[0]}); give "
            "--model.algorithm.critic_init and critic_shared as they were."
        )
    if wrong:
        raise UserError(
            f"The checkpoint's weights do not fit the policy {module.policy_path} "
            f"({len(wrong)} differ, first {wrong[0]}); "
            "give --model.policy the model that the checkpoint was trained from."
        )
    return dict(state)


def _is_critics(name: str) -> bool:
    """Whether a weight of the module is the critic's: its own, or its adapter on the policy."""
    return name.startswith("critic.") or f".{CRITIC}." in name
