"""Runs of the `rlmt` command in benchmarks/gpu.py: small files, random weights made on the device, and a callback."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_models import Setup, quantize, random_model
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

from rlmt.cli.commands import main
from rlmt.demos.tiny import write_tiny
from rlmt.demos.tiny_models import Sizes
from rlmt.engines.rollout_files import rollout_table, write_rollouts
from rlmt.formats.resolve import resolve_format
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.assets import load_stop_token_ids
from rlmt.models.loading import load_tokenizer
from rlmt.models.quantization import NF4
from rlmt.types import Experience, FinishReason, Prompt, RolloutBatch, Sampling, Scores

AFTER_STEP: list[Callable[[Trainer, Any, dict[str, Any]], None]] = []
"""Called after each training step with the trainer, the module and the outputs of the step."""


class AfterStep(Callback):
    """Calls the functions in `AFTER_STEP`; the run's config names this class."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Calls the functions."""
        for function in AFTER_STEP:
            function(trainer, pl_module, outputs)


class KillAfter(Callback):
    """Kills the process after a training step and its checkpoint, as a lost machine would.

    Args:
        steps: Number of steps until then.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Kills the process."""
        if trainer.global_step == self.steps:
            os.kill(os.getpid(), signal.SIGKILL)


def tiny_folder(setup: Setup) -> Path:
    """A folder of `rlmt tiny` with small models, which is made once."""
    folder = setup.folder / "tiny"
    if not (folder / "reward" / "tokenizer.json").is_file():
        write_tiny(folder, sizes=Sizes(hidden=64, layers=2, heads=2, ffn=128, vocab=512, context=8192))
    return folder


def model_folders(setup: Setup, layers: int | None = None) -> tuple[Path, Path]:
    """Folders of a policy and a reward model of the configured shape, with tokenizers and without weights."""
    tiny = tiny_folder(setup)
    folders = setup.folder / f"policy-{layers}", setup.folder / f"reward-{layers}"
    for folder, name, options in zip(folders, ("policy", "reward"), ({}, {"num_labels": 1}), strict=True):
        tokenizer: Any = load_tokenizer(tiny / name)
        config = setup.config(layers, pad_token_id=tokenizer.pad_token_id, **options)
        config.architectures = ["LlamaForCausalLM" if name == "policy" else "LlamaForSequenceClassification"]
        config.dtype = setup.dtype
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


@dataclass(frozen=True)
class Replay:
    """Files of synthetic samples."""

    options: dict[str, object]
    """Options of a run that trains on them, a prompt at a time."""
    prompt: int
    """Tokens of the longest prompt."""
    completion: int
    """Tokens of every completion."""


def write_replay(setup: Setup, policy: Path, prompts: int, group_size: int, prompt_words: int, row: int) -> Replay:
    """Writes prompts, and a rollout file with synthetic samples of one length.

    Args:
        setup: Where to write.
        policy: Folder with the tokenizer.
        prompts: Number of prompts.
        group_size: Samples of a prompt.
        prompt_words: Words of a prompt, each a token or a few.
        row: Tokens of the longest prompt and a completion without its last token, as one row of a micro-batch.
    """
    rng, tokenizer = random.Random(0), load_tokenizer(policy)
    format = resolve_format(ThinkingFormat("no_think"), tokenizer, str(policy))
    readable = [t for t in range(len(tokenizer)) if str(tokenizer.decode([t])).strip().isalpha()]
    chats = [
        [{"role": "user", "content": str(tokenizer.decode(rng.choices(readable, k=prompt_words)))}]
        for _ in range(prompts)
    ]
    prompt_ids = [format.render(chat, tokenizer) for chat in chats]  # type: ignore[arg-type]
    longest = max(map(len, prompt_ids))
    completion = row + 1 - longest
    ids = [rng.choices(readable, k=completion) for _ in range(prompts * group_size)]
    texts = [format.decode(row, tokenizer) for row in ids]
    rollouts = RolloutBatch(
        prompts=[Prompt(number, chat) for number, chat in enumerate(chats)],  # type: ignore[arg-type]
        group_size=group_size,
        prompt_ids=prompt_ids,
        completion_ids=ids,
        engine_logprobs=torch.full((len(ids) * completion,), -1.0),
        finish=[FinishReason.LENGTH] * len(ids),
        sampling=Sampling(0.7, completion, format.stop, load_stop_token_ids(policy, tokenizer, format)),
        weight_version=0,
    )
    experience = Experience(
        rollouts=rollouts,
        texts=texts,
        splits=[format.split(text) for text in texts],
        thought_tokens=torch.zeros(len(ids), dtype=torch.long),
        scores=Scores(torch.zeros(len(ids)), {}, [None] * len(ids)),
        group=torch.arange(prompts).repeat_interleave(group_size),
        lengths=torch.full((len(ids),), completion),
        engine_logprobs=rollouts.engine_logprobs,
    )
    name = f"{policy.name}-{prompts}x{group_size}x{completion}"
    chats_file, rollouts_file = setup.folder / f"prompts-{name}.jsonl", setup.folder / f"rollouts-{name}.parquet"
    chats_file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    write_rollouts(rollout_table(experience, 0, format=format.to_dict()), rollouts_file)
    options = {
        "--model.policy": policy,
        "--data.prompts": chats_file,
        "--data.engine": "ReplayEngine",
        "--data.engine.path": rollouts_file,
        "--data.batch_size": 1,
        "--data.group_size": group_size,
        "--data.max_prompt_tokens": longest,
        "--data.max_new_tokens": completion,
    }
    return Replay(options, longest, completion)


@contextmanager
def random_weights(setup: Setup) -> Iterator[None]:
    """Inside, models have random weights, made on the device and quantized there, whatever their folder holds."""

    def build(path: str, dtype: Any, quantization: NF4 | None, auto: Any = None) -> PreTrainedModel:
        config: Any = LlamaConfig.from_pretrained(path)  # type: ignore[no-untyped-call]
        chosen = config.dtype if dtype == "auto" else dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
        model = random_model(config, setup.device, chosen, *([] if auto is None else [auto])).requires_grad_(True)
        if quantization is not None:
            quantize(model, quantization.double_quant)
            quantization.finish_loading(model)
        return model

    def load_policy(path: str, dtype: Any, attn_implementation: Any, quantization: NF4 | None) -> PreTrainedModel:
        return build(path, dtype, quantization)

    def load_classifier(source: str, dtype: Any, quantization: NF4 | None, attn_implementation: Any) -> PreTrainedModel:
        return build(source, dtype, quantization, AutoModelForSequenceClassification)

    policies = mock.patch("rlmt.models.loading.load_policy", load_policy)
    with policies, mock.patch("rlmt.rewards.classifier.load_classifier", load_classifier):
        yield


def fit(setup: Setup, name: str, configs: Sequence[str], options: dict[str, object], command: str = "fit") -> Path:
    """Runs `rlmt fit` with random weights, and returns its folder.

    Args:
        setup: Device and folder.
        name: Name of the run's folder.
        configs: Names of configs.
        options: Option → value.
        command: Another command of the Trainer.

    Raises:
        RuntimeError: The command failed.
    """
    sys.modules.setdefault("gpu_cli", sys.modules[__name__])
    common: dict[str, object] = {
        "--model.format": "no_think",
        "--data.val_size": 0,
        "--trainer.accelerator": "gpu" if setup.on_gpu else "cpu",
        "--trainer.default_root_dir": setup.folder / name,
        "--trainer.enable_progress_bar": "false",
        "--trainer.callbacks": '[{"class_path": "gpu_cli.AfterStep"}]',
    }
    words = [word for config in configs for word in ("--config", config)]
    words += [str(word) for pair in (common | options).items() for word in pair]
    try:
        with random_weights(setup):
            status = main([command, *words])
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()  # the next run may need another backend
        gc.collect()
        if setup.on_gpu:
            torch.cuda.empty_cache()
    if status:
        raise RuntimeError(f"rlmt {command} ended with status {status}")
    return setup.folder / name
