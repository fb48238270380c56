"""What a grader answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["same", "different", "timeout", "memory", "crashed", "uncomparable"]
"""How a comparison of two answers ended: with a finding (the first two), or with the reason why there is none."""

FAILURES = ("memory", "crashed", "uncomparable")
"""Rules of verdicts without a finding, beside "timeout": out of memory, process died, the algebra system gave up."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Verdict(right=False, extracted="28", rule="boxed"): the last box said 28, which is not the answer."""

    right: bool
    extracted: str | None  # None: nothing in the text could be read as an answer
    rule: str  # how it was found: "boxed", ..., or "unparsed"; where no comparison was made, why: "timeout", ...
    seconds: float = field(default=0.0, compare=False)  # spent on it; 0 where nobody measured


@dataclass(frozen=True, slots=True)
class Extraction:
    r"""Extraction(answer="\frac{1}{2}", rule="boxed"): the answer a response gives, and the rule that read it."""

    answer: str | None  # None exactly when rule is "unparsed"
    rule: str

    def verdict(self, outcome: Outcome, seconds: float = 0.0) -> Verdict:
        """The verdict on this answer, given how its comparison with the known one ended."""
        rule = self.rule if outcome in ("same", "different") else outcome
        return Verdict(right=outcome == "same", extracted=self.answer, rule=rule, seconds=seconds)
