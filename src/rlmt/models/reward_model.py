"""Where the training of a reward model starts: a causal language model, a classifier, or random weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.utils import logging as transformers_logging

from rlmt.errors import UserError
from rlmt.models.loading import load_config, safetensors_source, seeded_init
from rlmt.models.quantization import NF4


def reward_config(path: str | Path) -> PretrainedConfig:
    """A model's config as one of a classifier with one output.

    Args:
        path: Folder or hub name of a decoder.

    Raises:
        UserError: There is none, it is of a classifier with several outputs, or transformers has no classifier for it.
    """
    config = load_config(path)
    architecture = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if not (isinstance(architecture, type) and issubclass(architecture, GenericForSequenceClassification)):
        raise UserError(
            f"{path}: {config.model_type} has no decoder classifier in transformers; start from a Llama, Qwen, Gemma 2 "
            "or Mistral model"
        )
    if _is_classifier(config) and config.num_labels != 1:
        raise UserError(
            f"{path}: is a classifier with {config.num_labels} outputs where a reward model has one; start from a "
            "causal language model or a scalar reward model"
        )
    config.num_labels = 1
    return config


def load_reward_model(
    path: str | Path,
    from_scratch: bool = False,
    attn_implementation: str | None = None,
    dtype: torch.dtype = torch.float32,
    quantization: NF4 | None = None,
) -> PreTrainedModel:
    """Reads a decoder with a score head; the head is in float32 whatever the decoder is in.

    A head that the folder does not hold is drawn by torch's seed with standard deviation 1 / (H + 1), H the model's
    width: scores then start close to 0.

    Args:
        path: Folder or hub name of a causal language model or of a classifier with one output.
        from_scratch: Draw all weights; those of the folder are not read.
        attn_implementation: transformers' attention kernel; None is its default.
        dtype: Number format of the decoder.
        quantization: How to hold the decoder's linear layers in 4 bits, as for `load_policy`.

    Returns:
        The classifier, in eval mode, on the CPU; in 4 bits on the device that tensors are made on.

    Raises:
        UserError: As `reward_config`, or the weights are missing, unreadable, in 4 or 8 bits or do not cover the model.
    """
    config = reward_config(path)
    auto: Any = AutoModelForSequenceClassification
    if not from_scratch and getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{path}: its weights are quantised; give the folder of the weights in full")
    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        options |= quantization.loading_options()
    new_head = from_scratch or not _is_classifier(config)
    with seeded_init():
        if from_scratch:
            model = auto.from_config(config, **options)
        else:
            with safetensors_source(path) as source, _unreported():
                model, info = auto.from_pretrained(
                    source,
                    config=config,
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **options,
                )
            missing = sorted(set(info["missing_keys"]) - ({"score.weight"} if new_head else set()))
            if missing:
                raise UserError(f"{path}: its weights lack {len(missing)} tensors of the model, such as {missing[0]}")
        if quantization is not None:
            quantization.finish(model)
        model.score.float()
        if new_head:
            torch.nn.init.normal_(model.score.weight, std=1 / (config.get_text_config().hidden_size + 1))
    return cast(PreTrainedModel, model.eval())


@contextmanager
def _unreported() -> Iterator[None]:
    """Without transformers' table of missing and unused weights, which the caller looks at."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _is_classifier(config: PretrainedConfig) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
