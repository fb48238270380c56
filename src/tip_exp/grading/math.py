r"""The grader for mathematics: compares the value of two answers, whatever their notation.

Tests from cheap to costly, the first that applies decides: equal strings, plain numbers ("025" is 25, "1,234" is 1234),
numerals in a base (52_8), words (\text{(C)}, \text{even}), then algebra by math-verify. math-verify is restricted where
it accepts too much: it parses 2m as 2 metres, 52_8 and 52_9 as 52, and compares only 6 decimal places.

An answer that does not parse as mathematics is right only if its string equals the reference answer.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import math_verify
import sympy
from latex2sympy2_extended import NormalizationConfig

from tip_exp.grading.types import Outcome

RELATIVE_TOLERANCE = 1e-5
"""math-verify compares 6 decimal places, too few for small numbers: they must also agree to 5 significant digits."""

_WHOLE_ANSWER = (
    math_verify.LatexExtractionConfig(
        try_extract_without_anchor=False,  # else it takes a fraction inside an unparseable answer
        boxed_match_priority=0,
        # clean() removes units: math-verify's list of units includes the letters c, d, g, h, l, m, o, s and t.
        normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="all"),
    ),
)

_LITERAL_STEPS = (
    *((mark, "") for mark in ("\\left", "\\right", "\\displaystyle", "\\$", "$", "\\boxed")),
    *((space, " ") for space in ("\\,", "\\;", "\\:", "\\quad", "\\qquad", "~", "\n", "\u00a0")),
    *((f"\\{size}frac", "\\frac") for size in "dtc"),
    ("{,}", ","),
    ("−", "-"),
    ("\\textdegree", "°"),
    ("\\degree", "°"),
)
_FORMULA_MARKS = re.compile(r"^\s*\\[(\[]|\\[)\]]\s*$")
_NEGATIVE_SPACE = re.compile(r"\\!\s*")  # 10,\! 080 is one number
_PERCENT = re.compile(r"\s*\\?%$")
_DEGREE = re.compile(r"\s*(?:°|\^\s*\\circ|\^\s*\{\s*\\circ\s*\})$")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")  # sin of 30 degrees is not sin of 30

_TEXT = r"\\(?:text|textbf|textrm|textit|mbox|mathrm|rm)"
_POWER = r"(?:\s*\^\s*(?:\d|\{\s*\d\s*\}))?"
_UNIT = (
    r"(?:(?:square|cubic|sq|cu)\.?\s+)?(?:(?<=[a-z.]\s)[mgs]|mm|cm|km|in|ft|yd|mi|kg|lb|oz|hr|"
    r"min|inch(?:es)?|foot|feet|cents?|"
    r"(?:milli|centi|kilo)?met(?:er|re)s?|(?:yard|mile|gram|kilogram|pound|ounce|second|minute|hour|day|week|month|year|"
    r"degree|dollar|unit|mph)s?)"
)
_LETTER_UNIT = re.compile(rf"((?:[a-zA-Z]\s*=\s*)?[-+]?[\d.,]*\d(?:/\d+)?)\s+[mgs]{_POWER}")  # 5 m^2, not 5m^2
_LETTER = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]")  # not of a command
_PLAIN_UNIT = re.compile(rf"(?<=\d)\s*{_UNIT}{_POWER}$")
_TEXT_UNIT = re.compile(rf"(?<=[\d}})\]a-zA-Z])\s*/?\s*{_TEXT}\s*\{{([^{{}}]*)\}}{_POWER}\s*$")
_NOT_A_UNIT = re.compile(r"\b(?:[a-z]|pi|or|and|to|hundred|thousand|million|billion|trillion|dozen)\b", re.IGNORECASE)

_PLAIN_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,4})?")
_BOLD_NUMBER = re.compile(rf"(?:{_TEXT}|\\(?:mathbf|bf|bm|boldsymbol))\s*\{{\(?([-+\d.,]+)\)?\}}|\(([-+]?[\d.]+)\)")
_MIXED_NUMBER = re.compile(r"([-+]?\d+)\s+(\d+)/(\d+)")
_NUMERAL = re.compile(r"0*(\d[\dA-Fa-f]*)(?:\s*_\s*(?:\{\s*(\d+)\s*\}|(\d+)))?")
_WORDS = re.compile(rf"\(?{_TEXT}\s*\{{[^{{}}\d]*\}}\)?|\([A-Z]\)|[a-zA-Z][a-zA-Z ]{{3,}}")
_WRAPPING = re.compile(rf"{_TEXT}\b|\W|_")


def compare(given: str, reference: str) -> Outcome:
    """Compare two answers. It has no time limit, and an answer can keep C code busy for hours: use pool.GradingPool."""
    try:
        return "same" if _same(given, reference) else "different"
    except MemoryError:
        return "memory"
    except Exception:  # sympy raises errors of many classes when it cannot compare two expressions
        return "uncomparable"


def clean(answer: str) -> str:
    r"""Remove what has no value: spacing commands, $, sizes of brackets and fractions, units, degrees, percent."""
    answer = _PERCENT.sub("", _tidy(answer))
    if bold := _BOLD_NUMBER.fullmatch(answer):  # \textbf{(073)}
        answer = bold[1] or bold[2]
    if mixed := _MIXED_NUMBER.fullmatch(answer):
        answer = f"{mixed[1]}\\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    if not _TRIGONOMETRY.search(answer):
        answer = _DEGREE.sub("", answer)
    for _ in range(3):  # \text{ m}/\text{s}^2 has two
        unit = _TEXT_UNIT.search(answer)
        if unit is None or (_NOT_A_UNIT.search(unit[1]) and not re.fullmatch(rf"{_UNIT}|[mgs]", unit[1].strip())):
            break
        answer = answer[: unit.start()]
    return _PLAIN_UNIT.sub("", answer).strip()


def _without_letter_unit(answer: str, other_answer: str) -> str:
    """5 m^2 -> 5 if the other answer is a number: the letters m, g and s are also variables. 5m^2 is unchanged."""
    unit = _LETTER_UNIT.fullmatch(answer)
    return unit[1] if unit and not _LETTER.search(other_answer) else answer


def plain_number(answer: str) -> Decimal | None:
    """The exact value of "025", "1,234", "-.5" or "6.72e-5"; None for anything else."""
    return Decimal(answer.replace(",", "")) if _PLAIN_NUMBER.fullmatch(answer) else None


def _same(given: str, reference: str) -> bool:
    given_percent, reference_percent = (_PERCENT.search(_tidy(answer)) is not None for answer in (given, reference))
    given, reference = clean(given), clean(reference)
    given, reference = _without_letter_unit(given, reference), _without_letter_unit(reference, given)
    if given.replace(" ", "") == reference.replace(" ", ""):
        return given != ""
    a, b = plain_number(given if "=" in reference else _right_side(given)), plain_number(reference)
    if a is not None and b is not None:
        if given_percent != reference_percent:  # 15 % is written for both 15 and 0.15
            return a == b or (a / 100 == b if given_percent else a == b / 100)
        return a == b
    if "_" in reference or "_" in given:
        numerals = _NUMERAL.fullmatch(given), _NUMERAL.fullmatch(reference)
        if numerals[0] and numerals[1]:
            return _same_numeral(numerals[0], numerals[1])
    if _WORDS.fullmatch(reference):
        return _words(given) == _words(reference)
    if _same_mathematics(given, reference):
        return True
    if given_percent == reference_percent:
        return False
    if given_percent:
        return _same_mathematics(f"({_right_side(given)})/100", reference)
    return _same_mathematics(_right_side(given), f"({_right_side(reference)})/100")


def _tidy(answer: str) -> str:
    answer = _NEGATIVE_SPACE.sub("", _FORMULA_MARKS.sub("", answer))
    for old, new in _LITERAL_STEPS:
        answer = answer.replace(old, new)
    return answer.strip().rstrip(".").strip()


def _right_side(answer: str) -> str:
    """x = 1,080 -> 1,080; anything but a single equation is unchanged."""
    left, equals, right = answer.partition("=")
    return right.strip() if equals and not re.search(r"[,;<>!]", left) else answer


def _same_numeral(given: re.Match[str], reference: re.Match[str]) -> bool:
    """52_8 equals 52_{8}, and 52 because the problem names the base, but not 52_9."""
    bases = [numeral[2] or numeral[3] for numeral in (given, reference)]
    return given[1].lower() == reference[1].lower() and (None in bases or bases[0] == bases[1])


def _words(answer: str) -> str:
    return _WRAPPING.sub("", answer).casefold()


def _same_mathematics(given: str, reference: str) -> bool:
    reference_value, given_value = _parse(reference), _parse(given)
    if not reference_value or not given_value:
        return False
    reference_value, given_value = (
        _with_imaginary_unit(reference_value, given_value),
        _with_imaginary_unit(given_value, reference_value),
    )
    same = math_verify.verify(
        reference_value,
        given_value,
        allow_set_relation_comp=True,  # -2 <= x <= 7 and [-2, 7]
        timeout_seconds=0,  # no alarm
        raise_on_error=True,
    )
    return same and not _far_apart(reference_value[0], given_value[0])


def _with_imaginary_unit(values: list[Any], other_values: list[Any]) -> list[Any]:
    r"""i as the imaginary unit where the other answer has no variable i: i equals \sqrt{-1}, e^{i\pi} equals -1."""
    variables = [s for s in getattr(values[0], "free_symbols", ()) if s.name == "i"]
    if not variables or any(s.name == "i" for s in getattr(other_values[0], "free_symbols", ())):
        return values
    try:
        return [values[0].subs(variables[0], sympy.I), *values[1:]]
    except TypeError:  # an inequality of complex numbers
        return values


def _parse(answer: str) -> list[Any]:
    """A list with one sympy object, or an empty list if the answer does not parse."""
    if not _balanced(answer):
        return []
    return math_verify.parse(
        f"\\boxed{{{answer}}}",
        extraction_config=_WHOLE_ANSWER,
        fallback_mode="no_fallback",
        parsing_timeout=0,  # no alarm
        raise_on_error=True,
    )


def _balanced(answer: str) -> bool:
    depth = 0
    for brace in re.findall(r"\\.|[{}]", answer):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0


def _far_apart(reference: Any, given: Any) -> bool:
    """True for two numbers that differ in their first five significant digits."""
    if not (getattr(reference, "is_number", False) and getattr(given, "is_number", False)):
        return False
    a, b = reference.evalf(15), given.evalf(15)
    return bool(abs(a - b) > RELATIVE_TOLERANCE * max(abs(a), abs(b)))
