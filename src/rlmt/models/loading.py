"""Reads configs, tokenizers and policies from local folders or the hub, safetensors only and never running remote code.

Everything that a user can get wrong (a folder that is not there, weights in another format, a classifier in the place
of a policy) ends in one `UserError` line; nothing is downloaded or unpickled to find out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlmt.errors import UserError
from rlmt.models.quantization import NF4

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Precision to hold weights in; `auto` is the one that they are stored in."""

_DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_config(path: str | Path) -> PretrainedConfig:
    """Reads a model's config; no weights are touched.

    Args:
        path: A local folder or a hub name.

    Returns:
        The config.

    Raises:
        UserError: If there is no such folder or hub repository, it holds no config.json, or it needs remote code.
    """
    source = _source(path, ("config.json",), "config.json")
    with _told_in_one_line(source, "config.json"):
        return cast(PretrainedConfig, AutoConfig.from_pretrained(source, trust_remote_code=False))


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Reads a tokenizer.

    Where it has no pad token, end-of-sequence pads, in memory only: nothing is added to the vocabulary, so the model's
    embeddings still fit, and padding never enters a loss.

    Args:
        path: A local folder or a hub name.

    Returns:
        The tokenizer.

    Raises:
        UserError: If there is no such folder or hub repository, it holds no tokenizer, it needs remote code, or it has
            neither a pad nor an end-of-sequence token.
    """
    source = _source(path, _TOKENIZER_FILES, "tokenizer (tokenizer.json)")
    with _told_in_one_line(source, "tokenizer"):
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source, trust_remote_code=False))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{source}: the tokenizer has neither a pad nor an eos token; set eos_token in its config")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(
    path: str | Path,
    dtype: Dtype = "auto",
    attn_implementation: str | None = None,
    quantization: NF4 | None = None,
) -> PreTrainedModel:
    """Reads a causal language model from safetensors.

    Args:
        path: A local folder or a hub name.
        dtype: Precision to hold the weights in.
        attn_implementation: transformers' attention kernel (`sdpa`, `eager`, `flash_attention_2`, ...); None is its
            default.
        quantization: How to hold the weights of linear layers in 4 bits, for a model that is frozen; `dtype` is then
            what they compute in. None holds them as they are.

    Returns:
        The model, in eval mode, on the CPU; in 4 bits on the device that tensors are made on.

    Raises:
        UserError: If there is no such folder or hub repository, its weights are not (whole) safetensors, do not cover
            the model or are in 4 or 8 bits, it is not a causal language model, or it needs remote code.
    """
    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} is not known; choose one of {', '.join(_DTYPES)}")
    config = load_config(path)
    check_causal_lm(config, str(path))
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{path}: its weights are quantised; give the folder of the weights in full")
    source = _source(path, _WEIGHT_FILES, "safetensors weights (model.safetensors)")
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if quantization is not None:
        options |= quantization.loading_options()
    with _told_in_one_line(source, "safetensors weights"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=_DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        # transformers would fill these with random numbers and go on.
        raise UserError(f"{source}: its weights lack {len(missing)} tensors of the model, such as {missing[0]}")
    if quantization is not None:
        quantization.finish(model)
    return cast(PreTrainedModel, model.eval())


def meta_model(config: PretrainedConfig, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """The model of a config without weights: its modules and names, in no memory.

    Args:
        config: The config.
        auto: Class that makes it: a causal language model by default.
    """
    with torch.device("meta"):
        return cast(PreTrainedModel, auto.from_config(config))


def random_policy(path: str | Path, attn_implementation: str | None = None) -> PreTrainedModel:
    """Draws the weights of a causal language model, in float32, as its config says (`initializer_range`).

    The draw depends on torch's seed alone, not on what was drawn before.

    Args:
        path: A local folder or a hub name with config.json; weights in it are not read.
        attn_implementation: As for `load_policy`.

    Returns:
        The model, in eval mode, on the CPU.

    Raises:
        UserError: There is no such config, or it is not one of a causal language model.
    """
    config = load_config(path)
    check_causal_lm(config, str(path))
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    auto: Any = AutoModelForCausalLM
    with seeded_init():
        return cast(PreTrainedModel, auto.from_config(config, dtype=torch.float32, **options).eval())


@contextmanager
def safetensors_source(path: str | Path) -> Iterator[str]:
    """Gives the name under which transformers finds a model's safetensors; errors of reading them are one line.

    Raises:
        UserError: There is no such folder or hub repository, or its weights are not safetensors or are damaged.
    """
    source = _source(path, _WEIGHT_FILES, "safetensors weights (model.safetensors)")
    with _told_in_one_line(source, "safetensors weights"):
        yield source


@contextmanager
def seeded_init() -> Iterator[None]:
    """Random numbers of torch inside depend on its seed alone, and those outside not on how many are drawn inside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        yield


def check_causal_lm(config: PretrainedConfig, source: str) -> None:
    """Checks that a config is one of a causal language model, so that a classifier is not trained as a policy.

    Args:
        config: The config.
        source: Where it is from, for the message.

    Raises:
        UserError: If its model type has no causal language model, or its weights were saved from another class.
    """
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{source}: {config.model_type} is not a causal language model that transformers knows")
    classes: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        classes.update([names] if isinstance(names, str) else names)
    saved = config.architectures or []
    if saved and not classes.intersection(saved):
        raise UserError(f"{source}: holds a {saved[0]}, not a causal language model; give the folder of a policy")


def check_head(config: PretrainedConfig, source: str) -> None:
    """Checks that logits are hidden states times the output projection and nothing more.

    Log-probs are made from the two in chunks, without the model's own head.

    Args:
        config: The config.
        source: What to call the model.

    Raises:
        UserError: If this family scales, caps or shifts its logits.
    """
    text = config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise UserError(
                f"{source}: {config.model_type} changes its logits after the output projection ({name}), and rlmt's "
                "log-probs would not be the model's; use another family, such as Llama, Qwen or Mistral"
            )


def max_positions(config: PretrainedConfig) -> int:
    """The longest sequence, in tokens, that a model takes.

    Args:
        config: The model's config; of a multimodal model its text part counts.

    Returns:
        Tokens of prompt and completion together.

    Raises:
        UserError: If the config does not say.
    """
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int) or length <= 0:
        raise UserError(
            f"{config.name_or_path or config.model_type}: config.json names no max_position_embeddings; "
            "add it, so that prompts can be checked against the context length"
        )
    return length


def absolute_path(path: str | Path) -> str:
    """A model's folder by its full path, for use from elsewhere; a hub name as it is."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else str(path)


def _source(path: str | Path, any_of: tuple[str, ...], what: str) -> str:
    """`path` as transformers wants it, once a local folder is known to hold what is sought."""
    source = str(path)
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in any_of):
            raise UserError(f"{source}: the folder holds no {what}; give a folder as save_pretrained writes it")
        return str(folder)
    if folder.is_file():
        raise UserError(f"{source}: is a file; give the folder that holds the model")
    if source.startswith("runs/tiny"):
        raise UserError(f"{source}: no such folder; run `rlmt tiny` first")
    if source.startswith("runs/paper/warm-start") and not folder.exists():
        raise UserError(f"{source}: no such folder; train and export it first, as docs/paper.md says")
    if not _HUB_NAME.fullmatch(source):
        raise UserError(f"{source}: no such folder")
    return source


@contextmanager
def _told_in_one_line(source: str, what: str) -> Iterator[None]:
    """Turns transformers' errors about a folder or hub name into one `UserError` line; lets all others through."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{source}: a safetensors file is damaged ({_first_line(error)}); copy it again") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: {what} is not valid JSON ({_first_line(error)})") from error
    except OSError as error:
        if Path(source).is_dir():
            raise UserError(f"{source}: {what} cannot be read: {_first_line(error)}") from error
        raise UserError(
            f"{source}: no such folder, and no {what} under that name could be had from the hub "
            "(name wrong, access not granted, or offline); download it and give its folder"
        ) from error
    except ValueError as error:
        message = str(error)
        if "trust_remote_code" in message:
            raise UserError(f"{source}: needs code from its repository, which rlmt never runs; use another") from error
        if "model type" in message or "model_type" in message or "Unrecognized model" in message:
            raise UserError(f"{source}: its model type is not one that this transformers knows; upgrade it") from error
        raise


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
