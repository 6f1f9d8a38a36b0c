"""What the RL module does with recorded samples, where an engine replays them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from transformers import PretrainedConfig, PreTrainedModel

from rlmt.algorithms import Algorithm
from rlmt.engines import ReplayEngine
from rlmt.engines.offline_rollouts import OfflineRollouts
from rlmt.modules.reference_cache import reference_logprobs


def offline_rollouts_of(trainer: Trainer) -> OfflineRollouts | None:
    """The recorded samples that take the place of fresh ones, if there are any; read when the data was set up."""
    engine = getattr(getattr(trainer, "datamodule", None), "engine", None)
    return engine.recording if isinstance(engine, ReplayEngine) else None


def check_offline_rollouts(recording: OfflineRollouts, config: PretrainedConfig, algorithm: Algorithm) -> None:
    """Tells the user whose samples these are, and what the objective makes of that.

    Args:
        recording: the samples.
        config: of the policy.
        algorithm: the objective.

    Raises:
        UserError: the policy's vocabulary is too small for them.
    """
    recording.check_vocabulary(config.get_text_config().vocab_size)
    rank_zero_info(
        f"rollouts were drawn by another policy ({recording.origin} of {recording.path}): "
        f"{algorithm.off_policy_correction}"
    )


def add_reference_logprobs(
    recording: OfflineRollouts, policy: PreTrainedModel, algorithm: Algorithm, trainer: Trainer, budget: int
) -> None:
    """Puts the reference's log-probs beside the recorded samples.

    Args:
        recording: the samples.
        policy: still as it was loaded, so that it is the reference itself; in eval mode.
        algorithm: the objective.
        trainer: with the data module and the device.
        budget: tokens, padding included, in one forward.
    """
    data: Any = getattr(trainer, "datamodule", None)
    device: torch.device = trainer.strategy.root_device
    model: Any = policy
    # Lightning makes new tensors on the GPU while it configures models; bookkeeping belongs on the CPU.
    with trainer.precision_plugin.forward_context(), torch.device("cpu"):
        recording.ref_logprobs = reference_logprobs(
            recording,
            model.to(device),
            algorithm.logprob_temperature or data.temperature,
            str(trainer.precision),
            budget,
            device,
            progress=trainer.progress_bar_callback is not None and trainer.is_global_zero,
            write=trainer.is_global_zero,
        )
