"""Advantages from rewards: pure functions, one a name."""

from __future__ import annotations

import torch
from torch import Tensor

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
    groups = int(group.max()) + 1
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
