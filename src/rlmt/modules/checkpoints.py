"""What the modules write to their checkpoints, and checks of a checkpoint before its weights are loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from rlmt.algorithms import Algorithm
from rlmt.annotations import PreTrainedModel
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.adapters import CRITIC, adapter_config, check_same_adapter
from rlmt.models.quantization import NF4


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Folders of the trainer's checkpoint callbacks, on rank 0; none on other ranks."""
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return [Path(folder) for folder in folders if folder] if trainer.is_global_zero else []


def rlmt_state(checkpoint: Mapping[str, Any], module: str) -> dict[str, Any]:
    """Reads what a module of rlmt stored in a checkpoint.

    Args:
        checkpoint: The loaded checkpoint.
        module: Name of the module that resumes from it.

    Returns:
        The dictionary under the key `rlmt`.

    Raises:
        UserError: No module of rlmt wrote the checkpoint, or another one did.
    """
    saved: dict[str, Any] | None = checkpoint.get("rlmt")
    if saved is None:
        raise UserError("--ckpt_path is not a checkpoint of an rlmt policy: give one written by `rlmt fit`.")
    writer = saved.get("module", "RLMTModule")  # RLMTModule did not write its name before version 0.2
    if writer != module:
        raise UserError(
            f"--ckpt_path is a checkpoint of {writer}, and this run trains {module}. To start from its weights, "
            "export it (`rlmt export`) and give the folder to --model."
        )
    return saved


def check_same_format(expected: ThinkingFormat, saved: ThinkingFormat, where: str) -> None:
    """Checks that a checkpoint has the format of the run.

    Raises:
        UserError: It has another one; the message names the checkpoint as `where`.
    """
    if saved != expected:
        raise UserError(
            f"{where} was trained with {saved}, this run requests {expected}: set --model.format to the checkpoint's."
        )


def trainable_names(module: nn.Module) -> set[str]:
    """Names of the parameters that are trained."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def adapter_state(model: PreTrainedModel, quantization: NF4 | None) -> dict[str, Any]:
    """For a checkpoint: the configuration of a model's adapter, and how the frozen base is quantized."""
    return {"adapter": adapter_config(model), "quantization": quantization and quantization.to_dict()}


def check_adapter_state(saved: dict[str, Any], adapter: dict[str, Any] | None, quantization: NF4 | None) -> None:
    """Checks that a checkpoint has the adapter and the base of the run.

    Args:
        saved: Result of `adapter_state` in the checkpoint.
        adapter: Configuration of the run's adapter, or None.
        quantization: Quantization of the run's base, or None.

    Raises:
        UserError: It has others.
    """
    check_same_adapter(saved, {"adapter": adapter, "quantization": quantization and quantization.to_dict()})


def check_has_critic(names: Iterable[str], algorithm: Algorithm) -> None:
    """Checks that a checkpoint has a critic if and only if the objective trains one.

    Args:
        names: Names of the checkpoint's weights.
        algorithm: The objective of the run.

    Raises:
        UserError: Only one of both has a critic.
    """
    saved, trained = any(map(_is_critic, names)), algorithm.critic is not None
    if saved != trained:
        raise UserError(
            f"The checkpoint holds {'a' if saved else 'no'} critic, and --model.algorithm {type(algorithm).__name__} "
            f"trains {'one' if trained else 'none'}. Resume with the algorithm it was trained with, or export its "
            "policy (`rlmt export`) and give that as --model.policy."
        )


def weights_to_load(
    state: Mapping[str, Any], expected: Collection[str], policy: str, with_critic: bool
) -> dict[str, Any]:
    """Selects the weights of a checkpoint that an RL module loads.

    Args:
        state: Weights of the checkpoint.
        expected: Names of the module's weights.
        policy: Folder or hub name of the policy, for the message.
        with_critic: Whether the critic is loaded, too: only to resume training.

    Returns:
        The weights, with exactly the expected names.

    Raises:
        UserError: Weights are missing, or belong to another policy or critic.
    """
    if not with_critic:
        state = {name: weight for name, weight in state.items() if not _is_critic(name)}
    wrong = sorted(set(expected) ^ state.keys())
    if wrong and all(map(_is_critic, wrong)):
        raise UserError(
            f"The checkpoint's critic is another one ({len(wrong)} weights differ, first {wrong[0]}): give "
            "--model.algorithm.critic_init and critic_shared as in the run that wrote it."
        )
    if wrong:
        raise UserError(
            f"The checkpoint's weights do not fit the policy {policy} ({len(wrong)} differ, first {wrong[0]}): give "
            "--model.policy the model that the checkpoint was trained from."
        )
    return dict(state)


def _is_critic(name: str) -> bool:
    """Whether a weight belongs to the critic: its own, or its adapter on the policy."""
    return name.startswith("critic.") or f".{CRITIC}." in name
