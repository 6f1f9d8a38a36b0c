"""One vLLM server over HTTP: what it is, which weights it holds, samples from it.

What a server holds it tells itself: after its weights are loaded it is given their label (vLLM's `weight_version`),
which is gone when it starts anew, and is another one after each load. So nothing here has to remember what became of a
server.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from time import monotonic
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from rlmt.engines.vllm_server.weight_transfer import PublishedWeights
from rlmt.errors import UserError
from rlmt.types import FinishReason, Sampling

if TYPE_CHECKING:
    import httpx

PATIENCE = 10.0
"""Seconds to wait for a connection and for short answers."""
SLOW_PATIENCE = 60.0
"""Seconds to wait for a server's description of itself, which it gathers at the first call, and for its cache."""

_DEV_MODE = "start it with VLLM_SERVER_DEV_MODE=1 in its environment (vLLM 0.32 or later), or weights cannot reach it"


class ServerLost(Exception):
    """The server cannot be used as it is; the message says why, and the cure where there is one."""


@dataclass(frozen=True)
class Completion:
    """One sample."""

    ids: list[int]
    logprobs: list[float]
    finish: FinishReason


class ServerClient:
    """A vLLM server at a URL; its methods want to be called while it is `connected`.

    Args:
        url: such as http://127.0.0.1:8000.
        key: API key, or None.
        key_variable: environment variable that the key is from, for messages.
        model: name of the model that it should serve; None takes whatever it serves.
        timeout: seconds that a sample or a load of weights may take.
    """

    def __init__(self, url: str, key: str | None, key_variable: str, model: str | None, timeout: float) -> None:
        self.url = url
        self.max_model_len = 0
        """Longest prompt + completion in tokens; known after `look`."""
        self.dtype = ""
        """Number format that it computes in, as torch names it; known after `options`."""
        self._key, self._key_variable = key, key_variable
        self._wanted, self._model = model, ""
        self._timeout = timeout
        self._adapter: str | None = None
        self._held: str | None = None

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Connections to the server, for one event loop."""
        import httpx
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

        trusted = _certificates()
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        # Trying again is not the client's affair: it draws random numbers for it, and would ask the same server.
        client = AsyncOpenAI(
            api_key=self._key or "none",
            base_url=f"{self.url}/v1",
            timeout=Timeout(self._timeout, connect=PATIENCE),
            max_retries=0,
            http_client=DefaultAsyncHttpxClient(verify=trusted),
        )
        http = httpx.AsyncClient(base_url=self.url, headers=headers, verify=trusted)
        async with http as self._http, client as self._openai:
            yield

    # What it is ------------------------------------------------------------------------------------------------------

    async def introduce(self) -> None:
        """Sees that the server can be used, and as what; raises as `look` and `options` do."""
        await self.look()
        await self.options()

    async def look(self) -> None:
        """Sees that the server is healthy, takes the key, and serves the model.

        Raises:
            Unusable: one of them is not so.
        """
        health = await self._ask("GET", "/health")
        if health.status_code != 200:
            raise ServerLost(f"is not healthy (status {health.status_code} of /health); see its log")
        served = {model["id"]: model for model in await self._models() if model.get("parent") is None}
        if self._wanted is not None and self._wanted not in served:
            raise ServerLost(
                f"serves {' and '.join(served)}, not {self._wanted}; set --data.engine.model to what it serves, or "
                f"start it with --served-model-name {self._wanted}"
            )
        self._model = self._wanted or next(iter(served))
        self.max_model_len = int(served[self._model]["max_model_len"])

    async def _models(self) -> list[dict[str, Any]]:
        """The model, and the adapters on it."""
        cure = "start a vLLM server of version 0.32 or later there"
        models: list[dict[str, Any]] = (await self._json("GET", "/v1/models", cure)).get("data", [])
        if not any("max_model_len" in model for model in models):
            raise ServerLost(f"names no model of vLLM's in /v1/models; {cure}")
        return models

    async def options(self) -> dict[str, Any]:
        """The configuration that the server runs with.

        Raises:
            Unusable: it does not let its weights be changed, or its samples would not be the policy's.
        """
        told = await self._json("GET", "/server_info?config_format=json", _DEV_MODE, SLOW_PATIENCE)
        options = told.get("vllm_config")
        if not isinstance(options, dict):
            raise ServerLost("does not tell its configuration in /server_info; start vLLM 0.32 or later")
        self.dtype = str(options["model_config"].get("dtype"))
        for name, wanted, why in (
            ("logprobs_mode", "processed_logprobs", "log-probs are not those at the sampling temperature"),
            ("generation_config", "vllm", "the model's generation_config.json changes how it samples"),
        ):
            if (has := options["model_config"].get(name)) != wanted:
                option = f"--{name.replace('_', '-')} {wanted}"
                raise ServerLost(f"has {name} {has}, so {why}; start it with {option}")
        return options

    async def check_adapters(self, rank: int) -> None:
        """Sees that the server can be given adapters of a rank.

        Raises:
            Unusable: it cannot.
        """
        lora = (await self.options())["lora_config"]
        if lora is None or lora["max_lora_rank"] < rank:
            has = "serves no adapters" if lora is None else f"takes adapters up to rank {lora['max_lora_rank']}"
            raise ServerLost(f"{has}; start it with --enable-lora --max-lora-rank {rank} or more")
        if (await self._ask("GET", "/v1/load_lora_adapter")).status_code == 404:
            raise ServerLost(
                "does not let adapters be loaded; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
            )

    async def check_tokens(self, text: str, ids: list[int]) -> None:
        """Sees that the server takes text apart as the policy's tokenizer does: it finds the stop strings.

        Raises:
            Unusable: it has another tokenizer.
        """
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        if (await self._json("POST", "/tokenize", "start it with the policy's tokenizer", json=body))["tokens"] != ids:
            raise ServerLost(f"serves {self._model} with another tokenizer than the policy's; start it with the policy")

    # What it holds ----------------------------------------------------------------------------------------------------

    async def bring_up(self, published: PublishedWeights, load: bool) -> None:
        """Sees that the server can be used, and has it load what it lacks.

        Args:
            published: weights that it has to hold.
            load: whether to do so; of several processes that sample from a server one loads.

        Raises:
            Unusable: it cannot be used, or does not hold them.
            UserError: another run has put its weights there meanwhile.
        """
        await self.look()
        label = await self._label()
        if self._held is not None and label.startswith("rlmt-") and not label.startswith(published.prefix):
            raise UserError(
                f"vLLM server {self.url}: another run loads its weights there, too; give each run servers of its own"
            )
        self._adapter = None if published.adapter is None else published.label
        if not label.startswith(f"{published.label}."):
            if not load:
                raise ServerLost("does not hold the policy's weights")
            if published.adapter is None or not label.startswith(published.prefix):
                await self._load(published.weights)
            if published.adapter is not None:
                await self._load_adapter(published.label, published.adapter)
            await self._drop_cache()
            label = f"{published.label}.{uuid4().hex[:8]}"
            await self._post("/update_weight_version", {"new_version": label}, "cannot be told its weights")
        self._held = label

    async def still_holds(self) -> bool:
        """Whether the server has had the weights all the time since `bring_up`, and nobody has loaded them anew."""
        return await self._label() == self._held

    async def _label(self) -> str:
        return str((await self._json("GET", "/weight_info", _DEV_MODE))["weight_version"])

    async def _load(self, folder: str) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        trouble = (
            f"could not load the policy's weights from {folder} (it has to serve the policy's architecture, and to see "
            "--data.engine.shared_folder under the same path)"
        )
        await self._post("/collective_rpc", body, trouble)

    async def _load_adapter(self, name: str, folder: str) -> None:
        """Loads an adapter in place of earlier ones, of this run or of one that is over."""
        for old in (model["id"] for model in await self._models() if model.get("parent") is not None):
            if old.startswith("rlmt-"):
                await self._post("/v1/unload_lora_adapter", {"lora_name": old}, f"could not unload the adapter {old}")
        body = {"lora_name": name, "lora_path": folder}
        trouble = (
            f"could not load the adapter from {folder} (if it cannot serve such a one, use --data.engine.serve merged)"
        )
        await self._post("/v1/load_lora_adapter", body, trouble)

    async def _drop_cache(self) -> None:
        """Drops what was computed with other weights; that fails while requests run, as those do that were given up."""
        began = monotonic()
        while not (await self._json("POST", "/reset_prefix_cache", "see its log")).get("success"):
            if monotonic() - began > SLOW_PATIENCE:
                raise ServerLost("did not drop its prefix cache: it is still busy with other requests")
            await asyncio.sleep(0.2)

    # Samples ----------------------------------------------------------------------------------------------------------

    async def complete(self, prompt_ids: Sequence[int], seed: int, max_tokens: int, sampling: Sampling) -> Completion:
        """Draws one sample.

        Raises:
            Unusable: the server is gone, or lost the weights.
            RuntimeError: it refused the request.
        """
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        try:
            answer = await self._openai.completions.create(
                model=self._adapter or self._model,
                prompt=list(prompt_ids),
                max_tokens=max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=seed,
                stop=list(sampling.stop),
                logprobs=0,  # of the sampled token alone
                extra_body={
                    "stop_token_ids": list(sampling.stop_token_ids),
                    "include_stop_str_in_output": True,
                    "ignore_eos": True,
                    "skip_special_tokens": False,
                    "return_token_ids": True,
                },
            )
        except APITimeoutError as error:
            raise ServerLost(f"gave no sample within {self._timeout:g} s (--data.engine.timeout)") from error
        except APIConnectionError as error:
            raise ServerLost(f"is gone ({_reason(error.__cause__ or error)})") from error
        except APIStatusError as error:
            if error.status_code in (400, 422):
                raise RuntimeError(f"vLLM server {self.url} refused a request: {_line(error.message)}") from error
            raise ServerLost(f"answered with status {error.status_code}: {_line(error.message)}") from error
        choice: Any = answer.choices[0]
        if choice.finish_reason not in ("stop", "length"):
            raise ServerLost(f"broke a sample off ({choice.finish_reason})")
        return Completion(
            list(choice.token_ids), list(choice.logprobs.token_logprobs), FinishReason(choice.finish_reason)
        )

    # HTTP -------------------------------------------------------------------------------------------------------------

    async def _ask(self, method: str, path: str, patience: float = PATIENCE, **options: Any) -> httpx.Response:
        import httpx

        try:
            response = await self._http.request(
                method, path, timeout=httpx.Timeout(patience, connect=PATIENCE), **options
            )
        except httpx.TransportError as error:
            what = "does not answer" if isinstance(error, httpx.ReadTimeout) else "cannot be reached"
            raise ServerLost(f"{what} ({_reason(error)})") from error
        if response.status_code in (401, 403):
            state = "refuses the API key in" if self._key else "wants an API key, and there is none in"
            raise ServerLost(f"{state} the environment variable {self._key_variable}; set it to the server's --api-key")
        return response

    async def _json(
        self, method: str, path: str, cure: str, patience: float = PATIENCE, **options: Any
    ) -> dict[str, Any]:
        response = await self._ask(method, path, patience, **options)
        try:
            if response.status_code == 200 and isinstance(body := response.json(), dict):
                return body
        except ValueError:
            pass
        raise ServerLost(f"has no {path.partition('?')[0]} (status {response.status_code}); {cure}")

    async def _post(self, path: str, body: dict[str, Any], trouble: str) -> None:
        response = await self._ask("POST", path, self._timeout, json=body)
        if response.status_code != 200:
            try:
                reason = str(response.json()["error"]["message"])
            except (ValueError, KeyError, TypeError):
                reason = response.text
            raise ServerLost(f"{trouble}: {_line(reason)}")


@cache
def _certificates() -> ssl.SSLContext:
    """Read once: that takes longer than most requests."""
    import httpx

    return httpx.create_ssl_context()


def _reason(error: BaseException) -> str:
    return _line(str(error)) or type(error).__name__


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
