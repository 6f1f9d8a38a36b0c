"""One of two ranks on the same fake servers, started by test_ranks.py, which holds the servers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import nccl_stand_ins
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import PretrainedConfig

from rlmt import errors
from rlmt.distributed import collectives
from rlmt.distributed.fsdp2 import full_tensor
from rlmt.engines import VLLMServerEngine
from rlmt.engines.vllm_server import nccl, shared_folder
from rlmt.errors import AllRanksUserError
from rlmt.types import AdapterWeights, SampleRequest, Samples, Sampling

COUNT = 6
errors._LIBRARIES.append(Path(__file__).parent)  # errors here stand for rlmt's own


class Rank:
    """Requests samples of prompts that no other rank has."""

    def __init__(self, folder: Path, mesh: DeviceMesh) -> None:
        self.folder, self.mesh = folder, mesh

    def engine(self, urls: list[str], **options: Any) -> VLLMServerEngine:
        engine = VLLMServerEngine(urls, str(self.folder), **options)
        engine.check()
        model: Any = torch.nn.Linear(1, 1, bias=False)
        model.config = PretrainedConfig()
        engine.start(model, None, 64, torch.float32)  # type: ignore[arg-type]
        return engine

    def sync(self, engine: VLLMServerEngine, version: int) -> None:
        engine.sync(self.weights(version), version)

    def weights(self, version: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Sharded tensors, which both ranks all-gather."""
        for name, shape in (("weight", (1, 1)), ("a", (5,)), ("b", (8,))):
            tensor = distribute_tensor(torch.full(shape, float(version)), self.mesh, [Shard(0)])
            yield name, full_tensor(tensor)

    def samples(self, engine: VLLMServerEngine, count: int = COUNT) -> Samples:
        requests = [SampleRequest([100 * collectives.rank() + i], [2 * i, 2 * i + 1]) for i in range(count)]
        return collectives.run_on_all_ranks(lambda: engine.generate(requests, Sampling(0.5, 7)))

    def load_balancing(self, urls: list[str]) -> Any:
        engine = self.engine(urls, max_in_flight=4)
        self.sync(engine, 1)
        self.samples(engine, 1)
        self.sync(engine, 2)
        return self.samples(engine)

    def one_server_lost(self, urls: list[str]) -> Any:
        engine = self.engine(urls)
        self.sync(engine, 1)
        return self.samples(engine)

    no_server_left_for_rank_1 = one_server_lost
    no_server_loads_weights = one_server_lost
    misconfigured = one_server_lost

    def disk_full(self, urls: list[str]) -> Any:
        def save_file(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        engine = self.engine(urls)
        saved, shared_folder.save_file = shared_folder.save_file, save_file
        bucket, shared_folder.BUCKET_BYTES = shared_folder.BUCKET_BYTES, 1  # each tensor is written at once
        try:
            self.sync(engine, 1)
        finally:
            shared_folder.save_file, shared_folder.BUCKET_BYTES = saved, bucket

    def server_restored(self, urls: list[str]) -> Any:
        engine = self.engine(urls)
        self.sync(engine, 1)
        self.samples(engine)
        engine.reload_lost_weights()
        return self.samples(engine)

    def adapter_base(self, urls: list[str]) -> Any:
        engine = self.engine(urls)
        for version in (1, 2):
            config = {"r": 8, "use_dora": False, "bias": "none", "modules_to_save": None}
            adapter = AdapterWeights(config, {"base_model.model.lora_A.weight": torch.ones(1)})
            engine.sync(self.weights(5), version, adapter)
        return self.samples(engine)

    def nccl(self, urls: list[str]) -> Any:
        engine = self.engine(urls, weight_transfer="nccl")
        self.sync(engine, 1)
        self.samples(engine)
        if collectives.rank() == 0:
            httpx.post(f"{urls[1]}/restart")
        collectives.all_gather_object(None)
        engine.reload_lost_weights()
        assert engine.version is None
        self.sync(engine, 2)
        return self.samples(engine)

    nccl_lost = nccl

    def error_on_one_rank(self, urls: list[str]) -> Any:
        collectives.run_on_all_ranks(lambda: 1 // (1 - collectives.rank()))

    def outcome(self, case: str, urls: list[str]) -> Any:
        try:
            samples = getattr(self, case)(urls)
        except Exception as error:
            elsewhere = error.reported_elsewhere if isinstance(error, AllRanksUserError) else None
            return {"error": type(error).__name__, "message": str(error), "reported_elsewhere": elsewhere}
        return {"ids": samples.completion_ids, "logprobs": samples.logprobs, "version": samples.weight_version}


def main(number: int, folder: Path) -> None:
    if any(case.startswith("nccl") for case in json.loads((folder / "cases.json").read_text())):
        nccl_stand_ins.install()
        nccl.check_installation = lambda: None
    distributed.init_process_group("gloo", f"file://{folder / 'store'}", world_size=2, rank=number)
    rank = Rank(folder / "weights", init_device_mesh("cpu", (2,)))
    cases: dict[str, list[str]] = json.loads((folder / "cases.json").read_text())
    outcomes = {case: rank.outcome(case, urls) for case, urls in cases.items()}
    (folder / f"rank{number}.json").write_text(json.dumps(outcomes))
    distributed.destroy_process_group()
