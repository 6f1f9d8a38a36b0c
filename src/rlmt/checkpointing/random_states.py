"""Random states of a process as plain data for checkpoints."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from rlmt.distributed.collectives import rank


def random_states() -> dict[str, Any]:
    """Copies the states of Python's, NumPy's and torch's generators as tensors, numbers, strings and lists."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(ranks: list[dict[str, Any]]) -> None:
    """Restores states from `random_states`; those of missing GPUs are ignored.

    Args:
        ranks: States of each rank. They differ, because dropout uses as many random numbers as a rank has tokens. If
            there are more ranks now, several restore the same states.
    """
    states = ranks[rank() % len(ranks)]
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state.cpu(), device)
