"""What the modules have in common: options, the optimizer, adapters on frozen weights, and checkpoints."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from rlmt.annotations import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from rlmt.checkpointing.optimizer_options import apply_optimizer_options, optimizer_options
from rlmt.checkpointing.random_states import random_states, restore_random_states
from rlmt.distributed.gradients import no_gradient_sync
from rlmt.distributed.lightning_internals import forget_step_metrics
from rlmt.errors import UserError
from rlmt.formats.resolve import resolve_format
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models import loading
from rlmt.models.activation_checkpointing import Checkpointing
from rlmt.models.adapters import LoRA
from rlmt.models.assets import POLICY_ASSETS, load_stop_token_ids, save_policy_assets
from rlmt.models.attention import attention_options
from rlmt.models.liger import bind_kernels, check_kernels, uses_kernels
from rlmt.models.quantization import NF4
from rlmt.models.training_mode import set_training_mode
from rlmt.models.vocabulary import check_vocabulary
from rlmt.modules.checkpoints import (
    adapter_state,
    check_adapter_state,
    check_same_format,
    checkpoint_folders,
    rlmt_state,
    trainable_names,
)
from rlmt.modules.checks import check_adapter_options
from rlmt.modules.optimizers import LRSchedulerCallable, OptimizerCallable, with_schedule
from rlmt.options import PositiveFloat, PositiveInt, check_ranges


class TrainingModule(LightningModule):
    """Base of all modules: manual optimization, one rollout or row batch per training step.

    Args:
        optimizer: Called with the parameter groups to train.
        scheduler: Called with the optimizer, and stepped after each of its steps; null keeps the learning rate
            constant.
        tokens_per_micro_batch: Tokens, prompt and padding included, in one forward and backward pass.
        max_grad_norm: The gradient is clipped to this norm.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time. `selective` keeps
            the results of matrix products and attention: little more time than false, less memory if all parameters are
            trained.
        attn_implementation: Attention implementation of transformers, such as flash_attention_2; null takes its
            default, or eager for a model that caps attention logits (Gemma 2), which the default ignores. `varlen`
            packs rows: micro-batches have no padding, and samples share no prompt.
        liger_kernels: Compute norms and gated MLPs of all models by Liger's kernels: faster, in less memory. null does
            so on a GPU with liger-kernel installed, true requires both.
        lora: Trains an adapter on the frozen model; null trains all parameters. The frozen weights are stored in the
            dtype that the forward pass computes in.
        quantization: Stores the frozen model in 4 bits (QLoRA); requires `lora`.

    Raises:
        UserError: An option is out of range.
    """

    kind: ClassVar[str]
    """Name of the module in its checkpoints."""
    saved: ClassVar[tuple[str, ...]]
    """Prefixes of the weights that a checkpoint holds; frozen models are loaded again from their source."""
    dropout = True
    """Whether the dropout of the model's config is active in training."""

    def __init__(
        self,
        optimizer: OptimizerCallable = AdamW,
        scheduler: LRSchedulerCallable | None = None,
        tokens_per_micro_batch: PositiveInt = 16384,
        max_grad_norm: PositiveFloat = 1.0,
        gradient_checkpointing: Checkpointing = False,
        attn_implementation: str | None = None,
        liger_kernels: bool | None = None,
        lora: LoRA | None = None,
        quantization: NF4 | None = None,
    ) -> None:
        check_ranges(TrainingModule, locals())
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # frozen models are in no checkpoint; `load_state_dict` checks the rest
        check_adapter_options(lora, quantization)
        self.optimizer_factory, self.scheduler_factory = optimizer, scheduler
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.max_grad_norm = max_grad_norm
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.liger_kernels = liger_kernels
        self.lora, self.quantization = lora, quantization

    @property
    def fitting(self) -> bool:
        """Whether the trainer runs `fit`; False without a trainer."""
        return self._trainer is not None and self.trainer.state.fn == "fit"

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Forgets the metrics of the last step, of which a skipped step would log those of the update again."""
        forget_step_metrics(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Fills `trainer.callback_metrics`, which Lightning does only when it is read, with the metrics of the step."""
        _ = self.trainer.callback_metrics

    def learning_rates(self, *names: str) -> dict[str, float]:
        """The learning rates of the next optimizer step.

        Args:
            *names: Name to log for each group of `parameter_groups`.
        """
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        # An optimizer may split a group, into groups with one learning rate.
        rates = [float(optimizer.param_groups[0]["lr"]), float(optimizer.param_groups[-1]["lr"])]
        return dict(zip(names, rates, strict=False))

    def set_training_mode(self, model: PreTrainedModel) -> PreTrainedModel:
        """Sets train mode and gradient checkpointing for `fit`, eval mode for other stages."""
        if self.fitting:
            set_training_mode(model, self.gradient_checkpointing, self.dropout)
        else:
            model.train(False)
        return model

    def add_kernels(self, *models: nn.Module | None) -> None:
        """Binds Liger's kernels to loaded models, if the run uses them."""
        if not uses_kernels(self.liger_kernels, self.trainer.strategy.root_device):
            return
        if layers := sum(bind_kernels(model) for model in models if model is not None):
            rank_zero_info(f"{layers} norms and MLPs are computed by Liger's kernels (--model.liger_kernels)")

    def log_step(self, metrics: Mapping[str, float], batch_size: int, progress_bar: Mapping[str, str]) -> None:
        """Logs the metrics of a training step, reduced over ranks. All ranks have to call it with the same names.

        `perf/tokens_per_s` is summed over ranks, names that end in `_max` are maximised, all others averaged.

        Args:
            metrics: Final name → value on this rank.
            batch_size: Samples or rows of this rank.
            progress_bar: Metrics to show on the progress bar, and their names there.
        """
        for name, value in metrics.items():
            reduce = "max" if name.endswith("_max") else "sum" if name == "perf/tokens_per_s" else "mean"
            self.log(name, value, on_step=True, on_epoch=False, sync_dist=True, reduce_fx=reduce, batch_size=batch_size)
        for name, short in progress_bar.items():
            if name in metrics:
                # The bar would show 1234.5 as 1.23e+3.
                value = metrics[name]
                value = float(round(value)) if 100 <= abs(value) < math.inf else value
                self.log(short, value, prog_bar=True, logger=False, batch_size=batch_size)

    # Optimizer --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameters to train, in the groups that the optimizer receives."""

    @property
    @abstractmethod
    def optimizer_steps(self) -> int:
        """Optimizer steps of the run, over which a schedule is stretched; -1 if it has no end."""

    def configure_optimizers(self) -> Any:
        """Makes the optimizer, and the scheduler if there is one."""
        optimizer = self.optimizer_factory(self.parameter_groups())
        if self.scheduler_factory is None:
            self._optimizer_options = optimizer_options(optimizer, None)
            return optimizer
        configured = with_schedule(optimizer, self.scheduler_factory, self.optimizer_steps)
        self._optimizer_options = optimizer_options(optimizer, configured["lr_scheduler"])
        return configured

    def on_train_start(self) -> None:
        """Applies the optimizer's and the scheduler's options of this run, whatever the checkpoint holds."""
        apply_optimizer_options(self, self._optimizer_options)

    def accumulate_gradient(self, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch on this rank; gradients are summed over ranks once per optimizer step.

        The backward runs outside of the step's autocast, which would round the float32 operations of backward: each
        operation has the dtype that it had in forward.
        """
        with no_gradient_sync(self.trainer.strategy), torch.autocast(self.device.type, enabled=False):
            self.manual_backward(loss)

    def optimizer_step_and_schedule(self) -> None:
        """Steps the optimizer and the scheduler. The gradient stays; the caller clears it."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert not isinstance(optimizer, list)
        optimizer.step()
        if isinstance(scheduler, LRScheduler):
            scheduler.step()

    # Checkpoints ------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def trained_model(self) -> PreTrainedModel:
        """The model that is trained, once it is loaded."""

    @abstractmethod
    def planned_model(self) -> PreTrainedModel:
        """The model that is trained, without its adapter, on the meta device."""

    def planned_adapter_config(self) -> dict[str, Any] | None:
        """Configuration that the adapter will have, from the model's config alone; None without an adapter.

        Raises:
            UserError: The model has no layers for the adapter.
        """
        return None if self.lora is None else self.lora.config(self.planned_model())

    def check_model_options(self, config: PretrainedConfig, source: str) -> None:
        """Checks the options of the model against its config and the device.

        Args:
            config: Config of the model that is trained.
            source: Folder or hub name of the model.

        Raises:
            UserError: The model cannot have the attention implementation, has no layers for the adapter or the kernels,
                or a package or a GPU is missing.
        """
        attention_options(config, self.attn_implementation, source)
        self.planned_adapter_config()
        if self.quantization is not None:
            self.quantization.check()
        if self.liger_kernels:
            check_kernels(self.trainer.strategy.root_device, self.planned_model)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained weights; with LoRA the adapter and new heads only."""
        state: dict[str, Tensor] = super().state_dict(*args, **kwargs)
        trained = state.keys() if self.lora is None else trainable_names(self)
        return {name: tensor for name, tensor in state.items() if name.startswith(self.saved) and name in trained}

    def resume_state(self) -> dict[str, Any]:
        """State of this rank that changes during training, besides weights, optimizer and scheduler, as plain data."""
        return {"random": [random_states()]}

    def checkpoint_state(self) -> dict[str, Any]:
        """What every checkpoint stores under `rlmt` besides the weights."""
        adapter = adapter_state(self.trained_model, self.quantization)
        return {"module": self.kind, **adapter, **self.resume_state()}

    def check_checkpoint(self, checkpoint: Mapping[str, Any], fitting: bool) -> None:
        """Checks that a checkpoint belongs to this module and has the same adapter. Loads no weights.

        Args:
            checkpoint: The loaded checkpoint.
            fitting: Whether training is resumed from it.

        Raises:
            UserError: It does not.
        """
        saved = rlmt_state(checkpoint, self.kind)
        check_adapter_state(saved, self.planned_adapter_config(), self.quantization)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks a checkpoint, and restores random states to resume training.

        Raises:
            UserError: As `check_checkpoint`.
        """
        self.check_checkpoint(checkpoint, self.fitting)
        if self.fitting:
            restore_random_states(checkpoint["rlmt"]["random"])


class RestoredMixin:
    """Modules from checkpoints."""

    restored: bool = False
    """Whether `load_from_checkpoint` made the module: the initial weights, which may be a reference, are gone."""
    path_option: ClassVar[str]
    """Option with the folder or hub name of the initial weights."""

    @abstractmethod
    def load_initial(self, state_dict: Mapping[str, Tensor]) -> None:
        """Loads the initial weights in float32, with the adapter, for the weights of a checkpoint to replace them.

        Args:
            state_dict: Weights of the checkpoint.
        """

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, **options: Any) -> Any:
        """Makes the module of a checkpoint, with its trained weights, to validate, test or predict with.

        Args:
            checkpoint_path: Checkpoint that `rlmt fit` or a `Trainer` wrote.
            map_location: Device of the weights; None is the CPU.
            **options: Options of the constructor that replace those of the run. A run of `rlmt fit` stores its options;
                after a run from Python pass `lora` if the run had it, and `reward` and `algorithm` of an RL run.

        Raises:
            UserError: The file is not a checkpoint of this module, or options are missing or do not fit it.
        """
        from rlmt.modules.from_checkpoint import restore

        return restore(cls, checkpoint_path, map_location, options)

    def check_restored(self) -> None:
        """Raises UserError if a module of `load_from_checkpoint` is to be trained."""
        if self.restored and cast(Any, self).fitting:
            raise UserError(
                "A module of load_from_checkpoint cannot be trained, since it has lost the initial weights, and with "
                "them the reference; make a new module and pass fit(..., ckpt_path=CHECKPOINT)."
            )


class PolicyMixin(RestoredMixin):
    """A policy and its thinking format: what is known before weights are loaded."""

    path_option = "policy"
    policy_path: str
    """Folder or hub name of the initial policy."""
    configured_format: ThinkingFormat
    """The format as configured."""
    policy: PreTrainedModel | None
    """The policy; None until `configure_model`."""
    lora: LoRA | None

    @cached_property
    def policy_config(self) -> PretrainedConfig:
        """Config of the policy."""
        return loading.load_config(self.policy_path)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the policy; raises UserError if it has tokens that the policy has no embedding for."""
        tokenizer = loading.load_tokenizer(self.policy_path)
        check_vocabulary(tokenizer, self.policy_config, self.policy_path)
        return tokenizer

    @cached_property
    def format(self) -> ThinkingFormat:
        """The configured format, completed for the policy's chat template.

        Raises:
            UserError: They do not fit each other.
        """
        return resolve_format(self.configured_format, self.tokenizer, self.policy_path)

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Token ids that end a sample."""
        return load_stop_token_ids(self.policy_path, self.tokenizer, self.format)

    @property
    def max_positions(self) -> int:
        """Context length of the policy in tokens."""
        return loading.max_positions(self.policy_config)

    @property
    def trained_model(self) -> PreTrainedModel:
        """The policy, once it is loaded."""
        assert self.policy is not None, "configure_model has not run"
        return self.policy

    def planned_model(self) -> PreTrainedModel:
        """The policy without its adapter, on the meta device."""
        return loading.meta_model(self.policy_config)

    def save_assets_beside_checkpoints(self, trainer: Trainer) -> None:
        """Writes config, tokenizer, format and stop tokens of the policy, which `rlmt export` adds the weights to."""
        for folder in checkpoint_folders(trainer):
            assets = folder / POLICY_ASSETS
            save_policy_assets(assets, self.trained_model.config, self.tokenizer, self.format, self.stop_token_ids)

    def load_initial(self, state_dict: Mapping[str, Tensor]) -> None:
        """See `RestoredMixin.load_initial`."""
        module = cast(Any, self)
        policy = loading.load_policy(self.policy_path, "float32", module.attn_implementation, module.quantization)
        if self.lora is not None:
            self.lora.add_to(policy)
        self.policy = policy

    def check_format(self, saved: ThinkingFormat, where: str) -> None:
        """Checks that a checkpoint has the format of this run.

        Args:
            saved: Format of the checkpoint.
            where: Name of the checkpoint, for the message.

        Raises:
            UserError: The formats differ.
        """
        check_same_format(self.format, saved, where)
