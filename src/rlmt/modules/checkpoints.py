"""What the modules' checkpoints have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.assets import POLICY_ASSETS, save_policy_assets


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """The folders that checkpoints are written to, on the process that writes what lies beside them; else none."""
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return [Path(folder) for folder in folders if folder] if trainer.is_global_zero else []


def save_assets_beside_checkpoints(
    trainer: Trainer, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, format: ThinkingFormat
) -> None:
    """Writes all of a policy's folder but the weights, from which `rlmt export` makes a whole one."""
    for folder in checkpoint_folders(trainer):
        save_policy_assets(folder / POLICY_ASSETS, config, tokenizer, format)


def rlmt_state(checkpoint: Mapping[str, Any], module: str) -> dict[str, Any]:
    """What a module of rlmt added to a checkpoint.

    Args:
        checkpoint: as loaded.
        module: name of the module that is to go on from it.

    Raises:
        UserError: no module of rlmt wrote it, or another one did.
    """
    saved: dict[str, Any] | None = checkpoint.get("rlmt")
    if saved is None:
        raise UserError("--ckpt_path is not a checkpoint of an rlmt policy; give one written by `rlmt fit`.")
    writer = saved.get("module", "RLMTModule")
    if writer != module:
        raise UserError(
            f"--ckpt_path is a checkpoint of {writer}, and this run trains {module}; to start from its weights, "
            "`rlmt export` it and give --model the folder."
        )
    return saved


def check_same_format(wanted: ThinkingFormat, saved: ThinkingFormat, where: str) -> None:
    """Raises UserError where a checkpoint's format is another than the run's; `where` names the checkpoint."""
    if saved != wanted:
        raise UserError(
            f"{where} was trained with {saved}, this run asks for {wanted}; set --model.format to the checkpoint's."
        )
