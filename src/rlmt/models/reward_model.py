"""Sequence classifiers with one output: reward models that score, and models that training makes into one.

Two things differ from calling Hugging Face's `...ForSequenceClassification` on a padded batch, because the plain call
can be silently wrong. The score is read at each row's last token by its position. Hugging Face takes the rightmost
token that is not the pad id, which is another token if the pad token also ends a turn. And the score head runs in
float32, whatever dtype the weights have: around a score of 20 bfloat16 has steps of 0.125, so close responses would
tie.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from rlmt.annotations import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from rlmt.errors import UserError, first_line
from rlmt.formats.chat_template import check_has_template
from rlmt.models.attention import attention_options
from rlmt.models.loading import load_config, safetensors_source, seeded_init
from rlmt.models.quantization import NF4
from rlmt.models.rows import packs_rows, row_states, stack_rows

# A trained reward model -----------------------------------------------------------------------------------------------


def classifier_config(source: str) -> PretrainedConfig:
    """Reads the config of a trained reward model and checks that it is a plain decoder classifier with one output.

    Args:
        source: Folder or hub name of the reward model.

    Returns:
        The config.

    Raises:
        UserError: The folder does not exist, the config is unreadable, has several outputs or a head with custom code,
            or transformers has no decoder classifier of this type.
    """
    config = _read_classifier_config(source)
    if config.num_labels != 1:
        raise UserError(
            f"reward model {source!r} has {config.num_labels} outputs but must have one (num_labels: 1 in its "
            "config.json): give a scalar reward model, not a chat model or a multi-objective one."
        )
    if "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {}):
        code = ", ".join(config.architectures or ["?"])
        raise UserError(
            f"reward model {source!r} has a head with custom code ({code}), which is never run; use a plain "
            "sequence classifier."
        )
    if not _has_decoder_classifier(config):
        raise UserError(
            f"reward model {source!r} is of type {config.model_type!r}, which has no decoder classifier in "
            "transformers: give a Llama, Qwen, Gemma 2 or Mistral reward model."
        )
    return config


def classifier_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Reads the tokenizer of a trained reward model.

    Args:
        source: Folder or hub name of the reward model.

    Raises:
        UserError: The tokenizer is unreadable, or has no chat template or none named default.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"reward model {source!r} has no readable tokenizer ({first_line(error)}): put its tokenizer files beside "
            "its weights."
        ) from error
    fix = "put the one that the reward model was trained with beside it as chat_template.jinja"
    check_has_template(tokenizer, f"reward model {source!r}", "renders its conversations", fix)
    return tokenizer


def load_classifier(
    source: str, dtype: str = "auto", quantization: NF4 | None = None, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Loads a trained reward model in eval mode; check its config first with `classifier_config`.

    Args:
        source: Folder or hub name of the reward model.
        dtype: Dtype of the weights; `auto` is the checkpoint's.
        quantization: Stores the linear layers in 4 bits, but not the score head; None stores them in `dtype`.
        attn_implementation: As for `load_policy`.

    Returns:
        The classifier, on the CPU; in 4 bits on torch's default device.

    Raises:
        UserError: The weights are unreadable or lack the score head, or the model cannot have
            `attn_implementation`.
    """
    from transformers import AutoModelForSequenceClassification

    options = attention_options(_read_classifier_config(source), attn_implementation, f"reward model {source!r}")
    if quantization is not None:
        options |= quantization.loading_options()
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except OSError as error:
        raise UserError(f"reward model {source!r}: {first_line(error)}; give safetensors weights.") from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers only warns, and would score with random weights
        raise UserError(
            f"reward model {source!r} lacks the weights {', '.join(missing[:3])} ({len(missing)} missing): "
            "give a trained sequence classifier."
        )
    if quantization is not None:
        quantization.finish_loading(model)
    return cast(PreTrainedModel, model.eval())


def last_token_states(backbone: Any, rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """Computes the last hidden state at the last token of each row.

    Args:
        backbone: The decoder without its head.
        rows: b rows of token ids, each [n] of integers; n differs between rows.
        device: Device that the decoder computes on.

    Returns:
        [b, H] in the decoder's dtype.
    """
    ids, packing = stack_rows(rows, packs_rows(backbone), device)
    last = torch.tensor([len(row) - 1 for row in rows], device=device)
    return row_states(backbone, ids, packing, torch.arange(len(rows), device=device), last)


def score_states(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Applies a classifier's score head in float32.

    Args:
        model: The classifier.
        states: [b, H] hidden states.

    Returns:
        [b] float32 scores.
    """
    head: Any = model.score
    with torch.autocast(states.device.type, enabled=False):
        return F.linear(states.float(), head.weight.float()).squeeze(-1)


def _read_classifier_config(source: str) -> PretrainedConfig:
    from transformers import AutoConfig

    if not Path(source).is_dir() and (source.startswith(("runs/", ".", "/", "~")) or source.count("/") > 1):
        fix = "make it with `rlmt tiny`" if source.startswith("runs/tiny") else "use a folder or a Hub name"
        raise UserError(f"reward model folder {source!r} does not exist; {fix}.")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"reward model {source!r} has no readable configuration ({first_line(error)}): give a folder with a "
            "config.json or a hub name that can be reached."
        ) from error
    return config


# A model to train as a reward model -----------------------------------------------------------------------------------


def reward_config(path: str | Path) -> PretrainedConfig:
    """Reads the config of a model to train as a reward model, and sets one output.

    Args:
        path: Folder or hub name of a causal language model or of a classifier with one output.

    Returns:
        The config of a classifier with one output.

    Raises:
        UserError: The config is unreadable, is one of a classifier with several outputs, or transformers has no
            decoder classifier of this type.
    """
    return as_reward_config(load_config(path), path)


def as_reward_config(config: PretrainedConfig, path: str | Path) -> PretrainedConfig:
    """As `reward_config`, for a config that was read before; it is changed."""
    if not _has_decoder_classifier(config):
        raise UserError(
            f"{path}: {config.model_type} has no decoder classifier in transformers; start from a Llama, Qwen, Gemma 2 "
            "or Mistral model."
        )
    if _is_classifier(config) and config.num_labels != 1:
        raise UserError(
            f"{path}: is a classifier with {config.num_labels} outputs where a reward model has one; start from a "
            "causal language model or a scalar reward model."
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
    """Loads a decoder with a score head to train; the head is float32 whatever dtype the decoder has.

    A missing head is initialised from torch's seed with standard deviation 1 / (H + 1), where H is the hidden size:
    scores then start close to 0.

    Args:
        path: Folder or hub name of a causal language model or of a classifier with one output.
        from_scratch: Initialises all weights at random; the folder's weights are not read.
        attn_implementation: As for `load_policy`.
        dtype: Dtype of the decoder.
        quantization: Stores the decoder's linear layers in 4 bits, as in `load_policy`.

    Returns:
        The classifier, in eval mode, on the CPU; in 4 bits on torch's default device.

    Raises:
        UserError: As `reward_config`, or the weights are missing, unreadable, in 4 or 8 bits or incomplete.
    """
    from transformers import AutoModelForSequenceClassification

    config = reward_config(path)
    auto: Any = AutoModelForSequenceClassification
    if not from_scratch and getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{path}: the weights are quantized; give the folder of the unquantized weights.")
    options = {"dtype": dtype, **attention_options(config, attn_implementation, str(path))}
    if quantization is not None:
        options |= quantization.loading_options()
    new_head = from_scratch or not _is_classifier(config)
    with seeded_init():
        if from_scratch:
            model = auto.from_config(config, **options)
        else:
            with safetensors_source(path) as source, _transformers_errors_only():
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
                raise UserError(
                    f"{path}: the weights lack {len(missing)} tensors, such as {missing[0]}; copy them again."
                )
        if quantization is not None:
            quantization.finish_loading(model)
        model.score.float()
        if new_head:
            torch.nn.init.normal_(model.score.weight, std=1 / (config.get_text_config().hidden_size + 1))
    return cast(PreTrainedModel, model.eval())


@contextmanager
def _transformers_errors_only() -> Iterator[None]:
    """Silences transformers' table of missing and unused weights; the caller checks them."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _is_classifier(config: PretrainedConfig) -> bool:
    """True if the config's weights were saved from a sequence classifier."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def _has_decoder_classifier(config: PretrainedConfig) -> bool:
    """True if transformers' classifier for this type is the generic one on a decoder."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    from transformers.modeling_layers import GenericForSequenceClassification

    architecture = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    return isinstance(architecture, type) and issubclass(architecture, GenericForSequenceClassification)
