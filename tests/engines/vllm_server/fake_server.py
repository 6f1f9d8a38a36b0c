"""A fake server that speaks vLLM's HTTP, and helpers to run the engine on such servers."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from nccl_stand_ins import ThreadCommunicator
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig

from rlmt.engines import VLLMServerEngine
from rlmt.types import FinishReason, SampleRequest, Samples, Sampling

KEY = "open-sesame-3141"
LORA = {"r": 8, "use_dora": False, "bias": "none", "modules_to_save": None}
SAMPLING = Sampling(0.5, 7)


class FakeServer:
    """A server whose samples are functions of its weight, the prompt and the seed.

    `script(path, number)` may replace the answer to the request of that number to a path: a status code, a JSON object,
    or ConnectionResetError.
    """

    communicator: Any = ThreadCommunicator

    def __init__(self) -> None:
        self.weight: float | None = None
        self.label = "default"
        self.adapters: list[str] = []
        self.calls: list[str] = []
        self.prompts: list[int] = []
        self.requested: list[int] = []
        self.outstanding = self.max_outstanding = 0
        self.delay = 0.0
        self.down = False
        self.script: Callable[[str, int], Any] = lambda path, number: None
        self.config: dict[str, Any] = {
            "model_config": {
                "logprobs_mode": "processed_logprobs",
                "generation_config": "vllm",
                "dtype": "torch.float32",
            },
            "lora_config": {"max_lora_rank": 8},
        }
        self.max_model_len = 64
        self.workers = 1
        self.group: list[Any] = []
        self.received: dict[str, Tensor] = {}
        self.updating = self.paused = False
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except ConnectionError:
                    self.close_connection = True

            def do_GET(self) -> None:
                fake.serve(self, {})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fake.serve(self, json.loads(body or b"{}"))

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def restart(self) -> None:
        """Restarts as under a supervisor: same address, initial weights."""
        self.down, self.label, self.weight, self.adapters = False, "default", -1.0, []
        self.group, self.updating, self.paused = [], False, False

    def serve(self, handler: Any, body: dict[str, Any]) -> None:
        path = handler.path.partition("?")[0]
        with self.lock:
            self.calls.append(path)
            number = self.calls.count(path)
            self.requested += body.get("prompt", [])[:1] if path == "/v1/completions" else []
        status, answer = 200, self.script(path, number)
        if self.down or answer is ConnectionResetError:
            handler.connection.close()
            raise ConnectionResetError
        if isinstance(answer, int):
            status, answer = answer, {"error": {"message": "out of\nmemory."}}
        elif path.startswith("/v1") and handler.headers["Authorization"] != f"Bearer {KEY}":
            status, answer = 401, {"error": "Unauthorized"}
        elif answer is None:
            answer = self.answer(path, body)
            status = 404 if answer is None else 200
        text = json.dumps(answer).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/collective_rpc":
            (file,) = Path(body["kwargs"]["weights_path"]).iterdir()
            self.weight = load_file(file)["weight"].item()
        elif path == "/update_weight_version":
            self.label = body["new_version"]
        elif path == "/v1/load_lora_adapter":
            if body:
                assert Path(body["lora_path"], "adapter_model.safetensors").is_file()
                self.adapters.append(body["lora_name"])
        elif path == "/v1/unload_lora_adapter":
            self.adapters.remove(body["lora_name"])
        elif path == "/v1/completions":
            assert not self.paused and not self.updating
            return self.complete(body)
        elif path in ("/pause", "/resume"):
            self.paused = path == "/pause"
        elif path == "/init_weight_transfer_engine":
            self.join(**body["init_info"])
        elif path == "/shutdown_weight_transfer_engine":
            self.group = []
        elif path in ("/start_weight_update", "/finish_weight_update"):
            assert self.paused and self.updating == (path == "/finish_weight_update")
            self.updating = not self.updating
        elif path == "/update_weights":
            assert self.updating
            self.receive(**body["update_info"])
        answers = {
            "/health": {},
            "/v1/models": {
                "data": [
                    {"id": "policy", "parent": None, "max_model_len": self.max_model_len},
                    *({"id": name, "parent": "policy"} for name in self.adapters),
                ]
            },
            "/server_info": {"vllm_config": self.config},
            "/weight_info": {"weight_version": self.label},
            "/tokenize": {"tokens": list(body.get("prompt", "").encode())},
            "/reset_prefix_cache": {"success": True},
            "/get_world_size": {"world_size": self.workers},
        }
        return answers.get(path, {"results": [None]})

    def join(self, nccl_unique_id_b64: str, world_size: int, rank_offset: int, **packing: Any) -> None:
        """Joins with all workers."""
        assert not self.group
        ranks = range(rank_offset, rank_offset + self.workers)
        unique_id = base64.b64decode(nccl_unique_id_b64)
        with ThreadPoolExecutor() as pool:
            self.group = list(pool.map(lambda rank: self.communicator(unique_id, rank, world_size), ranks))
        assert packing.pop("packed")
        self.packing = {name.removeprefix("packed_"): value for name, value in packing.items()}

    def receive(self, names: list[str], dtype_names: list[str], shapes: list[list[int]]) -> None:
        """Receives weights with all workers, by vLLM's own consumer; the first one's are used."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer

        def consume(communicator: Any) -> dict[str, Tensor]:
            received: dict[str, Tensor] = {}
            meta = zip(names, zip(shapes, (getattr(torch, name) for name in dtype_names), strict=True), strict=True)
            packed_nccl_broadcast_consumer(
                iterator=meta,
                group=communicator,
                src=0,
                post_unpack_func=received.update,
                device="cpu",
                **self.packing,
            )
            return received

        with ThreadPoolExecutor() as pool:
            self.received, *others = pool.map(consume, self.group)
        for other in others:
            assert all(torch.equal(other[name], tensor) for name, tensor in self.received.items())
        self.weight = self.received["weight"].flatten()[0].item()

    def complete(self, body: dict[str, Any]) -> Any:
        with self.lock:
            self.prompts.append(body["prompt"][0])
            self.outstanding += 1
            self.max_outstanding = max(self.max_outstanding, self.outstanding)
        time.sleep(self.delay)
        with self.lock:
            self.outstanding -= 1
        expected = (True, True, False, True, 0)
        names = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "return_token_ids", "logprobs")
        assert tuple(body[name] for name in names) == expected
        assert body["model"] == (self.adapters[-1] if self.adapters else "policy")
        ids = [body["prompt"][0], body["seed"], body["max_tokens"]]
        choice = {"index": 0, "text": "", "finish_reason": "stop", "token_ids": ids}
        choice["logprobs"] = {"token_logprobs": [self.weight, -0.25, body["temperature"]]}
        return {"id": "1", "object": "text_completion", "created": 0, "model": "policy", "choices": [choice]}


def answer_with(path: str, answer: Any, first: int = 1) -> Callable[[str, int], Any]:
    """A script that replaces the answers to a path, starting with request number `first`."""
    return lambda requested, number: answer if requested == path and number >= first else None


def set_model_config(name: str, value: str) -> Callable[[FakeServer], None]:
    """A function that changes an entry of a server's model configuration."""
    return lambda fake: fake.config["model_config"].update({name: value})


def start(fakes: list[FakeServer], folder: Path, **options: Any) -> VLLMServerEngine:
    """A started engine for a policy of one weight."""
    engine = VLLMServerEngine([fake.url for fake in fakes], str(folder), **options)
    engine.check()
    model: Any = torch.nn.Linear(1, 1, bias=False)
    model.config = PretrainedConfig()
    engine.start(model, None, 64, torch.float32)  # type: ignore[arg-type]
    return engine


def sync(engine: VLLMServerEngine, version: int) -> None:
    """Loads weights whose value is their version."""
    engine.sync([("weight", torch.tensor([[float(version)]]))], version)


def requests(count: int, samples: int = 2) -> list[SampleRequest]:
    """Requests with distinct prompts and seeds."""
    return [SampleRequest([i], [100 * i + k for k in range(samples)]) for i in range(count)]


def check_samples(samples: Samples, count: int, version: int, each: int = 2) -> None:
    """Checks that every sample of `requests(count, each)` is there once, in order, from weights of this version."""
    assert samples.completion_ids == [[i, 100 * i + k, 7] for i in range(count) for k in range(each)]
    assert samples.logprobs == [[float(version), -0.25, 0.5]] * (count * each)
    assert samples.finish == [FinishReason.STOP] * (count * each) and samples.weight_version == version
