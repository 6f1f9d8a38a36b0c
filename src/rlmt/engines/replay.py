"""Engine that replays recorded samples, so that any objective can train from a rollout file.

Left out: the choice among the recorded samples. The objective decides which samples of a group form a pair, and which
groups are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rlmt.annotations import PreTrainedModel, PreTrainedTokenizerBase
from rlmt.engines.base import Engine
from rlmt.engines.offline_rollouts import OfflineRollouts
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.types import AdapterWeights, SampleRequest, Samples, Sampling


class ReplayEngine(Engine):
    """Returns recorded samples, independent of the policy's current weights.

    A prompt is identified by its tokens. If it was recorded several times, as in the rollouts of a run of several
    epochs, each epoch takes the next of its groups, and starts over with the first after the last.

    Args:
        path: File that `rlmt predict` wrote, or the `rollouts` folder of a run.
    """

    replays = True

    def __init__(self, path: str) -> None:
        self.path = path
        self._rollouts: OfflineRollouts | None = None

    @property
    def rollouts(self) -> OfflineRollouts:
        """The recorded samples; available after `check`."""
        assert self._rollouts is not None, "check has not run"
        return self._rollouts

    def check(self) -> None:
        """Reads the recorded samples.

        Raises:
            UserError: The file or folder does not exist, or is not a valid recording.
        """
        if self._rollouts is None:
            try:
                self._rollouts = OfflineRollouts(self.path)
            except UserError as error:
                raise UserError(f"--data.engine.path: {error}") from error

    def check_sampling(
        self,
        format: ThinkingFormat,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        group_size: int,
        max_model_len: int,
    ) -> None:
        """Checks that the run can train on the recorded samples: see `OfflineRollouts.check`.

        Args:
            format: The run's thinking format.
            tokenizer: The policy's tokenizer.
            sampling: The run's temperature, limits and stops.
            group_size: Samples per prompt.
            max_model_len: Not used: the limits are those of `sampling`.

        Raises:
            UserError: The samples have another format, tokenizer or temperature, are too long, or are too few.
        """
        self.rollouts.check(format, tokenizer, sampling, group_size)

    def has_prompt(self, prompt_ids: Sequence[int]) -> bool:
        """Whether samples of this prompt were recorded."""
        return bool(self.rollouts.groups_of(prompt_ids))

    def start(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_model_len: int, dtype: torch.dtype
    ) -> None:
        """Does nothing: `check` has read the recorded samples."""

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int, adapter: AdapterWeights | None = None) -> None:
        """Only stores the version: new weights do not change recorded samples."""
        self.version = version

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Samples:
        """Returns the first recorded samples of each prompt, one per seed, in recorded order.

        Args:
            requests: Recorded prompts.
            sampling: Not used: `check_sampling` has compared it.

        Returns:
            Samples with the version of the weights that generated them (the lowest if they differ), and with reference
            log-probs if the recording has them.

        Raises:
            UserError: A prompt was not recorded, or has fewer samples than seeds.
        """
        rollouts = self.rollouts
        rows = [row for request in requests for row in self._rows(request)]
        parts = [slice(rollouts.starts[row], rollouts.starts[row + 1]) for row in rows]
        reference = rollouts.ref_logprobs
        return Samples(
            completion_ids=[rollouts.completion_ids[part].tolist() for part in parts],
            logprobs=[rollouts.logprobs[part].tolist() for part in parts],
            finish=[rollouts.finish[row] for row in rows],
            weight_version=int(rollouts.weight_versions[rows].min()),
            ref_logprobs=None if reference is None else [reference[part].tolist() for part in parts],
        )

    def _rows(self, request: SampleRequest) -> range:
        """Rows of the recorded samples that answer a request."""
        groups = self.rollouts.groups_of(request.prompt_ids)
        if not groups:
            raise UserError(
                f"{self.path} has no samples of a prompt of {len(request.prompt_ids)} tokens; record the prompt."
            )
        rows = groups[request.epoch % len(groups)][: len(request.seeds)]
        if len(rows) < len(request.seeds):
            raise UserError(
                f"{self.path} has {len(rows)} samples of a prompt, but {len(request.seeds)} are requested; lower "
                "--data.group_size."
            )
        return rows
