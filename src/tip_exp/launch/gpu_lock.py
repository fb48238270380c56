"""One lock file per GPU, so that the runs of a user that share a machine do not share a GPU."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tip_exp.launch import lock
from tip_exp.launch.lock import lock_or_holder
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.gpus import gpu_numbers, visible_gpus

POLL_S = 2.0


@contextmanager
def locked_gpus(count: int, environment: Mapping[str, str]) -> Iterator[dict[str, Path]]:
    """Lock `count` of the visible GPUs, waiting until they are free: {device: lock file}, devices as CUDA names them.

    Other users and other programs are not kept out. Yields {} if count is 0 or no GPU is visible. Raises ConfigError if
    fewer than `count` are.
    """
    devices = visible_gpus(environment)
    if not count or not devices:
        yield {}
        return
    if count > len(devices):
        raise ConfigError(
            f"ranks={count}, but {len(devices)} GPUs are visible ({', '.join(devices)}); lower ranks, or set ranks=auto"
        )
    # Jobs of one machine may name different GPUs alike, as SLURM counts from 0 in each job; machines may share TMPDIR.
    folder = lock.LOCAL / f"gpus_{platform.node()}_{environment.get('SLURM_JOB_ID', '')}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    numbers, waiting = gpu_numbers(devices), False
    while True:
        with ExitStack() as stack:
            locked: dict[str, Path] = {}
            holders: list[str] = []
            for device in devices:
                path = folder / f"{numbers[device].replace('/', '_')}.lock"
                if len(locked) < count:
                    if refused := stack.enter_context(lock_or_holder(path)):
                        holders.append(f"{device} by {refused.partition(';')[0]}")
                    else:
                        locked[device] = path
            if len(locked) == count:
                yield locked
                return
        # All are free again: two runs that keep half of their GPUs each would wait forever.
        if not waiting:
            print(f"waiting for {count} free GPUs (in use: {', '.join(holders)})", flush=True)
            waiting = True
        time.sleep(POLL_S)
