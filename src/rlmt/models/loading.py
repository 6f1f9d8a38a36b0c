"""Reads configs, tokenizers and policies from local folders or the hub, safetensors only and never running remote code.

Errors of the user (a missing folder, weights in another format, a classifier in place of a policy) become a `UserError`
of one line, before anything is downloaded or unpickled.
"""

from __future__ import annotations

import copy
import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError

from rlmt.annotations import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from rlmt.errors import UserError, first_line
from rlmt.models.attention import attention_options
from rlmt.models.logits_function import logits_function
from rlmt.models.quantization import NF4
from rlmt.models.rope import constant_rope_length

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Dtype of the weights; `auto` is the checkpoint's."""

_DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_UNWRITABLE = (PermissionError, NotADirectoryError, FileExistsError)
_NOT_CAUSAL = ("xlm", "xlnet", "reformer")
"""Types with a language model that is not causal, or only with a further option."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_config(path: str | Path) -> PretrainedConfig:
    """Reads a model's config; no weights are read.

    Args:
        path: A local folder or a hub name.

    Returns:
        The config.

    Raises:
        UserError: The folder or hub repository does not exist, has no config.json, or needs remote code.
    """
    from transformers import AutoConfig

    source = _source(path, ("config.json",), "config.json")
    with _one_line_errors(source, "config.json"):
        return cast(PretrainedConfig, AutoConfig.from_pretrained(source, trust_remote_code=False))


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Reads a tokenizer.

    A missing pad token becomes the end-of-sequence token, in memory only: the vocabulary does not grow, so the model's
    embeddings still fit, and padding is never part of a loss.

    Args:
        path: A local folder or a hub name.

    Returns:
        The tokenizer.

    Raises:
        UserError: The folder or hub repository does not exist, has no tokenizer, needs remote code, or the tokenizer
            has neither a pad nor an end-of-sequence token.
    """
    from transformers import AutoTokenizer

    source = _source(path, _TOKENIZER_FILES, "tokenizer (tokenizer.json)")
    with _one_line_errors(source, "tokenizer"):
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source, trust_remote_code=False))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{source}: the tokenizer has neither a pad nor an eos token; set eos_token in its config.")
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
        dtype: Dtype of the weights.
        attn_implementation: transformers' attention kernel (`sdpa`, `eager`, `flash_attention_2`, ...), or `varlen`;
            None is its default, or `eager` for a model that caps attention logits.
        quantization: Stores the linear layers of a frozen model in 4 bits; `dtype` is then their compute dtype. None
            does not quantize.

    Returns:
        The model, in eval mode, on the CPU; in 4 bits on torch's default device.

    Raises:
        UserError: The folder or hub repository does not exist, its weights are not safetensors, are damaged, incomplete
            or in 4 or 8 bits, it is not a causal language model, it needs remote code, or it cannot have
            `attn_implementation`.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} is not known; choose one of {', '.join(_DTYPES)}.")
    config = load_config(path)
    check_causal_lm(config, str(path))
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{path}: the weights are quantized; give the folder of the unquantized weights.")
    source = _source(path, _WEIGHT_FILES, "safetensors weights (model.safetensors)")
    options = attention_options(config, attn_implementation, str(path))
    if quantization is not None:
        options |= quantization.loading_options()
    with _one_line_errors(source, "safetensors weights"):
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
        # transformers would initialise these at random and continue.
        raise UserError(f"{source}: the weights lack {len(missing)} tensors, such as {missing[0]}; copy them again.")
    if quantization is not None:
        quantization.finish_loading(model)
    return cast(PreTrainedModel, model.eval())


def meta_model(config: PretrainedConfig, auto: Any = None) -> PreTrainedModel:
    """Builds a model on the meta device: its modules and names, without memory for weights.

    Args:
        config: Config of the model.
        auto: transformers' class that builds it; None builds a causal language model.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return cast(PreTrainedModel, (auto or AutoModelForCausalLM).from_config(config))


def random_policy(path: str | Path, attn_implementation: str | None = None) -> PreTrainedModel:
    """Initialises a causal language model at random in float32, by its config (`initializer_range`).

    The weights depend only on torch's seed, not on random numbers generated before.

    Args:
        path: A local folder or a hub name with config.json; its weights are not read.
        attn_implementation: As for `load_policy`.

    Returns:
        The model, in eval mode, on the CPU.

    Raises:
        UserError: The config does not exist, or it is not one of a causal language model.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(path)
    check_causal_lm(config, str(path))
    options = attention_options(config, attn_implementation, str(path))
    auto: Any = AutoModelForCausalLM
    with seeded_init():
        return cast(PreTrainedModel, auto.from_config(config, dtype=torch.float32, **options).eval())


def frozen_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen copy of a model, in eval mode.

    Args:
        model: The model.
        dtype: Dtype of autocast, in which the copy stores its linear weights; float32 without autocast.
    """
    frozen: PreTrainedModel = copy.deepcopy(model).requires_grad_(False).train(False)
    return frozen if dtype is torch.float32 else cast_linear_weights(frozen, dtype)


def cast_linear_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Casts the weights of linear layers in place to the dtype that autocast computes them in, which halves a model.

    Outputs under autocast stay the same to the last bit. Embeddings, norms and an output projection tied to the
    embedding keep their dtype, since autocast does not cast what they compute.

    Args:
        model: A frozen model, all of whose forwards run under autocast to `dtype`.
        dtype: Dtype of autocast.

    Returns:
        The model.
    """
    embedding: Any = model.get_input_embeddings()
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight is not embedding.weight:
            module.to(dtype)
    return model


def _looks_ahead(config: PretrainedConfig) -> bool:
    """True for models that have an encoder, or whose attention is not causal."""
    if config.model_type in _NOT_CAUSAL or config.is_encoder_decoder:
        return True
    # GPT-NeoX has the option, but no encoder.
    return getattr(config, "is_decoder", None) is False and not config.model_type.startswith("gpt_neox")


@contextmanager
def safetensors_source(path: str | Path) -> Iterator[str]:
    """Yields the name under which transformers finds a model's safetensors; errors inside become one line.

    Raises:
        UserError: The folder or hub repository does not exist, or its weights are not safetensors or are damaged.
    """
    source = _source(path, _WEIGHT_FILES, "safetensors weights (model.safetensors)")
    with _one_line_errors(source, "safetensors weights"):
        yield source


@contextmanager
def seeded_init() -> Iterator[None]:
    """Inside, random numbers of torch depend only on its seed; outside, they do not depend on the code inside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        yield


def check_causal_lm(config: PretrainedConfig, source: str) -> None:
    """Checks that a config is one of a causal language model, so that no classifier or encoder is used as a policy.

    Args:
        config: Config of the model.
        source: Folder or hub name for the message.

    Raises:
        UserError: The model type has no causal language model, its tokens attend to later ones, or the weights were
            saved from another class.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{source}: {config.model_type} is not a causal language model that transformers supports; use another."
        )
    if _looks_ahead(config):
        raise UserError(
            f"{source}: {config.model_type} is not a plain decoder, in which tokens attend to earlier ones only; use "
            "one, such as Llama, Qwen or Gemma."
        )
    classes: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        classes.update([names] if isinstance(names, str) else names)
    saved = config.architectures or []
    if saved and not classes.intersection(saved):
        raise UserError(f"{source}: holds a {saved[0]}, not a causal language model; give the folder of a policy.")


def check_policy(config: PretrainedConfig, source: str) -> None:
    """Checks that rlmt computes a model's log-probs as the model itself does.

    They are computed from its hidden states, a few tokens at a time, without its own forward.

    Args:
        config: Config of the model.
        source: Folder or hub name for the message.

    Raises:
        UserError: As `check_causal_lm`, or the logits are another function of the hidden states.
    """
    check_causal_lm(config, source)
    try:
        model = meta_model(config)
    except Exception as error:  # of any type, from the constructor of any architecture
        reason = first_line(error)
        raise UserError(
            f"{source}: transformers cannot build this {config.model_type} ({reason}); use another."
        ) from error
    logits_function(model)


def max_positions(config: PretrainedConfig) -> int:
    """Reads the context length of a model.

    Args:
        config: Config of the model; for a multimodal model its text config is used.

    Returns:
        Maximum length of prompt and completion together, in tokens; the original context where rotary frequencies
        depend on the length beyond it.

    Raises:
        UserError: The config has no context length.
    """
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int) or length <= 0:
        raise UserError(
            f"{config.name_or_path or config.model_type}: config.json has no max_position_embeddings; "
            "add it, so that prompts can be checked against the context length."
        )
    return min(length, constant_rope_length(config) or length)


def absolute_path(path: str | Path) -> str:
    """The absolute path of a model's folder; a hub name as it is."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else str(path)


def _source(path: str | Path, any_of: tuple[str, ...], what: str) -> str:
    """`path` as an argument for transformers, after a check that a local folder has one of the files."""
    source = str(path)
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in any_of):
            raise UserError(f"{source}: the folder has no {what}; give a folder that save_pretrained wrote.")
        return str(folder)
    if folder.is_file():
        raise UserError(f"{source}: is a file; give the model's folder.")
    if source.startswith("runs/tiny"):
        raise UserError(f"{source}: no such folder; run `rlmt tiny` first.")
    if source.startswith("runs/paper/warm-start") and not folder.exists():
        raise UserError(f"{source}: no such folder; train and export it first, as docs/paper.md says.")
    if not _HUB_NAME.fullmatch(source):
        raise UserError(f"{source}: no such folder; give a folder or a hub name.")
    return source


@contextmanager
def _one_line_errors(source: str, what: str) -> Iterator[None]:
    """Turns transformers' errors about a folder or hub name into a `UserError` of one line; others pass."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{source}: a safetensors file is damaged ({first_line(error)}); copy it again.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: {what} is not valid JSON ({first_line(error)}); copy it again.") from error
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if not Path(source).is_dir() and (isinstance(cause, _UNWRITABLE) or cause.errno == errno.EROFS):
            raise UserError(
                f"{source}: the hub's cache cannot be written ({cause.filename}: {cause.strerror}); set HF_HOME to a "
                "folder that can."
            ) from error
        if Path(source).is_dir():
            raise UserError(f"{source}: {what} cannot be read ({first_line(error)}); copy it again.") from error
        raise UserError(
            f"{source}: no such folder, and the hub returned no {what} under that name "
            "(wrong name, no access, or offline); download it and give its folder."
        ) from error
    except ValueError as error:
        message = str(error)
        if "trust_remote_code" in message:
            raise UserError(f"{source}: needs code from its repository, which rlmt never runs; use another.") from error
        if "model type" in message or "model_type" in message or "Unrecognized model" in message:
            raise UserError(
                f"{source}: this version of transformers does not support its model type; upgrade transformers."
            ) from error
        raise
