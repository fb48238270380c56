"""Grading: (response text, reference answer) pairs in, `Verdict`s out.

Imports nothing of tip_exp. Imported by envs and eval.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from tip_exp.grading import boxed, string_match
from tip_exp.grading.types import Verdict

__all__ = ["GradeAll", "Verdict", "open_grader"]

GradeAll = Callable[[Iterable[tuple[str, str]]], list[Verdict]]
"""(response, reference answer) pairs to verdicts, in order."""


@contextmanager
def open_grader(name: str) -> Iterator[GradeAll]:
    """A grader by its name in the config. "math" compares in worker processes, which end with the `with` block."""
    if name == "math":
        from tip_exp.grading.pool import GradingPool

        with GradingPool(workers=os.cpu_count() or 1) as pool:
            yield pool.grade_all
    else:
        grade = {"boxed_integer": boxed.grade, "strict": string_match.grade}[name]
        yield lambda pairs: [grade(text, answer) for text, answer in pairs]
