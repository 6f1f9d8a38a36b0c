"""The two policies, and their completions for the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlmt.checkpointing.provenance import versions
from rlmt.engines import Engine
from rlmt.errors import UserError
from rlmt.evaluation.benchmark import Item
from rlmt.evaluation.compare.pairs import Pair
from rlmt.evaluation.generation import GenerationSettings, generate
from rlmt.evaluation.models import Model, resolve_models
from rlmt.formats.thinking import FormatName
from rlmt.types import Prompt, Split


@dataclass(frozen=True)
class Policies:
    """Two policies and how they generate."""

    models: Sequence[Model]
    """A and B."""
    settings: GenerationSettings
    """Sampling parameters and seed, the same for both."""
    engine: Engine | None
    """Engine; None is the default one."""

    @classmethod
    def resolve(
        cls,
        a: str,
        b: str,
        format: FormatName | None,
        settings: GenerationSettings,
        engine: Engine | None,  # noqa: A002
    ) -> Policies:
        """Finds both models; no weights are loaded.

        Args:
            a: Model, as `resolve_models` takes it.
            b: The other one.
            format: Thinking format of models that do not store one.
            settings: Sampling parameters and seed.
            engine: Engine; None is the default one.

        Raises:
            UserError: A model cannot be found, or both are the same.
        """
        models = resolve_models([a, b], format)
        if models[0].fingerprint == models[1].fingerprint:
            raise UserError(f"{b}: has the weights of {a}; compare two models.")
        return cls(models, settings, engine)

    @property
    def names(self) -> tuple[str, str]:
        """Names of A and B in tables."""
        return self.models[0].name, self.models[1].name

    def generate(self, prompts: Sequence[Prompt], out: Path, yes: bool) -> list[Pair]:
        """Generates what is missing of both policies' completions, with the same seed for both.

        Args:
            prompts: The prompts.
            out: Output folder.
            yes: Ask a model behind an endpoint without a question about the cost.

        Returns:
            One pair per prompt.

        Raises:
            UserError: See `rlmt.evaluation.generation.generate`.
        """
        items = [Item(str(prompt.index), prompt.messages) for prompt in prompts]
        splits = []
        for model in self.models:
            completions = generate(model, items, out / "completions" / model.name, self.settings, self.engine, yes)
            splits.append([Split(each.thought, each.response, each.status) for each in completions])
        return [Pair(*row) for row in zip(prompts, *splits, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """What the completions depend on, as JSON values."""
        models = [{"name": m.name, "source": m.source, "fingerprint": m.fingerprint} for m in self.models]
        return {"models": models, "generation": asdict(self.settings), "versions": versions()}
