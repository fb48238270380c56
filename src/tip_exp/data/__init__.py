"""Problems to train and test on."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from tip_exp.data import word_sums
from tip_exp.data.problems import Order, Problem

if TYPE_CHECKING:
    from tip_exp.config import DatasetConfig

__all__ = ["Order", "Problem", "load"]


def load(dataset: DatasetConfig) -> list[Problem]:
    """The problems of a data set, in a fixed order."""
    stories = word_sums.stream(dataset.split, dataset.seed, min_steps=dataset.min_steps, max_steps=dataset.max_steps)
    return list(islice(stories, dataset.num_problems))
