"""SIGTERM, which a scheduler sends some time before it kills a process: a request to save and end.

While a process loads, its signals kill it (`kill_while_loading`). Later SIGTERM raises Terminated. After `defer` it
only sets `is_requested`, which a run reads between steps.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

from tip_exp.utils.errors import INTERRUPTED, TERMINATED

SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2  # the last two: what SLURM users and submitit choose


class Terminated(KeyboardInterrupt):
    """The process was asked to end; handled like an interrupt, with another exit code."""


def code_of(stop: KeyboardInterrupt) -> int:
    """The exit code of a process that it ends."""
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


class _Request:
    deferred = False
    received = False


@contextmanager
def without_interrupt() -> Iterator[Callable[[], object]]:
    """Block SIGINT while a child starts, since Python would print a traceback for it then.

    The child is protected until `kill_while_loading`; calling the yielded function ends the block in this process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    end = partial(signal.pthread_sigmask, signal.SIG_SETMASK, before)
    try:
        yield end
    finally:
        end()


def kill_while_loading() -> None:
    """Until handlers are set, let a signal kill the process: what is raised in an import may be dropped."""
    for number in (signal.SIGINT, *SIGNALS):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def handle() -> None:
    """Handle the signals in this process, in its main thread."""
    _Request.deferred = _Request.received = False
    for number in SIGNALS:
        signal.signal(number, _receive)


def defer() -> None:
    """From now on the caller asks `is_requested` at every point at which it can end."""
    _Request.deferred = True


def is_requested() -> bool:
    return _Request.received


def request() -> None:
    """As a signal does after `defer`."""
    _Request.received = True


def is_handled(handler: object) -> bool:
    """Whether a signal's handler is this module's."""
    return handler is _receive


def _receive(number: int, frame: FrameType | None) -> None:
    is_first, _Request.received = not _Request.received, True
    if is_first and not _Request.deferred:  # a second one must not interrupt what the first has started
        raise Terminated(signal.Signals(number).name)


@contextmanager
def saves_before_handlers(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """End `child` before the handler runs that another program, such as submitit, has set for a signal.

    submitit's handler asks SLURM to start the job again, and SLURM then kills it within seconds.
    """
    handlers: dict[int, Callable[..., Any]] = {}

    def save_first(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError, ChildProcessError):  # it has ended, and child.wait() has seen it
            os.kill(child.pid, signal.SIGTERM)
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # child.wait() would wait for a lock that is held
        handlers[number](number, frame)

    for number in SIGNALS if current_thread() is main_thread() else ():
        handler = signal.getsignal(number)
        if callable(handler) and not is_handled(handler):
            handlers[number] = handler
            signal.signal(number, save_first)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
