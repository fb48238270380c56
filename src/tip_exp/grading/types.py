"""What a grader returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["same", "different", "timeout", "memory", "crashed", "uncomparable"]
"""Result of comparing two answers; the last four name the reason why there is no result."""

FAILURES = ("memory", "crashed", "uncomparable")
"""Rules of failed comparisons besides "timeout": out of memory, process died, the algebra system raised an error."""

UNGRADED = ("timeout", *FAILURES)
"""Rules of verdicts without a result of the comparison; the response counts as wrong."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Verdict(right=False, extracted="28", rule="boxed"): the last box holds 28, which is not the reference answer."""

    right: bool
    extracted: str | None  # None: no answer found in the text
    rule: str  # the extraction rule ("boxed", …, "unparsed"), or why the comparison failed ("timeout", …)
    seconds: float = field(default=0.0, compare=False)  # wall time of grading; 0 if not measured


@dataclass(frozen=True, slots=True)
class Extraction:
    r"""Extraction(answer="\frac{1}{2}", rule="boxed"): the answer in a response and the rule that found it."""

    answer: str | None  # None exactly when rule is "unparsed"
    rule: str

    def verdict(self, outcome: Outcome, seconds: float = 0.0) -> Verdict:
        """The verdict on this answer, given the outcome of comparing it with the reference answer."""
        rule = self.rule if outcome in ("same", "different") else outcome
        return Verdict(right=outcome == "same", extracted=self.answer, rule=rule, seconds=seconds)
