"""A data set in memory, and the order in which a run draws its problems."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from tip_exp.types import Problem

if TYPE_CHECKING:
    from tip_exp.envs.base import ToolTasks


@dataclass(frozen=True, slots=True)
class Dataset:
    """Problems with their provenance. `tools` is set for tasks that are played in an environment."""

    problems: list[Problem]
    source: str
    sha256: str  # of the file, or of the generated prompts and answers
    tools: ToolTasks | None = None

    @classmethod
    def generated(cls, problems: list[Problem], source: str, tools: ToolTasks | None = None) -> Dataset:
        """A data set without a file."""
        text = "\n".join(f"{problem.prompt}\t{problem.answer}" for problem in problems)
        return cls(problems, source, hashlib.sha256(text.encode()).hexdigest(), tools)


@dataclass(frozen=True, slots=True)
class ShuffledOrder:
    """Shuffled epochs. Each epoch is a function of seed and epoch number, so a resumed run needs no iterator state."""

    num_problems: int
    seed: int

    def batch(self, step: int, size: int) -> list[int]:
        """Indices of the problems of step `step` (from 1). A batch may span several epochs."""
        draws = [divmod(position, self.num_problems) for position in range((step - 1) * size, step * size)]
        return [_shuffled_epoch(self.num_problems, self.seed, epoch)[index] for epoch, index in draws]


@lru_cache(maxsize=2)
def _shuffled_epoch(num_problems: int, seed: int, epoch: int) -> list[int]:
    order = list(range(num_problems))
    random.Random(f"epoch/{seed}/{epoch}").shuffle(order)
    return order
