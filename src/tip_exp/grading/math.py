r"""The grader for mathematics: compares the value of two answers, whatever their notation.

Tests from cheap to costly, the first that applies decides: equal strings, plain numbers ("025" is 25, "1,234" is 1234),
numerals in a base (52_8), words (\text{(C)}, \text{even}), then algebra by math-verify (expressions.py), which would
parse 2m as 2 metres, and 52_8 and 52_9 as 52.

An answer that does not parse as mathematics is right only if its string equals the reference answer.
"""

from __future__ import annotations

import re
from decimal import Decimal

from tip_exp.grading.expressions import same_value
from tip_exp.grading.types import Outcome

_LITERAL_STEPS = (
    *((mark, "") for mark in ("\\left", "\\right", "\\displaystyle", "\\$", "$", "\\boxed")),
    *((space, " ") for space in ("\\,", "\\;", "\\:", "\\quad", "\\qquad", "~", "\n", "\u00a0")),
    *((f"\\{size}frac", "\\frac") for size in "dtc"),
    ("{,}", ","),
    ("\\textdegree", "°"),
    ("\\degree", "°"),
    ("\\varnothing", "\\emptyset"),
    *((f"\\not{space}=", "\\neq ") for space in ("", " ")),
    *((mark, "") for mark in "€£¥"),
    ("−", "-"),
    ("∞", "\\infty "),
    ("·", "\\cdot "),
    *((name[0], f"\\frac{{{name[1]}}}{{{name[2]}}}") for name in ("½12", "⅓13", "⅔23", "¼14", "¾34")),
)
_FORMULA_MARKS = re.compile(r"^\s*\\[(\[]|\\[)\]]\s*$")
_NEGATIVE_SPACE = re.compile(r"\\!\s*")  # 10,\! 080 is one number
_SPACE = re.compile(r"(?<!\\)\\(?=\s)")  # "\ ", not the end of a row "\\ "
_IGNORED = re.compile(r"^\s*(?:\\approx\b|≈)|\\textcolor\s*\{[^{}]*\}|^\s*(?:USD?|EUR|GBP)\s*(?=\\?\$?\s*\d)")
_DASH = re.compile(r"(?:^|(?<=[=(,\[{]))\s*–")  # a sign; 3–5 is a range
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
_DIGITS = str.maketrans(f"⁻{_SUPERSCRIPTS}", "-0123456789")
_SUPERSCRIPT = re.compile(rf"⁻?[{_SUPERSCRIPTS}]+")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+|[a-zA-Z]))")
_REPEATING = re.compile(r"(\d*)\.(\d{0,20})\\(?:overline|bar)\s*\{(\d{1,20})\}")
_THOUSANDS = re.compile(r"(?<![\w.,])\d{1,3}(?: \d{3})+(?!\d|\s*/)")
_SPACED_NUMBERS = re.compile(r"(?<![\w.^\\])(?<!frac )[\d.,]*\d\s+[\d.]")  # not \frac 1 2, \log_2 8, 2^3 5
_PERCENT = re.compile(r"\s*(?:\\?%|\sper ?cent|\\(?:text|mbox|mathrm)\s*\{\s*(?:per ?cent|\\?%)\s*\})$")
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
_SHORT_UNIT = rf"(?:{_UNIT}|[mgshLJNVW])"
_RATE = rf"{_SHORT_UNIT}\s*(?:/|\bper\b)\s*{_SHORT_UNIT}"  # km/h
_SPACED_UNIT = re.compile(  # 5 m^2, not 5m^2; 18 eggs
    rf"((?:[a-zA-Z]\s*=\s*)?[-+]?[\d.,]*\d(?:/\d+)?)\s+(?:(?:[mgs]|{_RATE}){_POWER}|USD|EUR|GBP|"
    r"((?!/)[a-zA-Z/ ]*[a-zA-Z]{4}[a-zA-Z/ ]*))"
)
_LETTER = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]")  # not of a command
_PLAIN_UNIT = re.compile(rf"(?<=\d)\s*{_UNIT}{_POWER}$")
_TEXT_UNIT = re.compile(rf"(?<=[\d}})\]a-zA-Z])\s*/?\s*{_TEXT}\s*\{{([^{{}}]*)\}}{_POWER}\s*$")
_RATE_OR_UNIT = re.compile(rf"(?:{_RATE}|{_SHORT_UNIT}){_POWER}")
_NOT_A_UNIT = re.compile(
    r"^\s*(?:squared|cubed)\b|\b(?:[a-z]|pi|alpha|beta|gamma|delta|theta|lambda|sigma|omega|or|and|to|not|least|most|plus|"
    r"minus|factorial|zero|one|two|three|four|five|six|seven|eight|nine|ten|half|halves|thirds?|quarters?|percent(?:age)?|"
    r"(?:four|fif|six|seven|eigh|nin|ten)ths?|dozens?|(?:hundred|thousand|million|billion|trillion)(?:s|ths?)?)\b",
    re.IGNORECASE,
)

_PLAIN_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,4})?")
_WRAPPED = re.compile(rf"{_TEXT}\s*\{{\s*([-+]?[\d.][^{{}}]*)\}}")  # \text{18 eggs}
_BOLD_NUMBER = re.compile(rf"(?:{_TEXT}|\\(?:mathbf|bf|bm|boldsymbol))\s*\{{\(?([-+\d.,]+)\)?\}}|\(([-+]?[\d.]+)\)")
_MIXED_NUMBER = re.compile(r"((?:[a-zA-Z]\s*=\s*)?[-+]?\d+)\s+(\d+)/(\d+)")
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
        if unit is None or (_NOT_A_UNIT.search(unit[1]) and not _RATE_OR_UNIT.fullmatch(unit[1].strip())):
            break
        answer = answer[: unit.start()]
    return _PLAIN_UNIT.sub("", answer).strip()


def _without_spaced_unit(answer: str, other_answer: str) -> str:
    """5 m^2 -> 5 and 18 eggs -> 18 if the other answer is a number: letters are also variables. 5m^2 is unchanged."""
    unit = _SPACED_UNIT.fullmatch(answer)
    return unit[1] if unit and not _NOT_A_UNIT.search(unit[2] or "") and not _LETTER.search(other_answer) else answer


def plain_number(answer: str) -> Decimal | None:
    """The exact value of "025", "1,234", "-.5" or "6.72e-5"; None for anything else."""
    return Decimal(answer.replace(",", "")) if _PLAIN_NUMBER.fullmatch(answer) else None


def _same(given: str, reference: str) -> bool:
    given_percent, reference_percent = (_PERCENT.search(_tidy(answer)) is not None for answer in (given, reference))
    given, reference = clean(given), clean(reference)
    given, reference = _without_spaced_unit(given, reference), _without_spaced_unit(reference, given)
    if _without_spaces(given) == _without_spaces(reference):
        return given != ""
    if _SPACED_NUMBERS.search(given) or _SPACED_NUMBERS.search(reference):  # math-verify reads 1 2 as 1 + 2
        return False
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
    if same_value(given, reference):
        return True
    if given_percent == reference_percent:
        return False
    if given_percent:
        return same_value(f"({_right_side(given)})/100", reference)
    return same_value(_right_side(given), f"({_right_side(reference)})/100")


def _tidy(answer: str) -> str:
    answer = _NEGATIVE_SPACE.sub("", _SPACE.sub("", _FORMULA_MARKS.sub("", answer)))
    answer = _DASH.sub("-", _IGNORED.sub("", answer))
    answer = _ROOT.sub(lambda root: f"\\sqrt{{{root[1] or root[2]}}}", answer)
    answer = _SUPERSCRIPT.sub(lambda power: f"^{{{power[0].translate(_DIGITS)}}}", answer)
    for old, new in _LITERAL_STEPS:
        answer = answer.replace(old, new)
    answer = _REPEATING.sub(_fraction, " ".join(answer.split()).rstrip(".").strip())
    if wrapped := _WRAPPED.fullmatch(answer):
        answer = wrapped[1].strip()
    return _THOUSANDS.sub(lambda number: number[0].replace(" ", ""), answer)


def _fraction(decimal: re.Match[str]) -> str:
    r"""0.1\overline{6} -> \frac{15}{90}."""
    whole, fixed, period = decimal.groups()
    numerator = int(whole + fixed + period) - int(whole + fixed or 0)
    return f"\\frac{{{numerator}}}{{{(10 ** len(period) - 1) * 10 ** len(fixed)}}}"


def _without_spaces(answer: str) -> str:
    return re.sub(r"(?<!\d) | (?!\d)", "", answer)


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
