"""Which models keep keys and values per token that several samples of a prompt can share.

Linear attention, convolutions and state-space layers keep one state per sequence. transformers does not repeat it over
samples, and most of these models restart from zeros when they get several tokens after a state.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rlmt.errors import UserError

_PER_TOKEN = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)
"""Cache layers that hold keys and values per token; their subclasses hold states besides."""
_WRONG_STATES = ("bamba", "nemotron_h", "zamba2")
"""Types whose log-probs differ between a forward and generation token by token, by 0.02 to 4 nats on random models
(transformers 5.19, without the kernels of mamba-ssm)."""


def shares_cache(config: PretrainedConfig) -> bool:
    """True if all layers cache keys and values per token, so that the samples of a prompt can share them.

    Args:
        config: Config of a causal language model or of its decoder.
    """
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return bool(model is not None and _caches(model) and not model._is_stateful and _caches_per_token(config))


def check_cache(config: PretrainedConfig, source: str, fix: str) -> None:
    """Checks that a model can continue a sequence token by token from transformers' cache.

    Args:
        config: Config of a causal language model.
        source: Folder or hub name for the message.
        fix: What to use in its place, for the message.

    Raises:
        UserError: It keeps its state elsewhere, or its state gives other log-probs than a forward.
    """
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # A stateful model whose cache has no layer for states keeps them in its own modules.
    elsewhere = not _caches(model) or (model._is_stateful and _caches_per_token(config))
    if elsewhere or config.model_type in _WRONG_STATES:
        raise UserError(f"{source}: transformers cannot generate with {config.model_type} from a cache; {fix}.")


def _caches(model: Any) -> bool:
    return "past_key_values" in inspect.signature(model.forward).parameters


def _caches_per_token(config: PretrainedConfig) -> bool:
    return all(type(layer) in _PER_TOKEN for layer in DynamicCache(config=config).layers)
