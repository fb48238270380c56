"""Reuse of finished runs: a run that another sweep has finished is linked; a pair may load the model/ of a run.

Two runs are the same if their digests are equal: everything that decides the numbers, which excludes name, sweep and
logger.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from tip_exp.config.parse import digest
from tip_exp.config.schema import RunConfig
from tip_exp.records.folder import RunFolder
from tip_exp.records.integrity import Depth, damage, describe_files, remedy, with_checksum
from tip_exp.records.reader import find_runs
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.io import write_atomic
from tip_exp.utils.paths import SHIPPED, resolve_model


def finished_digests(outputs: Path) -> dict[str, RunFolder]:
    """digest -> a finished run below `outputs`; originals before links, then the first by name."""
    originals: dict[str, RunFolder] = {}
    links: dict[str, RunFolder] = {}
    for folder in find_runs([outputs]) if outputs.is_dir() else []:
        if result := read_result(folder, "newer"):
            (links if "reused_from" in result else originals).setdefault(result["digest"], folder)
    return links | originals


def find_duplicate(config: RunConfig, folder: RunFolder, finished: dict[str, RunFolder]) -> RunFolder | None:
    """The finished run with the same digest in another folder, whose rows are whole and whose models are as it read."""
    duplicate = finished.get(digest(config))
    if duplicate is None or duplicate.root.resolve() == folder.root.resolve() or changed_models(config, duplicate):
        return None
    return duplicate if read_result(duplicate) else None


def link_from(source: RunFolder, config: RunConfig, folder: RunFolder) -> None:
    """Give `folder` the results of the finished run `source`: result.json last, with `reused_from`.

    Rows are hard links, so they outlive the source folder; checkpoints and model are not linked.
    """
    for name in (folder.metrics.name, folder.eval_rows.name, folder.samples.name):
        rows, link = source.root / name, folder.root / name
        link.unlink(missing_ok=True)
        if rows.exists():
            try:
                os.link(rows, link)
            except OSError:  # another file system
                shutil.copyfile(rows, link)
    result = read_result(source)
    assert result is not None, "the source is a finished run"
    result |= {"name": config.name, "reused_from": str(source.root), "files": describe_files(folder)}
    write_atomic(folder.result, json.dumps(with_checksum(result), indent=2) + "\n")


def local_path(model: str) -> Path:
    return Path(resolve_model(model)).expanduser()


def changed_models(config: RunConfig, folder: RunFolder, roles: tuple[str, ...] = ("teacher", "student")) -> list[str]:
    """The keys of local models with a file that is newer than the run's result: a digest holds their paths alone."""
    if not folder.result.exists():
        return []
    finished = folder.result.stat().st_mtime
    paths = {f"pair.{role}.path": getattr(config.pair, role).path for role in roles}
    local = {key: path for key, path in paths.items() if not path.startswith(SHIPPED)}
    return [f"{key}={path}" for key, path in local.items() if newest_change(local_path(path)) > finished]


def newest_change(folder: Path) -> float:
    """When a file of the folder was written last, in seconds as of time.time(); 0 without a file."""
    times = [0.0]
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)


def check_models(config: RunConfig) -> None:
    """Raise ConfigError if a model of the pair is the model/ of a finished run and not what that run wrote."""
    for role in ("teacher", "student"):
        path = getattr(config.pair, role).path
        run = RunFolder(local_path(path).parent)
        result = parse_result(run) if local_path(path) == run.model else None
        if result and (damaged := damage(run, result, "all")):
            raise ConfigError(f"pair.{role}.path={path}: {damaged}. {remedy(run, damaged)}")


def read_result(folder: RunFolder, depth: Depth = "rows") -> dict[str, Any] | None:
    """result.json of a finished run; None if it is absent, torn or without a digest, or if the run is damaged."""
    result = parse_result(folder)
    return None if result is None or damage(folder, result, depth) else result


def parse_result(folder: RunFolder) -> dict[str, Any] | None:
    """result.json, whatever the other files hold; None if it is absent, torn or without a digest."""
    try:
        result = json.loads(folder.result.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) and "digest" in result else None
