"""Policies and judges on a loopback server, and fewer resamples of the figures that take a fit each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from loopback import Loopback, Reply, completion

SECRET = "planted-thought"


@pytest.fixture(autouse=True)
def few_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlmt.evaluation.compare.figures.LENGTH_RESAMPLES", 40)


@dataclass
class Models:
    """Answers for two policies, `new` and `old`, and for a judge, by the model's name in the request."""

    judge: Callable[[str, Any], str] = lambda question, body: "Hm.\nWinner: tie"
    """Called with the text of a question to the judge."""
    malformed: frozenset[tuple[str, int]] = frozenset()
    """Policy and number of the prompt that it answers without closing the thought."""
    asked: list[str] = field(default_factory=list)
    """Questions that the judge answered."""

    def __call__(self, path: str, body: Any) -> Reply:
        text = body["messages"][-1]["content"]
        if body["model"] == "judge":
            answer = self.judge(text, body)
            self.asked.append(text)
            return completion(answer)
        number = int(re.findall(r"prompt (\d+)", text)[-1])
        close = "" if (body["model"], number) in self.malformed else "</think>"
        return completion(f"<think>{SECRET} of {body['model']}{close}Answer {number} by {body['model']}.")


@dataclass
class Setting:
    """A folder with prompts and policies of a server, and arguments of the commands."""

    folder: Path
    server: Loopback

    def arguments(self, command: str, *more: str, judge: bool = True) -> list[str]:
        options = ["--judge.base_url", f"{self.server.url}/v1", "--judge.model", "judge"]
        options += ["--judge.api_key_variable", "PLANTED_KEY", "--judge.max_in_flight", "4"]
        words = [command, *(["--config", command] if judge else [])]
        words += [str(self.folder / "new.yaml"), str(self.folder / "old.yaml")]
        words += ["--prompts", str(self.folder / "prompts.jsonl"), "--out", str(self.folder / "out"), "--yes"]
        return [*words, *(options if judge else []), *more]

    def result(self, name: str = "comparison.json") -> Any:
        return json.loads((self.folder / "out" / name).read_text())


@pytest.fixture
def setting(
    serve: Callable[[Callable[[str, Any], Reply]], Loopback], tmp_path: Path
) -> Callable[[Models, int], Setting]:
    """`setting(models, count)`: a server with the models, and `count` prompts."""

    def make(models: Models, count: int) -> Setting:
        server = serve(models)
        for name in ("new", "old"):
            lines = [f"base_url: {server.url}/v1", f"model: {name}", "format: think", "api_key_variable: PLANTED_KEY"]
            (tmp_path / f"{name}.yaml").write_text("\n".join(lines))
        rows = [{"prompt": f"prompt {n} ?", "rubric": ["names the number", "is short"]} for n in range(count)]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Setting(tmp_path, server)

    return make
