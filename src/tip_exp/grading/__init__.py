"""Is a response right? Graders by name: text and known answer in, verdict out."""

from __future__ import annotations

from tip_exp.grading import boxed
from tip_exp.grading.types import Verdict

__all__ = ["GRADERS", "Verdict"]

GRADERS = {"boxed_integer": boxed.grade}
