"""Optimizers that torch has only in parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from rlmt.errors import UserError
from rlmt.ranges import NonNegativeFloat, NonNegativeInt, check_ranges

_IN_LAYER = re.compile(r"\.\d+\.")
"""In the name of a parameter of a numbered layer, such as model.layers.0.mlp.up_proj.weight."""


class MuonAdamW(Optimizer):
    """Muon for the matrices of the layers, AdamW for embeddings, norms, biases and heads; for training from scratch.

    One optimizer of two parts, since a step of the trainer is a step of one optimizer. A scheduler scales both rates.

    Args:
        params: parameter groups with names, as `rlmt.modules.SFT` and `RewardModeling` give them; a group's own options
            are not read.
        lr: AdamW's learning rate.
        muon_lr: Muon's learning rate.
        betas: AdamW's.
        momentum: Muon's.
        ns_steps: Newton-Schulz steps of Muon.
        weight_decay: of both.

    Raises:
        UserError: the parameters have no names, or there is no matrix in a layer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: NonNegativeFloat = 3e-3,
        muon_lr: NonNegativeFloat = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: NonNegativeFloat = 0.95,
        ns_steps: NonNegativeInt = 5,
        weight_decay: NonNegativeFloat = 0.01,
    ) -> None:
        check_ranges(MuonAdamW, locals())
        super().__init__(params, {"lr": lr})
        if not all("param_names" in group for group in self.param_groups):
            raise UserError(
                "--model.optimizer MuonAdamW needs the names of parameters: use it with SFT or RewardModeling"
            )
        named = [
            pair for group in self.param_groups for pair in zip(group["param_names"], group["params"], strict=True)
        ]
        matrices = [(name, p) for name, p in named if p.ndim == 2 and _IN_LAYER.search(name)]
        rest = [(name, p) for name, p in named if not (p.ndim == 2 and _IN_LAYER.search(name))]
        if not matrices or not rest:
            raise UserError("--model.optimizer MuonAdamW finds no matrices in layers, or nothing else: use AdamW")
        self._parts: tuple[Optimizer, ...] = (
            Muon(matrices, lr=muon_lr, weight_decay=weight_decay, momentum=momentum, ns_steps=ns_steps),
            AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay),
        )
        self._share()

    def _share(self) -> None:
        """Shows the parts' groups and state as its own: the same objects, so that schedulers act on the parts."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self.state.clear()
        for part in self._parts:
            self.state.update(part.state)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps both parts."""
        loss: Tensor | None = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """That of one optimizer with the groups of both parts, so that weights in shards can be had."""
        self._share()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undoes `state_dict`."""
        groups = iter(state_dict["param_groups"])
        for part in self._parts:
            own = [next(groups) for _ in part.param_groups]
            numbers = {number for group in own for number in group["params"]}
            held = {number: state for number, state in state_dict["state"].items() if number in numbers}
            part.load_state_dict({"state": held, "param_groups": own})
        self._share()
