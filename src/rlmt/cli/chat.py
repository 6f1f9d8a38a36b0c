"""`rlmt chat`: chat with a policy in the terminal; thought and response have a heading each.

Samples come from the distribution that training samples from: same rendering, same stop conditions, same split. Left
out: tools, images, several users.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from rlmt.annotations import PreTrainedModel, PreTrainedTokenizerBase
from rlmt.data.messages import text_problem
from rlmt.engines.transformers import stream
from rlmt.errors import UserError
from rlmt.evaluation.models import LocalModel, resolve_model
from rlmt.formats.thinking import FormatName, ThinkingFormat
from rlmt.models.cache import check_cache
from rlmt.models.loading import load_policy, max_positions
from rlmt.options import NonNegativeFloat, PositiveInt, UnitIntervalAboveZero, check_ranges
from rlmt.progress import busy
from rlmt.types import Message, Sampling, Split, Status

COMMANDS = """/thought  print the last thought
/fold     fold thoughts, or unfold them
/new      start a new conversation
/quit     quit (also Ctrl-D); Ctrl-C stops a response"""

HEADINGS = ("── thought ──", "── response ──")
"""Lines before a thought and before the response after it."""

_MALFORMED = {
    Status.UNOPENED: "the completion does not start with the format's opening tag",
    Status.UNCLOSED: "the thought is not closed",
    Status.STRAY_TAG: "the response contains a tag of the format",
    Status.EMPTY_RESPONSE: "the response is empty",
}


@dataclass
class ChatPolicy:
    """A policy with its tokenizer, thinking format and sampling options."""

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    format: ThinkingFormat
    sampling: Sampling
    seed: int
    """Seed of the next completion; each completion increments it."""
    ids: list[int] = field(default_factory=list)
    """Token ids of the last completion."""
    limit: int = 0
    """Maximum number of tokens of the last completion: `max_new_tokens`, or what the context had room for."""

    def stream_reply(self, messages: list[Message]) -> Iterator[Split]:
        """Generates a reply to a conversation and yields its split after each token, without a partial tag at its end.

        Args:
            messages: The conversation, a user turn last.

        Raises:
            UserError: The conversation fills the policy's context.
        """
        prompt = self.format.render(messages, self.tokenizer)
        room = max_positions(self.policy.config) - len(prompt)
        if room < 1:
            raise UserError(
                f"The conversation of {len(prompt)} tokens fills the policy's context; start a new one or shorten it."
            )
        self.limit = min(self.sampling.max_new_tokens, room)
        sampling = replace(self.sampling, max_new_tokens=self.limit)
        self.ids = []
        seed, self.seed = self.seed, self.seed + 1
        for token in stream(self.policy, prompt, sampling, seed):
            self.ids.append(token)
            text = self.format.decode(self.ids, self.tokenizer)
            yield self.format.split(_trim_partial_tag(text, self.format.tags))
            if any(stop in text for stop in sampling.stop):
                return

    @property
    def last_split(self) -> Split:
        """Thought, response and status of the last completion."""
        return self.format.split(self.format.decode(self.ids, self.tokenizer))

    @property
    def problem(self) -> str:
        """Why the last completion is malformed, and what to do about a truncated one."""
        status = self.last_split.status
        if status not in (Status.UNCLOSED, Status.EMPTY_RESPONSE):
            return _MALFORMED[status]
        if len(self.ids) < self.limit or self.ids[-1] in self.sampling.stop_token_ids:
            return f"{_MALFORMED[status]}: the policy ended its turn after {len(self.ids)} tokens"
        if self.limit < self.sampling.max_new_tokens:
            return f"{_MALFORMED[status]}: the policy's context is full; start a new conversation or shorten it"
        return f"{_MALFORMED[status]} after {len(self.ids)} tokens; raise --max_new_tokens"

    @property
    def token_counts(self) -> tuple[int, int]:
        """Number of tokens of the last completion in its thought and in the rest."""
        thought = self.format.thought_tokens(self.ids, self.tokenizer)
        return thought, len(self.ids) - thought


def _trim_partial_tag(text: str, tags: tuple[str, ...]) -> str:
    """Removes a suffix that may become a tag, and a partially decoded character at the end."""
    text = text.rstrip("\ufffd")
    cut = max((n for tag in tags for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)
    return text[: len(text) - cut]


def chat(
    model: Path,
    prompt: str | None = None,
    format: FormatName | None = None,  # noqa: A002 - the name of the option
    system: str | None = None,
    temperature: NonNegativeFloat = 0.7,
    top_p: UnitIntervalAboveZero = 1.0,
    max_new_tokens: PositiveInt = 4096,
    fold: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Chats with a policy in the terminal; with --prompt or piped input, prints one response and exits.

    Args:
        model: Checkpoint of a run, exported folder, or any Hugging Face folder of a causal language model.
        prompt: Prompt to respond to once; by default piped input is the prompt, and a terminal starts a conversation.
        format: Thinking format of the policy; only for folders that do not store it.
        system: System prompt.
        temperature: Sampling temperature; 0 is greedy decoding.
        top_p: Nucleus mass in (0, 1].
        max_new_tokens: Maximum number of tokens of thought and response together.
        fold: Print one line in place of a thought.
        seed: Seed of the samples.
        device: Device to run on, such as cuda:1; by default a GPU if one is available.

    Raises:
        UserError: The model cannot be read, an option is out of range, or (with one prompt) the completion is
            malformed.
    """
    check_ranges(chat, locals())
    single_prompt = prompt if prompt is not None else None if sys.stdin.isatty() else _read_piped()
    if single_prompt is not None and not single_prompt.strip():
        raise UserError("--prompt: the prompt is empty; pass some text, or pipe it in.")
    for option, text in (("--prompt", single_prompt), ("--system", system)):
        if text is not None and (problem := text_problem(text)):
            raise UserError(f"{option} {problem}; pass other text.")
    sampling = Sampling(temperature, max_new_tokens, top_p=top_p)
    with busy("loading the policy …"):
        policy = _load(model, format, sampling, seed, device)
    system_turn = [] if system is None else [Message(role="system", content=system)]
    if single_prompt is not None:
        _respond_once(policy, [*system_turn, Message(role="user", content=single_prompt)])
    else:
        _converse(policy, system_turn, Console(highlight=False, soft_wrap=True), fold)


def _read_piped() -> str:
    """The text on standard input."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"The piped prompt is not {error.encoding} text (byte {error.start}); convert it.") from error


def _load(model: Path, name: FormatName | None, sampling: Sampling, seed: int, device: str | None) -> ChatPolicy:
    """Loads the policy of a folder or a checkpoint."""
    if not model.exists():
        raise UserError(f"{model}: no such checkpoint or folder; pass one that exists.")
    resolved = resolve_model(str(model), name)
    if not isinstance(resolved, LocalModel):
        raise UserError(f"{model}: is the file of an endpoint; pass a checkpoint or a model folder.")
    check_cache(resolved.config, str(model), "serve it with vLLM")
    sampling = replace(sampling, stop=resolved.format.stop, stop_token_ids=resolved.stop_token_ids)
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with resolved.weights() as folder:
        policy: Any = load_policy(folder, "auto")
        return ChatPolicy(policy.to(target), resolved.tokenizer, resolved.format, sampling, seed)


def _respond_once(policy: ChatPolicy, messages: list[Message]) -> None:
    """Streams the response to stdout, and the thought, dimmed, to stderr where that is a terminal."""
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)
    with _StreamPrinter(Console(highlight=False, soft_wrap=True), stderr if stderr.is_terminal else None) as printer:
        for split in policy.stream_reply(messages):
            printer.update(split)
        printer.update(policy.last_split)
    if not policy.last_split.ok:
        raise UserError(f"The completion is malformed: {policy.problem}.")


def _converse(policy: ChatPolicy, system_turn: list[Message], console: Console, fold: bool) -> None:
    """Reads lines until /quit or the end of input; each one is a command or a user turn."""
    console.print(Text(f"format {policy.format.name} · /help for commands", style="dim"))
    messages = list(system_turn)
    while (line := _read_line(console)) is not None:
        match line:
            case "":
                continue
            case "/quit":
                return
            case "/help":
                console.print(COMMANDS)
            case "/new":
                messages = list(system_turn)
            case "/fold":
                fold = not fold
                console.print(Text(f"thoughts are {'folded' if fold else 'shown'}", style="dim"))
            case "/thought":
                console.print(Text(policy.last_split.thought if policy.ids else "no thought yet", style="dim"))
            case _ if line.startswith("/"):
                console.print(Text(f"{line.split()[0]} is not a command; /help lists them", style="red"))
            case _:
                messages = _run_turn(policy, [*messages, Message(role="user", content=line)], console, fold)


def _read_line(console: Console) -> str | None:
    """The next line of input; None at its end."""
    try:
        return console.input("[bold]> [/bold]").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None
    except UnicodeDecodeError as error:
        console.print(Text(f"this line is not {error.encoding} text; it is skipped", style="red"))
        return ""


def _run_turn(policy: ChatPolicy, messages: list[Message], console: Console, fold: bool) -> list[Message]:
    """Generates a reply; returns the conversation with it, or without the user turn if there is no valid reply."""
    interrupted = False
    try:
        with _StreamPrinter(console, None if fold else console) as printer:
            for split in policy.stream_reply(messages):
                printer.update(split)
            printer.update(policy.last_split)
    except KeyboardInterrupt:
        interrupted = True
    except UserError as error:
        console.print(Text(str(error), style="red"))
        return messages[:-1]
    thought, rest = policy.token_counts
    counts = f"{thought} tokens of thought, {rest} of response" if policy.format.thinks else f"{rest} tokens"
    console.print(Text(f"({counts}{', interrupted' if interrupted else ''})", style="dim"))
    final = policy.last_split
    if not final.ok:
        console.print(Text(f"malformed: {policy.problem}", style="red"))
        return messages[:-1]
    return [*messages, Message(role="assistant", content=final.response)]


class _StreamPrinter:
    """Prints a growing completion incrementally.

    Args:
        console: Console for the response.
        thought_console: Console for the thought; None folds it.
    """

    def __init__(self, console: Console, thought_console: Console | None) -> None:
        self.console, self.thought_console = console, thought_console
        self.thought = self.response = ""
        self._spinner = console.status("thinking …") if thought_console is None and console.is_terminal else None

    def __enter__(self) -> _StreamPrinter:
        if self._spinner is not None:
            self._spinner.start()
        return self

    def update(self, split: Split) -> None:
        """Prints what is new in the thought (unless folded) and in the response."""
        if self.thought_console is not None and split.thought.startswith(self.thought):
            if split.thought and not self.thought:
                self.thought_console.print(Text(HEADINGS[0], style="dim"))
            self.thought_console.print(Text(split.thought[len(self.thought) :], style="dim italic"), end="")
            self.thought = split.thought
        if split.response and split.response.startswith(self.response):
            if not self.response:
                self._begin_response()
            self.console.print(Text(split.response[len(self.response) :]), end="")
            self.response = split.response

    def _begin_response(self) -> None:
        """Stops the spinner, or ends the thought with an empty line."""
        if self._spinner is not None:
            self._spinner.stop()
        if self.thought and self.thought_console is not None:
            self.thought_console.print(Text(f"\n\n{HEADINGS[1]}", style="dim"))

    def __exit__(self, *_: object) -> None:
        """Stops the spinner and ends the line."""
        if self._spinner is not None:
            self._spinner.stop()
        if self.response:
            self.console.print()
        elif self.thought and self.thought_console is not None:
            self.thought_console.print()
