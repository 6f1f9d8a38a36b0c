"""Client of one vLLM server: checks, weights sync and completions.

The server itself reports which weights it holds: after each load the client sets a new label there (vLLM's
`weight_version`), which a restart resets. So the client does not have to track what happened to the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any
from uuid import uuid4

from rlmt.endpoints.connections import describe, one_line
from rlmt.engines.vllm.sampling import completion_options
from rlmt.engines.vllm_server.connection import ServerConnection, ServerLost
from rlmt.engines.vllm_server.weight_transfer import PublishedWeights
from rlmt.errors import UserError
from rlmt.types import FinishReason, Sampling

SLOW_TIMEOUT = 60.0
"""Seconds to wait for the server's configuration, which it collects at the first call, for its prefix cache, and until
it has left a group."""

_DEV_MODE = "start it with VLLM_SERVER_DEV_MODE=1 in its environment (vLLM 0.32 or later), which weights sync requires"


@dataclass(frozen=True)
class Completion:
    """One sample."""

    ids: list[int]
    logprobs: list[float]
    finish: FinishReason


class ServerClient(ServerConnection):
    """A vLLM server at a URL; its methods require an open connection (`connect`).

    Args:
        url: URL such as http://127.0.0.1:8000.
        key: API key, or None.
        key_variable: Environment variable of the API key, for messages.
        model: Name of the model that the server must serve; None accepts any.
        timeout: Seconds that a sample or a load of weights may take.
    """

    def __init__(self, url: str, key: str | None, key_variable: str, model: str | None, timeout: float) -> None:
        super().__init__(url, key, key_variable, timeout)
        self.max_model_len = 0
        """Longest prompt + completion in tokens; set by `check_health`."""
        self.dtype = ""
        """Dtype that the server computes in, as torch names it; set by `check_config`."""
        self._required_model, self._model = model, ""
        self._adapter: str | None = None
        self._label: str | None = None

    # Checks -----------------------------------------------------------------------------------------------------------

    async def check(self) -> None:
        """Checks the server's health and configuration; raises as `check_health` and `check_config` do."""
        await self.check_health()
        await self.check_config()

    async def check_health(self) -> None:
        """Checks that the server is healthy, accepts the API key, and serves the model.

        Raises:
            ServerLost: One of these checks fails.
        """
        health = await self._request("GET", "/health")
        if health.status_code != 200:
            raise ServerLost(f"is not healthy (status {health.status_code} of /health); see its log")
        served = {model["id"]: model for model in await self._models() if model.get("parent") is None}
        if self._required_model is not None and self._required_model not in served:
            raise ServerLost(
                f"serves {' and '.join(served)}, not {self._required_model}; set --data.engine.model to what it serves,"
                f" or start it with --served-model-name {self._required_model}"
            )
        self._model = self._required_model or next(iter(served))
        self.max_model_len = int(served[self._model]["max_model_len"])

    async def _models(self) -> list[dict[str, Any]]:
        """The server's model and the adapters on it."""
        fix = "start a vLLM server of version 0.32 or later there"
        models: list[dict[str, Any]] = (await self._request_json("GET", "/v1/models", fix)).get("data", [])
        if not any("max_model_len" in model for model in models):
            raise ServerLost(f"lists no vLLM model in /v1/models; {fix}")
        return models

    async def check_config(self) -> dict[str, Any]:
        """Checks and returns the server's configuration.

        Raises:
            ServerLost: The server does not support weights sync, or its samples would differ from the policy's.
        """
        info = await self._request_json("GET", "/server_info?config_format=json", _DEV_MODE, SLOW_TIMEOUT)
        config = info.get("vllm_config")
        if not isinstance(config, dict):
            raise ServerLost("does not report its configuration in /server_info; start vLLM 0.32 or later")
        self.dtype = str(config["model_config"].get("dtype"))
        for name, required, consequence in (
            ("logprobs_mode", "processed_logprobs", "log-probs are not those at the sampling temperature"),
            ("generation_config", "vllm", "the model's generation_config.json changes how it samples"),
        ):
            if (value := config["model_config"].get(name)) != required:
                option = f"--{name.replace('_', '-')} {required}"
                raise ServerLost(f"has {name} {value}, so {consequence}; start it with {option}")
        return config

    async def check_adapters(self, rank: int) -> None:
        """Checks that the server can load adapters.

        Args:
            rank: LoRA rank of the adapters.

        Raises:
            ServerLost: It cannot.
        """
        lora = (await self.check_config())["lora_config"]
        if lora is None or lora["max_lora_rank"] < rank:
            support = "serves no adapters" if lora is None else f"serves adapters up to rank {lora['max_lora_rank']}"
            raise ServerLost(f"{support}; start it with --enable-lora --max-lora-rank {rank} or more")
        if (await self._request("GET", "/v1/load_lora_adapter")).status_code == 404:
            raise ServerLost(
                "does not allow adapters to be loaded; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its "
                "environment"
            )

    async def check_weight_transfer(self, backend: str) -> None:
        """Checks that the server receives weights through vLLM's weight transfer.

        Args:
            backend: The backend that it must have.

        Raises:
            ServerLost: It has none, or another one.
        """
        transfer = (await self.check_config()).get("weight_transfer_config") or {"backend": "off"}
        if transfer["backend"] != backend:
            option = f'--weight-transfer-config \'{{"backend": "{backend}"}}\''
            raise ServerLost(
                f"has weight transfer {transfer['backend']}, not {backend}; start it with {option}, or use "
                "--data.engine.weight_transfer folder"
            )
        await self.worker_count()

    async def check_tokenizer(self, text: str, ids: list[int]) -> None:
        """Checks that the server tokenizes like the policy's tokenizer, since the server finds the stop strings.

        Args:
            text: A text.
            ids: Its tokens under the policy's tokenizer.

        Raises:
            ServerLost: The server has another tokenizer.
        """
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        fix = "start it with the policy's tokenizer"
        if (await self._request_json("POST", "/tokenize", fix, json=body))["tokens"] != ids:
            raise ServerLost(f"serves {self._model} with another tokenizer than the policy's; {fix}")

    # Weights ----------------------------------------------------------------------------------------------------------

    async def ensure_weights(self, published: PublishedWeights, load: bool) -> None:
        """Checks that the server is healthy and holds the published weights, and loads what is missing.

        Args:
            published: Weights that the server must hold.
            load: Whether to load them; of several ranks that use a server, one loads.

        Raises:
            ServerLost: The server is not usable, or does not hold the weights.
            UserError: Another run has loaded its weights there meanwhile.
        """
        await self.check_health()
        label = await self._own_label(published.prefix)
        self._adapter = None if published.adapter is None else published.label
        if not label.startswith(f"{published.label}."):
            if published.weights is None:
                raise ServerLost("does not hold the policy's weights, which it receives at the next sync")
            if not load:
                raise ServerLost("does not hold the policy's weights")
            if published.adapter is None or not label.startswith(published.prefix):
                await self._reload_weights(published.weights)
            if published.adapter is not None:
                await self._load_adapter(published.label, published.adapter)
            await self._reset_prefix_cache()
            label = await self._set_label(published)
        self._label = label

    async def has_same_weights(self) -> bool:
        """Whether the server was neither restarted nor loaded again since `ensure_weights`."""
        return await self._weight_label() == self._label

    async def lacks_weights(self, published: PublishedWeights) -> bool:
        """Whether the server is healthy, and does not hold the published weights."""
        await self.check_health()
        return not (await self._own_label(published.prefix)).startswith(f"{published.label}.")

    async def _own_label(self, prefix: str) -> str:
        """The label of the server's weights; UserError if another run has set it since `ensure_weights`."""
        label = await self._weight_label()
        if self._label is not None and label.startswith("rlmt-") and not label.startswith(prefix):
            raise UserError(
                f"vLLM server {self.url}: another run loads its weights there; give each run servers of its own."
            )
        return label

    async def _set_label(self, published: PublishedWeights) -> str:
        """Sets and returns a new label for the server's weights."""
        label = f"{published.label}.{uuid4().hex[:8]}"
        await self._post("/update_weight_version", {"new_version": label}, "could not set its weight version")
        return label

    async def _weight_label(self) -> str:
        """The label of the weights that the server holds."""
        return str((await self._request_json("GET", "/weight_info", _DEV_MODE))["weight_version"])

    async def _reload_weights(self, folder: str) -> None:
        """Makes the server load all weights."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        failure = (
            f"could not load the policy's weights from {folder} (it must serve the policy's architecture and see "
            "--data.engine.shared_folder under the same path)"
        )
        await self._post("/collective_rpc", body, failure)

    async def _load_adapter(self, name: str, folder: str) -> None:
        """Makes the server load an adapter and unload earlier ones, of this run or of one that has ended."""
        for old in (model["id"] for model in await self._models() if model.get("parent") is not None):
            if old.startswith("rlmt-"):
                await self._post("/v1/unload_lora_adapter", {"lora_name": old}, f"could not unload the adapter {old}")
        body = {"lora_name": name, "lora_path": folder}
        failure = (
            f"could not load the adapter from {folder} (if vLLM does not support it, use --data.engine.serve merged)"
        )
        await self._post("/v1/load_lora_adapter", body, failure)

    async def _reset_prefix_cache(self) -> None:
        """Drops prefixes of other weights; retries while requests run, as those that were cancelled may."""
        start = monotonic()
        while not (await self._request_json("POST", "/reset_prefix_cache", "see its log")).get("success"):
            if monotonic() - start > SLOW_TIMEOUT:
                raise ServerLost("did not reset its prefix cache, since it is still busy with other requests")
            await asyncio.sleep(0.2)

    # vLLM's weight transfer -------------------------------------------------------------------------------------------

    async def worker_count(self) -> int:
        """Number of the server's workers, each of which is a rank of a group that transfers weights."""
        fix = "start a vLLM server of version 0.32 or later there"
        return int((await self._request_json("GET", "/get_world_size", fix))["world_size"])

    async def check_member(self, prefix: str) -> bool:
        """Checks the server before a transfer.

        Args:
            prefix: Prefix of the labels of this run.

        Returns:
            Whether it still is what it was at the last transfer: it was not restarted, and is still in that group.

        Raises:
            ServerLost: The server is not usable.
            UserError: Another run has loaded its weights there meanwhile.
        """
        await self.check_health()
        return await self._own_label(prefix) == self._label

    async def leave_group(self) -> None:
        """Lets the server leave the group of its last transfer, if it is in one."""
        failure = "could not leave its last group; restart it"
        await self._post("/shutdown_weight_transfer_engine", {}, failure, SLOW_TIMEOUT)

    async def join_group(self, init_info: dict[str, Any]) -> None:
        """Lets the server join a group; returns when all ranks have joined it."""
        await self._post("/init_weight_transfer_engine", {"init_info": init_info}, "could not join the group")

    async def start_update(self) -> None:
        """Aborts the server's requests, of which none is awaited, and prepares its model for new weights."""
        await self._post("/pause", {}, "could not pause")
        await self._post("/start_weight_update", {}, "could not prepare for new weights")

    async def receive_weights(self, update_info: dict[str, Any]) -> None:
        """Lets the server receive and load weights, while rank 0 broadcasts them."""
        failure = "could not load the policy's weights (it must serve the policy's architecture)"
        await self._post("/update_weights", {"update_info": update_info}, failure)

    async def finish_update(self, published: PublishedWeights) -> None:
        """Lets the server sample with the weights that it has received; their label comes last."""
        await self._post("/finish_weight_update", {}, "could not use the policy's weights")
        await self._reset_prefix_cache()
        await self._post("/resume", {}, "could not resume")
        await self._set_label(published)

    # Completions ------------------------------------------------------------------------------------------------------

    async def complete(self, prompt_ids: Sequence[int], seed: int, room: int, sampling: Sampling) -> Completion:
        """Generates one sample.

        Args:
            prompt_ids: Rendered prompt.
            seed: Seed of the sample.
            room: Number of tokens that fit after the prompt.
            sampling: Temperature, limits and stops.

        Raises:
            ServerLost: The server cannot be reached, or failed.
            RuntimeError: The server rejected the request.
        """
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        options = completion_options(sampling, seed, room)
        try:
            answer = await self._openai.completions.create(
                model=self._adapter or self._model, prompt=list(prompt_ids), **options
            )
        except APITimeoutError as error:
            raise ServerLost(f"returned no sample within {self._timeout:g} s (--data.engine.timeout)") from error
        except APIConnectionError as error:
            raise ServerLost(f"cannot be reached ({describe(error.__cause__ or error)})") from error
        except APIStatusError as error:
            if error.status_code in (400, 422):
                raise RuntimeError(f"vLLM server {self.url} rejected a request: {one_line(error.message)}.") from error
            raise ServerLost(f"answered with status {error.status_code}: {one_line(error.message)}") from error
        choice: Any = answer.choices[0]
        if choice.finish_reason not in ("stop", "length"):
            raise ServerLost(f"aborted a sample (finish reason {choice.finish_reason})")
        return Completion(
            list(choice.token_ids), list(choice.logprobs.token_logprobs), FinishReason(choice.finish_reason)
        )
