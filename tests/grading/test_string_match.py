"""The string grader: every step of the normalization, and what it keeps apart."""

from __future__ import annotations

import pytest

from tip_exp.grading import string_match

NORMALIZED = [
    # answer, its normal form
    ("5", "5"),
    (" 1 + x\n", "1+x"),
    (r"10,\!080", "10,080"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    (r"\tfrac12", r"\frac{1}{2}"),
    (r"\frac1{72}", r"\frac{1}{72}"),
    (r"\frac{1}2", r"\frac{1}2"),  # unchanged, as in the base code
    ("1/2", r"\frac{1}{2}"),
    ("-3/4", r"\frac{-3}{4}"),
    ("01/2", "01/2"),
    ("x/2", "x/2"),
    ("1/2/3", "1/2/3"),
    ("0.5", r"\frac{1}{2}"),
    (".5", r"\frac{1}{2}"),
    ("0.50", "0.50"),
    ("1 + .5", "1+0.5"),
    ("{.5}", "{0.5}"),
    (r"\sqrt3", r"\sqrt{3}"),
    (r"\left(1, 2\right)", "(1,2)"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"\$36", "36"),
    (r"12\%", "12"),
    ("12%", "12%"),
    (r"5\text{ cm}", "5"),
    (r"5\text{cm}", r"5\text{cm}"),
    (r"5\text{ m}^2", "5"),  # a unit is \text with a space; nothing else is
    ("5 m^2", "5m^2"),
    ("5m^2", "5m^2"),
    ("x = 5", "5"),
    ("area = 5", "area=5"),
    ("a=b=5", "a=b=5"),
    (r"a \\ b", "a\\b"),
    ("", ""),
]


@pytest.mark.parametrize(("answer", "normal"), NORMALIZED)
def test_normalization(answer: str, normal: str) -> None:
    assert string_match.normalize(answer) == normal


VERDICTS = [
    # text, reference answer, right, extracted, rule
    (r"so $\boxed{\dfrac{1}{2}}$", r"\frac12", True, r"\dfrac{1}{2}", "boxed"),
    (r"\boxed{1} then \boxed{2}", "2", True, "2", "boxed"),
    (r"\boxed{1} then \boxed{2}", "1", False, "2", "boxed"),
    (r"\fbox{7}", "7", True, "7", "boxed"),
    (r"$\boxed 5$", "5", True, "5", "boxed"),
    (r"\boxed{25}", "025", False, "25", "boxed"),  # seven answers of AIME 2024 have leading zeros
    (r"\boxed{x+1}", "1+x", False, "x+1", "boxed"),
    (r"\boxed{-x=5}", "x=5", True, "-x=5", "boxed"),  # two characters before "=" are dropped
    ("the answer is 5", "5", False, None, "unparsed"),
    (r"\boxed{5", "5", False, None, "unparsed"),
    ("", "5", False, None, "unparsed"),
]


@pytest.mark.parametrize(("text", "answer", "right", "extracted", "rule"), VERDICTS)
def test_the_last_box_is_compared_as_a_string(
    text: str, answer: str, right: bool, extracted: str | None, rule: str
) -> None:
    verdict = string_match.grade(text, answer)
    assert (verdict.right, verdict.extracted, verdict.rule) == (right, extracted, rule)
