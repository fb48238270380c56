"""One lock file per GPU, so that runs that share a machine do not share a GPU."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from tip_exp.utils.errors import ConfigError

GPUS_PER_RUN = "TIP_EXP_GPUS_PER_RUN"  # environment variable, set by conf/hydra/launcher/gpus.yaml
LOCKS = Path(tempfile.gettempdir()) / f"tip_exp_gpus_{os.getuid()}"
POLL_S = 2.0


def try_lock(file: IO[str], *, shared: bool = False) -> bool:
    """Lock an open file without waiting; False if another process holds it.

    The kernel releases the lock when every process that inherited the file descriptor has closed it. The `filelock`
    package unlocks explicitly on release, which would also unlock a child process that still runs.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked_gpus(environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Lock as many GPUs as TIP_EXP_GPUS_PER_RUN asks for: {"CUDA_VISIBLE_DEVICES": "3"} for the run's environment.

    Waits until enough GPUs are free. Yields {} if the variable is not set or the machine has no GPU. Raises ConfigError
    if the machine has too few.
    """
    count, devices = int(environment.get(GPUS_PER_RUN, "0")), visible_gpus(environment)
    if not count or not devices:
        yield {}
        return
    if count > len(devices):
        raise ConfigError(f"{GPUS_PER_RUN}={count}, but there are {len(devices)} GPUs ({', '.join(devices)})")
    LOCKS.mkdir(exist_ok=True)
    with ExitStack() as stack:
        while True:
            locked: list[str] = []
            for device in devices:
                if len(locked) < count and try_lock(stack.enter_context((LOCKS / f"{device}.lock").open("a"))):
                    locked.append(device)
            if len(locked) == count:
                break
            stack.close()  # two runs that keep half of their GPUs each would wait forever
            time.sleep(POLL_S)
        yield {"CUDA_VISIBLE_DEVICES": ",".join(locked)}


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """CUDA_VISIBLE_DEVICES if it is set, else the NVIDIA devices of this machine, as "0", "1", …"""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name.strip() for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    suffixes = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
    return sorted((suffix for suffix in suffixes if suffix.isdigit()), key=int)
