"""Grader for integer answers in a box: word sums and the calculator task."""

from __future__ import annotations

import re

from tip_exp.grading.types import Verdict

_INTEGER = re.compile(r"[+-]?\d+")  # a reference answer
_BOXED = re.compile(r"-?\d+")  # what a box holds


def grade(text: str, answer: str) -> Verdict:
    r"""Compare the integer in the last `\boxed{...}` with the answer, as integers: "07" equals "7"."""
    boxes = [part.partition("}")[0] for part in text.split(r"\boxed{")[1:] if "}" in part]
    given = boxes[-1].strip() if boxes else ""
    if not _BOXED.fullmatch(given):
        return Verdict(right=False, extracted=None, rule="unparsed")
    right = is_integer(answer) and _digits(given) == _digits(answer.strip())
    return Verdict(right=right, extracted=given, rule="boxed")


def is_integer(answer: str) -> bool:
    """Whether this grader can find any response right."""
    return _INTEGER.fullmatch(answer.strip()) is not None


def _digits(integer: str) -> str:
    """The integer's one spelling: "07" -> "7", "-0" -> "0". Python's int() refuses more than 4,300 digits."""
    digits = "".join(str(int(digit)) for digit in integer.lstrip("+-")).lstrip("0") or "0"
    return f"-{digits}" if integer.startswith("-") and digits != "0" else digits
