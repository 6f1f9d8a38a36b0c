"""Generates a model's completions of benchmark items, resumable at any moment.

The seed of a completion depends on the run's seed and the item, and items are generated in batches of fixed order. So a
run that was killed continues with the first unfinished batch, and its completions equal those of an uninterrupted run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from rlmt import progress
from rlmt.annotations import PreTrainedModel
from rlmt.checkpointing.provenance import versions
from rlmt.data.sampler import item_seed
from rlmt.endpoints.progress import RequestProgress, track_requests
from rlmt.engines import Engine, TransformersEngine, VLLMEngine
from rlmt.errors import UserError
from rlmt.evaluation.benchmark import Item
from rlmt.evaluation.completions import Completion, CompletionStore, read_completions
from rlmt.evaluation.endpoint_generation import ask_for_completions
from rlmt.evaluation.models import LocalModel, Model
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.adapters import base_tensors
from rlmt.models.loading import load_policy, max_positions, meta_model
from rlmt.options import NonNegativeFloat, PositiveInt, UnitIntervalAboveZero, check_ranges
from rlmt.types import SampleRequest, Samples, Sampling, Status

PAPER_TOKENS = {True: 8192, False: 4096}
"""Maximum new tokens in the paper's evaluation, by whether the model thinks."""


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are generated.

    Args:
        temperature: Sampling temperature; 0 is greedy decoding.
        top_p: Nucleus mass in (0, 1].
        max_new_tokens: Maximum number of tokens of thought and response together, the same for models with and without
            thoughts.
        seed: Seed; with the item it makes the seed of each completion.
        parity: `paper` replaces the options above, except for the seed, by the paper's: temperature 0.7, top_p 0.95,
            and 8,192 new tokens for models that think, 4,096 for others.
        batch_size: Number of completions generated and written together; a killed run repeats at most these.

    Raises:
        UserError: An option is out of range.
    """

    temperature: NonNegativeFloat = 0.7
    top_p: UnitIntervalAboveZero = 0.95
    max_new_tokens: PositiveInt = 8192
    seed: int = 42
    parity: Literal["paper"] | None = None
    batch_size: PositiveInt = 256

    def __post_init__(self) -> None:
        check_ranges(GenerationSettings, {**vars(self), "self": self})

    def sampling(self, format: ThinkingFormat, stop_token_ids: tuple[int, ...] = ()) -> Sampling:  # noqa: A002
        """The sampling parameters for a model of this format."""
        stops = format.stop, stop_token_ids
        if self.parity == "paper":
            return Sampling(0.7, PAPER_TOKENS[format.thinks], *stops, 0.95)
        return Sampling(self.temperature, self.max_new_tokens, *stops, self.top_p)


def default_engine() -> Engine:
    """VLLM with most of the GPU's memory if it is installed, else transformers."""
    if importlib.util.find_spec("vllm") is None:
        return TransformersEngine()
    return VLLMEngine(gpu_memory_utilization=0.9, sleep=False)


def generate(
    model: Model,
    items: Sequence[Item],
    path: Path,
    settings: GenerationSettings,
    engine: Engine | None = None,
    yes: bool = False,
) -> list[Completion]:
    """Generates the completions of items that are not in a folder yet, and returns all.

    Args:
        model: The model.
        items: The items, with distinct ids.
        path: Folder of the completions.
        settings: Sampling parameters and seed.
        engine: Engine for a model whose weights are local; None is `default_engine`.
        yes: Ask a model behind an endpoint without a question about the cost.

    Returns:
        One completion per item, in their order.

    Raises:
        UserError: As `generate_all`.
    """
    return generate_all(model, [(items, path)], settings, engine, yes)[0]


def generate_all(
    model: Model,
    jobs: Sequence[tuple[Sequence[Item], Path]],
    settings: GenerationSettings,
    engine: Engine | None = None,
    yes: bool = False,
) -> list[list[Completion]]:
    """As `generate`, for several sets of items with one start of the engine.

    Raises:
        UserError: A folder holds completions of another model or of other settings, the weights cannot be read, the
            engine cannot run, or the endpoint fails.
    """
    local = isinstance(model, LocalModel)
    engine = (engine or default_engine()) if local else None
    sampling = settings.sampling(model.format, model.stop_token_ids if isinstance(model, LocalModel) else ())
    identity = {
        "fingerprint": model.fingerprint,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
        "seed": settings.seed,
        "engine": type(engine).__name__ if engine is not None else "endpoint",
    }
    notes = {"model": model.name, "source": model.source, "format": model.format.to_dict(), "versions": versions()}
    stores = [CompletionStore(path, identity, notes) for _, path in jobs]
    work = [(store, store.missing(items)) for store, (items, _) in zip(stores, jobs, strict=True)]
    if any(missing for _, missing in work):
        if isinstance(model, LocalModel):
            assert engine is not None
            _sample(model, work, sampling, settings, engine)
        else:
            ask_for_completions(model, work, sampling, settings.seed, yes)
    return [read_completions(path, items) for items, path in jobs]


Work = Sequence[tuple[CompletionStore, list[Item]]]
"""Each store with its missing items."""


def _sample(model: LocalModel, work: Work, sampling: Sampling, settings: GenerationSettings, engine: Engine) -> None:
    """Generates the missing completions batch by batch."""
    limit = max_positions(model.config)
    prompts = [[_render(model, item) for item in items] for _, items in work]
    longest = max(min(len(ids), limit) for of_store in prompts for ids in of_store)
    max_model_len = min(limit, longest + sampling.max_new_tokens)
    _check_engine(model, engine, sampling, max_model_len)
    _note_short_context([ids for of_store in prompts for ids in of_store], limit, sampling.max_new_tokens, model)
    running = _RunningEngine(model, engine, max_model_len)
    total = sum(len(items) for _, items in work)
    with track_requests(f"generate · {model.name}", total) as bar, running:
        for (store, items), of_store in zip(work, prompts, strict=True):
            pairs = list(zip(items, of_store, strict=True))
            for start in range(0, len(pairs), settings.batch_size):
                batch = pairs[start : start + settings.batch_size]
                fitting = [(item, ids) for item, ids in batch if len(ids) < max_model_len]
                requests = [SampleRequest(ids, [item_seed(settings.seed, item.id)]) for item, ids in fitting]
                with _advance_while_sampling(bar, len(batch)):
                    samples = running.generate(requests, sampling)
                completions = _split(model, [item for item, _ in fitting], samples)
                store.add([item for item, _ in batch], [_completion(item, completions) for item, _ in batch])


def _render(model: LocalModel, item: Item) -> list[int]:
    try:
        return model.format.render(item.messages, model.tokenizer)
    except UserError as error:
        raise UserError(f"{model.source}: item {item.id} cannot be rendered: {error}") from error


def _check_engine(model: LocalModel, engine: Engine, sampling: Sampling, max_model_len: int) -> None:
    """Raises UserError if the engine cannot generate for the model."""
    if engine.replays:
        raise UserError(f"--engine {type(engine).__name__} only returns recorded samples; use another engine.")
    engine.check()
    engine.check_policy(model.config)
    engine.check_sampling(model.format, model.tokenizer, sampling, 1, max_model_len)


def _note_short_context(prompts: Sequence[Sequence[int]], limit: int, budget: int, model: LocalModel) -> None:
    """Prints how many completions have less than the budget, since prompt and completion share the model's context."""
    if short := sum(len(ids) + budget > limit for ids in prompts):
        print(
            f"{model.name}: {short:,} of {len(prompts):,} prompts leave less than {budget:,} tokens in the model's "
            f"context of {limit:,}; their completions end there.",
            flush=True,
        )


def _split(model: LocalModel, items: Sequence[Item], samples: Samples | None) -> dict[str, Completion]:
    """The completions of samples, by item."""
    if samples is None:
        return {}
    found = {}
    for item, ids, finish in zip(items, samples.completion_ids, samples.finish, strict=True):
        split = model.format.split(model.format.decode(ids, model.tokenizer))
        thought = model.format.thought_tokens(ids, model.tokenizer)
        counts = thought, len(ids) - thought
        found[item.id] = Completion(item.id, split.thought, split.response, split.status, str(finish), *counts)
    return found


def _completion(item: Item, completions: dict[str, Completion]) -> Completion:
    """The completion of an item; a malformed one where the prompt fills the model's context."""
    too_long = Completion(item.id, "", "", Status.EMPTY_RESPONSE, "prompt_too_long", 0, 0)
    return completions.get(item.id, too_long)


@contextmanager
def _advance_while_sampling(bar: RequestProgress, count: int) -> Iterator[None]:
    """Advances the progress bar by the samples that the engine reports, and at the end to `count`."""
    shown = 0

    def listen(phase: str, done: int, total: int | None) -> None:
        nonlocal shown
        if phase == "sampling" and done > shown:
            bar.advance(done - shown)
            shown = done

    progress.listen(listen)
    try:
        yield
    finally:
        progress.ignore(listen)
    bar.advance(count - shown)


@dataclass
class _RunningEngine:
    """An engine with a model's weights, as a context manager; weights are read by its first batch."""

    model: LocalModel
    engine: Engine
    max_model_len: int
    _policy: PreTrainedModel | None = None
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> _RunningEngine:
        self._stack.callback(self.engine.close)
        return self

    def __exit__(self, *error: Any) -> None:
        self._policy = None
        self._stack.close()

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Samples | None:
        """Generates samples; None without requests."""
        if not requests:
            return None
        if self._policy is None:
            self._policy = self._start()
        if self.engine.version is not None:
            self.engine.reload_lost_weights()
        if self.engine.version is None:  # also after an engine that sleeps dropped its weights
            self.engine.sync(base_tensors(self._policy).items(), 0)
        return self.engine.generate(requests, sampling)

    def _start(self) -> PreTrainedModel:
        folder = self._stack.enter_context(self.model.weights())
        policy: Any = load_policy(folder, "auto")
        if self.engine.shares_policy:
            policy = started = policy.to("cuda" if torch.cuda.is_available() else "cpu")
        else:
            started = meta_model(policy.config)
        self.engine.start(started, self.model.tokenizer, self.max_model_len, policy.dtype)
        loaded: PreTrainedModel = policy
        return loaded
