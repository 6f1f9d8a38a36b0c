"""Reference log-probs of recorded samples, computed once and kept in a file beside the samples.

A reference that is never asked about new samples need not stay in memory: its log-probs are taken before training
starts, while the policy is still the initial one, and read back by every later run that wants the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rlmt.engines.offline_rollouts import OfflineRollouts
from rlmt.errors import UserError
from rlmt.models.logprobs import compute_logprobs
from rlmt.types import Prompt, RolloutBatch, Sampling

_GROUPS = 32
"""Groups that go through the model between two ticks of the progress bar."""
_PROBES = 1024
"""Elements of each weight that enter a fingerprint one by one."""


def reference_logprobs(
    recording: OfflineRollouts,
    reference: PreTrainedModel,
    temperature: float,
    precision: str,
    budget: int,
    device: torch.device,
    progress: bool,
    write: bool,
) -> Tensor:
    """Log-probs of all recorded samples under the reference, read from the file beside them or computed and put there.

    The file's name tells the samples' tokens, the reference's weights, temperature and precision, so one of other
    samples or of another model is never read. It is written whole or not at all.

    Args:
        recording: the samples.
        reference: the model, in eval mode, on `device`.
        temperature: log-probs are taken at it.
        precision: the trainer's, as in bf16-mixed.
        budget: tokens, padding included, in one forward.
        device: where the model is.
        progress: whether to show a progress bar.
        write: whether this process writes the file.

    Returns:
        [T] float32 on the CPU.

    Raises:
        UserError: the file is damaged or cannot be written.
    """
    key = f"{recording.digest}/{fingerprint(reference)}/{temperature!r}/{precision}"
    path = _beside(recording.path, blake2b(key.encode(), digest_size=8).hexdigest())
    if path.is_file():
        rank_zero_info(f"reference log-probs of {len(recording):,} recorded samples: read from {path}")
        return _read(path, len(recording.completion_ids))
    rank_zero_info(f"reference log-probs of {len(recording):,} recorded samples: computed once, for {path}")
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        if write:
            _write({}, unfinished)  # now, since a folder that cannot be written to would cost the whole computation
        logprobs = _compute(recording, reference, temperature, budget, device, progress)
        if write:
            _write({"logprobs": logprobs}, unfinished)
            unfinished.replace(path)
    finally:
        if write:
            unfinished.unlink(missing_ok=True)
    return logprobs


def _compute(
    recording: OfflineRollouts,
    reference: PreTrainedModel,
    temperature: float,
    budget: int,
    device: torch.device,
    progress: bool,
) -> Tensor:
    parts = []
    with tqdm(total=len(recording), desc="reference", unit="sample", disable=not progress) as bar:
        for rollouts in _batches(recording, temperature):
            parts.append(compute_logprobs(reference, rollouts, budget, device).cpu())
            bar.update(len(rollouts))
    return torch.cat(parts)


def fingerprint(model: PreTrainedModel) -> str:
    """Tells a model's weights from all others, in a fraction of the time that it takes to read them from a disk.

    Of each weight its name, kind and shape enter, the sum of all its bits taken as integers, which is the same in any
    order, and the bits of elements evenly spread over it.
    """
    digest = blake2b(digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        width = weight.element_size()
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
        bits = weight.detach().contiguous().view(-1).view(whole)
        spread = bits[:: max(1, bits.numel() // _PROBES)]
        digest.update(str(int(bits.sum(dtype=torch.int64))).encode())
        digest.update(spread.cpu().numpy().tobytes())
    return digest.hexdigest()


def _beside(recorded: str, key: str) -> Path:
    path = Path(recorded)
    name = f"reference-{key}.safetensors"
    return path / name if path.is_dir() else path.with_name(f"{path.stem}.{name}")


def _batches(recording: OfflineRollouts, temperature: float) -> Iterator[RolloutBatch]:
    """All recorded samples in their order, in batches of groups of one size."""
    sampling = Sampling(temperature, max_new_tokens=1)
    for size, same in groupby(range(len(recording.groups)), lambda group: len(recording.groups[group])):
        groups = list(same)
        for start in range(0, len(groups), _GROUPS):
            part = groups[start : start + _GROUPS]
            rows = [row for group in part for row in recording.groups[group]]
            spans = [slice(recording.starts[row], recording.starts[row + 1]) for row in rows]
            yield RolloutBatch(
                prompts=[Prompt(group, []) for group in part],
                group_size=size,
                prompt_ids=[recording.prompt_ids[group].tolist() for group in part],
                completion_ids=[recording.completion_ids[span].tolist() for span in spans],
                engine_logprobs=torch.empty(0),
                finish=[recording.finish[row] for row in rows],
                sampling=sampling,
                weight_version=0,
            )


def _read(path: Path, tokens: int) -> Tensor:
    try:
        logprobs = load_file(path).get("logprobs")
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and it is computed again") from error
    if logprobs is None or logprobs.shape != (tokens,):
        raise UserError(f"{path} does not hold the reference log-probs of these samples: delete it")
    return logprobs


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path.parent} cannot be written to ({error}), and reference log-probs are kept there, by the samples: "
            "copy the samples to a folder of your own"
        ) from error
