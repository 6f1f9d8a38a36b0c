"""The order of prompts and the seeds of samples, as pure functions of the run's seed.

Both hash the prompt's own row number instead of drawing from a generator. So the order depends neither on the number of
ranks nor on the library version, and leaving out one prompt (too long under one format, short enough under another)
changes nothing for the rest: runs that differ in one setting see the same prompts in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

from torch.utils.data import DistributedSampler

from rlmt.data.prompts import PromptDataset
from rlmt.errors import UserError


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
    """Positions of this rank's training prompts, reshuffled every epoch, resumable within one.

    Global batch k of an epoch holds the same prompts on any number of ranks. The prompts left over after the last whole
    batch sit out that epoch. It is a `DistributedSampler` so that Lightning leaves it as it is and sets the epoch.

    Args:
        dataset: the training prompts.
        batch_size: prompts a step over all ranks; a multiple of `num_replicas`.
        num_replicas: number of ranks.
        rank: this rank.
        seed: seed of the run.
    """

    def __init__(self, dataset: PromptDataset, batch_size: int, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed, drop_last=True)
        self._keys = dataset.keys
        self._fingerprint = f"{seed}:{dataset.fingerprint()}"
        self.total_size = len(dataset) // batch_size * batch_size
        self.num_samples = self.total_size // num_replicas
        self._position = 0  # prompts given out by this rank in this epoch
        self._resume_at = 0  # where the next iteration starts

    def set_epoch(self, epoch: int) -> None:
        """Moves to an epoch; a position in another epoch is forgotten, so no epoch starts half-way or is empty."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._position = self._resume_at = 0

    def __iter__(self) -> Iterator[int]:
        # A generator, so that the epoch is read at the first prompt: Lightning makes the iterator before it sets it.
        order = shuffled(self._keys, self.seed, f"epoch {self.epoch}")[: self.total_size]
        mine = order[self.rank :: self.num_replicas]
        start, self._resume_at = self._resume_at, 0
        for position in range(start, len(mine)):
            self._position = position + 1
            yield mine[position]

    def __len__(self) -> int:
        return self.num_samples

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands, counted over all ranks (rank 0's state is loaded by every rank)."""
        return {
            "epoch": self.epoch,
            "position": self._position * self.num_replicas,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to where a saved epoch stood.

        Raises:
            UserError: the state belongs to other prompts or another seed.
        """
        if state_dict["fingerprint"] != self._fingerprint:
            raise UserError(
                "the checkpoint was made with other training prompts or another --data.seed: resume with the same data "
                "options, or start afresh without --ckpt_path"
            )
        self.epoch = state_dict["epoch"]
        self._position = self._resume_at = state_dict["position"] // self.num_replicas
