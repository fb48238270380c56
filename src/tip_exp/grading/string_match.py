r"""The grader of the paper's base code: the last box, a string clean-up, equality of strings; no algebra.

The clean-up is the one published with the MATH data set (Hendrycks et al. 2021, arXiv 2103.03874), step for step, with
its severities: `\frac{1}2`, `x+1` for `1+x` and "025" for "25" stay different. It is kept to compare with numbers that
were graded so; `math.py` is the honest grader.
"""

from __future__ import annotations

import re

from tip_exp.grading.extract import UNPARSED, boxes_from_the_end
from tip_exp.grading.types import Extraction, Verdict

_LITERAL_STEPS = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
_AFTER_UNITS = (("\\%", ""), (" .", " 0."), ("{.", "{0."))
_BARE_SQRT = re.compile(r"\\sqrt([^{])")  # \sqrt3
_BARE_FRAC = re.compile(r"\\frac([^{])(.)")  # \frac12, \frac1{2}
_SLASH = re.compile(r"(-?(?:0|[1-9]\d*))/(-?(?:0|[1-9]\d*))")  # 1/2, and nothing beside it


def grade(text: str, answer: str) -> Verdict:
    """Compare the content of the last box with the answer as cleaned-up strings; without a closed box, unparsed."""
    found = _last_box(text)
    if found.answer is None:
        return found.verdict("different")
    return found.verdict("same" if normalise(found.answer) == normalise(answer) else "different")


def normalise(answer: str) -> str:
    r"""The clean-up: normalise(r"x = \dfrac12") == normalise("1/2") == r"\frac{1}{2}"."""
    for old, new in _LITERAL_STEPS:
        answer = answer.replace(old, new)
    if answer.count("\\text{ ") == 1:  # a unit, on the right
        answer = answer.split("\\text{ ")[0]
    for old, new in _AFTER_UNITS:
        answer = answer.replace(old, new)
    if answer.startswith("."):
        answer = "0" + answer
    sides = answer.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:  # "k = 5"
        answer = sides[1]
    answer = _BARE_SQRT.sub(r"\\sqrt{\1}", answer).replace(" ", "")
    answer = _BARE_FRAC.sub(_brace_both, answer)
    if answer == "0.5":
        answer = "\\frac{1}{2}"
    if ratio := _SLASH.fullmatch(answer):
        answer = f"\\frac{{{ratio[1]}}}{{{ratio[2]}}}"
    return answer


def _brace_both(frac: re.Match[str]) -> str:
    numerator, then = frac.groups()
    return f"\\frac{{{numerator}}}" + (then if then == "{" else f"{{{then}}}")


def _last_box(text: str) -> Extraction:
    box = next(boxes_from_the_end(text), None)
    return Extraction(box.content, "boxed") if box and box.closed else UNPARSED
