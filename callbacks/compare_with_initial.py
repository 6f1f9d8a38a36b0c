"""The policy against the initial one, while it is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlmt.distributed import collectives
from rlmt.distributed.lightning_internals import training_progress
from rlmt.endpoints import Endpoint
from rlmt.errors import UserError
from rlmt.models.training_mode import eval_mode
from rlmt.options import PositiveInt, check_ranges
from rlmt.rewards import WeightedSum
from rlmt.rewards.base import Reward, all_rewards
from rlmt.rewards.pairwise import TEMPLATE
from rlmt.types import Experience, Prompt, Scores, Split, Status

from ._common import rollout_data

JUDGE = "judge"
"""Name of the judge's win rate."""


@dataclass(frozen=True)
class _Answer:
    """A policy's answer to a prompt, as plain data for checkpoints."""

    prompt: str
    """Hash of the conversation."""
    response: str
    status: str
    scores: dict[str, float]
    """Raw scores by name of the reward; nan where there is none."""

    @property
    def split(self) -> Split:
        """The completion without its thought."""
        return Split("", self.response, Status(self.status))


Answers = dict[int, tuple[Prompt, _Answer]]
"""Answers by the row number of their prompt."""


class CompareWithInitial(Callback):
    """Compares the policy with the initial policy at every validation, and logs its win rates.

    Before the first step the initial policy answers the validation prompts; its responses and scores are saved in every
    checkpoint, so a resumed run does not need its weights. At each validation the policy answers the same prompts with
    the same seeds. `val/<name>_win_rate` is the share of prompts on which its response has the higher raw score, for
    each reward of the run, held-out ones included; with a judge `val/judge_win_rate` is the share that a judge prefers
    in both orders. Ties are half a win. A malformed completion loses against a well-formed one, two of them tie, and
    none is judged. `EarlyStopping` and `ModelCheckpoint` can monitor the win rates.

    Args:
        judge: Endpoint of an LLM that compares the responses, too. It is asked without a question about the cost.
        template: Question to the judge. `{prompt}`, `{response_a}`, `{response_b}` and names of `--data.extra_columns`
            are replaced.
        max_tokens: Maximum length of a judge's answer in tokens, hidden thinking included.
        ledger: File of the judge's answers; null is `compare_with_initial.jsonl` in `default_root_dir`.

    Raises:
        UserError: An option is out of range, or during setup the judge cannot be asked, a reward cannot be compared, or
            the run has no validation.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import CompareWithInitial
        >>> trainer = Trainer(callbacks=[CompareWithInitial()], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        judge: Endpoint | None = None,
        template: str = TEMPLATE,
        max_tokens: PositiveInt = 1024,
        ledger: str | None = None,
    ) -> None:
        check_ranges(CompareWithInitial, locals())
        self.judge = judge
        self.template = template
        self.max_tokens = max_tokens
        self.ledger = ledger
        self._rewards: list[str] = []
        self._initial: dict[int, _Answer] | None = None
        self._current: Answers = {}

    @property
    def metric_names(self) -> list[str]:
        """Names of the metrics that it logs, after `setup`."""
        return [f"val/{name}_win_rate" for name in (*self._rewards, *([] if self.judge is None else [JUDGE]))]

    @property
    def state_key(self) -> str:
        """Distinguishes callbacks with different judges."""
        return self._generate_state_key(judge=None if self.judge is None else self.judge.model)

    def state_dict(self) -> dict[str, Any]:
        """The answers of the initial policy."""
        if self._initial is None:
            return {}
        return {"initial": {index: asdict(answer) for index, answer in self._initial.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the answers of the initial policy."""
        if "initial" in state_dict:
            self._initial = {index: _Answer(**answer) for index, answer in state_dict["initial"].items()}

    @collectives.rank_hook
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks judge and rewards before any weights are loaded.

        Raises:
            UserError: The judge cannot be asked, a reward cannot be compared, or the run has no validation.
        """
        if stage not in ("fit", "validate"):
            return
        data, module = rollout_data(trainer, "CompareWithInitial"), pl_module
        if stage == "fit" and not data.val_dataloader():
            raise UserError(
                "CompareWithInitial compares on validation prompts, but --data.val_size is 0: raise it, or remove the "
                "callback."
            )
        self._rewards = _raw_rewards(module)
        if self.judge is None:
            return
        if not self.judge.model:
            raise UserError("CompareWithInitial.judge.model is not set; set the judge's name at the endpoint.")
        if JUDGE in self._rewards:
            raise UserError(f"CompareWithInitial: a reward is named {JUDGE!r}, too; set another `name` for it.")
        self.judge.check("CompareWithInitial.judge")
        question = self._question()
        try:
            question.check()
        except UserError as error:
            raise UserError(f"CompareWithInitial: {error}") from error
        for column in question.columns:
            if column not in data.extra_columns:
                raise UserError(
                    f"--data.extra_columns does not have {column!r}, which CompareWithInitial.template names; add it."
                )

    @collectives.rank_hook
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generates and scores the answers of the initial policy, unless the run is resumed.

        Raises:
            UserError: The run is resumed from a checkpoint without them.
        """
        if self._initial is not None:
            return
        if any(training_progress(trainer)):
            raise UserError(
                "--ckpt_path: has no answers of the initial policy, because CompareWithInitial was not among the "
                "callbacks when the run started; start a new run, or remove the callback and use `rlmt compare`."
            )
        module: Any = pl_module
        own: Answers = {}
        with eval_mode(module), torch.no_grad(), trainer.precision_plugin.val_step_context():
            for prompts in rollout_data(trainer, "CompareWithInitial").val_dataloader():
                own |= self._answers(*module.evaluate(prompts))
        self._initial = {index: answer for index, (_, answer) in _gather(own).items()}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts a comparison.

        Raises:
            UserError: `rlmt validate` was given no checkpoint with the answers of the initial policy.
        """
        self._current = {}
        if self._initial is None and not trainer.sanity_checking:
            raise UserError(
                "CompareWithInitial: there are no answers of the initial policy; pass --ckpt_path with a checkpoint of "
                "a run that had this callback, or remove it and use `rlmt compare`."
            )

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collects the policy's answers."""
        if not trainer.sanity_checking:
            self._current |= self._answers(outputs["experience"], outputs["held_out"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares and logs.

        Raises:
            UserError: The initial policy answered other prompts or has no scores by a reward, or the judge is lost.
        """
        if trainer.sanity_checking or self._initial is None:
            return
        current = _gather(self._current)
        self._check_initial(self._initial, current)
        rates = collectives.run_on_all_ranks(lambda: self._win_rates(trainer, current))
        rates = collectives.all_gather_object(rates)[0]
        for metric, rate in zip(self.metric_names, rates, strict=True):
            pl_module.log(metric, rate, batch_size=len(current))

    def _check_initial(self, initial: Mapping[int, _Answer], current: Answers) -> None:
        """Raises UserError if the initial policy's answers cannot be compared with the current ones."""
        prompts = [{index: answer.prompt for index, answer in initial.items()}]
        prompts += [{index: answer.prompt for index, (_, answer) in current.items()}]
        if prompts[0] != prompts[1]:
            raise collectives.user_error_on_all_ranks(
                "--data.val_prompts: the initial policy answered other validation prompts; keep those of the run's "
                "start, or start a new run."
            )
        scored = next(iter(initial.values())).scores
        for name in self._rewards:
            if name not in scored:
                raise collectives.user_error_on_all_ranks(
                    f"CompareWithInitial: the initial policy was not scored by reward {name!r}, which was added "
                    "later; remove the reward, or start a new run."
                )

    def _win_rates(self, trainer: Trainer, current: Answers) -> list[float]:
        """The win rates in the order of `metric_names`, on rank 0; none on other ranks, which do not ask."""
        if not trainer.is_global_zero:
            return []
        from rlmt.evaluation.compare.figures import judge_line, reward_line
        from rlmt.evaluation.compare.judged import judge_pairs
        from rlmt.evaluation.compare.pairs import Pair

        assert self._initial is not None
        rows = [(*current[index], self._initial[index]) for index in sorted(current)]
        pairs = [Pair(prompt, now.split, before.split) for prompt, now, before in rows]
        lines = []
        for name in self._rewards:
            scores = np.array([(now.scores[name], before.scores[name]) for _, now, before in rows], dtype=np.float64)
            lines.append(reward_line(name, pairs, (scores[:, 0], scores[:, 1])))
        if self.judge is not None:
            default = Path(trainer.default_root_dir) / "compare_with_initial.jsonl"
            ledger = default if self.ledger is None else Path(self.ledger).expanduser()
            option, fix = "CompareWithInitial.judge", "start it, and resume with --ckpt_path last"
            verdicts = judge_pairs(self.judge, self._question(), pairs, ledger, option, fix)
            lines.append(judge_line(JUDGE, pairs, verdicts))
        return [_mean(line.points) for line in lines]

    def _question(self) -> Any:
        # Imported here because most commands never compare.
        from rlmt.evaluation.compare.judge import JudgeQuestion

        return JudgeQuestion(self.template, self.max_tokens, 0.0)

    def _answers(self, experience: Experience, held_out: Mapping[str, Scores]) -> Answers:
        """The answers of a batch of validation, one per prompt."""
        from rlmt.evaluation.completions import conversation_hash

        columns = {name: _raw_scores(held_out.get(name, experience.scores), name) for name in self._rewards}
        found: Answers = {}
        for row, (prompt, split) in enumerate(zip(experience.rollouts.prompts, experience.splits, strict=True)):
            scores = {name: column[row] for name, column in columns.items()}
            answer = _Answer(conversation_hash(prompt.messages), split.response, split.status.value, scores)
            found[prompt.index] = (prompt, answer)
        return found


def _raw_rewards(module: Any) -> list[str]:
    """Names of the rewards that are compared: those trained on before they are weighted, and the held-out ones.

    Raises:
        UserError: The scores of a held-out reward depend on what else is in a batch.
    """
    for reward in all_rewards(module.held_out):
        if isinstance(reward, WeightedSum) and set(reward.scale) != {"none"}:
            raise UserError(
                f"--model.held_out_rewards: {reward.name!r} divides scores by their spread over a batch, so "
                "CompareWithInitial cannot compare them; set its scale to none."
            )
    trained: Reward = module.reward
    names = {reward.name for reward in all_rewards(trained)}
    return [*(name for name in trained.part_names if name in names), *module.held_out.names]


def _raw_scores(scores: Scores, name: str) -> list[float]:
    """[B] raw scores; nan where a reward that asks has no verdict."""
    raw = scores.parts.get(name, scores.total)
    unparsed = scores.parts.get(f"{name}_unparsed")
    return (raw if unparsed is None else raw.where(unparsed < 1, math.nan)).tolist()


def _gather(own: Answers) -> Answers:
    """The answers of all ranks."""
    return {index: answer for part in collectives.all_gather_object(own) for index, answer in part.items()}


def _mean(points: Any) -> float:
    """The mean over pairs with a result; nan without any."""
    known = points[~np.isnan(points)]
    return float(known.mean()) if known.size else math.nan
