"""What is wrong in the processes of a run: a kill before a write, a clock that jumps, a tracker without an answer."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

from scripts.chaos.forked import Fault
from tip_exp.records import tracker

WRITES = ("fsync", "rename", "replace", "unlink")  # operations that order writes
TRACKERS = ("init raises", "init hangs", "log raises", "log hangs", "finish hangs")


def kill_at_write(at: int) -> Fault:
    """Kill the process before its `at`-th operation that orders writes."""
    count = 0

    def before() -> None:
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: _before_writes(before)


def count_writes(path: Path) -> Fault:
    """One byte in the file for each operation that orders writes."""

    def before() -> None:
        with path.open("ab") as file:
            file.write(b".")

    return lambda: _before_writes(before)


def _before_writes(act: Callable[[], None]) -> None:
    def preceded(operation: Callable[..., Any]) -> Callable[..., Any]:
        def both(*arguments: Any, **options: Any) -> Any:
            act()
            return operation(*arguments, **options)

        return both

    for name in WRITES:
        setattr(os, name, preceded(getattr(os, name)))


def clock_jump(at: int, seconds: float) -> Fault:
    """The clock jumps by `seconds` at its `at`-th reading."""
    real, count = time.time, 0

    def now() -> float:
        nonlocal count
        count += 1
        return real() + (seconds if count >= at else 0.0)

    def fault() -> None:
        time.time, time.time_ns = now, lambda: int(now() * 1e9)

    return fault


def shift_times(root: Path, draw: random.Random) -> None:
    """Give files and folders times of the past or the future."""
    for path in (root, *root.rglob("*")):
        if not path.is_symlink() and draw.random() < 0.7:
            moment = time.time() + draw.choice((-1, 1)) * draw.uniform(0, 3e8)
            os.utime(path, (moment, moment))


def bad_tracker(how: str) -> Fault:
    """A W&B whose `how` call raises or never returns; the waiting times of a run are shortened."""

    def act(call: str, result: Any = None) -> Any:
        if how == f"{call} hangs":
            Event().wait()
        if how == f"{call} raises":
            raise ConnectionError("no route to host")
        return result

    def init(mode: str, **options: Any) -> Any:
        run = SimpleNamespace(
            dir=str(Path(options["dir"]) / "wandb" / "run-1" / "files"),
            log=lambda *_, **__: act("log"),
            summary=SimpleNamespace(update=lambda _: None),
            finish=lambda **_: act("finish"),
        )
        return act("init", run) if mode == "online" or how == "init hangs" else run

    def fault() -> None:
        tracker.START_S, tracker.FINISH_S = -4.7, 0.5  # a run waits for 5 s more as it starts
        settings, table = (lambda **_: None), (lambda **_: None)
        fake: Any = SimpleNamespace(init=init, Settings=settings, Table=table)
        sys.modules["wandb"] = fake

    return fault
