"""Measures what a causal language model does to the products of its hidden states and its output projection.

Log-probs are computed from hidden states in chunks, without the model's own forward, so its function of the products
has to be known. Configs name it in many ways (`logit_scale`, `logits_scaling`, `final_logit_softcapping`, ...), and
the same name multiplies in one family and divides in another. So the model's own forward is run, with a decoder and a
projection that return given numbers. It reads no weights and therefore also works on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlmt.annotations import PreTrainedModel
from rlmt.errors import UserError, first_line

_SMALL, _LARGE = 2.0**-10, 2.0**20
"""Products at which a soft cap is the identity, and at which it is reached."""


def logits_function(model: PreTrainedModel) -> tuple[float, float | None]:
    """Measures the scale s and the soft cap c of a model's logits, c · tanh(s · product / c); c can be None.

    Args:
        model: Causal language model, on any device, sharded or not. The result is stored on it.

    Raises:
        UserError: The logits are another function of the decoder's hidden states, or the model reads others.
    """
    found: tuple[float, float | None] | None = getattr(model, "_logits_function", None)
    if found is None:
        found = _measure(model)
        model._logits_function = found  # type: ignore[assignment]
    return found


@torch.no_grad()
def _measure(model: Any) -> tuple[float, float | None]:
    projection: Any = model.get_output_embeddings()
    if not isinstance(projection, nn.Linear) or type(projection).forward is not nn.Linear.forward:
        raise _unsupported(model, f"its output projection is a {type(projection).__name__}")
    vocabulary, width = projection.weight.shape
    hidden = torch.arange(4 * width, dtype=torch.float32).view(1, 4, width) % 17 - 8  # exact in every dtype
    products = torch.linspace(-40, 40, 4 * vocabulary).view(1, 4, vocabulary)
    products[0, 0, 0], products[0, 0, -1] = _SMALL, _LARGE
    try:
        with torch.autocast("cpu", enabled=False), _returns(projection, products.clone()) as inputs:
            logits = _forward_from(model, hidden)
    except UserError:
        raise
    except Exception as error:  # any type, from the forward of any architecture
        raise _unsupported(
            model, f"its forward takes more than hidden states and a projection ({first_line(error)})"
        ) from error
    if len(inputs) != 1 or not torch.equal(inputs[0].float(), hidden):
        raise _unsupported(model, "its output projection does not read the decoder's last hidden states")
    if logits.shape != products.shape:
        raise _unsupported(model, f"it has {logits.shape[-1]} logits for {vocabulary} rows of the projection")
    scale, top = float(logits[0, 0, 0]) / _SMALL, float(logits[0, 0, -1])
    soft_cap = None if abs(top - scale * _LARGE) <= 1e-3 * abs(top) else top
    expected = scale * products
    if soft_cap is not None:
        expected = soft_cap * (expected / soft_cap).tanh()
    if not (scale > 0 and torch.allclose(logits, expected, rtol=1e-4, atol=1e-5 * scale)):
        raise _unsupported(model, "it changes its logits after the output projection other than by a scale or soft cap")
    return scale, soft_cap


def _forward_from(model: Any, hidden: Tensor) -> Tensor:
    """Logits of the model's own forward, whose decoder returns the given hidden states."""
    decoder: Any = model.get_decoder()
    with _returns(decoder, _DecoderOutput(hidden)) as calls:
        logits: Tensor = model.forward(input_ids=torch.zeros(1, hidden.shape[1], dtype=torch.long)).logits
    if len(calls) != 1:
        raise _unsupported(model, f"its forward does not call {type(decoder).__name__} once")
    return logits.float()


@contextmanager
def _returns(module: nn.Module, output: Any) -> Iterator[list[Any]]:
    """Makes a module return `output`; yields the list of its first positional arguments, None where it has none."""
    calls: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0] if args else None)
        return output

    own = module.__dict__.get("forward")  # a wrapper that another library has set on the instance
    module.forward = forward
    try:
        yield calls
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class _DecoderOutput:
    """Output of a decoder with hidden states only; all other fields are None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int | slice | str) -> Any:
        return () if isinstance(index, slice) else self.last_hidden_state if index in (0, "last_hidden_state") else None


def _unsupported(model: PreTrainedModel, reason: str) -> UserError:
    config = model.config
    return UserError(
        f"{config.name_or_path or type(model).__name__}: rlmt cannot compute log-probs of {config.model_type}, because "
        f"{reason.rstrip('.')}; use another family, such as Llama, Qwen or Gemma."
    )
