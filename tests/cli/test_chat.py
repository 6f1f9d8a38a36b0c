"""`rlmt chat` on a tiny policy: what is shown is what the format splits, and one answer goes through pipes."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rlmt.cli import chat as module
from rlmt.cli.chat import Speaker, _converse, _Shown, _without_half_tag, chat
from rlmt.cli.commands import main
from rlmt.engines import TransformersEngine
from rlmt.engines.transformers import stream
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.loading import load_policy, load_tokenizer
from rlmt.types import Message, SampleRequest, Sampling

HELLO = [Message(role="user", content="Hello there")]


def speaker(tiny: Path, name: str, seed: int = 0, limit: int = 200) -> Speaker:
    policy, tokenizer = load_policy(tiny / "policy"), load_tokenizer(tiny / "policy")
    return Speaker(policy, tokenizer, ThinkingFormat(name), Sampling(0.7, limit), seed)  # type: ignore[arg-type]


def seed_of_an_answer(tiny: Path, name: str) -> int:
    """A seed with which the tiny policy answers HELLO well-formed."""
    talk = speaker(tiny, name)
    for seed in range(50):
        talk.seed = seed
        list(talk.say(HELLO))
        if talk.latest.ok:
            return seed
    raise AssertionError("the tiny policy never answers")


def test_a_stream_is_what_the_engine_samples(tiny: Path) -> None:
    policy, tokenizer = load_policy(tiny / "policy"), load_tokenizer(tiny / "policy")
    sampling = Sampling(0.8, 24, stop_token_ids=(tokenizer.eos_token_id,), top_p=0.95)
    engine = TransformersEngine()
    engine.start(policy, tokenizer, 512, torch.float32)
    engine.sync([], 0)
    prompt = ThinkingFormat().render(HELLO, tokenizer)
    for seed in range(5):
        expected = engine.generate([SampleRequest(prompt, [seed])], sampling).completion_ids[0]
        assert list(stream(policy, prompt, sampling, seed)) == expected


def test_what_is_shown_grows_into_the_whole_split(tiny: Path) -> None:
    answered = seed_of_an_answer(tiny, "think")
    thoughts = 0
    for seed in (answered, *range(4)):
        talk = speaker(tiny, "think", seed)
        screen = Console(file=io.StringIO(), width=10_000)
        with _Shown(screen, screen) as shown:
            for split in talk.say(HELLO):
                assert "think>" not in split.response
                shown.update(split)
            shown.update(talk.latest)
        assert (shown.thought, shown.response) == (talk.latest.thought, talk.latest.response)
        assert sum(talk.counts) == len(talk.ids)
        thoughts += bool(talk.latest.thought and talk.latest.ok)
    assert thoughts > 0


def test_half_a_tag_waits() -> None:
    tags = ThinkingFormat().tags
    assert _without_half_tag("I see </thi", tags) == "I see "
    assert _without_half_tag("a < b", tags) == "a < b"
    assert _without_half_tag("a <", tags) == "a "
    assert _without_half_tag("a </think>", tags) == "a </think>"
    assert _without_half_tag("caf\ufffd", tags) == "caf"


def test_one_answer_is_printed_alone(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tiny / "policy")
    seed = seed_of_an_answer(tiny, "no_think")
    options = ["--format", "no_think", "--max_new_tokens", "200", "--seed", str(seed)]
    assert main(["chat", folder, "--prompt", "Hello there", *options]) == 0
    said = capsys.readouterr().out
    talk = speaker(tiny, "no_think", seed=seed)
    list(talk.say(HELLO))
    assert said == talk.latest.response + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello there"))
    assert main(["chat", folder, *options]) == 0
    assert capsys.readouterr().out == said


def test_a_conversation(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = speaker(tiny, "no_think", seed_of_an_answer(tiny, "no_think"))
    lines = iter(["", "Hello there", "/thought", "/fold", "Again", "/nonsense", "/new", "/help", "/quit", "never read"])
    monkeypatch.setattr(Console, "input", lambda self, *_: next(lines))
    heard: list[int] = []
    original = Speaker.say

    def say(self: Speaker, messages: list[Message]) -> Iterator[object]:
        heard.append(len(messages))
        yield from original(self, messages)

    monkeypatch.setattr(Speaker, "say", say)
    screen = io.StringIO()
    _converse(talk, [], Console(file=screen, width=10_000), fold=False)
    text = screen.getvalue()
    assert heard == [1, 3]  # the second question comes after the first answer
    assert "there is no command /nonsense" in text and "thoughts are folded" in text and "/quit" in text
    assert next(lines) == "never read"
    assert f"({len(talk.ids)} tokens)" in text


def test_an_interrupted_answer_ends_the_turn_and_not_the_conversation(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Speaker, messages: list[Message]) -> Iterator[object]:
        self.ids = self.tokenizer("some words")["input_ids"]
        yield self.latest
        raise KeyboardInterrupt

    monkeypatch.setattr(Speaker, "say", interrupted)
    lines = iter(["Hello", "/quit"])
    monkeypatch.setattr(Console, "input", lambda self, *_: next(lines))
    screen = io.StringIO()
    _converse(speaker(tiny, "no_think"), [], Console(file=screen, width=10_000), fold=False)
    assert "cut short" in screen.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": Path("nowhere")}, "nowhere: no such checkpoint or folder"),
        ({"prompt": " "}, "nothing to answer"),
        ({"prompt": "x", "top_p": 0.0}, "--top_p within"),
        ({"prompt": "x"}, "does not say how it thinks"),
        ({"prompt": "x", "format": "think", "max_new_tokens": 1}, "no answer: "),
        ({"prompt": "x" * 9000, "format": "no_think"}, "fills the policy's context"),
    ],
)
def test_mistakes_cost_one_line(options: dict[str, object], message: str, tiny: Path) -> None:
    from rlmt.errors import UserError

    arguments: dict[str, object] = {"model": tiny / "policy", "prompt": "x"} | options
    with pytest.raises(UserError, match=message):
        chat(**arguments)  # type: ignore[arg-type]
    assert module.COMMANDS
