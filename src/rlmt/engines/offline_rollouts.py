"""Recorded samples in memory: tokens lie flat, groups are found by their prompt's tokens."""

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
from transformers import PreTrainedTokenizerBase

from rlmt.engines.rollout_files import read_rollouts
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.types import FinishReason, Sampling

_PROBES = 64
"""Groups whose prompts are rendered and whose completions are decoded again, to know the tokenizer."""
_GROUP = ["step", "rank", "group", "sample", "epoch"]
_SAMPLING = ["temperature", "top_p", "max_new_tokens", "stop", "stop_token_ids"]
_TOKENS = ["prompt_ids", "completion_ids", "engine_logprobs"]
_COLUMNS = [*_GROUP, *_SAMPLING, *_TOKENS, "messages", "text", "finish", "weight_version"]


class OfflineRollouts:
    """The samples of a rollout file or of a folder of them, B in G-sized groups, T completion tokens in all.

    Args:
        path: a parquet file that `rlmt predict` or `SampleTable` wrote, or a folder of such files.

    Raises:
        UserError: there is no such file, it holds something else, or its samples are broken.
    """

    def __init__(self, path: str) -> None:
        table = read_rollouts(path, _COLUMNS)
        if not len(table):
            raise UserError(f"{path} holds no samples")
        self.path = path
        self.format = _format(table, path)
        """How the recorded prompts were rendered."""
        self.settings = _settings(table)
        """How the samples were drawn; one entry unless files of different runs lie side by side."""
        self.completion_ids: NDArray[np.int32] = _flat(table, "completion_ids")
        """[T]."""
        self.logprobs: NDArray[np.float32] = _flat(table, "engine_logprobs")
        """[T] log-probs when they were drawn."""
        lengths = _lengths(table, "completion_ids")
        _check_tokens(path, lengths, _lengths(table, "engine_logprobs"), self.logprobs)
        self.starts: NDArray[np.int64] = np.concatenate([[0], lengths.cumsum()])
        """[B + 1] where each sample's tokens begin."""
        self.finish = [FinishReason(reason) for reason in table["finish"].to_pylist()]
        self.weight_versions: NDArray[np.int64] = table["weight_version"].to_numpy()
        """[B] versions of the weights that drew them."""
        self.ref_logprobs: Tensor | None = None
        """[T] float32 log-probs under the reference, on the CPU, once they are known."""
        self.groups = _groups(table)
        """Rows of each group, samples of one prompt side by side, in the order in which they were recorded."""
        firsts = table.take([rows.start for rows in self.groups])
        self.prompt_ids: list[NDArray[np.int32]] = [ids.values.to_numpy() for ids in firsts["prompt_ids"]]
        """The prompt of each group."""
        every = -(-len(firsts) // _PROBES)
        self._probes = firsts.take(list(range(0, len(firsts), every))).to_pylist()
        self._of_prompt = self._index(firsts)

    def _index(self, firsts: pa.Table) -> dict[bytes, list[range]]:
        """Each prompt's groups, earlier passes and steps first."""
        when = list(zip(firsts["epoch"].to_pylist(), firsts["step"].to_pylist(), strict=True))
        index: dict[bytes, list[range]] = {}
        for group in sorted(range(len(when)), key=when.__getitem__):
            index.setdefault(_key(self.prompt_ids[group]), []).append(self.groups[group])
        return index

    def groups_of(self, prompt_ids: Sequence[int]) -> list[range]:
        """Rows of each group that was drawn for a prompt, in the order of passes; none if it was never recorded."""
        return self._of_prompt.get(_key(prompt_ids), [])

    def __len__(self) -> int:
        return len(self.finish)

    @property
    def origin(self) -> str:
        """Who drew the samples, in words."""
        first, last = int(self.weight_versions.min()), int(self.weight_versions.max())
        return f"weight version {first}" if first == last else f"weight versions {first} to {last}"

    @cached_property
    def digest(self) -> str:
        """Tells these tokens from all others; rewards and texts do not enter."""
        digest = blake2b(digest_size=16)
        for array in (self.starts, self.completion_ids, [len(rows) for rows in self.groups], *self.prompt_ids):
            digest.update(np.ascontiguousarray(array).tobytes())
            digest.update(b"/")
        return digest.hexdigest()

    def check(
        self, format: ThinkingFormat, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, group_size: int
    ) -> None:
        """Refuses samples that this run cannot train on.

        Args:
            format: the run's.
            tokenizer: the policy's.
            sampling: how the run would sample.
            group_size: samples a prompt that it wants.

        Raises:
            UserError: they were recorded in another format, with another tokenizer or at another temperature, are
                longer than the run allows, or are too few a prompt.
        """
        if self.format != format:
            raise UserError(
                f"{self.path} was recorded with {self.format}, this run asks for {format}: set --model.format to the "
                "recording's"
            )
        self._check_tokenizer(format, tokenizer)
        self._check_sampling(sampling)
        fewest = min(map(len, self.groups))
        if fewest < group_size:
            raise UserError(
                f"{self.path} holds {fewest} samples a prompt, and --data.group_size asks for {group_size}: set it to "
                f"{fewest} or less, or record more"
            )

    def _check_tokenizer(self, format: ThinkingFormat, tokenizer: PreTrainedTokenizerBase) -> None:
        for row in self._probes:
            exact = not any("\ufffd" in turn["content"] for turn in row["messages"])  # else perhaps a lone surrogate
            rendered = not exact or format.render(row["messages"], tokenizer) == row["prompt_ids"]
            if not rendered or format.decode(row["completion_ids"], tokenizer) != row["text"]:
                raise UserError(
                    f"{self.path} was recorded with another tokenizer or chat template than that of "
                    f"{tokenizer.name_or_path}: give --model.policy the model that drew the samples, or a child of it"
                )

    def _check_sampling(self, sampling: Sampling) -> None:
        for recorded in self.settings:
            for option in ("temperature", "top_p"):  # log-probs are compared at the run's
                was, now = getattr(recorded, option), getattr(sampling, option)
                if was != now:
                    raise UserError(f"{self.path} was recorded at {option} {was:g}: set --data.{option} {was:g}")
            if (recorded.stop, set(recorded.stop_token_ids)) != (sampling.stop, set(sampling.stop_token_ids)):
                raise UserError(
                    f"{self.path} was recorded with other stop tokens {recorded.stop_token_ids} than this run's "
                    f"{sampling.stop_token_ids}: give the policy the tokenizer of the model that drew the samples"
                )
        longest = int(np.diff(self.starts).max())
        if longest > sampling.max_new_tokens:
            raise UserError(
                f"{self.path} holds a completion of {longest:,} tokens, and --data.max_new_tokens allows "
                f"{sampling.max_new_tokens:,}: set it to {longest} or more"
            )

    def check_vocabulary(self, size: int) -> None:
        """Refuses token ids that a model of so many embeddings does not have.

        Raises:
            UserError: there is one.
        """
        largest = max(int(self.completion_ids.max()), *(int(ids.max()) for ids in self.prompt_ids))
        if largest >= size:
            raise UserError(
                f"{self.path} holds token {largest}, and the policy has only {size:,}: give --model.policy the model "
                "that drew the samples, or one trained from it"
            )


def _key(ids: Sequence[int] | NDArray[np.int32]) -> bytes:
    return np.asarray(ids, dtype=np.int32).tobytes()


def _flat(table: pa.Table, column: str) -> Any:
    """All values of a column of lists, end to end."""
    return pc.list_flatten(table[column]).to_numpy()


def _lengths(table: pa.Table, column: str) -> NDArray[np.int64]:
    lengths = pc.fill_null(pc.list_value_length(table[column]), 0)
    return np.asarray(lengths.to_numpy(), dtype=np.int64)


def _format(table: pa.Table, path: str) -> ThinkingFormat:
    saved = json.loads((table.schema.metadata or {}).get(b"rlmt", b"{}"))
    if "format" not in saved:
        raise UserError(f"{path} does not say in which format its prompts were rendered: record the samples again")
    return ThinkingFormat.from_dict(saved["format"])


def _settings(table: pa.Table) -> list[Sampling]:
    """The different ways in which the samples were drawn."""
    found: dict[Sampling, None] = {}
    for batch in table.select(_SAMPLING).to_batches():
        columns = [batch.column(name).to_pylist() for name in _SAMPLING]
        for temperature, top_p, limit, stop, ids in zip(*columns, strict=True):
            found.setdefault(Sampling(temperature, limit, tuple(stop), tuple(ids), top_p))
    return list(found)


def _check_tokens(path: str, ids: NDArray[np.int64], logprobs: NDArray[np.int64], values: NDArray[np.float32]) -> None:
    broken = np.flatnonzero((ids != logprobs) | (ids == 0))
    if len(broken):
        row = int(broken[0])
        raise UserError(f"{path}: row {row + 1} has {ids[row]} tokens and {logprobs[row]} log-probs: record it again")
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds log-probs that are no finite numbers: record the samples again")


def _groups(table: pa.Table) -> list[range]:
    """Cuts the rows into groups: a new one begins where the key changes or the samples are counted from 0 again."""
    step, rank, group, sample = (table[name].to_numpy() for name in _GROUP[:4])
    key = np.stack([step, rank, group], axis=1)
    begins = np.flatnonzero((key[1:] != key[:-1]).any(axis=1) | (sample[1:] <= sample[:-1])) + 1
    return [range(first, after) for first, after in pairwise([0, *begins.tolist(), len(table)])]
