"""The RL module: policy, reference and reward models around one objective."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlmt.algorithms import Algorithm
from rlmt.errors import UserError
from rlmt.models import loading
from rlmt.models.adapters import (
    CRITIC,
    LoRA,
    active,
    adapter_config,
    adapter_weights,
    base_tensors,
    check_same_adapter,
    own_parameters,
)
from rlmt.models.critic import Critic, build_critic, check_critic
from rlmt.models.quantization import NF4, dequantized
from rlmt.modules.checkpoints import check_same_format, record_of, save_beside_checkpoints
from rlmt.modules.dynamic_sampling import refill
from rlmt.modules.recorded import check_recording, record_reference, recording_of
from rlmt.modules.schedules import CosineWithWarmup
from rlmt.modules.update import PolicyUpdate, first_pass, first_values, teaches_nothing
from rlmt.resume.options import adopt_all, schedule_options
from rlmt.rewards import Reward
from rlmt.rewards.held_out import HeldOutRewards
from rlmt.rewards.scoring import MalformedMode, score
from rlmt.rng import random_states, restore_random_states
from rlmt.thinking import FormatName, ThinkingFormat
from rlmt.types import AdapterWeights, Experience, RolloutBatch

OptimizerCallable = Callable[[Any], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]

PRECISIONS = ("32-true", "bf16-mixed")
"""Trained weights are float32 in both; Lightning's other precisions cast the whole module, positions and reward too."""


_TRAINED = ("policy.", "critic.")
"""Submodules whose weights are in a checkpoint."""


def _is_critics(name: str) -> bool:
    """Whether a weight of the module is the critic's: its own, or its adapter on the policy."""
    return name.startswith("critic.") or f".{CRITIC}." in name


class RLMTModule(LightningModule):
    """Trains a policy on rollouts against a reward that never sees its thoughts.

    Args:
        policy: folder or hub name of the policy to start from; `{format}` in it stands for the format's name.
        reward: what scores the responses.
        algorithm: the objective, GRPO for one.
        format: how thoughts are written: think, no_think, zero_think, zero_no_think, or a ThinkingFormat with options.
        optimizer: made from the trainable parameters.
        scheduler: made from the optimizer and stepped after each of its steps; null keeps the learning rate constant.
        malformed: what becomes of a completion that is not well formed: `penalty` gives it `malformed_reward`, `null`
            scores the text "[NULL]" in its place (the paper's strict mode), `score_all` scores all of it, thought
            included (the paper's non-strict mode).
        malformed_reward: reward of a malformed completion under `penalty`; never above the worst well-formed one.
        tokens_per_micro_batch: tokens, prompt and padding included, that one forward and backward holds.
        max_grad_norm: the gradient is clipped to this norm.
        max_skipped: steps in a row that a non-finite loss or gradient may cost before the run stops.
        gradient_checkpointing: trade time for memory in the policy's backward.
        attn_implementation: transformers' name of an attention, such as flash_attention_2; null lets it choose.
        held_out_rewards: rewards that are not trained on; each scores the responses to validation and test prompts, and
            is logged as `val/<name>`.
        lora: trains an adapter on the frozen policy, which without it is the reference; null trains all parameters. The
            frozen weights are held in the number format that the forward computes in.
        quantization: holds the frozen policy in 4 bits (QLoRA); wants `lora`.

    Raises:
        UserError: an option is out of range, or later, while setting up, does not fit the models or the data.
    """

    def __init__(
        self,
        policy: str,
        reward: Reward,
        algorithm: Algorithm,
        format: FormatName | ThinkingFormat = "think",  # noqa: A002 - the word users write
        optimizer: OptimizerCallable = AdamW,
        scheduler: LRSchedulerCallable | None = None,
        malformed: MalformedMode | None = "penalty",
        malformed_reward: float = -10.0,
        tokens_per_micro_batch: int = 16384,
        max_grad_norm: float = 1.0,
        max_skipped: int = 5,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        held_out_rewards: list[Reward] | None = None,
        lora: LoRA | None = None,
        quantization: NF4 | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = (
            False  # frozen models are not in the checkpoint; `load_state_dict` checks the policy itself
        )
        positive = {"tokens_per_micro_batch": tokens_per_micro_batch, "max_grad_norm": max_grad_norm}
        for option, value in (positive | {"max_skipped": max_skipped}).items():
            if not value > 0:
                raise UserError(f"--model.{option} is {value}: it must be positive.")
        if not math.isfinite(malformed_reward):
            raise UserError(f"--model.malformed_reward is {malformed_reward}: it must be a finite number.")
        if quantization is not None and lora is None:
            raise UserError("--model.quantization: weights in 4 bits cannot be trained; add --model.lora LoRA.")
        self.format = format if isinstance(format, ThinkingFormat) else ThinkingFormat(format)
        self.policy_path = policy.replace("{format}", self.format.name)
        self.reward = reward
        self.held_out = HeldOutRewards(held_out_rewards or ())
        self.algorithm = algorithm
        self.malformed: MalformedMode = malformed or "null"  # YAML reads the bare word null as nothing
        self.malformed_reward = malformed_reward
        self.max_skipped = max_skipped
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.lora, self.quantization = lora, quantization
        self.policy_version = 0
        self._optimizer, self._scheduler = optimizer, scheduler
        self._update = PolicyUpdate(algorithm, tokens_per_micro_batch, max_grad_norm)
        self._skipped_in_a_row = 0
        self.policy: PreTrainedModel | None = None
        self.reference: PreTrainedModel | None = None
        self.critic: Critic | None = None

    # What the data module needs of the policy -------------------------------------------------------------------------

    @cached_property
    def policy_config(self) -> PretrainedConfig:
        """The policy's configuration, read without its weights."""
        return loading.load_config(self.policy_path)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        return loading.load_tokenizer(self.policy_path)

    @property
    def max_positions(self) -> int:
        """Longest sequence the policy can take, in tokens."""
        return loading.max_positions(self.policy_config)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The number format that the policy's forward runs in, for the engine to sample in the same."""
        return torch.bfloat16 if self.trainer.precision == "bf16-mixed" else torch.float32

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights, with an adapter its frozen base's, under their Hugging Face names and in full."""
        for name, tensor in base_tensors(self._policy).items():
            yield name, dequantized(tensor)

    def policy_adapter(self) -> AdapterWeights | None:
        """The adapter that makes the policy of its frozen base; None where all parameters are trained."""
        return adapter_weights(self._policy)

    # Setting up -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Looks for mistakes that can be seen before any weights are read."""
        self._check_trainer()
        self.format.check(self.tokenizer, self.policy_path)
        loading.check_head(self.policy_config, self.policy_path)
        self.reward.check()
        self.held_out.check(self.reward)
        data: Any = getattr(self.trainer, "datamodule", None)
        if self.lora is not None:
            adapter = self.lora.config(loading.skeleton(self.policy_config))
            for engine in () if data is None else (data.engine, data.val_engine):
                if engine is not None:
                    engine.check_adapter(adapter)
        if self.quantization is not None:
            self.quantization.check()
        if stage == "fit":
            if self.algorithm.critic is not None:
                check_critic(self.algorithm.critic, self.policy_path, self.tokenizer)
            if data is not None:
                self.algorithm.check(data.group_size)
                self._check_minibatches(data.batch_size)
                self._check_validation(data)
            if (recording := recording_of(self.trainer)) is not None:
                check_recording(recording, self.policy_config, self.algorithm)

    def _check_trainer(self) -> None:
        if self.trainer.precision not in PRECISIONS:
            raise UserError(
                f"--trainer.precision is {self.trainer.precision}: use {' or '.join(PRECISIONS)}, since small updates "
                "are lost in weights of 16 bits."
            )
        if self.trainer.world_size > 1:
            raise UserError(
                f"--trainer.devices gives {self.trainer.world_size} processes: a policy is trained on one; set 1."
            )

    def _check_minibatches(self, prompts: int) -> None:
        parts = self.algorithm.minibatches
        if prompts % parts:
            raise UserError(
                f"--model.algorithm.minibatches is {parts}: it does not divide the {prompts} prompts of a step "
                "(--data.batch_size); make it a divisor."
            )

    def _check_validation(self, data: Any) -> None:
        if len(self.held_out) and not data.val_dataloader():
            raise UserError(
                f"--model.held_out_rewards has {', '.join(self.held_out.names)}, but there are no validation prompts: "
                "set --data.val_size above 0 or --data.val_prompts, or leave them out."
            )

    def configure_model(self) -> None:
        """Loads the policy, the reward, and if the objective wants them a reference (a frozen copy) and a critic.

        With LoRA the policy without its adapter is the reference. Of recorded samples all reference log-probs are taken
        here, and no reference is kept. Lightning restores a checkpoint after this hook, so a resumed run takes them
        under the initial policy as well.
        """
        if self.policy is not None:
            return
        # Trained weights are float32; frozen ones lose nothing in the number format that they are multiplied in.
        half = self.lora is not None and self.compute_dtype is torch.bfloat16
        self.policy = loading.load_policy(
            self.policy_path, "bfloat16" if half else "float32", self.attn_implementation, self.quantization
        )
        fitting = self._fitting
        if fitting and self.algorithm.needs_reference:
            if (recording := recording_of(self.trainer)) is not None:
                budget = self._update.tokens_per_micro_batch
                record_reference(recording, self.policy, self.algorithm, self.trainer, budget)
            elif self.lora is None:
                self.reference = copy.deepcopy(self.policy).requires_grad_(False).train(False)
        if self.lora is not None:
            self.lora.add_to(self.policy)
        if fitting and self.algorithm.critic is not None:
            self.critic = build_critic(self.algorithm.critic, self.policy, self.lora).train()
        self.policy.train(fitting)
        if fitting and self.gradient_checkpointing:
            self.policy.gradient_checkpointing_enable({"use_reentrant": False})
            if self.critic is not None:
                self.critic.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        self.reward.load()
        if self.trainer.state.fn != "predict":
            self.held_out.load()

    def configure_optimizers(self) -> Any:
        """The optimizer over what can be trained, and the scheduler if there is one."""
        groups: list[dict[str, Any]] = [{"params": own_parameters(self._policy)}]
        if self.critic is not None and self.algorithm.critic is not None:
            groups.append({"params": own_parameters(self.critic), "lr": self.algorithm.critic.lr})
        optimizer = self._optimizer(groups)
        if self._scheduler is None:
            self._configured = schedule_options(optimizer, None)
            return optimizer
        scheduler = self._scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise UserError("--model.scheduler ReduceLROnPlateau wants a metric at each step: use one of steps.")
        if isinstance(scheduler, CosineWithWarmup):
            scheduler.over(self.trainer.max_steps)
        self._configured = schedule_options(optimizer, scheduler)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_train_start(self) -> None:
        """Options of the optimizer and the scheduler are those of this start, whatever a checkpoint had."""
        adopt_all(self, self._configured)

    @property
    def _fitting(self) -> bool:
        return self.trainer.state.fn == "fit"

    @property
    def _policy(self) -> PreTrainedModel:
        assert self.policy is not None, "configure_model has not run"
        return self.policy

    # One step ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Any]:
        """Scores one rollout batch and takes the objective's optimizer steps on it.

        Returns:
            `experience`, of all samples that were drawn, and `metrics`: floats under their final names.
        """
        start = time.perf_counter()
        drawn = experience = self.experience(batch)
        if self.algorithm.dynamic_sampling:
            before = sum(batch.seconds.values())
            drawn, experience = refill(drawn, self.algorithm.dynamic_sampling, self._draw_more)
            batch = experience.rollouts
            start += sum(batch.seconds.values()) - before  # drawing more is not scoring
        scored = time.perf_counter()
        if not len(batch):
            self._skip("no prompt has samples of different rewards (--model.algorithm.dynamic_sampling drops the rest)")
            metrics = {"policy/skipped": 1.0} | _course(batch, start, scored)
            return {"experience": drawn, "metrics": metrics | experience.metrics}
        updates = self.algorithm.update_epochs * self.algorithm.minibatches
        budget = self._update.tokens_per_micro_batch
        if self.algorithm.pairwise:
            self.algorithm.prepare(experience)
        if self.algorithm.needs_reference:
            experience.ref_logprobs = self._reference_logprobs(experience)
        if (updates > 1 and not self.algorithm.pairwise) or self.algorithm.needs_old_logprobs:
            experience.old_logprobs = first_pass(self._policy, batch, budget, self.device)
        if self.critic is not None:
            experience.values = first_values(self.critic, batch, budget, self.device)
        if not self.algorithm.pairwise:
            self.algorithm.prepare(experience)
        if teaches_nothing(experience, self.critic):
            self._skip("the samples of each prompt have equal rewards, or none takes part in the loss")
            metrics = {"policy/skipped": 1.0}
        else:
            metrics = self._take_steps(experience)
        metrics |= _course(batch, start, scored)
        return {"experience": drawn, "metrics": metrics | experience.metrics}

    def _draw_more(self) -> Experience:
        """Draws and scores the next batch of prompts in the middle of a step."""
        data = cast(Any, self.trainer).datamodule
        return self.experience(data.transfer_batch_to_device(data.draw_more(), self.device, 0))

    def _reference_logprobs(self, experience: Experience) -> Tensor:
        batch = experience.rollouts
        if batch.ref_logprobs is not None:
            return batch.ref_logprobs.to(self.device)
        model = self._policy if self.reference is None else self.reference
        budget, temperature = self._update.tokens_per_micro_batch, self.algorithm.logprob_temperature
        samples = None if experience.pairs is None else experience.pairs.flatten().tolist()
        with active(model, None):
            return first_pass(model, batch, budget, self.device, temperature, samples)

    def _critic_only(self) -> bool:
        """Whether the policy waits for the critic to warm up."""
        options = self.algorithm.critic
        return options is not None and self.global_step < options.warmup_steps

    def _take_steps(self, experience: Experience) -> dict[str, float]:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert not isinstance(optimizer, list)
        steps = self._update.steps(
            self._policy, experience, self.policy_version, self.manual_backward, self.critic, self._critic_only
        )
        for step in steps:
            if step.problem is None:
                moved = not self._critic_only()
                optimizer.step()
                if isinstance(scheduler, LRScheduler):
                    scheduler.step()
                self.policy_version += moved
                self._skipped_in_a_row = 0
            else:
                self._skip(step.problem)
            optimizer.zero_grad()
        return self._update.metrics()

    def _skip(self, problem: str) -> None:
        self._skipped_in_a_row += 1
        rank_zero_warn(f"Optimizer step skipped at version {self.policy_version} of the policy: {problem}.")
        if self._skipped_in_a_row >= self.max_skipped:
            raise UserError(
                f"Stopped after {self._skipped_in_a_row} skipped optimizer steps in a row (--model.max_skipped): "
                f"{problem}; "
                "lower the learning rate or look at the reward curve, and continue from the last checkpoint."
            )

    def experience(self, batch: RolloutBatch) -> Experience:
        """Takes rollouts apart and scores their responses."""
        texts = [self.format.decode(ids, self.tokenizer) for ids in batch.completion_ids]
        splits = [self.format.split(text) for text in texts]
        conversations = [p.messages for p in batch.prompts for _ in range(batch.group_size)]
        scores = score(self.reward, conversations, splits, texts, self.malformed, self.malformed_reward)
        scores.total = scores.total.to(self.device)
        thought_tokens = [self.format.thought_tokens(ids, self.tokenizer) for ids in batch.completion_ids]
        return Experience(
            rollouts=batch,
            texts=texts,
            splits=splits,
            thought_tokens=torch.tensor(thought_tokens, device=self.device),
            scores=scores,
            group=torch.arange(len(batch.prompts), device=self.device).repeat_interleave(batch.group_size),
            lengths=torch.tensor(batch.lengths, device=self.device),
            engine_logprobs=batch.engine_logprobs.to(self.device),
        )

    # Held-out prompts -------------------------------------------------------------------------------------------------

    def validation_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Experience]:
        """Scores rollouts for held-out prompts."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Experience]:
        """Scores rollouts for held-out prompts."""
        return self._evaluate(batch, "test")

    def predict_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Experience]:
        """Scores rollouts, for a callback to write."""
        return {"experience": self.experience(batch)}

    def _evaluate(self, batch: RolloutBatch, stage: str) -> dict[str, Experience]:
        experience = self.experience(batch)
        total = experience.scores.total
        self.log(f"{stage}/reward_mean", total.mean(), batch_size=len(batch), sync_dist=True, prog_bar=True)
        for name, part in experience.scores.parts.items():
            if len(experience.scores.parts) > 1 and (known := part[part.isfinite()]).numel():
                self.log(f"{stage}/{name}", known.mean(), batch_size=known.numel(), sync_dist=True)
        for name, mean in self.held_out.means(experience, self.malformed, self.malformed_reward).items():
            self.log(f"{stage}/{name}", mean, batch_size=len(batch), sync_dist=True)
        return {"experience": experience}

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What is trained of the policy and the critic, with LoRA the adapters: all else is read again."""
        state = super().state_dict(*args, **kwargs)
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {
            name: value
            for name, value in state.items()
            if name.startswith(_TRAINED) and (self.lora is None or name in trained)
        }

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads a policy, and to go on training its critic; a missing or unknown weight is an error.

        Raises:
            UserError: the weights are not those of this policy and critic.
        """
        has_critic = any(_is_critics(name) for name in state_dict)
        if has_critic and not self._fitting:
            state_dict = {name: weight for name, weight in state_dict.items() if not _is_critics(name)}
        elif has_critic != (self.critic is not None):
            raise UserError(
                f"The checkpoint holds {'a' if has_critic else 'no'} critic, and --model.algorithm "
                f"{type(self.algorithm).__name__} trains {'none' if has_critic else 'one'}; go on with the algorithm "
                "it was trained with, or give its policy, written by `rlmt export`, as --model.policy."
            )
        wrong = sorted(self.state_dict().keys() ^ state_dict.keys())
        if wrong and all(map(_is_critics, wrong)):
            raise UserError(
                f"The checkpoint's critic is another one ({len(wrong)} weights differ, first {wrong[0]}); give "
                "--model.algorithm.critic_init and critic_shared as they were."
            )
        if wrong:
            raise UserError(
                f"The checkpoint's weights do not fit the policy {self.policy_path} "
                f"({len(wrong)} differ, first {wrong[0]}); "
                "give --model.policy the model that the checkpoint was trained from."
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def resume_state(self) -> dict[str, Any]:
        """What changes while training beside weights, optimizer and scheduler, as plain data."""
        return {
            "version": self.policy_version,
            "algorithm": self.algorithm.state_dict(),
            "random": random_states(),
            "skipped": self._skipped_in_a_row,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the format and what export needs."""
        checkpoint["rlmt"] = {
            "policy": loading.absolute(self.policy_path),
            **self._adapter_record(),
            "format": self.format.to_dict(),
            **self.resume_state(),
        }
        save_beside_checkpoints(self.trainer, self._policy.config, self.tokenizer, self.format)

    def _adapter_record(self) -> dict[str, Any]:
        """What makes the policy of the base's weights: the adapter's configuration, and how the base is quantised."""
        quantization = None if self.quantization is None else self.quantization.to_dict()
        return {"adapter": adapter_config(self._policy), "quantization": quantization}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of something else or of another format.

        Raises:
            UserError: it is one.
        """
        saved = record_of(checkpoint, "RLMTModule")
        self.check_format(ThinkingFormat.from_dict(saved["format"]), "--ckpt_path")
        check_same_adapter(saved, self._adapter_record())
        self.policy_version = saved["version"]
        if self._fitting:
            self._skipped_in_a_row = saved.get("skipped", 0)
            self.algorithm.load_state_dict(saved.get("algorithm", {}))
            restore_random_states(saved["random"])

    def check_format(self, saved: ThinkingFormat, where: str) -> None:
        """Refuses to go on with another format than a checkpoint's.

        Args:
            saved: the checkpoint's format.
            where: what to call the checkpoint.

        Raises:
            UserError: the formats differ.
        """
        check_same_format(self.format, saved, where)


def _course(batch: RolloutBatch, start: float, scored: float) -> dict[str, float]:
    """Which weights drew a batch, and the seconds of each phase of the step that ends now."""
    seconds = batch.seconds | {"reward": scored - start, "update": time.perf_counter() - scored}
    version = {"engine/weight_version": float(batch.weight_version)}
    return version | {f"time/{phase}_s": spent for phase, spent in seconds.items()}
