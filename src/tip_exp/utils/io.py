"""Files that survive a crash: JSON lines appended in one write, whole files replaced by a rename."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from tip_exp.utils.errors import DataError


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside `path`, fsync, then rename: readers and a power loss see the old file or the new one, never a part.

    Processes that write the same file at once do not disturb each other; the last rename wins. Lone surrogates,
    which UTF-8 cannot encode, are escaped as in JSON.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
        flush(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """fsync a file or folder, so that a rename never reaches the disk before the data it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: Path) -> str:
    """The first 12 digits of a file's SHA-256, read again only if its size or time has changed."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest(path: Path, *_: int) -> str:
    return checksum(path)[:12]


def remove_folder(path: Path) -> None:
    """Rename, then remove: a kill in between leaves no folder under this name that lacks files."""
    removed = path.with_name(f".removing_{path.name}")
    shutil.rmtree(removed, ignore_errors=True)
    if path.exists():
        path.rename(removed)
        shutil.rmtree(removed)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete JSON lines of a file; empty if the file does not exist."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # the last part is empty or an incomplete line


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE, line N", the object) of every line of a user's file that is not empty; DataError at another line."""
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON in UTF-8 ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object; got {type(row).__name__}")
        yield where, row


def to_json_lines(rows: list[dict[str, Any]]) -> str:
    text = "".join(to_json(row) + "\n" for row in rows)
    return text.encode(errors="backslashreplace").decode()  # lone surrogates, which UTF-8 cannot encode, as in JSON


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON of `value`; null for nan and infinities, which JSON does not have."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(without_nan(value), ensure_ascii=False, indent=indent)


def without_nan(value: Any) -> Any:
    """The same values with None in place of nan and infinities, which JSON does not have; tuples become lists."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
