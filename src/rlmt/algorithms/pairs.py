"""Preference pairs from rewards, as pure functions: the best and the worst sample of each prompt."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """The pairs of one rollout batch, and the number of prompts without one by reason; each prompt counts once."""

    pairs: Tensor
    """[N, 2] int64 indices of the chosen and the rejected sample, in the order of the prompts."""
    malformed: int
    """Number of prompts with too few well-formed samples."""
    margin: int
    """Number of prompts whose best and worst rewards are equal or too close."""
    length: int
    """Number of prompts whose best or worst sample is too long."""


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
    """Pairs the best and the worst well-formed sample of each prompt (RLMT, arXiv 2509.20357).

    Malformed samples are never in a pair: their rewards are not from the reward model. A truncated sample can be, if it
    is well formed, as in the authors' code: the reward model scored its truncated response. A pair with a sample that
    is too long is dropped, not replaced by the next best one.

    Args:
        rewards: [B] float rewards.
        valid: B flags, True for a well-formed sample.
        group: [B] int64 prompt of each sample, 0..P-1; samples of a prompt can be interleaved with others.
        tokens: [B] int64 length of prompt and completion together, in tokens.
        ties: B tie-breakers; among samples of equal reward the highest is the best, and the lowest the worst.
        min_valid: Minimum number of well-formed samples, at least 2; prompts with fewer are skipped.
        min_margin: Minimum difference of rewards; prompts with less are skipped, as are those with equal rewards.
        max_tokens: Maximum length of a sample in tokens; None for no limit.

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
    """Computes a tie-breaker for samples of equal reward: a hash that does not depend on batch, order or epoch.

    Args:
        seed: Seed of the hash.
        prompt_index: Row number of the prompt.
        completion_ids: Token ids of the sample.

    Returns:
        An integer in [0, 2**64).
    """
    parts = f"pair/{seed}/{prompt_index}/".encode() + array("q", completion_ids).tobytes()
    return int.from_bytes(blake2b(parts, digest_size=8).digest(), "big")
