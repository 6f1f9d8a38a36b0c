"""`rlmt chat`: talk to a policy in the terminal, its thought dimmed and its answer not.

Left out: tools, images, several users. What is sampled is what training would have sampled: same rendering, same stops,
same split.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlmt.engines.transformers import stream
from rlmt.errors import UserError
from rlmt.formats.thinking import FILE_NAME, FormatName, ThinkingFormat
from rlmt.models.loading import load_policy, load_tokenizer, max_positions
from rlmt.options import NonNegativeFloat, PositiveInt, UnitIntervalAboveZero, check_ranges
from rlmt.types import Message, Sampling, Split, Status

COMMANDS = """/thought  show the last thought
/fold     fold thoughts, or unfold them again
/new      begin a new conversation
/quit     leave (so does Ctrl-D); Ctrl-C cuts an answer short"""

_TROUBLE = {
    Status.UNOPENED: "the completion does not begin as the format wants",
    Status.UNCLOSED: "the thought never ended; give more --max_new_tokens",
    Status.STRAY_TAG: "a tag of the format stands in the answer",
    Status.EMPTY_RESPONSE: "there is a thought and no answer",
}


@dataclass
class Speaker:
    """A policy, and all that it takes to hear it think and answer."""

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    format: ThinkingFormat
    sampling: Sampling
    seed: int
    """Of the first completion; each further one takes the next."""
    ids: list[int] = field(default_factory=list)
    """Tokens of the latest completion."""

    def say(self, messages: list[Message]) -> Iterator[Split]:
        """Answers a conversation and yields what is there after each token; a half-written tag is held back.

        Raises:
            UserError: the conversation leaves no room within the policy's context.
        """
        prompt = self.format.render(messages, self.tokenizer)
        room = max_positions(self.policy.config) - len(prompt)
        if room < 1:
            raise UserError(f"the conversation of {len(prompt)} tokens fills the policy's context: begin a new one")
        sampling = Sampling(
            temperature=self.sampling.temperature,
            max_new_tokens=min(self.sampling.max_new_tokens, room),
            stop=self.format.stop,
            stop_token_ids=self.format.stop_token_ids(self.tokenizer),
            top_p=self.sampling.top_p,
        )
        self.ids = []
        seed, self.seed = self.seed, self.seed + 1
        for token in stream(self.policy, prompt, sampling, seed):
            self.ids.append(token)
            text = self.format.decode(self.ids, self.tokenizer)
            yield self.format.split(_without_half_tag(text, self.format.tags))
            if any(stop in text for stop in sampling.stop):
                return

    @property
    def latest(self) -> Split:
        """The latest completion, taken apart."""
        return self.format.split(self.format.decode(self.ids, self.tokenizer))

    @property
    def counts(self) -> tuple[int, int]:
        """Tokens of the latest completion: thought, rest."""
        thought = self.format.thought_tokens(self.ids, self.tokenizer)
        return thought, len(self.ids) - thought


def _without_half_tag(text: str, tags: tuple[str, ...]) -> str:
    """`text` up to a tag that its end may be the beginning of; half a character at the end waits as well."""
    text = text.rstrip("\ufffd")
    cut = max((n for tag in tags for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)
    return text[: len(text) - cut]


def chat(
    model: Path,
    prompt: str | None = None,
    format: FormatName | None = None,  # noqa: A002 - the word users write
    system: str | None = None,
    temperature: NonNegativeFloat = 0.7,
    top_p: UnitIntervalAboveZero = 1.0,
    max_new_tokens: PositiveInt = 4096,
    fold: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Talks to a policy in the terminal; with --prompt or a pipe it answers once and prints the answer alone.

    Args:
        model: Checkpoint of a run, exported folder, or any Hugging Face folder of a causal language model.
        prompt: Answer this and leave; without it, what comes through a pipe is answered, or else a conversation begins.
        format: How the policy writes thoughts; only for folders that do not say so themselves.
        system: System prompt.
        temperature: Sampling temperature; 0 always takes the likeliest token.
        top_p: Nucleus mass in (0, 1].
        max_new_tokens: Length limit of thought and answer together.
        fold: Show one line in place of a thought.
        seed: Of the samples: same seed, same answers.
        device: Where to run, as in cuda:1; by default a GPU if there is one.

    Raises:
        UserError: The model cannot be read, an option is out of range, or (for one answer) the completion is malformed.
    """
    check_ranges(chat, locals())
    once = prompt if prompt is not None else None if sys.stdin.isatty() else sys.stdin.read()
    if once is not None and not once.strip():
        raise UserError("there is nothing to answer: give a --prompt or pipe some text in")
    sampling = Sampling(temperature, max_new_tokens, top_p=top_p)
    speaker = _load(model, format, sampling, seed, device)
    begin = [] if system is None else [Message(role="system", content=system)]
    if once is not None:
        _answer_once(speaker, [*begin, Message(role="user", content=once)])
    else:
        _converse(speaker, begin, Console(highlight=False, soft_wrap=True), fold)


def _load(model: Path, name: FormatName | None, sampling: Sampling, seed: int, device: str | None) -> Speaker:
    """Reads a folder, or a checkpoint by way of a temporary export."""
    if not model.exists():
        raise UserError(f"{model}: no such checkpoint or folder")
    if model.is_file() or (model / "meta.pt").is_file():
        from rlmt.export.checkpoints import export

        with tempfile.TemporaryDirectory(prefix="rlmt-chat-") as folder:
            export(model, Path(folder, "policy"))
            return _load(Path(folder, "policy"), name, sampling, seed, device)
    saved = ThinkingFormat.load(model) if (model / FILE_NAME).is_file() else None
    wanted = ThinkingFormat(name) if name is not None else saved
    if wanted is None:
        raise UserError(f"{model}: does not say how it thinks ({FILE_NAME} is not there); give --format")
    if saved is not None and wanted != saved:
        raise UserError(f"{model}: was trained with {saved}; leave --format out")
    tokenizer = load_tokenizer(model)
    wanted.check(tokenizer, str(model))
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    policy: Any = load_policy(model, "auto")
    return Speaker(policy.to(where), tokenizer, wanted, sampling, seed)


def _answer_once(speaker: Speaker, messages: list[Message]) -> None:
    """Prints the answer and nothing else, as it comes; the thought goes to a terminal behind stderr, dimmed."""
    aside = Console(stderr=True, highlight=False, soft_wrap=True)
    with _Shown(Console(highlight=False, soft_wrap=True), aside if aside.is_terminal else None) as shown:
        for split in speaker.say(messages):
            shown.update(split)
        shown.update(speaker.latest)
    if not speaker.latest.ok:
        raise UserError(f"no answer: {_TROUBLE[speaker.latest.status]}")


def _converse(speaker: Speaker, begin: list[Message], console: Console, fold: bool) -> None:
    console.print(Text(f"format {speaker.format.name} · /help for commands", style="dim"))
    messages = list(begin)
    while (line := _ask(console)) is not None:
        match line:
            case "":
                continue
            case "/quit":
                return
            case "/help":
                console.print(COMMANDS)
            case "/new":
                messages = list(begin)
            case "/fold":
                fold = not fold
                console.print(Text(f"thoughts are {'folded' if fold else 'shown'}", style="dim"))
            case "/thought":
                console.print(Text(speaker.latest.thought if speaker.ids else "nothing was thought yet", style="dim"))
            case _ if line.startswith("/"):
                console.print(Text(f"there is no command {line.split()[0]}; /help lists them", style="red"))
            case _:
                messages = _turn(speaker, [*messages, Message(role="user", content=line)], console, fold)


def _ask(console: Console) -> str | None:
    """A line of the user's; None when there are no more."""
    try:
        return console.input("[bold]> [/bold]").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _turn(speaker: Speaker, messages: list[Message], console: Console, fold: bool) -> list[Message]:
    """Lets the policy answer, and returns the conversation with the answer, or without the turn that got none."""
    cut = False
    try:
        with _Shown(console, None if fold else console) as shown:
            for split in speaker.say(messages):
                shown.update(split)
            shown.update(speaker.latest)
    except KeyboardInterrupt:
        cut = True
    except UserError as error:
        console.print(Text(str(error), style="red"))
        return messages[:-1]
    thought, rest = speaker.counts
    counts = f"{thought} tokens of thought, {rest} of answer" if speaker.format.thinks else f"{rest} tokens"
    console.print(Text(f"({counts}{', cut short' if cut else ''})", style="dim"))
    final = speaker.latest
    if not final.ok:
        console.print(Text(f"no answer: {_TROUBLE[final.status]}", style="red"))
        return messages[:-1]
    return [*messages, Message(role="assistant", content=final.response)]


class _Shown:
    """What of a growing completion is on the screen; prints what is new.

    Args:
        console: where the response goes.
        thoughts: where the thought goes; None folds it away.
    """

    def __init__(self, console: Console, thoughts: Console | None) -> None:
        self.console, self.thoughts = console, thoughts
        self.thought = self.response = ""
        self._thinking = console.status("thinking …") if thoughts is None and console.is_terminal else None

    def __enter__(self) -> _Shown:
        if self._thinking is not None:
            self._thinking.start()
        return self

    def update(self, split: Split) -> None:
        """Prints what was added to the thought (where thoughts are shown) and to the response."""
        if self.thoughts is not None and split.thought.startswith(self.thought):
            self.thoughts.print(Text(split.thought[len(self.thought) :], style="dim italic"), end="")
            self.thought = split.thought
        if split.response and split.response.startswith(self.response):
            if not self.response:
                self._begin_response()
            self.console.print(Text(split.response[len(self.response) :]), end="")
            self.response = split.response

    def _begin_response(self) -> None:
        if self._thinking is not None:
            self._thinking.stop()
        if self.thought and self.thoughts is not None:
            self.thoughts.print("\n")

    def __exit__(self, *_: object) -> None:
        """Ends the line."""
        if self._thinking is not None:
            self._thinking.stop()
        if self.response:
            self.console.print()
        elif self.thought and self.thoughts is not None:
            self.thoughts.print()
