"""Samples from vLLM servers: official ones, in processes of their own, on this machine or on others.

Weights go to the servers through a shared folder, which each loads when told so. Before anything is sampled every
server that can be reached holds the policy's present weights, and says so itself; one that does not is not used. A
server that dies costs its requests, which the others take over; one that comes back is used again at the next rollout.
A sample depends on prompt, seed and weights alone, so it does not matter which server draws it.

Of several ranks each asks for its own samples, and the first alone gives servers weights, while the others put together
with it what is in shards. Ranks wait for each other where weights change, never while samples are drawn.

Left out: vLLM's own transfer of weights (NCCL, IPC and others), which wants GPUs on both sides; and starting servers.
"""

from __future__ import annotations

import asyncio
import importlib.util
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlmt.distributed import collectives
from rlmt.engines.base import Engine, max_completion_tokens
from rlmt.engines.vllm.lora import unsupported_reason
from rlmt.engines.vllm_server.client import Completion, ServerClient, ServerLost
from rlmt.engines.vllm_server.fleet import Fleet, NoServerLeft, gather_all, open_connections
from rlmt.engines.vllm_server.weight_transfer import PublishedWeights, SharedFolder
from rlmt.engines.weights import merge_adapters
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.adapters import base_tensors
from rlmt.options import PositiveFloat, PositiveInt, check_ranges
from rlmt.types import AdapterWeights, SampleRequest, Samples, Sampling


class VLLMServerEngine(Engine):
    """Draws samples with vLLM servers, which can do so while the policy is trained on other samples.

    Args:
        urls: the servers', such as http://127.0.0.1:8000.
        shared_folder: folder for weights on their way; servers have to see it under the same path.
        model: name of the model that the servers serve; None takes whatever each does.
        api_key_variable: environment variable that holds the servers' API key, where they want one.
        serve: what becomes of a LoRA adapter: `adapter` serves it as one, beside the frozen base; `merged` gives the
            servers weights that hold it, all of them at each sync: for what vLLM cannot serve (DoRA).
        max_in_flight: most samples that one server is asked for at a time, by all ranks together; no fewer than its
            --max-num-seqs.
        timeout: seconds within which a server has to give a sample, or to load weights, or counts as lost.

    Raises:
        UserError: an option is out of range.
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
                raise UserError(f"--data.engine.urls has {url!r}: give URLs of servers, such as http://127.0.0.1:8000")
        if len(set(self.urls)) < len(self.urls):
            raise UserError(f"--data.engine.urls names a server twice: {', '.join(self.urls)}")
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
        self._break_off: Callable[[], object] | None = None

    # Before a run -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Looks at every server.

        Raises:
            UserError: one cannot be reached or used as it is, or the clients' libraries are missing.
        """
        if any(importlib.util.find_spec(name) is None for name in ("httpx", "openai")):
            raise UserError("VLLMServerEngine needs httpx and openai: pip install 'rlmt[servers]'")
        if not self._servers:
            key = os.environ.get(self.api_key_variable)
            servers = [ServerClient(url, key, self.api_key_variable, self.model, self.timeout) for url in self.urls]
            self._for_all(servers, ServerClient.introduce)
            first = collectives.rank() % len(servers)  # the one that is asked first: not the same on all ranks
            self._servers = servers[first:] + servers[:first]

    def check_run(
        self,
        format: ThinkingFormat,  # noqa: A002 - as in the base class
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        group_size: int,
        max_model_len: int,
    ) -> None:
        """Raises UserError when a server's context is too short or its tokenizer another one."""
        text = "".join(("The quick brown fox: 1 + 2 = 3\n", *sampling.stop))
        ids = tokenizer(text, add_special_tokens=False).input_ids

        async def fits(server: ServerClient) -> None:
            if server.max_model_len < max_model_len:
                raise ServerLost(
                    f"takes {server.max_model_len:,} tokens, and --data.max_prompt_tokens + --data.max_new_tokens are "
                    f"{max_model_len:,}; start it with --max-model-len {max_model_len}"
                )
            await server.check_tokens(text, ids)

        self._for_all(self._servers, fits)

    def check_adapter(self, config: dict[str, Any]) -> None:
        """Raises UserError when the servers cannot serve such an adapter.

        Args:
            config: PEFT's adapter_config.json as plain data.
        """
        if self.serve == "merged":
            return
        if (reason := unsupported_reason(config)) is not None:
            raise UserError(f"vLLM cannot serve this adapter: {reason}; use --data.engine.serve merged")
        self._for_all(self._servers, lambda server: server.check_adapters(config["r"]))

    def _for_all(self, servers: list[ServerClient], do: Callable[[ServerClient], Awaitable[None]]) -> None:
        """Does something with every server at once, on every rank; UserError for the first that cannot be used."""

        async def one(server: ServerClient) -> None:
            try:
                await do(server)
            except ServerLost as error:
                raise UserError(f"vLLM server {server.url} {error}") from error

        collectives.run_on_all_ranks(
            lambda: asyncio.run(open_connections(servers, lambda: gather_all(map(one, servers))))
        )

    def start(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_model_len: int, dtype: torch.dtype
    ) -> None:
        """Opens the shared folder; the servers run already.

        Args:
            policy: the trainer's policy, for the names of its weights.
            tokenizer: not used, since the servers have the same.
            max_model_len: longest prompt + completion in tokens.
            dtype: number format that weights travel in.

        Raises:
            UserError: the folder cannot be written to, or a check fails.
        """
        self.check()
        for server in self._servers:
            if server.dtype != str(dtype):
                name = str(dtype).removeprefix("torch.")
                rank_zero_warn(
                    f"vLLM server {server.url} computes in {server.dtype} and the trainer in {dtype}, so their "
                    f"log-probs differ (engine/mismatch_max); start it with --dtype {name}"
                )
        self._names = frozenset(base_tensors(policy))
        self._max_model_len = max_model_len
        self._folder = collectives.run_on_all_ranks(
            lambda: SharedFolder(self.shared_folder, dtype) if collectives.rank() == 0 else None
        )
        self._running = True

    # Weights ----------------------------------------------------------------------------------------------------------

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int, adapter: AdapterWeights | None = None) -> None:
        """Puts the policy's weights into the shared folder and has every server load them; that does the first rank.

        Args:
            weights: every item of the policy's `state_dict()`; with an adapter those of its base, read once.
            version: version of these weights.
            adapter: the policy's adapter, if it has one.

        Raises:
            ValueError: a name of the policy's `state_dict()` is missing; the servers would keep a stale weight.
            UserError: no server took them, or they cannot be written; on every rank.
        """
        self._check_running()
        self.version = None
        collectives.run_on_all_ranks(lambda: self._publish(iter(weights), version, adapter))
        self._published, *_ = collectives.all_gather_object(self._published)
        self.version = version

    def _publish(self, weights: Iterator[tuple[str, Tensor]], version: int, adapter: AdapterWeights | None) -> None:
        passed = weights
        if adapter is not None and self.serve == "merged":
            passed, adapter = merge_adapters(weights, adapter), None
        needed = adapter is None or self._published is None
        try:
            if self._folder is not None:
                self._published = self._folder.publish(passed if needed else None, self._names, version, adapter)
        finally:
            deque(weights if needed else (), maxlen=0)  # all ranks put them together, whoever writes
        self._load()

    def renew(self) -> None:
        """Has the first of several ranks give weights to servers that started anew, before the others look at them."""
        if collectives.world_size() > 1:  # one rank does so when it samples
            collectives.run_on_all_ranks(self._load)

    def _load(self) -> None:
        if self._folder is not None:  # the first rank
            asyncio.run(open_connections(self._servers, self._bring_up))

    async def _bring_up(self) -> list[ServerClient]:
        """The servers that hold the published weights; on the first rank once all that it reaches have loaded them."""
        published = self._published
        assert published is not None

        async def one(server: ServerClient) -> bool:
            try:
                await server.bring_up(published, load=collectives.rank() == 0)
            except ServerLost as error:
                self._lose(server, error)
                return False
            if self._lost.pop(server.url, None) is not None:
                rank_zero_info(f"vLLM server {server.url} is used again")
            return True

        usable = await asyncio.gather(*map(one, self._servers))
        if not any(usable):
            raise self._none_left()
        return [server for server, good in zip(self._servers, usable, strict=True) if good]

    def _lose(self, server: ServerClient, error: Exception) -> None:
        if server.url not in self._lost:
            rank_zero_warn(f"vLLM server {server.url} is not used for now: it {error}")
        self._lost[server.url] = str(error)

    def _none_left(self) -> UserError:
        reasons = "; ".join(f"{url} {self._lost[url]}" for url in self.urls if url in self._lost)
        return UserError(f"no vLLM server can be used ({reasons}); start them and go on with --ckpt_path last")

    # Samples ----------------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Samples:
        """Samples every request once per seed, on all servers at once.

        Args:
            requests: prompts as tokens, each with its seeds.
            sampling: temperature, limits and stops; nothing else ends a sample, not even the end-of-text token.

        Returns:
            Samples in the requests' order.

        Raises:
            UserError: a prompt leaves no room for a token within max_model_len, or no server is left.
            RuntimeError: no weights were synced, or a server refused a request.
        """
        self._check_running()
        if self.version is None:
            raise RuntimeError("VLLMServerEngine holds no weights: sync before generate")
        version = self.version
        calls = [
            _Call(group, request.prompt_ids, seed, max_completion_tokens(len(request.prompt_ids), self._max_model_len))
            for group, request in enumerate(requests)
            for seed in request.seeds
        ]
        drawn = asyncio.run(open_connections(self._servers, lambda: self._draw(calls, sampling)))
        ids, logprobs, finish = [[getattr(one, name) for one in drawn] for name in ("ids", "logprobs", "finish")]
        return Samples(ids, logprobs, finish, version)

    async def _draw(self, calls: Sequence[_Call], sampling: Sampling) -> list[Completion]:
        """Has every call answered by a server that holds the published weights before and after it."""
        task = asyncio.current_task()
        assert task is not None
        self._break_off = partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel)
        done: dict[_Call, Completion] = {}
        try:
            while todo := [call for call in calls if call not in done]:
                fleet = Fleet(await self._bring_up(), max(1, self.max_in_flight // collectives.world_size()))
                answers = await gather_all(fleet.run(call.group, partial(self._ask, call, sampling)) for call in todo)
                stale = await self._stale(fleet.living)
                done |= {
                    call: answer for call, (server, answer) in zip(todo, answers, strict=True) if server not in stale
                }
        except NoServerLeft:
            raise self._none_left() from None
        finally:
            self._break_off = None
        return [done[call] for call in calls]

    async def _ask(self, call: _Call, sampling: Sampling, server: ServerClient) -> Completion:
        tokens = min(sampling.max_new_tokens, call.max_completion_tokens)
        try:
            return await server.complete(call.prompt_ids, call.seed, tokens, sampling)
        except ServerLost as error:
            self._lose(server, error)
            raise

    async def _stale(self, servers: Sequence[ServerClient]) -> set[ServerClient]:
        """Those that have not held the published weights all the time, since they were started anew."""
        stale = set()
        for server in servers:
            try:
                if not await server.still_holds():
                    stale.add(server)
            except ServerLost as error:
                self._lose(server, error)
        return stale

    # The rest ---------------------------------------------------------------------------------------------------------

    def _check_running(self) -> None:
        if not self._running:
            raise RuntimeError("VLLMServerEngine is not running: start it first")

    def close(self) -> None:
        """Breaks off what is being drawn and removes the weights from the shared folder; harmless when called twice."""
        if (break_off := self._break_off) is not None:
            with suppress(RuntimeError):  # it has come to its end meanwhile
                break_off()
        if self._folder is not None:
            self._folder.remove()
        self._folder, self._published, self.version, self._running = None, None, None, False
        self._servers, self._lost = [], {}


@dataclass(frozen=True, eq=False)
class _Call:
    """One sample that is wanted."""

    group: int
    prompt_ids: list[int]
    seed: int
    max_completion_tokens: int
