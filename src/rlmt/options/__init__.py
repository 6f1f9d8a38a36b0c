"""Types of constructor options, checks of their ranges, and a check of folders to write to."""

from rlmt.options.folders import check_writable
from rlmt.options.ranges import (
    ClosedUnitInterval,
    FiniteFloat,
    FiniteNonNegativeFloat,
    FinitePositiveFloat,
    FloatAboveOne,
    IntAboveOne,
    IntFromTwenty,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    UnitIntervalAboveZero,
    UnitIntervalBelowOne,
    ZeroOrOne,
    check_ranges,
)

__all__ = [
    "ClosedUnitInterval",
    "FiniteFloat",
    "FiniteNonNegativeFloat",
    "FinitePositiveFloat",
    "FloatAboveOne",
    "IntAboveOne",
    "IntFromTwenty",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OpenUnitInterval",
    "PositiveFloat",
    "PositiveInt",
    "UnitIntervalAboveZero",
    "UnitIntervalBelowOne",
    "ZeroOrOne",
    "check_ranges",
    "check_writable",
]
