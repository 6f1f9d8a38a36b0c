"""Pairs from rewards: of each prompt's samples the best and the worst. Pure functions."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """The pairs of one rollout batch, and why prompts have none; each prompt counts once."""

    pairs: Tensor
    """[N, 2] int64 chosen and rejected sample, in the order of the prompts."""
    malformed: int
    """Prompts with too few well-formed samples."""
    margin: int
    """Prompts whose best and worst rewards are equal or too close."""
    length: int
    """Prompts whose best or worst sample is too long."""


def best_and_worst(
    rewards: Tensor,
    valid: Sequence[bool],
    group: Tensor,
    tokens: Tensor,
    ties: Sequence[int],
    min_valid: int,
    min_margin: float,
    max_tokens: int | None,
) -> Pairs:
    """The best and the worst well-formed sample of each prompt (RLMT, arXiv 2509.20357).

    Malformed samples are never in a pair: their rewards are made up. A truncated sample is, if it is well formed, as in
    the authors' code: its response was scored as it stands. A pair with a sample that is too long is dropped and not
    replaced by the next best one.

    Args:
        rewards: [B] float.
        valid: B flags, whether the sample is well formed.
        group: [B] int64, which prompt each sample belongs to, 0..P-1; samples of a prompt need not be adjacent.
        tokens: [B] int64, prompt and completion together.
        ties: B numbers; of equally good samples the one with the highest is the best, and with the lowest the worst.
        min_valid: prompts with fewer well-formed samples are skipped; at least 2.
        min_margin: prompts whose rewards are closer are skipped; equal ones always are, since none is preferred.
        max_tokens: longest sample, or None.

    Returns:
        The pairs, on the device of `group`.
    """
    scores, sizes = rewards.tolist(), tokens.tolist()
    members: list[list[int]] = [[] for _ in range(int(group.max()) + 1)]
    for sample, prompt in enumerate(group.tolist()):
        if valid[sample]:
            members[prompt].append(sample)
    pairs: list[list[int]] = []
    malformed = margin = length = 0
    for samples in members:
        if len(samples) < min_valid:
            malformed += 1
            continue
        ranked = sorted(samples, key=lambda i: (scores[i], ties[i]))
        best, worst = ranked[-1], ranked[0]
        gap = scores[best] - scores[worst]
        if gap == 0 or gap < min_margin:
            margin += 1
        elif max_tokens is not None and max(sizes[best], sizes[worst]) > max_tokens:
            length += 1
        else:
            pairs.append([best, worst])
    found = torch.tensor(pairs, dtype=torch.long, device=group.device).view(-1, 2)
    return Pairs(found, malformed, margin, length)


def tie_key(seed: int, prompt_index: int, completion_ids: Sequence[int]) -> int:
    """What tells samples of equal reward apart: a hash, the same in whichever batch, order or epoch the sample comes.

    Args:
        seed: another seed, another choice.
        prompt_index: the prompt's row number.
        completion_ids: the sample's tokens.

    Returns:
        An integer in [0, 2**64).
    """
    parts = f"pair/{seed}/{prompt_index}/".encode() + array("q", completion_ids).tobytes()
    return int.from_bytes(blake2b(parts, digest_size=8).digest(), "big")
