"""Errors a user can make, and the exit codes of every command."""

from __future__ import annotations

FAILED, BAD_CONFIG, INTERRUPTED = 1, 2, 130


class ConfigError(ValueError):
    """A run that cannot start as configured; the message names the key, the value and the remedy."""


class DataError(ValueError):
    """A data file that cannot be read as configured; the message names the file and what is wrong in it."""


def first_line(error: BaseException) -> str:
    """First line of the error's message; the name of its type if the message is empty."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
