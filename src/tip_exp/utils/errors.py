"""Errors that a user can cause, their format, and the exit codes of every command."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import NoReturn

# As torch, its allocators for GPU and CPU, and cuBLAS say it.
_OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED")
FAILED, BAD_CONFIG, RESTARTS, INTERRUPTED, TERMINATED = 1, 2, 75, 130, 143


class ConfigError(ValueError):
    """The run cannot start as configured; the message names the key, the value and the remedy."""


class DataError(ValueError):
    """A data file cannot be read as configured; the message names the file and the fault."""


class RunFailedError(RuntimeError):
    """A run ended without a result; the message says why or where its log is."""


class RestartsError(RunFailedError):
    """A run on one node has ended, and its launcher starts it again from the newest checkpoint."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the device or of the host did not suffice; False for an error of this package."""
    if isinstance(error, MemoryError):
        return True
    is_torchs = isinstance(error, RuntimeError) and not isinstance(error, RunFailedError)
    return is_torchs and _OUT_OF_MEMORY.search(str(error)) is not None


def exit_code(error: BaseException) -> int:
    """FAILED for an error of the run or the system, BAD_CONFIG for an error in the command line or a config file."""
    return FAILED if isinstance(error, RunFailedError | OSError) else BAD_CONFIG


def format_error(error: BaseException) -> str:
    """`error: <message>`, plus OmegaConf's message where Hydra wraps it without repeating it."""
    from omegaconf.errors import OmegaConfBaseException

    cause = f"\n{error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
    return f"error: {str(error) or type(error).__name__}{cause}"


@contextmanager
def exit_on_error(*kinds: type[Exception]) -> Iterator[None]:
    """End the process with one message on stderr, without a traceback, at an error of these kinds.

    BrokenPipeError, which an output without a reader raises, passes.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except kinds as error:
        print(format_error(error), file=sys.stderr)
        sys.exit(exit_code(error))


def first_line(error: BaseException) -> str:
    """First line of the error's message, with the first reason of one by pydantic; its type if the message is empty."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    if re.match(r"\d+ validation error", first) and others:
        first = f"{first}: {' '.join(' '.join(others).split()).partition(' [type=')[0]}"
    return first


def say(text: str) -> None:
    """Print a line on stderr, above a progress bar if there is one; from any thread."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def quiet_when_reader_closes(command: Callable[[], None]) -> Callable[[], None]:
    """For the main function of a command: end without a message if its output's reader, such as `head`, has closed."""

    @wraps(command)
    def guarded() -> None:
        try:
            try:
                command()
            finally:
                sys.stdout.flush()  # here, since an error at the interpreter's exit could not be caught
        except BrokenPipeError:
            end_without_output()

    return guarded


def end_without_output() -> NoReturn:
    """End as failed; what is still to be printed is dropped."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(FAILED)
