"""Which models keep keys and values per token that several samples of a prompt can share.

Linear attention, convolutions and state-space layers keep one state per sequence. transformers does not repeat it over
samples, and most of these models restart from zeros when they get several tokens after a state.
"""

from __future__ import annotations

import inspect
from typing import Any

from rlmt.annotations import PretrainedConfig
from rlmt.errors import UserError

_WRONG_STATES = ("bamba", "nemotron_h", "zamba2")
"""Types whose log-probs differ between a forward and generation token by token, by 0.02 to 4 nats on random models
(transformers 5.19, without the kernels of mamba-ssm)."""


def shares_cache(config: PretrainedConfig) -> bool:
    """True if all layers cache keys and values per token, so that the samples of a prompt can share them.

    Args:
        config: Config of a causal language model or of its decoder.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

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
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # A stateful model whose cache has no layer for states keeps them in its own modules.
    elsewhere = not _caches(model) or (model._is_stateful and _caches_per_token(config))
    if elsewhere or config.model_type in _WRONG_STATES:
        raise UserError(f"{source}: transformers cannot generate with {config.model_type} from a cache; {fix}.")


def _caches(model: Any) -> bool:
    return "past_key_values" in inspect.signature(model.forward).parameters


def _caches_per_token(config: PretrainedConfig) -> bool:
    from transformers.cache_utils import DynamicCache, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

    per_token = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)  # their subclasses hold states besides
    return all(type(layer) in per_token for layer in DynamicCache(config=config).layers)
