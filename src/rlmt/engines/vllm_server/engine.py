"""Generates rollouts with official vLLM servers in their own processes, on this machine or on others.

Weights sync goes through a shared folder, from which each server loads on request. Before anything is sampled, every
reachable server holds the policy's current weights and reports so itself; a server that does not is not used. If a
server is lost, the others repeat its requests; if it comes back, it is used again at the next rollout. A sample depends
on prompt, seed and weights alone, so it does not matter which server generates it.

In a run of several ranks, each rank requests its own samples. Only rank 0 sends weights to servers, while all ranks
all-gather sharded weights with it. Ranks wait for each other at a weights sync, never during sampling.

Left out: vLLM's own weight transfer (NCCL, IPC and others), which requires GPUs on both sides; and starting servers.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from rlmt import progress
from rlmt.annotations import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from rlmt.distributed import collectives
from rlmt.endpoints.connections import require_client_libraries
from rlmt.engines.base import Engine, max_completion_tokens
from rlmt.engines.vllm.lora import merge_adapters, unsupported_reason
from rlmt.engines.vllm_server.client import Completion, ServerClient, ServerLost
from rlmt.engines.vllm_server.fleet import Fleet, NoServerLeft, gather_or_cancel, run_connected
from rlmt.engines.vllm_server.weight_transfer import PublishedWeights, SharedFolder
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
        shared_folder: Folder for weights sync; servers must see it under the same path.
        model: Name of the model that the servers serve; None accepts the model of each.
        api_key_variable: Environment variable with the servers' API key, if they require one.
        serve: How to serve a LoRA adapter: `adapter` sends LoRA requests beside the frozen base; `merged` merges it
            into a full copy of the weights at each sync, which is needed where vLLM has no support (DoRA).
        max_in_flight: Maximum number of outstanding samples per server, over all ranks; at least its --max-num-seqs.
        timeout: Seconds within which a server must return a sample or load weights; otherwise it counts as lost.

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
        self._servers: list[ServerClient] = []
        self._lost: dict[str, str] = {}
        self._running = False
        self._folder: SharedFolder | None = None
        self._published: PublishedWeights | None = None
        self._cancel: Callable[[], object] | None = None
        self._answered = 0

    # Checks -----------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Checks that every server is reachable and configured as the engine requires.

        Raises:
            UserError: A server is not, or the client libraries are not installed.
        """
        require_client_libraries("VLLMServerEngine")
        if not self._servers:
            key = os.environ.get(self.api_key_variable)
            servers = [ServerClient(url, key, self.api_key_variable, self.model, self.timeout) for url in self.urls]
            self._check_servers(servers, ServerClient.check)
            first = collectives.rank() % len(servers)  # ranks prefer different servers for their first requests
            self._servers = servers[first:] + servers[:first]

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

        self._check_servers(self._servers, check)

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
        self._check_servers(self._servers, lambda server: server.check_adapters(config["r"]))

    def _check_servers(self, servers: list[ServerClient], check: Callable[[ServerClient], Awaitable[None]]) -> None:
        """Checks all servers concurrently, on every rank; UserError for the first that fails."""

        async def check_one(server: ServerClient) -> None:
            try:
                await check(server)
            except ServerLost as error:
                raise UserError(f"vLLM server {server.url} {error}.") from error

        collectives.run_on_all_ranks(
            lambda: asyncio.run(run_connected(servers, lambda: gather_or_cancel(map(check_one, servers))))
        )

    def start(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_model_len: int, dtype: torch.dtype
    ) -> None:
        """Opens the shared folder; the servers are already running.

        Args:
            policy: The trainer's policy, for the names of its weights.
            tokenizer: Not used: the servers have the same tokenizer.
            max_model_len: Longest prompt + completion in tokens.
            dtype: Dtype in which weights are written.

        Raises:
            UserError: The folder cannot be written to, or a check fails.
        """
        self.check()
        for server in self._servers:
            if server.dtype != str(dtype):
                name = str(dtype).removeprefix("torch.")
                rank_zero_warn(
                    f"vLLM server {server.url} computes in {server.dtype} and the trainer in {dtype}, so their "
                    f"log-probs differ (engine/mismatch_max); start it with --dtype {name}."
                )
        self._weights = VLLMWeights(policy)
        self._max_model_len = max_model_len
        self._folder = collectives.run_on_all_ranks(
            lambda: SharedFolder(self.shared_folder, dtype) if collectives.rank() == 0 else None
        )
        self._running = True

    # Weights ----------------------------------------------------------------------------------------------------------

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int, adapter: AdapterWeights | None = None) -> None:
        """Writes the policy's weights to the shared folder and makes every server load them; rank 0 does both.

        Args:
            weights: Every item of the policy's `state_dict()`; with an adapter, those of its base, read once.
            version: Version of these weights.
            adapter: The policy's adapter, if it has one.

        Raises:
            ValueError: A name of the policy's `state_dict()` is missing; the servers would keep a stale weight.
            UserError: No server loaded the weights, or they cannot be written; raised on every rank.
        """
        self._check_running()
        self.version = None
        collectives.run_on_all_ranks(lambda: self._publish(iter(weights), version, adapter))
        self._published, *_ = collectives.all_gather_object(self._published)
        self.version = version

    def _publish(self, weights: Iterator[tuple[str, Tensor]], version: int, adapter: AdapterWeights | None) -> None:
        """Writes the weights on rank 0, and makes the servers load them."""
        published = weights
        if adapter is not None and self.serve == "merged":
            published, adapter = merge_adapters(weights, adapter), None
        needs_weights = adapter is None or self._published is None
        try:
            if self._folder is not None:
                self._published = self._folder.publish(
                    published if needs_weights else None, self._weights, version, adapter
                )
        finally:
            deque(weights if needs_weights else (), maxlen=0)  # every rank takes part in all-gathering every tensor
        self._load_weights()

    def reload_lost_weights(self) -> None:
        """Reloads the weights of restarted servers from rank 0, before the other ranks use them."""
        if collectives.world_size() > 1:  # a single process does so in `generate`
            collectives.run_on_all_ranks(self._load_weights)

    def _load_weights(self) -> None:
        """On rank 0, makes all servers load the published weights."""
        if self._folder is not None:  # only on rank 0
            asyncio.run(run_connected(self._servers, self._usable_servers))

    async def _usable_servers(self) -> list[ServerClient]:
        """Servers that hold the published weights; rank 0 first loads them where they are missing."""
        published = self._published
        assert published is not None

        async def is_usable(server: ServerClient) -> bool:
            try:
                await server.ensure_weights(published, load=collectives.rank() == 0)
            except ServerLost as error:
                self._mark_lost(server, error)
                return False
            if self._lost.pop(server.url, None) is not None:
                rank_zero_info(f"vLLM server {server.url} is used again.")
            return True

        usable = await asyncio.gather(*map(is_usable, self._servers))
        if not any(usable):
            raise self._no_server_error()
        return [server for server, good in zip(self._servers, usable, strict=True) if good]

    def _mark_lost(self, server: ServerClient, error: Exception) -> None:
        """Stores why a server is not usable, and warns the first time."""
        if server.url not in self._lost:
            rank_zero_warn(f"vLLM server {server.url} is not used for now: it {error}.")
        self._lost[server.url] = str(error)

    def _no_server_error(self) -> UserError:
        """The error when every server is lost, with all reasons."""
        reasons = "; ".join(f"{url} {self._lost[url]}" for url in self.urls if url in self._lost)
        return UserError(
            f"--data.engine.urls: no vLLM server is usable ({reasons}); start the servers and resume with "
            "--ckpt_path last."
        )

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
            _Call(group, request.prompt_ids, seed, max_completion_tokens(len(request.prompt_ids), self._max_model_len))
            for group, request in enumerate(requests)
            for seed in request.seeds
        ]
        completions = asyncio.run(run_connected(self._servers, lambda: self._complete_all(calls, sampling)))
        return Samples(
            completion_ids=[completion.ids for completion in completions],
            logprobs=[completion.logprobs for completion in completions],
            finish=[completion.finish for completion in completions],
            weight_version=version,
        )

    async def _complete_all(self, calls: Sequence[_Call], sampling: Sampling) -> list[Completion]:
        """Completes every call on a server that holds the published weights both before and after it."""
        task = asyncio.current_task()
        assert task is not None
        self._cancel = partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel)
        done: dict[_Call, Completion] = {}
        try:
            while todo := [call for call in calls if call not in done]:
                fleet = Fleet(await self._usable_servers(), max(1, self.max_in_flight // collectives.world_size()))
                self._answered = 0
                answers = await gather_or_cancel(
                    fleet.run(call.group, partial(self._complete, call, sampling, len(todo))) for call in todo
                )
                stale = await self._stale_servers(fleet.usable)
                done |= {
                    call: answer for call, (server, answer) in zip(todo, answers, strict=True) if server not in stale
                }
        except NoServerLeft:
            raise self._no_server_error() from None
        finally:
            self._cancel = None
        return [done[call] for call in calls]

    async def _complete(self, call: _Call, sampling: Sampling, calls: int, server: ServerClient) -> Completion:
        """Completes one of some calls on a server, and marks the server as lost if it fails."""
        try:
            completion = await server.complete(call.prompt_ids, call.seed, call.room, sampling)
            self._answered += 1
            progress.report("sampling", self._answered, calls)
            return completion
        except ServerLost as error:
            self._mark_lost(server, error)
            raise

    async def _stale_servers(self, servers: Sequence[ServerClient]) -> set[ServerClient]:
        """Servers that did not hold the published weights all the time, since they were restarted."""
        stale = set()
        for server in servers:
            try:
                if not await server.has_same_weights():
                    stale.add(server)
            except ServerLost as error:
                self._mark_lost(server, error)
        return stale

    # State ------------------------------------------------------------------------------------------------------------

    def _check_running(self) -> None:
        """Raises RuntimeError before `start` and after `close`."""
        if not self._running:
            raise RuntimeError("VLLMServerEngine is not running: call start first.")

    def close(self) -> None:
        """Cancels a running `generate` and removes the weights from the shared folder; harmless when called twice."""
        if (cancel := self._cancel) is not None:
            with suppress(RuntimeError):  # its event loop has ended meanwhile
                cancel()
        if self._folder is not None:
            self._folder.remove()
        self._folder, self._published, self.version, self._running = None, None, None, False
        self._servers, self._lost = [], {}


@dataclass(frozen=True, eq=False)
class _Call:
    """One requested sample."""

    group: int
    prompt_ids: list[int]
    seed: int
    room: int
    """Number of tokens that fit after the prompt."""
