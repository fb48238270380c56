"""Problems to train and test on."""

from __future__ import annotations

import hashlib
from itertools import islice
from typing import TYPE_CHECKING

from tip_exp.data import table, tool_tasks, word_sums
from tip_exp.data.dataset import DATA_SEED, Dataset, ShuffledOrder
from tip_exp.types import Problem
from tip_exp.utils.errors import DataError

if TYPE_CHECKING:
    from tip_exp.config.schema import DatasetConfig

__all__ = ["DataError", "Dataset", "Problem", "ShuffledOrder", "load"]


def load(dataset: DatasetConfig) -> Dataset:
    """The problems of a data set, in a fixed order."""
    if dataset.kind == "table":
        return table.load(dataset)
    if dataset.kind == "travel":
        return tool_tasks.load_travel(dataset)
    if dataset.kind == "calculator":
        return tool_tasks.load_calculator(dataset)
    stories = word_sums.stream(dataset.split, DATA_SEED)
    problems = list(islice(stories, dataset.num_problems))
    text = "\n".join(f"{problem.prompt}\t{problem.answer}" for problem in problems)
    return Dataset(problems, f"word_sums, seed {DATA_SEED}", hashlib.sha256(text.encode()).hexdigest())
