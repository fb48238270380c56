"""Grading of integer answers in a box."""

from __future__ import annotations

import pytest

from tip_exp.grading import boxed


@pytest.mark.parametrize(
    ("text", "right", "extracted"),
    [
        ("so \\boxed{29}", True, "29"),
        ("\\boxed{3} then \\boxed{29}", True, "29"),
        ("\\boxed{29} then \\boxed{3}", False, "3"),
        ("\\boxed{029}", True, "029"),
        ("\\boxed{ 29 }", True, "29"),
        ("\\boxed{+29}", False, None),
        ("\\boxed{29} wait, no: \\boxed{29.5}", False, None),
        ("\\boxed{29} wait, no: \\boxed{\\frac{1}{2}}", False, None),
        ("\\boxed{3 = \\boxed{29}}", True, "29"),
        ("\\boxed{29} then \\boxed{3", True, "29"),  # cut off
        ("29", False, None),
        ("\\boxed{}", False, None),
        ("\\boxed{2", False, None),
        ("", False, None),
    ],
)
def test_boxed_integers(text: str, right: bool, extracted: str | None) -> None:
    verdict = boxed.grade(text, "29")
    assert (verdict.right, verdict.extracted) == (right, extracted)
    assert verdict.rule == ("unparsed" if extracted is None else "boxed")
