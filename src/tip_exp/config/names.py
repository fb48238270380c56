"""The types of the names that a configuration holds, with their checks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Discriminator, Tag

from tip_exp.config.numbers import Positive
from tip_exp.selector.lookup import with_code
from tip_exp.selector.scores import NORMALIZED

MAX_NAME = 200  # bytes; file systems allow 255, and files beside a folder have longer names


def _file_name(value: str) -> str:
    if not value or value != Path(value).name or value.startswith(".") or not value.isprintable():
        raise ValueError(
            "names a folder, so it must be one path component of printable characters, without a leading dot"
        )
    if len(value.encode()) > MAX_NAME:
        raise ValueError(f"names a folder, so it must have at most {MAX_NAME} bytes")
    return value


def _hub_file(value: str) -> str:
    if not re.fullmatch(r"[^@:]+@[^@:]+:.+", value):
        raise ValueError("must be REPOSITORY@REVISION:FILE, for example openai/gsm8k@740312a:main/test.parquet")
    return value


def _quantile(value: str) -> str:
    if not re.fullmatch(r"q0?\.\d+", value):
        raise ValueError("a number, or a quantile such as q0.9")
    return value


def _layers(value: list[str] | str) -> list[str] | str:
    if isinstance(value, str) and value != "all-linear":
        raise ValueError("a list of layer names, or all-linear (every linear layer but the head)")
    if not value:
        raise ValueError("names no layer; a list such as [q_proj, v_proj], or all-linear")
    return value


if TYPE_CHECKING:
    Statistic = str
else:  # the names of a registry, which a type checker cannot read
    Statistic = Literal[NORMALIZED]
Rule = Annotated[str, AfterValidator(with_code)]
FileName = Annotated[str, AfterValidator(_file_name)]
HubFile = Annotated[str, AfterValidator(_hub_file)]
# A number above 0, or "q0.9". The tags choose the error by what was given, and parse.py leaves them out of the key.
PositiveOrQuantile = Annotated[
    Annotated[Positive, Tag("[number]")] | Annotated[str, AfterValidator(_quantile), Tag("[quantile]")],
    Discriminator(lambda value: "[quantile]" if isinstance(value, str) else "[number]"),
]
Layers = Annotated[list[str] | str, AfterValidator(_layers)]
Split = Literal["train", "validation", "test"]
Grader = Literal["boxed_integer", "math", "strict"]
UpstreamBug = Literal[
    "flight_not_found",
    "hotel_city",
    "attraction_city",
    "route_order",
    "train_nesting",
    "empty_cells",
    "bad_json",
    "schema_dump",
    "restaurant_alias",
]  # keys of envs.deepplanning.tools.sandbox.UPSTREAM_BUGS
