"""Damage to a file of a run, and the remedy that the error message names."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

from scripts.chaos.forked import descendants, send
from scripts.chaos.settings import LIMIT_S, Trial


def damage(trial: Trial, how: str) -> None:
    """Kill the run, or let it end, then damage one of its files.

    Of a finished run not what a launch does not read: the model, and bits of rows and result, whose sizes it compares.
    """
    launched = trial.launch()
    if launched.wait(trial.moment()) is None:
        send([launched.pid, *(pid for level in descendants(launched.pid) for pid in level)], signal.SIGKILL)
    launched.wait(LIMIT_S)
    folder = trial.folder()
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.root.rglob("*")):
        is_read = not folder.result.exists() or not (
            path.is_relative_to(folder.model) or (how == "flipped" and path in (*folder.rows, folder.result))
        )
        if path.is_file() and not path.is_symlink() and path.suffix != ".log" and is_read:
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


def remedy(trial: Trial, text: str) -> None:
    """Do one of the things that an error message advises."""
    folder = trial.folder()
    options: list[tuple[str, Callable[[], object]]] = []
    if "remove result.json" in text:
        options.append(("remove result.json", folder.result.unlink))
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
