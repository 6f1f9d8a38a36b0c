"""vLLM starts in a process that has a process group. In a file of its own, since no other engine may live meanwhile."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from rlmt.engines import VLLMEngine
from rlmt.engines.vllm.isolation import unbound_process_group


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_process_group_has_no_bound_device_while_vllm_starts(helpers: Any) -> None:
    """gloo groups that vLLM creates are then not split from NCCL's communicator."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        group: Any = distributed.group.WORLD
        group.bound_device_id = torch.device("cuda", 0)
        with pytest.raises(ValueError), unbound_process_group():
            assert group.bound_device_id is None
            raise ValueError
        assert group.bound_device_id == torch.device("cuda", 0)
        engine = VLLMEngine()
        seen = []

        def launch(*_: Any) -> Any:
            seen.append(group.bound_device_id)
            return SimpleNamespace(apply_model=lambda function: [True])

        engine._launch = launch  # type: ignore[method-assign]
        engine.start(helpers.policy("llama-tied"), helpers.tokenizer(), 8, torch.float32)
        assert seen == [None]
        engine._llm = None
        engine.close()
    finally:
        distributed.destroy_process_group()
