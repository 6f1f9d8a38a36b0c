"""MuonAdamW is torch's two optimizers, each on its own parameters."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rlmt.errors import UserError
from rlmt.modules.optimizers import MuonAdamW, ProductsInFloat32


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        return self.head(hidden)


def step(net: Net, *optimizers: torch.optim.Optimizer) -> None:
    net.zero_grad()
    nn.functional.cross_entropy(net(torch.arange(7)), torch.arange(7)).backward()
    for optimizer in optimizers:
        optimizer.step()


def named(net: Net) -> list[dict[str, object]]:
    return [{"params": list(net.named_parameters())}]


def test_steps_are_those_of_muon_and_adamw_and_survive_a_checkpoint() -> None:
    torch.manual_seed(0)
    net = Net()
    twin = copy.deepcopy(net)
    both = MuonAdamW(named(net), lr=0.01, muon_lr=0.02, weight_decay=0.1)
    schedule = LambdaLR(both, lambda k: 1 / (k + 1))
    matrices = [layer.weight for layer in twin.layers]
    rest = [p for p in twin.parameters() if not any(p is m for m in matrices)]
    parts = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
    ]
    schedules = [LambdaLR(part, lambda k: 1 / (k + 1)) for part in parts]
    for k in range(6):
        if k == 3:  # goes on from a file
            saved = copy.deepcopy(both.state_dict())
            both = MuonAdamW(named(net), lr=0.5, muon_lr=0.5)
            both.load_state_dict(saved)
            state, schedule = schedule.state_dict(), LambdaLR(both, lambda k: 1 / (k + 1))
            schedule.load_state_dict(state)
            for group, rate in zip(both.param_groups, schedule._last_lr, strict=True):
                group["lr"] = rate
        step(net, both)
        schedule.step()
        step(twin, *parts)
        for other in schedules:
            other.step()
    for found, wanted in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)  # the order of sums in bfloat16 differs


def test_bfloat16_products_are_float32_products_rounded() -> None:
    torch.manual_seed(0)
    a, b, c = (torch.randn(33, 33).bfloat16() for _ in range(3))
    with ProductsInFloat32():
        product, sum_ = a @ b, torch.addmm(c, a, b, beta=0.5, alpha=2)
        exact = a.float() @ b.float()
    assert product.dtype is sum_.dtype is torch.bfloat16
    assert torch.equal(product, (a.float() @ b.float()).bfloat16())
    assert torch.equal(sum_, (0.5 * c.float() + 2 * (a.float() @ b.float())).bfloat16())
    assert exact.dtype is torch.float32
    torch.testing.assert_close(product, a @ b, rtol=1e-2, atol=1e-2)


def test_it_needs_names_and_matrices() -> None:
    with pytest.raises(UserError, match="requires named parameters"):
        MuonAdamW(Net().parameters())
    with pytest.raises(UserError, match="finds only matrices in layers, or none"):
        MuonAdamW(nn.Linear(2, 2).named_parameters())
