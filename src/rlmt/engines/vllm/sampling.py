"""Sampling settings in vLLM's terms, for the engine in this process and for its OpenAI-compatible server."""

from __future__ import annotations

import io
from typing import Any

from tqdm import tqdm

from rlmt import progress
from rlmt.types import Sampling


class SamplingProgress(tqdm):  # type: ignore[misc]
    """Reports how many samples vLLM has finished, in place of the progress bar that vLLM would print."""

    monitor_interval = 0  # starts no thread

    def __init__(self, *iterable: Any, **options: Any) -> None:
        super().__init__(*iterable, **options, file=io.StringIO())

    def update(self, n: float | None = 1) -> None:
        """Counts `n` more finished samples."""
        self.n += n or 0
        progress.report("sampling", self.n, self.total)


def sampling_params(sampling: Sampling, seed: int, room: int) -> Any:
    """Builds the `vllm.SamplingParams` of one sample.

    Args:
        sampling: Temperature, limits and stops; nothing else ends a sample, not even the end-of-text token.
        seed: Seed of this sample.
        room: Number of tokens that fit after its prompt.
    """
    from vllm import SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=seed,
        max_tokens=min(sampling.max_new_tokens, room),
        stop=list(sampling.stop) or None,
        include_stop_str_in_output=True,
        stop_token_ids=list(sampling.stop_token_ids) or None,
        ignore_eos=True,
        detokenize=bool(sampling.stop),
        skip_special_tokens=False,
        logprobs=0,  # of the sampled token only
        flat_logprobs=True,
    )


def completion_options(sampling: Sampling, seed: int, room: int) -> dict[str, Any]:
    """Builds the options of one sample for the OpenAI client's `completions.create`.

    Args:
        sampling: Temperature, limits and stops; nothing else ends a sample, not even the end-of-text token.
        seed: Seed of this sample.
        room: Number of tokens that fit after its prompt.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed,
        "max_tokens": min(sampling.max_new_tokens, room),
        "stop": list(sampling.stop),
        "logprobs": 0,  # of the sampled token only
        "extra_body": {
            "include_stop_str_in_output": True,
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": True,
            "skip_special_tokens": False,
            "return_token_ids": True,
        },
    }
