"""Damage to a file of a run, and the remedy that the error message names."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from scripts.chaos.forked import descendants, send
from scripts.chaos.settings import LIMIT_S, Trial
from tip_exp.records.reader import read_all

FLIPPED_WHEN_FINISHED = "flipped when finished"


def damage(trial: Trial, how: str) -> None:
    """Kill the run, or let it end, then damage one of its files: "flipped when finished" only rows, result or model."""
    launched, of_finished = trial.launch(), how == FLIPPED_WHEN_FINISHED
    if launched.wait(LIMIT_S, cpu_s=float("inf") if of_finished else trial.moment()) is None:
        trial.done.append("SIGKILL to group")
        send([launched.pid, *(pid for level in descendants(launched.pid) for pid in level)], signal.SIGKILL)
    launched.wait(LIMIT_S)
    folder = trial.folder()
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.root.rglob("*")):
        is_meant = path != folder.card and (
            not of_finished or path.is_relative_to(folder.model) or path in (*folder.rows, folder.result)
        )
        if path.is_file() and not path.is_symlink() and path.suffix != ".log" and is_meant:
            kinds.setdefault(re.sub(r"\d+", "N", str(path.relative_to(folder.root))), []).append(path)
    if not kinds:
        return
    kind = trial.draw.choice(sorted(kinds))
    path = trial.draw.choice(kinds[kind])
    whole = path.read_bytes()
    trial.done.append(f"{how}: {kind}, {'finished' if launched.code == 0 else 'unfinished'}")
    place = trial.draw.randrange(len(whole)) if whole else 0
    if how == "removed":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(whole[:place])
    elif whole:
        changed = bytearray(whole)
        changed[place] ^= 1 << trial.draw.randrange(8)
        path.write_bytes(changed)
    trial.restore = lambda: path.write_bytes(whole)
    if of_finished:
        (record,) = read_all([trial.root])
        assert record.damage or is_same_json(path, whole), f"{path.name} is damaged, but the report reads the run"


def is_same_json(path: Path, content: bytes) -> bool:
    """Whether a file holds the same values as before, as after a flipped bit in a blank."""
    with suppress(ValueError):
        return path.name == "result.json" and json.loads(path.read_bytes()) == json.loads(content)
    return False


def remedy(trial: Trial, text: str) -> None:
    """Do one of the things that an error message advises."""
    folder = trial.folder()
    options: list[tuple[str, Callable[[], object]]] = []
    if "rename result.json" in text:
        options.append(("rename result.json", lambda: folder.result.rename(trial.root / "result.json")))
    if f"remove {folder.lock}" in text:
        options.append(("remove the lock", folder.lock.unlink))
    if "move the folder away" in text:
        options.append(("move the folder away", lambda: folder.root.rename(trial.root / "away")))
    if "Restore" in text and trial.restore:
        options.append(("restore the file", trial.restore))
    assert options, f"no remedy: {text[-600:]}"
    name, act = trial.draw.choice(options)
    trial.done.append(f"remedy: {name}")
    act()
