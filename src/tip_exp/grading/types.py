"""What a grader answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """Verdict(right=False, extracted="28", rule="boxed"): the last box said 28, which is not the answer."""

    right: bool
    extracted: str | None  # None: nothing in the text could be read as an answer
    rule: str  # how it was found: "boxed", ..., or "unparsed"
