"""Random states are restored from a checkpoint file that is loaded as plain data."""

import random
from pathlib import Path

import numpy as np
import torch

from rlmt.checkpointing.random_states import random_states, restore_random_states


def draw() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(np.random.rand()), float(torch.rand(1))


def test_restored_states_repeat_the_random_numbers(tmp_path: Path) -> None:
    random.gauss(0, 1)  # caches a second number
    np.random.standard_normal()
    torch.save([random_states()], tmp_path / "states.pt")
    first = [draw() for _ in range(3)]
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert [draw() for _ in range(3)] == first
