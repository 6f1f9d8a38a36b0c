"""`rlmt chat` on a tiny policy: the printed text is the split of the format, and one prompt can be piped."""

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rlmt.cli.chat import ChatPolicy, _converse, _StreamPrinter, _trim_partial_tag, chat
from rlmt.cli.commands import main
from rlmt.engines import TransformersEngine
from rlmt.engines.transformers import stream
from rlmt.export.checkpoints import save_policy_assets
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.loading import load_policy, load_tokenizer
from rlmt.types import Message, SampleRequest, Sampling, Split, Status

HELLO = [Message(role="user", content="Hello there")]


def make_policy(tiny: Path, name: str, seed: int = 0, limit: int = 200) -> ChatPolicy:
    policy, tokenizer = load_policy(tiny / "policy"), load_tokenizer(tiny / "policy")
    format = ThinkingFormat(name)  # type: ignore[arg-type]
    sampling = Sampling(0.7, limit, format.stop, format.stop_token_ids(tokenizer))
    return ChatPolicy(policy, tokenizer, format, sampling, seed)


def seed_of_valid_reply(tiny: Path, name: str) -> int:
    """A seed with which the tiny policy replies to HELLO with a well-formed completion."""
    policy = make_policy(tiny, name)
    for seed in range(50):
        policy.seed = seed
        list(policy.stream_reply(HELLO))
        if policy.last_split.ok:
            return seed
    raise AssertionError("no reply of the tiny policy is well-formed")


def test_stream_yields_the_samples_of_the_engine(tiny: Path) -> None:
    policy, tokenizer = load_policy(tiny / "policy"), load_tokenizer(tiny / "policy")
    sampling = Sampling(0.8, 24, stop_token_ids=(tokenizer.eos_token_id,), top_p=0.95)
    engine = TransformersEngine()
    engine.start(policy, tokenizer, 512, torch.float32)
    engine.sync([], 0)
    prompt = ThinkingFormat().render(HELLO, tokenizer)
    for seed in range(5):
        expected = engine.generate([SampleRequest(prompt, [seed])], sampling).completion_ids[0]
        assert list(stream(policy, prompt, sampling, seed)) == expected


def test_printed_text_is_the_final_split(tiny: Path) -> None:
    valid = seed_of_valid_reply(tiny, "think")
    thoughts = 0
    for seed in (valid, *range(4)):
        policy = make_policy(tiny, "think", seed)
        screen = Console(file=io.StringIO(), width=10_000)
        with _StreamPrinter(screen, screen) as printer:
            for split in policy.stream_reply(HELLO):
                assert "think>" not in split.response
                printer.update(split)
            printer.update(policy.last_split)
        assert (printer.thought, printer.response) == (policy.last_split.thought, policy.last_split.response)
        assert sum(policy.token_counts) == len(policy.ids)
        thoughts += bool(policy.last_split.thought and policy.last_split.ok)
    assert thoughts > 0


def test_partial_tag_is_trimmed() -> None:
    tags = ThinkingFormat().tags
    assert _trim_partial_tag("I see </thi", tags) == "I see "
    assert _trim_partial_tag("a < b", tags) == "a < b"
    assert _trim_partial_tag("a <", tags) == "a "
    assert _trim_partial_tag("a </think>", tags) == "a </think>"
    assert _trim_partial_tag("caf\ufffd", tags) == "caf"


def test_single_prompt_prints_only_the_response(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tiny / "policy")
    seed = seed_of_valid_reply(tiny, "no_think")
    options = ["--format", "no_think", "--max_new_tokens", "200", "--seed", str(seed)]
    assert main(["chat", folder, "--prompt", "Hello there", *options]) == 0
    printed = capsys.readouterr().out
    policy = make_policy(tiny, "no_think", seed=seed)
    list(policy.stream_reply(HELLO))
    assert printed == policy.last_split.response + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello there"))
    assert main(["chat", folder, *options]) == 0
    assert capsys.readouterr().out == printed


def test_chat_with_a_checkpoint_prints_only_the_response(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = make_policy(tiny, "no_think", seed_of_valid_reply(tiny, "no_think"))
    save_policy_assets(
        tmp_path / "policy", policy.policy.config, policy.tokenizer, policy.format, policy.sampling.stop_token_ids
    )
    weights = {f"policy.{name}": tensor for name, tensor in policy.policy.state_dict().items()}
    record = {"policy": "x", "format": policy.format.to_dict()}
    torch.save({"state_dict": weights, "rlmt": record}, tmp_path / "last.ckpt")
    options = ["--prompt", "Hello there", "--max_new_tokens", "200", "--seed", str(policy.seed)]
    assert main(["chat", str(tmp_path / "last.ckpt"), *options]) == 0
    list(policy.stream_reply(HELLO))
    assert capsys.readouterr().out == policy.last_split.response + "\n"


def test_conversation_runs_commands_and_turns(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(tiny, "no_think", seed_of_valid_reply(tiny, "no_think"))
    lines = iter(["", "Hello there", "/thought", "/fold", "Again", "/nonsense", "/new", "/help", "/quit", "never read"])
    monkeypatch.setattr(Console, "input", lambda self, *_: next(lines))
    lengths: list[int] = []
    original = ChatPolicy.stream_reply

    def stream_reply(self: ChatPolicy, messages: list[Message]) -> Iterator[object]:
        lengths.append(len(messages))
        yield from original(self, messages)

    monkeypatch.setattr(ChatPolicy, "stream_reply", stream_reply)
    screen = io.StringIO()
    _converse(policy, [], Console(file=screen, width=10_000), fold=False)
    text = screen.getvalue()
    assert lengths == [1, 3]  # the second prompt follows the first reply
    assert "/nonsense is not a command" in text and "thoughts are folded" in text and "/quit" in text
    assert next(lines) == "never read"
    assert f"({len(policy.ids)} tokens)" in text


def test_thought_and_response_have_headings_without_styles() -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=80)
    with _StreamPrinter(console, console) as printer:
        for split in (
            Split("a", "", Status.UNCLOSED),
            Split("a plan", "", Status.UNCLOSED),
            Split("a plan", "Hi", Status.OK),
        ):
            printer.update(split)
    assert screen.getvalue() == "── thought ──\na plan\n\n── response ──\nHi\n"
    screen.truncate(0)
    with _StreamPrinter(console, None) as printer:
        printer.update(Split("a plan", "Hi", Status.OK))
    assert screen.getvalue().strip("\0") == "Hi\n", "a folded thought needs no heading"


def test_interrupted_reply_does_not_end_the_conversation(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: ChatPolicy, messages: list[Message]) -> Iterator[object]:
        self.ids = self.tokenizer("some words")["input_ids"]
        yield self.last_split
        raise KeyboardInterrupt

    monkeypatch.setattr(ChatPolicy, "stream_reply", interrupted)
    lines = iter(["Hello", "/quit"])
    monkeypatch.setattr(Console, "input", lambda self, *_: next(lines))
    screen = io.StringIO()
    _converse(make_policy(tiny, "no_think"), [], Console(file=screen, width=10_000), fold=False)
    assert "interrupted" in screen.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": Path("nowhere")}, "nowhere: no such checkpoint or folder"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "x", "top_p": 0.0}, "chat.top_p is 0.0: must be a number above 0"),
        ({"prompt": "x"}, "stores no thinking format"),
        ({"prompt": "x", "format": "think", "max_new_tokens": 1}, "The completion is malformed: "),
        ({"prompt": "x" * 9000, "format": "no_think"}, "fills the policy's context"),
    ],
)
def test_invalid_options_are_user_errors(options: dict[str, object], message: str, tiny: Path) -> None:
    from rlmt.errors import UserError

    arguments: dict[str, object] = {"model": tiny / "policy", "prompt": "x"} | options
    with pytest.raises(UserError, match=message):
        chat(**arguments)  # type: ignore[arg-type]


# Completions and prompts that are not as they should be


@pytest.fixture
def scripted(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bool], None]:
    """`scripted(text, ends)`: the policy writes this text, and then ends its turn or goes on to the limit."""
    tokenizer = load_tokenizer(tiny / "policy")

    def script(text: str, ends: bool) -> None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*ids, tokenizer.eos_token_id] if ends else ids * 1000
        monkeypatch.setattr(
            "rlmt.cli.chat.stream", lambda policy, prompt, sampling, seed: ids[: sampling.max_new_tokens]
        )

    return script


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", b"Gr\\xfc\\xdfe \\U0001f600\n"),
        ("latin-1", b"Gr\xfc\xdfe \\U0001f600\n"),
        ("utf-8", "Gr\u00fc\u00dfe \U0001f600\n".encode()),
    ],
)
def test_characters_that_the_terminal_cannot_encode_are_escaped(
    encoding: str, printed: bytes, scripted: Callable[[str, bool], None], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted("Gr\u00fc\u00dfe \U0001f600", True)
    pipe = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(pipe, encoding=encoding, write_through=True))
    assert main(["chat", str(tiny / "policy"), "--format", "no_think", "--prompt", "hi"]) == 0
    assert pipe.getvalue() == printed


@pytest.mark.parametrize(
    ("text", "ends", "options", "message"),
    [
        ("<think>hm", True, [], "the thought is not closed: the policy ended its turn after {} tokens."),
        ("<think>hm", False, ["--max_new_tokens", "7"], "not closed after 7 tokens; raise --max_new_tokens."),
        ("<think>hm", False, [], "the thought is not closed: the policy's context is full; start a new"),
        ("<think>hm</think>\n", True, [], "the response is empty: the policy ended its turn after {} tokens."),
    ],
)
def test_malformed_completion_is_explained(
    text: str,
    ends: bool,
    options: list[str],
    message: str,
    scripted: Callable[[str, bool], None],
    tiny: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scripted(text, ends)
    tokens = len(load_tokenizer(tiny / "policy")(text, add_special_tokens=False)["input_ids"]) + 1
    assert main(["chat", str(tiny / "policy"), "--format", "think", "--prompt", "hi", *options]) == 2
    error = capsys.readouterr().err
    assert message.format(tokens) in error
    assert ("raise --max_new_tokens" in error) == (bool(options))


@pytest.mark.parametrize(
    ("argument", "piped", "message"),
    [
        (["--prompt", "a\udcff"], b"", "--prompt contains a lone surrogate, which no tokenizer can encode"),
        (["--prompt", "a", "--system", " "], b"", "--system is empty"),
        ([], b"caf\xe9", "The piped prompt is not utf-8 text (byte 3); convert it."),
    ],
)
def test_prompt_that_is_no_text_is_one_line(
    argument: list[str],
    piped: bytes,
    message: str,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8"))
    monkeypatch.setattr("rlmt.cli.chat.load_policy", lambda *_: pytest.fail("the weights were read"))
    assert main(["chat", str(tiny / "policy"), "--format", "think", *argument]) == 2
    assert message in capsys.readouterr().err


def test_folder_for_temporary_files_that_cannot_be_written_is_named(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny / "policy", tmp_path / "policy")
    ThinkingFormat("no_think").save(tmp_path / "policy")
    (tmp_path / "last.ckpt").write_text("not read")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "last.ckpt"))
    assert main(["chat", str(tmp_path / "last.ckpt"), "--prompt", "hi"]) == 2
    assert "set TMPDIR to a folder that can be written" in capsys.readouterr().err
