"""Silences output of libraries that describes intended behaviour or that no user can act on."""

from __future__ import annotations

import logging
import os
import sys
import warnings

_WARNINGS = (
    ".*does not have many workers.*",  # data loaders only yield text; the engine generates in other processes
    ".*module\\(s\\) in eval mode at the start of training.*",  # the reference and reward models stay in eval mode
    ".*Checkpoint directory .* exists and is not empty.*",  # resuming is the ordinary case
    ".*set_vital.*",  # deprecated in torch: torchdata's loader calls it
    ".*torch.distributed.reduce_op.*",  # deprecated in torch; libraries look at it while they inspect the module
    ".*torch.distributed.nn.functional.all_gather is deprecated.*",  # Lightning's all_gather calls it
    ".*treespec.*",  # deprecated in torch: Lightning's pytree helpers use LeafSpec
    ".*sync_dist=True.*when logging on epoch level.*",  # vLLM's process group of one rank is no distributed run
    "Total length of `list` across ranks is zero.*",  # a run may have no validation prompts
    "Using ModelCheckpoint with manual optimization.*",  # rlmt saves the state after the optimizer step, as intended
)
"""Messages of warnings, as regular expressions."""

_ERRORS_ONLY = (
    "bitsandbytes.backends.cpu.ops",  # at import: an optional kernel of the hub is not installed
    "vllm.triton_utils.importing",  # at import on CPU: Triton is installed, but has no CPU backend
)
"""Loggers whose warnings are silenced."""

_LIGHTNING_INFO = (
    "💡 Tip: ",  # advertises packages: litlogger, litmodels
    "TPU available",  # rlmt does not run on TPUs
    "that has Tensor Cores",  # advises a call in Python; --trainer.precision sets how a run multiplies
)
"""Parts of Lightning's info messages that are silenced; its other ones report on the run."""


def silence_third_party() -> None:
    """Filters logs and warnings of libraries; to be called before the libraries are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warns after a fork otherwise
    # Warnings that C++ code prints on stderr, past Python's filters and through the progress bar, such as vLLM's on
    # the NUMA nodes to which it binds memory. Set before torch is imported; errors are still printed.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.stderr.isatty():  # progress bars of loading and saving, which garble log files
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _ERRORS_ONLY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Lightning's and Fabric's rank_zero_info share a logger: that of the module which is imported last.
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_reports_on_the_run)


def _reports_on_the_run(record: logging.LogRecord) -> bool:
    """Whether an info message of Lightning is to be printed."""
    return not any(part in record.getMessage() for part in _LIGHTNING_INFO)
