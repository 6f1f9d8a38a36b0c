"""null on the command line: every option that may be null takes it, also in a nested class, and never as text."""

import inspect
from collections.abc import Iterator
from typing import get_args

import pytest
from jsonargparse._parameter_resolvers import get_signature_parameters

import rlmt.algorithms
import rlmt.callbacks
import rlmt.data
import rlmt.engines
import rlmt.models
import rlmt.modules
import rlmt.rewards
from rlmt.cli.parsing import Parser

PACKAGES = (rlmt.algorithms, rlmt.callbacks, rlmt.data, rlmt.engines, rlmt.models, rlmt.modules, rlmt.rewards)


def optional_options() -> Iterator[tuple[type, list[str]]]:
    """Each exported class with its options that may be null."""
    for package in PACKAGES:
        for kind in (getattr(package, name) for name in package.__all__):
            if inspect.isclass(kind) and not inspect.isabstract(kind):
                parameters = get_signature_parameters(kind, "__init__")
                if names := [p.name for p in parameters if type(None) in get_args(p.annotation)]:
                    yield kind, names


OPTIONS = {kind.__name__: (kind, names) for kind, names in optional_options()}


@pytest.mark.parametrize("word", ["null", "None"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_that_may_be_null_takes_null(name: str, word: str) -> None:
    kind, options = OPTIONS[name]
    parser = Parser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "thing", fail_untyped=False)
    path = f"{kind.__module__}.{kind.__qualname__}"
    for option in options:
        words = [f"--thing={path}", f"--thing.{option}={word}"]
        parsed = parser.parse_args(words, _skip_validation=True)
        assert parsed["thing"]["init_args"][option] is None, option


def test_options_of_docs_that_are_set_to_null_are_among_them() -> None:
    known = {(name, option) for name, (_, options) in OPTIONS.items() for option in options}
    assert {("GRPO", "dual_clip"), ("VLLMEngine", "quantization"), ("VLLMEngine", "enforce_eager")} <= known
    assert ("RolloutDataModule", "column") in known and len(known) > 40
