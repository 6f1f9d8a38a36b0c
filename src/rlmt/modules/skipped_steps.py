"""Steps that leave the policy as it is: counted, told, and in the end a reason to stop the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_warn

from rlmt.distributed.collectives import all_gather_object
from rlmt.types import Experience


@dataclass
class SkippedSteps:
    """Counts them in a row. A gradient that is not finite seldom mends itself; samples that teach nothing often do."""

    max_skipped: int
    """Optimizer steps in a row that a non-finite loss or gradient may cost."""
    max_idle: int
    """Rollout batches in a row that may teach nothing."""
    skipped: int = 0
    idle: int = 0

    def update(self) -> None:
        """The policy moved."""
        self.skipped = self.idle = 0

    def skip(self, problem: str, version: int) -> str | None:
        """An optimizer step was skipped.

        Args:
            problem: why, in words.
            version: of the policy.

        Returns:
            Why the run has to stop, if it has to.
        """
        self.skipped += 1
        rank_zero_warn(f"Optimizer step skipped at version {version} of the policy: {problem}.")
        if self.skipped < self.max_skipped:
            return None
        return (
            f"Stopped after {self.skipped} skipped optimizer steps in a row (--model.max_skipped): {problem}; lower "
            "the learning rate or look at the reward curve, and continue from the last checkpoint."
        )

    def pass_over(self, experience: Experience, version: int) -> str | None:
        """A rollout batch taught nothing.

        Args:
            experience: all that was drawn.
            version: of the policy.

        Returns:
            Why the run has to stop, if it has to.
        """
        self.idle += 1
        why = no_signal_reason(experience)
        rank_zero_warn(f"A rollout batch teaches nothing at version {version} of the policy: {why}.")
        if self.idle < self.max_idle:
            return None
        return (
            f"Stopped after {self.idle} rollout batches in a row that taught nothing (--model.max_idle): {why}; look "
            "at the samples and their rewards (rollouts/ beside metrics.csv), at --model.format and "
            "--data.max_new_tokens. More samples a prompt (--data.group_size) tell more apart."
        )

    def state_dict(self) -> dict[str, int]:
        """Both counts."""
        return {"skipped": self.skipped, "idle": self.idle}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on from `state_dict`."""
        self.skipped, self.idle = state["skipped"], state["idle"]


def no_signal_reason(experience: Experience) -> str:
    """What all samples of a batch that teaches nothing have in common, in words; every rank has to ask."""
    statuses: Counter[str] = Counter()
    for counted in all_gather_object(Counter(split.status.value for split in experience.splits if not split.ok)):
        statuses.update(counted)
    if statuses.total() == sum(all_gather_object(len(experience.splits))):
        return f"all samples are malformed ({', '.join(f'{n} {status}' for status, n in statuses.most_common())})"
    if experience.pairs is not None:
        return "no prompt has a pair"
    if experience.mask is not None and not any(all_gather_object(bool(experience.mask.any()))):
        return "no sample takes part in the loss, since all are cut off (--model.algorithm.mask_truncated)"
    return "no prompt has samples of different rewards"
