"""Number types for options with a range, refused outside it by the command line and by Python alike.

The types are jsonargparse's restricted numbers. An instance of one is a subclass of int or float, which
`torch.load(weights_only=True)` refuses in a checkpoint. So they are registered with a deserializer that returns plain
numbers. A type checker sees plain int and float.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import yaml
from jsonargparse.typing import register_type, restricted_number_type

from rlmt.errors import UserError

_WORDS = {">": "above", ">=": "of at least", "<": "below", "<=": "at most"}
_DESCRIPTIONS: dict[Any, str] = {}
"""Each type, with what its values must be."""


def check_ranges(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Checks the arguments whose annotation is one of these types, or Optional of one.

    Args:
        function: The class or function that is called. Its signature has the annotations.
        arguments: Its arguments by name: `locals()` on its first line.

    Raises:
        UserError: An argument is out of range.
    """
    for option, parameter in signature(function, eval_str=True).parameters.items():
        kind, value = _range_type(parameter.annotation), arguments[option]
        if kind is None or (value is None and kind is not parameter.annotation):
            continue
        required = numbers.Integral if kind._type is int else numbers.Real
        if not (isinstance(value, required) and _is_within(kind, value)):
            owner = type(arguments["self"]) if "self" in arguments else function
            raise UserError(f"{owner.__name__}.{option} is {value!r}: must be {_DESCRIPTIONS[kind]}.")


def ranges(function: Callable[..., Any]) -> dict[str, Any]:
    """The options of a class or function that have a range, with their types."""
    parameters = signature(function, eval_str=True).parameters
    kinds = {option: _range_type(parameter.annotation) for option, parameter in parameters.items()}
    return {option: kind for option, kind in kinds.items() if kind is not None}


def _range_type(annotation: Any) -> Any:
    """The type of this module in an annotation, or None."""
    candidates = (annotation, *get_args(annotation))
    return next((kind for kind in candidates if isinstance(kind, type) and kind in _DESCRIPTIONS), None)


def _number_type(name: str, base: type, *restrictions: tuple[str, float]) -> Any:
    """Makes a restricted type that parses to plain numbers."""
    kind = restricted_number_type(name, base, list(restrictions))
    limits = [f"{_WORDS[comparison]} {limit:g}" for comparison, limit in restrictions if math.isfinite(limit)]
    finite = "finite " if ("<", math.inf) in restrictions else ""
    noun = "an integer" if base is int else f"a {finite}number"
    _DESCRIPTIONS[kind] = " ".join([noun, " and ".join(limits)]).rstrip()
    register_type(kind, serializer=base, deserializer=partial(_parse, kind))
    return kind


def _parse(kind: Any, value: Any) -> Any:
    """The value as a plain number; the error of one out of range completes a sentence that begins with the option."""
    number = value
    if isinstance(value, str):
        with suppress(yaml.YAMLError):
            number = yaml.safe_load(value)  # accepts infinity as `.inf`, the spelling in configuration files
    if not _is_within(kind, number):
        raise ValueError(f"is {value}: must be {_DESCRIPTIONS[kind]}.")
    return kind._type(number)


def _is_within(kind: Any, value: Any) -> bool:
    """Whether the value converts to the type."""
    try:
        kind(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


if TYPE_CHECKING:
    PositiveInt: TypeAlias = int
    NonNegativeInt: TypeAlias = int
    PositiveFloat: TypeAlias = float
    NonNegativeFloat: TypeAlias = float
    OpenUnitInterval: TypeAlias = float
    ClosedUnitInterval: TypeAlias = float
    ZeroOrOne: TypeAlias = int
    IntAboveOne: TypeAlias = int
    IntFromTwenty: TypeAlias = int
    FloatAboveOne: TypeAlias = float
    FiniteFloat: TypeAlias = float
    FinitePositiveFloat: TypeAlias = float
    FiniteNonNegativeFloat: TypeAlias = float
    UnitIntervalAboveZero: TypeAlias = float
    UnitIntervalBelowOne: TypeAlias = float
else:
    PositiveInt = _number_type("PositiveInt", int, (">", 0))
    NonNegativeInt = _number_type("NonNegativeInt", int, (">=", 0))
    PositiveFloat = _number_type("PositiveFloat", float, (">", 0))
    NonNegativeFloat = _number_type("NonNegativeFloat", float, (">=", 0))
    OpenUnitInterval = _number_type("OpenUnitInterval", float, (">", 0), ("<", 1))
    ClosedUnitInterval = _number_type("ClosedUnitInterval", float, (">=", 0), ("<=", 1))
    ZeroOrOne = _number_type("ZeroOrOne", int, (">=", 0), ("<=", 1))
    IntAboveOne = _number_type("IntAboveOne", int, (">", 1))
    IntFromTwenty = _number_type("IntFromTwenty", int, (">=", 20))
    FloatAboveOne = _number_type("FloatAboveOne", float, (">", 1))
    FiniteFloat = _number_type("FiniteFloat", float, (">", -math.inf), ("<", math.inf))
    FinitePositiveFloat = _number_type("FinitePositiveFloat", float, (">", 0), ("<", math.inf))
    FiniteNonNegativeFloat = _number_type("FiniteNonNegativeFloat", float, (">=", 0), ("<", math.inf))
    UnitIntervalAboveZero = _number_type("UnitIntervalAboveZero", float, (">", 0), ("<=", 1))
    UnitIntervalBelowOne = _number_type("UnitIntervalBelowOne", float, (">=", 0), ("<", 1))
