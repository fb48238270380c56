"""A run that another sweep has finished is not run again: its files are linked in under the new name.

Two runs are the same when their digests are: everything that decides the numbers, but name, sweep and logger.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from tip_exp.config.parse import digest
from tip_exp.config.schema import RunConfig
from tip_exp.records.folder import RunFolder
from tip_exp.records.reader import find_runs
from tip_exp.utils.io import write_atomic


def finished_digests(outputs: Path) -> dict[str, RunFolder]:
    """digest -> a finished run below `outputs`; of several the first by name, and originals before links."""
    found: dict[str, tuple[bool, RunFolder]] = {}
    for folder in find_runs([outputs]) if outputs.is_dir() else []:
        result = read_result(folder)
        if result is None:
            continue
        known, is_link = found.get(result["digest"]), "reused_from" in result
        if known is None or (known[0] and not is_link):
            found[result["digest"]] = (is_link, folder)
    return {key: folder for key, (_, folder) in found.items()}


def find_twin(config: RunConfig, folder: RunFolder, finished: dict[str, RunFolder]) -> RunFolder | None:
    """The finished run of another folder with the same digest."""
    twin = finished.get(digest(config))
    return None if twin is None or twin.root.resolve() == folder.root.resolve() else twin


def adopt(config: RunConfig, folder: RunFolder, twin: RunFolder) -> None:
    """Make `folder` hold what `twin` holds, its result last, with a note of where it comes from.

    Rows are hard links, so that they outlive the other folder; the checkpoint stays with the original.
    """
    for name in (folder.metrics.name, folder.eval_rows.name, folder.samples.name):
        source, target = twin.root / name, folder.root / name
        target.unlink(missing_ok=True)
        if source.exists():
            try:
                os.link(source, target)
            except OSError:  # another file system
                shutil.copyfile(source, target)
    result = read_result(twin)
    assert result is not None, "find_twin returns finished runs"
    result |= {"name": config.name, "reused_from": str(twin.root)}
    write_atomic(folder.result, json.dumps(result, indent=2) + "\n")


def read_result(folder: RunFolder) -> dict | None:
    """result.json, or None: there is none, or it is not one of a finished run."""
    try:
        result = json.loads(folder.result.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return result if isinstance(result, dict) and "digest" in result else None
