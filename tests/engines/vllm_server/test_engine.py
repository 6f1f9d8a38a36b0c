"""What the engine makes of servers that are slow, misconfigured, dying or reborn: fakes that speak vLLM's HTTP."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlmt.engines import VLLMServerEngine
from rlmt.engines import vllm_server as module
from rlmt.errors import UserError
from rlmt.types import AdapterWeights, FinishReason, SampleRequest, Samples, Sampling

KEY = "open-sesame-3141"
LORA = {"r": 8, "use_dora": False, "bias": "none", "modules_to_save": None}


class Fake:
    """A server whose samples are its weight, prompt and seed; `script` may spoil its answers."""

    def __init__(self) -> None:
        self.weight: float | None = None
        self.label = "default"
        self.adapters: list[str] = []
        self.calls: list[str] = []
        self.prompts: list[int] = []
        self.asked: list[int] = []
        self.outstanding = self.most = 0
        self.pause = 0.0
        self.dead = False
        self.script: Callable[[str, int], Any] = lambda path, number: None
        self.options: dict[str, Any] = {
            "model_config": {
                "logprobs_mode": "processed_logprobs",
                "generation_config": "vllm",
                "dtype": "torch.float32",
            },
            "lora_config": {"max_lora_rank": 8},
        }
        self.max_model_len = 64
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
        """As a supervisor would: same address, initial weights."""
        self.dead, self.label, self.weight, self.adapters = False, "default", -1.0, []

    def serve(self, handler: Any, body: dict[str, Any]) -> None:
        path = handler.path.partition("?")[0]
        with self.lock:
            self.calls.append(path)
            number = self.calls.count(path)
            self.asked += body.get("prompt", [])[:1] if path == "/v1/completions" else []
        status, answer = 200, self.script(path, number)
        if self.dead or answer is ConnectionResetError:
            handler.connection.close()
            raise ConnectionResetError
        if isinstance(answer, int):
            status, answer = answer, {"error": {"message": "so it\nis"}}
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
            return self.complete(body)
        answers = {
            "/health": {},
            "/v1/models": {
                "data": [
                    {"id": "policy", "parent": None, "max_model_len": self.max_model_len},
                    *({"id": name, "parent": "policy"} for name in self.adapters),
                ]
            },
            "/server_info": {"vllm_config": self.options},
            "/weight_info": {"weight_version": self.label},
            "/tokenize": {"tokens": list(body.get("prompt", "").encode())},
            "/reset_prefix_cache": {"success": True},
        }
        return answers.get(path, {"results": [None]})

    def complete(self, body: dict[str, Any]) -> Any:
        with self.lock:
            self.prompts.append(body["prompt"][0])
            self.outstanding += 1
            self.most = max(self.most, self.outstanding)
        time.sleep(self.pause)
        with self.lock:
            self.outstanding -= 1
        wanted = (True, True, False, True, 0)
        names = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "return_token_ids", "logprobs")
        assert tuple(body[name] for name in names) == wanted
        assert body["model"] == (self.adapters[-1] if self.adapters else "policy")
        ids = [body["prompt"][0], body["seed"], body["max_tokens"]]
        choice = {"index": 0, "text": "", "finish_reason": "stop", "token_ids": ids}
        choice["logprobs"] = {"token_logprobs": [self.weight, -0.25, body["temperature"]]}
        return {"id": "1", "object": "text_completion", "created": 0, "model": "policy", "choices": [choice]}


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fake]]:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    fakes = [Fake(), Fake()]
    yield fakes
    for fake in fakes:
        fake.http.shutdown()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(module, "rank_zero_warn", lines.append)
    monkeypatch.setattr(module, "rank_zero_info", lines.append)
    return lines


def running(fakes: list[Fake], folder: Path, **options: Any) -> VLLMServerEngine:
    engine = VLLMServerEngine([fake.url for fake in fakes], str(folder), **options)
    engine.check()
    model: Any = torch.nn.Linear(1, 1, bias=False)
    engine.start(model, None, 64, torch.float32)  # type: ignore[arg-type]
    return engine


def sync(engine: VLLMServerEngine, version: int) -> None:
    engine.sync([("weight", torch.tensor([float(version)]))], version)


def requests(count: int, samples: int = 2) -> list[SampleRequest]:
    return [SampleRequest([i], [100 * i + k for k in range(samples)]) for i in range(count)]


def check(samples: Samples, count: int, version: int, each: int = 2) -> None:
    """Every sample is there once, in order, drawn with these weights."""
    assert samples.completion_ids == [[i, 100 * i + k, 7] for i in range(count) for k in range(each)]
    assert samples.logprobs == [[float(version), -0.25, 0.5]] * (count * each)
    assert samples.finish == [FinishReason.STOP] * (count * each) and samples.weight_version == version


HOW = Sampling(0.5, 7)


def spoil(path: str, answer: Any, first: int = 1) -> Callable[[str, int], Any]:
    return lambda asked, number: answer if asked == path and number >= first else None


def test_work_goes_to_whoever_is_free_and_groups_stay_together(two: list[Fake], tmp_path: Path) -> None:
    fast, slow = two

    def wait(path: str, number: int) -> None:
        while path == "/v1/completions" and len(fast.prompts) < 30:
            time.sleep(0.01)

    slow.script = wait  # of 40 samples, until the other server has drawn 30
    engine = running(two, tmp_path, max_in_flight=4)
    sync(engine, 3)
    check(engine.generate(requests(20), HOW), 20, 3)
    assert 4 <= len(slow.prompts) <= 10 and len(fast.prompts) + len(slow.prompts) == 40
    assert max(fast.most, slow.most) <= 4
    assert sorted(slow.asked[:4]) == [1, 1, 3, 3]  # in turn by the fewest outstanding, whole groups
    engine.close()
    assert not list(tmp_path.iterdir())


def test_a_server_that_dies_costs_its_requests_and_is_used_again_when_it_is_back(
    two: list[Fake], tmp_path: Path, said: list[str]
) -> None:
    engine = running(two, tmp_path, max_in_flight=2)
    sync(engine, 1)
    two[0].script = spoil("/v1/completions", ConnectionResetError, first=4)
    check(engine.generate(requests(10), HOW), 10, 1)
    two[0].dead = True
    assert len(said) == 1 and said[0].startswith(f"vLLM server {two[0].url} is not used for now: it is gone (")
    done = len(two[0].prompts)
    check(engine.generate(requests(10), HOW), 10, 1)
    sync(engine, 2)
    check(engine.generate(requests(10), HOW), 10, 2)
    assert len(said) == 1 and len(two[0].prompts) == done == 3
    two[0].restart()
    two[0].script = spoil("", None)
    check(engine.generate(requests(10), HOW), 10, 2)  # without a sync: it is given the weights that are there
    assert said[1:] == [f"vLLM server {two[0].url} is used again"] and len(two[0].prompts) > done
    assert two[0].weight == 2.0 and two[1].calls.count("/collective_rpc") == 2


def test_without_any_server_the_run_stops_with_every_reason(two: list[Fake], tmp_path: Path, said: list[str]) -> None:
    engine = running(two, tmp_path)
    sync(engine, 1)
    two[0].script = spoil("/v1/completions", ConnectionResetError)
    two[1].script = spoil("/v1/completions", 500)
    with pytest.raises(UserError) as caught:
        engine.generate(requests(10), HOW)
    reasons = rf"{two[0].url} is gone \(.*\); {two[1].url} answered with status 500: .*so it is.*"
    assert re.fullmatch(
        rf"no vLLM server can be used \({reasons}\); start them and go on with --ckpt_path last", str(caught.value)
    )
    for fake in two:
        fake.dead = True
    with pytest.raises(UserError, match="no vLLM server can be used .*cannot be reached"):
        sync(engine, 2)
    with pytest.raises(RuntimeError, match="sync before generate"):
        engine.generate(requests(1), HOW)


def test_samples_of_a_server_that_started_anew_meanwhile_are_drawn_again(two: list[Fake], tmp_path: Path) -> None:
    engine = running(two, tmp_path)
    sync(engine, 1)

    def reborn(path: str, number: int) -> None:
        if path == "/v1/completions" and number == 3:
            two[0].restart()

    two[0].script = reborn
    check(engine.generate(requests(10), HOW), 10, 1)
    assert two[0].weight == 1.0 and two[0].calls.count("/collective_rpc") == 2
    two[0].restart()  # between two rollouts
    check(engine.generate(requests(10), HOW), 10, 1)


def test_samples_from_before_weights_were_loaded_anew_are_drawn_again(two: list[Fake], tmp_path: Path) -> None:
    """The server started anew, and before this rank looked at it again another one had it load the same weights."""
    engine = running(two, tmp_path)
    sync(engine, 1)

    def reborn(path: str, number: int) -> None:
        if path == "/v1/completions" and number == 3:
            two[0].weight = -1.0
        elif path == "/weight_info" and two[0].weight == -1.0:
            two[0].weight, two[0].label = 1.0, two[0].label.partition(".")[0] + ".anew"

    two[0].script = reborn
    check(engine.generate(requests(10), HOW), 10, 1)
    assert two[0].calls.count("/collective_rpc") == 1 and len(two[0].prompts) > 10


def test_two_runs_cannot_share_a_server(two: list[Fake], tmp_path: Path) -> None:
    one, other = running(two, tmp_path), running(two[:1], tmp_path)
    sync(one, 1)
    sync(other, 1)  # such as the run that goes on where another was killed
    with pytest.raises(UserError, match=f"{two[0].url}: another run loads its weights there, too; give each run"):
        one.generate(requests(3), HOW)


def test_a_server_that_misses_a_sync_is_not_used(two: list[Fake], tmp_path: Path, said: list[str]) -> None:
    engine = running(two, tmp_path)
    sync(engine, 1)
    two[0].script = spoil("/collective_rpc", 500)
    sync(engine, 2)
    assert len(said) == 1 and "it could not load the policy's weights from" in said[0] and "so it is" in said[0]
    check(engine.generate(requests(4), HOW), 4, 2)
    assert two[0].prompts == [] and len(two[1].prompts) == 8


def test_adapters_replace_each_other_and_the_base_is_loaded_once(two: list[Fake], tmp_path: Path) -> None:
    engine = running(two, tmp_path)
    two[0].adapters = ["rlmt-killed-17", "someone-elses"]
    for version in (1, 2, 3):
        adapter = AdapterWeights(dict(LORA), {"base_model.model.lora_A.weight": torch.ones(1) * version})
        engine.sync([("weight", torch.tensor([5.0]))], version, adapter)
        samples = engine.generate(requests(4), HOW)
        assert samples.weight_version == version and {row[0] for row in samples.logprobs} == {5.0}
        assert [len(fake.adapters) for fake in two] == [2, 1]
        assert len(list(tmp_path.rglob("adapter_model.safetensors"))) == 1
    assert [fake.calls.count("/collective_rpc") for fake in two] == [1, 1]
    assert [fake.calls.count("/reset_prefix_cache") for fake in two] == [3, 3]


@pytest.mark.parametrize(
    ("path", "answer", "says"),
    [
        ("/v1/completions", {"choices": [{"index": 0, "text": "", "finish_reason": "abort"}]}, "broke a sample off"),
        ("/v1/completions", 404, "answered with status 404"),
    ],
)
def test_other_ways_to_lose_a_server(
    path: str, answer: Any, says: str, two: list[Fake], tmp_path: Path, said: list[str]
) -> None:
    engine = running(two, tmp_path)
    sync(engine, 1)
    two[0].script = spoil(path, answer)
    check(engine.generate(requests(4), HOW), 4, 1)
    assert len(said) == 1 and says in said[0]


def test_a_server_that_hangs_is_given_up(two: list[Fake], tmp_path: Path, said: list[str]) -> None:
    engine = running(two, tmp_path, timeout=0.5)
    sync(engine, 1)
    two[0].pause = 1.5
    check(engine.generate(requests(4), HOW), 4, 1)
    assert "it gave no sample within 0.5 s (--data.engine.timeout)" in said[0]


def test_a_refused_request_is_no_reason_to_ask_another(two: list[Fake], tmp_path: Path) -> None:
    engine = running(two, tmp_path)
    sync(engine, 1)
    two[0].script = two[1].script = spoil("/v1/completions", 400)
    with pytest.raises(RuntimeError, match=r"refused a request: .*so it is"):
        engine.generate(requests(4), HOW)


def test_a_busy_cache_is_asked_again(two: list[Fake], tmp_path: Path) -> None:
    engine = running(two, tmp_path)
    two[0].script = lambda path, number: {"success": number > 2} if path == "/reset_prefix_cache" else None
    sync(engine, 1)
    assert two[0].calls.count("/reset_prefix_cache") == 3


def test_closing_breaks_off_what_another_thread_draws(two: list[Fake], tmp_path: Path) -> None:
    engine = running(two, tmp_path)
    sync(engine, 1)
    two[0].pause = two[1].pause = 30
    ended: list[BaseException] = []

    def draw() -> None:
        try:
            engine.generate(requests(4), HOW)
        except BaseException as error:  # noqa: B036
            ended.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    while not two[0].outstanding:
        time.sleep(0.01)
    engine.close()
    thread.join(10)
    assert not thread.is_alive() and len(ended) == 1
    for _ in range(2):
        engine.close()
    with pytest.raises(RuntimeError, match="start it first"):
        engine.generate(requests(1), HOW)


def mode(name: str, value: str) -> Callable[[Fake], None]:
    return lambda fake: fake.options["model_config"].update({name: value})


def answering(path: str, answer: Any) -> Callable[[Fake], None]:
    return lambda fake: setattr(fake, "script", spoil(path, answer))


@pytest.mark.parametrize(
    ("spoiled", "says"),
    [
        (answering("/health", ConnectionResetError), "cannot be reached"),
        (answering("/health", 503), r"is not healthy \(status 503 of /health\)"),
        (answering("/v1/models", 404), "has no /v1/models .*; start a vLLM server"),
        (answering("/v1/models", {"data": [{"id": "x"}]}), "names no model of vLLM"),
        (answering("/server_info", 404), "has no /server_info .*VLLM_SERVER_DEV_MODE=1"),
        (answering("/server_info", {"vllm_config": "text"}), "does not tell its configuration .*; start vLLM 0.32"),
        (mode("logprobs_mode", "raw_logprobs"), "has logprobs_mode .*start it with --logprobs-mode processed_logprobs"),
        (mode("generation_config", "auto"), "has generation_config .*start it with --generation-config vllm"),
    ],
)
def test_a_misconfigured_server_is_refused_at_the_start(
    spoiled: Callable[[Fake], None], says: str, two: list[Fake]
) -> None:
    spoiled(two[1])
    engine = VLLMServerEngine([fake.url for fake in two])
    for _ in range(2):
        with pytest.raises(UserError, match=f"^vLLM server {two[1].url} {says}") as caught:
            engine.check()
        assert "\n" not in str(caught.value) and KEY not in str(caught.value)


class Tokenizer:
    """One token a byte, as the fakes have it."""

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        assert not add_special_tokens
        return type("Encoding", (), {"input_ids": list(text.encode())})


def test_context_tokenizer_and_adapters_are_checked_before_models_are_loaded(two: list[Fake]) -> None:
    engine = VLLMServerEngine([fake.url + "/v1/" for fake in two])
    engine.check()
    calls = len(two[0].calls)
    engine.check()
    assert len(two[0].calls) == calls  # once is enough
    sampling = Sampling(1.0, 9, stop=("</response>",))
    format: Any = None
    engine.check_run(format, Tokenizer(), sampling, 8, 64)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="takes 64 tokens, .* are 65; start it with --max-model-len 65"):
        engine.check_run(format, Tokenizer(), sampling, 8, 65)  # type: ignore[arg-type]
    two[1].script = spoil("/tokenize", {"tokens": [1, 2]})
    with pytest.raises(UserError, match=f"{two[1].url} serves policy with another tokenizer than the policy's"):
        engine.check_run(format, Tokenizer(), sampling, 8, 64)  # type: ignore[arg-type]
    engine.check_adapter(LORA)
    merged = VLLMServerEngine(engine.urls, serve="merged")
    for config, says in (
        (LORA | {"use_dora": True}, "DoRA; use --data.engine.serve merged"),
        (LORA | {"r": 16}, "takes adapters up to rank 8; start it with --enable-lora --max-lora-rank 16"),
    ):
        with pytest.raises(UserError, match=says):
            engine.check_adapter(config)
        merged.check_adapter(config)
    two[0].script = spoil("/v1/load_lora_adapter", 404)
    with pytest.raises(UserError, match="start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        engine.check_adapter(LORA)
    two[0].options["lora_config"] = None
    with pytest.raises(UserError, match="serves no adapters; start it with --enable-lora --max-lora-rank 8"):
        engine.check_adapter(LORA)


def test_another_number_format_is_told(two: list[Fake], tmp_path: Path, said: list[str]) -> None:
    mode("dtype", "torch.bfloat16")(two[1])
    running(two, tmp_path)
    assert len(said) == 1 and f"{two[1].url} computes in torch.bfloat16 and the trainer in torch.float32" in said[0]
    assert said[0].endswith("start it with --dtype float32")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"urls": []}, "urls has ''"),
        ({"urls": ["node1:8000"]}, "urls has 'node1:8000': give URLs of servers"),
        ({"urls": ["http://a:1", "http://a:1/"]}, "names a server twice"),
        ({"urls": ["http://a:1"], "max_in_flight": 0}, "max_in_flight is 0: must be an integer above 0"),
        ({"urls": ["http://a:1"], "timeout": -1}, "timeout is -1: must be a number above 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        VLLMServerEngine(**options)
