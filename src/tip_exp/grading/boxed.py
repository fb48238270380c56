"""Grader for integer answers in a box: word sums and the calculator task."""

from __future__ import annotations

import re

from tip_exp.grading.types import Verdict

_BOXED_INTEGER = re.compile(r"\\boxed\{\s*(-?\d+)\s*\}")


def grade(text: str, answer: str) -> Verdict:
    r"""Compare the integer in the last `\boxed{...}` with the answer, as integers: "07" equals "7"."""
    boxes = _BOXED_INTEGER.findall(text)
    if not boxes:
        return Verdict(right=False, extracted=None, rule="unparsed")
    return Verdict(right=int(boxes[-1]) == int(answer), extracted=boxes[-1], rule="boxed")
