"""Recorded samples in memory: flat arrays of tokens, and an index of groups by the tokens of their prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch import Tensor

from rlmt.annotations import PreTrainedTokenizerBase
from rlmt.engines.rollout_files import read_rollouts
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.types import FinishReason, Sampling

_PROBES = 64
"""Number of groups whose prompt is rendered and whose completion is decoded again, to check the tokenizer."""
_GROUP = ["step", "rank", "group", "sample", "epoch"]
_SAMPLING = ["temperature", "top_p", "max_new_tokens", "stop", "stop_token_ids"]
_TOKENS = ["prompt_ids", "completion_ids", "engine_logprobs"]
_COLUMNS = [*_GROUP, *_SAMPLING, *_TOKENS, "messages", "text", "finish", "weight_version"]


class OfflineRollouts:
    """The samples of a rollout file or a folder of them: B samples in groups, T completion tokens in total.

    Args:
        path: A parquet file that `rlmt predict` or `SampleTable` wrote, or a folder of such files.

    Raises:
        UserError: The file does not exist, is not a rollout file, or has invalid samples.
    """

    def __init__(self, path: str) -> None:
        table = read_rollouts(path, _COLUMNS)
        if not len(table):
            raise UserError(f"{path} has no samples: give a file or folder of recorded samples.")
        self.path = path
        self.format = _format(table, path)
        """Thinking format that rendered the recorded prompts."""
        self.sampling_settings = _sampling_settings(table)
        """Distinct sampling settings of the samples; more than one only if the folder holds files of several runs."""
        self.completion_ids: NDArray[np.int32] = _flat(table, "completion_ids")
        """Completion tokens [T], all samples concatenated."""
        self.logprobs: NDArray[np.float32] = _flat(table, "engine_logprobs")
        """Log-probs [T] at sampling time."""
        lengths = _lengths(table, "completion_ids")
        _check_tokens(path, lengths, _lengths(table, "engine_logprobs"), self.logprobs)
        self.starts: NDArray[np.int64] = np.concatenate([[0], lengths.cumsum()])
        """Offsets [B + 1]: sample i has the tokens from `starts[i]` up to `starts[i + 1]`."""
        self.finish = [FinishReason(reason) for reason in table["finish"].to_pylist()]
        self.weight_versions: NDArray[np.int64] = table["weight_version"].to_numpy()
        """Versions [B] of the weights that generated the samples."""
        self.ref_logprobs: Tensor | None = None
        """Log-probs [T] float32 under the reference, on the CPU; None until they are computed."""
        self.groups = _groups(table)
        """Rows of each group (the samples of one prompt), in recorded order."""
        firsts = table.take([rows.start for rows in self.groups])
        self.prompt_ids: list[NDArray[np.int32]] = [ids.values.to_numpy() for ids in firsts["prompt_ids"]]
        """Prompt tokens of each group."""
        stride = -(-len(firsts) // _PROBES)
        self._probes = firsts.take(list(range(0, len(firsts), stride))).to_pylist()
        self._groups_of_prompt = self._index(firsts)

    def _index(self, firsts: pa.Table) -> dict[bytes, list[range]]:
        """Maps each prompt to its groups, earlier epochs and steps first."""
        order = list(zip(firsts["epoch"].to_pylist(), firsts["step"].to_pylist(), strict=True))
        index: dict[bytes, list[range]] = {}
        for group in sorted(range(len(order)), key=order.__getitem__):
            index.setdefault(_key(self.prompt_ids[group]), []).append(self.groups[group])
        return index

    def groups_of(self, prompt_ids: Sequence[int]) -> list[range]:
        """Rows of each group of a prompt, in the order of epochs; empty if the prompt was not recorded."""
        return self._groups_of_prompt.get(_key(prompt_ids), [])

    def __len__(self) -> int:
        return len(self.finish)

    @property
    def origin(self) -> str:
        """The weight versions that generated the samples, as text."""
        first, last = int(self.weight_versions.min()), int(self.weight_versions.max())
        return f"weight version {first}" if first == last else f"weight versions {first} to {last}"

    @cached_property
    def digest(self) -> str:
        """Hash of all tokens and groups; rewards and texts do not enter it."""
        digest = blake2b(digest_size=16)
        for array in (self.starts, self.completion_ids, [len(rows) for rows in self.groups], *self.prompt_ids):
            digest.update(np.ascontiguousarray(array).tobytes())
            digest.update(b"/")
        return digest.hexdigest()

    def check(
        self, format: ThinkingFormat, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, group_size: int
    ) -> None:
        """Checks that a run can train on these samples.

        Args:
            format: The run's thinking format.
            tokenizer: The policy's tokenizer.
            sampling: The run's sampling settings.
            group_size: Samples per prompt that the run requires.

        Raises:
            UserError: The samples were recorded with another format, tokenizer or temperature, are longer than the run
                allows, or are too few per prompt.
        """
        if self.format != format:
            raise UserError(
                f"{self.path} was recorded with {self.format}, but this run uses {format}: set --model.format to the "
                "format of the recording."
            )
        self._check_tokenizer(format, tokenizer)
        self._check_sampling(sampling)
        smallest = min(map(len, self.groups))
        if smallest < group_size:
            raise UserError(
                f"{self.path} has {smallest} samples per prompt, but --data.group_size is {group_size}: set it to at "
                f"most {smallest}, or record more samples."
            )

    def _check_tokenizer(self, format: ThinkingFormat, tokenizer: PreTrainedTokenizerBase) -> None:
        """Renders and decodes some samples again and compares."""
        for row in self._probes:
            # U+FFFD may stand for a lone surrogate of the original text, which cannot be rendered again.
            exact = not any("\ufffd" in turn["content"] for turn in row["messages"])
            renders = not exact or format.render(row["messages"], tokenizer) == row["prompt_ids"]
            if not renders or format.decode(row["completion_ids"], tokenizer) != row["text"]:
                raise UserError(
                    f"{self.path} was recorded with another tokenizer or chat template than that of "
                    f"{tokenizer.name_or_path}: set --model.policy to the model that generated the samples, or to one "
                    "trained from it."
                )

    def _check_sampling(self, sampling: Sampling) -> None:
        """Compares temperature, top_p, stops and lengths."""
        for recorded in self.sampling_settings:
            for option in ("temperature", "top_p"):  # the trainer recomputes log-probs at the run's
                value = getattr(recorded, option)
                if value != getattr(sampling, option):
                    raise UserError(f"{self.path} was recorded at {option} {value:g}: set --data.{option} {value:g}.")
            if (recorded.stop, set(recorded.stop_token_ids)) != (sampling.stop, set(sampling.stop_token_ids)):
                raise UserError(
                    f"{self.path} was recorded with other stop tokens {recorded.stop_token_ids} than this run's "
                    f"{sampling.stop_token_ids}: give the policy the tokenizer of the model that generated the samples."
                )
        longest = int(np.diff(self.starts).max())
        if longest > sampling.max_new_tokens:
            raise UserError(
                f"{self.path} has a completion of {longest:,} tokens, but --data.max_new_tokens is "
                f"{sampling.max_new_tokens:,}: set it to at least {longest}."
            )

    def check_vocabulary(self, size: int) -> None:
        """Checks that all token ids are within a model's vocabulary.

        Args:
            size: Number of token embeddings.

        Raises:
            UserError: A token id is out of range.
        """
        largest = max(int(self.completion_ids.max()), *(int(ids.max()) for ids in self.prompt_ids))
        if largest >= size:
            raise UserError(
                f"{self.path} has token {largest}, but the policy's vocabulary has only {size:,}: set --model.policy "
                "to the model that generated the samples, or to one trained from it."
            )


def _key(ids: Sequence[int] | NDArray[np.int32]) -> bytes:
    """Dictionary key of a prompt."""
    return np.asarray(ids, dtype=np.int32).tobytes()


def _flat(table: pa.Table, column: str) -> Any:
    """All values of a column of lists, concatenated."""
    return pc.list_flatten(table[column]).to_numpy()


def _lengths(table: pa.Table, column: str) -> NDArray[np.int64]:
    """Lengths of a column of lists; null counts as 0."""
    lengths = pc.fill_null(pc.list_value_length(table[column]), 0)
    return np.asarray(lengths.to_numpy(), dtype=np.int64)


def _format(table: pa.Table, path: str) -> ThinkingFormat:
    """Thinking format from the metadata of the file."""
    saved = json.loads((table.schema.metadata or {}).get(b"rlmt", b"{}"))
    if "format" not in saved:
        raise UserError(f"{path} does not name the thinking format of its prompts: record the samples again.")
    return ThinkingFormat.from_dict(saved["format"])


def _sampling_settings(table: pa.Table) -> list[Sampling]:
    """Distinct sampling settings, in the order of their first use."""
    found: dict[Sampling, None] = {}
    for batch in table.select(_SAMPLING).to_batches():
        columns = [batch.column(name).to_pylist() for name in _SAMPLING]
        for temperature, top_p, limit, stop, ids in zip(*columns, strict=True):
            found.setdefault(Sampling(temperature, limit, tuple(stop), tuple(ids), top_p))
    return list(found)


def _check_tokens(path: str, ids: NDArray[np.int64], logprobs: NDArray[np.int64], values: NDArray[np.float32]) -> None:
    """Raises UserError unless every sample has tokens, and each token a finite log-prob."""
    invalid = np.flatnonzero((ids != logprobs) | (ids == 0))
    if len(invalid):
        row = int(invalid[0])
        raise UserError(f"{path}: row {row + 1} has {ids[row]} tokens and {logprobs[row]} log-probs; record it again.")
    if not np.isfinite(values).all():
        raise UserError(f"{path} has log-probs that are not finite: record the samples again.")


def _groups(table: pa.Table) -> list[range]:
    """Splits the rows into groups: one begins where the key changes or the sample number does not increase."""
    step, rank, group, sample = (table[name].to_numpy() for name in _GROUP[:4])
    key = np.stack([step, rank, group], axis=1)
    begin = np.flatnonzero((key[1:] != key[:-1]).any(axis=1) | (sample[1:] <= sample[:-1])) + 1
    return [range(first, end) for first, end in pairwise([0, *begin.tolist(), len(table)])]
