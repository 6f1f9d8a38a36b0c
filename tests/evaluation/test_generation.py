"""Completions of items: those of the policy for each item's seed, resumable, refused where they would mix models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from loopback import Loopback, Reply, completion
from safetensors.torch import load_file, save_file

from rlmt.data.sampler import item_seed
from rlmt.engines import ReplayEngine, TransformersEngine
from rlmt.engines.transformers import stream
from rlmt.errors import UserError
from rlmt.evaluation.benchmark import Item
from rlmt.evaluation.completions import Completion, CompletionStore, read_completions, read_settings
from rlmt.evaluation.generation import GenerationSettings, generate, generate_all
from rlmt.evaluation.models import EndpointModel, LocalModel, resolve_model
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.loading import load_policy
from rlmt.types import SampleRequest, Samples, Sampling, Status

Serve = Callable[[Callable[[str, Any], Reply]], Loopback]
Exported = Callable[[str], Path]
SETTINGS = GenerationSettings(max_new_tokens=24, seed=3, batch_size=2)


def run(model: Any, items: Sequence[Item], path: Path, settings: GenerationSettings = SETTINGS) -> list[Completion]:
    return generate(model, items, path, settings, TransformersEngine())


@pytest.mark.parametrize("name", ["think", "zero_no_think"])
def test_completions_are_the_policys_for_each_items_seed(
    exported: Exported, items: list[Item], tmp_path: Path, name: str
) -> None:
    model = resolve_model(str(exported(name)))
    assert isinstance(model, LocalModel)
    found = run(model, items, tmp_path / "completions")
    policy = load_policy(exported(name))
    sampling = Sampling(0.7, 24, stop_token_ids=model.stop_token_ids, top_p=0.95)
    for item, got in zip(items, found, strict=True):
        prompt = model.format.render(item.messages, model.tokenizer)
        ids: list[int] = []
        for token in stream(policy, prompt, sampling, item_seed(3, item.id)):
            ids.append(token)
            if any(stop in model.format.decode(ids, model.tokenizer) for stop in model.format.stop):
                break
        split = model.format.split(model.format.decode(ids, model.tokenizer))
        assert (got.id, got.thought, got.response, got.status) == (item.id, split.thought, split.response, split.status)
        assert got.thought_tokens is not None and got.response_tokens is not None
        assert got.thought_tokens + got.response_tokens == len(ids)
        assert got.finish == ("length" if len(ids) == 24 and ids[-1] not in model.stop_token_ids else "stop")


class CountingEngine(TransformersEngine):
    """Counts prompts; fails at the batch `fail_at`."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.batches, self.fail_at = list[int](), fail_at

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Samples:
        if len(self.batches) == self.fail_at:
            raise RuntimeError("killed")
        self.batches.append(len(requests))
        return super().generate(requests, sampling)


CountingEngine.__name__ = "TransformersEngine"  # its samples are the same


def test_resumed_generation_equals_an_uninterrupted_one_and_repeats_nothing(
    exported: Exported, items: list[Item], tmp_path: Path
) -> None:
    model = resolve_model(str(exported("no_think")))
    whole = run(model, items, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        generate(model, items, tmp_path / "resumed", SETTINGS, CountingEngine(fail_at=2))
    (tmp_path / "resumed" / ".part-00002.parquet.unfinished").write_bytes(b"left by a killed process")
    engine = CountingEngine()
    assert generate(model, items, tmp_path / "resumed", SETTINGS, engine) == whole
    assert engine.batches == [2, 1]
    assert not list((tmp_path / "resumed").glob(".*"))
    again = CountingEngine()
    assert generate(model, items, tmp_path / "resumed", SETTINGS, again) == whole and again.batches == []


def test_more_items_generate_only_the_new_ones(exported: Exported, items: list[Item], tmp_path: Path) -> None:
    model, engine = resolve_model(str(exported("no_think"))), CountingEngine()
    first = run(model, items[:2], tmp_path / "c")
    assert generate(model, items, tmp_path / "c", SETTINGS, engine)[:2] == first and sum(engine.batches) == 5
    assert pq.read_table(tmp_path / "c").num_rows == 7  # a plain parquet folder for every reader


def test_other_settings_or_weights_behind_a_folder_are_refused(
    exported: Exported, items: list[Item], tmp_path: Path
) -> None:
    folder = shutil.copytree(exported("no_think"), tmp_path / "policy")
    run(resolve_model(str(folder)), items[:2], tmp_path / "c")
    for options, message in (({"seed": 4}, "with seed 3, not 4"), ({"temperature": 0.5}, "temperature 0.7, not 0.5")):
        with pytest.raises(UserError, match=message):
            run(resolve_model(str(folder)), items, tmp_path / "c", replace(SETTINGS, **options))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="with another model"):
        run(resolve_model(str(folder)), items, tmp_path / "c")


def test_changed_prompt_of_an_item_is_refused(exported: Exported, items: list[Item], tmp_path: Path) -> None:
    model = resolve_model(str(exported("no_think")))
    run(model, items[:2], tmp_path / "c")
    changed = replace(items[0], messages=[{"role": "user", "content": "another"}])
    with pytest.raises(UserError, match="item item-0 was generated for another prompt"):
        run(model, [changed], tmp_path / "c")


def test_prompt_beyond_the_context_is_malformed(
    exported: Exported, items: list[Item], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = Item("long", [{"role": "user", "content": "word " * 2000}])
    found = run(resolve_model(str(exported("no_think"))), [long, items[0]], tmp_path / "c")
    assert (found[0].status, found[0].finish, found[0].response) == (Status.EMPTY_RESPONSE, "prompt_too_long", "")
    assert found[1].finish != "prompt_too_long"
    assert "1 of 2 prompts leave less than 24 tokens" in capsys.readouterr().out


def test_budget_is_equal_by_default_and_the_papers_under_parity() -> None:
    think, no_think = ThinkingFormat("think"), ThinkingFormat("zero_no_think")
    both = [GenerationSettings(1.0, 0.5).sampling(format).max_new_tokens for format in (think, no_think)]
    assert both == [8192, 8192]
    paper = [GenerationSettings(1.0, 0.5, parity="paper").sampling(format) for format in (think, no_think)]
    assert [(s.temperature, s.top_p, s.max_new_tokens) for s in paper] == [(0.7, 0.95, 8192), (0.7, 0.95, 4096)]


def test_replay_engine_is_refused(exported: Exported, items: list[Item], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only returns recorded samples"):
        generate(resolve_model(str(exported("think"))), items, tmp_path / "c", SETTINGS, ReplayEngine("x"))


def test_settings_file_has_what_completions_depend_on(exported: Exported, items: list[Item], tmp_path: Path) -> None:
    run(resolve_model(f"A={exported('think')}"), items[:1], tmp_path / "c")
    settings = read_settings(tmp_path / "c")
    assert settings["model"] == "A" and settings["format"]["name"] == "think" and settings["seed"] == 3
    assert settings["max_new_tokens"] == 24 and settings["engine"] == "TransformersEngine"
    assert {"rlmt", "torch", "transformers"} <= set(settings["versions"])


# A model behind an endpoint -------------------------------------------------------------------------------------------


def endpoint_model(server: Loopback, tmp_path: Path, extra: str = "") -> EndpointModel:
    file = tmp_path / "endpoint.yaml"
    file.write_text(f"base_url: {server.url}\nmodel: m\napi_key_variable: PLANTED_KEY\nmax_in_flight: 2\n{extra}")
    model = resolve_model(str(file))
    assert isinstance(model, EndpointModel)
    return model


def answer(text: str, finish: str = "stop") -> Reply:
    reply = completion(text, finish)
    reply.body["usage"]["completion_tokens_details"] = {"reasoning_tokens": 3}
    return reply


def test_endpoint_completions_are_split_and_never_asked_for_twice(
    serve: Serve, items: list[Item], tmp_path: Path
) -> None:
    texts = {"Hi": "plan</think>ok", "Why?": "no close", "A poem": "<think>a</think>\ud800 b"}
    fail = {"on": True}

    def script(path: str, body: Any) -> Reply:
        asked = body["messages"][0]["content"]
        if asked == "Say cat":
            return Reply({"error": {"message": "content filter"}}, 400)
        if asked == "A poem" and fail["on"]:
            return Reply({"error": {"message": "wrong path"}}, 404)
        return answer(texts.get(asked, "<think>t</think>answer"))

    server = serve(script)
    model = endpoint_model(server, tmp_path, "format: think\n")
    with pytest.raises(UserError, match="--yes: there is no terminal"):
        generate(model, items, tmp_path / "c", SETTINGS)
    assert server.bodies == []
    with pytest.raises(UserError, match="status 404"):
        generate(model, items, tmp_path / "c", SETTINGS, yes=True)
    fail["on"] = False
    found = {c.id: c for c in generate(model, items, tmp_path / "c", SETTINGS, yes=True)}
    assert (found["item-0"].thought, found["item-0"].response) == ("plan", "ok")
    assert (found["item-2"].status, found["item-5"].finish) == (Status.UNCLOSED, "refused")
    assert found["item-4"].response == "? b"
    assert (found["item-1"].thought_tokens, found["item-1"].response_tokens) == (3, 2)
    answered = [
        json.dumps(body) for body in server.bodies if body["messages"][0]["content"] not in ("A poem", "Say cat")
    ]
    assert len(answered) == len(set(answered)) == 5
    before = len(server.bodies)
    generate(model, items, tmp_path / "c", SETTINGS)
    assert len(server.bodies) == before
    body = server.bodies[0]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.7, 0.95, 24) and body["seed"] < 2**31


def test_endpoint_that_refuses_all_prompts_leaves_no_completions(
    serve: Serve, items: list[Item], tmp_path: Path
) -> None:
    server = serve(lambda path, body: Reply({"error": {"message": "unknown field"}}, 400))
    model = endpoint_model(server, tmp_path)
    with pytest.raises(UserError, match=f"all 3 requests were refused: {server.url}.*unknown field"):
        generate(model, items[:3], tmp_path / "c", SETTINGS, yes=True)
    assert not list((tmp_path / "c").glob("part-*"))


def test_cost_limit_holds_for_all_benchmarks_and_starts_together(
    serve: Serve, items: list[Item], tmp_path: Path
) -> None:
    """One answer is billed US$ 1 (10 prompt tokens and 2 others), and 24 tokens are set aside for the next."""
    server = serve(lambda path, body: completion("<think>t</think>ok", completion_tokens=2))
    prices = "format: think\nmax_in_flight: 1\ninput_price: 0\noutput_price: 500000\n"
    jobs = [(items[:3], tmp_path / "a"), (items[3:5], tmp_path / "b"), (items[5:], tmp_path / "c")]

    def run_with(limit: int) -> list[list[Completion]]:
        file = tmp_path / "endpoint.yaml"
        file.write_text(f"base_url: {server.url}\nmodel: m\napi_key_variable: PLANTED_KEY\n{prices}max_cost: {limit}\n")
        return generate_all(resolve_model(str(file)), jobs, SETTINGS, yes=True)

    for limit, answered in ((15, 4), (15, 4), (16, 5)):  # the fourth answer is the first of the second job
        with pytest.raises(UserError, match=rf"max_cost {limit} \(spent: US\$ {answered}\.0000\)"):
            run_with(limit)
        assert len(server.bodies) == answered
    assert [len(found) for found in run_with(18)] == [3, 2, 2] and len(server.bodies) == 7


def test_store_reports_a_damaged_file(exported: Exported, items: list[Item], tmp_path: Path) -> None:
    run(resolve_model(str(exported("no_think"))), items[:1], tmp_path / "c")
    (tmp_path / "c" / "part-00000.parquet").write_bytes(b"damaged")
    with pytest.raises(UserError, match="part-00000.parquet: cannot be read"):
        CompletionStore(tmp_path / "c", {}, {})


def test_part_after_a_removed_one_overwrites_none(items: list[Item], tmp_path: Path) -> None:
    def add(item: Item) -> None:
        answer = Completion(item.id, "", "yes", Status.OK, "stop", 0, 1)
        CompletionStore(tmp_path / "c", {}, {}).add([item], [answer])

    for item in items[:2]:
        add(item)
    (tmp_path / "c" / "part-00000.parquet").unlink()
    add(items[0])
    assert [found.id for found in read_completions(tmp_path / "c", items[:2])] == [item.id for item in items[:2]]
