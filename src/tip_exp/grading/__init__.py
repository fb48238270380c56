"""Grading: (response text, reference answer) pairs in, `Verdict`s out.

Imports nothing of tip_exp. Imported by data, envs and eval.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tip_exp.grading import boxed, string_match
from tip_exp.grading.groups import group
from tip_exp.grading.types import UNGRADED, Outcome, Verdict

__all__ = ["UNGRADED", "GradeAll", "Grader", "GroupAll", "Verdict", "open_grader"]

GradeAll = Callable[[Iterable[tuple[str, str]]], list[Verdict]]
"""(response, reference answer) pairs to verdicts, in order."""

GroupAll = Callable[[Iterable[list[str]]], list[list[int]]]
"""Lists of extracted answers to the groups of equal ones in each list, by the grader's own equality."""


@dataclass(frozen=True, slots=True)
class Grader:
    """A grader and its equality. A comparison without a result is tried once more by `grade_all`."""

    grade_all: GradeAll
    group_all: GroupAll


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def open_grader(name: str, workers: int | None = None) -> Iterator[Grader]:
    """A grader by its name in the config.

    "math" compares in worker processes, one a core but at most `workers`, which end with the `with` block.
    """
    if name == "math":
        from tip_exp.grading.pool import GradingPool

        with GradingPool(workers=min(cores(), workers or cores())) as pool:
            yield Grader(with_retry(pool.grade_all), pool.group_all)
    else:
        grade = {"boxed_integer": boxed.grade, "strict": string_match.grade}[name]

        def compare(given: str, reference: str) -> Outcome:
            return "same" if grade(f"\\boxed{{{given}}}", reference).right else "different"

        yield Grader(
            lambda pairs: [grade(text, answer) for text, answer in pairs],
            lambda answer_lists: [group(answers, compare) for answers in answer_lists],
        )


def with_retry(grade_all: GradeAll) -> GradeAll:
    """Grade what got no result once more, after all others, when the machine may be less busy."""

    def grade_twice(pairs: Iterable[tuple[str, str]]) -> list[Verdict]:
        pairs = list(pairs)
        verdicts = grade_all(pairs)
        failed = [i for i, verdict in enumerate(verdicts) if verdict.rule in UNGRADED]
        for i, verdict in zip(failed, grade_all([pairs[i] for i in failed]), strict=True):
            verdicts[i] = verdict
        return verdicts

    return grade_twice
