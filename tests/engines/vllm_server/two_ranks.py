"""One of two ranks, started by test_server_ranks.py: what each rank has of servers that the test keeps."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from rlmt.distributed import collectives
from rlmt.distributed.fsdp2 import full_tensor
from rlmt.engines import VLLMServerEngine
from rlmt.engines.vllm_server import weight_transfer
from rlmt.errors import AllRanksUserError
from rlmt.types import AdapterWeights, SampleRequest, Samples, Sampling

COUNT = 6


class Rank:
    """Asks servers for samples of prompts that no other rank has."""

    def __init__(self, place: Path, mesh: DeviceMesh) -> None:
        self.place, self.mesh = place, mesh

    def engine(self, urls: list[str], **options: Any) -> VLLMServerEngine:
        engine = VLLMServerEngine(urls, str(self.place), **options)
        engine.check()
        engine.start(torch.nn.Linear(1, 1, bias=False), None, 64, torch.float32)  # type: ignore[arg-type]
        return engine

    def sync(self, engine: VLLMServerEngine, version: int) -> None:
        engine.sync(self.weights(version), version)

    def weights(self, version: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors in shards, which both ranks put together."""
        for name, size in (("weight", 1), ("a", 5), ("b", 8)):
            tensor = distribute_tensor(torch.full((size,), float(version)), self.mesh, [Shard(0)])
            yield name, full_tensor(tensor)

    def samples(self, engine: VLLMServerEngine, count: int = COUNT) -> Samples:
        requests = [SampleRequest([100 * collectives.rank() + i], [2 * i, 2 * i + 1]) for i in range(count)]
        return collectives.run_on_all_ranks(lambda: engine.generate(requests, Sampling(0.5, 7)))

    def shared_out(self, urls: list[str]) -> Any:
        engine = self.engine(urls, max_in_flight=4)
        self.sync(engine, 1)
        self.samples(engine, 1)
        self.sync(engine, 2)
        return self.samples(engine)

    def one_dies(self, urls: list[str]) -> Any:
        engine = self.engine(urls)
        self.sync(engine, 1)
        return self.samples(engine)

    none_left_for_the_second_rank = one_dies
    no_server_takes_weights = one_dies
    misconfigured = one_dies

    def the_disk_is_full(self, urls: list[str]) -> Any:
        def save_file(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        engine = self.engine(urls)
        saved, weight_transfer.save_file = weight_transfer.save_file, save_file
        bucket, weight_transfer.BUCKET = weight_transfer.BUCKET, 1  # the first tensor is one too many
        try:
            self.sync(engine, 1)
        finally:
            weight_transfer.save_file, weight_transfer.BUCKET = saved, bucket

    def back_between_rollouts(self, urls: list[str]) -> Any:
        engine = self.engine(urls)
        self.sync(engine, 1)
        self.samples(engine)
        engine.renew()
        return self.samples(engine)

    def an_adapter(self, urls: list[str]) -> Any:
        engine = self.engine(urls)
        for version in (1, 2):
            config = {"r": 8, "use_dora": False, "bias": "none", "modules_to_save": None}
            adapter = AdapterWeights(config, {"base_model.model.lora_A.weight": torch.ones(1)})
            engine.sync(self.weights(5), version, adapter)
        return self.samples(engine)

    def an_error_of_one(self, urls: list[str]) -> Any:
        collectives.run_on_all_ranks(lambda: 1 // (1 - collectives.rank()))

    def outcome(self, case: str, urls: list[str]) -> Any:
        try:
            samples = getattr(self, case)(urls)
        except Exception as error:
            told = error.reported_elsewhere if isinstance(error, AllRanksUserError) else None
            return {"error": type(error).__name__, "message": str(error), "told": told}
        return {"ids": samples.completion_ids, "logprobs": samples.logprobs, "version": samples.weight_version}


def main(number: int, folder: Path) -> None:
    distributed.init_process_group("gloo", f"file://{folder / 'store'}", world_size=2, rank=number)
    rank = Rank(folder / "weights", init_device_mesh("cpu", (2,)))
    cases: dict[str, list[str]] = json.loads((folder / "cases.json").read_text())
    outcomes = {case: rank.outcome(case, urls) for case, urls in cases.items()}
    (folder / f"rank{number}.json").write_text(json.dumps(outcomes))
    distributed.destroy_process_group()
