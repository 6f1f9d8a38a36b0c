"""The RL module: policy, reference and reward models around one objective."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from rlmt.algorithms import Algorithm
from rlmt.checkpointing.config_changes import apply_optimizer_options, optimizer_options
from rlmt.checkpointing.random_states import random_states, restore_random_states
from rlmt.distributed import collectives
from rlmt.distributed.fsdp2 import full_tensor, shard_models
from rlmt.formats.thinking import FormatName, ThinkingFormat
from rlmt.models import loading
from rlmt.models.adapters import (
    LoRA,
    adapter_weights,
    base_tensors,
    trainable_parameters,
    use_adapter,
)
from rlmt.models.critic import Critic
from rlmt.models.quantization import NF4, dequantize
from rlmt.modules.build import build_models, check_has_critic, shardable_models, weights_to_load, weights_to_save
from rlmt.modules.checkpoints import rlmt_state, save_assets_beside_checkpoints
from rlmt.modules.checks import (
    adapter_config_for,
    adapter_state,
    check_adapter_options,
    check_adapter_state,
    check_run,
)
from rlmt.modules.dynamic_sampling import refill
from rlmt.modules.policy import PolicyOwner
from rlmt.modules.schedules import LRSchedulerCallable, OptimizerCallable, with_schedule
from rlmt.modules.skipped_steps import SkippedSteps
from rlmt.modules.update import PolicyUpdate, compute_logprobs, compute_values, has_no_learning_signal, step_timings
from rlmt.ranges import FiniteFloat, PositiveFloat, PositiveInt, check_ranges
from rlmt.rewards import Reward
from rlmt.rewards.held_out import HeldOutRewards
from rlmt.rewards.scoring import MalformedMode, score
from rlmt.types import AdapterWeights, Experience, RolloutBatch


class RLMTModule(LightningModule, PolicyOwner):
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
        max_idle: rollout batches in a row that may teach nothing, as where all samples are malformed or the rewards of
            each prompt's samples are equal, before the run stops. They change nothing.
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
        malformed_reward: FiniteFloat = -10.0,
        tokens_per_micro_batch: PositiveInt = 16384,
        max_grad_norm: PositiveFloat = 1.0,
        max_skipped: PositiveInt = 5,
        max_idle: PositiveInt = 50,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        held_out_rewards: list[Reward] | None = None,
        lora: LoRA | None = None,
        quantization: NF4 | None = None,
    ) -> None:
        check_ranges(RLMTModule, locals())
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # frozen models are in no checkpoint; `load_state_dict` checks what has to be
        check_adapter_options(lora, quantization)
        self.format = format if isinstance(format, ThinkingFormat) else ThinkingFormat(format)
        self.policy_path = policy.replace("{format}", self.format.name)
        self.reward = reward
        self.held_out = HeldOutRewards(held_out_rewards or ())
        self.algorithm = algorithm
        self.malformed: MalformedMode = malformed or "null"  # YAML reads the bare word null as nothing
        self.malformed_reward = malformed_reward
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.lora, self.quantization = lora, quantization
        self.policy_version = 0
        self._optimizer, self._scheduler = optimizer, scheduler
        self._update = PolicyUpdate(algorithm, tokens_per_micro_batch, max_grad_norm)
        self._no_updates = SkippedSteps(max_skipped, max_idle)
        self.policy: PreTrainedModel | None = None
        self.reference: PreTrainedModel | None = None
        self.critic: Critic | None = None

    # What the data module needs of the policy -------------------------------------------------------------------------

    @property
    def compute_dtype(self) -> torch.dtype:
        """The number format that the policy's forward runs in, for the engine to sample in the same."""
        return torch.bfloat16 if self.trainer.precision == "bf16-mixed" else torch.float32

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights, with an adapter its frozen base's, under their Hugging Face names and in full."""
        for name, tensor in base_tensors(self._policy).items():
            yield name, full_tensor(dequantize(tensor))

    def policy_adapter(self) -> AdapterWeights | None:
        """The adapter that makes the policy of its frozen base; None where all parameters are trained."""
        return adapter_weights(self._policy)

    # Setting up -------------------------------------------------------------------------------------------------------

    @collectives.rank_hook
    def setup(self, stage: str) -> None:
        """Looks for mistakes that can be seen before any weights are read."""
        check_run(self, stage)

    @collectives.rank_hook
    def configure_model(self) -> None:
        """Loads the models, and the rewards."""
        if self.policy is not None:
            return
        built = build_models(self, self._fitting, self._update.tokens_per_micro_batch)
        self.policy, self.reference, self.critic = built
        self.reward.load()
        if self.trainer.state.fn != "predict":
            self.held_out.load()
        shard_models(self.trainer, *shardable_models(self.reward), *shardable_models(self.held_out), autocast=False)

    def configure_optimizers(self) -> Any:
        """The optimizer over what can be trained, and the scheduler if there is one."""
        groups: list[dict[str, Any]] = [{"params": trainable_parameters(self._policy)}]
        if self.critic is not None and self.algorithm.critic is not None:
            groups.append({"params": trainable_parameters(self.critic), "lr": self.algorithm.critic.lr})
        optimizer = self._optimizer(groups)
        if self._scheduler is None:
            self._configured = optimizer_options(optimizer, None)
            return optimizer
        made = with_schedule(optimizer, self._scheduler, self.trainer.max_steps)
        self._configured = optimizer_options(optimizer, made["lr_scheduler"])
        return made

    def on_train_start(self) -> None:
        """Options of the optimizer and the scheduler are those of this start, whatever a checkpoint had."""
        apply_optimizer_options(self, self._configured)

    @property
    def _fitting(self) -> bool:
        return self.trainer.state.fn == "fit"

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
        if not any(collectives.all_gather_object(len(batch))):
            metrics = self._pass_over(drawn) | step_timings(batch, start, scored)
            return {"experience": drawn, "metrics": metrics | experience.metrics}
        updates = self.algorithm.update_epochs * self.algorithm.minibatches
        budget = self._update.tokens_per_micro_batch
        if self.algorithm.pairwise:
            self.algorithm.prepare(experience)
        if self.algorithm.needs_reference:
            experience.ref_logprobs = self._reference_logprobs(experience)
        if (updates > 1 and not self.algorithm.pairwise) or self.algorithm.needs_old_logprobs:
            experience.old_logprobs = compute_logprobs(self._policy, batch, budget, self.device)
        if self.critic is not None:
            experience.values = compute_values(self.critic, batch, budget, self.device)
        if not self.algorithm.pairwise:
            self.algorithm.prepare(experience)
        if all(collectives.all_gather_object(has_no_learning_signal(experience, self.critic))):
            metrics = self._pass_over(experience)
        else:
            metrics = self._take_steps(experience)
        metrics |= step_timings(batch, start, scored)
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
        with use_adapter(model, None):
            return compute_logprobs(model, batch, budget, self.device, temperature, samples)

    def _critic_only(self) -> bool:
        """Whether the policy waits for the critic to warm up."""
        options = self.algorithm.critic
        return options is not None and self.global_step < options.warmup_steps

    def _take_steps(self, experience: Experience) -> dict[str, float]:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert not isinstance(optimizer, list)
        steps = self._update.steps(
            self._policy, experience, self.policy_version, self._backward, self.critic, self._critic_only
        )
        for step in steps:
            if step.problem is None:
                moved = not self._critic_only()
                optimizer.step()
                if isinstance(scheduler, LRScheduler):
                    scheduler.step()
                self.policy_version += moved
                self._no_updates.update()
            elif stop := self._no_updates.skip(step.problem, self.policy_version):
                raise collectives.user_error_on_all_ranks(stop)
            optimizer.zero_grad()
        return self._update.metrics()

    def _backward(self, loss: Tensor) -> None:
        """Adds to this rank's gradient; the update sums them over ranks once a step, however often each came here."""
        with _block_parallel_sync_behavior(self.trainer.strategy):
            self.manual_backward(loss)

    def _pass_over(self, experience: Experience) -> dict[str, float]:
        """What a step logs that leaves out a batch, since it teaches nothing."""
        if stop := self._no_updates.pass_over(experience, self.policy_version):
            raise collectives.user_error_on_all_ranks(stop)
        return {"policy/skipped": 1.0}

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
        broken = sum(not split.ok for split in experience.splits) / len(experience.splits)
        self.log(f"{stage}/malformed", broken, batch_size=len(batch), sync_dist=True)
        for name, part in experience.scores.parts.items():
            known = part[part.isfinite()]
            if len(experience.scores.parts) > 1 and any(collectives.all_gather_object(len(known))):
                mean = known.sum() / max(1, len(known))
                self.log(f"{stage}/{name}", mean, batch_size=len(known), sync_dist=True)
        for name, held_out in self.held_out.means(experience, self.malformed, self.malformed_reward).items():
            self.log(f"{stage}/{name}", held_out, batch_size=len(batch), sync_dist=True)
        return {"experience": experience}

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What is trained of the policy and the critic, with LoRA the adapters: all else is read again."""
        return weights_to_save(self, super().state_dict(*args, **kwargs))

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads a policy, and to go on training its critic; a missing or unknown weight is an error.

        Raises:
            UserError: the weights are not those of this policy and critic.
        """
        wanted = weights_to_load(self, state_dict, self._fitting)
        return super().load_state_dict(wanted, strict=False, assign=assign)

    def resume_state(self) -> dict[str, Any]:
        """What changes while training beside weights, optimizer and scheduler, as plain data; of this rank."""
        return {
            "version": self.policy_version,
            "algorithm": self.algorithm.state_dict(),
            "random": [random_states()],
            "no_updates": self._no_updates.state_dict(),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the format and what export needs."""
        checkpoint["rlmt"] = {
            "policy": loading.absolute_path(self.policy_path),
            **adapter_state(self._policy, self.quantization),
            "format": self.format.to_dict(),
            **self.resume_state(),
        }
        save_assets_beside_checkpoints(self.trainer, self._policy.config, self.tokenizer, self.format)

    def check_checkpoint(self, checkpoint: Mapping[str, Any], fitting: bool) -> None:
        """Refuses a checkpoint of something else, of another format, adapter or kind of objective; reads no weights.

        Args:
            checkpoint: as loaded.
            fitting: whether training is to go on from it.

        Raises:
            UserError: it is one.
        """
        saved = rlmt_state(checkpoint, "RLMTModule")
        self.check_format(ThinkingFormat.from_dict(saved["format"]), "--ckpt_path")
        check_adapter_state(saved, adapter_config_for(self.policy_config, self.lora), self.quantization)
        if fitting:
            check_has_critic(self, checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on from a checkpoint.

        Raises:
            UserError: as `check_checkpoint`.
        """
        self.check_checkpoint(checkpoint, self._fitting)
        saved = checkpoint["rlmt"]
        self.policy_version = saved["version"]
        if self._fitting:
            self._no_updates.load_state_dict(saved["no_updates"])
            self.algorithm.load_state_dict(saved["algorithm"])
            restore_random_states(saved["random"])
