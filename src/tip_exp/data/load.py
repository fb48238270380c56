"""The registry of data set kinds.

A new kind takes a loader, its entry in DATASETS, and its pydantic class (with the same `kind`) in config/datasets.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Any

from tip_exp.data import generated, ledger, table, tool_tasks, word_sums
from tip_exp.data.dataset import Dataset
from tip_exp.utils.paths import is_file

if TYPE_CHECKING:
    from tip_exp.config.datasets import DatasetConfig
    from tip_exp.config.schema import RunConfig

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


_checked: set[str] = set()  # data sets without a fault; the runs of a sweep have the same ones


def check_files(config: RunConfig) -> None:
    """Read the tables of a run that are local files. Raises DataError for a file or row that is malformed.

    Before anything heavy loads: the run itself reads them after the evaluation of its teacher.
    """
    train = [config.data.train] if config.mode == "train" else []
    for dataset in (*train, *config.eval.benchmarks.values()):
        if dataset.kind != "table" or dataset.file is None or not is_file(dataset.file):
            continue
        if (identity := dataset.model_dump_json()) not in _checked:
            with redirect_stdout(StringIO()):  # the run prints which fields it reads
                load(dataset)
            _checked.add(identity)
