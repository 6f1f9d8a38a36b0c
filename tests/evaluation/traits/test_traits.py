"""`rlmt traits` with policies and a judge on a loopback server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from loopback import Loopback, Reply, completion

from rlmt.cli.commands import main

Serve = Callable[[Callable[[str, Any], Reply]], Loopback]


class Script:
    """Policies `new`, which checks, and `old`, which does not; a judge that reads their thoughts."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fails_after: int | None = None

    def __call__(self, path: str, body: Any) -> Reply:
        text, model = body["messages"][-1]["content"], body["model"]
        if model != "judge":
            number = int(re.findall(r"prompt (\d+)", text)[-1])
            thought = f"<think>{'I check twice.' if model == 'new' else 'I write.'} {number}</think>"
            return completion(f"{thought if number != 3 else ''}Answer {number}.")
        if self.fails_after is not None and len(self.asked) >= self.fails_after:
            return Reply(drop=True)
        self.asked.append(text)
        return completion(self.judge(text))

    def judge(self, text: str) -> str:
        if "<thought>" in text:
            return "So.\n- " + ("checks twice" if "I check" in text else "writes at once") + "\n- is short\n- is calm"
        if "<traits_of_model_1>" in text:
            assert "- checks twice" in text and "- writes at once" in text
            return "They differ.\n- checks twice"
        if "<traits>" in text:
            return "Merged.\n- Checks: The thought checks a draft.\n- Is calm: The thought is calm."
        if "Trait: Is calm" in text:
            return "Both.\nMore: tie"
        number = int(re.findall(r"prompt (\d+)", text)[0])
        first, second = re.findall(r"<thought_[ab]>\n(.*)\n", text)
        assert ("I check" in first) != ("I check" in second)
        return "Clear.\nMore: " + ("tie" if number % 5 == 4 else "A" if "I check" in first else "B")


@pytest.fixture
def command(serve: Serve, tmp_path: Path) -> Callable[..., tuple[Script, list[str]]]:
    def make(*more: str, formats: tuple[str, str] = ("think", "think")) -> tuple[Script, list[str]]:
        script = Script()
        server = serve(script)
        for name, form in zip(("new", "old"), formats, strict=True):
            lines = [f"base_url: {server.url}/v1", f"model: {name}", f"format: {form}", "api_key_variable: PLANTED_KEY"]
            (tmp_path / f"{name}.yaml").write_text("\n".join(lines))
        rows = [json.dumps({"prompt": f"prompt {n} ?"}) + "\n" for n in range(21)]
        (tmp_path / "prompts.jsonl").write_text("".join(rows))
        words = ["traits", "--config", "traits", str(tmp_path / "new.yaml"), str(tmp_path / "old.yaml"), "--yes"]
        words += ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out")]
        words += ["--judge.base_url", f"{server.url}/v1", "--judge.model", "judge", "--judge.max_in_flight", "4"]
        words += ["--judge.api_key_variable", "PLANTED_KEY", "--batches", "2", "--batch_prompts", "4", *more]
        return script, words

    return make


def test_traits_are_found_and_counted(
    command: Callable[..., tuple[Script, list[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, words = command()
    assert main(words) == 0
    found = json.loads((tmp_path / "out/traits.json").read_text())
    checks, calm = found["traits"]
    assert (checks["name"], checks["description"]) == ("Checks", "The thought checks a draft.")
    # Prompt 3 has no thoughts; of the 20 others, 4, 9, 14 and 19 are ties.
    assert {k: v["value"] for k, v in checks["shares"].items()} == {"a": 0.8, "tie": 0.2, "b": 0.0}
    assert checks["judged"] == 20 and checks["difference"]["low"] > 0.5
    assert calm["shares"]["tie"]["value"] == 1.0
    assert found["left_out"] == 1 and len(found["discovery"]["thoughts"]) == 8
    assert found["discovery"]["differences"] == [["checks twice"]] * 2
    printed = capsys.readouterr().out
    assert "sends thoughts to the judge" in printed and "Checks" in printed
    rows = pyarrow.parquet.read_table(tmp_path / "out/traits.verdicts.parquet").to_pylist()
    assert len(rows) == 40 and {row["winner"] for row in rows if row["trait"] == "Checks"} == {"a", "tie"}
    assert (tmp_path / "out/traits.png").is_file() and "| Checks | 80.0 [" in (tmp_path / "out/traits.md").read_text()
    assert len(script.asked) == 16 + 2 + 1 + 40


@pytest.mark.slow
def test_stopped_analysis_asks_nothing_twice(command: Callable[..., tuple[Script, list[str]]], tmp_path: Path) -> None:
    script, words = command("--judge.max_in_flight", "1", "--judge.max_attempts", "1")
    for limit in (5, 30):
        script.fails_after = limit
        assert main(words) == 2
    script.fails_after = None
    assert main(words) == 0 and main(words) == 0
    assert len(script.asked) == len(set(script.asked)) == 59


def test_named_traits_are_judged_without_a_search(
    command: Callable[..., tuple[Script, list[str]]], tmp_path: Path
) -> None:
    script, words = command("--names", '{"Is calm": "The thought is calm."}')
    assert main(words) == 0 and len(script.asked) == 20
    (calm,) = json.loads((tmp_path / "out/traits.json").read_text())["traits"]
    assert calm["name"] == "Is calm"


def test_model_without_thoughts_is_refused(
    command: Callable[..., tuple[Script, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    script, words = command(formats=("think", "no_think"))
    assert main(words) == 2 and not script.asked
    error = capsys.readouterr().err
    assert "its format no_think has no thoughts" in error and error.strip().count("\n") == 0
