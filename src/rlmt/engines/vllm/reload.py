"""Reloads of the policy's weights into a running vLLM: what it leaves undone in one, or reports in its log alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlmt.annotations import PreTrainedModel
from rlmt.engines.vllm.isolation import preserve_process_state
from rlmt.engines.vllm.sampling import sampling_params
from rlmt.errors import UserError, first_line
from rlmt.types import Sampling


def reload_weights(llm: Any, weights: Iterable[tuple[str, Tensor]], on_gpu: bool, first: bool) -> None:
    """Loads weights in place; vLLM drops its adapters.

    The first time a token is sampled, too: not every family that vLLM builds and loads can be run.

    Args:
        llm: The `vllm.LLM`.
        weights: Names and tensors of a checkpoint.
        on_gpu: Whether it runs on a GPU.
        first: Whether no reload was complete before.

    Raises:
        UserError: vLLM cannot run the policy, as where its model of a family lacks a part of transformers'.
        RuntimeError: vLLM did not load all weights.
    """
    with preserve_process_state(), _complete_load(first):
        if not on_gpu:
            llm.apply_model(_forget_packed_experts)
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if first:
            token = sampling_params(Sampling(temperature=1.0, max_new_tokens=1), seed=0, room=1)
            llm.generate({"prompt_token_ids": [0]}, token, use_tqdm=False)


def check_model(llm: Any, policy: PreTrainedModel) -> None:
    """Checks how vLLM implements the policy's family.

    Args:
        llm: The `vllm.LLM`.
        policy: The trainer's policy.

    Raises:
        UserError: vLLM's model is made of transformers' classes, or has no bias in its output head as the policy has;
            it would ignore that weight.
    """
    if not all(llm.apply_model(_is_of_vllm)):
        raise UserError(
            f"vLLM runs {policy.config.model_type} through transformers' classes, which it changes in this process, so "
            "the trainer could not use them. Use --data.engine TransformersEngine or VLLMServerEngine."
        )
    has_bias = policy.get_output_embeddings().bias is not None  # type: ignore[no-untyped-call]
    if has_bias and not all(llm.apply_model(_has_head_bias)):
        raise UserError(
            f"vLLM's {policy.config.model_type} has no bias in its output head, and the policy has one. Use "
            "--data.engine TransformersEngine or another policy."
        )


def forget_layers(llm: Any) -> None:
    """Lets the memory of a model be released when its engine is closed.

    vLLM notes how to reload each layer in a dictionary with weak keys, but the notes hold the layers (0.32). They would
    stay in memory, and with sleep mode vLLM then starts no other engine in this process.

    Args:
        llm: The `vllm.LLM`, which cannot reload weights from then on.
    """
    llm.apply_model(_forget_layers)


def _forget_layers(model: nn.Module) -> None:
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    for module in model.modules():
        LAYERWISE_INFO.pop(module, None)


def _is_of_vllm(model: nn.Module) -> bool:
    return ".models.transformers." not in f"{type(model).__module__}."


def _has_head_bias(model: nn.Module) -> bool:
    return getattr(getattr(model, "lm_head", None), "bias", None) is not None


@contextmanager
def _complete_load(first: bool) -> Iterator[None]:
    """Refuses a reload of weights that is not complete.

    Args:
        first: Whether no reload was complete before, so that any exception may be one about the family of the policy.

    Raises:
        UserError: vLLM cannot run the policy, as where its model of a family lacks a part of transformers'.
        RuntimeError: vLLM warned about weights that it did not load; it raises no exception for them.
    """
    warnings: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "not loaded" in record.getMessage():
                warnings.append(record.getMessage())

    logger = logging.getLogger("vllm.model_executor.model_loader.reload.inplace")
    handler, level = Collector(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)  # of this logger only: the handler that prints keeps its own level
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # vLLM raises many types
        if not first:
            raise
        raise UserError(
            f"VLLMEngine cannot run this policy: {type(error).__name__}: {first_line(error)}; use --data.engine "
            "TransformersEngine or another policy."
        ) from error
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    if warnings:
        raise RuntimeError(f"vLLM did not load all weights: {warnings[0]}")


def _forget_packed_experts(model: nn.Module) -> None:
    """Lets the next reload pack the weights of experts again, as vLLM does for CPUs at the first load only.

    Without it every sync of a mixture-of-experts policy is without effect on its experts (vLLM 0.32, CPU build).
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None
