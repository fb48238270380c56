"""The first of each kind of an endless stream."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

PATIENCE = 10_000  # repeats in succession after which a stream counts as exhausted

Item = TypeVar("Item")


def distinct(items: Iterable[Item], key: Callable[[Item], Hashable]) -> Iterator[Item]:
    """The items whose key is new; ends after PATIENCE repeats in succession."""
    seen: set[Hashable] = set()
    repeats = 0
    for item in items:
        if key(item) not in seen:
            seen.add(key(item))
            repeats = 0
            yield item
        elif (repeats := repeats + 1) == PATIENCE:
            return
