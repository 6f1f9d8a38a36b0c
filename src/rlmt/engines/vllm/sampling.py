"""How vLLM in the trainer's process is asked for one sample."""

from __future__ import annotations

from typing import Any

from rlmt.types import Sampling


def sampling_params(sampling: Sampling, seed: int, space: int) -> Any:
    """Makes the SamplingParams of one sample.

    Args:
        sampling: temperature, limits and stops; nothing else ends a sample, not even the end-of-text token.
        seed: of this sample.
        space: tokens that fit behind its prompt.
    """
    from vllm import SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=seed,
        max_tokens=min(sampling.max_new_tokens, space),
        stop=list(sampling.stop) or None,
        include_stop_str_in_output=True,
        stop_token_ids=list(sampling.stop_token_ids) or None,
        ignore_eos=True,
        detokenize=bool(sampling.stop),
        skip_special_tokens=False,
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,
    )
