"""Checks of VLLMServerEngine before any model is loaded: options, and the configuration of fake servers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_server import KEY, LORA, FakeServer, answer_with, set_model_config, start

from rlmt.engines import VLLMServerEngine
from rlmt.errors import UserError
from rlmt.types import Sampling


def set_answer(path: str, answer: Any) -> Callable[[FakeServer], None]:
    """A function that replaces a server's answers to a path."""
    return lambda fake: setattr(fake, "script", answer_with(path, answer))


@pytest.mark.parametrize(
    ("misconfigure", "message"),
    [
        (set_answer("/health", ConnectionResetError), "cannot be reached"),
        (set_answer("/health", 503), r"is not healthy \(status 503 of /health\)"),
        (set_answer("/v1/models", 404), "has no /v1/models .*; start a vLLM server"),
        (set_answer("/v1/models", {"data": [{"id": "x"}]}), "lists no vLLM model"),
        (set_answer("/server_info", 404), "has no /server_info .*VLLM_SERVER_DEV_MODE=1"),
        (set_answer("/server_info", {"vllm_config": "text"}), "does not report its configuration .*; start vLLM 0.32"),
        (
            set_model_config("logprobs_mode", "raw_logprobs"),
            "has logprobs_mode .*start it with --logprobs-mode processed_logprobs",
        ),
        (
            set_model_config("generation_config", "auto"),
            "has generation_config .*start it with --generation-config vllm",
        ),
    ],
)
def test_misconfigured_server_raises(
    misconfigure: Callable[[FakeServer], None], message: str, fakes: list[FakeServer]
) -> None:
    misconfigure(fakes[1])
    engine = VLLMServerEngine([fake.url for fake in fakes])
    for _ in range(2):
        with pytest.raises(UserError, match=f"^vLLM server {fakes[1].url} {message}") as caught:
            engine.check()
        assert "\n" not in str(caught.value) and KEY not in str(caught.value)


class Tokenizer:
    """One token per byte, as in the fake servers."""

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        assert not add_special_tokens
        return type("Encoding", (), {"input_ids": list(text.encode())})


def test_context_length_tokenizer_and_adapters_are_checked(fakes: list[FakeServer]) -> None:
    engine = VLLMServerEngine([fake.url + "/v1/" for fake in fakes])
    engine.check()
    calls = len(fakes[0].calls)
    engine.check()
    assert len(fakes[0].calls) == calls  # checked only once
    sampling = Sampling(1.0, 9, stop=("</response>",))
    format: Any = None
    engine.check_sampling(format, Tokenizer(), sampling, 8, 64)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="supports 64 tokens, .* is 65; start it with --max-model-len 65"):
        engine.check_sampling(format, Tokenizer(), sampling, 8, 65)  # type: ignore[arg-type]
    fakes[1].script = answer_with("/tokenize", {"tokens": [1, 2]})
    with pytest.raises(UserError, match=f"{fakes[1].url} serves policy with another tokenizer than the policy's"):
        engine.check_sampling(format, Tokenizer(), sampling, 8, 64)  # type: ignore[arg-type]
    engine.check_adapter(LORA)
    merged = VLLMServerEngine(engine.urls, serve="merged")
    for config, message in (
        (LORA | {"use_dora": True}, "DoRA; use --data.engine.serve merged"),
        (LORA | {"r": 16}, "serves adapters up to rank 8; start it with --enable-lora --max-lora-rank 16"),
    ):
        with pytest.raises(UserError, match=message):
            engine.check_adapter(config)
        merged.check_adapter(config)
    fakes[0].script = answer_with("/v1/load_lora_adapter", 404)
    with pytest.raises(UserError, match="start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        engine.check_adapter(LORA)
    fakes[0].config["lora_config"] = None
    with pytest.raises(UserError, match="serves no adapters; start it with --enable-lora --max-lora-rank 8"):
        engine.check_adapter(LORA)


def test_different_dtype_warns(fakes: list[FakeServer], tmp_path: Path, messages: list[str]) -> None:
    set_model_config("dtype", "torch.bfloat16")(fakes[1])
    start(fakes, tmp_path)
    assert len(messages) == 1
    assert f"{fakes[1].url} computes in torch.bfloat16 and the trainer in torch.float32" in messages[0]
    assert messages[0].endswith("start it with --dtype float32.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, "urls has ''"),
        ({"urls": ["node1:8000"]}, "urls has 'node1:8000': give URLs of servers"),
        ({"urls": ["http://a:1", "http://a:1/"]}, "lists a server twice"),
        ({"urls": ["http://a:1"], "max_in_flight": 0}, "max_in_flight is 0: must be an integer above 0"),
        ({"urls": ["http://a:1"], "timeout": -1}, "timeout is -1: must be a number above 0"),
    ],
)
def test_invalid_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VLLMServerEngine(**options)
