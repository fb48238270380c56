"""Grading: (response text, reference answer) pairs in, `Verdict`s out.

Imports nothing of tip_exp. Imported by envs and eval.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from tip_exp.grading import boxed
from tip_exp.grading import string_match as strict
from tip_exp.grading.types import Verdict

__all__ = ["GRADERS", "GradeAll", "Verdict", "open_grader"]

GradeAll = Callable[[Iterable[tuple[str, str]]], list[Verdict]]
"""(response, known answer) pairs to verdicts, in order."""

GRADERS = ("boxed_integer", "math", "strict")


@contextmanager
def open_grader(name: str) -> Iterator[GradeAll]:
    """A grader by its name; "math" compares in processes of its own, which end with the block."""
    if name == "math":
        from tip_exp.grading.pool import GradingPool

        with GradingPool(workers=os.cpu_count() or 1) as pool:
            yield pool.grade_all
    else:
        grade = {"boxed_integer": boxed.grade, "strict": strict.grade}[name]
        yield lambda pairs: [grade(text, answer) for text, answer in pairs]
