"""The `rlmt compare` command: which of two policies answers a set of prompts better.

Completions, answers of the judge and scores are kept in the output folder as they come, so the same command continues a
run that was stopped. The report is computed from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rlmt.data.prompts import load_prompts
from rlmt.endpoints import CONTINUE, Endpoint
from rlmt.engines import Engine
from rlmt.errors import UserError
from rlmt.evaluation.compare.figures import Line, compute_figures, judge_line, reward_line
from rlmt.evaluation.compare.judge import JudgeQuestion
from rlmt.evaluation.compare.judged import ask_about_pairs
from rlmt.evaluation.compare.pairs import Pair
from rlmt.evaluation.compare.policies import Policies
from rlmt.evaluation.compare.report import Comparison, closing_sentences, short_list, terminal_table, write_report
from rlmt.evaluation.compare.rubric import Rubric
from rlmt.evaluation.compare.scores import check_reward, describe_reward, score_pairs
from rlmt.evaluation.generation import GenerationSettings
from rlmt.formats.thinking import FormatName
from rlmt.options import NonNegativeFloat, PositiveInt, UnitIntervalAboveZero, check_ranges, check_writable
from rlmt.rewards import Reward
from rlmt.rewards.base import all_rewards, set_resume
from rlmt.rewards.pairwise import TEMPLATE
from rlmt.types import Prompt, Split, Status


def compare(
    a: str,
    b: str,
    prompts: str,
    out: Path,
    judge: Endpoint | None = None,
    rewards: list[Reward] | None = None,
    rubric: str | None = None,
    template: str = TEMPLATE,
    column: str | None = None,
    extra_columns: list[str] | None = None,
    limit: PositiveInt | None = None,
    format: FormatName | None = None,  # noqa: A002 - the name of the option
    engine: Engine | None = None,
    temperature: NonNegativeFloat = 0.7,
    top_p: UnitIntervalAboveZero = 0.95,
    max_new_tokens: PositiveInt = 8192,
    seed: int = 42,
    max_tokens: PositiveInt = 1024,
    attempts: PositiveInt = 3,
    device: str | None = None,
    yes: bool = False,
) -> None:
    """Compares the responses of two policies to the same prompts: by a judge, by rewards, or by both.

    It prints a table with a line for each judge and reward, and writes to `out`: comparison.md (table, and the prompts
    that were won and lost most clearly), comparison.json, verdicts.parquet, scores/ and completions/. The same command
    continues a run that was stopped. No judge and no reward sees a thought.

    Args:
        a: Checkpoint, exported folder, Hub name, or YAML file of an endpoint; NAME=MODEL names it in the table.
        b: The policy to compare with.
        prompts: File (.parquet, .jsonl, .json, .csv) or Hub dataset of prompts.
        out: Output folder.
        judge: Endpoint of an LLM that is asked which response is better, in both orders; null asks none.
        rewards: Rewards that score the responses, as `--model.reward` takes them; the higher score wins.
        rubric: Column with a checklist for each prompt; the judge is asked which criteria a response meets.
        template: Question to the judge. `{prompt}`, `{response_a}`, `{response_b}` and names of columns are replaced.
        column: Column with the prompts; by default `prompt`, else `messages`.
        extra_columns: Further columns, for reward functions with a parameter `extra`.
        limit: Number of prompts to use, from the first; by default all.
        format: Thinking format of models that do not store one.
        engine: What generates the completions; by default vLLM if it is installed, else transformers.
        temperature: Sampling temperature; 0 is greedy decoding.
        top_p: Nucleus mass in (0, 1].
        max_new_tokens: Maximum number of tokens of thought and response together, the same for both policies.
        seed: Seed of the completions.
        max_tokens: Maximum length of a judge's answer in tokens, hidden thinking included.
        attempts: How often a verdict that cannot be read is asked for.
        device: Device of the rewards, such as cuda:1; by default a GPU if one is available.
        yes: Ask endpoints without a question about the cost.

    Raises:
        UserError: An option is invalid, a model cannot be read, a reward fails, or the judge cannot be asked.
    """
    check_ranges(compare, locals())
    check_writable(out, "--out")
    ways = _Ways(judge, JudgeQuestion(template, max_tokens, 0.0), rewards or [], rubric, attempts)
    ways.check()
    wanted = sorted({*(extra_columns or []), *ways.columns})
    rows = load_prompts(prompts, column, extra_columns=wanted, options="--")[:limit]
    ways.check_prompts(rows)
    settings = GenerationSettings(temperature, top_p, max_new_tokens, seed)
    policies = Policies.resolve(a, b, format, settings, engine)
    used = policies.to_json() | {"prompts": {"source": prompts, "column": column, "limit": limit}} | ways.to_json()
    pairs = policies.generate(rows, out, yes)
    lines, judge_versions = ways.lines(pairs, out, device or ("cuda" if torch.cuda.is_available() else "cpu"), yes)
    figures = [compute_figures(line, pairs, seed) for line in lines]
    comparison = Comparison(policies.names, pairs, lines, figures, used | {"judge_versions": judge_versions})
    _print(comparison, write_report(comparison, out))


@dataclass(frozen=True)
class _Ways:
    """The ways in which responses are compared, each a line of the table."""

    judge: Endpoint | None
    question: JudgeQuestion
    rewards: list[Reward]
    rubric_column: str | None
    attempts: int

    @property
    def rubric(self) -> Rubric | None:
        """Checks the criteria of each prompt."""
        if self.judge is None or self.rubric_column is None:
            return None
        return Rubric(self.judge, self.rubric_column, self.question.max_tokens)

    def check(self) -> None:
        """Raises UserError unless there is a way, and all of them are valid; no weights are loaded."""
        if self.judge is None and self.rubric_column is not None:
            raise UserError("--rubric: a judge checks the criteria; set --judge.base_url and --judge.model.")
        if self.judge is None and not self.rewards:
            raise UserError(
                "--judge, --rewards: nothing compares the responses; set --judge.base_url and --judge.model, or "
                "--rewards."
            )
        if self.judge is not None:
            self.question.check()
            self.judge.check("--judge")
        counts = Counter(
            [*([] if self.judge is None else ["judge"]), self.rubric_column, *(r.name for r in self.rewards)]
        )
        for reward in self.rewards:
            if counts[reward.name] > 1:
                raise UserError(f"--rewards: two lines are named {reward.name!r}; set another `name` for the reward.")
            set_resume(reward, CONTINUE)
            check_reward(reward)

    @property
    def columns(self) -> set[str]:
        """Columns of the prompt set that are read."""
        found = {column for reward in self.rewards for inner in all_rewards(reward) for column in inner.columns}
        found |= set() if self.judge is None else set(self.question.columns)
        return found | ({self.rubric_column} if self.rubric_column is not None else set())

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError if a prompt lacks a value that a question needs, or has an invalid checklist."""
        for prompt in prompts:
            if self.judge is not None:
                self.question.ask(Pair(prompt, Split("", "a", Status.OK), Split("", "b", Status.OK)))
            if self.rubric is not None:
                self.rubric.ask(prompt, "a")

    def to_json(self) -> dict[str, Any]:
        """What the lines depend on, as JSON values; before rewards are loaded, which changes their attributes."""
        judge = None if self.judge is None else {"model": self.judge.model, "options": self.judge.options}
        template = None if self.judge is None else self.question.template
        rewards = [describe_reward(reward) for reward in self.rewards]
        return {"judge": judge, "template": template, "rubric": self.rubric_column, "rewards": rewards}

    def lines(self, pairs: Sequence[Pair], out: Path, device: str, yes: bool) -> tuple[list[Line], list[str]]:
        """The line of each way, and the versions of the judge."""
        found: list[Line] = []
        judge_versions: list[str] = []
        if self.judge is not None:
            judged = ask_about_pairs(self.judge, self.question, self.rubric, pairs, out, self.attempts, yes)
            found.append(judge_line("judge", pairs, judged.verdicts))
            if judged.rubric is not None and self.rubric_column is not None:
                found.append(reward_line(self.rubric_column, pairs, judged.rubric))
            judge_versions = list(judged.versions)
        for reward in self.rewards:
            scores = score_pairs(reward, pairs, out / "scores" / f"{_as_file(reward.name)}.parquet", device)
            found.append(reward_line(reward.name, pairs, scores))
        return found, judge_versions


def _as_file(name: str) -> str:
    """The name of a reward as the name of a file."""
    return "".join(char if char.isalnum() or char in "_-." else "-" for char in name)


def _print(comparison: Comparison, written: Sequence[Path]) -> None:
    """Prints the table, the sentences, a few prompts and the paths."""
    console = Console(highlight=False)
    console.print(terminal_table(comparison))
    for line in [*closing_sentences(comparison), *short_list(comparison), *map(str, written)]:
        console.print(line, soft_wrap=True, markup=False)
