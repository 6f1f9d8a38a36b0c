"""`rlmt evaluate` on a tiny policy with loopback judges: files, counts, resuming, and what a judge sees."""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from loopback import Loopback, Reply, completion
from processes import run_in_process
from toys import PROMPTS, Duel, write_data

from rlmt.checkpointing.provenance import source_commit
from rlmt.cli.commands import main
from rlmt.endpoints import Endpoint
from rlmt.evaluation.benchmark import Item
from rlmt.evaluation.completions import Completion
from rlmt.evaluation.scoring import score_completions
from rlmt.formats.thinking import FormatName, ThinkingFormat
from rlmt.types import Status

Serve = Callable[[Callable[[str, Any], Reply]], Loopback]
Exported = Callable[[str], Path]


def verdict(path: str, body: Any) -> Reply:
    """A verdict that depends on the question alone."""
    text = body["messages"][0]["content"]
    reply = completion(("win", "tie", "loss")[sum(text.encode()) % 3])
    reply.body["model"] = "judge-2026"
    return reply


def options(tmp_path: Path, server: Loopback | None, *more: str) -> list[str]:
    data = write_data(tmp_path / "data.jsonl")
    words = ["--benchmarks", "[toys.Letters, toys.Duel]", "--data.letters", str(data), "--data.duel", str(data)]
    words += ["--out", str(tmp_path / "out"), "--engine", "TransformersEngine", "--max_new_tokens", "16", "--yes"]
    if server is not None:
        words += ["--judge.base_url", server.url, "--judge.model", "judge", "--judge.api_key_variable", "PLANTED_KEY"]
    return [*words, *more]


def read(folder: Path, name: str = "ours") -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return result


def test_evaluate_writes_figures_counts_and_provenance(serve: Serve, exported: Exported, tmp_path: Path) -> None:
    server = serve(verdict)
    models = [f"A={exported('no_think')}", f"B={exported('think')}"]
    assert main(["evaluate", *models, *options(tmp_path, server)]) == 0
    for name in "AB":
        result = read(tmp_path / "out" / "duel" / name)
        assert (result["n"], result["unparsed"], result["judge"]) == (8, 0, "judge")
        assert result["judge_versions"] == ["judge-2026"]
        assert result["baseline"] == "reference" and result["generation"]["seed"] == 42
        assert result["versions"]["rlmt"] and result["commit"] == source_commit()
        scores = pq.read_table(tmp_path / "out" / "duel" / name / "ours.scores.parquet").to_pylist()
        assert result["malformed"] == sum(row["malformed"] for row in scores)
        assert all(row["value"] == 0 for row in scores if row["malformed"])
        mean = sum(row["value"] for row in scores) / 8
        figure = result["figures"]["win_rate"]
        assert figure["value"] == pytest.approx(mean) and figure["low"] <= mean <= figure["high"]
        resamples = pq.read_table(tmp_path / "out" / "duel" / name / "ours.resamples.parquet")
        assert resamples.column_names == ["win_rate", "wins"] and resamples.num_rows == result["resamples"]
        letters = read(tmp_path / "out" / "letters" / name)
        assert letters["judge"] is None and list(letters["figures"]) == ["accuracy"]
    malformed = [read(tmp_path / "out" / "duel" / name)["malformed"] for name in "AB"]
    assert malformed[1] > 4  # a random policy rarely closes its thought
    assert len(server.bodies) == 16 - sum(malformed)


def test_generation_and_judging_run_apart_and_equal_one_run(
    serve: Serve, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, model = serve(verdict), f"A={exported('no_think')}"
    assert main(["evaluate", model, *options(tmp_path, None, "--generate_only")]) == 0
    assert server.bodies == [] and not (tmp_path / "out" / "duel" / "A" / "ours.json").exists()
    other = tmp_path / "other machine"
    shutil.copytree(tmp_path / "out", other / "out")
    (tmp_path / "data.jsonl").unlink()
    words = options(other, server, "--judge_only")
    (other / "data.jsonl").unlink()
    assert main(["evaluate", *words]) == 0
    assert main(["evaluate", model, *options(tmp_path, server)]) == 0
    for name in ("duel", "letters"):
        assert read(other / "out" / name / "A") == read(tmp_path / "out" / name / "A")


def test_scoring_of_the_authors_has_files_of_its_own(serve: Serve, exported: Exported, tmp_path: Path) -> None:
    words = ["evaluate", f"A={exported('no_think')}", *options(tmp_path, serve(verdict))]
    assert main(words) == 0 and main([*words, "--scoring", "authors"]) == 0
    ours, authors = (read(tmp_path / "out" / "letters" / "A", name) for name in ("ours", "authors"))
    assert ours["figures"]["accuracy"]["value"] > authors["figures"]["accuracy"]["value"]


def test_items_are_checked_before_a_judge_is_asked_about_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    item = {"id": "0", "messages": [{"role": "user", "content": "Hi"}], "data": {"difficulty": None}}
    for name in ("duel", "alpaca_eval"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "items.jsonl").write_text(json.dumps(item) + "\n")
    words = ["--judge_only", "--out", str(tmp_path / "out"), "--benchmarks", "[toys.Duel, alpaca_eval]"]
    assert main(["evaluate", "A", *words]) == 2  # Duel, which comes first, has no completions: it was not reached
    assert "alpaca_eval have no difficulty; run --generate_only --scoring ours" in capsys.readouterr().err


def test_run_killed_in_generation_and_in_judging_gives_the_same_results_and_asks_nothing_twice(
    serve: Serve, exported: Exported, tmp_path: Path
) -> None:
    model = f"A={exported('no_think')}"
    server = serve(verdict)
    words = ["evaluate", model, *options(tmp_path, server, "--batch_size", "1", "--judge.max_in_flight", "1")]
    parts = tmp_path / "out" / "letters" / "A" / "completions"
    assert run_in_process(words, lambda: len(list(parts.glob("part-*"))) >= 3) == -signal.SIGKILL
    written = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*")}
    assert len(written) < 8
    asked = len(server.bodies)
    assert asked == 0
    assert run_in_process(words, lambda: len(server.bodies) >= 3) == -signal.SIGKILL
    assert all((parts / name).stat().st_mtime_ns == stamp for name, stamp in written.items())
    assert run_in_process(words) == 0
    counts = Counter(json.dumps(body) for body in server.bodies)
    assert sum(counts.values()) - len(counts) <= 1  # an answer under way when the process was killed
    keys = [json.loads(line)["key"] for line in (tmp_path / "out" / "ledger.jsonl").read_text().split("\n") if line]
    assert len(keys) == len(set(keys)) == len(counts)
    whole = tmp_path / "whole"
    whole.mkdir()
    assert main(["evaluate", model, *options(whole, server, "--batch_size", "1")]) == 0
    for name in ("duel", "letters"):
        assert read(tmp_path / "out" / name / "A") == read(whole / "out" / name / "A")


PIECES = ["<think>", "</think>", "<response>", "</response>", "secret", " plan ", "answer", "\n", "\u2028"]


@pytest.mark.parametrize("name", ["think", "no_think", "zero_think", "zero_no_think"])
def test_no_thought_reaches_a_judge(serve: Serve, tmp_path_factory: pytest.TempPathFactory, name: FormatName) -> None:
    server = serve(verdict)
    judge = Endpoint(server.url, "judge", "PLANTED_KEY")
    form, number = ThinkingFormat(name), iter(range(10_000))
    ledger = tmp_path_factory.mktemp("ledger") / "l.jsonl"

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.lists(st.sampled_from(PIECES), max_size=7).map("".join), min_size=1, max_size=12))
    @example(["<think>secret</think>answer", "secret</think>answer", "<think>secret answer"])
    @example(["<think>a</think>b<think>secret</think>c", "<response>answer</response>secret</think>"])
    def check(texts: list[str]) -> None:
        before = len(server.bodies)
        completions = []
        for text in texts:
            split = form.split(text)
            item = f"{next(number)}"
            completions.append(Completion(item, split.thought, split.response, split.status, "stop", 1, 1))
        items = [Item(c.id, [{"role": "user", "content": f"q{c.id}"}], {"answer": "reference"}) for c in completions]
        scored = score_completions(Duel(), items, completions, judge, ledger, yes=True, show=False)
        sent = {body["messages"][0]["content"] for body in server.bodies[before:]}
        formed = [c for c in completions if c.ok]
        assert sent == {f"Prompt: q{c.id}\nA: reference\nB: {c.response}" for c in formed}
        assert not any(tag in text for tag in form.tags for text in sent)
        assert [row.malformed for row in scored.rows] == [not c.ok for c in completions]
        assert all(row.score.value == 0 and row.response == "" for row in scored.rows if row.malformed)

    check()


def test_unparsed_verdicts_are_asked_again_under_ours_only(serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda path, body: completion("win" if "q1" in body["messages"][0]["content"] else "hm"))
    items = [Item(f"{i}", [{"role": "user", "content": f"q{i}"}], {"answer": "r"}) for i in range(2)]
    formed = [Completion(item.id, "", "answer", Status.OK, "stop", 0, 1) for item in items]
    judge = Endpoint(server.url, "judge", "PLANTED_KEY")
    for scoring, requests, rate in (("authors", 2, 75.0), ("ours", 2, 100.0)):
        before, benchmark = len(server.bodies), Duel(scoring)  # type: ignore[arg-type]
        scored = score_completions(benchmark, items, formed, judge, tmp_path / "l.jsonl", yes=True, show=False)
        assert [row.score.parsed for row in scored.rows] == [False, True]
        assert benchmark.compute(scored.rows)["win_rate"] == rate
        assert len(server.bodies) - before == requests  # under `ours` two more attempts; the first is in the ledger


ERRORS = {
    "--benchmarks [nothing]": "nothing: no such benchmark",
    "--benchmarks [toys.Nothing]": "cannot be imported",
    "--benchmarks [json.JSONDecoder]": "is no subclass",
    "--benchmarks [toys.Duel,toys.Duel]": "duel occurs twice",
    "--data.nothing x": "--data.nothing: no such benchmark",
    "--generate_only --table": "exclude each other",
    "--judge.model null": "judge",
    "--temperature -1": "temperature",
    "--parity nobody": "parity",
    "--judge_only": "holds no completions of these benchmarks",
    "--table": "holds no results with scoring ours",
}


@pytest.mark.parametrize(("words", "message"), ERRORS.items())
def test_errors_are_one_line_before_weights_are_read(
    serve: Serve,
    exported: Exported,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    message: str,
) -> None:
    monkeypatch.setattr("rlmt.evaluation.generation.load_policy", lambda *_: pytest.fail("weights were read"))
    models = [] if "_only" in words or "--table" in words else [str(exported("no_think"))]
    assert main(["evaluate", *models, *options(tmp_path, serve(verdict)), *words.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("rlmt: error: ") and error.endswith(".")


def test_judge_and_data_are_required(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(exported("no_think"))
    assert main(["evaluate", model, *options(tmp_path, None)]) == 2
    assert "--judge.model is not set, but a judge is asked for duel" in capsys.readouterr().err
    words = ["--benchmarks", "[toys.Letters]", "--out", str(tmp_path / "out"), "--engine", "TransformersEngine"]
    assert main(["evaluate", model, *words]) == 2
    assert "--data.letters is not set: the data of Letters is no hub dataset" in capsys.readouterr().err
    assert main(["evaluate", *words]) == 2
    assert "MODEL is missing" in capsys.readouterr().err


def test_limit_takes_the_first_items(exported: Exported, tmp_path: Path) -> None:
    words = ["--benchmarks", "[toys.Letters, toys.Duel]", "--limit", "3", "--generate_only"]
    assert main(["evaluate", f"A={exported('no_think')}", *options(tmp_path, None), *words]) == 0
    words = ["--benchmarks", "[toys.Letters]", "--judge_only", "--out", str(tmp_path / "out")]
    assert main(["evaluate", *words]) == 0
    assert read(tmp_path / "out" / "letters" / "A")["n"] == 3 < len(PROMPTS)
