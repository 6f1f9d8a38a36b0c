"""Writes the bytes that FSDP2 holds beside the shards of a model on 8 fake ranks; test_bytes.py starts it."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from rlmt.distributed.fsdp2 import shard_model
from rlmt.memory.bytes import all_gather_bytes


def model(vocabulary: int) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=512,
            intermediate_size=1792,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
        )
    )


def main(rank: int, vocabulary: int, mixed: bool, result: Path) -> None:
    """Writes bytes beside the shards to a JSON file: as predicted, and as torch's memory tracker counts them."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)  # type: ignore[no-untyped-call]
    mesh = init_device_mesh("cpu", (8,))
    compute = torch.bfloat16 if mixed else torch.float32
    with torch.device("meta"):
        expected = all_gather_bytes(model(vocabulary), compute)
    with FakeTensorMode():
        policy = model(vocabulary)
        policy.train().gradient_checkpointing_enable({"use_reentrant": False})
        shard_model(policy, mesh, mixed=mixed)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0, foreach=False)
        tracker = FSDPMemTracker(policy, optimizer)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False):
                total = policy(torch.zeros(1, 2, dtype=torch.long)).logits.sum()
            total.backward()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    kinds = {str(kind).rsplit(".")[-1]: size for kind, size in peak.items()}
    unsharded = kinds["Total"] - sum(kinds[kind] for kind in ("SHARDED_PARAM", "SHARDED_GRAD", "BUFFER", "ACT"))
    result.write_text(json.dumps({"expected": expected, "found": unsharded}))
