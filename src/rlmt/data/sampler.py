"""The order of prompts and the seeds of samples, as pure functions of the run's seed.

Both hash the prompt's row number; no random generator is used. So the order depends neither on the number of ranks nor
on the library version. Dropping one prompt (too long under one format, short enough under another) does not change the
order of the others: runs that differ in one setting see the same prompts in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, Protocol, cast

from torch.utils.data import DistributedSampler

from rlmt.errors import UserError


class KeyedRows(Protocol):
    """A dataset whose rows have an identity besides their position."""

    @property
    def keys(self) -> list[int]:
        """A distinct integer for each row."""

    def fingerprint(self) -> str:
        """A hash of all rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> Any: ...


def sample_seed(run_seed: int, epoch: int, prompt_index: int, sample: int) -> int:
    """The seed of one sample, independent of the batch, rank or engine that generates it.

    Args:
        run_seed: Seed of the run.
        epoch: Epoch over the prompt set, from 0.
        prompt_index: The prompt's row number.
        sample: Index of the sample among the prompt's samples, from 0.

    Returns:
        An integer in [0, 2**63).
    """
    return _stable_hash("sample", run_seed, epoch, prompt_index, sample)


def item_seed(run_seed: int, item: str, sample: int = 0) -> int:
    """The seed of a sample for an item that has a name in place of a row number.

    Args:
        run_seed: Seed of the run.
        item: Name of the item.
        sample: Index of the sample among the item's samples, from 0.

    Returns:
        An integer in [0, 2**63).
    """
    return _stable_hash("item", run_seed, item, sample)


def shuffled(keys: Sequence[int], seed: int, purpose: str) -> list[int]:
    """Positions 0..len(keys)-1 in an order that depends only on the seed, the purpose and each key.

    Args:
        keys: A distinct integer per item.
        seed: Seed of the run.
        purpose: Distinguishes the orders of one run, e.g. "split" or "epoch 3".

    Returns:
        A permutation. Removing an item leaves the others in the same order.
    """
    return sorted(range(len(keys)), key=lambda position: _stable_hash(purpose, seed, keys[position]))


def _stable_hash(*parts: object) -> int:
    digest = blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class PromptSampler(DistributedSampler[int]):
    """Positions of this rank's training prompts, epoch after epoch, each in a new order.

    The next position depends only on the number of prompts sampled so far. So a resumed run continues exactly where it
    stopped, within an epoch or between two. Lightning's epoch number is not used: it skips one when a run with
    `max_steps` is resumed from a checkpoint written at the end of an epoch (lightning 2.6).

    Global batch k of an epoch has the same prompts on any number of ranks. An incomplete last batch is dropped. The
    class is a `DistributedSampler` so that Lightning does not replace it by one of its own.

    Args:
        dataset: The training prompts.
        batch_size: Prompts per step over all ranks; a multiple of `num_replicas`.
        num_replicas: Number of ranks.
        rank: This rank.
        seed: Seed of the run.

    Raises:
        UserError: `batch_size` is not a multiple of `num_replicas`.
    """

    def __init__(self, dataset: KeyedRows, batch_size: int, num_replicas: int, rank: int, seed: int) -> None:
        if batch_size % num_replicas:
            raise UserError(
                f"--data.batch_size is {batch_size}, which is not divisible by {num_replicas} devices; use a multiple."
            )
        super().__init__(
            cast(Any, dataset), num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed, drop_last=True
        )
        self._keys = dataset.keys
        self._fingerprint = f"{seed}/{batch_size}/{dataset.fingerprint()}"
        self.total_size = len(dataset) // batch_size * batch_size
        self.num_samples = self.total_size // num_replicas
        self._num_sampled = 0  # by this rank, over all epochs
        self._order: tuple[int, list[int]] | None = None  # an epoch and this rank's positions in it

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the epoch follows from the number of prompts sampled.

        Args:
            epoch: Lightning's epoch number.
        """

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.num_samples):
            yield self._next()

    def take(self, count: int) -> list[int]:
        """Consumes this rank's next positions; iteration continues after them.

        Args:
            count: Number of positions. One batch's worth never crosses the end of an epoch.
        """
        return [self._next() for _ in range(count)]

    def peek(self, count: int) -> tuple[list[int], int]:
        """This rank's next positions, without consuming them, and their epoch.

        Args:
            count: Number of positions. One batch's worth never crosses the end of an epoch.
        """
        epoch, position = divmod(self._num_sampled, self.num_samples)
        return self._order_of(epoch)[position : position + count], epoch

    def _next(self) -> int:
        self.epoch, position = divmod(self._num_sampled, self.num_samples)
        self._num_sampled += 1
        return self._order_of(self.epoch)[position]

    def _order_of(self, epoch: int) -> list[int]:
        if self._order is None or self._order[0] != epoch:
            all_ranks = shuffled(self._keys, self.seed, f"epoch {epoch}")[: self.total_size]
            self._order = epoch, all_ranks[self.rank :: self.num_replicas]
        return self._order[1]

    def __len__(self) -> int:
        return self.num_samples

    def state_dict(self) -> dict[str, Any]:
        """The number of prompts sampled over all ranks: every rank loads the state of rank 0."""
        return {"drawn": self._num_sampled * self.num_replicas, "fingerprint": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from a saved state, on any number of ranks.

        Args:
            state_dict: Return value of `state_dict`.

        Raises:
            UserError: The state belongs to other prompts, another batch size or another seed.
        """
        if state_dict["fingerprint"] != self._fingerprint:
            raise UserError(
                "--ckpt_path: the checkpoint was made with other training data, another --data.batch_size or another "
                "--data.seed; resume with the same data options, or start a new run without --ckpt_path."
            )
        self._num_sampled = state_dict["drawn"] // self.num_replicas


class ResumableOrder:
    """Checkpoint state of a data module that orders its training rows with a `PromptSampler`."""

    _sampler: PromptSampler | None = None

    def state_dict(self) -> dict[str, Any]:
        """The position of training in the rows, for the checkpoint.

        Lightning saves the loader's state, too, but does not load it when a run resumes at the start of an epoch.
        """
        return {} if self._sampler is None else self._sampler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes at the checkpoint's row; stages other than fit start from the first row.

        Args:
            state_dict: Return value of `state_dict`.

        Raises:
            UserError: The checkpoint belongs to other rows, another batch size or another seed.
        """
        if self._sampler is not None:
            self._sampler.load_state_dict(state_dict)
