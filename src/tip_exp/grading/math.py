r"""The grader for mathematics: compares the value of two answers, whatever their notation.

Tests from cheap to costly, the first that applies decides: equal strings, plain numbers ("025" is 25, "1,234" is 1234),
numerals in a base (52_8), words (\text{(C)}, \text{even}), then algebra by math-verify. math-verify is restricted where
it accepts too much: it parses 2m as 2 metres, 52_8 and 52_9 as 52, and compares only 6 decimal places. A list equals
a tuple of the same order, a set or list of any order, but no set equals a tuple.

An answer that does not parse as mathematics is right only if its string equals the reference answer.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import math_verify
import sympy
from latex2sympy2_extended import NormalizationConfig
from sympy.core.relational import Relational

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
    if _same_mathematics(given, reference):
        return True
    if given_percent == reference_percent:
        return False
    if given_percent:
        return _same_mathematics(f"({_right_side(given)})/100", reference)
    return _same_mathematics(_right_side(given), f"({_right_side(reference)})/100")


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


def _same_mathematics(given: str, reference: str) -> bool:
    parsed_reference, parsed_given = _parse(reference), _parse(given)
    if not parsed_reference or not parsed_given:
        return False
    values = _with_order(parsed_reference[0], reference, parsed_given[0], given)
    if values is None:
        return False
    if any(variable.name == "i" for value in values for variable in _variables(value)):
        values = _complex(values[0]), _complex(values[1])
    reference_value, given_value = values
    same = math_verify.verify(
        reference_value,
        given_value,
        allow_set_relation_comp=True,  # -2 <= x <= 7 and [-2, 7]
        timeout_seconds=0,  # no alarm
        raise_on_error=True,
    )
    return same and not _far_apart(reference_value, given_value)


def _with_order(a: Any, a_text: str, b: Any, b_text: str) -> tuple[Any, Any] | None:
    r"""Lists without braces in the order of an ordered pair: "1, 2" and "x = 1, y = 2" are (1, 2).

    None if the answers differ: 1, 1 is not 1 and \{1, 2\} is not (1, 2).
    """
    a_items, b_items = _items(a, a_text), _items(b, b_text)
    if a_items and b_items and len(a_items) != len(b_items):
        return None
    if _is_ordered(a) and _is_list(b):
        b = _as_tuple(b_items)
    elif _is_ordered(b) and _is_list(a):
        a = _as_tuple(a_items)
    return None if a is None or b is None else (a, b)


def _items(value: Any, text: str) -> list[Any] | None:
    """The items of a list as written, with repetitions; None for a set, tuple, interval or relation."""
    value = _right(value)
    if isinstance(value, sympy.FiniteSet):
        return None if "\\{" in text else list(getattr(value, "_unsorted_args", value.args))
    return None if isinstance(value, sympy.Set | sympy.Tuple | Relational) else [value]


def _is_list(value: Any) -> bool:
    return isinstance(_right(value), sympy.FiniteSet)


def _is_ordered(value: Any) -> bool:
    return isinstance(_right(value), sympy.Tuple | sympy.Interval)  # (1, 2) is parsed as an interval


def _right(value: Any) -> Any:
    return value.rhs if isinstance(value, sympy.Eq) else value  # x = 1, 2 is one equation


def _as_tuple(items: list[Any] | None) -> sympy.Tuple | None:
    """Equations in alphabetical order of their variables; None for a set and for x = 1, x = 2."""
    names = [str(item.lhs) for item in items or () if isinstance(item, sympy.Eq)]
    if not items or len(set(names)) < len(names):
        return None
    return sympy.Tuple(*(sorted(items, key=lambda item: str(item.lhs)) if len(names) == len(items) else items))


def _complex(value: Any) -> Any:
    r"""i as the imaginary unit: i equals \sqrt{-1}, e^{i\pi} equals -1; not in an inequality."""
    if isinstance(value, sympy.FiniteSet):
        return sympy.FiniteSet(*map(_complex, value.args))
    if isinstance(value, sympy.Eq):
        return sympy.Eq(*map(_complex, value.args), evaluate=False)
    if isinstance(value, sympy.Interval) and value.left_open and value.right_open:  # a pair
        return sympy.Tuple(_complex(value.start), _complex(value.end))
    if isinstance(value, Relational | sympy.And | sympy.Interval):
        return value
    # math-verify's variables are real: x = 3 - i would be False.
    return value.subs({s: sympy.I if s.name == "i" else sympy.Symbol(s.name) for s in _variables(value)})


def _variables(value: Any) -> set[sympy.Symbol]:
    return getattr(value, "free_symbols", set())


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
    if not (a.is_finite and b.is_finite):
        return False
    return bool(abs(a - b) > RELATIVE_TOLERANCE * max(abs(a), abs(b)))
