"""Types of constructor options, and checks of their ranges."""

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
]
