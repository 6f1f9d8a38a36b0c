"""FSDP2 of torch as a Lightning strategy: each rank stores a shard of the weights.

Each rank stores 1/N of every fully trained weight, of its gradient and of its moments, and of frozen models. The
weights of a block are all-gathered when the block is computed, and freed afterwards. Adapters are small and stay
unsharded on every rank; so does the head of a critic beside an adapter. With `offload` the shards are stored in host
memory and copied to the device for the all-gather.

A checkpoint is the file that a single process would write: tensors are all-gathered one at a time, and only rank 0
keeps them (`save_distributed_checkpoint=False`). So a run resumes from it on any number of ranks, sharded or not, and
export and all checks read it like any other checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from rlmt.distributed.collectives import all_gather_object
from rlmt.distributed.lightning_internals import (
    disable_inference_mode,
    set_data_parallel,
    set_device,
    set_process_group_backend,
)
from rlmt.distributed.rank_0_loading import broadcast_weights, is_on_rank_0, rank_0_loads

T = TypeVar("T")


class FSDP2(ModelParallelStrategy):
    """Trains on several processes, one per device, with sharded models (`--config fsdp`).

    Args:
        offload: Stores shards, gradients and moments in host memory and steps the optimizer there, for models whose
            shards do not fit the devices; each forward and backward pass then waits for copies.
        bf16_residual: Keeps the hidden states between blocks in bfloat16 under `bf16-mixed`, as LoRA runs and vLLM do:
            half the memory of checkpointed activations, and less exact gradients.
    """

    def __init__(self, offload: bool = False, bf16_residual: bool = False) -> None:
        super().__init__(save_distributed_checkpoint=False)
        self.offload = offload
        self.bf16_residual = bf16_residual

    def setup_environment(self) -> None:
        """Initialises the process group and a device mesh in which all ranks are data-parallel."""
        set_data_parallel(self)
        if self.offload and self.root_device.type == "cuda":
            set_process_group_backend(self, "cpu:gloo,cuda:nccl")  # gradient norms are computed in host memory
        super().setup_environment()

    def model_to_device(self) -> None:
        """Moves the module to its device, except offloaded shards."""
        module: Any = self.lightning_module
        if not self.offload:
            super().model_to_device()
            return
        module._apply(lambda tensor: tensor if isinstance(tensor, DTensor) else tensor.to(self.root_device))
        set_device(module, self.root_device)

    def setup(self, trainer: Trainer) -> None:
        """Disables inference mode: weights that are all-gathered in it cannot be trained later."""
        disable_inference_mode(trainer)
        super().setup(trainer)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: the optimizer's state is in the same file, and `load_optimizer_state_dict` loads it."""
        return True

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The unsharded optimizer state on rank 0's CPU, with the keys of a single process; no state on other ranks.

        Lightning's own keys are positions among all parameters of the module, frozen ones included. With LoRA they
        differ from those of a single process, which are positions among the optimizer's parameters.
        """
        plain: Any = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        saved = plain.state_dict()
        state = {index: self._gather_to_rank_0(values) for index, values in saved["state"].items()}
        return {**saved, "state": state if self.is_global_zero else {}}

    def _gather_to_rank_0(self, values: Mapping[str, Any]) -> dict[str, Any]:
        gathered = {}
        for name, value in values.items():
            full = full_tensor(value) if isinstance(value, Tensor) else value
            if self.is_global_zero:
                gathered[name] = full.cpu() if isinstance(full, Tensor) else full
        return gathered

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads the file on every rank; the module and the optimizer take their shards from it later.

        Lightning's own method loads weights past the module's `load_state_dict`, and so past its checks, and finds the
        optimizer's state by the keys above.
        """
        return self.checkpoint_io.load_checkpoint(checkpoint_path, map_location="cpu", weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads this rank's shards of the weights."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        weights = {name: distribute_like(own.get(name), weight) for name, weight in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(weights, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads this rank's shards of the moments."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                index: {name: distribute_like(parameters[index], value) for name, value in values.items()}
                for index, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def rank_0_loads_for(trainer: Trainer) -> AbstractContextManager[None]:
    """Context in which models are loaded before `shard_models`: under `FSDP2` rank 0 alone reads them."""
    return rank_0_loads(isinstance(trainer.strategy, FSDP2))


def shard_models(trainer: Trainer, *models: nn.Module | None, autocast: bool = True) -> None:
    """Shards models in place if the trainer's strategy is `FSDP2`.

    Args:
        trainer: Trainer whose processes have started.
        models: Models with transformers' blocks; None is skipped.
        autocast: Whether the models compute in the trainer's precision, or else in the dtype of their weights.
    """
    if isinstance(strategy := trainer.strategy, FSDP2):
        mixed = autocast and trainer.precision == "bf16-mixed"
        for model in models:
            if model is not None:
                mesh = strategy.device_mesh["data_parallel"]
                shard_model(model, mesh, mixed, strategy.offload, from_rank_0=is_on_rank_0(model))
                if mixed and strategy.bf16_residual:
                    round_residual_stream(model)


def shard_model(
    model: nn.Module, mesh: DeviceMesh, mixed: bool, offload: bool = False, from_rank_0: bool = False
) -> None:
    """Shards a model's weights in place, block by block; in a model with an adapter only the frozen ones.

    Gradients are summed over ranks. All ranks must run the same number of forward and backward passes.

    Args:
        model: Model with transformers' blocks.
        mesh: One-dimensional mesh of all ranks.
        mixed: Whether blocks are all-gathered and computed in bfloat16; gradients are reduced in float32.
        offload: Whether the shards are stored in host memory.
        from_rank_0: Whether only rank 0 has the weights (`load_on_rank_0`). Other ranks receive each block before it is
            sharded, so that they never hold more than one.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    has_adapter = any(".lora_" in name for name, _ in model.named_parameters())
    unsharded = {p for p in model.parameters() if p.requires_grad} if has_adapter else set()
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    unreceived = {p: p for p in model.parameters()} if from_rank_0 else {}
    for module in [*blocks, model]:
        # No reference may stay: the unsharded weights have to be freed when the block is sharded.
        broadcast_weights([unreceived.pop(p) for p in list(module.parameters()) if p in unreceived], _device(mesh))
        dtype = torch.bfloat16 if mixed and module is not model else None
        fully_shard(
            module,
            mesh=mesh,
            # For the root too, or an embedding and a head would stay unsharded from one use to the next.
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
            offload_policy=CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy(),
            ignored_params=unsharded,
        )
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # each token is already weighted by its share of the whole step's loss
        module.set_force_sum_reduction_for_comms(True)


def round_residual_stream(model: nn.Module) -> None:
    """Keeps a model's hidden states in bfloat16 from its embeddings to its last block.

    Autocast computes products of float32 weights in bfloat16, but sums of their results and float32 embeddings in
    float32. Weights stay as they are, and so do the operations that a model computes in float32, such as norms.

    Args:
        model: Model with transformers' blocks, for training under bfloat16 autocast.
    """
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer

    modules: list[Any] = list(model.modules())  # those of a shared backbone are not the critic's
    for embeddings in {module.get_input_embeddings() for module in modules if isinstance(module, PreTrainedModel)}:
        embeddings.register_forward_hook(lambda module, args, output: output.to(torch.bfloat16))
    blocks: list[Any] = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
    for block in blocks[:1]:  # some models add float32 positions to the embeddings
        block.register_forward_pre_hook(lambda module, args: (args[0].to(torch.bfloat16), *args[1:]))
    for block in blocks:  # some weight experts in float32
        block.register_forward_hook(lambda module, args, output: _rounded(output))


def _rounded(output: Any) -> Any:
    """The output of a block, hidden states or a tuple that starts with them, in bfloat16."""
    return output.to(torch.bfloat16) if isinstance(output, Tensor) else (output[0].to(torch.bfloat16), *output[1:])


def is_sharded(model: nn.Module) -> bool:
    """True if a model is sharded, so that all ranks must run it the same number of times."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def call_as_forward(model: nn.Module, function: Callable[..., T], *args: Any) -> T:
    """Calls `function(model, *args)` as a forward pass of the model, around which FSDP2 all-gathers its weights.

    Args:
        model: Model whose weights `function` uses, sharded or not.
        function: Function that returns tensors.
        args: Further arguments of `function`.
    """
    if not is_sharded(model):
        return function(model, *args)
    own: Any = model
    name = f"as_forward_{function.__name__}"
    if not hasattr(own, name):
        setattr(own, name, MethodType(function, model))
        register_fsdp_forward_method(own, name)
    result: T = getattr(own, name)(*args)
    return result


def pad_with_no_ops(parts: Iterable[T], model: nn.Module, no_op: T) -> list[T]:
    """Pads with no-op parts so that all ranks of a sharded model run the same number of forward passes.

    This is a collective operation if the model is sharded.

    Args:
        parts: This rank's parts; the model runs once for each.
        model: Model, sharded or not.
        no_op: The no-op part.

    Returns:
        The parts, followed by no-op parts if another rank has more.
    """
    own = list(parts)
    return own + [no_op] * (max(all_gather_object(len(own))) - len(own)) if is_sharded(model) else own


def compute_device(model: nn.Module) -> torch.device:
    """The device that a model computes on; offloaded shards are stored on another one."""
    weight = next(model.parameters())
    return _device(weight.device_mesh) if isinstance(weight, DTensor) else weight.device


def _device(mesh: DeviceMesh) -> torch.device:
    """This rank's device in a mesh."""
    return torch.empty(0, device=mesh.device_type).device


def full_tensor(tensor: Tensor) -> Tensor:
    """The unsharded tensor on the mesh's device, a collective operation; any other tensor is returned as it is."""
    if isinstance(tensor, DTensor):
        on_mesh: Any = tensor.to(tensor.device_mesh.device_type)
        return cast(Tensor, on_mesh.full_tensor())
    return tensor


def distribute_like(other: Any, value: Any) -> Any:
    """Shards an unsharded tensor like another one of its shape; any other value is returned as it is."""
    if isinstance(other, DTensor) and isinstance(value, Tensor) and value.shape == other.shape:
        shards = distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)
        return shards.to(other.device)  # `distribute_tensor` puts them on the mesh's device
    return value
