"""Generates rollouts with official vLLM servers in their own processes, on this machine or on others.

Weights sync goes through a shared folder, from which each server loads on request, or through vLLM's weight transfer
over NCCL. Before anything is sampled, every reachable server holds the policy's current weights and reports so itself;
a server that does not is not used. If a server is lost, the others repeat its requests; if it comes back, it is used
again at the next rollout. A sample depends on prompt, seed and weights alone, so it does not matter which server
generates it.

In a run of several ranks, each rank requests its own samples. Only rank 0 sends weights to servers, while all ranks
all-gather sharded weights with it. Ranks wait for each other at a weights sync, never during sampling.

Left out: vLLM's other weight transfers (CUDA IPC, RDMA, sparse updates); and starting servers.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rlmt.annotations import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from rlmt.distributed import collectives
from rlmt.endpoints.connections import require_client_libraries
from rlmt.engines.base import Engine, max_completion_tokens
from rlmt.engines.vllm.lora import merge_adapters, unsupported_reason
from rlmt.engines.vllm_server import nccl
from rlmt.engines.vllm_server.client import ServerClient
from rlmt.engines.vllm_server.connection import ServerLost
from rlmt.engines.vllm_server.generation import Call, Generation
from rlmt.engines.vllm_server.nccl import NCCLTransfer
from rlmt.engines.vllm_server.servers import Servers
from rlmt.engines.vllm_server.shared_folder import SharedFolder
from rlmt.engines.vllm_server.weight_transfer import PublishedWeights, WeightTransfer
from rlmt.engines.vllm_weights import VLLMWeights
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.rope import check_vllm_rope
from rlmt.options import PositiveFloat, PositiveInt, check_ranges
from rlmt.types import AdapterWeights, SampleRequest, Samples, Sampling


class VLLMServerEngine(Engine):
    """Generates with vLLM servers, also while the policy is trained on other samples.

    Args:
        urls: URLs of the servers, such as http://127.0.0.1:8000.
        shared_folder: Folder for weights sync by `folder`; servers must see it under the same path.
        model: Name of the model that the servers serve; None accepts the model of each.
        api_key_variable: Environment variable with the servers' API key, if they require one.
        serve: How to serve a LoRA adapter: `adapter` sends LoRA requests beside the frozen base; `merged` merges it
            into a full copy of the weights at each sync, which is needed where vLLM has no support (DoRA).
        max_in_flight: Maximum number of outstanding samples per server, over all ranks; at least its --max-num-seqs.
        timeout: Seconds within which a server must return a sample or load weights; otherwise it counts as lost.
        weight_transfer: How weights reach the servers: `folder` writes them to `shared_folder`; `nccl` sends them from
            the GPU of the trainer's first rank to those of the servers, which requires vLLM on both sides. Adapters
            are then merged (`serve merged`).

    Raises:
        UserError: An option is out of range.
    """

    concurrent = True

    def __init__(
        self,
        urls: list[str],
        shared_folder: str = "runs/weights",
        model: str | None = None,
        api_key_variable: str = "VLLM_API_KEY",
        serve: Literal["adapter", "merged"] = "adapter",
        max_in_flight: PositiveInt = 256,
        timeout: PositiveFloat = 1800.0,
        weight_transfer: Literal["folder", "nccl"] = "folder",
    ) -> None:
        check_ranges(VLLMServerEngine, locals())
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        for url in self.urls or [""]:
            if not url.startswith(("http://", "https://")):
                raise UserError(f"--data.engine.urls has {url!r}: give URLs of servers, such as http://127.0.0.1:8000.")
        if len(set(self.urls)) < len(self.urls):
            raise UserError(f"--data.engine.urls: {', '.join(self.urls)} lists a server twice; list each server once.")
        self.shared_folder = shared_folder
        self.model = model
        self.api_key_variable = api_key_variable
        self.serve = serve
        self.max_in_flight = max_in_flight
        self.timeout = timeout
        self.weight_transfer = weight_transfer
        self._servers: Servers | None = None
        self._running = False
        self._transfer: WeightTransfer | None = None
        self._published: PublishedWeights | None = None
        self._generation: Generation | None = None

    # Checks -----------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Checks that every server is reachable and configured as the engine requires.

        Raises:
            UserError: A server is not, or the trainer lacks a library or the GPU that the engine requires.
        """
        require_client_libraries("VLLMServerEngine")
        if self.weight_transfer == "nccl":
            nccl.check_installation()
        if self._servers is None:
            key = os.environ.get(self.api_key_variable)
            options = (key, self.api_key_variable, self.model, self.timeout)
            servers = Servers([ServerClient(url, *options) for url in self.urls])
            servers.check(self._check_server)
            self._servers = servers

    async def _check_server(self, server: ServerClient) -> None:
        """Checks one server before any model is loaded."""
        await server.check()
        if self.weight_transfer == "nccl":
            await server.check_weight_transfer("nccl")

    def check_sampling(
        self,
        format: ThinkingFormat,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        group_size: int,
        max_model_len: int,
    ) -> None:
        """Checks every server's context length and tokenizer.

        Args:
            format: Not used.
            tokenizer: The policy's tokenizer.
            sampling: The run's temperature, limits and stops.
            group_size: Not used.
            max_model_len: Longest prompt + completion in tokens.

        Raises:
            UserError: A server's context is too short, or its tokenizer differs.
        """
        text = "".join(("The quick brown fox: 1 + 2 = 3\n", *sampling.stop))
        ids = tokenizer(text, add_special_tokens=False).input_ids

        async def check(server: ServerClient) -> None:
            if server.max_model_len < max_model_len:
                raise ServerLost(
                    f"supports {server.max_model_len:,} tokens, but --data.max_prompt_tokens + --data.max_new_tokens "
                    f"is {max_model_len:,}; start it with --max-model-len {max_model_len}"
                )
            await server.check_tokenizer(text, ids)

        self._checked_servers.check(check)

    def check_policy(self, config: PretrainedConfig) -> None:
        """Checks that vLLM computes the rotary embeddings of the policy as the trainer does.

        Args:
            config: The policy's configuration.

        Raises:
            UserError: It does not.
        """
        check_vllm_rope(config)

    def check_adapter(self, config: dict[str, Any]) -> None:
        """Checks that the servers can serve the policy's adapter.

        Args:
            config: PEFT's adapter_config.json as plain data.

        Raises:
            UserError: They cannot.
        """
        if self.serve == "merged":
            return
        if (reason := unsupported_reason(config)) is not None:
            raise UserError(f"vLLM cannot serve this adapter: {reason}; use --data.engine.serve merged.")
        if self.weight_transfer == "nccl":
            raise UserError(
                "--data.engine.weight_transfer is nccl, which sends full weights alone, and --data.engine.serve is "
                "adapter: set serve to merged, or weight_transfer to folder."
            )
        self._checked_servers.check(lambda server: server.check_adapters(config["r"]))

    @property
    def _checked_servers(self) -> Servers:
        """The servers; available after `check`."""
        assert self._servers is not None
        return self._servers

    def start(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_model_len: int, dtype: torch.dtype
    ) -> None:
        """Opens the shared folder, or prepares the transfer by NCCL; the servers are already running.

        Args:
            policy: The trainer's policy, for the names of its weights.
            tokenizer: Not used: the servers have the same tokenizer.
            max_model_len: Longest prompt + completion in tokens.
            dtype: Dtype in which weights are written or sent.

        Raises:
            UserError: The folder cannot be written to, or a check fails.
        """
        self.check()
        servers = self._checked_servers
        for server in servers.clients:
            if server.dtype != str(dtype):
                name = str(dtype).removeprefix("torch.")
                rank_zero_warn(
                    f"vLLM server {server.url} computes in {server.dtype} and the trainer in {dtype}, so their "
                    f"log-probs differ (engine/mismatch_max); start it with --dtype {name}."
                )
        self._weights = VLLMWeights(policy)
        self._max_model_len = max_model_len

        def open_transfer() -> WeightTransfer | None:
            if collectives.rank() > 0:
                return None
            if self.weight_transfer == "nccl":
                return NCCLTransfer(servers, self._weights.shapes(policy), dtype)
            return SharedFolder(self.shared_folder, dtype)

        self._transfer = collectives.run_on_all_ranks(open_transfer)
        self._running = True

    # Weights ----------------------------------------------------------------------------------------------------------

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int, adapter: AdapterWeights | None = None) -> None:
        """Brings the policy's weights to every server; rank 0 does so.

        Args:
            weights: Every item of the policy's `state_dict()`; with an adapter, those of its base, read once.
            version: Version of these weights.
            adapter: The policy's adapter, if it has one.

        Raises:
            ValueError: A name of the policy's `state_dict()` is missing; the servers would keep a stale weight.
            UserError: No server loaded the weights, or they cannot be written or sent; raised on every rank.
        """
        self._check_running()
        self.version = None
        collectives.run_on_all_ranks(lambda: self._publish(iter(weights), version, adapter))
        self._published, *_ = collectives.all_gather_object(self._published)
        self.version = version

    def _publish(self, weights: Iterator[tuple[str, Tensor]], version: int, adapter: AdapterWeights | None) -> None:
        """Publishes the weights on rank 0, and makes the servers load them."""
        published = weights
        if adapter is not None and self.serve == "merged":
            published, adapter = merge_adapters(weights, adapter), None
        needs_weights = adapter is None or self._published is None
        try:
            if self._transfer is not None:
                checkpoint = self._weights.load_all(published) if needs_weights else None
                self._published = self._transfer.publish(checkpoint, version, adapter)
        finally:
            deque(weights if needs_weights else (), maxlen=0)  # every rank takes part in all-gathering every tensor
        self._load_weights()

    def reload_lost_weights(self) -> None:
        """Reloads the weights of restarted servers from rank 0, before the other ranks use them.

        By NCCL a server receives weights at a sync only: the engine then has no version, so that one follows.
        """
        published = self._published
        if published is not None and published.weights is None:
            lacking = collectives.run_on_all_ranks(lambda: self._any_server_lacks(published))
            if any(collectives.all_gather_object(lacking)):
                self.version = None
        elif collectives.world_size() > 1:  # a single process does so in `generate`
            collectives.run_on_all_ranks(self._load_weights)

    def _any_server_lacks(self, published: PublishedWeights) -> bool:
        """On rank 0, whether a healthy server does not hold the published weights."""
        if self._transfer is None:
            return False
        servers = self._checked_servers
        return servers.run(lambda: servers.any_lacks(published))

    def _load_weights(self) -> None:
        """On rank 0, makes all servers load the published weights."""
        if self._transfer is not None:  # only on rank 0
            self._checked_servers.run(self._usable_servers)

    async def _usable_servers(self) -> list[ServerClient]:
        """Servers that hold the published weights; rank 0 first loads them where they are missing."""
        published = self._published
        assert published is not None
        load = collectives.rank() == 0
        return await self._checked_servers.usable(lambda server: server.ensure_weights(published, load))

    # Generation -------------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Samples:
        """Samples every request once per seed, on all servers concurrently.

        Args:
            requests: Prompts as tokens, each with its seeds.
            sampling: Temperature, limits and stops; nothing else ends a sample, not even the end-of-text token.

        Returns:
            Samples in the order of the requests.

        Raises:
            UserError: A prompt leaves no room for a token within max_model_len, or no server is usable.
            RuntimeError: No weights were synced, or a server rejected a request.
        """
        self._check_running()
        if self.version is None:
            raise RuntimeError("VLLMServerEngine has no weights: call sync before generate.")
        version = self.version
        calls = [
            Call(group, request.prompt_ids, seed, max_completion_tokens(len(request.prompt_ids), self._max_model_len))
            for group, request in enumerate(requests)
            for seed in request.seeds
        ]
        self._generation = Generation(self._checked_servers, self._usable_servers, self.max_in_flight)
        completions = self._generation.run(calls, sampling)
        return Samples(
            completion_ids=[completion.ids for completion in completions],
            logprobs=[completion.logprobs for completion in completions],
            finish=[completion.finish for completion in completions],
            weight_version=version,
        )

    # State ------------------------------------------------------------------------------------------------------------

    def _check_running(self) -> None:
        """Raises RuntimeError before `start` and after `close`."""
        if not self._running:
            raise RuntimeError("VLLMServerEngine is not running: call start first.")

    def close(self) -> None:
        """Cancels a running `generate`, and removes what the weights sync holds; harmless when called twice."""
        if self._generation is not None:
            self._generation.cancel()
        if self._transfer is not None:
            self._transfer.close()
        self._transfer, self._published, self.version, self._running = None, None, None, False
        self._servers, self._generation = None, None
