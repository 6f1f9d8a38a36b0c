"""The random states of a process as plain data, so that a checkpoint can hold them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from rlmt.distributed.collectives import rank


def random_states() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, as tensors, numbers, strings and lists."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(everyone: list[dict[str, Any]]) -> None:
    """Undoes `random_states`; states of GPUs are taken up by as many as there are.

    Args:
        everyone: states of each rank, since ranks draw apart: dropout takes as many numbers as a rank has tokens. Where
            there are more ranks now, several go on from the same one.
    """
    states = everyone[rank() % len(everyone)]
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state.cpu(), device)
