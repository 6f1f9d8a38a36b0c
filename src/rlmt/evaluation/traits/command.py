"""The `rlmt traits` command: in which planning traits the thoughts of two policies differ, and how often.

The judge sees thoughts here, and nowhere else. Completions and answers are kept in the output folder as they come, so
the same command continues a run that was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from rlmt.checkpointing.files import atomic_write
from rlmt.data.prompts import load_prompts
from rlmt.data.tables import DataSource
from rlmt.endpoints import Endpoint
from rlmt.engines import Engine
from rlmt.errors import UserError
from rlmt.evaluation.benchmark import Question
from rlmt.evaluation.compare.pairs import Pair
from rlmt.evaluation.compare.policies import Policies
from rlmt.evaluation.generation import GenerationSettings
from rlmt.evaluation.judging import ask_judge
from rlmt.evaluation.traits.discovery import Discovery, choose_batches, discover
from rlmt.evaluation.traits.questions import Trait, judge_question, read_winner
from rlmt.evaluation.traits.results import (
    TraitResult,
    draw_traits,
    markdown,
    terminal_table,
    trait_result,
    write_json,
    write_verdicts,
)
from rlmt.formats.thinking import FormatName
from rlmt.options import NonNegativeFloat, PositiveInt, UnitIntervalAboveZero, check_ranges, check_writable

FEW = 20
"""Number of questions up to which the user is not asked about their cost."""
NOTICE = "This command sends thoughts to the judge; no other command does."


def traits(
    a: str,
    b: str,
    prompts: str,
    out: Path,
    judge: Endpoint,
    names: dict[str, str] | None = None,
    batches: PositiveInt = 10,
    batch_prompts: PositiveInt = 20,
    max_traits: PositiveInt = 12,
    subset: str | None = None,
    column: str | None = None,
    limit: PositiveInt | None = None,
    format: FormatName | None = None,  # noqa: A002 - the name of the option
    engine: Engine | None = None,
    temperature: NonNegativeFloat = 0.7,
    top_p: UnitIntervalAboveZero = 0.95,
    max_new_tokens: PositiveInt = 8192,
    seed: int = 42,
    max_tokens: PositiveInt = 1024,
    attempts: PositiveInt = 3,
    yes: bool = False,
) -> None:
    """Finds planning traits in which the thoughts of two policies differ, and counts how often each policy shows them.

    THE JUDGE SEES THOUGHTS, which no other command sends. It lists the traits of single thoughts, compares the lists of
    both policies in batches, and merges the differences to one list; then it is asked for each prompt and trait which
    thought shows it more. `out` receives traits.json, traits.md, traits.png, traits.verdicts.parquet and completions/.
    The same command continues a run that was stopped.

    Args:
        a: Checkpoint, exported folder, Hub name, or YAML file of an endpoint; NAME=MODEL names it in the table.
        b: The policy to compare with.
        prompts: File (.parquet, .jsonl, .json, .csv) or Hub dataset of prompts.
        out: Output folder.
        judge: Endpoint of the LLM that reads the thoughts.
        names: Name → description of the traits; null lets the judge find them.
        batches: Number of batches of prompts whose thoughts the judge describes.
        batch_prompts: Number of prompts of a batch.
        max_traits: Maximum number of traits that the judge may find.
        subset: Subset of a Hub dataset that has several: v2 of allenai/WildBench, which the paper takes.
        column: Column with the prompts; by default `prompt`, else `messages`.
        limit: Number of prompts to use, from the first; by default all.
        format: Thinking format of models that do not store one.
        engine: What generates the completions; by default vLLM if it is installed, else transformers.
        temperature: Sampling temperature; 0 is greedy decoding.
        top_p: Nucleus mass in (0, 1].
        max_new_tokens: Maximum number of tokens of thought and response together, the same for both policies.
        seed: Seed of the completions.
        max_tokens: Maximum length of a judge's answer in tokens, hidden thinking included.
        attempts: How often an answer that cannot be read is asked for.
        yes: Ask endpoints without a question about the cost.

    Raises:
        UserError: An option is invalid, a model does not think or cannot be read, or the judge cannot be asked.
    """
    check_ranges(traits, locals())
    check_writable(out, "--out")
    judge.check("--judge")
    rows = load_prompts(DataSource(prompts, subset=subset), column, options="--")[:limit]
    settings = GenerationSettings(temperature, top_p, max_new_tokens, seed)
    policies = Policies.resolve(a, b, format, settings, engine)
    _check_thoughts(policies)
    print(NOTICE, flush=True)
    pairs = policies.generate(rows, out, yes)
    judged = [pair for pair in pairs if pair.well_formed and pair.first.thought and pair.second.thought]
    if not judged:
        raise UserError(f"{prompts}: both models wrote a thought and a response to no prompt; compare other models.")
    analysis = _Analysis(judge, out / "judge.jsonl", attempts, max_tokens, seed, yes)
    if names is None:
        chosen = choose_batches(judged, batches, batch_prompts, seed)
        found = discover(chosen, analysis.ask, max_traits, seed, max_tokens)
    else:
        found = Discovery([Trait(*row) for row in names.items()], [], [])
    winners = analysis.winners(judged, found.traits)
    results = [trait_result(*row, seed) for row in zip(found.traits, winners, strict=True)]
    results.sort(key=lambda result: -result.difference.value)
    write_verdicts(found.traits, judged, winners, out / "traits.verdicts.parquet")
    values: dict[str, Any] = {
        "prompts": {"source": prompts, "subset": subset, "column": column, "limit": limit},
        "used": len(judged),
        "left_out": len(pairs) - len(judged),
        "judge": analysis.to_json(),
        "traits": [result.to_json() for result in results],
        "discovery": found.to_json(),
    }
    write_json(policies.to_json() | values, out / "traits.json")
    _report(results, policies.names, len(judged), len(pairs), out)


def _check_thoughts(policies: Policies) -> None:
    """Raises UserError unless both models think."""
    for model in policies.models:
        if not model.format.thinks:
            raise UserError(
                f"{model.source}: its format {model.format.name} has no thoughts; compare two models that think, or "
                "compare responses with `rlmt compare`."
            )


@dataclass
class _Analysis:
    """How the judge is asked."""

    judge: Endpoint
    ledger: Path
    attempts: int
    max_tokens: int
    seed: int
    yes: bool
    judge_versions: set[str] = field(default_factory=set)
    """Names and versions of the judge as the endpoint reports them."""

    def ask(self, label: str, questions: Sequence[Question], readable: Callable[[int, str], bool]) -> list[str]:
        """The last answer to each question; empty where the judge refuses.

        Args:
            label: Label of the progress bar.
            questions: Questions.
            readable: Whether the answer to a question, by its number, can be read; else it is asked again.
        """
        found = ask_judge(
            self.judge,
            [[question] for question in questions],
            self.ledger,
            lambda number, answers: readable(number, answers[0]),
            label=label,
            attempts=self.attempts,
            yes=self.yes or len(questions) <= FEW,
        )
        self.judge_versions |= set(found.versions)
        return [answers[0] if answers else "" for answers in found.answers]

    def to_json(self) -> dict[str, Any]:
        """The judge, as JSON values."""
        return {"model": self.judge.model, "options": self.judge.options, "versions": sorted(self.judge_versions)}

    def winners(self, pairs: Sequence[Pair], found: Sequence[Trait]) -> list[list[str | None]]:
        """The verdict on each pair for each trait."""
        cases = [(pair, trait) for trait in found for pair in pairs]
        questions = [judge_question(pair, trait, self.seed, self.max_tokens) for pair, trait in cases]
        texts = self.ask("verdicts", questions, lambda n, text: read_winner(text, *cases[n], self.seed) is not None)
        verdicts = [read_winner(text, *case, self.seed) for text, case in zip(texts, cases, strict=True)]
        return [verdicts[start : start + len(pairs)] for start in range(0, len(verdicts), len(pairs))]


def _report(results: Sequence[TraitResult], names: tuple[str, str], used: int, prompts: int, out: Path) -> None:
    """Writes table and figure, and prints the table and the paths."""
    notes = [
        f"{used:,} of {prompts:,} prompts: both models wrote a thought and a response. The judge saw the thoughts.",
        "Shares of the prompts whose thought shows the trait more, in per cent.",
    ]
    figure = draw_traits(results, names, out / "traits.png")
    with atomic_write(out / "traits.md") as unfinished:
        unfinished.write_text(markdown(results, names, notes, figure.name), encoding="utf-8")
    console = Console(highlight=False)
    console.print(terminal_table(results, names))
    for line in [
        *notes,
        *(str(out / name) for name in ("traits.md", "traits.json", "traits.verdicts.parquet", "traits.png")),
    ]:
        console.print(line, soft_wrap=True, markup=False)
