"""The RL module: policy, reference and reward models around one objective. `training_step` is the algorithm."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlmt.algorithms import Algorithm
from rlmt.annotations import PreTrainedModel
from rlmt.distributed import collectives
from rlmt.distributed.collectives import all_gather_object, rank_hook
from rlmt.distributed.fsdp2 import full_tensor, rank_0_loads_for, shard_models
from rlmt.distributed.rank_0_loading import load_on_rank_0
from rlmt.formats.thinking import FormatName, ThinkingFormat
from rlmt.models import loading
from rlmt.models.adapters import adapter_weights, base_tensors, trainable_parameters, use_adapter
from rlmt.models.critic import Critic, build_critic, check_critic
from rlmt.models.logprobs import compute_logprobs, compute_values
from rlmt.models.quantization import dequantize
from rlmt.modules import checks
from rlmt.modules.base import PolicyMixin, TrainingModule
from rlmt.modules.checkpoints import check_has_critic, weights_to_load
from rlmt.modules.dynamic_sampling import resample
from rlmt.modules.metrics import PROGRESS_BAR, StepTimer, evaluation_values, step_metrics
from rlmt.modules.offline_rollouts import add_reference_logprobs, check_offline_rollouts
from rlmt.modules.scoring import ScoringMixin
from rlmt.modules.skipped_steps import SkippedSteps
from rlmt.modules.update import PolicyUpdate, has_no_learning_signal
from rlmt.options import FiniteFloat, PositiveInt, check_ranges
from rlmt.rewards.base import Reward, all_rewards, load_running_states, running_states, set_template_date
from rlmt.rewards.classifier import shardable_models
from rlmt.rewards.held_out import HeldOutRewards
from rlmt.rewards.scoring import MalformedMode, check_inputs
from rlmt.types import AdapterWeights, Experience, PromptBatch


class RLMTModule(ScoringMixin, PolicyMixin, TrainingModule):  # type: ignore[misc] # Lightning's load_from_checkpoint
    """Trains a policy on rollouts against a reward that never sees its thoughts.

    Args:
        policy: Folder or hub name of the initial policy; `{format}` in it stands for the format's name.
        reward: Scores the responses.
        algorithm: The objective, such as GRPO.
        format: How thoughts are written: think, no_think, zero_think, zero_no_think, or a ThinkingFormat with options.
        malformed: How a malformed completion is scored: `penalty` gives it `malformed_reward`, `null` scores the text
            "[NULL]" in its place (the paper's strict mode), `score_all` scores all of it, thought included (the paper's
            non-strict mode).
        malformed_reward: Reward of a malformed completion under `penalty`; at most the lowest well-formed one.
        max_skipped: Maximum number of consecutive optimizer steps skipped for a non-finite loss or gradient before the
            run stops.
        max_idle: Maximum number of consecutive rollout batches without a learning signal before the run stops: all
            samples are malformed, or the rewards of each prompt's samples are equal. Such a batch changes nothing.
        held_out_rewards: Rewards not trained on, for responses to validation and test prompts; logged as `val/<name>`.
        dropout: Whether the dropout of the config is active in the update; the first ratio is then not 1.
        **options: Those of `TrainingModule`. The reference of a LoRA run is the policy without its adapter.

    Raises:
        UserError: An option is out of range, or, during setup, does not fit the models or the data.
    """

    kind = "RLMTModule"
    saved = ("policy.", "critic.")

    def __init__(
        self,
        policy: str,
        reward: Reward,
        algorithm: Algorithm,
        format: FormatName | ThinkingFormat = "think",  # noqa: A002 - the option's name
        malformed: MalformedMode | None = "penalty",
        malformed_reward: FiniteFloat = -10.0,
        max_skipped: PositiveInt = 5,
        max_idle: PositiveInt = 50,
        held_out_rewards: list[Reward] | None = None,
        dropout: bool = False,
        **options: Any,
    ) -> None:
        check_ranges(RLMTModule, locals())
        super().__init__(**options)
        self.configured_format = format if isinstance(format, ThinkingFormat) else ThinkingFormat(format)
        self.policy_path = policy.replace("{format}", self.configured_format.name)
        self.reward = reward
        self.held_out = HeldOutRewards(held_out_rewards or ())
        set_template_date(nn.ModuleList([self.reward, self.held_out]), self.configured_format.date)
        self.algorithm = algorithm
        self.malformed: MalformedMode = malformed or "null"  # YAML reads the bare word null as None
        self.malformed_reward, self.dropout = malformed_reward, dropout
        self.policy_version = 0
        self.policy: PreTrainedModel | None = None
        self.reference: PreTrainedModel | None = None
        self.critic: Critic | None = None
        self._update = PolicyUpdate(algorithm, self.tokens_per_micro_batch, self.max_grad_norm)
        self._skipped_steps, self._timer = SkippedSteps(max_skipped, max_idle), StepTimer()
        self._loaded = list[Reward | HeldOutRewards]()

    # One step ---------------------------------------------------------------------------------------------------------

    def training_step(self, prompts: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """One step of the algorithm on a batch of prompts.

        Returns:
            `experience`, all samples that were generated, and the `metrics` of this rank, for callbacks.
        """
        began, rates = time.perf_counter(), self.learning_rates("policy/lr", *["critic/lr"] * (self.critic is not None))
        experience = generated = self.split(self.data.generate(prompts))
        if self.ask(experience) and not (self.algorithm.selects or self.algorithm.dynamic_sampling):
            self._add_logprobs(experience)  # while the requests of the rewards are answered
        self.score(experience)
        if self.algorithm.dynamic_sampling:
            generated, experience = resample(generated, self.algorithm.dynamic_sampling, self._generate_more)
        scored = time.perf_counter()
        if any(all_gather_object(len(experience.rollouts))):
            self.algorithm.select(experience)
            self._add_logprobs(experience)
            self.algorithm.prepare(experience)
            metrics = self._update_policy(experience)
        else:
            metrics = self._skip_batch(generated)
        # The update's metrics are those of all ranks; a rank without pairs has none of its own.
        metrics = step_metrics(generated, experience) | rates | metrics | self._timer.step(began, scored, generated)
        self.log_step(metrics, len(generated.rollouts), PROGRESS_BAR)
        return {"experience": generated, "metrics": metrics}

    def _generate_more(self) -> Experience:
        """Rollouts for the next batch of prompts, scored, for dynamic sampling."""
        return self.score(self.split(self.data.generate(self.data.next_prompts())))

    def _add_logprobs(self, experience: Experience) -> None:
        """Adds the log-probs and values from before the update that the objective requires, once."""
        rollouts, budget = experience.rollouts, self.tokens_per_micro_batch
        if self.algorithm.needs_reference and experience.ref_logprobs is None:
            experience.ref_logprobs = self._reference_logprobs(experience)
        several_steps = self.algorithm.update_epochs * self.algorithm.minibatches > 1
        needs_old = self.algorithm.needs_old_logprobs or (several_steps and experience.pairs is None)
        if needs_old and experience.old_logprobs is None:
            experience.old_logprobs = compute_logprobs(self.trained_model, rollouts, budget, self.device)
        if self.critic is not None and experience.values is None:
            experience.values = compute_values(self.critic, rollouts, budget, self.device)

    def _reference_logprobs(self, experience: Experience) -> Tensor:
        rollouts = experience.rollouts
        if rollouts.ref_logprobs is not None:
            return rollouts.ref_logprobs.to(self.device)
        model = self.trained_model if self.reference is None else self.reference
        samples = None if experience.pairs is None else experience.pairs.flatten().tolist()
        temperature = self.algorithm.logprob_temperature
        with use_adapter(model, None):
            return compute_logprobs(model, rollouts, self.tokens_per_micro_batch, self.device, temperature, samples)

    def _update_policy(self, experience: Experience) -> dict[str, float]:
        """Takes the objective's optimizer steps, or none on a batch without a learning signal."""
        if all(all_gather_object(has_no_learning_signal(experience, self.critic))):
            return self._skip_batch(experience)
        optimizer, model = self.optimizers(), self.trained_model
        assert not isinstance(optimizer, list)
        steps = self._update.steps(
            model, experience, self.policy_version, self.accumulate_gradient, self.critic, self._critic_only
        )
        for step in steps:
            if step.problem is None:
                updates_policy = not self._critic_only()
                self.optimizer_step_and_schedule()
                self.policy_version += updates_policy
                self._skipped_steps.reset()
            elif reason := self._skipped_steps.skip_step(step.problem, self.policy_version):
                raise collectives.user_error_on_all_ranks(reason)
            optimizer.zero_grad()
        return self._update.metrics()

    def _critic_only(self) -> bool:
        """Whether the critic still warms up, so that the next optimizer step leaves the policy unchanged."""
        options = self.algorithm.critic
        return options is not None and self.global_step < options.warmup_steps

    def _skip_batch(self, experience: Experience) -> dict[str, float]:
        if reason := self._skipped_steps.skip_batch(experience, self.policy_version):
            raise collectives.user_error_on_all_ranks(reason)
        return {"policy/skipped": 1.0}

    # Held-out prompts -------------------------------------------------------------------------------------------------

    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Generates and scores rollouts for validation prompts."""
        return self._evaluate(prompts, "val")

    def test_step(self, prompts: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Generates and scores rollouts for test prompts."""
        return self._evaluate(prompts, "test")

    def predict_step(self, prompts: PromptBatch, batch_idx: int) -> dict[str, Experience]:
        """Generates and scores rollouts, for a callback to write."""
        return {"experience": self.score(self.split(self.data.generate(prompts)))}

    def _evaluate(self, prompts: PromptBatch, stage: str) -> dict[str, Any]:
        """Logs means over held-out samples; returns them with scores and `values` of each sample, for callbacks."""
        experience, held_out = self.evaluate(prompts)
        values = evaluation_values(experience) | {name: scores.total for name, scores in held_out.items()}
        for name, of_samples in values.items():
            if any(all_gather_object(count := len(of_samples))):
                mean, on_bar = float(of_samples.sum() / max(1, count)), name == "reward_mean"  # NCCL has no CPU tensors
                self.log(f"{stage}/{name}", mean, batch_size=count, sync_dist=True, prog_bar=on_bar)
        return {"experience": experience, "held_out": held_out, "values": values}

    # Setup ------------------------------------------------------------------------------------------------------------

    @rank_hook
    def setup(self, stage: str) -> None:
        """Checks the configuration before any weights are loaded.

        Raises:
            UserError: Trainer, policy, rewards, adapter, objective and data do not fit each other.
        """
        data, engines = self.data, [engine for engine in (self.data.engine, self.data.val_engine) if engine is not None]
        checks.check_trainer(self.trainer)
        checks.check_sharded_run(self.trainer, self.algorithm.critic, engines)
        loading.check_policy(self.policy_config, self.policy_path)
        self.reward.check()
        self.held_out.check(self.reward)
        check_inputs(nn.ModuleList([self.reward, self.held_out]), self.malformed, data.extra_columns)
        self.check_model_options(self.policy_config, self.policy_path)
        checks.check_engines(engines, self.policy_config, self.planned_adapter_config())
        if stage != "fit":
            return
        if self.algorithm.critic is not None:
            check_critic(self.algorithm.critic.init, self.policy_path, self.tokenizer, self.attn_implementation)
        self.algorithm.check(data.group_size)
        checks.check_minibatches(self.algorithm.minibatches, data.batch_size, self.trainer.world_size)
        checks.check_held_out(self.held_out.names, bool(data.val_dataloader()))
        if data.offline_rollouts is not None:
            check_offline_rollouts(data.offline_rollouts, self.policy_config, self.algorithm)

    @rank_hook
    def configure_model(self) -> None:
        """Loads policy, reference, critic and reward models, and shards them under FSDP2.

        With LoRA the policy without its adapter is the reference. For offline rollouts the reference log-probs are
        computed here, and there is no reference model. Lightning restores a checkpoint after this hook, so a resumed
        run computes them with the initial policy, too.
        """
        self.check_restored()
        with rank_0_loads_for(self.trainer):
            if self.policy is None:
                self._load_models()
            self._load_rewards()

    def _load_models(self) -> None:
        self.policy, self.reference, self.critic = load_on_rank_0(self._read_models)
        self.set_training_mode(self.policy)
        if self.critic is not None:
            self.set_training_mode(self.critic.backbone)
        self.add_kernels(self.policy, self.reference, self.critic)
        shard_models(self.trainer, self.policy, self.reference, self.critic)
        if self.fitting and self.algorithm.needs_reference and self.data.offline_rollouts is not None:
            budget, rollouts = self.tokens_per_micro_batch, self.data.offline_rollouts
            add_reference_logprobs(rollouts, self.policy, self.algorithm, self.trainer, self.data.temperature, budget)

    def _read_models(self) -> tuple[PreTrainedModel, PreTrainedModel | None, Critic | None]:
        """Loads the policy, the reference and the critic."""
        dtype, reference, critic = checks.weights_dtype(self.trainer, self.lora), None, None
        policy = loading.load_policy(self.policy_path, dtype, self.attn_implementation, self.quantization)
        if self.lora is not None:
            self.lora.add_to(policy)
        elif self.fitting and self.algorithm.needs_reference and self.data.offline_rollouts is None:
            reference = loading.frozen_copy(policy, self.compute_dtype)
        if self.fitting and (options := self.algorithm.critic) is not None:
            critic = build_critic(policy, options.init, options.shared, self.lora, self.attn_implementation)
        return policy, reference, critic

    def _load_rewards(self) -> None:
        """Loads and shards the rewards that are not loaded yet; prediction needs no held-out ones."""
        both: tuple[Reward | HeldOutRewards, ...] = (self.reward, self.held_out)
        wanted = both[:1] if self.trainer.state.fn == "predict" else both
        unloaded = [rewards for rewards in wanted if rewards not in self._loaded]
        for rewards in unloaded:
            rewards.load()
            self.add_kernels(rewards)
            shard_models(self.trainer, *shardable_models(rewards), autocast=False)
        self._loaded += unloaded

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The policy's parameters, and the critic's with a learning rate of their own."""
        groups: list[dict[str, Any]] = [{"params": trainable_parameters(self.trained_model)}]
        if self.critic is not None and self.algorithm.critic is not None:
            groups.append({"params": trainable_parameters(self.critic), "lr": self.algorithm.critic.lr})
        return groups

    @property
    def optimizer_steps(self) -> int:
        """`--trainer.max_steps`: how many steps a rollout takes is the objective's choice."""
        return self.trainer.max_steps

    def on_train_start(self) -> None:
        """Starts the clock of the first step."""
        super().on_train_start()
        self._timer.start()

    def teardown(self, stage: str) -> None:
        """Closes the connections of rewards."""
        for reward in all_rewards(self):
            reward.close()

    def on_validation_start(self) -> None:
        """Stops the clock."""
        self._timer.pause()

    def on_validation_end(self) -> None:
        """Resumes the clock."""
        self._timer.resume()

    # The policy, for the data module ----------------------------------------------------------------------------------

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the policy's forward pass, for the engine to compute in the same."""
        return torch.bfloat16 if self.trainer.precision == "bf16-mixed" else torch.float32

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The unsharded weights under their Hugging Face names; with an adapter those of the frozen base."""
        for name, tensor in base_tensors(self.trained_model).items():
            yield name, full_tensor(dequantize(tensor))

    def policy_adapter(self) -> AdapterWeights | None:
        """The adapter of the policy; None where all parameters are trained."""
        return adapter_weights(self.trained_model)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads the policy, and the critic to resume training; a missing or unknown weight is an error.

        Raises:
            UserError: The weights are not those of this policy and critic.
        """
        if self.fitting:
            check_has_critic(state_dict, self.algorithm)
        weights = weights_to_load(state_dict, self.state_dict().keys(), self.policy_path, self.fitting)
        return super().load_state_dict(weights, strict=False, assign=assign)

    def resume_state(self) -> dict[str, Any]:
        """Policy version, states of objective and rewards, counts of skipped steps, besides the random states."""
        return {
            "version": self.policy_version,
            "algorithm": self.algorithm.state_dict(),
            "rewards": running_states(self.reward),
            "no_updates": self._skipped_steps.state_dict(),
            **super().resume_state(),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the format and what `rlmt export` requires."""
        policy = {"policy": loading.absolute_path(self.policy_path), "format": self.format.to_dict()}
        checkpoint["rlmt"] = policy | self.checkpoint_state()
        self.save_assets_beside_checkpoints(self.trainer)

    def check_checkpoint(self, checkpoint: Mapping[str, Any], fitting: bool) -> None:
        """Checks a checkpoint's module, adapter, format and critic. Loads no weights.

        Args:
            checkpoint: The loaded checkpoint.
            fitting: Whether training is resumed from it.

        Raises:
            UserError: One of them is not this run's.
        """
        super().check_checkpoint(checkpoint, fitting)
        self.check_format(ThinkingFormat.from_dict(checkpoint["rlmt"]["format"]), "--ckpt_path")
        if fitting:
            check_has_critic(checkpoint["state_dict"], self.algorithm)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the state of a checkpoint.

        Raises:
            UserError: As `check_checkpoint`.
        """
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["rlmt"]
        self.policy_version = saved["version"]
        if self.fitting:
            self._skipped_steps.load_state_dict(saved["no_updates"])
            self.algorithm.load_state_dict(saved["algorithm"])
            load_running_states(self.reward, saved.get("rewards", {}))  # not in checkpoints of 0.2
