"""What vLLM leaves undone in a reload of weights, without vLLM itself; `test_engine.py` reloads for real."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rlmt.engines.vllm.reload import _complete_load, _forget_packed_experts, check_model
from rlmt.errors import UserError


def test_policy_that_vllm_cannot_run_is_one_line() -> None:
    """Phi's head has a bias in transformers, and vLLM builds the family without one."""
    with (
        pytest.raises(UserError, match="cannot run this policy: AttributeError: no 'bias'; use --data.engine"),
        _complete_load(first=True),
    ):
        raise AttributeError("no 'bias'")


def test_model_that_vllm_implements_otherwise_is_refused() -> None:
    def policy(bias: bool) -> Any:
        head = nn.Linear(1, 1, bias=bias)
        return SimpleNamespace(config=SimpleNamespace(model_type="phi"), get_output_embeddings=lambda: head)

    model = nn.Module()
    model.lm_head = nn.Linear(1, 1, bias=False)
    llm: Any = SimpleNamespace(apply_model=lambda function: [function(model)])
    check_model(llm, policy(bias=False))
    with pytest.raises(UserError, match="vLLM's phi has no bias in its output head"):
        check_model(llm, policy(bias=True))
    model.lm_head = nn.Linear(1, 1)
    check_model(llm, policy(bias=True))

    backend = type("TransformersForCausalLM", (nn.Module,), {"__module__": "vllm.model_executor.models.transformers"})
    llm.apply_model = lambda function: [function(backend())]
    with pytest.raises(UserError, match="vLLM runs phi through transformers' classes"):
        check_model(llm, policy(bias=False))


@pytest.mark.parametrize(("first", "error"), [(False, ValueError), (True, torch.OutOfMemoryError)])
def test_other_failures_keep_their_type(first: bool, error: type[Exception]) -> None:
    with pytest.raises(error), _complete_load(first):
        raise error


def test_weights_that_vllm_skips_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="did not load all weights: 2 weights not loaded"), _complete_load(True):
        logging.getLogger("vllm.model_executor.model_loader.reload.inplace").warning("2 weights not loaded")
    with _complete_load(True):
        pass


def test_experts_are_packed_again_at_each_reload() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    methods = [SimpleNamespace(moe_kernel="packed"), SimpleNamespace()]
    model[0].quant_method, model[1].quant_method = methods
    _forget_packed_experts(model)
    assert methods == [SimpleNamespace(moe_kernel=None), SimpleNamespace()]
