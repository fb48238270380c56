"""The types of the numbers that a configuration holds, with their ranges."""

from __future__ import annotations

import struct
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator


def _in_float32(value: float) -> float:
    """Refuse what float32 rounds to zero or infinity: losses and updates are computed in it."""
    if value and not 1.2e-38 <= abs(value) <= 3.4e38:
        raise ValueError("should be within the range of float32, 1.2e-38 to 3.4e38")
    return value


def _inside_unit(value: float) -> float:
    """Refuse what float32 rounds to 0 or 1."""
    if not value >= 1e-30 or struct.unpack("f", struct.pack("f", value))[0] == 1:
        raise ValueError("should be between 0 and 1 in float32 as well, 1e-30 to 1 - 1e-7")
    return value


def _number_or_auto(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """One message, where pydantic has one for each type of the union."""
    try:
        return check(value)
    except ValidationError:
        raise ValueError("a whole number from 1, or auto") from None


Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=2**32 - 1)]  # also of seeds: numpy takes 32 bits, torch 64 of derived ones
Ranks = Annotated[Count | Literal["auto"], WrapValidator(_number_or_auto)]
Positive = Annotated[float, Field(gt=0), AfterValidator(_in_float32)]
NonNegative = Annotated[float, Field(ge=0), AfterValidator(_in_float32)]
Temperature = Annotated[float, Field(ge=0.01, le=100)]  # logits are divided by it; vLLM rounds lower ones up to 0.01
Share = Annotated[float, Field(gt=0, le=1), AfterValidator(_in_float32)]
Fraction = Annotated[float, Field(ge=0, le=1)]
InsideUnit = Annotated[float, Field(gt=0, lt=1), AfterValidator(_inside_unit)]
