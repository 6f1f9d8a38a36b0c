"""Recorded samples in the place of fresh ones: any objective can be trained from a rollout file.

What is left out: choosing among the recorded samples. Which of a group make a pair, or which groups are dropped, is the
objective's affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlmt.engines.base import Engine
from rlmt.engines.offline_rollouts import OfflineRollouts
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.types import AdapterWeights, SampleRequest, Samples, Sampling


class ReplayEngine(Engine):
    """Returns samples that were recorded earlier, whatever the policy's weights are by now.

    A prompt is found by its tokens. Where it was recorded several times, as in the rollouts of a run of several passes,
    passes take its groups in turn, and begin again with the first when there are more passes than groups.

    Args:
        path: file that `rlmt predict` wrote, or the `rollouts` folder of a run.
    """

    replays = True

    def __init__(self, path: str) -> None:
        self.path = path
        self._recording: OfflineRollouts | None = None

    @property
    def recording(self) -> OfflineRollouts:
        """The samples; there after `check`."""
        assert self._recording is not None, "check has not run"
        return self._recording

    def check(self) -> None:
        """Reads the samples.

        Raises:
            UserError: they are missing, or are no samples.
        """
        if self._recording is None:
            try:
                self._recording = OfflineRollouts(self.path)
            except UserError as error:
                raise UserError(f"--data.engine.path: {error}") from error

    def check_run(
        self,
        format: ThinkingFormat,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        group_size: int,
        max_model_len: int,
    ) -> None:
        """Refuses samples of another format, tokenizer or temperature, too long ones and too few: see `Recording`."""
        self.recording.check(format, tokenizer, sampling, group_size)

    def knows(self, prompt_ids: Sequence[int]) -> bool:
        """Whether samples of this prompt were recorded."""
        return bool(self.recording.groups_of(prompt_ids))

    def start(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_model_len: int, dtype: torch.dtype
    ) -> None:
        """Does nothing: the recording was read by `check`."""

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int, adapter: AdapterWeights | None = None) -> None:
        """Does nothing but note the version: new weights do not change what was recorded."""
        self.version = version

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Samples:
        """The first recorded samples of each prompt, as many as there are seeds, in recorded order.

        Args:
            requests: prompts that `knows` knows.
            sampling: not used, since `check_run` compared it.

        Returns:
            Samples with the version of the weights that drew them, the lowest where they differ, and with reference
            log-probs where the recording has them.

        Raises:
            UserError: a prompt was not recorded, or has fewer samples than seeds.
        """
        recording = self.recording
        rows = [row for request in requests for row in self._rows(request)]
        parts = [slice(recording.starts[row], recording.starts[row + 1]) for row in rows]
        reference = recording.ref_logprobs
        return Samples(
            completion_ids=[recording.completion_ids[part].tolist() for part in parts],
            logprobs=[recording.logprobs[part].tolist() for part in parts],
            finish=[recording.finish[row] for row in rows],
            weight_version=int(recording.weight_versions[rows].min()),
            ref_logprobs=None if reference is None else [reference[part].tolist() for part in parts],
        )

    def _rows(self, request: SampleRequest) -> range:
        groups = self.recording.groups_of(request.prompt_ids)
        if not groups:
            raise UserError(
                f"{self.path} holds no samples of a prompt of {len(request.prompt_ids)} tokens: record them"
            )
        rows = groups[request.epoch % len(groups)][: len(request.seeds)]
        if len(rows) < len(request.seeds):
            raise UserError(
                f"{self.path} holds {len(rows)} samples of a prompt, and {len(request.seeds)} are asked for: lower "
                "--data.group_size"
            )
        return rows
