"""From an accepted config to a finished folder: is it done, does somebody hold it, else run it in a child.

One process a run: a sampling engine keeps memory until its process ends, and a crash must cost one run, not a sweep.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from typing import IO

from omegaconf import OmegaConf

from tip_exp.config.parse import differences, digest, load
from tip_exp.config.schema import RunConfig
from tip_exp.launch.gpu_lock import leased_gpus
from tip_exp.launch.reuse import adopt, find_twin, finished_digests, read_result
from tip_exp.records.folder import RunFolder
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.io import write_atomic
from tip_exp.utils.paths import OUTPUTS

# What a run's process gets unless the user's own environment says otherwise.
CHILD_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "KINETO_LOG_LEVEL": "99",  # no chatter of the profiler that counts allocations
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads cost 2.7 x the time where another process wants a core
}


class State(StrEnum):
    DONE = "done"
    RUNNING = "running"
    UNFINISHED = "unfinished"
    TO_DO = "to do"
    CHANGED = "config changed"


class RunFailedError(RuntimeError):
    """A run's process ended without a result."""


def state_of(config: RunConfig, folder: RunFolder) -> State:
    """What a folder holds of the run that this config describes."""
    return State.RUNNING if _is_held(folder) else _state_at_rest(config, folder)


def changes(config: RunConfig, folder: RunFolder) -> list[str]:
    """How the config differs from the one the folder's numbers were made with."""
    try:
        before = load(folder.config)
    except (OSError, ConfigError) as error:
        return [f"its config.yaml is not one of this version ({str(error).splitlines()[0]})"]
    return differences(before, config)


def launch(config: RunConfig, folder: RunFolder) -> None:
    """Finish the run, unless it is finished. Raises ConfigError, RunFailedError or KeyboardInterrupt."""
    folder.root.mkdir(parents=True, exist_ok=True)
    with _hold(folder) as lock:
        state = _state_at_rest(config, folder)
        if state is State.DONE:
            print(f"{config.name}: already finished ({folder.result})")
            return
        if state is State.CHANGED:
            raise ConfigError(
                f"{folder.root} holds a run with another config: {'; '.join(changes(config, folder))}. "
                "Give this run another name (name=…), or remove the folder"
            )
        _write_config(config, folder)
        if state is State.TO_DO and (twin := _twin(config, folder)):
            adopt(config, folder, twin)
            print(f"{config.name}: the same run is finished in {twin.root}; its files are linked here")
            return
        with leased_gpus(os.environ) as devices:
            code = _run_in_child(folder, lock, devices)
    if code < 0:
        raise RunFailedError(f"{config.name}: killed by {signal.Signals(-code).name}; the same command resumes it")
    if code != 0:
        raise RunFailedError(f"{config.name}: failed with exit code {code}; see {folder.log}")


def _run_in_child(folder: RunFolder, lock: IO[str], devices: dict[str, str]) -> int:
    """The exit code of the run's process, which sees the `devices` alone."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tip_exp.launch.worker", str(folder.root), str(os.getpid())],
        pass_fds=(lock.fileno(),),  # the child holds the lock too, should this process be killed
        env=CHILD_ENVIRONMENT | os.environ | devices,
    )
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.wait()  # it was interrupted as well and says where to go on
        raise


def _twin(config: RunConfig, folder: RunFolder) -> RunFolder | None:
    """Runs are shared between sweeps; who starts a single run under another name wants it run."""
    return find_twin(config, folder, finished_digests(OUTPUTS)) if config.sweep else None


def _state_at_rest(config: RunConfig, folder: RunFolder) -> State:
    result = read_result(folder) if folder.config.exists() else None
    if result and result["digest"] == digest(config):
        return State.DONE
    started = folder.result.exists() or any(folder.checkpoints.glob("step_*"))
    if not started:
        return State.TO_DO
    if changes(config, folder):
        return State.CHANGED
    return State.DONE if folder.result.exists() else State.UNFINISHED


def _write_config(config: RunConfig, folder: RunFolder) -> None:
    header = f"# resolved config of this run, digest {digest(config)}\n"
    write_atomic(folder.config, header + OmegaConf.to_yaml(OmegaConf.create(config.model_dump())))


@contextmanager
def _hold(folder: RunFolder) -> Iterator[IO[str]]:
    """Lock the folder for this process and its child; the kernel lets go when both have ended."""
    with folder.lock.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise RunFailedError(f"{folder.root} is held by {_holder(lock.read())}; wait for it, or stop it") from None
        lock.seek(0)
        lock.truncate()
        since = datetime.now().isoformat(timespec="seconds")
        json.dump({"pid": os.getpid(), "host": platform.node(), "since": since}, lock)
        lock.flush()
        yield lock


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError):
        return "another process"


def _is_held(folder: RunFolder) -> bool:
    if not folder.lock.exists():
        return False
    with folder.lock.open(encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
