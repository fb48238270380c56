"""The registry of data set kinds.

A new kind takes a loader, its entry in DATASETS, and its pydantic class (with the same `kind`) in config/datasets.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING

from tip_exp.data import generated, ledger, table, tool_tasks, word_sums
from tip_exp.data.dataset import Dataset
from tip_exp.utils.paths import is_file

if TYPE_CHECKING:
    from tip_exp.config.datasets import DatasetConfig
    from tip_exp.config.schema import RunConfig

DATASETS: dict[str, Callable[..., Dataset]] = {
    "table": table.load,
    "word_sums": partial(generated.load, word_sums.stream),
    "ledger": partial(generated.load, ledger.stream),
    "calculator": tool_tasks.load_calculator,
    "travel": tool_tasks.load_travel,
}
"""Kind (the config's `kind`) → loader. A loader takes the config of its kind and returns problems in a fixed order;
those of tables and travel tasks also take the config's section."""


def load(config: DatasetConfig, section: str = "data.train") -> Dataset:
    """Read or generate a data set. Raises DataError if a file is missing or malformed, or if no problem is left.

    `section`: where the run's config has it, such as "eval.benchmarks.aime24", for the keys in messages.
    """
    loader = DATASETS[config.kind]
    return loader(config, section) if config.kind in ("table", "travel") else loader(config)


_checked: set[str] = set()  # data sets without a fault; the runs of a sweep have the same ones


def check_files(config: RunConfig) -> None:
    """Read the tables of a run that are local files. Raises DataError for a file or row that is malformed.

    Before anything heavy loads: the run itself reads them after the evaluation of its teacher.
    """
    train = {"data.train": config.data.train} if config.mode == "train" else {}
    tests = {f"eval.benchmarks.{name}": dataset for name, dataset in config.eval.benchmarks.items()}
    for section, dataset in (train | tests).items():
        if dataset.kind != "table" or dataset.file is None or not is_file(dataset.file):
            continue
        if (identity := dataset.model_dump_json()) not in _checked:
            with redirect_stdout(StringIO()):  # the run prints which fields it reads
                load(dataset, section)
            _checked.add(identity)
