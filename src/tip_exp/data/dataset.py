"""A problem is one item to train or test on, and the order in which a run meets its problems."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tip_exp.types import Problem

if TYPE_CHECKING:
    from tip_exp.envs.base import ToolTasks

DATA_SEED = 0  # of generated problems: every run trains and is tested on the same ones


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set as it was read: its problems, where from, and the SHA-256 of the file (or of the generated text)."""

    problems: list[Problem]
    source: str
    sha256: str
    tools: ToolTasks | None = None  # of tasks that are played in an environment instead of answered at once


@dataclass(slots=True)
class ShuffledOrder:
    """Epochs in shuffled order; each is a function of the seed and its number, so resuming needs no iterator state."""

    num_problems: int
    seed: int
    _epochs: dict[int, list[int]] = field(default_factory=dict)

    def batch(self, step: int, size: int) -> list[int]:
        """Indices of the problems of step `step` (from 1). A batch may span two epochs."""
        return [self._at(place) for place in range((step - 1) * size, step * size)]

    def _at(self, place: int) -> int:
        epoch, index = divmod(place, self.num_problems)
        if epoch not in self._epochs:
            order = list(range(self.num_problems))
            random.Random(f"epoch/{self.seed}/{epoch}").shuffle(order)
            self._epochs = {epoch: order} if len(self._epochs) > 1 else self._epochs | {epoch: order}
        return self._epochs[epoch][index]
