"""The line that stands for an error in a message."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError, model_validator

from tip_exp.utils.errors import first_line


class Settings(BaseModel):
    size: int = 1

    @model_validator(mode="after")
    def is_small(self) -> Settings:
        if self.size > 4:
            raise ValueError("the size is\ntoo large")
        return self


@pytest.mark.parametrize(
    ("size", "line"),
    [
        ("x", "size Input should be a valid integer, unable to parse string as an integer"),
        ("9", "Value error, the size is too large"),
    ],
)
def test_the_reason_of_a_validation_error_is_in_its_line(size: str, line: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"size": size})
    assert first_line(caught.value) == f"1 validation error for Settings: {line}"


def test_other_errors_are_their_first_line() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
