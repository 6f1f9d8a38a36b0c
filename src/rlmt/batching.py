"""Batches of like length under a token budget: one planner for the policy, the reward model and whatever else pads."""

from __future__ import annotations

from collections.abc import Sequence


def batches_by_length(lengths: Sequence[int], budget: int, rows: int = 1) -> list[list[int]]:
    """Groups rows of like length so that each group, padded to its longest, holds at most `budget` tokens.

    Longest first, so that a budget too large for the memory shows at once. A row longer than the budget goes alone.

    Args:
        lengths: tokens of each row.
        budget: tokens a group, padding included.
        rows: rows that each length stands for: they stay together, padded to that length.

    Returns:
        Lists of row numbers; each row is in exactly one.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for i in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) * rows <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
