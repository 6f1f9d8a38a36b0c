"""The `rlmt distill` command: asks a teacher for demonstrations.

The ledger is the only state. The files of demonstrations and of rejected prompts are computed from it, so a run that
was killed at any moment continues without a duplicate row and without asking again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rlmt.checkpointing.files import atomic_write
from rlmt.data.prompts import load_prompts
from rlmt.distill.client import TeacherClient, connect
from rlmt.distill.rows import Attempt, Question, Row, check_answer, distinct
from rlmt.distill.summary import summary_lines, terminal_table, word_counts, write_summary
from rlmt.distill.teacher import Teacher
from rlmt.endpoints import Ledger, RequestRejected
from rlmt.endpoints.estimate import confirm, estimate
from rlmt.endpoints.progress import RequestProgress, track_requests
from rlmt.errors import UserError
from rlmt.options import NonNegativeFloat, PositiveInt, check_ranges
from rlmt.types import Prompt

MAX_FIRST_REFUSALS = 10
"""Refused requests after which the run stops if there was no answer: a wrong field in the requests refuses them all."""


def distill(
    teacher: Teacher,
    prompts: str,
    out: Path,
    instruction: str,
    column: str | None = None,
    limit: PositiveInt | None = None,
    temperature: NonNegativeFloat = 0.7,
    max_tokens: PositiveInt = 8192,
    tries: PositiveInt = 2,
    yes: bool = False,
) -> None:
    """Asks a teacher for a thought and a response to each prompt, and writes the accepted ones as demonstrations.

    Beside `out` (say demos.jsonl) it writes demos.rejected.jsonl (prompts without a demonstration, with reasons),
    demos.ledger.jsonl (all answers), demos.summary.md and demos.png. The same command continues a run that was stopped.

    Args:
        teacher: The teacher.
        prompts: File (.parquet, .jsonl, .json, .csv) or Hub dataset of prompts.
        out: File to write, .jsonl; `rlmt fit --config sft --data.path` reads it.
        instruction: Text after the last user turn that asks for a planning phase in <think> tags, then the response.
        column: Column with the prompts; by default `prompt`, else `messages`.
        limit: Number of prompts to use, from the first; by default all.
        temperature: Sampling temperature.
        max_tokens: Maximum length of an answer in tokens, hidden thinking included.
        tries: Maximum number of answers per prompt.
        yes: Start without asking.

    Raises:
        UserError: An option is invalid, the teacher cannot be asked, the cost limit is reached, or no answer was
            accepted.
    """
    check_ranges(distill, locals())
    _check_options(out, instruction)
    teacher.check("--teacher")
    found = load_prompts(prompts, column, options="--")[:limit]
    chosen = distinct(found)
    if len(chosen) < len(found):
        print(f"{len(found) - len(chosen):,} of {len(found):,} prompts are duplicates and are asked once.")
    question = Question(teacher, instruction.strip(), temperature, max_tokens, tries)
    ledger = Ledger(out.with_name(f"{out.stem}.ledger.jsonl"))
    try:
        _Run(question, chosen, ledger, out).run(teacher, yes)
    finally:
        ledger.close()


def _check_options(out: Path, instruction: str) -> None:
    """Raises a UserError if the output file is unusable, or the instruction does not ask for the tags."""
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: the demonstrations are JSON lines; give a name that ends in .jsonl.")
    if out.exists() and not out.with_name(f"{out.stem}.ledger.jsonl").exists():
        raise UserError(f"--out {out}: the file exists, but was not written by `rlmt distill`; give another name.")
    if "<think>" not in instruction or "</think>" not in instruction:
        raise UserError("--instruction does not mention <think> and </think>; ask for the thought between these tags.")


class _Run:
    """One run of the command.

    Args:
        question: How the teacher is asked.
        prompts: Distinct prompts.
        ledger: Answers so far.
        out: File of the demonstrations.
    """

    def __init__(self, question: Question, prompts: Sequence[Prompt], ledger: Ledger, out: Path) -> None:
        self.question, self.prompts, self.ledger, self.out = question, prompts, ledger, out
        self.refused: dict[int, Row] = {}
        """Rows whose request the endpoint refused; it records no answer, so they are not in the ledger."""

    def run(self, teacher: Teacher, yes: bool) -> None:
        """Asks for what is missing, and writes the files, also when the teacher fails or the user interrupts."""
        client = connect(teacher, self.ledger)
        open_prompts = [prompt for prompt in self.prompts if self.question.recorded(prompt, self.ledger) is None]
        if open_prompts:
            calls = [self.question.call(prompt, 0) for prompt in open_prompts]
            print(estimate(calls, self.ledger, "prompts", self.question.tries).sentences(client.meter), flush=True)
            if not (yes or teacher.local):
                confirm()
        try:
            if open_prompts:
                asyncio.run(self._ask_teacher(client, open_prompts))
        finally:
            rows = self._write(client)
        if not any(row.accepted for row in rows):
            raise UserError(f"{self.out}: no answer was accepted; read {self._rejected} for the reasons.")

    async def _ask_teacher(self, client: TeacherClient, prompts: Sequence[Prompt]) -> None:
        """Asks for all prompts; the first error stops the rest."""
        with track_requests("distill", len(prompts), client.meter) as progress:
            try:
                async with client, asyncio.TaskGroup() as group:
                    for prompt in prompts:
                        group.create_task(self._ask_for(client, prompt, progress))
            except BaseExceptionGroup as errors:
                if errors.subgroup(lambda error: not isinstance(error, UserError | BaseExceptionGroup)) is not None:
                    raise
                raise errors.exceptions[0] from None

    async def _ask_for(self, client: TeacherClient, prompt: Prompt, progress: RequestProgress) -> None:
        """Asks until an answer is accepted or the tries are used up."""
        attempts: list[Attempt] = []
        for number in range(self.question.tries):
            try:
                answer = await client.post(self.question.call(prompt, number))
            except RequestRejected as error:
                self.refused[prompt.index] = Row(prompt, [*attempts, Attempt("refused", str(error))])
                if len(self.refused) >= MAX_FIRST_REFUSALS and not client.meter.answers and not len(self.ledger):
                    raise UserError(
                        f"--teacher: the first {MAX_FIRST_REFUSALS} requests were refused, so no more are sent: {error}"
                    ) from error
                break
            attempts.append(check_answer(answer))
            if not attempts[-1].reason:
                break
        progress.advance()

    @property
    def _rejected(self) -> Path:
        """File of the rejected prompts."""
        return self.out.with_name(f"{self.out.stem}.rejected.jsonl")

    def _write(self, client: TeacherClient) -> list[Row]:
        """Writes the files, prints the summary, and returns the finished rows."""
        found = (
            self.question.recorded(prompt, self.ledger) or self.refused.get(prompt.index) for prompt in self.prompts
        )
        rows = [row for row in found if row is not None]
        for path, accepted in ((self.out, True), (self._rejected, False)):
            with atomic_write(path) as unfinished:
                lines = [json.dumps(row.to_json()) + "\n" for row in rows if row.accepted is accepted]
                unfinished.write_text("".join(lines), encoding="utf-8")
        lines_of_table = summary_lines(rows, len(self.prompts) - len(rows), client.meter)
        written = write_summary(lines_of_table, word_counts(rows), self.out)
        console = Console()
        console.print(terminal_table(lines_of_table))
        for path in (self.out, self._rejected, *written):
            console.print(str(path), soft_wrap=True, markup=False, highlight=False)
        return rows
