"""Clients that ask a teacher: over HTTP, or with vLLM in this process."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import Any, Protocol

from rlmt.distill.teacher import Teacher
from rlmt.endpoints import CONTINUE, Call, EndpointClient, Ledger, Meter, RequestRejected, Usage
from rlmt.engines.base import max_completion_tokens
from rlmt.engines.vllm.isolation import preserve_process_state
from rlmt.engines.vllm.launch import cpu_args
from rlmt.engines.vllm.sampling import sampling_params
from rlmt.errors import UserError, first_line
from rlmt.formats.resolve import resolve_format
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.assets import load_stop_token_ids
from rlmt.models.cache import shares_cache
from rlmt.models.loading import load_config, load_tokenizer, max_positions
from rlmt.types import Sampling


class TeacherClient(Protocol):
    """An asynchronous context manager that answers calls."""

    meter: Meter

    async def __aenter__(self) -> object: ...

    async def __aexit__(self, *error: Any) -> None: ...

    async def post(self, call: Call) -> dict[str, Any]:
        """Returns the answer to a call, and records it; see `EndpointClient.post`."""


def connect(teacher: Teacher, ledger: Ledger) -> TeacherClient:
    """The client of a teacher, which keeps its answers in a ledger."""
    if teacher.local:
        return LocalTeacher(teacher, ledger)
    return EndpointClient(teacher, ledger, CONTINUE)


class LocalTeacher:
    """Answers chat calls with vLLM in this process; an answer depends on its call alone.

    All calls are in vLLM's queue, which batches them, and each is recorded as soon as it is answered.

    Args:
        teacher: Folder and engine arguments.
        ledger: Where answers are kept.
    """

    def __init__(self, teacher: Teacher, ledger: Ledger) -> None:
        free = replace(teacher, input_price=0.0, output_price=0.0, max_cost=None)
        self.meter = Meter(free, ledger.usage[teacher.model])
        self._folder, self._ledger = teacher.model, ledger
        self._options = teacher.vllm or {}
        self._tokenizer = load_tokenizer(teacher.model)
        # The chat template alone, without a prefilled tag and without thoughts besides those that it is asked for.
        self._format = resolve_format(ThinkingFormat("no_think"), self._tokenizer, teacher.model)
        self._stops = load_stop_token_ids(teacher.model, self._tokenizer, self._format)
        self._engine: Any = None
        self._lock = asyncio.Lock()  # vLLM's engine takes one call at a time
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._driver: asyncio.Task[None] | None = None
        self._closing = False

    async def __aenter__(self) -> LocalTeacher:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform

        config = load_config(self._folder)
        self._max_model_len = int(self._options.get("max_model_len") or max_positions(config))
        options: dict[str, Any] = {"max_model_len": self._max_model_len, "generation_config": "vllm"}
        if current_platform.is_cpu():
            chunked = not shares_cache(config)
            options |= {"enforce_eager": True, "enable_prefix_caching": not chunked, "max_num_seqs": 256}
            options |= cpu_args(1.0, self._max_model_len, 256, chunked)
        options |= self._options | {"trust_remote_code": False}
        try:
            with preserve_process_state():
                self._engine = LLMEngine.from_engine_args(EngineArgs(model=self._folder, **options))
        except Exception as error:  # vLLM raises many types; the user needs its reason in one line
            raise UserError(
                f"--teacher.model {self._folder}: vLLM cannot load it ({first_line(error)}); change --teacher.vllm, or "
                "use an endpoint."
            ) from error
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._closing = True
        if self._driver is not None:
            await self._driver  # a step that has begun must end before the engine does
        self._engine.engine_core.shutdown()

    async def post(self, call: Call) -> dict[str, Any]:
        """Generates the answer to a chat call, and records it.

        Args:
            call: The call.

        Returns:
            JSON of the answer, with the fields of a chat completion that are used.

        Raises:
            RequestRejected: The prompt is too long.
        """
        if (answer := self._ledger.get(call.key)) is not None:
            self.meter.reused += 1
            return answer
        ids = self._format.render(call.body["messages"], self._tokenizer)
        try:
            room = max_completion_tokens(len(ids), self._max_model_len)
        except UserError as error:
            raise RequestRejected(f"{self._folder}: the prompt of {len(ids):,} tokens is too long.") from error
        sampling = Sampling(call.body["temperature"], call.body["max_tokens"], stop_token_ids=self._stops)
        params = sampling_params(sampling, int(call.key[:15], 16), room)
        output = (await self._generate(call.key, ids, params)).outputs[0]
        text = self._format.decode(list(output.token_ids), self._tokenizer)
        answer = _completion(text, output.finish_reason, len(ids), len(output.token_ids))
        self.meter.answers += 1
        self.meter.usage += Usage.from_json(answer)
        self._ledger.add(call, answer)
        return answer

    async def _generate(self, key: str, ids: list[int], params: Any) -> Any:
        """The output of vLLM for a prompt."""
        async with self._lock:
            self._engine.add_request(key, {"prompt_token_ids": ids}, params)
            self._waiting[key] = asyncio.get_running_loop().create_future()
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        return await self._waiting[key]

    async def _drive(self) -> None:
        """Steps the engine while calls wait, and hands out finished outputs."""
        while self._waiting and not self._closing:
            async with self._lock:
                try:
                    outputs = await asyncio.to_thread(self._engine.step)
                except Exception as error:  # otherwise the calls would wait for ever
                    for future in self._waiting.values():
                        if not future.done():
                            future.set_exception(error)
                    self._waiting.clear()
                    return
            for output in outputs:
                if output.finished and not (future := self._waiting.pop(output.request_id)).done():
                    future.set_result(output)


def _completion(text: str, finish: str, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """A chat completion as an endpoint returns it."""
    return {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
    }
