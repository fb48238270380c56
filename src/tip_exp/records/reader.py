"""Run folders -> records, thousands in seconds: an index file beside them holds what was read, and notices changes.

The index is `.tip_index.jsonl` in the folder that was searched. A record is read again when its config.yaml or
result.json has another size or time than when it was indexed; deleting the index costs time and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tip_exp.records.folder import RunFolder
from tip_exp.records.outcomes import Outcomes, final_outcomes

INDEX = ".tip_index.jsonl"
FORMAT = 1  # of the index; another number than in the file means: read everything anew
ADDED = {"mode": "train"}  # keys that came later, with what a config written before them meant
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run folder: what it is (config.yaml), what came out (result.json, if it is done), problem by problem."""

    folder: str
    stamp: list[int]  # size and time of config.yaml and of result.json
    config: dict[str, Any]
    result: dict[str, Any] | None
    outcomes: Outcomes

    @property
    def is_done(self) -> bool:
        return self.result is not None


def find_runs(roots: list[Path]) -> list[RunFolder]:
    """Every folder below the roots that holds a run's config.yaml, by name; nothing below a run is searched."""
    return [RunFolder(path) for path in sorted({path for root in roots for path in _walk(root)})]


def read_runs(roots: list[Path]) -> list[RunRecord]:
    """The records of all runs below the roots, by folder, through each root's index."""
    found: dict[str, RunRecord] = {}
    for root in roots:
        indexed = _load_index(root)
        records = [_record(folder, indexed) for folder in find_runs([root])]
        if [record.stamp for record in records] != [record.stamp for record in indexed.values()]:
            _write_index(root, records)
        found |= {record.folder: record for record in records}
    return [found[folder] for folder in sorted(found)]


def read_run(folder: RunFolder) -> RunRecord:
    """Read one run from its files."""
    config = ADDED | yaml.load(folder.config.read_text(encoding="utf-8"), Loader=_Loader)
    if not folder.result.exists():
        return RunRecord(str(folder.root), _stamp(folder), config, None, {})
    result = json.loads(folder.result.read_text(encoding="utf-8"))
    outcomes = result.pop("outcomes", None)  # runs of version 0.1 have it in eval.jsonl alone
    if outcomes is None:
        outcomes = final_outcomes(folder.eval_rows)
    return RunRecord(str(folder.root), _stamp(folder), config, result, outcomes)


def _record(folder: RunFolder, indexed: dict[str, RunRecord]) -> RunRecord:
    known = indexed.get(str(folder.root))
    return known if known and known.stamp == _stamp(folder) else read_run(folder)


def _stamp(folder: RunFolder) -> list[int]:
    stamp: list[int] = []
    for path in (folder.config, folder.result):
        try:
            status = path.stat()
            stamp += [status.st_size, status.st_mtime_ns]
        except FileNotFoundError:
            stamp += [0, 0]
    return stamp


def _walk(root: Path) -> Iterator[Path]:
    entries = list(os.scandir(root))
    if any(entry.name == "config.yaml" for entry in entries):
        yield root
        return
    for entry in entries:
        if entry.is_dir() and not entry.name.startswith("."):
            yield from _walk(Path(entry.path))


def _load_index(root: Path) -> dict[str, RunRecord]:
    """Records by folder; a missing, torn or older index is empty, and everything is read anew."""
    try:
        head, *lines = (root / INDEX).read_text(encoding="utf-8").splitlines()
        if json.loads(head) != {"tip_index": FORMAT}:
            return {}
        records = [RunRecord(**json.loads(line)) for line in lines]
    except (FileNotFoundError, ValueError, TypeError):
        return {}
    return {str(root / record.folder): replace(record, folder=str(root / record.folder)) for record in records}


def _write_index(root: Path, records: list[RunRecord]) -> None:
    """Through a rename; folders by their place below the root, so that the whole may be moved.

    Where the root cannot be written (somebody else's runs) there is no index.
    """
    if not os.access(root, os.W_OK):
        return
    lines = [json.dumps({"tip_index": FORMAT})]
    lines += [json.dumps(asdict(record) | {"folder": os.path.relpath(record.folder, root)}) for record in records]
    aside = root / f"{INDEX}.{os.getpid()}"
    aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    aside.replace(root / INDEX)


def gather(roots: list[Path]) -> list[RunRecord]:
    """The records below the roots, or an exit that says what is wrong."""
    if missing := [root for root in roots if not root.is_dir()]:
        sys.exit(f"error: {missing[0]} is not a folder; give folders that hold runs, such as outputs/sweeps/demo")
    records = read_runs(roots)
    if not records:
        sys.exit(f"error: no run (a folder with config.yaml) below {', '.join(map(str, roots))}")
    return records
