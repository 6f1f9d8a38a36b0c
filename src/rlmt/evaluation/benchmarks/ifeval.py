"""IFEval: instructions whose following can be verified by a program (https://arxiv.org/abs/2311.07911)."""

from __future__ import annotations

import importlib
import importlib.util
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from unittest import mock

from rlmt.data.tables import Cells
from rlmt.errors import UserError
from rlmt.evaluation.benchmark import Benchmark, Item, Score
from rlmt.evaluation.benchmarks.common import json_cell, read_items, text_cell
from rlmt.types import Message

PUNKT = "tokenizers/punkt_tab"


class IFEval(Benchmark):
    """100 if the response follows every instruction of the prompt (prompt-level strict accuracy).

    The checkers are those of if-verifiable. Its registry is called directly, because its own entry point splits
    thoughts a second time and skips instructions that it does not know. An empty response follows no instruction under
    `ours`; under `authors` it follows, for example, the one to use no comma.
    """

    name = "ifeval"
    title = "IFEval"
    source = "google/IFEval"
    figures = ("accuracy",)
    registry: ClassVar[str] = "if_verifiable.ifeval.instructions_registry"
    """Module with the checkers."""
    nltk_data: ClassVar[Mapping[str, Sequence[str]]] = {
        "change_case:capital_word_frequency": [PUNKT],
        "length_constraints:number_sentences": [PUNKT],
    }
    """Instruction → data of NLTK that its checker reads; the others read none."""

    def check(self, items: Sequence[Item] = ()) -> None:
        """Checks that the checkers and their data are installed, and that they know the instructions of the items.

        Raises:
            UserError: One of them is missing.
        """
        if importlib.util.find_spec("if_verifiable") is None:
            raise UserError(f"{self.name} needs if-verifiable, which is not installed: pip install if-verifiable.")
        names = {name for item in items for name, _ in item.data["instructions"]}
        paths = sorted({path for name in names for path in self.nltk_data.get(name, []) if not _has_nltk_data(path)})
        if paths:
            missing = " ".join(path.rpartition("/")[2] for path in paths)
            raise UserError(
                f"{self.name} needs data of NLTK that are not installed: python -m nltk.downloader {missing}."
            )
        for item in items:
            self.checkers(item)

    def load(self, path: str) -> list[Item]:
        """See `Benchmark.load`."""
        return read_items(self, path, ("key", "prompt", "instruction_id_list", "kwargs"), _parse)

    def score(self, item: Item, response: str, answers: Sequence[str]) -> Score:
        """See `Benchmark.score`."""
        checkers = self.checkers(item)
        return Score(100.0 * all([self.follows(checker, response) for checker in checkers]))

    def checkers(self, item: Item) -> list[Any]:
        """A checker of each instruction of an item.

        Raises:
            UserError: An instruction is unknown.
        """
        known = _import_without_downloads(self.registry).INSTRUCTION_DICT
        importlib.import_module("langdetect").DetectorFactory.seed = 0  # its detection is random otherwise
        if unknown := [name for name, _ in item.data["instructions"] if name not in known]:
            raise UserError(f"{self.name}: the instruction {unknown[0]!r} of prompt {item.id!r} is unknown; remove it.")
        state = random.getstate()
        random.seed(item.id)  # checkers choose missing options with the global generator, which belongs to the run
        try:
            return [_checker(known[name], name, options, item) for name, options in item.data["instructions"]]
        finally:
            random.setstate(state)

    def follows(self, checker: Any, response: str) -> bool:
        """Whether a response follows one instruction."""
        counts = bool(response.strip()) or self.scoring == "authors"
        return counts and bool(checker.check_following(response))


def _parse(index: int, cells: Cells) -> Item:
    names, options = json_cell(cells, "instruction_id_list", list), json_cell(cells, "kwargs", list)
    if not names or len(names) != len(options):
        raise ValueError(f"`instruction_id_list` has {len(names)} entries and `kwargs` {len(options)}")
    given = [{name: value for name, value in (each or {}).items() if value is not None} for each in options]
    messages = [Message(role="user", content=text_cell(cells, "prompt"))]
    return Item(str(cells["key"]), messages, {"instructions": [list(pair) for pair in zip(names, given, strict=True)]})


def _checker(factory: Any, name: str, options: dict[str, Any], item: Item) -> Any:
    checker = factory(name)
    checker.build_description(**options)
    if "prompt" in (checker.get_instruction_args() or {}):
        checker.build_description(prompt=item.messages[-1]["content"])
    return checker


def _import_without_downloads(module: str) -> Any:
    """Imports a module that would download data of NLTK, whether or not an item needs them."""
    import nltk

    with mock.patch.object(nltk, "download"):
        return importlib.import_module(module)


def _has_nltk_data(path: str) -> bool:
    import nltk

    try:
        nltk.data.find(path)
    except LookupError:
        return False
    return True
