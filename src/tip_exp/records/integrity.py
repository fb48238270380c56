"""Whether the files of a finished run are those that its result.json was written for.

result.json has `files`, bytes and SHA-256 of config.yaml, the rows and the files of model/, and `sha256`, of its own
values without this key. A result without both is of an older version, and its files are not compared.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Literal

from tip_exp.records.folder import RunFolder, numbered_checkpoints
from tip_exp.utils.io import checksum, to_json

# Of which files the content is compared. newer: those changed after result.json; rows: also config.yaml and the rows;
# all: also model/, which takes a second for a gigabyte. Sizes are always compared.
Depth = Literal["newer", "rows", "all"]


def describe_files(folder: RunFolder) -> dict[str, list[Any]]:
    """Path in the folder -> [bytes, SHA-256]. Without the model card, which a user may edit."""
    paths = [folder.config, *folder.rows, *sorted(folder.model.rglob("*"))]
    files = [path for path in paths if path.is_file() and path != folder.card]
    return {str(path.relative_to(folder.root)): [path.stat().st_size, checksum(path)] for path in files}


def with_checksum(result: dict[str, Any]) -> dict[str, Any]:
    """The result as it will be read from its file, without nan, and with its `sha256`."""
    read = json.loads(to_json(result))
    return read | {"sha256": _checksum_of(read)}


def damage(folder: RunFolder, result: dict[str, Any], depth: Depth = "rows") -> str:
    """Which files are not those of the result that was read from result.json; "" if all are."""
    if result.keys() & {"files", "sha256"} and result.get("sha256") != _checksum_of(result):
        return f"{folder.result.name} does not agree with its own SHA-256"
    return damaged_files(folder, result, depth)


def damaged_files(folder: RunFolder, result: dict[str, Any], depth: Depth) -> str:
    """As `damage`, for a result whose own values were compared before. A model/ that was removed is not damage."""
    written_at = folder.result.stat().st_mtime_ns if folder.result.exists() else 0
    faults: list[str] = []
    for name, (size, expected) in result.get("files", {}).items():
        path = folder.root / name
        is_model = path.is_relative_to(folder.model)
        if is_model and not folder.model.exists():
            continue
        present, changed_at = (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else (0, 0)
        is_read = depth == "all" or (depth == "rows" and not is_model) or changed_at >= written_at
        if present != size:
            faults.append(f"{name} has {present} bytes instead of {size}")
        elif is_read and checksum(path) != expected:
            faults.append(f"{name} does not agree with its SHA-256 in {folder.result.name}")
    return "; ".join(faults)


def remedy(folder: RunFolder, damaged: str) -> str:
    """What to do about the damage without a loss: a launch writes model/ and result.json again from a checkpoint."""
    again = "move the folder away: the same command runs it again"
    if numbered_checkpoints(folder.checkpoints) and not re.search(r"\.jsonl|config\.yaml", damaged):
        again = f"rename {folder.result.name}: the same command writes it and model/ again, from the newest checkpoint"
    return f"Restore the file from a copy, or {again}"


def _checksum_of(result: dict[str, Any]) -> str:
    values = {key: value for key, value in result.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
