r"""Whether two answers in LaTeX have the same value, by math-verify and sympy.

math-verify is restricted where it accepts too much: it compares only 6 decimal places. A list equals a tuple of the
same order, a set or list of any order, but no set equals a tuple.
"""

from __future__ import annotations

import re
from typing import Any

import math_verify
import sympy
from latex2sympy2_extended import NormalizationConfig
from sympy.core.relational import Relational

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


def same_value(given: str, reference: str) -> bool:
    """False if one of them does not parse. Raises what math-verify and sympy raise."""
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
