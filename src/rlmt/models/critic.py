"""The critic of PPO: a value for each state in which a token is sampled."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlmt.models.micro_batch import MicroBatch, hidden_states


class Critic(nn.Module):
    """A value head on a backbone of its own.

    Args:
        backbone: a causal language model, whose output projection is not used.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(cast(Any, backbone.config).get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def own_parameters(self) -> list[nn.Parameter]:
        """What is trained of it."""
        return [p for p in self.parameters() if p.requires_grad]

    def forward(self, batch: MicroBatch) -> Tensor:
        """Values of the states in which the micro-batch's completion tokens were sampled: [t] float32."""
        hidden = hidden_states(cast(Any, self.backbone).get_decoder(), batch)
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.head(hidden.float())
        return values.squeeze(1)
