"""Reads run folders back, thousands in seconds: an index beside them keeps what was read and detects changes.

The index is `.tip_index.jsonl` in the searched folder: a line with the SHA-256 of the rest, then a line for each run. A
run is read again when the size or time of its config.yaml or result.json differs from the index, or when its rows or
model/ are not of the size in result.json or newer; without an index all runs and their rows are read.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from tip_exp.records.folder import RunFolder
from tip_exp.records.integrity import Depth, damage, damaged_files
from tip_exp.records.validate import check_config, check_result
from tip_exp.utils.errors import DataError, first_line
from tip_exp.utils.io import to_json_lines, write_atomic

INDEX = ".tip_index.jsonl"
MARKS = {"config.yaml", "metrics.jsonl", "result.json"}  # a folder with one of them is a run, if only a damaged one
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's loader is ten times faster
# benchmark -> {"samples": k, "right": {problem id: sum of the scores of its k responses}}, of the sampled responses if
# there are any, else of the greedy ones; "start": the same of step 0; and where measured {"greedy": {problem id: score
# of the greedy response}, "seq_kl": {problem id: mean of log_kl (records/metrics.py) over its sampled responses}}
Outcomes = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run folder: config.yaml, result.json (None while unfinished), and the final scores by problem.

    `damage` says why its files cannot be read; the other fields are then empty.
    """

    folder: str
    stamp: list[int]  # size and time of config.yaml and, if it exists, of result.json
    config: dict[str, Any]
    result: dict[str, Any] | None
    outcomes: Outcomes
    overrides: list[str]  # as Hydra has written them; empty if the file is absent or torn
    damage: str = ""

    @property
    def is_done(self) -> bool:
        return self.result is not None


def find_runs(roots: list[Path]) -> list[RunFolder]:
    """All folders below the roots that hold files of a run, as `natural` sorts them; none inside a run."""
    return [RunFolder(path) for path in sorted({path for root in roots for path in _walk(root)}, key=natural)]


def runs_below(roots: list[Path]) -> list[RunFolder]:
    """`find_runs` of folders that a user gave. Raises DataError if one is no folder, or if they hold no run."""
    for root in roots:
        if not root.is_dir():
            raise DataError(f"{root} is not a folder; give a run, such as outputs/runs/NAME, or a folder of runs")
    runs = find_runs(roots)
    if not runs:
        raise DataError(f"no run (a folder with config.yaml) below {', '.join(map(str, roots))}")
    return runs


def read_runs(roots: list[Path]) -> list[RunRecord]:
    """The records of all whole runs below the roots, as of `read_all`."""
    return [record for record in read_all(roots) if not record.damage]


def read_all(roots: list[Path]) -> list[RunRecord]:
    """The records of all runs below the roots, by folder; reads and updates the index of each root.

    A root that is a file is an archive; raises DataError if it cannot be read. A run of an archive whose folder is read
    as well counts once. Evaluations of a teacher alone are left out: the runs that share them hold their numbers.
    """
    by_folder: dict[str, RunRecord] = {}
    for root in sorted(roots, key=Path.is_file):
        if root.is_file():
            seen = {_identity(record) for record in by_folder.values() if record.is_done}
            by_folder |= {record.folder: record for record in read_archive(root) if _identity(record) not in seen}
            continue
        indexed = _load_index(root)
        records = [_record(folder, indexed) for folder in find_runs([root])]
        if list(map(_indexed_as, records)) != list(map(_indexed_as, indexed.values())):
            _write_index(root, records)
        by_folder |= {record.folder: record for record in records}
    records = [by_folder[folder] for folder in sorted(by_folder, key=natural)]
    return [record for record in records if record.config.get("mode") != "teacher"]


def _indexed_as(record: RunRecord) -> tuple[object, ...]:
    """What the index must agree on."""
    return record.folder, record.stamp, record.damage


def _identity(record: RunRecord) -> tuple[object, ...]:
    """Equal for copies of one finished run, but not for the runs of two sweeps that share its files."""
    result = record.result or {}
    return _name(record), record.config.get("sweep"), result.get("digest"), result.get("finished_at")


def _name(record: RunRecord) -> str:
    """Of the folder, without the number that an archive gives it."""
    return Path(record.folder).name.partition("~")[0]


def natural(path: Path | str) -> tuple[list[str | int], str]:
    """A sort key in which numbers count by their value: a.r5.s2, a.r5.s10, a.r20.s0."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))], str(path)


def read_run(folder: RunFolder, depth: Depth = "rows") -> RunRecord:
    """Read one run from its files. Raises ValueError or OSError if they are damaged.

    `depth`: which files' SHA-256 are compared (integrity.Depth). A launch may change files at any moment.
    """
    while True:
        stamp = _stamp(folder)
        try:
            return _read(folder, stamp, depth)
        except (ValueError, OSError):
            if _stamp(folder) == stamp:
                raise


def _read(folder: RunFolder, stamp: list[int], depth: Depth) -> RunRecord:
    config = _parsed(folder.config, lambda text: yaml.load(text, Loader=_Loader), ...)
    if config is ...:
        raise ValueError(f"{folder.config.name} is missing")
    check_config(config)
    result = _parsed(folder.result, json.loads, None)
    if result is not None:
        check_result(result)
        if why := damage(folder, result, depth):
            raise ValueError(why)
    outcomes = result.pop("outcomes") if result else {}
    return RunRecord(str(folder.root), stamp, config, result, outcomes, _overrides(folder.overrides))


def _overrides(path: Path) -> list[str]:
    try:
        read = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, ValueError, yaml.YAMLError):
        return []
    return [text for text in read if isinstance(text, str)] if isinstance(read, list) else []


def _parsed(path: Path, parse: Callable[[str], Any], missing: Any) -> Any:
    """What the file holds, or `missing`. Opened once: a launch may remove or replace it at any moment."""
    try:
        text = path.read_text(encoding="utf-8")
        if text:
            return parse(text)
    except FileNotFoundError:
        return missing
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is torn ({first_line(error)})") from None
    raise ValueError(f"{path.name} is empty")


def _record(folder: RunFolder, indexed: dict[str, RunRecord]) -> RunRecord:
    record = indexed.get(str(folder.root))
    try:
        if record is None or record.damage or record.stamp != _stamp(folder):
            return read_run(folder)
        return read_run(folder) if damaged_files(folder, record.result or {}, "newer") else record
    except (ValueError, OSError) as error:
        return RunRecord(str(folder.root), _stamp(folder), {}, None, {}, [], damage=first_line(error))


def _stamp(folder: RunFolder) -> list[int]:
    stamp: list[int] = []
    for path in (folder.config, folder.result):
        with suppress(OSError):
            status = path.stat()
            stamp += [status.st_size, status.st_mtime_ns]
    return stamp


def _walk(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """`above`: device and inode of the folders above this one; a link to one of them is not followed."""
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except OSError:  # a link to itself, or a folder that may not be read
        return
    identity = status.st_dev, status.st_ino
    if identity in above:
        return
    if any(entry.name in MARKS for entry in entries):
        yield folder
        return
    for entry in entries:
        if not entry.name.startswith(".") and os.path.isdir(entry.path):
            yield from _walk(Path(entry.path), above | {identity})


def write_archive(path: Path, records: list[RunRecord]) -> None:
    """Write the records as NAME.runs.gz: about a kilobyte a run, of which all tables can be made again.

    Rows of metrics, samples and the token viewer are not in it. Folders of the same name are numbered: NAME, NAME~2, …
    """
    names: Counter[str] = Counter()
    rows: list[dict[str, Any]] = [asdict(record) | {"folder": _name(record), "stamp": []} for record in records]
    for row in rows:
        names[name := row["folder"]] += 1
        row["folder"] = name if names[name] == 1 else f"{name}~{names[name]}"
        row["result"] = {key: value for key, value in (row["result"] or {}).items() if key not in ("files", "sha256")}
        row["result"] = row["result"] or None
    write_atomic(path, gzip.compress(_with_checksum(to_json_lines(rows)).encode(), mtime=0))


def read_archive(path: Path) -> list[RunRecord]:
    """The records of `write_archive`, whose folders are named PATH/NAME. Raises DataError if it is torn or none."""
    try:
        return _records(gzip.decompress(path.read_bytes()).decode(), path)
    except (OSError, EOFError, ValueError, TypeError, KeyError, zlib.error) as error:
        raise DataError(f"{path} is no whole archive of runs (NAME.runs.gz of tip-report results)") from error


def _load_index(root: Path) -> dict[str, RunRecord]:
    """Records by folder; empty if the index is missing, torn or of another format."""
    try:
        records = _records((root / INDEX).read_text(encoding="utf-8"), root)
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return {record.folder: record for record in records}


def _write_index(root: Path, records: list[RunRecord]) -> None:
    """Write folders relative to the root, so that the tree can be moved. A full or read-only disk gets none."""
    if os.access(root, os.W_OK):
        rows = [asdict(record) | {"folder": os.path.relpath(record.folder, root)} for record in records]
        with suppress(OSError):
            write_atomic(root / INDEX, _with_checksum(to_json_lines(rows)))


def _records(text: str, root: Path) -> list[RunRecord]:
    """Of `_with_checksum`; raises ValueError, TypeError or KeyError if the text is torn or of another format."""
    written, _, lines = text.partition("\n")
    if written != _checksum(lines):
        raise ValueError("not of its checksum")
    rows = [json.loads(line) for line in lines.split("\n")[:-1]]
    return [RunRecord(**row | {"folder": str(root / row["folder"])}) for row in rows]


def _with_checksum(lines: str) -> str:
    return f"{_checksum(lines)}\n{lines}"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
