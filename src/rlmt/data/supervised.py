"""Base data module of SFT and reward-model training: rows are encoded once, split, ordered and batched.

A batch is this rank's rows of one optimizer step. The module splits it into micro-batches by tokens, so nothing is
padded here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any, Generic, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from rlmt.data.sampler import PromptSampler, ResumableOrder, shuffled
from rlmt.data.tables import DataSource, held_out_source
from rlmt.distributed import collectives
from rlmt.errors import UserError
from rlmt.options import NonNegativeInt, PositiveInt, check_ranges

DEFAULT_VAL_SIZE = 64
"""Rows split off for validation if no option names validation rows or their number."""


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """One row of a dataset as tokens."""

    index: int
    """Row number in the dataset as loaded, from 0."""
    sequences: list[Tensor]
    """Token sequences of the row, each [n] int32; trained on together, in one optimizer step."""

    @property
    def longest(self) -> int:
        """Length of the longest sequence in tokens."""
        return max(map(len, self.sequences))

    def digest(self) -> bytes:
        """A hash: equal for equal rows."""
        digest = blake2b(digest_size=16)
        for sequence in self.sequences:
            digest.update(sequence.numpy().tobytes() + b"/")
        other_fields = [getattr(self, field.name) for field in fields(self) if field.name != "sequences"]
        digest.update(repr(other_fields).encode())
        return digest.digest()


Row = TypeVar("Row", bound=EncodedRow)


class RowBatch(Generic[Row]):
    """This rank's rows of one optimizer step; not a sequence or dataclass, so Lightning does not convert its fields."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows


class RowDataset(Dataset[Row]):
    """A map-style dataset over encoded rows in memory."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Row:
        return self.rows[position]

    @property
    def keys(self) -> list[int]:
        """Row number of each row; the order depends on it."""
        return [row.index for row in self.rows]

    def fingerprint(self) -> str:
        """A hash of all rows: equal for equal rows in equal order, on every machine."""
        return blake2b(b"".join(row.digest() for row in self.rows), digest_size=16).hexdigest()


class SupervisedDataModule(ResumableOrder, LightningDataModule, Generic[Row]):
    """Reads rows, drops those that are too long, splits some off for validation and batches the rest.

    The order depends only on the seed and each row's number. An incomplete last batch of an epoch is dropped.

    Args:
        path: File (.parquet, .jsonl, .json, .csv), folder or Hub dataset.
        batch_size: Rows per optimizer step, over all ranks.
        max_length: Maximum tokens of a sequence. Rows with a longer one are dropped; their number is logged.
        val_path: File, folder or Hub dataset to validate on; None splits validation rows off `path`.
        val_size: Number of validation rows, 0 for none; None uses 64 rows of `path`, or all that `val_path` or
            `val_split` name.
        seed: Seed of the order of rows.
        split: Split of `path`, if it is a folder or Hub dataset; None uses `train`, or the only one.
        subset: Subset (configuration) of `path`, if it is a folder or Hub dataset with several.
        val_split: Split of the validation rows: one of `val_path`, or another one of `path`.

    Raises:
        UserError: An argument is out of range.
    """

    row_noun: str
    """Plural noun for the rows, used in messages."""

    def __init__(
        self,
        path: str,
        batch_size: PositiveInt,
        max_length: PositiveInt,
        val_path: str | None = None,
        val_size: NonNegativeInt | None = None,
        seed: int = 0,
        split: str | None = None,
        subset: str | None = None,
        val_split: str | None = None,
    ) -> None:
        check_ranges(SupervisedDataModule, locals())
        super().__init__()
        self.path = path
        self.batch_size = batch_size
        self.max_length = max_length
        self.split, self.subset, self.val_split = split, subset, val_split
        self.val_path = val_path
        self.val_size = val_size
        self.seed = seed
        self.train_rows: list[Row] = []
        self.val_rows: list[Row] = []
        self._is_loaded = False

    @abstractmethod
    def read(self, source: DataSource, module: Any) -> list[Row]:
        """Reads and encodes all rows of a source.

        Args:
            source: File, folder or Hub name, with split and subset.
            module: The LightningModule that is trained, with its tokenizer.

        Returns:
            The encoded rows, in the order of the source.

        Raises:
            UserError: The source cannot be read, or has invalid rows.
        """

    @collectives.rank_hook
    def setup(self, stage: str) -> None:
        """Reads, filters and splits the rows (once), and orders the training rows.

        Args:
            stage: fit, validate or test.

        Raises:
            UserError: The options or the rows are invalid, or do not fit the module.
        """
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        expected = getattr(module, "data_module", "another data module")
        if expected not in [kind.__name__ for kind in type(self).__mro__]:
            raise UserError(
                f"--data is {type(self).__name__}, but --model {type(module).__name__} trains on {expected}."
            )
        if self.max_length > module.max_positions:
            raise UserError(
                f"--data.max_length is {self.max_length:,}, which exceeds the model's context of "
                f"{module.max_positions:,} tokens; lower it."
            )
        if not self._is_loaded:
            self._load(module)
            self._is_loaded = True
        self._sampler = None
        if stage == "fit":
            if self.batch_size > len(self.train_rows):
                raise UserError(
                    f"--data.batch_size is {self.batch_size:,}, but {self.path} has only {len(self.train_rows):,} "
                    f"{self.row_noun} for training; lower it or --data.val_size."
                )
            self._sampler = PromptSampler(RowDataset(self.train_rows), self.batch_size, *self._ranks, self.seed)
        elif not self.val_rows:
            raise UserError("--data has no validation rows; set --data.val_size above 0 or --data.val_path.")

    def _load(self, module: Any) -> None:
        """Reads the rows and splits them into training and validation rows."""
        source = DataSource(self.path, self.split, self.subset)
        rows = self._read_within_limit(source, module)
        shuffled_rows = [rows[i] for i in shuffled([row.index for row in rows], self.seed, "split")]
        other = held_out_source(source, self.val_path, self.val_split)
        held_out = shuffled_rows if other is None else self._read_within_limit(other, module)
        size = self.val_size
        if size is None:
            size = DEFAULT_VAL_SIZE if other is None else len(held_out)
        if size > len(held_out):
            raise UserError(
                f"--data.val_size is {size:,}, but {other or source} has {len(held_out):,} {self.row_noun}; "
                "lower it, or set --data.val_path."
            )
        self.val_rows = held_out[:size]
        self.train_rows = shuffled_rows[size:] if other is None else shuffled_rows
        rank_zero_info(f"{len(self.train_rows):,} {self.row_noun} to train on, {len(self.val_rows):,} to validate on")

    def _read_within_limit(self, source: DataSource, module: Any) -> list[Row]:
        """Reads a source and drops rows with a sequence longer than `max_length`."""
        rows = self.read(source, module)
        fitting = [row for row in rows if row.longest <= self.max_length]
        if not fitting:
            raise UserError(
                f"{source}: all {len(rows):,} {self.row_noun} exceed --data.max_length {self.max_length:,}; raise it."
            )
        if len(fitting) < len(rows):
            dropped = len(rows) - len(fitting)
            rank_zero_info(
                f"dropped {dropped:,} of {len(rows):,} {self.row_noun} over {self.max_length:,} tokens ({source})"
            )
        return fitting

    def train_dataloader(self) -> StatefulDataLoader:
        """Batches of `batch_size` / ranks rows, reshuffled every epoch; resumable within an epoch."""
        sampler = self._sampler
        assert sampler is not None
        return StatefulDataLoader(
            sampler.dataset,
            batch_size=self.batch_size // sampler.num_replicas,
            sampler=sampler,
            collate_fn=RowBatch,
            drop_last=True,
            # The loader samples a number at the start of an epoch. It must not come from the run's generator, because a
            # resumed run starts one epoch more.
            generator=torch.Generator(),
        )

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """This rank's share of each batch of validation rows, in order; no loader if there are no rows."""
        if not self.val_rows:
            return []
        size, rank = self._ranks
        starts = range(0, len(self.val_rows), self.batch_size)
        shares: Any = [RowBatch(self.val_rows[start : start + self.batch_size][rank::size]) for start in starts]
        # A DistributedSampler, so that Lightning does not shard the rows a second time.
        sampler: DistributedSampler[Any] = DistributedSampler(shares, num_replicas=1, rank=0, shuffle=False)
        generator = torch.Generator()  # as in train_dataloader
        return DataLoader(shares, batch_size=None, sampler=sampler, generator=generator)

    @property
    def _ranks(self) -> tuple[int, int]:
        """The number of ranks, and this rank."""
        assert self.trainer is not None
        return self.trainer.world_size, self.trainer.global_rank

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Same as `val_dataloader`."""
        return self.val_dataloader()
