"""Everything in a model's Hugging Face folder except the weights; a run writes it once beside its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlmt.annotations import PretrainedConfig, PreTrainedTokenizerBase
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat

POLICY_ASSETS = "policy"
"""Name of the folder beside a run's checkpoints that holds the policy's assets."""

REWARD_ASSETS = "reward"
"""Name of the folder beside a run's checkpoints that holds the assets of the reward model in training."""


def load_stop_token_ids(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, format: ThinkingFormat
) -> tuple[int, ...]:
    """Token ids that end a sample of a policy; no weights are read.

    Args:
        path: Folder or hub name of the policy.
        tokenizer: Its tokenizer.
        format: The thinking format.

    Returns:
        Distinct ids: the eos token, the token that ends an assistant's turn in the chat template, and the eos tokens of
        generation_config.json that the tokenizer has.

    Raises:
        UserError: The folder's generation_config.json is damaged.
    """
    ids = [*format.stop_token_ids(tokenizer), *_generation_eos(path)]
    return tuple(dict.fromkeys(token for token in ids if 0 <= token < len(tokenizer)))


def _generation_eos(path: str | Path) -> list[int]:
    """End-of-sequence tokens of a model's generation config; empty without one."""
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    folder = Path(path).expanduser()
    if folder.is_dir() and not (folder / GENERATION_CONFIG_NAME).is_file():
        return []
    try:
        config = GenerationConfig.from_pretrained(str(folder) if folder.is_dir() else str(path))
    except OSError as error:
        if folder.is_dir():
            raise UserError(f"{path}: {GENERATION_CONFIG_NAME} cannot be read; copy it again.") from error
        return []  # the repository, from which the tokenizer was read, has none
    eos: int | list[int] | None = config.eos_token_id
    return [eos] if isinstance(eos, int) else list(eos or [])


def save_policy_assets(
    folder: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    format: ThinkingFormat,
    stop_token_ids: Sequence[int],
) -> None:
    """Writes a policy's config, generation config, tokenizer and thinking format.

    Args:
        folder: Folder to write to; it is created if it does not exist.
        config: Config of the policy.
        tokenizer: Tokenizer of the policy, with the chat template.
        format: Thinking format.
        stop_token_ids: Tokens that end a sample, as end-of-sequence tokens for the generation config.
    """
    from transformers import GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(stop_token_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    generation.save_pretrained(folder)
    format.save(folder)


def save_reward_assets(folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes a reward model's config and tokenizer.

    Args:
        folder: Folder to write to; it is created if it does not exist.
        config: Config of the classifier.
        tokenizer: Tokenizer of the reward model, with the chat template.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
