"""What SFT and reward-model training share of their data: rows encoded once, split, ordered and batched.

A batch is this rank's rows of one optimizer step; the module cuts it into micro-batches by tokens. So nothing is padded
here.
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
from rlmt.distributed import collectives
from rlmt.errors import UserError
from rlmt.ranges import NonNegativeInt, PositiveInt, check_ranges

DEFAULT_VAL_SIZE = 64
"""Rows split off for validation when neither `val_size` nor `val_path` is given."""


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """One row of a data set as tokens."""

    index: int
    """Row number in the data set as loaded, from 0."""
    sequences: list[Tensor]
    """Token sequences of the row, each [n] int32: trained on together, in one optimizer step."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))

    def digest(self) -> bytes:
        """Equal for equal rows."""
        digest = blake2b(digest_size=16)
        for sequence in self.sequences:
            digest.update(sequence.numpy().tobytes() + b"/")
        others = [getattr(self, field.name) for field in fields(self) if field.name != "sequences"]
        digest.update(repr(others).encode())
        return digest.digest()


Row = TypeVar("Row", bound=EncodedRow)


class RowBatch(Generic[Row]):
    """This rank's rows of one optimizer step. Neither a sequence nor a dataclass, so that Lightning leaves it alone."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows


class RowDataset(Dataset[Row]):
    """A map-style data set over encoded rows held in memory."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Row:
        return self.rows[position]

    @property
    def keys(self) -> list[int]:
        """Row number of each row, the identity that the order depends on."""
        return [row.index for row in self.rows]

    def fingerprint(self) -> str:
        """A digest of all rows: equal for equal rows in equal order, on every machine."""
        return blake2b(b"".join(row.digest() for row in self.rows), digest_size=16).hexdigest()


class SupervisedDataModule(ResumableOrder, LightningDataModule, Generic[Row]):
    """Reads rows, drops the over-long ones, splits some off for validation and batches the rest.

    The order depends on the seed and each row's number alone. Rows left over after the last whole batch of an epoch sit
    that epoch out.

    Args:
        path: file (.parquet, .jsonl, .json, .csv) or hub data set.
        batch_size: rows an optimizer step, over all ranks.
        max_length: rows with more tokens in a sequence are dropped, and counted aloud.
        val_path: file or hub data set to validate on; None splits validation rows off `path`.
        val_size: number of validation rows, 0 for none; None takes 64 of `path`, or all of `val_path`.
        seed: orders the rows.

    Raises:
        UserError: an argument is out of range.
    """

    what: str
    """What a row is, in the plural, for messages."""

    def __init__(
        self,
        path: str,
        batch_size: PositiveInt,
        max_length: PositiveInt,
        val_path: str | None = None,
        val_size: NonNegativeInt | None = None,
        seed: int = 0,
    ) -> None:
        check_ranges(SupervisedDataModule, locals())
        super().__init__()
        self.path = path
        self.batch_size = batch_size
        self.max_length = max_length
        self.val_path = val_path
        self.val_size = val_size
        self.seed = seed
        self.train_rows: list[Row] = []
        self.val_rows: list[Row] = []
        self._read = False

    @abstractmethod
    def read(self, source: str, module: Any) -> list[Row]:
        """Reads and encodes all rows of a source.

        Args:
            source: file or hub name.
            module: the LightningModule that is trained, with its tokenizer.

        Raises:
            UserError: it cannot be read, or holds bad rows.
        """

    @collectives.rank_hook
    def setup(self, stage: str) -> None:
        """Reads, drops and splits the rows (once).

        Args:
            stage: fit, validate or test.

        Raises:
            UserError: anything is wrong with the options or the rows.
        """
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        wanted = getattr(module, "data_module", "another one")
        if wanted not in [kind.__name__ for kind in type(self).__mro__]:
            raise UserError(f"--data is {type(self).__name__}, but --model {type(module).__name__} trains on {wanted}")
        if self.max_length > module.max_positions:
            raise UserError(
                f"--data.max_length {self.max_length:,} exceeds the model's context of {module.max_positions:,} tokens:"
                " lower it"
            )
        if not self._read:
            self._load(module)
            self._read = True
        self._sampler = None
        if stage == "fit":
            if self.batch_size > len(self.train_rows):
                raise UserError(
                    f"--data.batch_size is {self.batch_size:,}, but only {len(self.train_rows):,} {self.what} are left "
                    f"to train on of {self.path}: lower it or --data.val_size"
                )
            self._sampler = PromptSampler(RowDataset(self.train_rows), self.batch_size, *self._ranks, self.seed)
        elif not self.val_rows:
            raise UserError("there is nothing to validate on: set --data.val_size above 0 or --data.val_path")

    def _load(self, module: Any) -> None:
        fitting = self._fitting(self.path, module)
        mixed = [fitting[i] for i in shuffled([row.index for row in fitting], self.seed, "split")]
        held_out = mixed if self.val_path is None else self._fitting(self.val_path, module)
        size = self.val_size
        if size is None:
            size = DEFAULT_VAL_SIZE if self.val_path is None else len(held_out)
        if size > len(held_out):
            raise UserError(
                f"--data.val_size asks for {size:,} of {self.what}, but {self.val_path or self.path} has "
                f"{len(held_out):,}: lower it, or give --data.val_path"
            )
        self.val_rows = held_out[:size]
        self.train_rows = mixed[size:] if self.val_path is None else mixed
        rank_zero_info(f"{len(self.train_rows):,} {self.what} to train on, {len(self.val_rows):,} to validate on")

    def _fitting(self, source: str, module: Any) -> list[Row]:
        rows = self.read(source, module)
        fitting = [row for row in rows if row.longest <= self.max_length]
        if not fitting:
            raise UserError(f"{source}: all {len(rows):,} {self.what} exceed --data.max_length {self.max_length:,}")
        if len(fitting) < len(rows):
            dropped = len(rows) - len(fitting)
            rank_zero_info(
                f"dropped {dropped:,} of {len(rows):,} {self.what} of more than {self.max_length:,} tokens ({source})"
            )
        return fitting

    def train_dataloader(self) -> StatefulDataLoader:
        """Batches of `batch_size` / ranks rows, reshuffled every epoch, resumable in the middle of one."""
        sampler = self._sampler
        assert sampler is not None
        return StatefulDataLoader(
            sampler.dataset,
            batch_size=self.batch_size // sampler.num_replicas,
            sampler=sampler,
            collate_fn=RowBatch,
            drop_last=True,
            # Starting an epoch draws a number, which must not be the run's: a resumed run starts one more.
            generator=torch.Generator(),
        )

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """This rank's share of each batch of held-out rows, in order, as many on each; no loader if there are none."""
        if not self.val_rows:
            return []
        size, rank = self._ranks
        starts = range(0, len(self.val_rows), self.batch_size)
        shares: Any = [RowBatch(self.val_rows[start : start + self.batch_size][rank::size]) for start in starts]
        # Of this type, so that Lightning does not share them out once more.
        sampler: DistributedSampler[Any] = DistributedSampler(shares, num_replicas=1, rank=0, shuffle=False)
        own = torch.Generator()  # for the same reason
        return DataLoader(shares, batch_size=None, sampler=sampler, generator=own)

    @property
    def _ranks(self) -> tuple[int, int]:
        """How many there are, and which this is."""
        assert self.trainer is not None
        return self.trainer.world_size, self.trainer.global_rank

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The same as `val_dataloader`."""
        return self.val_dataloader()
