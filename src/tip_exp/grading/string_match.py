r"""The grader of the paper's base code: string equality of the last box and the answer after normalization.

The normalization is that of the MATH data set (Hendrycks et al. 2021, arXiv 2103.03874). It has no algebra: `\frac{1}2`
and `\frac{1}{2}`, `x+1` and `1+x`, "025" and "25" stay different. Use it to compare with published numbers that were
graded this way; use `math.py` to find out whether an answer is right.
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
_SLASH = re.compile(r"(-?(?:0|[1-9]\d*))/(-?(?:0|[1-9]\d*))")  # matches a whole answer such as 1/2


def grade(text: str, answer: str) -> Verdict:
    """Compare the content of the last box with the answer, both normalized; "unparsed" if that box is not closed."""
    extraction = _last_box(text)
    if extraction.answer is None:
        return extraction.verdict("different")
    return extraction.verdict("same" if normalize(extraction.answer) == normalize(answer) else "different")


def normalize(answer: str) -> str:
    r"""normalize(r"x = \dfrac12") == normalize("1/2") == r"\frac{1}{2}"."""
    for old, new in _LITERAL_STEPS:
        answer = answer.replace(old, new)
    if answer.count("\\text{ ") == 1:  # a unit at the end
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
    numerator, following = frac.groups()
    return f"\\frac{{{numerator}}}" + (following if following == "{" else f"{{{following}}}")


def _last_box(text: str) -> Extraction:
    box = next(boxes_from_the_end(text), None)
    return Extraction(box.content, "boxed") if box and box.closed else UNPARSED
