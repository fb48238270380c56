"""What a piece of work costs: CPU and wall seconds, peak memory; each measurement in a child process, rows to a CSV."""

from __future__ import annotations

import csv
import ctypes
import gc
import importlib.util
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tip_exp.records.meter import reset_high_water, status_bytes
from tip_exp.utils.units import MIB

Result = TypeVar("Result")

INSTALL = "pip install 'tip_exp[bench]'"


@dataclass(frozen=True, slots=True)
class Cost:
    """`peak_extra_mib`: the highest resident memory during the work, above what was resident when it began."""

    cpu_s: float
    wall_s: float
    peak_extra_mib: float


def cost_of(work: Callable[[], Result]) -> tuple[Cost, Result]:
    """Do the work once. Freed pages are given back first, so that none is reused unseen (Linux with glibc)."""
    gc.collect()
    _give_back_freed_pages()
    held = status_bytes("VmRSS")
    reset_high_water()
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Cost(cpu, wall, (status_bytes("VmHWM") - held) / MIB), result


def in_child(work: Callable[..., Result], *arguments: object, threads: int) -> Result:
    """work(*arguments) in a fresh process of `threads` CPU threads: nothing of earlier work is resident there."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}  # read when a library is loaded
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def missing(libraries: Iterable[str]) -> list[str]:
    """Those of the libraries that are not installed."""
    return [name for name in libraries if importlib.util.find_spec(name) is None]


def tell_missing(libraries: Sequence[str], consequence: str) -> None:
    print(f"not installed: {', '.join(libraries)} ({INSTALL}); {consequence}", file=sys.stderr)


def write_csv(rows: Sequence[Mapping[str, object]], columns: Sequence[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table: csv.DictWriter[str] = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)


def read_csv(path: Path) -> list[dict[str, object]]:
    """The rows that are there, every value as text; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [dict(row) for row in csv.DictReader(file)]


def _give_back_freed_pages() -> None:
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
