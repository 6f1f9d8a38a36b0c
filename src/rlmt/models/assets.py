"""Everything in a model's Hugging Face folder except the weights; a run writes it once beside its checkpoints."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from rlmt.formats.thinking import ThinkingFormat

POLICY_ASSETS = "policy"
"""Name of the folder beside a run's checkpoints that holds the policy's assets."""

REWARD_ASSETS = "reward"
"""Name of the folder beside a run's checkpoints that holds the assets of the reward model in training."""


def save_policy_assets(
    folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, format: ThinkingFormat
) -> None:
    """Writes a policy's config, generation config, tokenizer and thinking format.

    Args:
        folder: Folder to write to; it is created if it does not exist.
        config: Config of the policy.
        tokenizer: Tokenizer of the policy, with the chat template.
        format: Thinking format; its stop tokens become the generation config's end-of-sequence tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(format.stop_token_ids(tokenizer)),
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
