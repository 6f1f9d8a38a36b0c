"""Benchmarks while a policy is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rlmt.data.generation import LoadedPrompts
from rlmt.distributed import collectives
from rlmt.endpoints import Endpoint
from rlmt.errors import UserError
from rlmt.options import PositiveInt, check_ranges
from rlmt.types import Prompt

from ._common import rollout_data

if TYPE_CHECKING:
    from rlmt.evaluation.benchmark import Benchmark, Item
    from rlmt.evaluation.completions import Completion


class Evaluate(Callback):
    """Scores the policy on items of a benchmark at every validation, and logs the first figure as `val/<benchmark>`.

    `--trainer.val_check_interval` sets the number of steps between validations. The run's own engine generates one
    completion per item with the current weights and the run's sampling parameters; the seeds are the same every time,
    so curves are comparable and a resumed run logs the same values. `EarlyStopping` and `ModelCheckpoint` can monitor
    the figure. `val/<benchmark>_malformed` is the share of malformed completions, which get the benchmark's failure
    value and are never judged.

    Args:
        benchmark: Name of a benchmark, or MODULE.CLASS of your own.
        data: File, folder or hub dataset of its items; null takes the benchmark's hub dataset.
        limit: Number of items, from the first; items with longer prompts than --data.max_prompt_tokens are left out.
        judge: Endpoint that judges, for a benchmark that asks one. It is asked without a question about the cost.
        ledger: File of the judge's answers; null is `evaluate.<benchmark>.jsonl` in `default_root_dir`.

    Raises:
        UserError: The limit is not positive, or during setup the benchmark, its data or its judge is missing, or the
            run has no validation.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import Evaluate
        >>> trainer = Trainer(callbacks=[Evaluate("ifeval", limit=128)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        benchmark: str,
        data: str | None = None,
        limit: PositiveInt = 64,
        judge: Endpoint | None = None,
        ledger: str | None = None,
    ) -> None:
        check_ranges(Evaluate, locals())
        self.benchmark = benchmark
        self.data = data
        self.limit = limit
        self.judge = judge
        self.ledger = ledger
        self._benchmark: Benchmark | None = None
        self._items: list[Item] = []

    @property
    def metric_names(self) -> list[str]:
        """Names of the metrics that it logs, after `setup`."""
        name = self.benchmark if self._benchmark is None else self._benchmark.name
        return [f"val/{name}", f"val/{name}_malformed"]

    @collectives.rank_hook
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reads the items, and checks what scoring needs before any weights are loaded.

        Raises:
            UserError: The benchmark, its data or its judge is missing, or the run has no validation.
        """
        if stage not in ("fit", "validate") or self._benchmark is not None:
            return
        from rlmt.evaluation.registry import find_benchmark, load_benchmark_items

        data = rollout_data(trainer, "Evaluate")
        if stage == "fit" and not data.val_dataloader():
            raise UserError("Evaluate runs at validations, but --data.val_size is 0: raise it, or remove the callback.")
        benchmark = find_benchmark(self.benchmark, option="Evaluate.benchmark")
        if benchmark.judge is not None:
            if self.judge is None or not self.judge.model:
                raise UserError(
                    f"Evaluate.judge is not set, but {benchmark.title} asks one; set its base_url and model."
                )
            self.judge.check("Evaluate.judge")
        items = load_benchmark_items(benchmark, self.data, "Evaluate.data")
        benchmark.check(items)
        module: Any = pl_module
        lengths = [len(module.format.render(item.messages, module.tokenizer)) for item in items]
        fitting = [item for item, n in zip(items, lengths, strict=True) if n <= data.max_prompt_tokens]
        if not fitting:
            raise UserError(
                f"Evaluate.data: all {len(items):,} items of {benchmark.title} are longer than "
                f"--data.max_prompt_tokens {data.max_prompt_tokens:,}; raise it."
            )
        if len(fitting) < len(items):
            rank_zero_info(
                f"dropped {len(items) - len(fitting):,} of {len(items):,} items longer than {data.max_prompt_tokens:,} "
                f"tokens ({benchmark.title})"
            )
        self._benchmark, self._items = benchmark, fitting[: self.limit]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generates, scores and logs; nothing in the sanity check before training.

        Raises:
            UserError: The judge is lost, or its answers cannot be read.
        """
        if trainer.sanity_checking or self._benchmark is None:
            return
        completions = self._generate(trainer, pl_module)
        value = collectives.run_on_all_ranks(lambda: self._score(trainer, completions))
        value = collectives.all_gather_object(value)[0]
        malformed = sum(not completion.ok for completion in completions) / len(completions)
        for metric, logged in zip(self.metric_names, (value, malformed), strict=True):
            pl_module.log(metric, logged, batch_size=len(completions))

    def _generate(self, trainer: Trainer, pl_module: LightningModule) -> list[Completion]:
        """One completion per item, on every rank; each rank generates a part of them."""
        from rlmt.evaluation.completions import Completion

        ranks, module = trainer.world_size, pl_module
        # The first items are repeated where the ranks would not have equally many.
        count = -(-len(self._items) // ranks)
        numbers = [n % len(self._items) for n in range(trainer.global_rank, count * ranks, ranks)]
        prompts = [Prompt(number, self._items[number].messages) for number in numbers]
        split: Any = module.split  # type: ignore[operator, unused-ignore]
        experience = split(rollout_data(trainer, "Evaluate").generate(LoadedPrompts(prompts, epoch=0)))
        lengths, thoughts = experience.lengths.tolist(), experience.thought_tokens.tolist()
        own = {
            number: Completion(
                self._items[number].id, "", part.response, part.status, str(finish), thought, length - thought
            )
            for number, part, finish, thought, length in zip(
                numbers, experience.splits, experience.rollouts.finish, thoughts, lengths, strict=True
            )
        }
        found = {
            number: completion for part in collectives.all_gather_object(own) for number, completion in part.items()
        }
        return [found[number] for number in range(len(self._items))]

    def _score(self, trainer: Trainer, completions: list[Completion]) -> float:
        """The first figure, on rank 0; 0 on other ranks, which do not ask."""
        if not trainer.is_global_zero:
            return 0.0
        from rlmt.evaluation.scoring import score_completions

        assert self._benchmark is not None
        default = Path(trainer.default_root_dir) / f"evaluate.{self._benchmark.name}.jsonl"
        ledger = default if self.ledger is None else Path(self.ledger).expanduser()
        scored = score_completions(
            self._benchmark,
            self._items,
            completions,
            self.judge,
            ledger,
            yes=True,
            show=False,
            option="Evaluate.judge",
            fix="start it, and resume with --ckpt_path last",
        )
        return float(next(iter(self._benchmark.compute(scored.rows).values())))
