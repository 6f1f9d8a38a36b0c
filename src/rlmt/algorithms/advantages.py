"""Advantages from rewards, and how rewards are shaped: pure functions, one a name."""

from __future__ import annotations

import torch
from torch import Tensor

from rlmt.distributed.collectives import all_gather_tensor

STD_EPSILON = 1e-6
"""Added to the group's standard deviation, as in the authors' code."""


def group_advantages(rewards: Tensor, group: Tensor, normalize_std: bool) -> Tensor:
    """Advantage of each sample against its own group (GRPO, arXiv 2402.03300, eq. 21; RLMT, arXiv 2509.20357).

    A_i = r_i - mean(r), divided by std(r) + 1e-6 when `normalize_std`; the standard deviation is the unbiased one. A
    group whose rewards are all equal has advantage exactly 0: dividing its rounding error by 1e-6 would make noise a
    signal.

    Args:
        rewards: [B] float.
        group: [B] int64, which group each sample belongs to, 0..P-1; groups need not be adjacent or of one size.
        normalize_std: whether to divide by the group's standard deviation; groups must then have two samples or more.

    Returns:
        [B] float32 advantages.
    """
    r = rewards.double()
    groups = int(group.max()) + 1 if len(group) else 0  # none on a rank whose prompts teach nothing
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
    """Advantage of each sample against the mean of the others of its group (RLOO, arXiv 2402.14740).

    A_i = r_i - (Σ_j r_j - r_i) / (n - 1) = n / (n - 1) · (r_i - mean(r)).

    Args:
        rewards: [B] float.
        group: [B] int64, which group each sample belongs to; groups have two samples or more.

    Returns:
        [B] float32 advantages, exactly 0 in a group of equal rewards.
    """
    size = torch.bincount(group)
    return group_advantages(rewards, group, False) * (size / (size - 1))[group]


def overlong_penalty(lengths: Tensor, max_new_tokens: int, buffer: float) -> Tensor:
    """Soft penalty on overlong completions (DAPO, arXiv 2503.14476, eq. 13), 0 to -1.

    With b = buffer · max_new_tokens: 0 up to max_new_tokens - b tokens, then falling in a straight line to -1 at
    max_new_tokens.

    Args:
        lengths: [B] completion lengths in tokens, thoughts included.
        max_new_tokens: completion length limit.
        buffer: share of the limit, in (0, 1].

    Returns:
        [B] float32.
    """
    room = buffer * max_new_tokens
    return ((max_new_tokens - room - lengths.float()) / room).clamp(-1, 0)


def sum_by_sample(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums over each sample's tokens: [T] to [B] float32."""
    sample = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    return torch.zeros_like(lengths, dtype=torch.float64).index_add_(0, sample, values.double()).float()


def sum_before(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum over the earlier tokens of the same sample: [T] to [T] float32, 0 at each sample's first token."""
    before = values.double().cumsum(0) - values
    starts = lengths.cumsum(0) - lengths
    return (before - before[starts].repeat_interleave(lengths)).float()


def rewards_on_last_tokens(scores: Tensor, lengths: Tensor) -> Tensor:
    """Each sample's score on its last token, where its end is known, and 0 on all others.

    Args:
        scores: [B] float.
        lengths: [B] int64 completion lengths in tokens, 1 or more each.

    Returns:
        [T] float32 rewards, samples end to end.
    """
    rewards = torch.zeros(int(lengths.sum()), dtype=torch.float32, device=scores.device)
    rewards[lengths.cumsum(0) - 1] = scores.float()
    return rewards


def generalized_advantages(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16) over ragged samples.

    δ_t = r_t + γ·V_{t+1} - V_t;  A_t = δ_t + γλ·A_{t+1};  return_t = A_t + V_t. After a sample's last token both V and
    A are 0: every sample is taken to have ended there, one cut at the length limit, too, as in the authors' code.

    Args:
        rewards: [T] float, samples end to end.
        values: [T] float, of the state in which each token was sampled.
        lengths: [B] int64.
        gamma: discount of a token.
        lam: 0 trusts the values (one step), 1 the rewards (all steps).

    Returns:
        [T] float32 advantages, and [T] float32 returns.
    """
    width = int(lengths.max())
    real = torch.arange(width, device=lengths.device) < lengths[:, None]

    def padded(flat: Tensor) -> Tensor:
        return torch.zeros(real.shape, dtype=torch.float64, device=flat.device).masked_scatter_(real, flat.double())

    # Behind a sample's end rewards, values and so advantages are 0: padding needs no mask.
    value = padded(values)
    following = torch.nn.functional.pad(value[:, 1:], (0, 1))
    advantages = padded(rewards) + gamma * following - value
    for t in reversed(range(width - 1)):
        advantages[:, t] += gamma * lam * advantages[:, t + 1]
    return advantages[real].float(), (advantages + value)[real].float()


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages with mean 0 and standard deviation 1 over the tokens that take part in the loss, those of all ranks.

    Equal advantages become exactly 0, as in a group of equal rewards.

    Args:
        advantages: [T] float.
        mask: [T] bool, the tokens that count; others are shifted and scaled with them.

    Returns:
        [T] float32.
    """
    counted = all_gather_tensor(advantages[mask].double())
    if not counted.numel() or counted.min() == counted.max():
        return torch.zeros_like(advantages)
    return ((advantages - counted.mean()) / (counted.std() + STD_EPSILON)).float()


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """How much of the returns' variance, over all ranks, the critic knew: 1 - Var(returns - values) / Var(returns).

    1 is a perfect critic, 0 one that knows the mean at best, below 0 one that misleads.

    Args:
        values: [n] float, before the update.
        returns: [n] float.

    Returns:
        The share, NaN where the returns do not vary.
    """
    values, returns = all_gather_tensor(values), all_gather_tensor(returns).double()
    if not returns.numel() or returns.min() == returns.max():
        return float("nan")
    return float(1 - (returns - values).var() / returns.var())
