"""Which problems came out right: the last evaluation of eval.jsonl, a number a problem, for paired comparisons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 1 << 20  # bytes read at once, from the end

# benchmark -> {"samples": k, "right": {problem id: how many of the k responses were right}}
Outcomes = dict[str, dict[str, Any]]


def final_outcomes(eval_rows: Path) -> Outcomes:
    """Of the student's last evaluation, at temperature where there is such a protocol, else greedy.

    Only the end of the file is read: evaluations of long responses grow to gigabytes. No file, no outcomes.
    """
    if not eval_rows.exists():
        return {}
    rows: list[dict[str, Any]] = []
    for row in _rows_from_the_end(eval_rows):
        if rows and row["step"] != rows[0]["step"]:
            break
        rows.append(row)
    rows = [row for row in reversed(rows) if row["model"] == "student"]
    found: Outcomes = {}
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        mine = [row for row in rows if row["benchmark"] == benchmark]
        protocol = "sampled" if any(row["protocol"] == "sampled" for row in mine) else "greedy"
        right: dict[str, float] = {}
        chosen = [row for row in mine if row["protocol"] == protocol]
        for row in chosen:
            right[row["problem_id"]] = right.get(row["problem_id"], 0) + row["right"]
        found[benchmark] = {"samples": len(chosen) // len(right), "right": right}
    return found


def _rows_from_the_end(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON lines file, last one first; a torn last line is no row."""
    with path.open("rb") as file:
        at = file.seek(0, 2)
        rest, is_end = b"", True
        while at > 0:
            start = max(0, at - BLOCK)
            file.seek(start)
            lines = (file.read(at - start) + rest).split(b"\n")
            at, rest = start, lines[0]
            whole = lines[1:-1] if is_end else lines[1:]  # what follows the last line end is torn, or nothing
            is_end = False
            yield from (json.loads(line) for line in reversed(whole))
        if rest and not is_end:
            yield json.loads(rest)
