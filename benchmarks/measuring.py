"""Cost of a function (CPU and wall-clock seconds, peak memory), fresh processes to measure in, and CSV files."""

from __future__ import annotations

import csv
import ctypes
import gc
import importlib.util
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from tip_exp.records.meter import reset_high_water, status_bytes
from tip_exp.utils.units import MIB

Result = TypeVar("Result")
Row = dict[str, object]

INSTALL = "pip install 'tip_exp[bench]'"


@dataclass(frozen=True, slots=True)
class Cost:
    """`peak_extra_mib` is the highest resident memory during the call minus that before it."""

    cpu_s: float
    wall_s: float
    peak_extra_mib: float


def cost_of(function: Callable[[], Result]) -> tuple[Cost, Result]:
    """Call the function once.

    Freed pages return to the system first: reused pages would not raise resident memory (Linux with glibc).
    """
    gc.collect()
    _release_freed_pages()
    resident_before = status_bytes("VmRSS")
    reset_high_water()
    cpu, wall = time.process_time(), time.perf_counter()
    result = function()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Cost(cpu, wall, (status_bytes("VmHWM") - resident_before) / MIB), result


def in_child(function: Callable[..., Result], *arguments: object, threads: int | None = None) -> Result:
    """function(*arguments) in a fresh process, free of memory that earlier work left; `threads`: its CPU threads."""
    options: dict[str, Any] = {}
    if threads is not None:
        os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}  # read as libraries are loaded
        options = {"initializer": torch.set_num_threads, "initargs": (threads,)}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), **options) as pool:
        return pool.submit(function, *arguments).result()


def missing(libraries: Iterable[str]) -> list[str]:
    """Those of the libraries that are not installed."""
    return [name for name in libraries if importlib.util.find_spec(name) is None]


def warn_missing(libraries: Sequence[str], consequence: str) -> None:
    print(f"not installed: {', '.join(libraries)} ({INSTALL}); {consequence}", file=sys.stderr)


def print_row(row: Row) -> None:
    print("  ".join(f"{column} {value}" for column, value in row.items()), flush=True)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the rows, all of which have the columns of the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    """Rows with every value as text; empty if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [dict(row) for row in csv.DictReader(file)]


def _release_freed_pages() -> None:
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
