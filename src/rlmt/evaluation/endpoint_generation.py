"""Completions of a model behind an endpoint: chat requests, recorded in a ledger beside the completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlmt.data.sampler import item_seed
from rlmt.endpoints import Call, ChatAnswer, Ledger, Usage, chat_call
from rlmt.endpoints.ledger import recorded_usage
from rlmt.errors import UserError
from rlmt.evaluation.asking import Asking
from rlmt.evaluation.benchmark import Item
from rlmt.evaluation.completions import Completion, CompletionStore
from rlmt.evaluation.models import EndpointModel
from rlmt.types import Sampling, Status

_SEEDS = 2**31
"""Seeds are below it: not every server takes larger ones."""


def ask_for_completions(
    model: EndpointModel,
    work: Sequence[tuple[CompletionStore, list[Item]]],
    sampling: Sampling,
    seed: int,
    yes: bool,
) -> None:
    """Asks for the missing completions of each store, and writes those of a store when all are answered.

    The cost limit of the endpoint holds for all stores together, with what earlier starts have spent on them.

    Args:
        model: The model.
        work: Each store with its missing items.
        sampling: Temperature, top_p and maximum number of tokens.
        seed: Seed of the run.
        yes: Start without a question about the cost.

    Raises:
        UserError: The endpoint fails, refuses all requests or reaches its cost limit, or the user declines.
    """
    asking = Asking(model.endpoint, model.source, f"generate · {model.name}", "prompts", yes=yes)
    paths = [store.path / "_ledger.jsonl" for store, _ in work]
    for path, (store, items) in zip(paths, work, strict=True):
        if not items:
            continue
        cases = [[_call(model, item, sampling, seed)] for item in items]
        spent = sum((recorded_usage(other, model.endpoint.model) for other in paths if other != path), Usage())
        ledger = Ledger(path)
        try:
            answers = asking.ask(cases, ledger, spent=spent)
        finally:
            ledger.close()
        store.add(items, [_completion(model, item, answer) for item, [answer] in zip(items, answers, strict=True)])


def _call(model: EndpointModel, item: Item, sampling: Sampling, seed: int) -> Call:
    return chat_call(
        model.endpoint,
        item.messages,
        temperature=sampling.temperature,
        max_tokens=sampling.max_new_tokens,
        top_p=sampling.top_p,
        seed=item_seed(seed, item.id) % _SEEDS,
    )


def _completion(model: EndpointModel, item: Item, answer: Mapping[str, Any] | None) -> Completion:
    """The completion in an answer; a malformed one if the endpoint refused the prompt."""
    if answer is None:
        return Completion(item.id, "", "", Status.EMPTY_RESPONSE, "refused", None, None)
    try:
        message = ChatAnswer.from_json(answer)
    except ValueError as error:
        raise UserError(f"{model.source}: {error}; check base_url of the endpoint.") from error
    text = message.text.encode("utf-8", "replace").decode()  # JSON may hold lone surrogates, which no file can
    split = model.format.split(text)
    counts = _token_counts(answer)
    return Completion(item.id, split.thought, split.response, split.status, message.finish, *counts)


def _token_counts(answer: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Tokens of the hidden thought and of the rest, where the endpoint reports both."""
    usage = answer.get("usage")
    details = usage.get("completion_tokens_details") if isinstance(usage, Mapping) else None
    hidden = details.get("reasoning_tokens") if isinstance(details, Mapping) else None
    total = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
    if not isinstance(hidden, int) or not isinstance(total, int):
        return None, None
    return hidden, total - hidden
