"""Writes that wait while a disk is full, so that a run goes on once there is space again."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from tip_exp.utils.errors import say
from tip_exp.utils.termination import Terminated, is_requested

T = TypeVar("T")
log = logging.getLogger(__name__)

RETRY_S, LONGEST_S = 30.0, 3600.0  # between two attempts; from the first to the last
_POLL_S = 0.2
_ERRNOS = errno.ENOSPC, errno.EDQUOT
_MESSAGES = "No space left on device", "Disk quota exceeded"  # of libraries that hide the OSError


def is_full(error: BaseException) -> bool:
    """Whether a write failed because the disk, or this user's quota on it, is full."""
    return (isinstance(error, OSError) and error.errno in _ERRNOS) or any(text in str(error) for text in _MESSAGES)


def when_there_is_space(write: Callable[[], T], path: Path) -> T:
    """The result of `write`, which is called every RETRY_S while the disk is full.

    Raises OSError once it was full for LONGEST_S, Terminated if the process is asked to end meanwhile, and what `write`
    raises for another reason.
    """
    started = 0.0
    while True:
        try:
            result = write()
        except Exception as error:
            if not is_full(error):
                raise
            now = time.monotonic()
            if not started:
                started = now
                _say(
                    f"no space left for {path}: tried again every {RETRY_S:g} s, at most {LONGEST_S / 60:g} min; the "
                    "newest checkpoint is whole"
                )
            if is_requested():
                raise Terminated(f"no space left for {path}") from error
            if now - started >= LONGEST_S:
                message = f"no space left for {LONGEST_S / 60:g} min; free some, and the same command resumes the run"
                raise OSError(errno.ENOSPC, message, str(path)) from error
        else:
            if started:
                _say(f"{path} is written; the run goes on")
            return result
        until = time.monotonic() + RETRY_S
        while time.monotonic() < until and not is_requested():
            time.sleep(min(_POLL_S, RETRY_S))


def _say(text: str) -> None:
    log.warning("%s", text)
    with suppress(OSError):  # the terminal may be a file on the same disk
        say(text)
