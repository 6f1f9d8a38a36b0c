"""The records of a memory budget: lines in bytes per phase, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

GIB = 2**30
Phase = Literal["rollout", "reward", "update"]
PHASES: tuple[Phase, ...] = ("rollout", "reward", "update")


@dataclass(frozen=True)
class BudgetLine:
    """One line of the budget, in bytes per phase."""

    name: str
    rollout: int = 0
    reward: int = 0
    update: int = 0

    @classmethod
    def all_phases(cls, name: str, size: int) -> BudgetLine:
        """A line with the same size in all phases."""
        return cls(name, size, size, size)


@dataclass(frozen=True)
class VLLMShare:
    """vLLM's part of the memory: `gpu_memory_utilization` grants it weights, overhead and, with the rest, the cache."""

    granted: float
    """The option's value."""
    fixed: int
    """Bytes of weights and overhead."""
    cache: int
    """Bytes of the cache."""
    sample: int
    """Bytes of the cache for one sample of the maximum length."""
    phases: tuple[Phase, ...]
    """Phases in which it holds weights and cache."""


@dataclass
class Budget:
    """Memory of a run on one device."""

    memory: int
    """Memory of the device in bytes."""
    lines: list[BudgetLine] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Reasons why the run cannot start even if the totals fit."""
    vllm: VLLMShare | None = None
    """vLLM's part; None for other engines."""
    phases: tuple[Phase, ...] = PHASES
    """Phases of a step."""

    def total(self, phase: Phase) -> int:
        """Bytes of a phase."""
        return sum(getattr(line, phase) for line in self.lines)

    @property
    def peak(self) -> Phase:
        """The phase with the largest total."""
        return max(self.phases, key=self.total)

    @property
    def fits(self) -> bool:
        """Whether every phase fits and there are no problems."""
        return not self.problems and self.total(self.peak) <= self.memory

    def fits_on(self, memory: int) -> bool:
        """Whether the run fits on a device of another size, with the `gpu_memory_utilization` that suits it."""
        needed = 0 if self.vllm is None else self.vllm.fixed + self.vllm.sample
        phases = () if self.vllm is None else self.vllm.phases
        return all(self.trainer(phase) + (needed if phase in phases else 0) <= memory for phase in PHASES)

    def trainer(self, phase: Phase) -> int:
        """Bytes of a phase without those that `gpu_memory_utilization` grants to vLLM."""
        awake = self.vllm is not None and phase in self.vllm.phases
        return self.total(phase) - (self.vllm.fixed + self.vllm.cache if awake and self.vllm is not None else 0)

    def peak_with(self, share: float) -> int:
        """Bytes of the largest phase with another `gpu_memory_utilization`."""
        phases = () if self.vllm is None else self.vllm.phases
        return max(self.trainer(phase) + round(share * self.memory if phase in phases else 0) for phase in PHASES)

    def vllm_limits(self) -> tuple[float, float]:
        """Least and greatest `gpu_memory_utilization`: one sample fits into the cache, and the run on the device.

        No value fits if the first exceeds the second.
        """
        assert self.vllm is not None
        least = math.ceil(100 * (self.vllm.fixed + self.vllm.sample) / self.memory) / 100
        beside = max(self.trainer(phase) for phase in self.vllm.phases)
        return least, math.floor(100 * (self.memory - beside) / self.memory) / 100
