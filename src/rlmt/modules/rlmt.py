"""The RL module: policy, reference and reward models around one objective."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

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
from rlmt.models.adapters import own_parameters
from rlmt.models.critic import Critic
from rlmt.modules.checkpoints import check_same_format, record_of, save_beside_checkpoints
from rlmt.modules.update import PolicyUpdate, first_pass, first_values
from rlmt.rewards import Reward
from rlmt.rewards.scoring import MalformedMode, score
from rlmt.rng import random_states, restore_random_states
from rlmt.thinking import FormatName, ThinkingFormat
from rlmt.types import Experience, RolloutBatch

OptimizerCallable = Callable[[Any], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]

PRECISIONS = ("32-true", "bf16-mixed")
"""Weights are float32 in both; Lightning's other precisions cast all of the module, positions and reward included."""


_TRAINED = ("policy.", "critic.")
"""Submodules whose weights are in a checkpoint."""


class RLMTModule(LightningModule):
    """Trains a policy on rollouts against a reward that never sees its thoughts.

    Args:
        policy: folder or hub name of the policy to start from.
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
        self.policy_path = policy
        self.reward = reward
        self.algorithm = algorithm
        self.format = format if isinstance(format, ThinkingFormat) else ThinkingFormat(format)
        self.malformed: MalformedMode = malformed or "null"  # YAML reads the bare word null as nothing
        self.malformed_reward = malformed_reward
        self.max_skipped = max_skipped
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
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
        """The policy's weights under their Hugging Face names; tied ones under both."""
        # state_dict and not named_parameters: the latter names tied weights once, and an engine's head would go stale.
        return iter(self._policy.state_dict().items())

    # Setting up -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Looks for mistakes that can be seen before any weights are read."""
        self._check_trainer()
        self.format.check(self.tokenizer, self.policy_path)
        loading.check_head(self.policy_config, self.policy_path)
        self.reward.check()
        if stage == "fit":
            data: Any = getattr(self.trainer, "datamodule", None)
            if data is not None:
                self.algorithm.check(data.group_size)
                self._check_minibatches(data.batch_size)

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

    def configure_model(self) -> None:
        """Loads the policy, the reference (a frozen copy, only if the objective wants it) and the reward."""
        if self.policy is not None:
            return
        self.policy = loading.load_policy(self.policy_path, "float32", attn_implementation=self.attn_implementation)
        fitting = self.trainer.state.fn == "fit"
        if fitting and self.algorithm.needs_reference:
            self.reference = copy.deepcopy(self.policy).requires_grad_(False).train(False)
        self.policy.train(fitting)
        if fitting and self.gradient_checkpointing:
            self.policy.gradient_checkpointing_enable({"use_reentrant": False})
        self.reward.load()

    def configure_optimizers(self) -> Any:
        """The optimizer over what can be trained, and the scheduler if there is one."""
        groups: list[dict[str, Any]] = [{"params": own_parameters(self._policy)}]
        if self.critic is not None and self.algorithm.critic is not None:
            groups.append({"params": own_parameters(self.critic), "lr": self.algorithm.critic.lr})
        optimizer = self._optimizer(groups)
        if self._scheduler is None:
            return optimizer
        scheduler = self._scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise UserError("--model.scheduler ReduceLROnPlateau wants a metric at each step: use one of steps.")
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    @property
    def _policy(self) -> PreTrainedModel:
        assert self.policy is not None, "configure_model has not run"
        return self.policy

    # One step ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Any]:
        """Scores one rollout batch and takes the objective's optimizer steps on it.

        Returns:
            `experience`, and `metrics`: floats under their final names.
        """
        start = time.perf_counter()
        experience = self.experience(batch)
        scored = time.perf_counter()
        updates = self.algorithm.update_epochs * self.algorithm.minibatches
        budget = self._update.tokens_per_micro_batch
        if self.algorithm.needs_reference:
            experience.ref_logprobs = self._reference_logprobs(batch)
        if updates > 1 or self.algorithm.needs_old_logprobs:
            experience.old_logprobs = first_pass(self._policy, batch, budget, self.device)
        if self.critic is not None:
            experience.values = first_values(self.critic, batch, budget, self.device)
        self.algorithm.prepare(experience)
        metrics = self._take_steps(experience)
        metrics |= {"engine/weight_version": float(batch.weight_version)}
        metrics |= {f"time/{phase}_s": seconds for phase, seconds in batch.seconds.items()}
        metrics |= {"time/reward_s": scored - start, "time/update_s": time.perf_counter() - scored}
        return {"experience": experience, "metrics": metrics | experience.metrics}

    def _reference_logprobs(self, batch: RolloutBatch) -> Tensor:
        if batch.ref_logprobs is not None:
            return batch.ref_logprobs.to(self.device)
        assert self.reference is not None
        return first_pass(self.reference, batch, self._update.tokens_per_micro_batch, self.device)

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
        return {"experience": experience}

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The policy's and the critic's weights only: the reference and the reward are read again."""
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if name.startswith(_TRAINED)}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads a policy; a missing or unknown weight of it is an error.

        Raises:
            UserError: the weights are not those of this policy.
        """
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        wrong = [*result.unexpected_keys, *(k for k in result.missing_keys if k.startswith(_TRAINED))]
        if wrong:
            raise UserError(
                f"The checkpoint's weights do not fit the policy {self.policy_path} "
                f"({len(wrong)} differ, first {wrong[0]}); "
                "give --model.policy the model that the checkpoint was trained from."
            )
        return result

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the format and what export needs."""
        checkpoint["rlmt"] = {
            "policy": self.policy_path,
            "format": self.format.to_dict(),
            "version": self.policy_version,
            "algorithm": self.algorithm.state_dict(),
            "random": random_states(),
        }
        save_beside_checkpoints(self.trainer, self._policy.config, self.tokenizer, self.format)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of something else or of another format.

        Raises:
            UserError: it is one.
        """
        saved = record_of(checkpoint, "RLMTModule")
        self.check_format(ThinkingFormat.from_dict(saved["format"]), "--ckpt_path")
        self.policy_version = saved["version"]
        if self.trainer.state.fn == "fit":
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
