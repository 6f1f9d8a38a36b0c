"""Advantages and reward shaping as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from rlmt.distributed.collectives import all_gather_tensor

STD_EPSILON = 1e-6
"""Added to the group's standard deviation, as in the authors' code."""


def group_advantages(rewards: Tensor, group: Tensor, normalize_std: bool) -> Tensor:
    """Computes the advantage of each sample relative to its group.

    The formula is that of GRPO (arXiv 2402.03300, eq. 21) and RLMT (arXiv 2509.20357).

    A_i = r_i - mean(r), divided by std(r) + 1e-6 if `normalize_std`, with the unbiased standard deviation. A group of
    equal rewards has advantage exactly 0: dividing its rounding error by 1e-6 would turn noise into a signal.

    Args:
        rewards: [B] float rewards.
        group: [B] int64 group of each sample, 0..P-1; groups can be interleaved and differ in size.
        normalize_std: Whether to divide by the group's standard deviation; each group then needs two samples or more.

    Returns:
        [B] float32 advantages.
    """
    r = rewards.double()
    groups = int(group.max()) + 1 if len(group) else 0  # a rank without samples has no groups
    size = torch.zeros(groups, dtype=torch.float64, device=r.device).index_add_(0, group, torch.ones_like(r))
    mean = torch.zeros_like(size).index_add_(0, group, r) / size
    centred = r - mean[group]
    low = torch.full_like(size, float("inf")).scatter_reduce_(0, group, r, "amin")
    high = torch.full_like(size, -float("inf")).scatter_reduce_(0, group, r, "amax")
    advantages = centred
    if normalize_std:
        variance = torch.zeros_like(size).index_add_(0, group, centred.square()) / (size - 1)
        advantages = centred / (variance.sqrt() + STD_EPSILON)[group]
    return torch.where((low == high)[group], 0.0, advantages).float()


def leave_one_out_advantages(rewards: Tensor, group: Tensor) -> Tensor:
    """Computes the advantage of each sample relative to the mean of the rest of its group (RLOO, arXiv 2402.14740).

    A_i = r_i - (Σ_j r_j - r_i) / (n - 1) = n / (n - 1) · (r_i - mean(r)).

    Args:
        rewards: [B] float rewards.
        group: [B] int64 group of each sample; each group needs two samples or more.

    Returns:
        [B] float32 advantages, exactly 0 in a group of equal rewards.
    """
    size = torch.bincount(group)
    return group_advantages(rewards, group, False) * (size / (size - 1))[group]


def overlong_penalty(lengths: Tensor, max_new_tokens: int, buffer: float) -> Tensor:
    """Computes a soft penalty on overlong completions, from 0 to -1 (DAPO, arXiv 2503.14476, eq. 13).

    With b = buffer · max_new_tokens, the penalty is 0 up to max_new_tokens - b tokens, then falls linearly to -1 at
    max_new_tokens.

    Args:
        lengths: [B] completion lengths in tokens, thoughts included.
        max_new_tokens: Maximum completion length in tokens.
        buffer: Fraction of the maximum length, in (0, 1].

    Returns:
        [B] float32.
    """
    room = buffer * max_new_tokens
    return ((max_new_tokens - room - lengths.float()) / room).clamp(-1, 0)


def sum_by_sample(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums a value over the tokens of each sample: [T] to [B] float32."""
    sample = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    return torch.zeros_like(lengths, dtype=torch.float64).index_add_(0, sample, values.double()).float()


def sum_before(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums a value over the earlier tokens of the same sample: [T] to [T] float32, 0 at each sample's first token."""
    before = values.double().cumsum(0) - values
    starts = lengths.cumsum(0) - lengths
    return (before - before[starts].repeat_interleave(lengths)).float()


def rewards_on_last_tokens(scores: Tensor, lengths: Tensor) -> Tensor:
    """Puts each sample's score on its last token, and 0 on all others.

    Args:
        scores: [B] float scores.
        lengths: [B] int64 completion lengths in tokens, at least 1.

    Returns:
        [T] float32 rewards, sample after sample.
    """
    rewards = torch.zeros(int(lengths.sum()), dtype=torch.float32, device=scores.device)
    rewards[lengths.cumsum(0) - 1] = scores.float()
    return rewards


def generalized_advantages(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Computes generalized advantage estimates of ragged samples (GAE, arXiv 1506.02438, eq. 16).

    δ_t = r_t + γ·V_{t+1} - V_t;  A_t = δ_t + γλ·A_{t+1};  return_t = A_t + V_t. After a sample's last token both V and
    A are 0: every sample counts as ended there, even a truncated one, as in the authors' code.

    Args:
        rewards: [T] float rewards, sample after sample.
        values: [T] float values of the states in which the tokens were sampled.
        lengths: [B] int64 completion lengths in tokens.
        gamma: Discount factor per token.
        lam: Lambda of GAE: 0 bootstraps from the next value, 1 sums all rewards.

    Returns:
        [T] float32 advantages and [T] float32 returns.
    """
    width = int(lengths.max())
    real = torch.arange(width, device=lengths.device) < lengths[:, None]

    def padded(flat: Tensor) -> Tensor:
        return torch.zeros(real.shape, dtype=torch.float64, device=flat.device).masked_scatter_(real, flat.double())

    # After a sample's end, rewards, values and so advantages are 0: padding needs no mask.
    value = padded(values)
    following = torch.nn.functional.pad(value[:, 1:], (0, 1))
    advantages = padded(rewards) + gamma * following - value
    for t in reversed(range(width - 1)):
        advantages[:, t] += gamma * lam * advantages[:, t + 1]
    return advantages[real].float(), (advantages + value)[real].float()


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """Scales advantages to mean 0 and standard deviation 1 over the unmasked tokens of all ranks.

    Equal advantages become exactly 0, as in a group of equal rewards. This is a collective operation.

    Args:
        advantages: [T] float advantages.
        mask: [T] bool, True for tokens in the statistics; the others are shifted and scaled with them.

    Returns:
        [T] float32.
    """
    counted = all_gather_tensor(advantages[mask].double())
    if not counted.numel() or counted.min() == counted.max():
        return torch.zeros_like(advantages)
    return ((advantages - counted.mean()) / (counted.std() + STD_EPSILON)).float()


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Computes the critic's explained variance over all ranks: 1 - Var(returns - values) / Var(returns).

    It is 1 for a perfect critic, 0 for one that predicts the mean, and negative for a worse one. This is a collective
    operation.

    Args:
        values: [n] float values before the update.
        returns: [n] float returns.

    Returns:
        The explained variance; NaN if all returns are equal.
    """
    values, returns = all_gather_tensor(values), all_gather_tensor(returns).double()
    if not returns.numel() or returns.min() == returns.max():
        return float("nan")
    return float(1 - (returns - values).var() / returns.var())
