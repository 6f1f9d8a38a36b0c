"""Which models share the cache of a prompt, and which generate from a cache at all."""

from typing import Any

import pytest
from transformers import BambaConfig, LlamaConfig, Mamba2Config, MistralConfig, Qwen3_5TextConfig

from rlmt.errors import UserError
from rlmt.models.cache import check_cache, shares_cache


def test_only_keys_and_values_per_token_are_shared() -> None:
    assert shares_cache(LlamaConfig()) and shares_cache(MistralConfig())
    assert not shares_cache(Qwen3_5TextConfig()) and not shares_cache(Mamba2Config())


@pytest.mark.parametrize("config", [Mamba2Config(), BambaConfig()])
def test_models_that_cannot_generate_from_a_cache_raise(config: Any) -> None:
    check_cache(Qwen3_5TextConfig(), "some/model", "use another")
    with pytest.raises(UserError, match=r"some/model: .* cannot generate with \w+ from a cache; use another\."):
        check_cache(config, "some/model", "use another")
