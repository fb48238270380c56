"""Shortens what a tool said to a limit: at rows where there are rows, with a note where something is left out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

Cut = Literal["rows", "middle"]
_ROW_OF_LIST = re.compile(r"\n(?=  [{\[])")  # JSON at an indent of 2: a new element of the outer list


def shorten(text: str, limit: int, length: Callable[[str], int], cut: Cut) -> str:
    """`text` if its length is within `limit`, else a part whose length is, note included.

    "rows" keeps the first and the last rows (elements of a JSON list, else lines) and says how many are left out; a
    single row that is too long is cut inside. "middle" keeps the first and the last characters, as verl does: there
    the note comes on top of the limit.
    """
    if length(text) <= limit:
        return text
    if cut == "middle":
        return f"{text[: limit // 2]}...(truncated)...{text[len(text) - limit // 2 :]}"
    rows = _rows(text)
    kept = _most(len(rows) - 1, lambda count: length(_of_rows(rows, count)) <= limit)
    if kept > 0:
        return _of_rows(rows, kept)
    letters = _most(len(text), lambda count: length(_of_letters(text, count)) <= limit)
    return _of_letters(text, letters)


def _rows(text: str) -> list[str]:
    return _ROW_OF_LIST.split(text) if text.startswith("[\n") else text.split("\n")


def _of_rows(rows: list[str], count: int) -> str:
    """The first half of `count` rows, the note, the other half from the end."""
    head, tail = (count + 1) // 2, count // 2
    note = f"[... {len(rows) - count} of {len(rows)} rows left out ...]"
    return "\n".join([*rows[:head], note, *rows[len(rows) - tail :]])


def _of_letters(text: str, count: int) -> str:
    return f"{text[:count]}\n[... {len(text) - count} of {len(text)} characters left out ...]"


def _most(highest: int, fits: Callable[[int], bool]) -> int:
    """The highest count that fits, 0 if none does; by bisection, then downwards, as lengths in tokens may jump."""
    low, high = 0, highest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    while low > 0 and not fits(low):
        low -= 1
    return low
