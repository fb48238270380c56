"""File systems for a run's folder: a small one in memory, and the folder itself as one that may only be read."""

from __future__ import annotations

import shutil
import subprocess
import time
from functools import cache
from pathlib import Path


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def unmount(root: Path) -> None:
    for _ in range(50):
        if subprocess.run(["umount", str(root)], capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run(["umount", "-l", str(root)], check=True)


@cache
def can_mount() -> bool:
    return (
        shutil.which("mount") is not None
        and subprocess.run(
            ["sh", "-c", "d=$(mktemp -d) && mount -t tmpfs -o size=1m none $d && umount $d && rmdir $d"],
            capture_output=True,
        ).returncode
        == 0
    )
