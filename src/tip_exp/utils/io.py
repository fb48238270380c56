"""Files that survive a crash: JSON lines appended in one write, whole files replaced by a rename."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str) -> None:
    """Write beside `path`, then rename: readers see the old file or the new one, never a part.

    Processes that write the same file at once do not disturb each other; the last rename wins. Half characters, which
    UTF-8 cannot hold, are escaped as in JSON.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(path)


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append JSON lines in one write: a kill can leave only the last line incomplete."""
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json_lines(rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete JSON lines of a file; empty if the file does not exist."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # the last part is empty or an incomplete line


def to_json_lines(rows: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return text.encode(errors="backslashreplace").decode()  # half characters, which UTF-8 cannot hold, as in JSON
