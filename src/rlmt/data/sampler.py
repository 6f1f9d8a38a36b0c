"""The order of prompts and the seeds of samples, as pure functions of the run's seed.

Both hash the prompt's own row number instead of drawing from a generator. So the order depends neither on the number of
ranks nor on the library version, and leaving out one prompt (too long under one format, short enough under another)
changes nothing for the rest: runs that differ in one setting see the same prompts in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, Protocol, cast

from torch.utils.data import DistributedSampler

from rlmt.errors import UserError


class KeyedRows(Protocol):
    """A data set whose rows have an identity apart from their position."""

    @property
    def keys(self) -> list[int]:
        """A distinct integer for each row."""

    def fingerprint(self) -> str:
        """A digest of all rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> Any: ...


def sample_seed(run_seed: int, epoch: int, prompt_index: int, sample: int) -> int:
    """The seed of one sample, whichever batch, rank or engine draws it.

    Args:
        run_seed: seed of the run.
        epoch: pass over the prompt set.
        prompt_index: the prompt's row number.
        sample: which of the prompt's samples, from 0.

    Returns:
        An integer in [0, 2**63).
    """
    return _stable_hash("sample", run_seed, epoch, prompt_index, sample)


def shuffled(keys: Sequence[int], seed: int, purpose: str) -> list[int]:
    """Positions 0..len(keys)-1 in an order that depends on seed, purpose and each key alone.

    Args:
        keys: a distinct integer for each item.
        seed: seed of the run.
        purpose: tells orders of one run apart, e.g. "split" or "epoch 3".

    Returns:
        A permutation; removing an item leaves the others in the same order.
    """
    return sorted(range(len(keys)), key=lambda position: _stable_hash(purpose, seed, keys[position]))


def _stable_hash(*parts: object) -> int:
    digest = blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class PromptSampler(DistributedSampler[int]):
    """Positions of this rank's training prompts: one pass after the other, each in a new order.

    What comes next depends on nothing but the number of prompts drawn so far, so a resumed run goes on exactly where it
    stopped, whether within a pass or between two. Lightning's own epoch number is not used: it skips one when a run
    with `max_steps` is resumed from a checkpoint written at the end of an epoch (lightning 2.6).

    Global batch k of a pass holds the same prompts on any number of ranks. The prompts left over after the last whole
    batch sit out that pass. It is a `DistributedSampler` so that Lightning puts none of its own in its place.

    Args:
        dataset: the training prompts.
        batch_size: prompts a step over all ranks; a multiple of `num_replicas`.
        num_replicas: number of ranks.
        rank: this rank.
        seed: seed of the run.

    Raises:
        UserError: `batch_size` is no multiple.
    """

    def __init__(self, dataset: KeyedRows, batch_size: int, num_replicas: int, rank: int, seed: int) -> None:
        if batch_size % num_replicas:
            raise UserError(
                f"--data.batch_size {batch_size} does not divide by {num_replicas} devices: make it a multiple"
            )
        super().__init__(
            cast(Any, dataset), num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed, drop_last=True
        )
        self._keys = dataset.keys
        self._fingerprint = f"{seed}/{batch_size}/{dataset.fingerprint()}"
        self.total_size = len(dataset) // batch_size * batch_size
        self.num_samples = self.total_size // num_replicas
        self._drawn = 0  # by this rank, over all passes
        self._order: tuple[int, list[int]] | None = None  # the pass it belongs to, this rank's positions

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: passes are counted by the prompts drawn.

        Args:
            epoch: Lightning's count.
        """

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.num_samples):
            yield self._next()

    def take(self, count: int) -> list[int]:
        """Draws this rank's next positions out of turn: iteration goes on behind them.

        Args:
            count: how many; a pass is never left within them if they are a whole batch.
        """
        return [self._next() for _ in range(count)]

    def peek(self, count: int) -> tuple[list[int], int]:
        """This rank's next positions without drawing them, and the number of their pass.

        Args:
            count: how many; a pass is never left within them if they are a whole batch.
        """
        epoch, position = divmod(self._drawn, self.num_samples)
        return self._order_of(epoch)[position : position + count], epoch

    def _next(self) -> int:
        self.epoch, position = divmod(self._drawn, self.num_samples)
        self._drawn += 1
        return self._order_of(self.epoch)[position]

    def _order_of(self, epoch: int) -> list[int]:
        if self._order is None or self._order[0] != epoch:
            everyone = shuffled(self._keys, self.seed, f"epoch {epoch}")[: self.total_size]
            self._order = epoch, everyone[self.rank :: self.num_replicas]
        return self._order[1]

    def __len__(self) -> int:
        return self.num_samples

    def state_dict(self) -> dict[str, Any]:
        """How many prompts were drawn, counted over all ranks: rank 0's state is loaded by every rank."""
        return {"drawn": self._drawn * self.num_replicas, "fingerprint": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved state, on any number of ranks.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            UserError: the state belongs to other prompts, another batch size or another seed.
        """
        if state_dict["fingerprint"] != self._fingerprint:
            raise UserError(
                "the checkpoint was made with other training data, another --data.batch_size or another --data.seed:"
                " resume with the same data options, or start afresh without --ckpt_path"
            )
        self._drawn = state_dict["drawn"] // self.num_replicas


class ResumableOrder:
    """What a data module that draws its training rows by a `PromptSampler` saves of it."""

    _sampler: PromptSampler | None = None

    def state_dict(self) -> dict[str, Any]:
        """Where training stands in the rows, for the checkpoint.

        Lightning saves the loader's state too, but does not load it when a run goes on at the start of an epoch.
        """
        return {} if self._sampler is None else self._sampler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the rows where a checkpoint stood; other stages than fit start from the first.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            UserError: the checkpoint belongs to other rows, another batch size or another seed.
        """
        if self._sampler is not None:
            self._sampler.load_state_dict(state_dict)
