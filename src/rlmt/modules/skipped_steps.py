"""Counts skipped optimizer steps and batches without a learning signal, and ends a run with too many in a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_warn

from rlmt.distributed.collectives import all_gather_object
from rlmt.types import Experience


@dataclass
class SkippedSteps:
    """Counts consecutive steps that leave the policy unchanged, of two kinds.

    A non-finite gradient seldom recovers by itself; batches without a learning signal often do. So each has its limit.
    """

    max_skipped: int
    """Maximum number of consecutive optimizer steps skipped for a non-finite loss or gradient."""
    max_idle: int
    """Maximum number of consecutive rollout batches without a learning signal."""
    skipped: int = 0
    idle: int = 0

    def reset(self) -> None:
        """Counts an optimizer step that was taken."""
        self.skipped = self.idle = 0

    def skip_step(self, problem: str, version: int) -> str | None:
        """Counts an optimizer step that was skipped, and warns.

        Args:
            problem: Why it was skipped.
            version: Version of the policy.

        Returns:
            The message to end the run with, if the limit is reached.
        """
        self.skipped += 1
        rank_zero_warn(f"Optimizer step skipped at policy version {version}: {problem}.")
        if self.skipped < self.max_skipped:
            return None
        return (
            f"Stopped after {self.skipped} consecutive skipped optimizer steps (--model.max_skipped): {problem}. Lower "
            "the learning rate or check the reward curve, and resume from the last checkpoint."
        )

    def skip_batch(self, experience: Experience, version: int) -> str | None:
        """Counts a rollout batch without a learning signal, and warns.

        Args:
            experience: All samples that were generated.
            version: Version of the policy.

        Returns:
            The message to end the run with, if the limit is reached.
        """
        self.idle += 1
        reason = no_signal_reason(experience)
        rank_zero_warn(f"Rollout batch without a learning signal at policy version {version}: {reason}.")
        if self.idle < self.max_idle:
            return None
        return (
            f"Stopped after {self.idle} consecutive rollout batches without a learning signal (--model.max_idle): "
            f"{reason}. Check the samples and their rewards (rollouts/ beside metrics.csv), --model.format and "
            "--data.max_new_tokens, or generate more samples per prompt (--data.group_size)."
        )

    def state_dict(self) -> dict[str, int]:
        """Both counts."""
        return {"skipped": self.skipped, "idle": self.idle}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restores both counts."""
        self.skipped, self.idle = state["skipped"], state["idle"]


def no_signal_reason(experience: Experience) -> str:
    """Why a batch has no learning signal, for a message. All ranks have to call it."""
    statuses: Counter[str] = Counter()
    for counted in all_gather_object(Counter(split.status.value for split in experience.splits if not split.ok)):
        statuses.update(counted)
    if statuses.total() == sum(all_gather_object(len(experience.splits))):
        return f"all samples are malformed ({', '.join(f'{n} {status}' for status, n in statuses.most_common())})"
    if experience.pairs is not None:
        return "no prompt has a pair"
    if experience.mask is not None and not any(all_gather_object(bool(experience.mask.any()))):
        return "all samples are truncated and left out of the loss (--model.algorithm.mask_truncated)"
    return "no prompt has samples with different rewards"
