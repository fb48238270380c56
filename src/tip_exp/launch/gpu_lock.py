"""One GPU a run where several runs share a machine: a lock file for each device, held as long as the run lives."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

REQUEST = "TIP_EXP_GPUS_PER_RUN"  # set by a launcher that starts several runs at once; absent: no lease
LOCKS = Path(tempfile.gettempdir()) / f"tip_exp_gpus_{os.getuid()}"
POLL_S = 2.0


@contextmanager
def leased_gpus(environment: Mapping[str, str], devices: list[str] | None = None) -> Iterator[dict[str, str]]:
    """Environment for a run's process: {"CUDA_VISIBLE_DEVICES": "3"} while it holds device 3; {} if none was asked for.

    Waits until enough devices are free. Raises ValueError if the machine has fewer than are asked for. On a machine
    without a GPU there is nothing to lease.
    """
    wanted = int(environment.get(REQUEST, "0"))
    devices = visible_gpus(environment) if devices is None else devices
    if not wanted or not devices:
        yield {}
        return
    if wanted > len(devices):
        raise ValueError(f"{REQUEST}={wanted}, but there are {len(devices)} GPUs ({', '.join(devices)})")
    LOCKS.mkdir(exist_ok=True)
    with ExitStack() as stack:
        held = _take(devices, wanted, stack)
        while len(held) < wanted:  # all or nothing, or two runs that hold half each would wait for ever
            stack.close()
            time.sleep(POLL_S)
            held = _take(devices, wanted, stack)
        yield {"CUDA_VISIBLE_DEVICES": ",".join(held)}


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """CUDA_VISIBLE_DEVICES if it is set, else the NVIDIA devices of this machine, as "0", "1", …"""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name.strip() for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    names = sorted(
        int(path.name.removeprefix("nvidia"))
        for path in Path("/dev").glob("nvidia[0-9]*")
        if path.name.removeprefix("nvidia").isdigit()
    )
    return [str(name) for name in names]


def _take(devices: list[str], wanted: int, stack: ExitStack) -> list[str]:
    held: list[str] = []
    for device in devices:
        if len(held) < wanted and _lock(stack.enter_context((LOCKS / f"{device}.lock").open("a"))):
            held.append(device)
    return held


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
