"""One of two ranks of a tensor-parallel vLLM, started by test_tensor_parallel.py."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import MAX_LEN, Helpers  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from rlmt.engines import VLLMEngine  # noqa: E402
from rlmt.errors import UserError  # noqa: E402
from rlmt.models import LoRA  # noqa: E402
from rlmt.models.adapters import adapter_weights, base_tensors, trainable_parameters  # noqa: E402
from rlmt.types import SampleRequest, Sampling  # noqa: E402

SAMPLING = Sampling(0.7, 24)
REQUESTS = [SampleRequest(prompt, [i, 2**63 - 1 - i]) for i, prompt in enumerate(Helpers.prompts(5, 70))]
UNEVEN = [REQUESTS[:3], REQUESTS[3:]]
"""Requests of each rank."""


def start(policy: PreTrainedModel, **options: Any) -> VLLMEngine:
    engine = VLLMEngine(cpu_kv_cache_gib=0.1, max_num_seqs=64, tensor_parallel_size=2, **options)
    engine.start(policy, Helpers.tokenizer(), MAX_LEN, torch.float32)
    return engine


def shape(model: Any) -> tuple[int, int]:
    """Rows of the embeddings and attention heads of this rank's shard."""
    return len(model.model.embed_tokens.weight), model.model.layers[0].self_attn.num_heads


def error_of(engine: VLLMEngine, requests: list[SampleRequest]) -> str:
    try:
        engine.generate(requests, SAMPLING)
    except UserError as error:
        return str(error)
    return ""


def all_weights(number: int) -> dict[str, Any]:
    """A policy of which all weights are trained."""
    policy = Helpers.policy("qwen2-tied")
    engine = start(policy)
    found: dict[str, Any] = {"shape": engine._llm.apply_model(shape)[0], "mismatch": []}
    for version in (1, 2):
        engine.sync(policy.state_dict().items(), version)
        samples = engine.generate(UNEVEN[number], SAMPLING)
        found["mismatch"].append(Helpers.mismatch(policy, UNEVEN[number], samples, SAMPLING.temperature))
        Helpers.update(policy)
    found["stale"] = Helpers.mismatch(policy, UNEVEN[number], samples, SAMPLING.temperature)
    assert samples.weight_version == 2
    found["uneven"] = samples.completion_ids
    found["one rank requests"] = engine.generate([REQUESTS, []][number], SAMPLING).completion_ids
    found["no rank requests"] = engine.generate([], SAMPLING).completion_ids
    found["error"] = error_of(engine, [REQUESTS[0], SampleRequest([5] * MAX_LEN, [0])] if number else REQUESTS[:1])
    found["after an error"] = engine.generate(UNEVEN[number], SAMPLING).completion_ids
    names = dict(policy.named_parameters())  # one name less than state_dict(), since embeddings are tied
    try:
        engine.sync(names.items(), 3)
    except ValueError as error:
        found["missing weight"] = str(error)
    engine.close()
    assert distributed.is_initialized()  # the trainer's own
    return found


def merged(number: int) -> list[float]:
    """An adapter merged into the weights: mismatch after each sync, alternating with that of stale weights."""
    policy = Helpers.policy("qwen2-untied")
    torch.manual_seed(1)
    LoRA(rank=4, dora=True).add_to(policy)
    engine = start(policy, serve="merged")
    optimizer = torch.optim.AdamW(trainable_parameters(policy), lr=0.02)
    ids = torch.arange(40)[None] % 300
    mismatches = []
    for version in (1, 2):
        policy(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if version > 1:
            mismatches.append(mismatch(engine, policy, number))
        engine.sync(base_tensors(policy).items(), version, adapter_weights(policy))
        mismatches.append(mismatch(engine, policy, number))
    engine.close()
    return mismatches


def mismatch(engine: VLLMEngine, policy: PreTrainedModel, number: int) -> float:
    samples = engine.generate(UNEVEN[number], SAMPLING)
    return Helpers.mismatch(policy, UNEVEN[number], samples, SAMPLING.temperature)


def main(number: int, folder: Path, case: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder / 'store'}", world_size=2, rank=number)
    torch.save({"all_weights": all_weights, "merged": merged}[case](number), folder / f"rank{number}.pt")
    distributed.destroy_process_group()
