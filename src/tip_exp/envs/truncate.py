"""Truncates tool observations to a length limit, at row boundaries where possible, with a note of what is omitted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

_LIST_ELEMENT = re.compile(r"\n(?=  [{\[])")  # JSON with indent 2: start of an element of the outer list


def truncate(text: str, limit: int, length: Callable[[str], int], keep: Literal["rows", "middle"]) -> str:
    """`text` if its length is at most `limit`, else a part of it.

    "rows" keeps the first and the last rows (elements of a JSON list, else lines) and a note of how many are omitted,
    within the limit; a single row that is too long is cut inside, without a note if that alone is above the limit.
    "middle" keeps the first and the last characters, as verl does; its note comes on top of the limit, which counts
    characters.
    """
    if length(text) <= limit:
        return text
    if keep == "middle":
        return f"{text[: limit // 2]}...(truncated)...{text[len(text) - limit // 2 :]}"
    rows = _LIST_ELEMENT.split(text) if text.startswith("[\n") else text.split("\n")
    num_rows = _largest(len(rows) - 1, lambda count: length(_with_rows(rows, count)) <= limit)
    if num_rows > 0:
        return _with_rows(rows, num_rows)
    num_characters = _largest(len(text), lambda count: length(_with_characters(text, count)) <= limit)
    cut = _with_characters(text, num_characters)
    return cut if length(cut) <= limit else text[: _largest(len(text), lambda count: length(text[:count]) <= limit)]


def _with_rows(rows: list[str], count: int) -> str:
    """The first half of `count` rows, the note, the second half from the end."""
    head, tail = (count + 1) // 2, count // 2
    note = f"[... {len(rows) - count} of {len(rows)} rows left out ...]"
    return "\n".join([*rows[:head], note, *rows[len(rows) - tail :]])


def _with_characters(text: str, count: int) -> str:
    return f"{text[:count]}\n[... {len(text) - count} of {len(text)} characters left out ...]"


def _largest(highest: int, fits: Callable[[int], bool]) -> int:
    """A count in [0, highest] that fits, by bisection; 0 if none does.

    A length in tokens is not monotonic in the count, so the result of the bisection is lowered until it fits.
    """
    low, high = 0, highest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    while low > 0 and not fits(low):
        low -= 1
    return low
