"""Weights in shards over the processes of a run: torch's FSDP2, as a strategy of Lightning's.

Each rank holds 1/N of every weight that is trained in full, of its gradient and of its moments, and of frozen models;
a block's weights are put together when it is computed, and let go. Adapters are small, and whole on every rank, as is a
critic's head beside one. With `offload` the shards lie in the host's memory, and are copied to the device as they are
put together.

A checkpoint is the file that one process would write: tensors are put together one at a time, and the first rank alone
keeps them. So a run goes on from it on any number of ranks, sharded or not, and export and all checks read it as any
other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
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
from transformers.modeling_layers import GradientCheckpointingLayer

from rlmt.checkpointing.files import read_checkpoint
from rlmt.distributed.collectives import all_gather_object
from rlmt.models.adapters import is_adapter

T = TypeVar("T")


class FSDP2(ModelParallelStrategy):
    """Spreads a run over processes, one a device, with the models in shards (`--config fsdp`).

    Args:
        offload: keep shards, gradients and moments in the host's memory and step the optimizer there, for models whose
            shards the devices cannot hold; each forward and backward then waits for copies.
    """

    def __init__(self, offload: bool = False) -> None:
        super().__init__()
        self.offload = offload

    def setup_environment(self) -> None:
        """Starts the processes' talk; all of them share the data, and none splits a layer's computation."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        if self.offload and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # norms of gradients are taken where these lie
        super().setup_environment()

    def model_to_device(self) -> None:
        """Moves the module to its device, all but offloaded shards."""
        module: Any = self.lightning_module
        if not self.offload:
            super().model_to_device()
            return
        module._apply(lambda tensor: tensor if isinstance(tensor, DTensor) else tensor.to(self.root_device))
        _update_properties(module, device=self.root_device)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer's state comes from the same file, by `load_optimizer_state_dict`."""
        return True

    def setup(self, trainer: Trainer) -> None:
        """As any strategy's; without inference mode, in which weights that are put together cannot be trained later."""
        for loop in (
            trainer.fit_loop.epoch_loop.val_loop,
            trainer.validate_loop,
            trainer.test_loop,
            trainer.predict_loop,
        ):
            loop.inference_mode = False
        super().setup(trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights on the CPU of the first rank; nothing on others."""
        assert self.lightning_module is not None
        return self._on_first_rank(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state in the form of one process, on the CPU of the first rank; no state on others."""
        plain: Any = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        saved = plain.state_dict()
        state = {number: self._on_first_rank(held) for number, held in saved["state"].items()}
        return {**saved, "state": state if self.is_global_zero else {}}

    def _on_first_rank(self, values: Mapping[str, Any]) -> dict[str, Any]:
        kept = {}
        for name, value in values.items():
            together = full_tensor(value) if isinstance(value, Tensor) else value
            if self.is_global_zero:
                kept[name] = together.cpu() if isinstance(together, Tensor) else together
        return kept

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes one file, from the first rank."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Opens the file; tensors are read where they are used, so ranks of a machine share them in memory."""
        return read_checkpoint(Path(checkpoint_path), map_location="cpu", mmap=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes this rank's shards of the weights."""
        assert self.lightning_module is not None
        held = self.lightning_module.state_dict()
        weights = {name: distribute_like(held.get(name), weight) for name, weight in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(weights, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes this rank's shards of the moments."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {name: distribute_like(parameters[number], value) for name, value in held.items()}
                for number, held in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def shard_models(trainer: Trainer, *models: nn.Module | None, autocast: bool = True) -> None:
    """Cuts models into shards, in place, if the run has them so (`--config fsdp`).

    Args:
        trainer: the run's, its processes started.
        models: with transformers' blocks; None is passed over.
        autocast: whether they compute in the trainer's number format, or else in that of their weights.
    """
    if isinstance(strategy := trainer.strategy, FSDP2):
        mixed = autocast and trainer.precision == "bf16-mixed"
        for model in models:
            if model is not None:
                shard_model(model, strategy.device_mesh["data_parallel"], mixed, strategy.offload)


def shard_model(model: nn.Module, mesh: DeviceMesh, mixed: bool, offload: bool = False) -> None:
    """Cuts a model's weights into shards, in place, block by block; with an adapter only the frozen ones.

    Gradients are summed over ranks. All ranks have to run the model the same number of times, forward and backward.

    Args:
        model: with transformers' blocks.
        mesh: of all ranks, in one dimension.
        mixed: put a block's weights together in bfloat16, which it computes in; its gradients travel as float32.
        offload: keep the shards in the host's memory.
    """
    named = dict(model.named_parameters())
    kept = {p for p in named.values() if p.requires_grad} if any(map(is_adapter, named)) else set()
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in [*blocks, model]:
        dtype = torch.bfloat16 if mixed and module is not model else None
        fully_shard(
            module,
            mesh=mesh,
            # The root as well, or an embedding and a head would stay together from one use to the next.
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
            offload_policy=CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy(),
            ignored_params=kept,
        )
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # each token carries its share of the whole step's loss
        module.set_force_sum_reduction_for_comms(True)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are in shards, so that every rank has to run it as often as the others."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def call_as_forward(model: nn.Module, function: Callable[..., T], *args: Any) -> T:
    """`function(model, *args)`, run as a forward of the model's: what is in shards is put together around it.

    Args:
        model: what `function` uses weights of, in shards or not.
        function: returns tensors.
        args: what it takes beside the model.
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


def pad_with_no_ops(parts: Iterable[T], model: nn.Module, idle: T) -> list[T]:
    """The parts of this rank's work with a model; of a sharded one as many idle ones more as another rank has parts.

    All ranks have to call it together.

    Args:
        parts: what the model is run on, one after the other.
        model: in shards or not.
        idle: a part that counts nothing.
    """
    mine = list(parts)
    return mine + [idle] * (max(all_gather_object(len(mine))) - len(mine)) if is_sharded(model) else mine


def compute_device(model: nn.Module) -> torch.device:
    """Where a model computes, which is not where its shards lie if these are offloaded."""
    weight = next(model.parameters())
    return (
        torch.empty(0, device=weight.device_mesh.device_type).device if isinstance(weight, DTensor) else weight.device
    )


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards, on their device, by all ranks at once; any other as it is."""
    if isinstance(tensor, DTensor):
        together: Any = tensor.to(tensor.device_mesh.device_type)
        return cast(Tensor, together.full_tensor())
    return tensor


def distribute_like(held: Any, value: Any) -> Any:
    """A whole tensor cut as another one of its shape is; any other value as it is."""
    if isinstance(held, DTensor) and isinstance(value, Tensor) and value.shape == held.shape:
        shards = distribute_tensor(value, held.device_mesh, held.placements, src_data_rank=None)
        return shards.to(held.device)  # they come on the mesh's device
    return value
