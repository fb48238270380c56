"""The registry of data set kinds.

A new kind takes a loader, its entry in DATASETS, and its pydantic class (with the same `kind`) in config/datasets.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from tip_exp.data import generated, ledger, table, tool_tasks, word_sums
from tip_exp.data.dataset import Dataset

if TYPE_CHECKING:
    from tip_exp.config.datasets import DatasetConfig

DATASETS: dict[str, Callable[[Any], Dataset]] = {
    "table": table.load,
    "word_sums": partial(generated.load, word_sums.stream),
    "ledger": partial(generated.load, ledger.stream),
    "calculator": tool_tasks.load_calculator,
    "travel": tool_tasks.load_travel,
}
"""Kind (the config's `kind`) → loader. A loader takes the config of its kind and returns problems in a fixed order."""


def load(config: DatasetConfig) -> Dataset:
    """Read or generate a data set. Raises DataError if a file is missing or malformed, or if no problem is left."""
    return DATASETS[config.kind](config)
