"""Answers grouped by value, for a vote."""

from __future__ import annotations

from collections.abc import Callable

from tip_exp.grading.types import Outcome


def group(answers: list[str], compare: Callable[[str, str], Outcome]) -> list[int]:
    """The group of each answer, numbered by first appearance: group(["1/2", "3", "0.5"], compare) is [0, 1, 0].

    Equal strings are one group without a comparison. An answer is compared with the first of each group. If one of
    these comparisons has no result, the answer is a group by itself, and later answers are not compared with it.
    """
    by_string: dict[str, int] = {}
    firsts: dict[int, str] = {}  # the first answer of each group that later answers are compared with
    for answer in answers:
        string = "".join(answer.split())
        if string in by_string:
            continue
        number = len(set(by_string.values()))
        for existing, first in firsts.items():
            outcome = compare(answer, first)
            if outcome == "same":
                number = existing
            if outcome != "different":
                break
        else:
            firsts[number] = answer
        by_string[string] = number
    return [by_string["".join(answer.split())] for answer in answers]
