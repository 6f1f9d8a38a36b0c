"""The `rlmt evaluate` command: generates completions, scores them, and prints tables.

Each part reads the files of the one before, so it can run on another machine, and again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from rlmt.checkpointing.files import atomic_write
from rlmt.endpoints import Endpoint
from rlmt.engines import Engine
from rlmt.errors import UserError
from rlmt.evaluation.benchmark import Benchmark, Item, Scoring
from rlmt.evaluation.completions import read_completions
from rlmt.evaluation.generation import GenerationSettings, generate_all
from rlmt.evaluation.models import Model, resolve_models
from rlmt.evaluation.registry import find_benchmarks, load_items
from rlmt.evaluation.rendering import RENDERERS
from rlmt.evaluation.results import COMPLETIONS, read_items, read_results, write_items, write_result
from rlmt.evaluation.scoring import score_completions
from rlmt.evaluation.statistics import Interval
from rlmt.evaluation.table import Table, build_tables
from rlmt.formats.thinking import FormatName
from rlmt.options import PositiveInt, check_ranges, check_writable
from rlmt.progress import busy

Stage = Literal["all", "generate_only", "judge_only", "table"]
"""Parts of an evaluation: generation and scoring, one of both, or the table of what is there."""


def evaluate(
    models: list[str],
    benchmarks: list[str] | None = None,
    data: dict[str, str] | None = None,
    out: Path = Path("results"),
    judge: Endpoint | None = None,
    scoring: Scoring = "ours",
    limit: PositiveInt | None = None,
    format: FormatName | None = None,  # noqa: A002 - the name of the option
    engine: Engine | None = None,
    generation: GenerationSettings | None = None,
    difference: list[str] | None = None,
    stage: Stage = "all",
    yes: bool = False,
) -> None:
    """Evaluates models on benchmarks, and collects the results in a folder.

    Args:
        models: Checkpoints, folders, hub names or YAML files of endpoints; NAME=MODEL names one in tables. Where
            nothing is generated, names of models in the folder; none takes all.
        benchmarks: Names, or MODULE.CLASS of your own; of a table by default all that have results.
        data: File, folder or hub dataset of a benchmark by its name: --data.popqa FILE.
        out: Folder of the results.
        judge: The endpoint that judges, for benchmarks that ask one.
        scoring: `ours`, or `authors` to repeat the rules of the paper's evaluation code.
        limit: Number of items of each benchmark, from the first; by default all.
        format: Thinking format of models that do not store one.
        engine: Engine that generates; by default vLLM if it is installed, else transformers.
        generation: How completions are generated.
        difference: Two models of the table's last row, the first minus the second; by default the only one that thinks
            and the only one that does not.
        stage: Parts to run.
        yes: Start without asking about the cost.

    Raises:
        UserError: An option is invalid, a model or benchmark cannot be read, an engine or endpoint fails, or results
            cannot be compared.
    """
    check_ranges(evaluate, locals())
    check_writable(out, "--out")
    if stage == "table":
        _write_tables(out, scoring, models, benchmarks, difference)
        return
    evaluation = _Evaluation(out, find_benchmarks(benchmarks or [], scoring), judge, yes)
    if stage != "judge_only":
        if not models:
            raise UserError(
                "MODEL is missing; give a checkpoint, a folder, a hub name or the YAML file of an endpoint."
            )
        resolved = resolve_models(models, format)
        evaluation.generate(resolved, data or {}, limit, generation or GenerationSettings(), engine, stage == "all")
        models = [model.name for model in resolved]
    if stage != "generate_only":
        evaluation.score(models or evaluation.generated())


@dataclass(frozen=True)
class _Evaluation:
    """Scores completions in a folder of results.

    Args:
        out: Folder of the results.
        benchmarks: The benchmarks.
        judge: The judge.
        yes: Ask without a question about the cost.
    """

    out: Path
    benchmarks: Sequence[Benchmark]
    judge: Endpoint | None
    yes: bool

    @property
    def asks(self) -> list[Benchmark]:
        """The benchmarks that ask a judge."""
        return [benchmark for benchmark in self.benchmarks if benchmark.judge is not None]

    def generate(
        self,
        models: Sequence[Model],
        data: Mapping[str, str],
        limit: int | None,
        settings: GenerationSettings,
        engine: Engine | None,
        check_scoring: bool,
    ) -> None:
        """Generates the completions of all models; with `check_scoring` checks before that they can be scored."""
        if check_scoring:
            self.check_judge()
        items = load_items(self.benchmarks, data, limit)
        for benchmark, of_benchmark in zip(self.benchmarks, items, strict=True):
            if check_scoring:
                benchmark.check(of_benchmark)
            write_items(self.out / benchmark.name, of_benchmark)
        for model in models:
            paths = [self.out / benchmark.name / model.name / COMPLETIONS for benchmark in self.benchmarks]
            generate_all(model, list(zip(items, paths, strict=True)), settings, engine, self.yes)

    def check_judge(self) -> None:
        """Raises UserError if the judge is missing or cannot be asked, before anything is generated."""
        if self.asks and (self.judge is None or not self.judge.model):
            names = ", ".join(benchmark.name for benchmark in self.asks)
            raise UserError(
                f"--judge.model is not set, but a judge is asked for {names}; set it and --judge.base_url, or pass "
                "--generate_only."
            )
        if self.asks and self.judge is not None:
            self.judge.check("--judge")

    def generated(self) -> list[str]:
        """Names of the models with completions of any of the benchmarks."""
        found = {
            path.parent.name
            for benchmark in self.benchmarks
            for path in self.out.glob(f"{benchmark.name}/*/{COMPLETIONS}")
        }
        if not found:
            raise UserError(f"--out {self.out}: holds no completions of these benchmarks; generate some first.")
        return sorted(found)

    def score(self, models: Sequence[str]) -> None:
        """Scores and writes the results of each model and benchmark, and prints them."""
        items_of = {benchmark: read_items(self.out / benchmark.name) for benchmark in self.benchmarks}
        for benchmark, items in items_of.items():  # all of them, before a judge is asked for any
            benchmark.check(items)
        results = []
        for benchmark, items in items_of.items():
            for model in models:
                results.append(self._score_one(benchmark, items, model))
        _print_results(results)
        print(f"{self.out}: `rlmt evaluate --table --out {self.out}` writes the table of all results.")

    def _score_one(self, benchmark: Benchmark, items: Sequence[Item], model: str) -> dict[str, Any]:
        folder = self.out / benchmark.name / model
        completions = read_completions(folder / COMPLETIONS, items)
        scored = score_completions(
            benchmark,
            items,
            completions,
            self.judge,
            self.out / "ledger.jsonl",
            label=f"{benchmark.name} · {model}",
            yes=self.yes,
        )
        with busy("computing intervals …"):
            return write_result(folder, benchmark, completions, scored)


def _print_results(results: Sequence[Mapping[str, Any]]) -> None:
    """Prints one line per model and benchmark."""
    table = RichTable(box=None, pad_edge=False)
    for name in ("benchmark", "model"):
        table.add_column(name)
    for name in ("score", "n", "malformed", "unparsed"):
        table.add_column(name, justify="right")
    table.add_column("judge")
    for result in results:
        score = Interval.from_json(next(iter(result["figures"].values()))).format()
        counts = [f"{result[name]:,}" for name in ("n", "malformed", "unparsed")]
        cells = [result["title"], result["model"], score, *counts, result["judge"] or "rule"]
        table.add_row(*map(escape, cells))
    Console().print(table)


def _write_tables(
    out: Path,
    scoring: Scoring,
    models: Sequence[str],
    benchmarks: Sequence[str] | None,
    difference: Sequence[str] | None,
) -> None:
    """Writes the tables beside the results, and prints the first."""
    results = read_results(out, scoring)
    for option, key, names in (("MODEL", "model", models), ("--benchmarks", "benchmark", benchmarks or ())):
        known = {result[key] for result in results}
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"{option} {unknown[0]}: has no results in {out}; give one of {', '.join(sorted(known))}.")
        results = [result for result in results if not names or result[key] in names]
    if models:
        results.sort(key=lambda result: list(models).index(result["model"]))
    tables = build_tables(out, results, difference)
    for suffix, render in RENDERERS.items():
        with atomic_write(out / f"table.{scoring}{suffix}") as file:
            file.write_text(render(tables), encoding="utf-8")
    _print_table(tables[0])
    for suffix in RENDERERS:
        print(out / f"table.{scoring}{suffix}")


def _print_table(table: Table) -> None:
    """Prints a table to the terminal."""
    shown = RichTable(title=escape(table.title), box=None, pad_edge=False)
    for number, column in enumerate(table.columns):
        shown.add_column(escape(column), justify="right" if number else "left")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    Console().print(shown)
