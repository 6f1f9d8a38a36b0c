"""Classes of transformers and PEFT for annotations alone: importing these libraries takes longer than all of rlmt.

A command that only reads its options needs neither. Blocks under `TYPE_CHECKING` in the modules that use these names
would not do, since jsonargparse executes such blocks of the modules whose classes it inspects. So the names stand here:
type checkers see the classes, and running code sees `Any`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
else:
    LoraConfig = PretrainedConfig = PreTrainedModel = PreTrainedTokenizerBase = Any

__all__ = ["LoraConfig", "PreTrainedModel", "PreTrainedTokenizerBase", "PretrainedConfig"]
